"""Bytes and times of deltas: MiniLM with one element, or row, in a hundred live.

    uv run python -m benchmarks.deltas [--threads 1] [--swaps 10000]

Random places, random values. Times are medians, in ms; a swap takes back one tenant and writes another of the same
places, or of other ones. "Add and subtract" is how adapters of differences are swapped: how many weights have other
bits afterwards, by differences of a tenth of the weights' size.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.tenants.encoder import SentenceClassifier
from lightning_gcfreeze import delta

LIVE = 0.01


def tuned(model: nn.Module, unit: str, mask_seed: int, seed: int) -> dict[str, Tensor]:
    """The delta of a copy that differs by a normal step of 1 % in random elements or rows."""
    frozen, state = {}, dict(model.state_dict())
    generator = torch.Generator().manual_seed(mask_seed)
    for name, p in model.named_parameters():
        axes = p.shape if unit == "element" else p.shape[:1]
        live = torch.rand(axes, generator=generator) < LIVE
        frozen[name] = ~live.view(*axes, *[1] * (p.dim() - len(axes))).expand(p.shape)
    generator.manual_seed(seed)
    for name, mask in frozen.items():
        step = 0.01 * torch.randn(mask.shape, generator=generator).to(state[name].dtype)
        state[name] = torch.where(mask, state[name], state[name] * (1 + step))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    found = delta.of(model, frozen)
    model.load_state_dict(kept)
    return found


def milliseconds(call: Callable[[], object], times: int) -> float:
    """The median over some calls, after one that does not count."""
    call()
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(taken)


def changed_by_adding(model: nn.Module) -> float:
    """The fraction of weights that adding a difference and subtracting it again leaves with other bits.

    The difference is a trained number of its own, in float32, about a tenth of the weights' size.
    """
    touched = changed = 0
    for p in model.parameters():
        difference = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.detach().float().std() / 10
        there = (p.detach() + difference).to(p.dtype)
        touched += p.numel()
        changed += int(((there - difference).to(p.dtype) != p.detach()).sum())
    return changed / touched


def swaps(model: nn.Module, deltas: list[dict[str, Tensor]], times: int) -> tuple[float, float, bool]:
    """Median and 99th percentile of random swaps in ms, and whether the base's fingerprint is what it was."""
    tenants = delta.Tenants(model)
    for i, found in enumerate(deltas):
        tenants.add(str(i), found)
    draw, taken = random.Random(0), []
    while len(taken) < times:
        name = draw.choice(list(tenants))
        if name != tenants.current:
            with tenants.use(name):
                taken.append(1e3 * tenants.info(name).swap_seconds)
    taken.sort()
    return statistics.median(taken), taken[int(0.99 * times)], tenants.verify() == tenants.base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--swaps", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| dtype, unit | live | bytes a live value: with places, without | whole model / delta, MB | take | write |"
          " read | apply | swap, median and p99: same places | other places | base after the swaps |"
          " add and subtract: weights changed |")  # fmt: skip
    print("| --- |" + " ---: |" * 10 + " ---: |")
    for dtype in (torch.float32, torch.bfloat16):
        for unit in ("element", "row"):
            torch.manual_seed(0)
            model = SentenceClassifier(5).to(dtype).eval()
            same, other = ([tuned(model, unit, seed if m else 0, seed) for seed in range(4)] for m in (False, True))
            found = same[0]
            data, live = delta.pack(found), delta.inspect(found).live
            whole = sum(t.nbytes for t in model.state_dict().values())
            frozen = {name: torch.rand(p.shape) >= LIVE for name, p in model.named_parameters()}
            times = (
                milliseconds(lambda model=model, frozen=frozen: delta.of(model, frozen), 10),
                milliseconds(lambda found=found: delta.pack(found), 10),
                milliseconds(lambda data=data: delta.load(data), 10),
                milliseconds(lambda model=model, found=found: delta.revert(model, delta.apply(model, found)), 10) / 2,
            )
            loss = changed_by_adding(model)
            (median, p99, kept), (median_2, p99_2, kept_2) = (swaps(model, d, options.swaps) for d in (same, other))
            print(
                f"| {str(dtype).removeprefix('torch.')}, {unit} | {live:,} |"
                f" {len(data) / live:.2f}, {len(delta.pack(found, mask=found)) / live:.2f} |"
                f" {whole / 1e6:.1f} / {len(data) / 1e6:.2f} | {' | '.join(f'{ms:.0f}' for ms in times)} |"
                f" {median:.2f}, {p99:.2f} | {median_2:.2f}, {p99_2:.2f} |"
                f" {'the same' if kept and kept_2 else 'CHANGED'} | {loss:.1%} |"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()

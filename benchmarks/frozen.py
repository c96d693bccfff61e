"""What a step costs once a fraction f is frozen: time, optimizer bytes and peak memory, against the plain step.

    uv run python -m benchmarks.frozen [--models M1,M2] [--fractions 0.5,0.9] [--order movement] [--fused] [--memory]

Steps are timed as in `benchmarks.observe`: one process, one thread, every way in turn, medians of the rounds' ratios to
the plain step with the same implementation of Adam. Before that, the model trains for some steps while all samples are
observed; what the order ranks lowest then is frozen. Batches are random, or with --real digits and text, where there
are any for the model (M1, M2, M4): which elements are worth training depends on it, and so what their freeze saves.

A way that cannot train any number of parameters comes as near to (1 - f) p as it can. Its figures are in brackets where
it trains less than three quarters or more than five quarters of that.
"""

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from peft import LoraConfig, PeftConfig, ShiraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks.batches import REAL
from benchmarks.memory import BY_NAME
from benchmarks.observe import MODELS, Batch, Step, alternated, built, keep_freed_memory
from lightning_gcfreeze import orderings, selection
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.decision import scores_now
from lightning_gcfreeze.freezing import Holder, HoldMode, HoldPlan, WeightUses, worth_cutting
from lightning_gcfreeze.gradients import momentum

warnings.filterwarnings("ignore", "Sparse invariant checks")  # SHiRA's


_MINILM = BY_NAME["minilm"]
MODELS_AND_MINILM = MODELS | {"minilm": ("encoder of 6 layers of 384, 64 tokens, S = 16", _MINILM.make, _MINILM.data)}


class Decision:
    """What is to be frozen: the k elements of the lowest score, or rows or tensors that hold about as many."""

    def __init__(self, scores: Named, fraction: float) -> None:
        total = sum(score.numel() for score in scores.values())
        self.scores, self.k = scores, selection.resolve_count(fraction, total)
        self.live = total - self.k

    def masks(self, granularity: Granularity = "element", costs: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        scores = selection.pooled(self.scores, granularity)
        if granularity == "mixed":
            scores = dict(selection.in_blocks(scores, self.k, costs or {}))
        return selection.lowest_k(scores, self.k, granularity)


class Plain:
    """A training step: forward, backward, Adam. Ways differ in what they do before and after the optimizer's step."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        decision: Decision,
        fused: bool,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    ) -> None:
        self.batch, self.decision = batch, decision
        self.model = self.adapted(model)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.trained = sum(p.numel() for p in self.parameters.values())
        self.optimizer = optimizer(self.parameters.values(), fused=fused or None)
        for _ in range(2):
            self()  # the freeze meets an optimizer at work
        self.freeze()
        self.share = self.trained / max(1, decision.live)

    def __call__(self) -> None:
        F.cross_entropy(self.model(self.batch[0]), self.batch[1]).backward()
        self.before_step()
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()

    def adapted(self, model: nn.Module) -> nn.Module:
        """The model, with ``requires_grad`` where something trains."""
        return model

    def freeze(self) -> None:
        """After some steps."""

    def before_step(self) -> None:
        """The gradients are there."""

    def after_step(self) -> None:
        """The parameters have moved."""

    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))

    def index_bytes(self) -> int:
        """What knowing the live elements takes, beside that."""
        return 0


class Ours(Plain):
    """What the callback does at t0 and after it, without the Trainer."""

    def __init__(self, granularity: Granularity, mode: HoldMode, skip: bool, *args: Any, **kwargs: Any) -> None:
        self.held: Holder | None = None
        self.granularity = granularity
        self.plan = HoldPlan(mode, late=False, puts_back=False, skips_gradients=skip)  # nobody else reads or writes
        super().__init__(*args, **kwargs)

    def freeze(self) -> None:
        uses = WeightUses(self.model, self.parameters)
        uses.listen()
        self()
        uses.stop()
        masks = self.decision.masks(self.granularity, worth_cutting(self.parameters, uses.uses_per_step))
        self.trained = sum(int((~mask).sum()) for mask in masks.values())
        where = (self.parameters, masks, uses.uses_per_step)
        self.held = Holder(self.plan, self.optimizer, self.model, None, *where, resumed=False)

    def before_step(self) -> None:
        if self.held:
            self.held.begin_step()
            self.held.after_backward()
            self.held.before_step()

    def after_step(self) -> None:
        if self.held:
            self.held.after_step()

    def index_bytes(self) -> int:
        return self.held.savings.index_bytes if self.held else 0


class GradientMask(Plain):
    """Gradients times a mask, and the old values put back after the step.

    By "where", as it is usually written, or "lerp", several times faster on a CPU and right for finite values. With
    `clear` the optimizer forgets the frozen elements; on a CPU torch.sqrt is slow on exact zeros.
    """

    def __init__(self, *args: Any, by: str = "where", clear: bool = False, **kwargs: Any) -> None:
        self.by, self.clear = by, clear
        self.held: list[tuple[nn.Parameter, Tensor, Tensor, Tensor]] = []
        super().__init__(*args, **kwargs)

    def freeze(self) -> None:
        self.trained = self.decision.live
        for name, frozen in self.decision.masks().items():
            p = self.parameters[name]
            live = (~frozen).to(p.dtype)
            self.held.append((p, frozen, live, p.detach().clone()))
            for moment in ("exp_avg", "exp_avg_sq") if self.clear else ():
                self.optimizer.state[p][moment] *= live

    def before_step(self) -> None:
        for p, _, live, _ in self.held:
            p.grad.mul_(live)

    @torch.no_grad()
    def after_step(self) -> None:
        for p, frozen, live, kept in self.held:
            if self.by == "where":
                p.copy_(torch.where(frozen, kept, p))
            else:
                torch.lerp(kept, p, live, out=p)

    def index_bytes(self) -> int:
        return sum(live.nbytes + frozen.nbytes * (self.by == "where") for _, frozen, live, _ in self.held)


class LoRA(Plain):
    """PEFT's adapters, of one rank r on all layers, of the types that it takes, with room for it: r (n + m) <= n m."""

    layers: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
    config: Callable[..., PeftConfig] = LoraConfig

    def adapted(self, model: nn.Module) -> nn.Module:
        assert self.decision.k, "all parameters train, there is nothing to adapt"
        shapes = {n: layer.weight.flatten(1).shape for n, layer in model.named_modules() if type(layer) in self.layers}

        def with_room(rank: int) -> dict[str, int]:
            return {name: rank * (n + m) for name, (n, m) in shapes.items() if rank * (n + m) <= n * m}

        ranks = range(1, 1 + max(n * m // (n + m) for n, m in shapes.values()))
        rank = min(ranks, key=lambda r: abs(sum(with_room(r).values()) - self.decision.live))
        names = "|".join(map(re.escape, with_room(rank)))
        return inject_adapter_in_model(self.config(r=rank, target_modules=names), model)


class SHiRA(LoRA):
    """At random places, as is its default."""

    layers = (nn.Linear,)
    config = ShiraConfig

    def index_bytes(self) -> int:
        indices = (getattr(layer, "shira_indices", {}) for layer in self.model.modules())
        return sum(index.nbytes for by_name in indices for index in by_name.values())


class FrozenPrefix(Plain):
    """The first layers do not train: what `BackboneFinetuning(train_bn=False)` does until it unfreezes them."""

    def adapted(self, model: nn.Module) -> nn.Module:
        layers = [layer for layer in model.modules() if layer._parameters]
        sizes = [sum(p.numel() for p in layer.parameters(recurse=False)) for layer in layers]
        first = min(range(len(layers)), key=lambda n: abs(sum(sizes[n:]) - self.decision.live))
        for layer in layers[:first]:
            if [*layer.children()]:  # some of which are later layers
                for p in layer.parameters(recurse=False):
                    p.requires_grad_(False)
            else:
                BaseFinetuning.freeze(layer, train_bn=False)
        return model


class NoOptimizer(Plain):
    """Forward and backward alone: what a cheaper optimizer cannot get below."""

    def freeze(self) -> None:
        self.trained = self.decision.live
        self.optimizer.step = lambda: None
        self.optimizer.state.clear()


Maker = Callable[..., Plain]
OURS: dict[str, Maker] = {
    f"{granularity}, {mode}{', skip_frozen_gradients=False' * (not skip)}": partial(Ours, granularity, mode, skip)
    for granularity in ("element", "mixed", "row", "tensor")
    for mode, skip in (("compact", True), ("compact", False), ("restore", True))
}
PEERS: dict[str, Maker] = {
    "gradient mask, torch.where": GradientMask,
    "gradient mask, torch.where, state cleared": partial(GradientMask, clear=True),
    "gradient mask, torch.lerp": partial(GradientMask, by="lerp"),
    "PEFT LoRA": LoRA,
    "PEFT SHiRA": SHiRA,
    "first layers frozen": FrozenPrefix,
}
WAYS: dict[str, Maker] = {"plain": Plain, "no optimizer (a limit)": NoOptimizer}
TABLES = {
    "step": ("Step, as a ratio to the plain one", "ms", ".1f"),
    "state": ("Optimizer state + indices or masks, as ratios to the plain state", "bytes", ",d"),
    "peak": ("Peak of the model and its steps, MiB", "MiB", ".0f"),
}


@dataclass
class Figures:
    """Of one way, as ratios to the plain step, whose own are in milliseconds and bytes; the peak in MiB."""

    step: float = math.nan
    state: float = math.nan
    indices: float = math.nan
    peak: float = math.nan
    trained: float = math.nan  # of (1 - f) p

    def cell(self, what: str) -> str:
        state = f"{self.state:.2f} + {self.indices:.2f}" if self.indices else f"{self.state:.2f}"
        text = {"step": f"{self.step:.2f}", "state": state, "peak": f"{self.peak:.0f}"}[what]
        text = text if 0.75 <= self.trained <= 1.25 else f"({text})"
        return "-" if "nan" in text else text


def measure(name: str, args: argparse.Namespace) -> dict[str, dict[str, Figures]]:
    """By model and fraction, and by way. All ways start from the same model, which has trained for some steps."""
    torch.manual_seed(0)
    _, make, random = MODELS_AND_MINILM[name]
    data = REAL.get(name, random) if args.real else random
    count = None if orderings.reads_variance(orderings.resolve(args.order)) else 1  # all samples, if they are read
    step = Step(make().train(), data(), count=count)
    warm_up(step, data, args.warm_up)
    scores = scores_of(step, args.order)
    ways, results = WAYS | OURS | ({} if args.no_peers else PEERS), {}
    for fraction in map(float, args.fractions.split(",")):
        case, decision = f"{name} f={fraction:g}", Decision(scores, fraction)
        makers = {way: partial(maker, decision=decision, fused=args.fused) for way, maker in ways.items()}
        if args.memory:
            results[case] = {way: in_its_own_process(maker, step.model, step.batch) for way, maker in makers.items()}
            continue
        steps = built(makers, step.model, step.batch, case)
        ratios = alternated(steps, args.rounds)
        one = steps["plain"].state_bytes()
        results[case] = {way: Figures() for way in steps} | {
            way: Figures(ratios[way], its.state_bytes() / one, its.index_bytes() / one, trained=its.share)
            for way, its in steps.items()
            if its
        }
        results[case]["plain"].state = one
    return results


def warm_up(step: Step, data: Callable[[], Batch], steps: int) -> None:
    """Take observed steps on random batches; movement counts from halfway on."""
    weights = {name: p.detach() for name, p in step.parameters.items()}
    for i in range(steps):
        if i == steps // 2:
            step.statistics.begin_movement(weights, _rates(step))
        step.batch = data()
        step()


def scores_of(step: Step, order: str) -> dict[str, Tensor]:
    """Return the scores by an order of what was observed, and of the optimizer's state."""
    weights = {name: p.detach() for name, p in step.parameters.items()}
    ordering = orderings.resolve(order)
    needed = orderings.needed_from_optimizer(ordering)
    read = momentum.moments(step.optimizer, step.parameters, needed)
    moved = {"movement": step.statistics.movement(weights, _rates(step))} if "movement" in needed else {}
    moments = moved | {field: getattr(read, field) for field in needed - moved.keys()}
    return dict(scores_now(step.statistics, ordering, weights, 0, "element", moments))


def _rates(step: Step) -> dict[str, float]:
    return momentum.learning_rates(step.optimizer, momentum.group_indices(step.optimizer, step.parameters))


def in_its_own_process(maker: Maker, model: nn.Module, batch: Batch) -> Figures:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.observe", "peft"])
    with ProcessPoolExecutor(1, context) as process:
        try:
            return process.submit(peak, maker, model, batch).result()
        except Exception:  # as in the table of steps, where it is said why
            return Figures()


def peak(maker: Maker, model: nn.Module, batch: Batch) -> Figures:
    """Of ten steps after the freeze: MiB that the model and the way take at most. Needs Linux and glibc."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed is given back
    maker(deepcopy(model).train(), batch)()  # from here on all code has been loaded
    without = most_from_now() - sum(t.nbytes for t in model.state_dict().values()) / 2**20
    step = maker(model.train(), batch)
    most_from_now()
    for _ in range(10):
        step()
    return Figures(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - without, trained=step.share)


def most_from_now() -> float:
    """MiB of this process now; from here on it is the most since now that the system tells."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(results: dict[str, dict[str, Figures]], what: str) -> str:
    """A column for each model and fraction, a row for each way."""
    title, unit, form = TABLES[what]
    plain, *ways = next(iter(results.values()))
    rows = [["way", *results], ["---"] * (1 + len(results))]
    rows.append([f"plain, {unit}", *(format(getattr(figures[plain], what), form) for figures in results.values())])
    rows += [[way, *(figures[way].cell(what) for figures in results.values())] for way in ways]
    return "\n".join([f"\n{title}\n", *(f"| {' | '.join(row)} |" for row in rows)])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="(%(default)s)")
    parser.add_argument("--fractions", default="0,0.5,0.9,0.99", help="of frozen elements (%(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of every way (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=24, help="observed steps (%(default)s)")
    parser.add_argument("--real", action="store_true", help="batches of digits and text, where there are any")
    parser.add_argument("--fused", action="store_true", help="fused Adam, in the plain step too")
    parser.add_argument("--order", default="variance", help="by which the lowest freeze (%(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--memory", action="store_true", help="peaks in MiB, instead of times")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    # Set by importing Lightning: torch then looks for an NVIDIA driver in each step of an optimizer, a fifth of M1's.
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    results = {case: ways for name in args.models.split(",") for case, ways in measure(name, args).items()}
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {args.rounds} rounds")
    for what in ("peak",) if args.memory else ("step", "state"):
        print(table(results, what))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=asdict), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What observing and freezing cost on a GPU: time, memory and the freeze itself, against the plain step.

    uv run python -m benchmarks.gpu [--parts observed,frozen,trainer,memory,selection] [--models M2,M4] [--json FILE]

A GPU works off a queue that the CPU fills, so steps are timed in bursts that end with a synchronization. Each round
times one burst of every way, in turn; the figure is the median of the rounds' ratios to the plain step with the same
implementation of Adam. "observed" and "frozen" are steps as those of `benchmarks.observe` and `benchmarks.frozen`,
"trainer" are whole runs of Lightning's. Frozen is what is lowest in an order after some observed steps on random
batches.

Models M1 to M5 are those of `benchmarks.observe`. M2w is a wide M2, M4L a language model of 153 million parameters
under bfloat16 autocast.
"""

import argparse
import gc
import itertools
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.frozen import Decision, GradientMask, LoRA, NoOptimizer, Ours, Plain
from benchmarks.observe import MODELS, Batch, Empty, LanguageModel, Step, Watched, built
from lightning_gcfreeze import GradCovFreezeCallback, orderings, selection
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.decision import scores_now
from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.observing import Observing

warnings.filterwarnings("ignore")
BURST, ROUNDS = 0.025, 5  # seconds, and how many

MODELS_ON_GPU = MODELS | {
    "M2w": (
        "MLP 784-4096-4096-10, S = 512",
        lambda: nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)),
        lambda: (torch.randn(512, 784), torch.randint(10, (512,))),
    ),
    "M4L": (
        "transformer, 12 layers of 1024, 512 tokens, S = 16, bf16-mixed",
        lambda: LanguageModel(width=1024, layers=12, length=512),
        lambda: (torch.randint(1000, (16, 512)), torch.randint(1000, (16, 512))),
    ),
}
LARGE = ("M4L",)
Results = dict[str, dict[str, float]]


class Mixed(nn.Module):
    """A model under bfloat16 autocast; its loss is in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = self.model(x)
        return out.float()


class Observed(Step):
    """A step that is observed for orders by the variance, and by progress, or by progress alone."""

    def __init__(self, model: nn.Module, batch: Batch, needs: str = "", noise: bool = True, **observed: Any) -> None:
        super().__init__(model, batch, **observed)
        fields = orderings.needed_by(orderings.ORDERINGS[needs]) if needs else frozenset[str]()
        self.statistics = Observing(self.parameters, needs=fields, reads_samples=noise)
        self.steps = itertools.count(1)
        self.noise = noise

    def __call__(self) -> None:
        if self.noise:
            return super().__call__()
        self.training_step(self.batch, 0).backward()
        self.statistics.observe(next(self.steps), {}, batch_gradients(self.parameters), "1/t")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return None


OBSERVED: dict[str, Callable[..., Any]] = {
    "plain": Step,
    "observe, first sample": partial(Observed, count=1),
    "observe, first sample by replay": partial(Observed, count=1, how="replay"),
    "observe, all samples": partial(Observed, count=None),
    "observe for progress": partial(Observed, needs="progress", noise=False),
}
FROZEN: dict[str, tuple[str, Callable[..., Plain]]] = {
    "plain": ("variance", Plain),
    "no optimizer (a limit)": ("variance", NoOptimizer),
    "element": ("variance", partial(Ours, "element", "compact", True)),
    "element, skip_frozen_gradients=False": ("variance", partial(Ours, "element", "compact", False)),
    "element, restore": ("variance", partial(Ours, "element", "restore", True)),
    "row": ("variance", partial(Ours, "row", "compact", True)),
    "tensor": ("variance", partial(Ours, "tensor", "compact", True)),
    "element by progress": ("progress", partial(Ours, "element", "compact", True)),
    "row by progress": ("progress", partial(Ours, "row", "compact", True)),
    "element at random": ("random", partial(Ours, "element", "compact", True)),
    "gradient mask, torch.where": ("variance", GradientMask),
    "PEFT LoRA": ("variance", LoRA),
}
IN_TRAINER: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "a callback with empty hooks": None,
    "observe, first sample": {"k": 0.5},
    "observe, all samples, each 16th step": {"k": 0.5, "samples": "all", "every": 16},
    "observe for progress": {"k": 0.5, "order": "progress"},
    "frozen .5, element": {"t0": 8, "k": 0.5},
    "frozen .9, element": {"t0": 8, "k": 0.9},
    "frozen .9, row": {"t0": 8, "k": 0.9, "granularity": "row"},
    "frozen .9, element by progress": {"t0": 8, "k": 0.9, "order": "progress"},
    "frozen .9, element at random": {"t0": 8, "k": 0.9, "order": "random"},
    "frozen .99, element": {"t0": 8, "k": 0.99},
    "frozen .99, row": {"t0": 8, "k": 0.99, "granularity": "row"},
}
IN_MEMORY: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "element": {"k": 0.9},
    "row": {"k": 0.9, "granularity": "row"},
    "element, all samples": {"k": 0.9, "samples": "all"},
    "element by progress": {"k": 0.9, "order": "progress"},
    "element, restore": {"k": 0.9, "hold": "restore"},
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternated(steps: dict[str, Callable[[], None] | None]) -> dict[str, float]:
    """Median ratio to "plain" of bursts, by way; "plain" in milliseconds, and the part of it that the CPU needs."""

    def burst(step: Callable[[], None], length: int) -> tuple[float, float]:
        synchronize()
        start = time.perf_counter()
        for _ in range(length):
            step()
        queued = time.perf_counter()
        synchronize()
        return (time.perf_counter() - start) / length, (queued - start) / length

    plain = steps["plain"]
    assert plain is not None
    least = min(burst(plain, 3)[0] for _ in range(3))
    length = max(3, math.ceil(BURST / least))
    slow = {way: alone for way, step in steps.items() if step and (alone := burst(step, 1)[0]) > 15 * least}
    times: dict[str, list[float]] = {way: [] for way in steps}
    launching = []
    for _ in range(ROUNDS):
        for way, step in steps.items():
            if step is None:
                continue
            both = (slow[way], 0.0) if way in slow else burst(step, length)  # known well enough
            times[way].append(both[0])
            if way == "plain":
                launching.append(both[1] / both[0])
    ratios = {
        way: statistics.median([t / one for t, one in zip(times[way], times["plain"], strict=False)] or [math.nan])
        for way in steps
    }
    own = 1000 * statistics.median(times["plain"])
    return {"plain": own, "plain, the CPU's part": statistics.median(launching)} | {
        way: ratio for way, ratio in ratios.items() if way != "plain"
    }


def calls(step: Callable[[], None] | None) -> dict[str, float]:
    """What a step asks of CUDA: kernels launched, and waits for the device."""
    if step is None or not torch.cuda.is_available():
        return {}
    try:
        with torch.profiler.profile() as profile:
            step()
            synchronize()
    except RuntimeError:
        return {}
    counts = {event.key: event.count for event in profile.key_averages()}
    kernels = sum(n for key, n in counts.items() if "LaunchKernel" in key)
    return {"kernels": kernels, "waits": counts.get("cudaStreamSynchronize", 0)}


def calls_of(steps: dict[str, Callable[[], None] | None]) -> dict[str, float]:
    return {f"{what}, {way}": n for way, step in steps.items() for what, n in calls(step).items()}


def made(name: str, device: str) -> tuple[nn.Module, Callable[[], Batch]]:
    """A model on a device, and what makes a batch there."""
    torch.manual_seed(0)
    _, make, data = MODELS_ON_GPU[name]
    model = Mixed(make()) if name in LARGE else make()

    def batch() -> Batch:
        x, y = data()
        return x.to(device), y.to(device)

    return model.to(device).train(), batch


def scores(name: str, device: str, steps: int) -> tuple[nn.Module, Batch, dict[str, Named]]:
    """A model that was observed for some steps, a batch, and what the orders make of that."""
    model, data = made(name, device)
    step = Observed(model, data(), needs="progress", count=1 if name in LARGE else None)
    for _ in range(steps):
        step.batch = data()
        step()
    step.optimizer.zero_grad()
    of_orders = {
        order: scores_now(step.statistics, orderings.ORDERINGS[order], step.parameters, 0, "element")
        for order in ("variance", "progress", "random")
    }
    return model, step.batch, of_orders


def observed(name: str, device: str) -> dict[str, float]:
    model, data = made(name, device)
    steps = built(OBSERVED, model, data(), name)
    return alternated(steps) | calls_of(steps)


def frozen(name: str, device: str, fractions: Sequence[float], adams: Sequence[bool], results: Results) -> None:
    model, batch, of_orders = scores(name, device, 24)
    for fraction in fractions:
        decisions = {order: Decision(found, fraction) for order, found in of_orders.items()}
        for fused in adams if fraction == 0.9 else [name in LARGE]:
            makers = {
                way: partial(maker, decision=decisions[order], fused=fused) for way, (order, maker) in FROZEN.items()
            }
            steps = built(makers, model, batch, f"{name} f={fraction:g}")
            times = alternated(steps)
            one = steps["plain"].state_bytes()
            of_state = {
                f"state, {way}": (step.state_bytes() + step.index_bytes()) / one
                for way, step in steps.items()
                if step is not None and way in ("element", "row", "element by progress", "element at random")
            }
            shares = {
                f"trained, {way}": step.share
                for way, step in steps.items()
                if step is not None and way != "plain" and not 0.75 <= step.share <= 1.25
            }
            of_cuda = calls_of({way: steps[way] for way in ("plain", "element", "row")}) if fraction == 0.9 else {}
            results[f"{name} f={fraction:g} {'fused' if fused else 'default'}"] = times | of_state | shares | of_cuda
            del steps
            clear()


class Timed(pl.Callback):
    """The mean step between two, with nothing left in the queue at either."""

    def __init__(self, first: int, last: int) -> None:
        self.bounds, self.times = (first, last), list[float]()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.bounds:
            synchronize()
            self.times.append(time.perf_counter())

    def seconds(self) -> float:
        return (self.times[1] - self.times[0]) / (self.bounds[1] - self.bounds[0])


class Peaks(pl.Callback):
    """The most memory that is allocated in the steps up to t0, in step t0, and after it, in MiB."""

    def __init__(self, t0: int) -> None:
        self.t0, self.before = t0, torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.found = {"observing": 0.0, "the freeze": 0.0, "frozen": 0.0}

    def on_train_batch_start(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = batch_idx + 1
        if torch.cuda.is_available() and step != self.t0 + 1:  # in which what is frozen is let go of
            now = (torch.cuda.max_memory_allocated() - self.before) / 2**20
            when = "observing" if step < self.t0 else "the freeze" if step == self.t0 else "frozen"
            self.found[when] = max(self.found[when], now)


def fit(name: str, device: str, steps: int, *callbacks: pl.Callback) -> pl.LightningModule:
    torch.manual_seed(0)
    _, make, data = MODELS_ON_GPU[name]
    x, y = data()
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        precision="bf16-mixed" if name in LARGE else "32-true", callbacks=list(callbacks),
    )  # fmt: skip
    module = Watched(make())
    trainer.fit(module, DataLoader([(x.to(device), y.to(device))] * steps, batch_size=None))
    return module


def in_trainer(name: str, device: str) -> dict[str, float]:
    """From step 72 to 120: of every 16th step, three, in none of which capture is compared with replay."""
    first, steps = (40, 16) if name in LARGE else (72, 48)
    times: dict[str, list[float]] = {way: [] for way in IN_TRAINER}
    for _ in range(2):
        for way, arguments in IN_TRAINER.items():
            timed = Timed(first, first + steps)
            ours = [] if arguments is None else [GradCovFreezeCallback(**({"t0": 10**6} | arguments))]
            empty = [Empty()] if way.startswith("a callback") else []
            fit(name, device, first + steps + 1, timed, *ours, *empty)
            times[way].append(timed.seconds())
            clear()
    return {
        way: statistics.median(t / one for t, one in zip(of_way, times["plain"], strict=True))
        for way, of_way in times.items()
    } | {"plain": 1000 * statistics.median(times["plain"])}


def memory(name: str, device: str) -> dict[str, float]:
    """Peaks in MiB, by way and moment; beyond what was there before the model."""
    found: dict[str, float] = {}
    for way, arguments in IN_MEMORY.items():
        clear()
        peaks = Peaks(8)
        fit(name, device, 20, peaks, *([] if arguments is None else [GradCovFreezeCallback(t0=8, **arguments)]))
        for moment, most in peaks.found.items():
            found[f"{way}: {moment}"] = most
    return found


def select(device: str, sizes: Sequence[int]) -> Results:
    """Seconds, and peak extra memory by the scores', of finding the lowest 90 %."""
    results: Results = {}
    for size in sizes:
        clear()
        scores = {f"w{i}": torch.rand(size // 10, device=device) for i in range(10)}
        k = round(0.9 * size)
        ways: dict[str, Callable[[], Any]] = {
            "selection.lowest": lambda s=scores, k=k: selection.lowest_k(s, k),
            "torch.sort": lambda s=scores: torch.cat([*s.values()]).sort(stable=True),
            "torch.kthvalue": lambda s=scores, k=k: torch.cat([*s.values()]).kthvalue(k),
        }
        results[f"{size:.0e}"] = {}
        for way, run in ways.items():
            run()
            clear()
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            results[f"{size:.0e}"][f"{way}, ms"] = 1000 * (time.perf_counter() - start)
            most = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0
            results[f"{size:.0e}"][f"{way}, memory"] = most / (4 * size)
    return results


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(results: Results) -> str:
    """A column for each case, a row for each way of any."""
    ways = list(dict.fromkeys(way for of_case in results.values() for way in of_case))

    def cell(value: float | None) -> str:
        if value is None:
            return ""
        return "fails" if math.isnan(value) else f"{value:.2f}" if value < 30 else f"{value:.0f}"

    lines = [f"| way | {' | '.join(results)} |", f"| --- |{' --- |' * len(results)}"]
    lines += [f"| {way} | {' | '.join(cell(of_case.get(way)) for of_case in results.values())} |" for way in ways]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="observed,frozen,trainer,memory,selection", help="(%(default)s)")
    parser.add_argument("--models", default="M2,M2w,M4,M5,M4L", help="(%(default)s)")
    parser.add_argument("--fractions", default="0.5,0.9,0.99", help="of frozen elements (%(default)s)")
    parser.add_argument("--sizes", default="1000000,10000000,100000000", help="of selections (%(default)s)")
    parser.add_argument("--device", default="cuda", help='"cpu" to try this program (%(default)s)')
    parser.add_argument("--json", type=Path, help="where to write the figures, after each of them")
    args = parser.parse_args(argv)
    for logger in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, {ROUNDS} rounds")
    everything: dict[str, Results] = {}
    start = time.perf_counter()

    def keep(part: str, case: str, run: Callable[[], dict[str, float]]) -> None:
        try:
            everything.setdefault(part, {})[case] = run()
        except Exception as error:
            print(f"{part}, {case}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        print(f"{time.perf_counter() - start:.0f} s: {part}, {case}", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(everything, indent=1), encoding="utf-8")
        clear()

    def by_fraction(name: str) -> dict[str, float]:
        fractions = [float(f) for f in args.fractions.split(",")]
        frozen(name, args.device, fractions, [False, True], everything.setdefault("frozen", {}))
        return {}

    names = args.models.split(",")
    if "selection" in args.parts:
        everything["selection"] = select(args.device, [int(size) for size in args.sizes.split(",")])
    for name in names:
        if "observed" in args.parts:
            keep("observed", name, lambda name=name: observed(name, args.device))
        if "frozen" in args.parts:
            keep("of freezes", name, lambda name=name: by_fraction(name))
        if "trainer" in args.parts:
            keep("trainer", name, lambda name=name: in_trainer(name, args.device))
        if "memory" in args.parts:
            keep("memory", name, lambda name=name: memory(name, args.device))
    everything.pop("of freezes", None)
    for part, results in everything.items():
        for i in range(0, len(results), 6):
            print(f"\n{part}\n\n{table(dict(list(results.items())[i : i + 6]))}")


if __name__ == "__main__":
    main()

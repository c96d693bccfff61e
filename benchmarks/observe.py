"""What a step costs while it is observed: ratios to the plain step of the same model, in one process, alternating.

    uv run --group bench python -m benchmarks.observe [--models M1,M2] [--rounds 60] [--trainer [--cpu-time]]
        [--json FILE]

A step is forward, backward and the default Adam; one thread. Each round times one step of every way, in turn, so that
whatever slows the machine down slows all of them; the figure is the median of the rounds' ratios. Freed memory stays
with the process: which way has to ask for pages again would otherwise be a matter of luck, and cost up to a third.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import logging
import math
import multiprocessing
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.gradients.choice import SourceChoice
from lightning_gcfreeze.gradients.source import SampleGradients
from lightning_gcfreeze.observing import Observing

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A causal transformer block with linear layers alone."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class LanguageModel(nn.Module):
    """Next-token logits, as (S, vocabulary, time)."""

    def __init__(
        self, vocabulary: int = 1000, width: int = 256, layers: int = 4, length: int = 64, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.register_buffer("places", torch.randn(length, width) / 10)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.places)))
        return logits.transpose(1, 2)


def convnet() -> nn.Sequential:
    """0.5 million parameters, no BatchNorm."""
    layers: list[nn.Module] = []
    for n_in, n_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 200), nn.ReLU(), nn.Linear(200, 10))


def images(size: int, batch: int, classes: int = 10) -> Batch:
    return torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))


MODELS: dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Batch]]] = {
    "M1": (
        "MLP 784-10-10, S = 64",
        lambda: nn.Sequential(nn.Linear(784, 10), nn.ReLU(), nn.Linear(10, 10)),
        lambda: (torch.randn(64, 784), torch.randint(10, (64,))),
    ),
    "M2": (
        "MLP 784-1024-1024-10, S = 128",
        lambda: nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
        lambda: (torch.randn(128, 784), torch.randint(10, (128,))),
    ),
    "M3": ("convnet, 32x32, S = 64", convnet, lambda: images(32, 64)),
    "M4": (
        "transformer, 4 layers of 256, 64 tokens, S = 16",
        LanguageModel,
        lambda: (torch.randint(1000, (16, 64)), torch.randint(1000, (16, 64))),
    ),
    "M5": ("ResNet-18 with BatchNorm, 64x64, S = 32", lambda: resnet18(num_classes=10), lambda: images(64, 32)),
}


class Step:
    """A training step of a model of its own: forward, backward, optimizer; and what is observed in between."""

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        **observed: Any,
    ) -> None:
        self.model, self.batch = model, batch
        self.optimizer = optimizer(self.model.parameters())
        self.parameters = dict(self.model.named_parameters())
        self.samples = None
        if observed:
            mode = observed.get("how", "auto")
            self.samples = SampleGradients(
                mode, self.model, self.parameters, self.training_step, contextlib.nullcontext, lambda _: None,
                SourceChoice.initial(mode, self.parameters), observed.get("count", 1),
            )  # fmt: skip
            self.statistics = Observing(self.parameters)
            self.steps = itertools.count(1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def __call__(self) -> None:
        if self.samples is not None:
            self.samples.begin_batch(self.batch, 0)
        loss = self.training_step(self.batch, 0)
        if self.samples is not None:
            self.samples.begin_backward()
        loss.backward()
        if self.samples is not None:
            self.samples.end_backward()
            g_batch, size = batch_gradients(self.parameters), len(self.batch[1])
            found = self.samples.gradients(1.0, g_batch, size)
            assert found is not None
            self.statistics.observe(next(self.steps), found.by_name, g_batch, "1/t", size, found.mean_is_g_batch)
        self.optimizer.step()
        self.optimizer.zero_grad()


WAYS: dict[str, dict[str, Any]] = {
    "first sample": {"how": "auto"},
    "first sample, by replay": {"how": "replay"},
    "all samples": {"how": "auto", "count": None},
}

MEMORY: dict[str, dict[str, Any]] = {
    "plain": {},
    "first sample": {"how": "capture"},
    "first sample, a step that compares": {"how": "auto"},
    "all samples": {"how": "capture", "count": None},
}
"""What `samples` and `gradients` of the callback choose."""


def makers(peers: bool) -> dict[str, Callable[[nn.Module, Batch], Callable[[], None]]]:
    """For each way, what makes a step of a model and a batch."""
    ours = {way: partial(Step, **options) for way, options in WAYS.items()}
    if not peers:
        return {"plain": Step, **ours}
    from benchmarks.peers import PEERS

    return {"plain": Step, **ours, **PEERS}


def measure(name: str, rounds: int, peers: bool) -> dict[str, float]:
    """Median ratio to the plain step, by way, NaN where it fails; "plain" is in milliseconds."""
    torch.manual_seed(0)
    _, make, data = MODELS[name]
    return alternated(built(makers(peers), make(), data(), name), rounds)


def built(
    makers: dict[str, Callable[[nn.Module, Batch], Any]], model: nn.Module, batch: Batch, name: str
) -> dict[str, Any]:
    """A step of every way, each with a copy of the model, past its first runs; None where it fails."""
    steps: dict[str, Any] = {}
    for way, maker in makers.items():
        try:
            steps[way] = maker(deepcopy(model).train(), batch)
            for _ in range(3):  # the first ones allocate, and compare
                steps[way]()
        except Exception as error:
            steps[way] = None
            print(f"{name}, {way}: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}", file=sys.stderr)
    return steps


def alternated(steps: dict[str, Callable[[], None] | None], rounds: int) -> dict[str, float]:
    """Median ratio to the step "plain", by way, NaN where there is no step; "plain" is in milliseconds."""
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        for way, step in steps.items():
            if step is None or (len(times[way]) >= 4 and sum(times[way][:4]) > 10 * sum(times["plain"][:4])):
                continue  # known well enough
            start = time.perf_counter()
            step()
            times[way].append(time.perf_counter() - start)
    ratios = {
        way: statistics.median([t / plain for t, plain in zip(times[way], times["plain"], strict=False)] or [math.nan])
        for way in steps
    }
    return ratios | {"plain": 1000 * statistics.median(times["plain"])}


class Watched(pl.LightningModule):
    """A model of the table in a Trainer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Clock(pl.Callback):
    """When steps began, after the first ones."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.times.append(self.now())

    def seconds(self) -> float:
        """The mean step: where each 16th is observed, the median would not see it."""
        steps = sorted(b - a for a, b in zip(self.times[20:], self.times[21:], strict=False))
        return statistics.mean(steps[: len(steps) * 98 // 100])  # without what else the machine did


IN_TRAINER: dict[str, Callable[[], list[pl.Callback]]] = {
    "plain": lambda: [],
    "a callback with empty hooks": lambda: [Empty()],
    "first sample": lambda: [GradCovFreezeCallback(t0=10**6, k=0.5)],
    "all samples, every 16th step": lambda: [GradCovFreezeCallback(t0=10**6, k=0.5, samples="all", every=16)],
    "for progress, no single samples": lambda: [GradCovFreezeCallback(t0=10**6, k=0.5, order="progress")],
    "for momentum": lambda: [GradCovFreezeCallback(t0=10**6, k=0.5, order="momentum")],
    "for movement": lambda: [GradCovFreezeCallback(t0=10**6, k=0.5, order="movement")],
    "for progress, first sample": lambda: [GradCovFreezeCallback(t0=10**6, k=0.5, order="progress", samples="first")],
}


class Empty(pl.Callback):
    """As many hooks as ours."""

    def on_train_batch_start(self, *args: Any) -> None: ...

    def on_before_backward(self, *args: Any) -> None: ...

    def on_after_backward(self, *args: Any) -> None: ...

    def on_before_optimizer_step(self, *args: Any) -> None: ...

    def on_train_batch_end(self, *args: Any) -> None: ...


def measure_in_trainer(name: str, rounds: int, now: Callable[[], float]) -> dict[str, float]:
    """The same in Lightning's Trainer: whole runs in turn, each of some hundred steps; "plain" is in milliseconds."""
    _, make, data = MODELS[name]
    batch = data()
    times: dict[str, list[float]] = {way: [] for way in IN_TRAINER}
    steps = 400 if name == "M1" else 100
    for _ in range(max(2, rounds // 10)):
        for way, callbacks in IN_TRAINER.items():
            torch.manual_seed(0)
            clock = Clock(now)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # t0 is not reached
                trainer = pl.Trainer(
                    accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, callbacks=[clock, *callbacks()],
                )  # fmt: skip
                trainer.fit(Watched(make()), DataLoader([batch] * steps, batch_size=None))
            times[way].append(clock.seconds())
    ratios = {
        way: statistics.median(t / plain for t, plain in zip(times[way], times["plain"], strict=True)) for way in times
    }
    return ratios | {"plain": 1000 * statistics.median(times["plain"])}


def peak(name: str, way: str) -> float:
    """MiB that the process has had at most, beyond what it began with, in ten steps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    _, make, data = MODELS[name]
    torch.ones(64, 64) @ torch.ones(64, 64)  # libraries are loaded by now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Step(make().train(), data(), **MEMORY[way])
    for _ in range(10):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory(name: str) -> str:
    """A row of a table: each way in a process of its own."""
    own = sum(p.numel() for p in MODELS[name][1]().parameters()) * 4 / 2**20
    peaks = []
    for way in MEMORY:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            peaks.append(process.submit(peak, name, way).result())
    extra = (f"+{p - peaks[0]:.0f}" for p in peaks[1:])
    return f"| {name} | {own:.0f} | {peaks[0]:.0f} | {' | '.join(extra)} |"


def table(results: dict[str, dict[str, float]]) -> str:
    """A column for each model, a row for each way."""

    def cell(ratio: float) -> str:
        return "fails" if math.isnan(ratio) else f"{ratio:.2f}"

    lines = [f"| way | {' | '.join(results)} |", f"| --- |{' --- |' * len(results)}"]
    lines.append(f"| plain step, ms | {' | '.join(format(r['plain'], '.1f') for r in results.values())} |")
    ways = [way for way in next(iter(results.values())) if way != "plain"]
    lines += [f"| {way} | {' | '.join(cell(r[way]) for r in results.values())} |" for way in ways]
    return "\n".join(lines)


def keep_freed_memory() -> None:
    """Tell glibc's allocator never to give pages back."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 2**30)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="of M1 to M5 (all; in a Trainer M1,M2)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of every way (%(default)s)")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--trainer", action="store_true", help="in Lightning's Trainer")
    parser.add_argument("--cpu-time", action="store_true", help="in a Trainer, on cores that others use too")
    parser.add_argument("--memory", action="store_true", help="peaks in MiB, instead of times")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    names = (args.models or ("M1,M2" if args.trainer else ",".join(MODELS))).split(",")
    if args.memory:
        header = ["MiB", "one float a parameter", *MEMORY]
        print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
        print("\n".join(map(memory, names)))
        return
    if args.trainer:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        now = time.process_time if args.cpu_time else time.perf_counter
        results = {name: measure_in_trainer(name, args.rounds, now) for name in names}
    else:
        results = {name: measure(name, args.rounds, not args.no_peers) for name in names}
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {args.rounds} rounds\n\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

"""What a step costs while it is observed: ratios to the plain step of the same model, in one process, alternating.

    uv run python -m benchmarks.observe [--models M1,M2] [--ways capture,replay] [--rounds 60] [--json FILE]

A step is forward, backward and the default Adam; one thread. Each round times one step of every way, in turn, so that
whatever slows the machine down slows all of them; the figure is the median of the rounds' ratios.
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from lightning_gcfreeze import gradients
from lightning_gcfreeze.phases import Observing
from lightning_gcfreeze.sample_gradients import SampleGradients

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

    def __init__(self, vocabulary: int = 1000, width: int = 256, layers: int = 4, length: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.register_buffer("places", torch.randn(length, width) / 10)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
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
    """A training step of a model of its own: forward, backward, Adam; and what is observed in between."""

    def __init__(self, model: nn.Module, batch: Batch, **observed: Any) -> None:
        self.model, self.batch = deepcopy(model).train(), batch
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.parameters = dict(self.model.named_parameters())
        self.samples = None
        if observed:
            self.samples = SampleGradients(
                observed.get("how", "auto"), self.model, self.parameters, self.training_step, contextlib.nullcontext,
                lambda _: None, observed.get("count", 1),
            )  # fmt: skip
            self.phase = Observing(self.parameters)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def __call__(self) -> None:
        if self.samples is not None:
            self.samples.keep(self.batch, 0)
        self.training_step(self.batch, 0).backward()
        if self.samples is not None:
            self.samples.join()
            g_batch, size = gradients.of_batch(self.parameters), len(self.batch[1])
            found = self.samples.gradients(self.samples.take(), 1.0, g_batch, size)
            assert found is not None
            self.phase.observe(found.by_name, g_batch, "1/t", size, found.centred)
        self.optimizer.step()
        self.optimizer.zero_grad()


WAYS: dict[str, dict[str, Any]] = {
    "first sample, auto": {"how": "auto"},
    "first sample, replay": {"how": "replay"},
    "all samples": {"how": "auto", "count": None},
}


def measure(name: str, rounds: int) -> dict[str, float]:
    """Median ratio to the plain step, by way; "plain" is in milliseconds."""
    torch.manual_seed(0)
    _, make, data = MODELS[name]
    model, batch = make(), data()
    steps = {"plain": Step(model, batch)} | {way: Step(model, batch, **how) for way, how in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in steps}
    for i in range(rounds + 3):
        for way, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:  # the first ones allocate
                times[way].append(time.perf_counter() - start)
    ratios = {
        way: statistics.median(t / plain for t, plain in zip(times[way], times["plain"], strict=True)) for way in WAYS
    }
    return {"plain": 1000 * statistics.median(times["plain"]), **ratios}


def table(results: dict[str, dict[str, float]]) -> str:
    """A column for each model, a row for each way."""
    lines = [f"| way | {' | '.join(results)} |", f"| --- |{' --- |' * len(results)}"]
    lines.append(f"| plain step, ms | {' | '.join(format(r['plain'], '.1f') for r in results.values())} |")
    lines += [f"| {way} | {' | '.join(f'{r[way]:.2f}' for r in results.values())} |" for way in WAYS]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="of M1 to M5 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="steps of every way (%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {name: measure(name, args.rounds) for name in args.models.split(",")}
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, {args.rounds} rounds\n\n{table(results)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

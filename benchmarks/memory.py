"""What a run keeps in memory, phase by phase: the peak of the steps before, at and after the freeze, and what stays.

    uv run --group bench python -m benchmarks.memory [--models linears,minilm] [--ways plain,variance] [--fraction 0.9]
        [--ranks 2] [--device cuda] [--json FILE]

Lightning's Trainer, one thread, each way in a process of its own, in which a small fit has loaded all code before.
Figures count from there: of `linears`, M2 and M4 in units of the parameters' bytes, with the model; of `minilm` in MiB
beyond the loaded model. With several ranks, FSDP2 shards the model over gloo processes; figures are then those of the
rank that has most, with the model, in the same units. Masks from step 1 are drawn at random.

Peaks are the system's own: Linux sets the mark of the most resident memory back where "5" is written to
/proc/self/clear_refs. On a GPU they are those of torch's allocator.
"""

import argparse
import ctypes
import gc
import json
import logging
import multiprocessing
import os
import platform
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, ShiraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from benchmarks.observe import MODELS, Batch, Empty, Watched
from lightning_gcfreeze import Evidence, GradCovFreezeCallback, ProbeCallback, orderings
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.masks import Selection

T0, AFTER = 8, 5
"""Steps before and after the freeze. Capture is compared with replay at the steps 1, 2, 4 and 8."""
PHASES = ("the first step", "the other steps", "the step of the freeze", "the steps after it")
RESTS = ("rest", "rest after it")


class Sentences(nn.Module):
    """An encoder of the shape of all-MiniLM-L6-v2 with random weights, the mean over its tokens, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        shape = BertConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.encoder, self.head = BertModel(shape, add_pooling_layer=False), nn.Linear(384, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """(S, T) -> (S, 10)."""
        return self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(1))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Model:
    """What is trained, and how figures are counted."""

    make: Callable[[], nn.Module]
    data: Callable[[], Batch]
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    in_parameters: bool = True  # in units of the parameters' bytes, with the model; else in MiB beyond it


BY_NAME: dict[str, Model] = {
    "linears": Model(
        lambda: nn.Sequential(*(nn.Linear(3000, 3000) for _ in range(4))),
        lambda: (torch.randn(32, 3000), torch.randint(3000, (32,))),
    ),
    **{name: Model(*MODELS[name][1:]) for name in ("M2", "M4")},
    "minilm": Model(
        Sentences,
        lambda: (torch.randint(1, 30522, (16, 64)), torch.randint(10, (16,))),
        torch.optim.AdamW,
        in_parameters=False,
    ),
}


@dataclass(frozen=True)
class Way:
    """How a model is trained: with which callbacks, for a fraction to freeze, once it was changed."""

    callbacks: Callable[[float], list[pl.Callback]] = lambda fraction: []
    adapted: Callable[[nn.Module], nn.Module] = lambda model: model
    has_t0: bool = False  # else its steps are all of one kind


def ours(**options: Any) -> Way:
    return Way(lambda fraction: [GradCovFreezeCallback(T0, fraction, **options)], has_t0=True)


def drawn(names: Any, granularity: str, fraction: float) -> Named:
    """Return random masks, as the rule of a `Selection` does."""
    return {
        name: (torch.rand(shape[:1] if granularity == "row" else shape) < fraction)
        .view(*shape[:1], *[1] * (len(shape) - 1) if granularity == "row" else shape[1:])
        .expand(shape)
        for name, shape in names.shapes.items()
    }


def masked(granularity: str, fraction: float) -> list[pl.Callback]:
    return [GradCovFreezeCallback(masks=Selection(drawn, (granularity, fraction)))]


@orderings.needs("mean", variance=False)
def mean_gradient(evidence: Evidence) -> Named:
    """Score by |E g_S|, for which a probe keeps one statistic."""
    return {name: mean.abs() for name, mean in (evidence.mean or {}).items()}


def probing(fraction: float, order: Any) -> list[pl.Callback]:
    return [ProbeCallback(os.devnull, fraction, order=order)]


def with_adapters(config: Any, model: nn.Module) -> nn.Module:
    """Rank 8 on all linear layers but the last, which trains as a whole."""
    *names, last = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    adapted = inject_adapter_in_model(config(r=8, target_modules=names), model)
    adapted.get_submodule(last).requires_grad_(True)
    return adapted


def last_alone(model: nn.Module) -> nn.Module:
    *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    model.requires_grad_(False)
    last.requires_grad_(True)
    return model


WAYS: dict[str, Way] = {
    "plain": Way(),
    "empty callback": Way(lambda fraction: [Empty()]),
    **{
        f"{order}, {granularity}": ours(order=order, granularity=granularity)
        for order in ("variance", "momentum", "movement", "progress")
        for granularity in ("element", "row")
    },
    **{f"masks from step 1, {unit}": Way(partial(masked, unit)) for unit in ("element", "row")},
    "probe, one statistic": Way(partial(probing, order=mean_gradient)),
    "probe, two statistics": Way(partial(probing, order="progress")),
    "LoRA, r = 8": Way(adapted=partial(with_adapters, LoraConfig)),
    "SHiRA, r = 8": Way(adapted=partial(with_adapters, ShiraConfig)),
    "last layer": Way(adapted=last_alone),
}


class Meter:
    """Bytes of this process, or of torch on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def now(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated()
        return _status("RssAnon")

    def peak(self) -> int:
        """The most since the last call of `restart`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return max(_status("VmHWM") - _status("RssFile"), self.now())

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError as error:
            raise RuntimeError(f"Peaks need Linux, whose /proc/self/clear_refs sets them back: {error}.") from error


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@dataclass
class Phases(pl.Callback):
    """Peaks by phase, in bytes. Comes before all other callbacks, so its own phases begin and end with whole steps."""

    meter: Meter
    peaks: dict[str, int] = field(default_factory=dict)
    steps: int = 0

    def on_train_start(self, *args: Any) -> None:
        self.meter.restart()

    def on_train_batch_start(self, *args: Any) -> None:
        """All callbacks have ended the step before."""
        self.take()

    def on_train_end(self, *args: Any) -> None:
        self.take()

    def take(self) -> None:
        if self.steps:
            phase = PHASES[(self.steps > 1) + (self.steps >= T0) + (self.steps > T0)]
            self.peaks[phase] = max(self.peaks.get(phase, 0), self.meter.peak())
            self.peaks[RESTS[self.steps >= T0]] = self.meter.now()
            self.meter.restart()
        self.steps += 1


class Trained(Watched):
    """With the model's own optimizer."""

    def __init__(self, model: nn.Module, optimizer: type[torch.optim.Optimizer]) -> None:
        super().__init__(model)
        self.kind = optimizer

    def configure_model(self) -> None:
        """Shard every layer that has no layers with parameters inside, if there are several ranks."""
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.modules():
                if [*layer.parameters(recurse=False)]:
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.kind([p for p in self.parameters() if p.requires_grad])


def fit(module: pl.LightningModule, batch: Batch, steps: int, device: str, callbacks: list[pl.Callback]) -> None:
    """As one of the processes that the environment tells of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        strategy: Any = ModelParallelStrategy(ranks, 1, process_group_backend="gloo") if ranks > 1 else "auto"
        trainer = pl.Trainer(
            accelerator=device.replace("cuda", "gpu"), devices=ranks, max_steps=steps, logger=False, strategy=strategy,
            use_distributed_sampler=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
        assert trainer.world_size == ranks


def measure(name: str, way: str, fraction: float, device: str, environment: dict[str, str]) -> dict[str, float]:
    """In a process of its own."""
    os.environ.update(environment)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    meter, model = Meter(device), BY_NAME[name]
    small = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    fit(Trained(small, model.optimizer), (torch.randn(4, 8), torch.arange(4)), T0 + 2, device, WAYS[way].callbacks(0.5))
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
    before = meter.now()
    made = model.make().train()
    unit = sum(p.nbytes for p in made.parameters()) if model.in_parameters else 2**20
    batch = model.data()
    if not model.in_parameters:
        made.to(device)
        before = meter.now() if not environment else before
    os.environ.update(environment)  # which the end of the small fit has cleared
    module, phases = Trained(WAYS[way].adapted(made), model.optimizer), Phases(meter)
    fit(module, batch, T0 + AFTER, device, [phases, *WAYS[way].callbacks(fraction)])
    return {phase: (bytes_ - before) / unit for phase, bytes_ in phases.peaks.items()}


def table(name: str, rows: dict[str, dict[str, float]]) -> str:
    """A row for each way, a column for each phase."""
    form = ".2f" if BY_NAME[name].in_parameters else ".0f"
    columns = (*PHASES[:2], RESTS[0], *PHASES[2:], RESTS[1])
    unit = "x parameters" if BY_NAME[name].in_parameters else "MiB beyond the model"
    lines = [f"| {name}, {unit} | {' | '.join(columns)} |", f"|{' --- |' * (1 + len(columns))}"]
    for way, peaks in rows.items():
        lines.append(f"| {way} | {' | '.join(format(peaks[column], form) for column in columns)} |")
    return "\n".join(lines)


def places(ranks: int) -> list[dict[str, str]]:
    """Return the environment of each rank, as torchrun sets it; nothing for one process."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(BY_NAME), help="(%(default)s)")
    parser.add_argument("--ways", help="words, one of which the name of a way has to contain (all ways)")
    parser.add_argument("--fraction", type=float, default=0.9, help="of frozen elements (%(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes that FSDP2 shards over (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(%(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        Meter("cpu").restart()  # or say why not
    ways = [way for way in WAYS if not args.ways or any(word in way for word in args.ways.split(","))]
    results: dict[str, dict[str, dict[str, float]]] = {}
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, f = {args.fraction:g}, ranks: {args.ranks}")
    for name in args.models.split(","):
        results[name] = {}
        for way in ways:
            with ProcessPoolExecutor(args.ranks, multiprocessing.get_context("spawn")) as processes:
                try:
                    arguments = name, way, args.fraction, args.device
                    futures = [processes.submit(measure, *arguments, place) for place in places(args.ranks)]
                    found = [future.result() for future in futures]
                    results[name][way] = {phase: max(peaks[phase] for peaks in found) for phase in found[0]}
                except Exception as error:
                    print(f"{name}, {way}: {type(error).__name__}: {str(error)[:150]}", file=sys.stderr)
        print(f"\n{table(name, results[name])}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

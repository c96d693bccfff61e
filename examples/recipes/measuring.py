"""What the recipes share: a quiet Trainer, a measured fit, a comparison of bits, tables of results, a command line."""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from examples.train import ignore_known_warnings
from lightning_gcfreeze import GradCovFreezeCallback


@dataclass(frozen=True)
class Cost:
    """What a method cost and reached."""

    quality: float
    seconds: float
    """Of processor time, of the fit alone."""
    optimizer_mb: float
    """The optimizer's state after the last step, and with our callback the places of live elements."""
    ship_mb: float
    """What makes the tuned model of the one in the package."""


class Meter(pl.Callback):
    """Measures a fit. Put it last: it reads the optimizer before the other callbacks are taken down."""

    def __init__(self) -> None:
        self.seconds, self.optimizer_bytes = 0.0, 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = -time.process_time()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            self.seconds += time.process_time()
            self.optimizer_bytes = sum(map(state_bytes, trainer.optimizers))
            for callback in getattr(trainer, "callbacks", []):
                if isinstance(callback, GradCovFreezeCallback) and callback.savings:
                    self.optimizer_bytes += callback.savings.index_bytes


def state_bytes(optimizer: Optimizer) -> int:
    """Return how much an optimizer remembers."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def fit(module: pl.LightningModule, data: TensorDataset, batch_size: int, steps: int, *callbacks: pl.Callback) -> Meter:
    """Train for so many steps on one core; batches are drawn from torch's global stream."""
    meter = Meter()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, callbacks=[*callbacks, meter], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size, shuffle=True, drop_last=True))
    return meter


@torch.no_grad()
def predict(module: nn.Module, x: Tensor) -> Tensor:
    """Return the outputs for all inputs."""
    was, outputs = module.training, torch.cat([module.eval()(part) for part in x.split(64)])
    module.train(was)
    return outputs


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules have the same parameters and buffers, bit by bit: as integers, 0 is not -0."""
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(_bits(mine[name]) == _bits(other[name]) for name in mine)


def _bits(t: Tensor) -> bytes:
    return t.detach().contiguous().numpy().tobytes()


def megabytes(tensors: Mapping[str, Tensor]) -> float:
    """Return the size of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6


def be_quiet() -> None:
    """Let a process train in one thread, and say only what a recipe says."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning_gcfreeze"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ignore_known_warnings()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT's use of transformers
    warnings.filterwarnings("ignore", message="Found .* in eval mode")  # BatchNorm, on purpose
    warnings.filterwarnings("ignore", message=".*No step will train with frozen")  # a fit for its masks alone


def command_line(
    argv: Sequence[str] | None,
    program: str,
    description: str | None,
    run: Callable[..., Cost],
    tune: Callable[[str, int], None],
    recipes: Sequence[Callable[[Path, int], None]],
    *,
    methods: Collection[str],
    steps: int,
    quality: str,
) -> None:
    """Do what the command line says: the recipes, a comparison, or a search for learning rates.

    Args:
        argv: the arguments; None: those of the process.
        program: what is called.
        description: for its help.
        run: (method, seed, steps=) -> what it cost and reached.
        tune: (method, steps) tries learning rates.
        recipes: (folder, steps), called one after the other.
        methods: those that can be run and tuned.
        steps: of a fit at full length.
        quality: what is compared, the title of its column.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few steps: does it run?")
    parser.add_argument("--compare", metavar="SEEDS", help="compare all methods, with seeds such as 0,1,2")
    parser.add_argument("--tune", choices=methods, metavar="METHOD", help="try learning rates of one method")
    parser.add_argument("--out", type=Path, help="folder of what is shipped; by default it is not kept")
    args = parser.parse_args(argv)
    be_quiet()
    steps = 5 if args.quick else steps
    if args.tune:
        tune(args.tune, steps)
    elif args.compare:
        by_method = {method: partial(run, method, steps=steps) for method in methods}
        print(compare(by_method, [int(seed) for seed in args.compare.split(",")], quality))
    else:
        with tempfile.TemporaryDirectory() as folder:
            out = args.out or Path(folder)
            out.mkdir(parents=True, exist_ok=True)
            for recipe in recipes:
                recipe(out, steps)


def compare(methods: Mapping[str, Callable[[int], Cost]], seeds: Sequence[int], quality: str) -> str:
    """Run every method with every seed; return the means as a Markdown table."""
    lines = [f"| method | {quality} | seconds | optimizer, MB | to ship, MB |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, run in methods.items():
        costs = [run(seed) for seed in seeds]
        of = Cost(*(mean(column) for column in zip(*map(astuple, costs), strict=True)))
        each = ", ".join(f"{cost.quality:.3f}" for cost in costs)
        print(f"{name}: {each}", flush=True)
        row = [f"{of.quality:.3f}", f"{of.seconds:.1f}", f"{of.optimizer_mb:.2f}", f"{of.ship_mb:.2f}"]
        lines.append(f"| {' | '.join([name, *row])} |")
    return "\n".join(lines)

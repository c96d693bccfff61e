"""Does the order matter? Train MNIST's and Boston's perceptron three times each, from equal weights on equal batches.

    python -m examples.compare

One twin freezes the quietest parameters after t0 steps (the paper's order), one as many at random, and one none. Prints
what was frozen and the test metric of each; leaves TensorBoard logs and a picture of the frozen fraction per layer.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

from examples.data import MNIST, ArrayDataModule, BostonHousing
from examples.models import MLPClassifier, MLPRegressor, SupervisedModule
from examples.train import ignore_known_warnings
from lightning_gcfreeze import GradCovFreezeCallback

Order = Literal["variance", "random"]
COLORS: dict[Order, str] = {"variance": "#1f5fa8", "random": "#b8bec6"}


@dataclass(frozen=True)
class Task:
    """A model on a data set, and the test metric to compare by."""

    name: str
    title: str
    model: Callable[[], SupervisedModule]
    data: Callable[[int], ArrayDataModule]  # of the seed
    metric: str


@dataclass(frozen=True)
class Run:
    """What one trained twin leaves behind."""

    frozen: Mapping[str, tuple[int, int]]  # {parameter: (frozen elements, all elements)}
    metric: float
    seconds: float  # of `Trainer.fit`, with its validation


Twins = Mapping[Order | None, Run]  # None: the unfrozen one

TASKS = (
    Task("mnist", "MNIST, MLP 784-10-10", lambda: MLPClassifier(784, 10), lambda seed: MNIST(seed=seed), "accuracy"),
    Task(
        "boston", "Boston Housing, MLP 13-20-1", lambda: MLPRegressor(13), lambda seed: BostonHousing(seed=seed), "mse"
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print and plot as `argv` says, by default the command line."""
    args = _parser().parse_args(argv)
    if args.quick:
        args.t0, args.steps = 20, 40
    ignore_known_warnings()
    torch.set_num_threads(1)  # layers this small are done before a second thread has begun
    console = Console()
    results: dict[str, dict[Order | None, Run]] = {}
    for task in TASKS:
        results[task.title] = {}
        for order in (*get_args(Order), None):
            how = f"{args.k:.0%} frozen at step {args.t0}, {order} order" if order else "unfrozen"
            console.print(f"{task.title}: {how}")
            results[task.title][order] = train(task, order, args)
    for task in TASKS:
        console.print(table(task, results[task.title]))
    picture = args.out / "frozen_per_layer.png"
    plot(results, args.t0).savefig(picture, dpi=150)
    console.print(
        "One seed, one split: how far others scatter stands in examples/README.md.",
        f"Picture: {picture}",
        f"Logs:    tensorboard --logdir {args.out}",
        sep="\n",
        soft_wrap=True,
    )


def train(task: Task, order: Order | None, args: argparse.Namespace) -> Run:
    """Train one twin and test it; ``args.seed`` fixes initial weights and batches, the same for every order."""
    pl.seed_everything(args.seed, verbose=False)
    model, data = task.model(), task.data(args.seed)
    data.setup()  # here, because reading MNIST takes seconds that are not the training's
    callback = GradCovFreezeCallback(args.t0, args.k, order=order, seed=args.seed) if order else None
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        max_epochs=math.ceil(args.steps / len(data.train_dataloader())),  # never decides, but the bar shows it
        check_val_every_n_epoch=None,
        val_check_interval=max(1, args.steps // 10),
        log_every_n_steps=10,
        callbacks=callback,
        logger=_fresh_logger(args.out, f"{task.name}/{order or 'unfrozen'}"),
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    masks = callback.frozen if callback else {}
    frozen = {name: (int(masks[name].sum()) if masks else 0, w.numel()) for name, w in model.named_parameters()}
    return Run(frozen, metrics[f"test/{task.metric}"], seconds)


def table(task: Task, twins: Twins) -> Table:
    """A row for each parameter tensor, for all together, the test metric and the seconds; a column for each twin."""
    runs = list(twins.values())
    result = Table("", *(order or "unfrozen" for order in twins), title=task.title, title_justify="left")
    for column in result.columns[1:]:
        column.justify = "right"
    for name in runs[0].frozen:
        result.add_row(f"frozen of {name}", *("{:,} of {:,}".format(*run.frozen[name]) for run in runs))
    totals = [map(sum, zip(*run.frozen.values(), strict=True)) for run in runs]
    result.add_row("frozen in all", *("{:,} of {:,}".format(*total) for total in totals), end_section=True)
    result.add_row(f"test {task.metric}", *(f"{run.metric:.4f}" for run in runs))
    result.add_row("seconds", *(f"{run.seconds:.1f}" for run in runs))
    return result


def plot(results: Mapping[str, Twins], t0: int) -> Figure:
    """The frozen fraction of each parameter tensor by order, a panel for each title in `results`."""
    width = 0.38
    figure = Figure(figsize=(4.8 * len(results), 3.4), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (title, twins) in zip(panels, results.items(), strict=True):
        for i, order in enumerate(get_args(Order)):
            frozen = twins[order].frozen
            bars = axes.bar(
                [x + (i - 0.5) * width for x in range(len(frozen))],
                [part / whole for part, whole in frozen.values()],
                width,
                color=COLORS[order],
                label=order,
            )
            axes.bar_label(bars, [f"{100 * bar.get_height():.0f}" for bar in bars], fontsize=8)
        axes.set_xticks(range(len(frozen)), [f"{name}\n{whole:,}" for name, (_, whole) in frozen.items()], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
    panels[0].set_ylim(0, 1)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylabel(f"frozen at step {t0}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _fresh_logger(out: Path, name: str) -> TensorBoardLogger:
    for events in (out / name).glob("events.out.tfevents.*"):  # of an earlier call; TensorBoard would join the curves
        events.unlink()
    return TensorBoardLogger(out, name=name, version="")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/compare"), help="folder of logs and picture (%(default)s)"
    )
    parser.add_argument("--t0", type=int, default=400, help="optimizer steps before the freeze (%(default)s)")
    parser.add_argument("--k", type=float, default=0.8, help="fraction to freeze (%(default)s)")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, split, batches, random order (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="40 steps, t0 = 20: does it run?")
    return parser


if __name__ == "__main__":
    for package in ("lightning.pytorch", "pytorch_lightning"):  # the one that was imported last does the logging
        logging.getLogger(package).setLevel(logging.WARNING)  # or each of the six Trainers introduces itself
    main()

"""Repeat the paper's experiments: what does freezing cost, in the paper's order and in others?

    python -m examples.paper all
    python -m examples.paper boston --runs 5 --orders variance,random
    python -m examples.paper synthetic3 --scan-t0

A run trains for t0 steps while the callback observes, and goes on from there once for every order and fraction, on the
same batches. Leaves NAME.json, NAME.md and pictures in DIR; interrupted, the same command goes on where it stopped.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.paper import figures, study, tables
from examples.paper.summary import summarise
from examples.paper.tasks import TASKS, Name, Settings
from lightning_gcfreeze.orderings import ORDERINGS

Number = TypeVar("Number", int, float)
QUICK_RUNS, QUICK_FRACTIONS = 5, (0.0, 0.25, 0.5, 0.75, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, write and print as `argv` says, by default the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.quick:
        args.runs, args.fractions = QUICK_RUNS, QUICK_FRACTIONS
    experiments = [_settings(name, args) for name in (get_args(Name) if args.name == "all" else [args.name])]
    for settings in experiments:
        if settings.steps <= settings.t0:
            parser.error(
                f"--steps {settings.steps} leaves {settings.data} no step after --t0 {settings.t0}: raise the first or"
                " lower the second"
            )
    console = Console()
    scans = [_scan(settings, args.scan_t0) for settings in experiments]
    units = [(settings, index) for scan in scans for settings in scan for index in range(args.runs)]
    try:
        _compute(units, args.jobs, args.out, console)
    except KeyboardInterrupt:
        console.print(
            f"Interrupted. What was finished is in {args.out / 'parts'}: the same command goes on from there."
        )
        raise SystemExit(130) from None
    for scan in scans:
        summaries = [summarise(settings, study.load(settings, args.runs, args.out)) for settings in scan]
        if args.scan_t0 is None:
            _write(summaries[0], args.out, console)
        else:
            _write_scan(summaries, args.out, console)


def _settings(name: Name, args: argparse.Namespace) -> Settings:
    task = TASKS[name]

    def given(option: Number | None, default: Number) -> Number:
        return default if option is None else option

    return Settings(
        name,
        t0=given(args.t0, task.t0),
        steps=given(args.steps, task.steps),
        batch_size=given(args.batch_size, task.batch_size),
        lr=given(args.lr, task.lr),
        orders=args.orders,
        fractions=args.fractions,
        seed=args.seed,
        objects=args.objects,
        noise=args.noise,
        same_data=args.same_data,
    )


def _scan(settings: Settings, t0s: Sequence[int] | None) -> list[Settings]:
    """The settings themselves, or a variant for each t0, all with as many steps after it."""
    if t0s is None:
        return [settings]
    after = settings.steps - settings.t0
    return [replace(settings, t0=t0, steps=t0 + after) for t0 in t0s or TASKS[settings.data].scan]


def _compute(units: Sequence[study.Unit], jobs: int, out: Path, console: Console) -> None:
    """Compute what is missing, under a bar that weighs runs by the work that they are."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[runs]} of {task.fields[all]} runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=math.inf) as progress:
        bar = progress.add_task("training", total=sum(s.steps for s, _ in units), runs=0, all=len(units))
        for done, (settings, _) in enumerate(study.compute(units, jobs, out), start=1):
            progress.update(bar, advance=settings.steps, runs=done, description=settings.data)


def _write(summary: dict[str, Any], out: Path, console: Console) -> None:
    name, title = summary["data"], TASKS[summary["data"]].title
    (out / f"{name}.json").write_text(json.dumps(summary, separators=(",", ":")), encoding="utf-8")
    (out / f"{name}.md").write_text(tables.report(summary, title), encoding="utf-8")
    for draw in (figures.loss, figures.alpha, figures.stability):
        draw(summary, title).savefig(out / f"{name}_{draw.__name__}.png", dpi=110)
    _show(summary, console)
    console.print(f"{out / name}.json, .md, _loss.png, _alpha.png, _stability.png", soft_wrap=True)


def _write_scan(summaries: list[dict[str, Any]], out: Path, console: Console) -> None:
    name, title = summaries[0]["data"], TASKS[summaries[0]["data"]].title
    curves = [{key: value for key, value in one.items() if key not in ("alpha", "stability")} for one in summaries]
    (out / f"{name}_t0.json").write_text(json.dumps(curves, separators=(",", ":")), encoding="utf-8")
    (out / f"{name}_t0.md").write_text(tables.scan(summaries, title), encoding="utf-8")
    figures.scan(summaries, title).savefig(out / f"{name}_t0.png", dpi=110)
    for summary in summaries:
        _show(summary, console)
    console.print(f"{out / name}_t0.json, .md, .png", soft_wrap=True)


def _show(summary: dict[str, Any], console: Console) -> None:
    title, curves = TASKS[summary["data"]].title, summary["orders"]["random"]
    ends = ", ".join(f"{stage} {c['mean'][0]:.3g} to {c['mean'][-1]:.3g}" for stage, c in curves.items())
    console.print(
        f"\n{title}, frozen at step {summary['t0']} of {summary['steps']}, {summary['runs']} runs",
        f"Loss with none to all frozen: {ends}",
        "Cost of freezing a fraction in training loss, at random = 1:",
        tables.costs(summary),
        sep="\n",
        soft_wrap=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    each = "default: the task's own, see examples/paper/tasks.py"
    add("name", choices=[*get_args(Name), "all"], help="the experiment")
    add("--runs", type=_number(int, 2), default=25, help="independent runs (%(default)s)")
    add("--fractions", type=_fractions, default=tuple(i / 10 for i in range(11)), metavar="F,F,…",
        help="fractions to freeze; 0 and 1 are always among them (0,0.1,…,1)")  # fmt: skip
    add("--orders", type=_orders, default=tuple(ORDERINGS), metavar="ORDER,…",
        help=f"of {','.join(ORDERINGS)}; variance and random are always among them (all)")  # fmt: skip
    add("--t0", type=_number(int, 1), help=f"steps before the freeze ({each})")
    add("--steps", type=_number(int, 2), help=f"steps in all ({each})")
    add("--batch-size", type=_number(int, 2), help=f"S ({each})")
    add("--lr", type=_number(float, 1e-9), help=f"Adam's learning rate ({each})")
    add("--seed", type=_number(int, 0), default=0, help="of the first run; run i has the seed SEED + i (%(default)s)")
    add("--objects", type=_number(int, 10), default=1000, help="of a synthetic data set (%(default)s)")
    add("--noise", type=_number(float, 0.0), default=1.0,
        help="standard deviation of y in a synthetic regression (%(default)s)")  # fmt: skip
    add("--same-data", action="store_true", help="all runs share objects and split; weights and batches differ")
    add("--scan-t0", nargs="?", type=_steps, const=(), metavar="N,N,…",
        help="how the costs depend on t0 (without values: early, knee, late, converged)")  # fmt: skip
    add("--quick", action="store_true", help="5 runs, 5 fractions")
    add("--jobs", type=_number(int, 1), default=os.cpu_count(), help="processes; no result depends on it (%(default)s)")
    add("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="folder of results (%(default)s)")
    return parser


def _number(kind: type[Number], least: Number) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def _steps(text: str) -> tuple[int, ...]:
    return tuple(sorted({_number(int, 1)(part) for part in text.split(",")}))


def _fractions(text: str) -> tuple[float, ...]:
    values = {float(part) for part in text.split(",")} | {0.0, 1.0}
    if wrong := [value for value in values if not 0 <= value <= 1]:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {wrong[0]}")
    return tuple(sorted(values))


def _orders(text: str) -> tuple[str, ...]:
    chosen = {"variance", "random", *text.split(",")}
    if unknown := sorted(chosen - ORDERINGS.keys()):
        raise argparse.ArgumentTypeError(f"must be among {', '.join(ORDERINGS)}, got {', '.join(unknown)}")
    return tuple(order for order in ORDERINGS if order in chosen)


if __name__ == "__main__":
    main()

"""Repeat the paper's experiments: what does freezing cost, in the paper's order and in others?

    python -m examples.paper all
    python -m examples.paper boston --runs 5 --orders variance,random
    python -m examples.paper synthetic3 --scan-t0
    python -m examples.paper all --related
    python -m examples.paper all --related --prune

A run trains for t0 steps while the callback observes, and goes on from there once for every order and fraction, on the
same batches. With --prune it trains to its end instead, and there sets to zero what an order puts first. Leaves
NAME.json, NAME.md and pictures in DIR; interrupted, the same command goes on where it stopped.
"""

import argparse
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.paper import figures, study, tables
from examples.paper.progress import work
from examples.paper.related import RELATED, left_out
from examples.paper.summary import summarise
from examples.paper.tasks import TASKS, Name, Settings, n_parameters

Number = TypeVar("Number", int, float)
QUICK = (5, tuple(i / 4 for i in range(5)))  # runs, fractions
FULL = (25, tuple(i / 10 for i in range(11)))


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, write and print as `argv` says, by default the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    runs, fractions = QUICK if args.quick else FULL
    args.runs, args.fractions = args.runs or runs, args.fractions or fractions
    args.orders = tuple(dict.fromkeys([*args.orders, *(RELATED if args.related else ())]))
    scans = [_scan(name, args, parser) for name in (get_args(Name) if args.name == "all" else [args.name])]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    console = Console()
    try:
        _compute(
            [(settings, index) for scan in scans for settings in scan for index in range(args.runs)], args, console
        )
    except KeyboardInterrupt:
        console.print(
            f"Interrupted. What was finished is in {args.out / 'parts'}: the same command goes on from there."
        )
        raise SystemExit(130) from None
    for scan in scans:
        missing = _left_out(scan[0].data, args.orders)
        summaries = [summarise(settings, study.load(settings, args.runs, args.out), missing) for settings in scan]
        if args.scan_t0 is None:
            _write(summaries[0], args.out, console)
        else:
            _write_scan(summaries, args.out, console)


def _scan(name: Name, args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Settings]:
    """The settings of an experiment, one for each value of t0."""
    task, missing = TASKS[name], _left_out(name, args.orders)
    given = {option for option in ("objects", "noise") if getattr(args, option) is not None}
    if args.name == name and given - task.options:
        parser.error(f"--{min(given - task.options)} is not for {name}")
    settings = Settings(
        name,
        t0=args.t0 or task.t0,
        steps=args.steps or task.steps,
        batch_size=args.batch_size or task.batch_size,
        lr=args.lr or task.lr,
        orders=tuple(order for order in args.orders if order not in missing),
        fractions=args.fractions,
        seed=args.seed,
        same_data=args.same_data,
        **{option: getattr(args, option) for option in given & task.options},
    )
    if args.prune:
        if args.t0 or args.scan_t0 is not None:
            parser.error("--prune takes its scores after the last step: leave out --t0 and --scan-t0")
        return [replace(settings, prune=True, t0=settings.steps)]
    if args.scan_t0 is not None:
        if args.t0:
            parser.error(f"--t0 {args.t0} and --scan-t0: give the values to the latter, as --scan-t0 50,100")
        after = args.steps or task.steps - task.t0
        return [replace(settings, t0=t0, steps=t0 + after) for t0 in args.scan_t0 or task.scan]
    if settings.steps <= settings.t0:
        parser.error(f"--steps {settings.steps} leaves {name} none after t0 = {settings.t0}: raise it, or lower --t0")
    return [settings]


def _left_out(name: Name, orders: Sequence[str]) -> dict[str, str]:
    """Of these orders those that are not computed for an experiment's model, with the reason."""
    p = n_parameters(name)
    reasons = {order: left_out(order, p) for order in orders}
    return {order: reason for order, reason in reasons.items() if reason is not None}


def _compute(units: Sequence[study.Unit], args: argparse.Namespace, console: Console) -> None:
    """Compute what is missing, under a bar that weighs runs by the work that they are."""
    missing = study.missing(units, args.out)
    if len(missing) < len(units):
        console.print(f"{len(units) - len(missing)} of {len(units)} runs are there already, in {args.out / 'parts'}.")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[runs]} of {task.fields[all]} runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=math.inf) as progress:
        bar = progress.add_task("training", total=sum(work(s) for s, _ in missing), runs=0, all=len(missing))
        for done, (settings, _) in enumerate(study.compute(missing, args.jobs, args.out), start=1):
            progress.update(bar, advance=work(settings), runs=done, description=settings.data)


def _write(summary: dict[str, Any], out: Path, console: Console) -> None:
    name, title = summary["data"] + "_prune" * summary["prune"], TASKS[summary["data"]].title
    (out / f"{name}.json").write_text(json.dumps(summary, separators=(",", ":")), encoding="utf-8")
    (out / f"{name}.md").write_text(tables.report(summary, title), encoding="utf-8")
    several = (figures.multiples,) if len(summary["orders"]) > len(figures.STYLE) else ()
    drawn = (figures.loss, figures.alpha, figures.stability, *several)
    for draw in drawn:
        _save(draw(summary, title), out / f"{name}_{draw.__name__}.png")
    _show(summary, console)
    pictures = ", ".join(f"_{draw.__name__}.png" for draw in drawn)
    console.print(f"{out / name}.json, .md, {pictures}", soft_wrap=True)


def _write_scan(summaries: list[dict[str, Any]], out: Path, console: Console) -> None:
    name, title = summaries[0]["data"], TASKS[summaries[0]["data"]].title
    curves = [{key: value for key, value in one.items() if key not in ("alpha", "stability")} for one in summaries]
    (out / f"{name}_t0.json").write_text(json.dumps(curves, separators=(",", ":")), encoding="utf-8")
    (out / f"{name}_t0.md").write_text(tables.scan(summaries, title), encoding="utf-8")
    _save(figures.scan(summaries, title), out / f"{name}_t0.png")
    for summary in summaries:
        _show(summary, console)
    console.print(f"{out / name}_t0.json, .md, .png", soft_wrap=True)


def _save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size and the same to the eye."""
    with io.BytesIO() as picture:
        figure.savefig(picture, dpi=110)
        Image.open(picture).convert("RGB").quantize().save(path, optimize=True)


def _show(summary: dict[str, Any], console: Console) -> None:
    title, curves = TASKS[summary["data"]].title, summary["orders"]["random"]
    ends = ", ".join(f"{stage} {c['mean'][0]:.3g} to {c['mean'][-1]:.3g}" for stage, c in curves.items())
    freezing, done = tables.words(summary)
    at = f"{done} after step" if summary["prune"] else f"{done} at step {summary['t0']} of"
    console.print(
        f"\n{title}, {at} {summary['steps']}, {summary['runs']} runs",
        f"Loss with none to all {done}: {ends}",
        f"Cost of {freezing} a fraction in training loss, at random = 1:",
        tables.costs(summary),
        *tables.left_out(summary),
        sep="\n",
        soft_wrap=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    own = "default: the experiment's own, in examples/paper/tasks.py"
    add("name", choices=[*get_args(Name), "all"], help="the experiment")
    add("--runs", type=_number(int, 2), help="independent runs (25)")
    add("--fractions", type=_fractions, metavar="F,F,…",
        help="fractions to freeze; 0 and 1 are always among them (0,0.1,…,1)")  # fmt: skip
    add("--orders", type=_orders, default=tuple(figures.STYLE), metavar="ORDER,…",
        help=f"of {','.join(figures.ALL_STYLES)}; variance and random are always among them"
        f" ({','.join(figures.STYLE)})")  # fmt: skip
    add("--related", action="store_true", help="beside them the orders of the methods that the paper names as related")
    add("--prune", action="store_true", help="train to the end, then set to zero instead of freezing at t0")
    add("--t0", type=_number(int, 1), help=f"steps before the freeze ({own})")
    add("--steps", type=_number(int, 2), help=f"steps in all; with --scan-t0, steps after it ({own})")
    add("--batch-size", type=_number(int, 2), help=f"S ({own})")
    add("--lr", type=_number(float, 1e-9), help=f"Adam's learning rate ({own})")
    add("--seed", type=_number(int, 0, 2**30), default=0,
        help="run i has the seed SEED + i; w of synthetic data is by SEED alone (%(default)s)")  # fmt: skip
    add("--objects", type=_number(int, 10), help="of a synthetic data set (1000)")
    add("--noise", type=_number(float, 0.0), help="standard deviation of y in a synthetic regression (1)")
    add("--same-data", action="store_true", help="all runs share objects and split; weights and batches differ")
    add("--scan-t0", nargs="?", type=_steps, const=(), metavar="N,N,…",
        help="how the costs depend on t0 (without values: early, knee, late, converged)")  # fmt: skip
    add("--quick", action="store_true", help="5 runs and 5 fractions, where these are not given")
    add("--jobs", type=_number(int, 1), default=os.cpu_count() or 1,
        help="processes; no result depends on it (%(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("runs/paper"), metavar="DIR", help="folder of results (%(default)s)")
    return parser


def _number(kind: type[Number], least: Number, most: float = math.inf) -> Callable[[str], Number]:
    def number(text: str) -> Number:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limits = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return number


def _steps(text: str) -> tuple[int, ...]:
    return tuple(sorted({_number(int, 1)(part) for part in _parts(text)}))


def _fractions(text: str) -> tuple[float, ...]:
    values = sorted({float(part) for part in _parts(text)} | {0.0, 1.0})
    if wrong := [value for value in values if not 0 <= value <= 1]:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1], got {wrong[0]}")
    if len(values) < 3:
        raise argparse.ArgumentTypeError(f"0 and 1 are there anyway: name at least one between them, got {text}")
    return tuple(values)


def _orders(text: str) -> tuple[str, ...]:
    chosen = {"variance", "random", *_parts(text)}
    if unknown := sorted(chosen - figures.ALL_STYLES.keys()):
        raise argparse.ArgumentTypeError(f"must be among {', '.join(figures.ALL_STYLES)}, got {', '.join(unknown)}")
    return tuple(order for order in figures.ALL_STYLES if order in chosen)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


# argparse names them: "invalid list of fractions value".
_steps.__name__, _fractions.__name__ = "list of steps", "list of fractions"


if __name__ == "__main__":
    main()

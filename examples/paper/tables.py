"""Summaries as tables: Markdown for files, Rich for the screen."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from examples.paper.summary import middle
from examples.paper.tasks import TASKS

Summary = Mapping[str, Any]


def report(summary: Summary, title: str) -> str:
    """NAME.md: losses beside the published ones, what each order costs against chance, and stability."""
    fractions, orders = summary["fractions"], list(summary["orders"])
    published = {} if summary["prune"] else TASKS[summary["data"]].published
    freezing, done = words(summary)
    parts = [f"# {title}", _setting(summary), *_left_out(summary)]
    for stage in ("train", "test"):
        columns = {
            order: [_spread(*pair) for pair in zip(curves[stage]["mean"], curves[stage]["std"], strict=True)]
            for order, curves in summary["orders"].items()
        }
        for order, curves in published.items():
            at = dict(zip((i / 10 for i in range(11)), curves[stage], strict=True))
            columns[f"{order}, published"] = [_number(at.get(f)) for f in fractions]
        parts += [f"## Loss, {stage}: mean ± standard deviation over runs", _by_fraction(done, fractions, columns)]
    for key, heading in (
        (
            "growth",
            f"Growth, {{stage}}: cost of {freezing}, of which random's is 1, with 95 % interval;"
            " curve: costs at all fractions between 0 and 1 added up",
        ),
        ("paired", "Loss minus that of random, {stage}, with 95 % interval"),
    ):
        for stage in ("train", "test"):
            columns = {
                order: [_interval(*pair) for pair in zip(found[stage]["mean"], found[stage]["interval"], strict=True)]
                for order, found in summary[key].items()
            }
            rows = _by_fraction(done, fractions, columns)
            if key == "growth":
                whole = [over[stage] for over in summary["growth_over_curve"].values()]
                rows += "\n" + _row(["curve", *(_interval(one["mean"], one["interval"]) for one in whole)])
            parts += [f"## {heading.format(stage=stage)}", rows]
    overlap = {"chance": [_number(summary["stability"]["chance"][str(f)]["jaccard"]) for f in fractions]}
    for order in orders:
        found = [summary["stability"][order][str(f)] for f in fractions]
        overlap[order] = [_number(one["jaccard"]) for one in found]
        if found[-1]["aligned"] is not None:
            overlap[f"{order}, aligned"] = [_number(one["aligned"]) for one in found]
    parts += [f"## Jaccard overlap of the {done} sets of two runs, mean over pairs"]
    parts += [_by_fraction(done, fractions, overlap)]
    return "\n\n".join(parts) + "\n"


def scan(summaries: Sequence[Summary], title: str) -> str:
    """NAME_t0.md: what freezing costs and what the orders save, by t0."""
    rows, at = [], middle(summaries[0]["fractions"])
    for summary in summaries:
        none, every = (
            [_number(summary["orders"]["random"][stage]["mean"][end]) for stage in ("train", "test")] for end in (0, -1)
        )
        trained = [found["train"] for found in summary["growth"].values()]
        growth = [_interval(found["mean"][at], found["interval"][at]) for found in trained]
        rows.append([str(summary["t0"]), " / ".join(none), " / ".join(every), *growth])
    half = f"{summaries[0]['fractions'][at]:g}"
    header = ["t0", "none frozen, train / test", "all frozen, train / test"]
    header += [f"{order}, growth at {half}" for order in summaries[0]["growth"]]
    parts = [f"# {title}", _setting(summaries[0], scanned=True), *_left_out(summaries[0]), _markdown(header, rows)]
    return "\n\n".join(parts) + "\n"


def costs(summary: Summary) -> Table:
    """Growth of the training loss, a row per order and a column per fraction."""
    inner = [i for i, f in enumerate(summary["fractions"]) if 0 < f < 1]
    table = Table("order", *(f"{summary['fractions'][i]:g}" for i in inner))
    for order, growth in summary["growth"].items():
        table.add_row(order, *(_number(growth["train"]["mean"][i], 2) for i in inner))
    return table


def words(summary: Summary) -> tuple[str, str]:
    """What was done to parameters: "freezing" and "frozen", or "pruning" and "pruned"."""
    return ("pruning", "pruned") if summary["prune"] else ("freezing", "frozen")


def left_out(summary: Summary) -> list[str]:
    """A sentence for each order that was asked for and could not be computed."""
    return [f"{order} is left out: {reason}." for order, reason in summary["left_out"].items()]


def _left_out(summary: Summary) -> list[str]:
    return ["\n".join(f"- {line}" for line in left_out(summary))] if summary["left_out"] else []


def _setting(summary: Summary, scanned: bool = False) -> str:
    after = summary["steps"] - summary["t0"]
    steps = f"{after} steps after t0" if scanned else f"t0 = {summary['t0']} of {summary['steps']} steps"
    if summary["prune"]:
        steps = f"set to zero after {summary['steps']} steps"
    text = f"{summary['runs']} runs, {steps}, S = {summary['batch_size']}, learning rate {summary['lr']:g}"
    if summary["data"].startswith("synthetic"):
        text += f", {summary['objects']} objects, noise {summary['noise']:g}"
    return f"{text}, p = {summary['p']}, seed {summary['seed']}{', same data in all runs' * summary['same_data']}."


def _by_fraction(done: str, fractions: Sequence[float], columns: Mapping[str, Sequence[str]]) -> str:
    return _markdown(
        [done, *columns], [[f"{f:g}", *(column[i] for column in columns.values())] for i, f in enumerate(fractions)]
    )


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(map(_row, [header, ["---"] * len(header), *rows]))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, and none for what is undefined."""
    return "" if value is None else f"{value:#.{digits}g}".rstrip(".")


def _spread(mean: float, std: float | None) -> str:
    return f"{_number(mean)} ± {_number(std)}" if std is not None else _number(mean)


def _interval(mean: float | None, interval: Sequence[float | None]) -> str:
    return "" if mean is None else f"{_number(mean)} [{_number(interval[0])}, {_number(interval[1])}]"

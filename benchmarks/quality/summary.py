"""What the runs say together: tables, intervals and a figure.

Three quantities, means over the seeds of each task. The *lost share* of what training on gains in training loss,

    (L(order, f) - L(unfrozen)) / (L(all frozen) - L(unfrozen)):   0 as good as training on, 1 as bad as stopping at t0;

the same of the test loss, where the divisor is its mean over the seeds, and tasks count only if that is positive; and
the *quality*: the test metric against the unfrozen run's, in percent of it, positive where better.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.quality.adapters import KINDS
from benchmarks.quality.orders import COSTS, ORDERS
from benchmarks.quality.tasks import TASKS

Floats = NDArray[np.float64]
Runs = Mapping[tuple[str, int], dict[str, Any]]
"""What was found, by task and seed."""
Pairs = Mapping[str, Floats]
"""A number for each seed, by task."""

QUANTITIES = {
    "lost": ("Lost share of the gain in training loss", "0 = as training on, 1 = as stopping at t0", 3),
    "lost_test": ("Lost share of the gain in test loss", "0 = as training on, 1 = as stopping at t0", 3),
    "quality": (
        "Test metric against the unfrozen run's",
        "percent of it, positive = better; regressions, whose errors have no bound, dominate the mean",
        2,
    ),
}
"""Title, unit and digits."""
REFERENCES = ("variance_first", "random", "variance_all", "second_moment")
DRAWS = 10_000
ALL = "all"
"""In the place of a fraction: the mean over a task's fractions."""
STYLE: dict[str, dict[str, Any]] = {
    "progress": {"color": "#db2777", "linewidth": 2.4, "marker": "o"},
    "variance_first": {"color": "#1f5fa8", "marker": "o"},
    "second_moment": {"color": "#15803d", "marker": "s"},
    "magnitude": {"color": "#c2410c"},
    "random": {"color": "#6b7280", "linewidth": 2.4},
    "prefix": {"color": "#111827", "linestyle": ":"},
    "lora": {"color": "#0891b2", "linestyle": "-."},
    "oracle_move": {"color": "#111827", "linewidth": 0.8},
}


def load(out: Path, tasks: Sequence[str], seeds: int) -> Runs:
    """The runs that have begun; those of unfinished ones that are there count too."""
    files = {(name, seed): out / f"{name}-{seed}.json" for name in tasks for seed in range(seeds)}
    return {key: json.loads(file.read_text(encoding="utf-8")) for key, file in files.items() if file.exists()}


def report(runs: Runs, out: Path) -> None:
    """Write quality.json, quality.md and quality.png."""
    summary = summarise(runs)
    (out / "quality.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    (out / "quality.md").write_text(text(summary), encoding="utf-8")
    picture(summary).savefig(out / "quality.png", dpi=75)


def summarise(runs: Runs) -> dict[str, Any]:
    """All numbers that the tables and the figure are made of."""
    tasks = list(dict.fromkeys(task for task, _ in runs))
    orders = [o for o in (*ORDERS, *KINDS) if any(_values(runs, "lost", o, ALL))]
    places = [str(f) for f in sorted({f for task in tasks for f in TASKS[task].fractions})] + [ALL]
    return {
        "tasks": {task: _of_task(task, runs) for task in tasks},
        "orders": orders,
        "places": places,
        "means": {
            q: {o: {f: {t: float(v.mean()) for t, v in _values(runs, q, o, f).items()} for f in places} for o in orders}
            for q in QUANTITIES
        },
        "differences": {
            q: {o: {f: {r: difference(runs, q, o, r, f) for r in REFERENCES} for f in places} for o in orders}
            for q in QUANTITIES
        },
        "correlations": {o: _correlations(o, runs) for o in orders if o in ORDERS},
        "predictions": {cost: _predictions(cost, runs) for cost in COSTS},
        "live": {o: {f: _live(o, f, runs) for f in places if f != ALL} for o in KINDS},
    }


def value(run: Mapping[str, Any], quantity: str, task: str, order: str, fraction: float, gain: float) -> float | None:
    """A quantity of one member; None where there is none. `gain` is the task's in test loss."""
    members = run["members"]
    member, best, worst = members.get(f"{order}@{fraction}"), members["unfrozen"], members["all_frozen"]
    if member is None or (quantity == "lost_test" and gain <= 0):
        return None
    if quantity == "lost":
        return (member["train"] - best["train"]) / (worst["train"] - best["train"])  # type: ignore[no-any-return]
    if quantity == "lost_test":
        return (member["test"] - best["test"]) / gain  # type: ignore[no-any-return]
    sign = 100 if TASKS[task].higher_is_better else -100
    return sign * (member["metric"] - best["metric"]) / best["metric"]  # type: ignore[no-any-return]


def difference(runs: Runs, quantity: str, order: str, reference: str, place: str) -> dict[str, Any] | None:
    """Order minus reference, run by run: the mean over tasks, and its interval."""
    pairs = _values(runs, quantity, order, place, reference)
    if not pairs:
        return None
    mean, low, high = interval(pairs)
    return {"mean": mean, "low": low, "high": high, "tasks": len(pairs), "runs": sum(map(len, pairs.values()))}


def interval(pairs: Pairs, alpha: float = 0.05) -> tuple[float, float, float]:
    """The mean over tasks of the means over seeds; 1 - alpha by a bootstrap over tasks and, within them, seeds."""
    values = np.concatenate(list(pairs.values()))
    counts = tuple(len(v) for v in pairs.values())
    mean = float(np.mean([v.mean() for v in pairs.values()]))
    low, high = np.quantile(_weights(counts) @ values, (alpha / 2, 1 - alpha / 2))
    return mean, float(low), float(high)


@cache
def _weights(counts: tuple[int, ...]) -> Floats:
    """The weight of every run in every draw, (DRAWS, runs), with so many seeds of each task."""
    draw = np.random.default_rng(0)
    size, first = np.array(counts), np.cumsum((0, *counts[:-1]))
    weights = np.zeros((DRAWS, sum(counts)))
    rows = np.arange(DRAWS)
    for task in draw.integers(len(counts), size=(len(counts), DRAWS)):
        for i in range(max(counts)):
            seed = draw.integers(size[task])
            np.add.at(weights, (rows, first[task] + seed), (i < size[task]) / (len(counts) * size[task]))
    return weights


def _values(runs: Runs, quantity: str, order: str, place: str, reference: str | None = None) -> dict[str, Floats]:
    """A quantity of an order, or how it differs from a reference's, of all runs that have it, by task."""
    found: dict[str, list[float]] = {}
    gains = _test_gains(runs)
    for (task, _), run in runs.items():
        fractions = [f for f in TASKS[task].fractions if place in (ALL, str(f))]
        values = [value(run, quantity, task, order, f, gains[task]) for f in fractions]
        others = [value(run, quantity, task, reference, f, gains[task]) if reference else 0.0 for f in fractions]
        both = [a - b for a, b in zip(values, others, strict=True) if a is not None and b is not None]
        if both:
            found.setdefault(task, []).append(float(np.mean(both)))
    return {task: np.array(of) for task, of in found.items()}


def _test_gains(runs: Runs) -> dict[str, float]:
    """What training on gains in test loss, a mean over the seeds of each task."""
    found: dict[str, list[float]] = {}
    for (task, _), run in runs.items():
        members = run["members"]
        found.setdefault(task, []).append(members["all_frozen"]["test"] - members["unfrozen"]["test"])
    return {task: float(np.mean(of)) for task, of in found.items()}


def _of_task(task: str, runs: Runs) -> dict[str, Any]:
    own = [run for (name, _), run in runs.items() if name == task]
    ends = {
        f"{member}/{key}": float(np.mean([run["members"][member][key] for run in own]))
        for member in ("all_frozen", "unfrozen")
        for key in ("train", "test", "metric")
    }
    settings = TASKS[task]
    return {
        "title": settings.title, "p": own[0]["p"],
        "runs": len(own), "unfinished": sum("complete" not in run for run in own),
        "t0": settings.t0, "steps": settings.steps, "metric": settings.metric, **ends,
    }  # fmt: skip


def _correlations(order: str, runs: Runs) -> dict[str, float | None]:
    """With the oracles' orders, the mean over tasks."""
    found: dict[str, dict[str, list[float]]] = {"oracle_move": {}, "oracle_cost": {}}
    for (task, _), run in runs.items():
        for oracle, rho in run.get("correlations", {}).get(order, {}).items():
            if rho is not None:
                found[oracle].setdefault(task, []).append(rho)
    return {oracle: _mean([float(np.mean(v)) for v in of.values()]) for oracle, of in found.items()}


def _predictions(cost: str, runs: Runs) -> dict[str, dict[str, float | None]]:
    """By task, of the training loss over the unfrozen: how it compares with what half the frozen scores add up to.

    "predicted" and "happened" are means over seeds and fractions for the order of that cost; "rank" is Spearman's
    correlation of the two over all members of a run, whatever their order.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for (task, _), run in runs.items():
        unfrozen = run["members"]["unfrozen"]["train"]
        members = {key: m for key, m in run["members"].items() if m and cost in m.get("predicted", {})}
        if len(members) < 2:
            continue
        of_task = found.setdefault(task, {"predicted": [], "happened": [], "rank": []})
        both = [(m["predicted"][cost], m["train"] - unfrozen) for m in members.values()]
        own = [pair for key, pair in zip(members, both, strict=True) if key.split("@")[0] == cost]
        of_task["predicted"] += [predicted for predicted, _ in own]
        of_task["happened"] += [happened for _, happened in own]
        of_task["rank"].append(float(spearmanr(*zip(*both, strict=True)).statistic))
    return {task: {key: _mean(v) for key, v in of.items()} for task, of in found.items()}


def _live(order: str, fraction: str, runs: Runs) -> dict[str, float]:
    """By task, how many parameters an adapter trains for each that it was to train."""
    return {
        task: member["live"] / (run["p"] * (1 - float(fraction)))
        for (task, seed), run in runs.items()
        if seed == 0 and (member := run["members"].get(f"{order}@{fraction}"))
    }


def text(summary: Mapping[str, Any]) -> str:
    """The tables in Markdown."""
    tasks: list[str] = list(summary["tasks"])
    means = summary["means"]
    parts = ["# Quality against the live fraction", _ends(summary), "## In short", _in_short(summary)]
    for quantity, (title, unit, digits) in QUANTITIES.items():
        for place in summary["places"]:
            rows = []
            for order in _sorted(summary, quantity, place):
                of = means[quantity][order][place]
                cells = [_number(of.get(task), digits) for task in tasks]
                complete = len(of) == _most(summary, quantity, place)
                mean = _number(float(np.mean(list(of.values()))), digits) + ("" if complete else f" ({len(of)} tasks)")
                apart = [_interval(summary["differences"][quantity][order][place][r], digits) for r in REFERENCES]
                rows.append([order, *cells, mean, *apart])
            heading = f"## {title}, " + ("all fractions" if place == ALL else f"{float(place):.0%} frozen")
            note = f"{unit}; the last columns: the paired difference to an order, 95 % interval"
            parts += [heading, note, table(["order", *tasks, "mean", *(f"to {r}" for r in REFERENCES)], rows)]
    oracles = ("oracle_move", "oracle_cost")
    rows = [[o, *(_number(of[oracle], 3) for oracle in oracles)] for o, of in summary["correlations"].items()]
    parts += ["## Rank correlation with the oracles, mean over tasks", table(["order", *oracles], rows)]
    rows = [[cost, *(_prediction(of.get(task)) for task in tasks)] for cost, of in summary["predictions"].items() if of]
    note = "predicted → happened, for the order of that cost; in brackets the rank correlation over all members"
    parts += ["## Increase of the training loss, ½ Σ h d² over the frozen", note, table(["order", *tasks], rows)]
    rows = [
        [kind, fraction, *(_number(of.get(task), 2) for task in tasks)]
        for kind, by_fraction in summary["live"].items()
        for fraction, of in by_fraction.items()
    ]
    parts += ["## Parameters that adapters train, for each live element", table(["kind", "frozen", *tasks], rows)]
    return "\n\n".join(parts) + "\n"


def _in_short(summary: Mapping[str, Any]) -> str:
    """Training loss by fraction, and over all of them the differences to some orders, in test loss to the first."""
    lost, apart = summary["means"]["lost"], summary["differences"]
    fractions = [f for f in summary["places"] if f != ALL]
    rows = []
    for order in _sorted(summary, "lost", ALL):
        means = []
        for f in fractions:
            of = list(lost[order].get(f, {}).values())
            few = "" if len(of) == _most(summary, "lost", f) else f" ({len(of)} tasks)"
            means.append((_number(float(np.mean(of)), 2) if of else "-") + few)
        differences = [
            _interval(apart["lost"][order][ALL][r], 2) for r in ("variance_first", "random", "second_moment")
        ]
        rows.append([order, *means, *differences, _interval(apart["lost_test"][order][ALL]["variance_first"], 2)])
    head = ["to variance_first", "to random", "to second_moment", "in test loss, to variance_first"]
    return table(["order", *fractions, *head], rows)


def _ends(summary: Mapping[str, Any]) -> str:
    rows = []
    for name, of in summary["tasks"].items():
        runs = f"{of['runs']}, {of['unfinished']} unfinished" if of["unfinished"] else f"{of['runs']}"
        loss = f"{of['all_frozen/train']:.3f} → {of['unfrozen/train']:.3f}"
        metric = f"{of['all_frozen/metric']:.3f} → {of['unfrozen/metric']:.3f} ({of['metric']})"
        rows.append([name, of["title"], f"{of['p']:,}", runs, f"{of['t0']} / {of['steps']}", loss, metric])
    return table(["task", "what", "p", "runs", "t0 / steps", "training loss at t0 → end", "test metric"], rows)


def _most(summary: Mapping[str, Any], quantity: str, place: str) -> int:
    return max(len(of[place]) for of in summary["means"][quantity].values())


def _sorted(summary: Mapping[str, Any], quantity: str, place: str) -> list[str]:
    """Best first, by the paired difference to the paper's order, which only runs enter that have both."""
    apart = {
        o: of[place]["variance_first"]
        for o, of in summary["differences"][quantity].items()
        if of[place]["variance_first"]
    }
    return sorted(apart, key=lambda o: apart[o]["mean"] * (-1 if quantity == "quality" else 1))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _number(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def _interval(of: Mapping[str, float] | None, digits: int) -> str:
    return f"{of['mean']:+.{digits}f} [{of['low']:+.{digits}f}, {of['high']:+.{digits}f}]" if of else "-"


def _prediction(of: Mapping[str, float | None] | None) -> str:
    """Half done runs may lack the members that have that cost's own order."""
    if not of or None in of.values():
        return "-"
    return f"{of['predicted']:.2g} → {of['happened']:.2g} ({of['rank']:.2f})"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None


def picture(summary: Mapping[str, Any]) -> Figure:
    """A panel a task: lost share against the fraction frozen."""
    tasks = summary["tasks"]
    columns = 4
    figure = Figure(figsize=(14, 3.1 * -(-(len(tasks) + 1) // columns)), layout="constrained")
    panels = figure.subplots(-(-(len(tasks) + 1) // columns), columns, sharex=True, squeeze=False).flat
    for axes, (name, of) in zip(panels, tasks.items(), strict=False):
        for order, style in STYLE.items():
            by_place = summary["means"]["lost"].get(order, {})
            points = {float(f): of_f[name] for f, of_f in by_place.items() if f != ALL and name in of_f}
            points = {0.0: 0.0, **points} | ({} if order in KINDS else {1.0: 1.0}) if points else {}
            axes.plot(list(points), list(points.values()), label=order, markersize=4, **style)
        axes.set_title(f"{name}: {of['title']}", fontsize=8)
        axes.set_ylim(-0.25, 1.25)
        axes.tick_params(labelbottom=True)
        axes.axhline(0, color="#d1d5db", linewidth=0.8, zorder=0)
        axes.axhline(1, color="#d1d5db", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles = panels[0].get_legend_handles_labels()
    for axes in list(panels)[len(tasks) :]:
        axes.axis("off")
    figure.legend(*handles, loc="lower right", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("fraction frozen", fontsize=10)
    figure.supylabel("lost share of the gain in training loss", fontsize=10)
    return figure

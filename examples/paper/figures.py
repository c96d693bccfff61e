"""The pictures of a summary: losses against the fraction frozen or pruned, α̂ as heat maps, and its stability."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.paper.summary import middle
from examples.paper.tables import words

STYLE: dict[str, dict[str, Any]] = {
    "variance": {"color": "#1f5fa8", "linewidth": 2.2, "zorder": 4},
    "random": {"color": "#6b7280", "linewidth": 2.2, "zorder": 3},
    "reverse": {"color": "#9ec5ee", "linestyle": "--"},
    "magnitude": {"color": "#c2410c", "marker": "o"},
    "second_moment": {"color": "#15803d", "marker": "s"},
    "snr": {"color": "#a16207", "marker": "^"},
    "displacement": {"color": "#9333ea", "marker": "D"},
}
RELATED_STYLE: dict[str, dict[str, Any]] = {
    "l1_path": {"color": "#0d9488", "linestyle": "-."},
    "elastic_net_path": {"color": "#67c5bd", "linestyle": "-."},
    "obd": {"color": "#dc2626", "linestyle": ":", "marker": "x"},
    "obs": {"color": "#f59e9e", "linestyle": ":", "marker": "x"},
    "obd_freeze": {"color": "#7f1d1d", "linestyle": "-", "marker": "v"},
    "obs_freeze": {"color": "#e879a0", "linestyle": "-", "marker": "v"},
    "obd_freeze_diagonal": {"color": "#b45361", "linestyle": "--", "marker": "v"},
    "relevance": {"color": "#4d7c0f", "linestyle": "--", "marker": "P"},
    "belsley_noise": {"color": "#111827", "linestyle": ":"},
    "belsley_laplace": {"color": "#475569", "linestyle": "-."},
}
READING_STYLE: dict[str, dict[str, Any]] = {"variance_of_sum": {"color": "#0369a1", "linestyle": ":", "marker": "*"}}
ALL_STYLES = STYLE | READING_STYLE | RELATED_STYLE
SPREAD = ("variance", "random")  # the two whose spread is drawn: more bands would hide each other


def loss(summary: Mapping[str, Any], title: str) -> Figure:
    """Mean loss over the runs, training and test, a line per order; two have a band of one standard deviation."""
    columns, height = _legend_below(len(summary["orders"]))
    figure = Figure(figsize=(10, 4.2 + height), layout="constrained")
    panels = figure.subplots(1, 2)
    _, done = words(summary)
    for axes, stage in zip(panels, ("train", "test"), strict=True):
        for order, curves in summary["orders"].items():
            mean = np.array(curves[stage]["mean"])
            axes.plot(summary["fractions"], mean, label=order, markersize=3.5, **ALL_STYLES[order])
            if order in SPREAD:
                std = np.array(curves[stage]["std"])
                axes.fill_between(
                    summary["fractions"], mean - std, mean + std, color=STYLE[order]["color"], alpha=0.15, linewidth=0
                )
        axes.set_title("training loss" if stage == "train" else "test loss", fontsize=10)
        axes.set_xlabel(f"fraction {done}")
        ends = summary["orders"]["random"][stage]["mean"]
        if ends[-1] > 10 * ends[0]:
            axes.set_yscale("log")  # or the curves would lie on the axis
        else:
            axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    at = f"frozen at step {summary['t0']} of" if not summary["prune"] else "pruned after step"
    figure.suptitle(f"{title}: {summary['runs']} runs, {at} {summary['steps']}", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def multiples(summary: Mapping[str, Any], title: str) -> Figure:
    """A panel for each order, of the training loss: its mean and spread, over the means of variance and random."""
    others = [order for order in summary["orders"] if order not in SPREAD]
    columns = 5
    figure = Figure(figsize=(11, 0.6 + 2.1 * -(-len(others) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(others) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    ends = summary["orders"]["random"]["train"]["mean"]
    for axes, order in zip(panels, others, strict=False):
        for one, width in ((SPREAD[1], 1.0), (SPREAD[0], 1.0), (order, 2.2)):
            curve = {key: np.array(summary["orders"][one]["train"][key]) for key in ("mean", "std")}
            color = STYLE[one]["color"] if one in SPREAD else "#c2410c"
            axes.plot(summary["fractions"], curve["mean"], color=color, linewidth=width, label=one)
            if one == order:
                low, high = curve["mean"] - curve["std"], curve["mean"] + curve["std"]
                axes.fill_between(summary["fractions"], low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_title(order, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        if ends[-1] > 10 * ends[0]:
            axes.set_yscale("log")
    for axes in panels[len(others) :]:
        axes.set_visible(False)
    done = words(summary)[1]
    figure.suptitle(f"{title}: training loss by the fraction {done}. Grey: random, blue: variance", fontsize=10)
    return figure


def alpha(summary: Mapping[str, Any], title: str) -> Figure:
    """α̂, a column for each fraction: above by place in the model, below sorted by how often a parameter froze."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    fractions = summary["fractions"]
    for column, order in enumerate(SPREAD):
        share = np.array(list(summary["alpha"][order].values())).T  # (p, F)
        for axes, rows in zip(
            panels[:, column], (share, share[np.argsort(-share.mean(1), kind="stable")]), strict=True
        ):
            image = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        panels[0, column].set_title(order, fontsize=10)
        panels[1, column].set_xlabel(f"fraction {words(summary)[1]}")
        panels[1, column].set_xticks(range(len(fractions)), [f"{f:g}" for f in fractions])
    panels[0, 0].set_ylabel("parameter, by place")
    panels[1, 0].set_ylabel("parameter, sorted by its mean")
    figure.colorbar(
        image, ax=panels, label=f"share of the {summary['runs']} runs in which it is {words(summary)[1]}", shrink=0.6
    )
    figure.suptitle(title, fontsize=11)
    return figure


def stability(summary: Mapping[str, Any], title: str) -> Figure:
    """How much the frozen sets of two runs overlap, and in how many runs a parameter is frozen, against chance."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    overlap, counts = figure.subplots(1, 2)
    inner = [f for f in summary["fractions"] if 0 < f < 1]
    keys = [str(f) for f in inner]
    half = str(summary["fractions"][middle(summary["fractions"])])
    found = summary["stability"]
    for order in SPREAD:
        overlap.plot(inner, [found[order][key]["jaccard"] for key in keys], label=order, **STYLE[order])
        if found[order][keys[0]]["aligned"] is not None:
            overlap.plot(
                inner,
                [found[order][key]["aligned"] for key in keys],
                label=f"{order}, hidden units aligned",
                color=STYLE[order]["color"],
                linestyle=":",
            )
        _staircase(counts, found[order][half]["alpha"], **STYLE[order])
    overlap.plot(inner, [found["chance"][key]["jaccard"] for key in keys], "k--", linewidth=1, label="chance", zorder=5)
    _staircase(counts, found["chance"][half]["alpha"], color="black", linestyle="--", linewidth=1, zorder=5)
    overlap.set(xlabel=f"fraction {words(summary)[1]}", ylabel="Jaccard overlap of two runs", ylim=(0, 1))
    verb = "pruned" if summary["prune"] else "froze"
    counts.set(xlabel=f"runs of {summary['runs']} that {verb} a parameter, fraction {half}", ylabel="parameters")
    for axes in (overlap, counts):
        axes.spines[["top", "right"]].set_visible(False)
    overlap.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=11)
    return figure


def scan(summaries: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """By t0: what freezing everything costs, and which part of chance's cost each order pays for freezing a half."""
    columns, height = _legend_below(1 + len(summaries[0]["growth"]))
    figure = Figure(figsize=(10, 4.2 + height), layout="constrained")
    ends, costs = figure.subplots(1, 2)
    t0s = [summary["t0"] for summary in summaries]
    half = middle(summaries[0]["fractions"])
    for stage, line in (("train", "-"), ("test", ":")):
        for end, marker, label in ((-1, "s", "all"), (0, "o", "nothing")):
            values = [summary["orders"]["random"][stage]["mean"][end] for summary in summaries]
            ends.plot(t0s, values, line, color="black", marker=marker, label=f"{label} frozen, {stage}")
    for order in summaries[0]["growth"]:
        found = [summary["growth"][order]["train"] for summary in summaries]
        mean = np.array([one["mean"][half] for one in found], dtype=float)  # NaN for None, which is left out
        interval = np.array([one["interval"][half] for one in found], dtype=float)
        error = np.abs(interval.T - mean)
        costs.errorbar(t0s, mean, error, label=order, markersize=4, capsize=2, **ALL_STYLES[order])
    costs.axhline(1, color=STYLE["random"]["color"], label="random")
    ends.set(xlabel="t0", ylabel="loss after the last step", xscale="log", yscale="log")
    low, high = costs.get_ylim()
    costs.set(xlabel="t0", ylabel=f"growth, {summaries[0]['fractions'][half]:g} frozen, training", xscale="log")
    costs.set_ylim(min(0, low), min(3, high))
    if high > 3:
        costs.set_title("what lies above 3 is cut off", fontsize=8)
    for axes in (ends, costs):
        axes.set_xticks(t0s, [f"{t0:,}" for t0 in t0s], minor=False)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    ends.legend(frameon=False, fontsize=8)
    figure.legend(*costs.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{title}: {summaries[0]['runs']} runs", fontsize=11)
    return figure


def _legend_below(entries: int) -> tuple[int, float]:
    """In how many columns, and how high in inches: fewer where there are long names among the entries."""
    columns = 7 if entries <= 7 else 5
    return columns, 0.2 * -(-entries // columns)


def _staircase(axes: Axes, counts: list[float], **style: Any) -> None:
    axes.step(range(len(counts)), counts, where="mid", **style)

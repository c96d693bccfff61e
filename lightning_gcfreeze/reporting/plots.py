"""Plots of a freeze, by matplotlib, which is imported when it is needed."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gcfreeze.reporting.groups import History, shortened_name


def plot_frozen(history: History, now: int, ax: Any = None) -> Any:
    """Plot frozen fractions: a row for each layer, the first one on top, over the optimizer steps.

    Args:
        history: of layers, from step 0 on.
        now: the last step.
        ax: matplotlib's Axes to draw on; None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers = list(history[-1][1])
    edges = [*(step for step, _ in history), max(now, history[-1][0] + 1)]
    values = np.array([[fractions.get(layer, 0.0) for _, fractions in history] for layer in layers])
    ax = _axes(ax, height=1.2 + 0.22 * len(layers))
    mesh = ax.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, values, cmap="Blues", vmin=0.0, vmax=1.0)
    ax.set(xlabel="optimizer step", xlim=(edges[0], edges[-1]), ylim=(len(layers) - 0.5, -0.5))
    ax.set_yticks(range(len(layers)), [_plain(shortened_name(layer)) for layer in layers])
    ax.locator_params(axis="x", integer=True)
    ax.figure.colorbar(mesh, ax=ax, label="frozen fraction")
    return ax


def plot_mask(mask: NDArray[np.bool_], name: str, ax: Any = None) -> Any:
    """Plot a mask, rows x columns: dark is frozen.

    Args:
        mask: of any shape. What has more than two dimensions is drawn as (first, all others).
        name: of the parameter.
        ax: matplotlib's Axes to draw on; None: those of a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows = mask.reshape(len(mask), math.prod(mask.shape[1:])) if mask.ndim > 1 else mask.reshape(1, -1)
    ax = _axes(ax, height=4.0 if mask.ndim > 1 else 1.6)
    if mask.size:
        smoothed = "nearest" if rows.size < 4e4 else None
        ax.imshow(rows, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation=smoothed)
    fraction = mask.mean() if mask.size else 0.0
    ax.set(title=f"{_plain(shortened_name(name, 60))}: {fraction:.1%} frozen", xlabel="column", ylabel="row")
    ax.locator_params(integer=True)
    if mask.ndim < 2:
        ax.set(xlabel="element", ylabel="", yticks=())
    return ax


def _plain(name: str) -> str:
    """Return a name that matplotlib takes for no formula."""
    return name.replace("$", r"\$")


def _axes(ax: Any, height: float) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed: `pip install matplotlib`, or the extra `plot` of"
            " lightning-gcfreeze."
        ) from error
    return pyplot.subplots(figsize=(7.0, height), layout="constrained")[1]

"""Plots of a freeze, by matplotlib, which is imported when it is needed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_gcfreeze.reporting.groups import History


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
    ax.set(xlabel="optimizer step", xlim=(edges[0], edges[-1]), yticks=range(len(layers)), yticklabels=layers)
    ax.invert_yaxis()
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
    rows = mask.reshape(len(mask), -1) if mask.ndim > 1 else mask.reshape(1, -1)
    ax = _axes(ax, height=4.0)
    ax.imshow(
        rows, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest" if rows.size < 4e4 else None
    )
    ax.set(title=f"{name}: {mask.mean():.1%} frozen", xlabel="column", ylabel="row")
    return ax


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

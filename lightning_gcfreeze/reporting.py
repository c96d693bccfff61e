"""Tags, values and images for loggers. Which loggers there are, and when to log, is the callback's business."""

import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_gcfreeze._types import Named

FROZEN_FRACTION = "gcfreeze/frozen_fraction"
FROZEN_FRACTION_OF = f"{FROZEN_FRACTION}_of"
"""In front of a parameter's name. No scalar's tag is a folder of another's: MLflow's file store makes them files."""
HEAT_MAP = "gcfreeze/frozen"
"""The tag of the heat map; those of mask images begin with it. Sorted by name, images come before all scalars."""
MAX_GROUPS = 16
"""Parameters whose fractions are scalars of their own. Of more, those of a module are taken together."""
MAX_HISTOGRAMS = 8
"""Histograms of a model with more than `MAX_GROUPS` parameters."""
MAX_HISTOGRAM_NUMEL = 2**20
"""Values that a histogram is drawn from, about; of more, evenly spaced ones."""
MAX_ROWS = 64
"""Rows of the heat map."""
MAX_MASK_IMAGES = 4
MAX_SIDE = 128
"""Pixels of a mask image in height and width."""
LIVE, FROZEN = (247, 251, 255), (8, 48, 107)
"""The colours, red, green and blue, of 0 % and of 100 %. What is between is interpolated."""

Image = NDArray[np.uint8]
"""(height, width, 3)."""

_MAP_WIDTH, _MAP_HEIGHT, _MIN_ROW = 384, 192, 4  # pixels of the heat map, and of one of its rows
_REDRAWN = 1.25  # the heat map is drawn again when so many times the steps have passed


class Decided(Protocol):
    """What is drawn of a decision."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of whole parameters."""

    @property
    def fractions(self) -> Mapping[str, float]:
        """Frozen elements of each parameter / its elements."""

    @property
    def frozen(self) -> Named:
        """``{name: bool (*p.shape)}``, of sharded parameters the local parts."""

    @property
    def variance(self) -> Named:
        """``{name: (*p.shape)}``; may be empty."""


def scalars(
    fractions: Mapping[str, float],
    fraction: float,
    observed: int,
    savings: Mapping[str, float] | None = None,
    bytes_sent: int | None = None,
    planning: Mapping[str, float] | None = None,
    lr_factor: float | None = None,
    shapes: Mapping[str, torch.Size] | None = None,
) -> dict[str, float]:
    """Return the numbers of a step, by tag.

    Args:
        fractions: frozen elements / all elements of each eligible parameter, by name.
        fraction: frozen elements / eligible elements.
        observed: observed steps.
        savings: the totals of `Savings`, by tag; None before the freeze.
        bytes_sent: what this process passed to DDP's all-reduce in the step; None without DDP.
        planning: what the `Plan` found since the last call, by tag; values that are not finite are left out.
        lr_factor: what learning rates are multiplied by in the next step; None if that was not asked for.
        shapes: of the parameters: where they are taken together, each counts by its elements. None: all alike.
    """
    values = {FROZEN_FRACTION: fraction, "gcfreeze/observed_steps": float(observed)}
    values |= {f"{FROZEN_FRACTION_OF}/{name}": v for name, v in grouped(fractions, shapes or {}, MAX_GROUPS).items()}
    values |= savings or {}
    values |= {} if bytes_sent is None else {"gcfreeze/gradient_bytes_sent": float(bytes_sent)}
    values |= {} if lr_factor is None else {"gcfreeze/lr_factor": lr_factor}
    return values | {tag: value for tag, value in (planning or {}).items() if math.isfinite(value)}


# Groups ---------------------------------------------------------------------------------------------------------------


def groups(names: Iterable[str], most: int) -> dict[str, list[str]]:
    """Return parameters by the module that they are shown as: each by itself if there are no more than `most`.

    Of more, the module with most parameters is parted into its children, siblings with as many together with it, and
    so on, as long as there are at most `most` groups.

    Returns:
        ``{name of a module, or of a parameter that is alone: names of parameters}``, in the order of `names`.
    """
    return {group: list(members) for group, members in _groups(tuple(names), most).items()}


@functools.lru_cache(maxsize=64)
def _groups(names: tuple[str, ...], most: int) -> dict[str, tuple[str, ...]]:
    if len(names) <= most:
        return {name: (name,) for name in names}
    found: dict[str, list[str]] = {"": list(names)}
    while (parted := _parted(found, most)) is not None:
        found = parted
    order = {name: i for i, name in enumerate(names)}
    named = {members[0] if len(members) == 1 else group or "all": tuple(members) for group, members in found.items()}
    return dict(sorted(named.items(), key=lambda item: order[item[1][0]]))


def _parted(found: dict[str, list[str]], most: int) -> dict[str, list[str]] | None:
    """Part the largest group, and with it siblings of its size; None if there would be too many."""
    largest = max(found, key=lambda group: len(found[group]))
    alike = [
        group
        for group, members in found.items()
        if len(members) == len(found[largest]) and group.rpartition(".")[0] == largest.rpartition(".")[0]
    ]
    parts: dict[str, list[str]] = {}
    for group in alike:
        start = len(group) + 1 if group else 0
        for name in found[group]:
            parts.setdefault(name[: start + len(name[start:].partition(".")[0])], []).append(name)
    too_many = len(found) - len(alike) + len(parts) > most
    return None if too_many else {group: found[group] for group in found if group not in alike} | parts


def grouped(fractions: Mapping[str, float], shapes: Mapping[str, torch.Size], most: int) -> dict[str, float]:
    """Return the frozen fractions of at most `most` groups; parameters count by their elements, or as 1."""
    found = {}
    for group, members in groups(fractions, most).items():
        sizes = [shapes[name].numel() if name in shapes else 1 for name in members]
        total = math.fsum(fractions[name] * size for name, size in zip(members, sizes, strict=True))
        found[group] = fractions[group] if members == [group] else total / max(1, sum(sizes))
    return found


# Histograms and images ------------------------------------------------------------------------------------------------


def histograms(variance: Named, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Yield tags and values of a decision's histograms, one after the other: log10 of the positive, finite variances.

    Args:
        variance: ``{name: (*p.shape)}``, one computed after the other; may be empty.
        shapes: of the parameters.
    """
    for group, members in groups(variance, MAX_GROUPS if len(variance) <= MAX_GROUPS else MAX_HISTOGRAMS).items():
        stride = math.ceil(sum(shapes[name].numel() for name in members) / MAX_HISTOGRAM_NUMEL)
        parts = []
        for name in members:
            logs = variance[name].reshape(-1)[:: stride | 1].log10()  # odd: an even stride would leave columns out
            parts.append(logs[logs.isfinite()].cpu())
        if (logs := torch.cat(parts)).numel():
            yield f"gcfreeze/log10_variance/{group}", logs


def mask_images(frozen: Named, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Image]]:
    """Yield tags and images of the largest matrices' masks: rows by columns, each pixel the mean of its elements.

    Args:
        frozen: ``{name: bool (*p.shape)}``. What has more than two dimensions is drawn as (first, all others).
        shapes: of whole parameters, which tell how large they are.
    """
    matrices = [name for name, mask_shape in shapes.items() if len(mask_shape) > 1 and mask_shape.numel()]
    for name in sorted(matrices, key=lambda name: -shapes[name].numel())[:MAX_MASK_IMAGES]:
        mask = frozen[name]
        if mask.numel():  # a process may have nothing of it
            yield f"{HEAT_MAP}/{name}", coloured(shrunk(mask.reshape(len(mask), -1).cpu().numpy()))


def shrunk(matrix: NDArray[Any]) -> NDArray[np.float64]:
    """Return the means of the cells of at most `MAX_SIDE` x `MAX_SIDE`, which share rows and columns evenly."""
    for axis in (0, 1):
        size = matrix.shape[axis]
        edges = np.arange(min(size, MAX_SIDE)) * size // min(size, MAX_SIDE)
        sums = np.add.reduceat(matrix, edges, axis=axis, dtype=np.float64)
        matrix = sums / np.expand_dims(np.diff(edges, append=size), 1 - axis)
    return matrix


def heat_map(history: Sequence[tuple[int, Mapping[str, float]]], now: int) -> Image:
    """Draw frozen fractions: a row for each layer, the first one on top, over the steps from left to right.

    Args:
        history: steps and the fractions, by layer, that hold from there on. A layer that is missing has 0.
        now: the step of the last column; the first column is that of the first entry.
    """
    layers = list(history[-1][1])
    values = np.array([[fractions.get(layer, 0.0) for layer in layers] for _, fractions in history])
    columns = np.linspace(history[0][0], now, _MAP_WIDTH)
    at = np.searchsorted([step for step, _ in history], columns, side="right") - 1
    return coloured(np.repeat(values[at].T, max(_MIN_ROW, _MAP_HEIGHT // len(layers)), axis=0))


def coloured(fractions: NDArray[np.float64]) -> Image:
    """Return (height, width) of numbers in [0, 1] in colours from `LIVE` to `FROZEN`, (height, width, 3)."""
    live, frozen = np.array(LIVE, float), np.array(FROZEN, float)
    image: Image = np.rint(live + fractions[:, :, None] * (frozen - live)).astype(np.uint8)
    return image


# Loggers --------------------------------------------------------------------------------------------------------------


class Board:
    """Writes numbers to all loggers, and histograms and images to those that have them, as TensorBoard's does.

    Args:
        optimizer: the index of the optimizer that is followed, where a module has several.
    """

    def __init__(self, optimizer: int | None = None) -> None:
        self._optimizer = optimizer
        self._history: list[tuple[int, dict[str, float]]] = []  # the fractions that hold from a step on, by layer
        self._drawn_at = 0  # the step of the last heat map

    def tag(self, tag: str) -> str:
        """Return the tag of this optimizer."""
        return tag.replace("gcfreeze/", f"gcfreeze/optimizer_{self._optimizer}/", 1) if self._optimizer else tag

    def tagged(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values under the tags of this optimizer."""
        return {self.tag(tag): value for tag, value in values.items()}

    def begin(self, step: int, decision: Decided | None) -> None:
        """Begin the heat map where training begins, or goes on."""
        self._history = [(step, _rows(decision) if decision else {})]

    def log(
        self,
        loggers: Iterable[Any],
        step: int,
        metrics: Mapping[str, float],
        decision: Decided | None = None,
        has_changed: bool = False,
    ) -> None:
        """Write numbers, and what there is to draw of a decision.

        Args:
            loggers: Lightning's loggers.
            step: the step on the loggers' axis.
            metrics: numbers by tag, see `scalars`.
            decision: what is frozen, if anything.
            has_changed: whether the masks are others than at the last call.
        """
        loggers, metrics = list(loggers), self.tagged(metrics)
        for logger in loggers:
            logger.log_metrics(metrics, step=step)
        if decision and has_changed:
            self._history.append((step, _rows(decision)))
            self._write(loggers, "add_histogram", lambda: histograms(decision.variance, decision.shapes), step)
            self._write(loggers, "add_image", lambda: mask_images(decision.frozen, decision.shapes), step)
        if has_changed or (decision and step >= _REDRAWN * self._drawn_at):
            self.draw(loggers, step)

    def draw(self, loggers: Iterable[Any], step: int) -> None:
        """Draw the heat map up to a step, if anything froze and it was not drawn for this step."""
        if self._history and self._history[-1][1] and step != self._drawn_at:
            self._drawn_at = step
            self._write(loggers, "add_image", lambda: [(HEAT_MAP, heat_map(self._history, step))], step)

    def _write(
        self, loggers: Iterable[Any], method: str, values: Callable[[], Iterable[tuple[str, Any]]], step: int
    ) -> None:
        """Compute values only where a logger's experiment has the method for them."""
        found = (getattr(getattr(logger, "experiment", None), method, None) for logger in loggers)
        writers = [write for write in found if write is not None]
        options: dict[str, Any] = {}
        if method == "add_image":
            if importlib.util.find_spec("PIL") is None:  # by which TensorBoard's writers compress images
                return
            options["dataformats"] = "HWC"
        for tag, value in values() if writers else ():
            for write in writers:
                write(self.tag(tag), value, step, **options)


def _rows(decision: Decided) -> dict[str, float]:
    return grouped(decision.fractions, decision.shapes, MAX_ROWS)

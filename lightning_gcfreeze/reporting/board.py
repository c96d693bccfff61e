"""Tags, values and images for loggers. Which loggers there are is the callback's business."""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gcfreeze._names import class_names
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.reporting.groups import MAX_GROUPS, History, by_module, grouped, history_by_layer
from lightning_gcfreeze.reporting.images import Image, heat_map, labelled, mask_images

FROZEN_FRACTION = "gcfreeze/frozen_fraction"
HEAT_MAP = "gcfreeze/frozen"
"""The tag of the heat map; those of mask images begin with it. Sorted by name, images come before all scalars."""
MAX_HISTOGRAMS = 8
"""Histograms of a model with more parameters than get scalars of their own."""
MAX_HISTOGRAM_NUMEL = 2**20
"""Values that a histogram is drawn from, about; of more, evenly spaced ones."""
MAX_ROWS = 16
"""Rows of the heat map."""
MAX_MASK_IMAGES = 4

_REDRAWN = 1.25  # the heat map is drawn again when so many times the steps have passed


class Decided(Protocol):
    """What is drawn of a decision."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of whole parameters."""

    @property
    def frozen(self) -> Named:
        """``{name: bool (*p.shape)}``, of sharded parameters the local parts."""

    @property
    def variance(self) -> Named:
        """``{name: (*p.shape)}``; may be empty."""


class Known(Protocol):
    """What is drawn of a run."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""

    @property
    def history(self) -> History:
        """What froze, by parameter."""

    @property
    def decision(self) -> Decided | None:
        """What is frozen now, if anything."""


def scalars(
    fractions: Mapping[str, float],
    fraction: float,
    observed: int,
    savings: Mapping[str, float] | None = None,
    bytes_sent: int | None = None,
    planning: Mapping[str, float] | None = None,
    lr_factor: float | None = None,
    shapes: Mapping[str, torch.Size] | None = None,
    most: int = MAX_GROUPS,
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
        most: parameters that have a number of their own; of more, modules have.
    """
    values = {FROZEN_FRACTION: fraction, "gcfreeze/observed_steps": float(observed)}
    values |= {f"{FROZEN_FRACTION}/{name}": v for name, v in grouped(fractions, shapes or {}, most).items()}
    values |= savings or {}
    values |= {} if bytes_sent is None else {"gcfreeze/gradient_bytes_sent": float(bytes_sent)}
    values |= {} if lr_factor is None else {"gcfreeze/lr_factor": lr_factor}
    return values | {tag: value for tag, value in (planning or {}).items() if math.isfinite(value)}


def histograms(
    variance: Named, shapes: Mapping[str, torch.Size], most: int = MAX_GROUPS
) -> Iterator[tuple[str, Tensor]]:
    """Yield tags and values of a decision's histograms, one after the other: log10 of the positive, finite variances.

    Args:
        variance: ``{name: (*p.shape)}``, one computed after the other; may be empty.
        shapes: of the parameters.
        most: parameters that have a histogram of their own; of more, at most 8 modules have.
    """
    for group, members in by_module(variance, most if len(variance) <= most else min(most, MAX_HISTOGRAMS)).items():
        stride = math.ceil(sum(shapes[name].numel() for name in members) / MAX_HISTOGRAM_NUMEL)
        parts = []
        for name in members:
            logs = variance[name].reshape(-1)[:: stride | 1].log10()  # odd: an even stride would leave columns out
            parts.append(logs[logs.isfinite()].cpu())
        if (logs := torch.cat(parts)).numel():
            yield f"gcfreeze/log10_variance/{group}", logs


class Board:
    """Writes numbers to all loggers, and histograms and images to those that have them, as TensorBoard's does.

    Args:
        optimizer: the index of the optimizer that is followed, where a module has several.
        most: parameters that are drawn one by one.
    """

    def __init__(self, optimizer: int | None = None, most: int = MAX_GROUPS) -> None:
        self._optimizer, self._most = optimizer, most
        self._logged_step = 0  # the optimizer step
        self._n_drawn = 0  # entries of the history that were drawn
        self._drawn_at = -1  # the step of the last heat map

    def tag(self, tag: str) -> str:
        """Return the tag of this optimizer."""
        return tag.replace("gcfreeze/", f"gcfreeze/optimizer_{self._optimizer}/", 1) if self._optimizer else tag

    def tagged(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values under the tags of this optimizer."""
        return {self.tag(tag): value for tag, value in values.items()}

    def begin(self, known: Known) -> None:
        """Begin, or go on: what is known of earlier steps was logged and drawn."""
        self._logged_step, self._n_drawn = known.steps, sum(step < known.steps for step, _ in known.history)

    def is_due(self, steps: int, every: int, has_news: bool) -> bool:
        """Return whether an optimizer step is to be logged: each `every`-th, or one with news, once."""
        return (has_news or (every > 0 and steps % every == 0)) and self._logged_step != steps

    def log(self, loggers: Iterable[Any], step: int, metrics: Mapping[str, float], known: Known) -> None:
        """Write numbers and, where the masks have changed since the last call, what there is to draw of them.

        Args:
            loggers: Lightning's loggers.
            step: the step on the loggers' axis.
            metrics: numbers by tag, see `scalars`.
            known: what is frozen, if anything.
        """
        has_changed = len(known.history) > self._n_drawn
        self._logged_step, self._n_drawn, loggers = known.steps, len(known.history), list(loggers)
        for logger in loggers:
            logger.log_metrics(_tags_for(logger, self.tagged(metrics)), step=step)
        if (decision := known.decision) and has_changed:
            shapes, most = decision.shapes, min(self._most, MAX_MASK_IMAGES)
            self._write(loggers, "add_histogram", lambda: histograms(decision.variance, shapes, self._most), step)
            images = ((f"{HEAT_MAP}/{name}", image) for name, image in mask_images(decision.frozen, shapes, most))
            self._write(loggers, "add_image", lambda: images, step)
        if has_changed or (decision and step >= _REDRAWN * self._drawn_at):
            self.draw(loggers, step, known)

    def draw(self, loggers: Iterable[Any], step: int, known: Known) -> None:
        """Draw the heat map up to now, if anything froze and it was not drawn for this step."""
        if known.decision and step != self._drawn_at:
            self._drawn_at, shapes = step, known.decision.shapes
            self._write(loggers, "add_image", lambda: [(HEAT_MAP, _map(known, shapes))], step)

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


def _tags_for(logger: Any, metrics: dict[str, float]) -> dict[str, float]:
    """Return the numbers by tags that a logger can keep: in MLflow's file store no tag may be a folder of another."""
    if "MLFlowLogger" not in class_names(logger):
        return metrics
    return {tag.replace("frozen_fraction/", "frozen_fraction_of/", 1): value for tag, value in metrics.items()}


def _map(known: Known, shapes: Mapping[str, torch.Size]) -> Image:
    history = history_by_layer(known.history, shapes, MAX_ROWS)
    return labelled(heat_map(history, known.steps), list(history[-1][1]), history[0][0], known.steps)

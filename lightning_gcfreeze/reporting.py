"""Tags and values for loggers. Which loggers there are, and when to log, is the callback's business."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_gcfreeze._types import Named

FROZEN_FRACTION = "gcfreeze/frozen_fraction"


def scalars(
    fractions: Mapping[str, float],
    fraction: float,
    observed: int,
    savings: Mapping[str, float] | None = None,
    bytes_sent: int | None = None,
    planning: Mapping[str, float] | None = None,
    lr_factor: float | None = None,
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
    """
    values = {FROZEN_FRACTION: fraction, "gcfreeze/observed_steps": float(observed)}
    values |= {f"{FROZEN_FRACTION}/{name}": value for name, value in fractions.items()}
    values |= savings or {}
    values |= {} if bytes_sent is None else {"gcfreeze/gradient_bytes_sent": float(bytes_sent)}
    values |= {} if lr_factor is None else {"gcfreeze/lr_factor": lr_factor}
    return values | {tag: value for tag, value in (planning or {}).items() if math.isfinite(value)}


def histograms(frozen: Named, variance: Named) -> Iterator[tuple[str, Tensor]]:
    """Yield tags and values of a decision's histograms, one after the other.

    Args:
        frozen: ``{name: bool (*p.shape)}``, logged as 0 and 1.
        variance: ``{name: (*p.shape)}``, logged as log10 of the positive values; may be empty.
    """
    for name, mask in frozen.items():
        yield f"gcfreeze/frozen/{name}", mask.float()
        if name in variance:
            values = variance[name]
            if (positive := values[values > 0]).numel():
                yield f"gcfreeze/log10_variance/{name}", positive.log10()


def log(
    loggers: Iterable[Any], step: int, metrics: dict[str, float], values: Iterable[tuple[str, Tensor]] = ()
) -> None:
    """Write numbers to all loggers, and histograms to those that have them, as TensorBoard's does.

    Args:
        loggers: Lightning's loggers.
        step: the step on the loggers' axis.
        metrics: numbers by tag, see `scalars`.
        values: tags and values of histograms, see `histograms`.
    """
    loggers = list(loggers)
    for logger in loggers:
        logger.log_metrics(metrics, step=step)
    found = (getattr(getattr(logger, "experiment", None), "add_histogram", None) for logger in loggers)
    if writers := [add_histogram for add_histogram in found if add_histogram is not None]:
        for tag, tensor in values:
            for add_histogram in writers:
                add_histogram(tag, tensor, step)

"""Masks and variances -> {tag: number or tensor}. Pure; handing them to loggers is the callback's business."""

from collections.abc import Mapping

from torch import Tensor

from lightning_gcfreeze._types import Named


def scalars(of_each: Mapping[str, float], fraction: float, observed: int) -> dict[str, float]:
    """The fractions of frozen elements, by parameter and in all, and the number of observed steps."""
    by_parameter = {f"gcfreeze/frozen_fraction/{name}": value for name, value in of_each.items()}
    return {"gcfreeze/frozen_fraction": fraction, "gcfreeze/observed_steps": float(observed), **by_parameter}


def histograms(frozen: Named, variance: Named) -> dict[str, Tensor]:
    """log10 of the variance, where there is one that is not 0, and the mask as 0 and 1, of each parameter."""
    values = {}
    for name, mask in frozen.items():
        values[f"gcfreeze/frozen/{name}"] = mask.float()
        if name in variance and (positive := variance[name][variance[name] > 0]).numel():
            values[f"gcfreeze/log10_variance/{name}"] = positive.log10()
    return values

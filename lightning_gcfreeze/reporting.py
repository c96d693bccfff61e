"""Masks and variances -> {tag: number or tensor}. Pure; handing them to loggers is the callback's business."""

from collections.abc import Iterable

from torch import Tensor

from lightning_gcfreeze._types import Named


def scalars(names: Iterable[str], frozen: Named, fraction: float, observed: int) -> dict[str, float]:
    """The fractions of frozen elements, in all and of each parameter in `names`, and the number of observed steps."""
    of_each = {
        f"gcfreeze/frozen_fraction/{name}": float(frozen[name].sum()) / max(frozen[name].numel(), 1) if frozen else 0.0
        for name in names
    }
    return {"gcfreeze/frozen_fraction": fraction, "gcfreeze/observed_steps": float(observed), **of_each}


def histograms(frozen: Named, variance: Named) -> dict[str, Tensor]:
    """log10 of the variance, where it is not 0, and the mask as 0 and 1, of each parameter."""
    values = {}
    for name, mask in frozen.items():
        values[f"gcfreeze/frozen/{name}"] = mask.float()
        if (positive := variance[name][variance[name] > 0]).numel():
            values[f"gcfreeze/log10_variance/{name}"] = positive.log10()
    return values

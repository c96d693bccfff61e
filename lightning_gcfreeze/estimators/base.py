"""What every estimator has in common: tensors in, tensors out, no module, optimizer, process or Lightning in sight."""

from typing import Protocol

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named


class Estimator(Protocol):
    """A running statistic of the pairs (g_1, g_S), one pair an observed step."""

    tensors: dict[str, Tensor]
    """The state, all of it: it is averaged over ranks, moved between devices and saved as it stands."""

    def update(self, g_one: Named, g_batch: Named, gain: float, correction: float = 1.0) -> None:
        """Fold one pair of gradients into the statistic, in place.

        Args:
            g_one: g_1, the gradient on one sample. ``{name: (*p.shape)}``, any float dtype. Not modified.
            g_batch: g_S of the *mean* loss over the batch, as in ``p.grad``. Not modified.
            gain: κ_t in (0, 1]. The statistic starts at 0, so with κ_1 < 1 it stays pulled towards 0, by the same
                factor for every element: the order does not notice.
            correction: factor on the squared noise; see `finite_batch_correction`.
        """


def zeros(parameters: Named) -> dict[str, Tensor]:
    """One zero per element, in float32 or the parameter's dtype if that is wider."""
    return {name: torch.zeros_like(p, dtype=accumulator_dtype(p)) for name, p in parameters.items()}


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or the tensor's own dtype where that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def noise(g_one: Tensor, g_batch: Tensor, dtype: torch.dtype) -> Tensor:
    """g_1 - g_S as a new tensor. Subtracted before anything is squared, so a large mean cannot cancel it away."""
    return g_one.to(dtype) - g_batch.to(dtype)


def finite_batch_correction(batch_size: int | None, reference: int | None) -> float:
    """Factor that puts the squared noise of a batch on the scale of batches of `reference` samples.

    g_1 is drawn from the batch itself, so E[(g_1 - g_S)(g_1 - g_S)ᵀ] = (1 - 1/S) Σ. With S fixed this is one common
    factor, which the recursion (2.6) carries along untouched (the correction is exactly 1); a batch of another size,
    like the short last one of an epoch, is rescaled to the common factor. None: the size is unknown, nothing is done.
    """
    if batch_size is None or reference is None or batch_size == reference:
        return 1.0
    return (1.0 - 1.0 / reference) / (1.0 - 1.0 / batch_size)

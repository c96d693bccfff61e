"""What all estimators share: the contract, and the arithmetic of the recursion.

Tensors in, tensors out: modules, optimizers, processes and Lightning are unknown here.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators.per_sample import SquaredNoise
from lightning_gcfreeze.estimators.scratch import wide


class Step(NamedTuple):
    """What one observed step adds to a statistic."""

    samples: Mapping[str, SquaredNoise]
    """g_1 … g_m by name; their noise enters by its mean over the m samples. Not modified."""
    g_batch: Named
    """g_S of the *mean* loss over the batch, as in ``p.grad``. ``{name: (*p.shape)}``, any float dtype."""
    weight: float
    """w_t, the factor in front of the term."""
    gain: float
    """κ_t."""
    t: int
    """1-based index of the observed step."""
    correction: float = 1.0
    """Factor on the squared noise; see `finite_batch_correction`."""
    mean_is_g_batch: Collection[str] = ()
    """Names for which g_S is known to be the mean of the samples' gradients."""
    valid: Tensor | None = None
    """0-dim bool tensor: whether to add the term, where only the device knows. None: True."""


class Estimator(Protocol):
    """A sum over the observed steps, Σ_t w_t x_t. The recursion's X_t is s_t times the sum; see `decayed_`."""

    tensors: dict[str, Tensor]
    """The whole state. It is averaged over processes, moved between devices and saved as it stands."""

    def add(self, step: Step) -> None:
        """Add the term of one step, in place."""


def decayed_(tensors: Iterable[Tensor], scale: float, gain: float, valid: Tensor | None = None) -> tuple[float, float]:
    """Begin a step of X_t = (1 - κ_t) X_{t-1} + κ_t x_t, where X_t is s_t times a sum with the weights w_t = κ_t / s_t.

    The decay is one number, s_t = (1 - κ_t) s_{t-1}, so a step only adds to the sum. With κ_t = 1/t, s_t is 1/t
    and all weights are 1. If s_t becomes too small to divide by, the sum is multiplied by it, in place.

    Args:
        tensors: the sum.
        scale: s_{t-1}; 1 before the first step.
        gain: κ_t in (0, 1].
        valid: 0-dim bool tensor: whether this step takes place, where only the device knows. None: True.

    Returns:
        s_t, and its value in case that `valid` turns out to be False.
    """
    after = scale * (1.0 - gain)
    if after > 2.0**-20:
        return after, scale
    for tensor in tensors:
        if valid is None:
            tensor.mul_(after)
        else:
            tensor.mul_(torch.where(valid, tensor.new_full((), after), tensor.new_full((), scale)))
    return 1.0, 1.0


def zeros(parameters: Named) -> dict[str, Tensor]:
    """Return zeros like the parameters, contiguous, in float32 or the parameter's dtype if that is wider."""
    return {name: torch.zeros(p.shape, dtype=wide(p.dtype), device=p.device) for name, p in parameters.items()}


def finite_batch_correction(batch_size: int | None, reference: int | None) -> float:
    """Return the factor that puts the squared noise of a batch on the scale of batches of `reference` samples.

    g_1 is drawn from the batch itself, so E[(g_1 - g_S)(g_1 - g_S)ᵀ] = (1 - 1/S) Σ. While S is fixed this is one common
    factor, which the recursion (2.6) leaves alone: the correction is exactly 1. A batch of another size, such as the
    short last one of an epoch, is rescaled to the common factor. If either size is None, unknown, the factor is 1.
    """
    if batch_size is None or reference is None or batch_size == reference:
        return 1.0
    return (1.0 - 1.0 / reference) / (1.0 - 1.0 / batch_size)

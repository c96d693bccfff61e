"""What every estimator has in common: tensors in, tensors out, no module, optimizer, process or Lightning in sight."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators.per_sample import PerSample, wide


class Step(NamedTuple):
    """What one observed step adds to a statistic."""

    samples: Mapping[str, PerSample]
    """g_1 … g_m by name; their noise enters by its mean over the m. Not modified."""
    g_batch: Named
    """g_S of the *mean* loss over the batch, as in ``p.grad``. ``{name: (*p.shape)}``, any float dtype."""
    weight: float
    """w_t, in front of the term."""
    gain: float
    """κ_t."""
    t: int
    """Of the observed steps, which it is, from 1."""
    correction: float = 1.0
    """Factor on the squared noise; see `finite_batch_correction`."""
    centred: Collection[str] = ()
    """Names for which g_S is known to be the mean of the samples' gradients."""
    gate: Tensor | None = None
    """0-dim bool: whether to add, where only the device knows. None: yes."""


class Estimator(Protocol):
    """A sum over the observed steps, Σ_t w_t x_t; the recursion's X_t is s_t times that, see `decayed_`."""

    tensors: dict[str, Tensor]
    """The state, all of it: it is averaged over world, moved between devices and saved as it stands."""

    def add(self, step: Step) -> None:
        """Add the term of one step, in place."""


def decayed_(tensors: Iterable[Tensor], scale: float, gain: float, gate: Tensor | None = None) -> tuple[float, float]:
    """Begin a step of X_t = (1 - κ_t) X_{t-1} + κ_t x_t, where X_t is a scale s_t times a sum: w_t = κ_t / s_t.

    The decay is one number, s_t = (1 - κ_t) s_{t-1}, so that a step only adds to the sum. With κ_t = 1/t, s_t is 1/t
    and all weights are 1. Where s_t becomes too small to divide by, the sum takes it over, in place.

    Args:
        tensors: the sum.
        scale: s_{t-1}; 1 at the beginning.
        gain: κ_t in (0, 1].
        gate: 0-dim bool: whether this step takes place, where only the device knows.

    Returns:
        s_t, and what it is if the gate turns out to have been False.
    """
    after = scale * (1.0 - gain)
    if after > 2.0**-20:
        return after, scale
    for tensor in tensors:
        if gate is None:
            tensor.mul_(after)
        else:
            tensor.mul_(torch.where(gate, tensor.new_full((), after), tensor.new_full((), scale)))
    return 1.0, 1.0


def zeros(parameters: Named) -> dict[str, Tensor]:
    """One zero per element, row by row, in float32 or the parameter's dtype if that is wider."""
    return {name: torch.zeros(p.shape, dtype=wide(p.dtype), device=p.device) for name, p in parameters.items()}


def finite_batch_correction(batch_size: int | None, reference: int | None) -> float:
    """Factor that puts the squared noise of a batch on the scale of batches of `reference` samples.

    g_1 is drawn from the batch itself, so E[(g_1 - g_S)(g_1 - g_S)ᵀ] = (1 - 1/S) Σ. With S fixed this is one common
    factor, which the recursion (2.6) carries along untouched (the correction is exactly 1); a batch of another size,
    like the short last one of an epoch, is rescaled to the common factor. None: the size is unknown, nothing is done.
    """
    if batch_size is None or reference is None or batch_size == reference:
        return 1.0
    return (1.0 - 1.0 / reference) / (1.0 - 1.0 / batch_size)

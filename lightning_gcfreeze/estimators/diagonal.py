"""Running variance of the gradient noise, element by element: the diagonal of C_t.

    v_t = (1 - κ_t) v_{t-1} + κ_t (g_1 - g_S)²

Source: the paper, Eq. (2.6), its diagonal. Units: a squared gradient. Memory: one float per eligible parameter.
"""

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators import base


class DiagonalCovariance:
    """The variance of every element's gradient noise; see `Estimator` for the contract."""

    def __init__(self, parameters: Named) -> None:
        self.tensors = base.zeros(parameters)

    def update(self, g_one: Named, g_batch: Named, gain: float, correction: float = 1.0) -> None:
        variances = list(self.tensors.values())
        noises = torch._foreach_sub(
            *([g[name].to(v.dtype) for name, v in self.tensors.items()] for g in (g_one, g_batch))
        )
        torch._foreach_mul_(variances, 1.0 - gain)
        torch._foreach_addcmul_(variances, noises, noises, value=gain * correction)

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t, ``{name: (*p.shape)}``: the estimator's own tensors."""
        return self.tensors

    @property
    def matrix(self) -> None:
        """There is none."""
        return None

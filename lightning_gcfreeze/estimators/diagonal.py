"""Running variance of the gradient noise, element by element: the diagonal of C_t.

    v_t = (1 - κ_t) v_{t-1} + κ_t (g_1 - g_S)²

Source: the paper, Eq. (2.6), its diagonal. Units: a squared gradient. Memory: one float per eligible parameter.
"""

from torch import Tensor

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators import base


class DiagonalCovariance:
    """The variance of every element's gradient noise; see `Estimator` for the contract."""

    def __init__(self, parameters: Named) -> None:
        self.tensors = base.zeros(parameters)

    def update(self, g_one: Named, g_batch: Named, gain: float, correction: float = 1.0) -> None:
        for name, v in self.tensors.items():
            noise = base.noise(g_one[name], g_batch[name], v.dtype)
            v.lerp_(noise.square_().mul_(correction), gain)

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t, ``{name: (*p.shape)}``: the estimator's own tensors."""
        return self.tensors

    @property
    def matrix(self) -> None:
        """There is none."""
        return None

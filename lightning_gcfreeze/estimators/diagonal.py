"""Running variance of the gradient noise, element by element: the diagonal of C_t.

    v_t = (1 - κ_t) v_{t-1} + κ_t/m Σ_j (g_j - g_S)²

Source: the paper, Eq. (2.6), its diagonal, with m = 1. Units: a squared gradient. Memory: one float per eligible
element.
"""

from torch import Tensor

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators import base


class DiagonalCovariance:
    """The variance of the gradient noise of each element; see `Estimator` for the contract.

    Args:
        parameters: the eligible parameters, by name.
    """

    def __init__(self, parameters: Named) -> None:
        self.tensors = base.zeros(parameters)

    def add(self, step: base.Step) -> None:
        for name, v in self.tensors.items():
            g = step.samples[name]
            weight = step.weight * step.correction / g.count
            g.add_squared_noise_(v, step.g_batch[name], weight, name in step.mean_is_g_batch, step.valid)

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t / s_t, ``{name: (*p.shape)}``: the estimator's own tensors."""
        return self.tensors

    @property
    def matrix(self) -> None:
        """None: the full matrix is not kept."""
        return None

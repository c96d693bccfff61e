"""Running moments of the batch gradient g_S, for the orders that the variance is compared with.

    m_t = (1 - κ_t) m_{t-1} + κ_t g_S          s_t = (1 - κ_t) s_{t-1} + κ_t g_S²

They are Adam's two moments with the recursion's gain in place of its betas. Unlike the noise they contain the mean
gradient: E[g_S²] = (E g)² + Σ_ii / S.
"""

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators import base
from lightning_gcfreeze.per_sample import gated


class BatchMean:
    """m_t, the running mean of g_S; see `Estimator` for the contract."""

    def __init__(self, parameters: Named) -> None:
        self.tensors = base.zeros(parameters)

    def add(self, step: base.Step) -> None:
        for name, m in self.tensors.items():
            m.add_(gated(step.g_batch[name].to(m.dtype), step.gate), alpha=step.weight)


class BatchSecondMoment:
    """s_t, the running mean of g_S²; see `Estimator` for the contract."""

    def __init__(self, parameters: Named) -> None:
        self.tensors = base.zeros(parameters)

    def add(self, step: base.Step) -> None:
        for name, s in self.tensors.items():
            g = gated(step.g_batch[name].to(s.dtype), step.gate)
            s.addcmul_(g, g, value=step.weight)

"""Running moments of the batch gradient g_S, for the orderings that the variance is compared with.

    m_t = (1 - κ_t) m_{t-1} + κ_t g_S          s_t = (1 - κ_t) s_{t-1} + κ_t g_S²

These are Adam's two moments, with the gain of the recursion in place of the betas. Unlike the noise they contain the
mean gradient: E[g_S²] = (E g)² + Σ_ii / S.
"""

import torch

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators import base, gains
from lightning_gcfreeze.estimators.scratch import gated


class BatchMean:
    """m_t, the running mean of g_S; see `Estimator` for the contract."""

    def __init__(self, parameters: Named) -> None:
        self.tensors = base.zeros(parameters)

    def add(self, step: base.Step) -> None:
        for name, m in self.tensors.items():
            m.add_(gated(step.g_batch[name].to(m.dtype), step.valid), alpha=step.weight)


class BatchSecondMoment:
    """s_t, the running mean of g_S²; see `Estimator` for the contract."""

    def __init__(self, parameters: Named) -> None:
        self.tensors = base.zeros(parameters)

    def add(self, step: base.Step) -> None:
        for name, s in self.tensors.items():
            g = gated(step.g_batch[name].to(s.dtype), step.valid)
            s.addcmul_(g, g, value=step.weight)


class RecentBatchMean:
    """r_t = (1 - λ_t) r_{t-1} + λ_t g_S, λ_t = max(κ_t, 5 / (t + 4)): a mean of g_S, recent steps weighted most.

    With κ_t = 1/t the weight of step i grows as i⁴: the last eighth of the steps makes half of the mean. Since all sums
    are decayed by κ_t, this one is multiplied by the quotient of the two decays. See `Estimator` for the contract.
    """

    def __init__(self, parameters: Named) -> None:
        self.tensors = base.zeros(parameters)

    def add(self, step: base.Step) -> None:
        gain = gains.recent(step.gain, step.t)
        quotient = (1 - gain) / (1 - step.gain) if step.gain < 1 else 0.0
        for name, r in self.tensors.items():
            if step.valid is None:
                r.mul_(quotient)
            else:
                r.mul_(torch.where(step.valid, r.new_full((), quotient), r.new_ones(())))
            r.add_(gated(step.g_batch[name].to(r.dtype), step.valid), alpha=step.weight * gain / step.gain)

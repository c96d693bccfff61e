"""t0 from the data: look back now and then, and freeze as soon as the order has settled and the loss has come down.

Between two looks the statistics grow by a constant factor, so there are few of them however long a run is. Each asks
two questions.

*Has the order settled?* The would-be frozen sets of two successive looks are compared by their Jaccard overlap
|A ∩ B| / |A ∪ B|. Both rest on largely the same steps, so even an order that is nothing but sampling noise keeps much
of its set. How much, follows from the gain: two running means of n and N steps of pure noise have the correlation
ρ = √(n/N), and two normal scores of that correlation are both among the lowest fraction f with the probability

    P = f² + (1/2π) ∫_0^{arcsin ρ} exp(-z²/(1 + sin θ)) dθ,     Φ(z) = f,

which makes an overlap of P / (2f - P). Only what lies above that speaks for an order.

*Has the loss come down?* Its mean over the steps since the last look is compared with the mean before: it has, when the
relative improvement, with one standard error of the difference on top, is small.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lightning_gcfreeze import _checks
from lightning_gcfreeze.estimators import gains
from lightning_gcfreeze.planning.losses import LossMean

SAMPLE = 2**14
"""So many elements, evenly spaced, stand for all: their overlap is that of all to about 0.003."""
_INTERVALS = 200  # of Simpson's rule, which is then exact to 1e-9


@dataclass(frozen=True)
class Settled:
    """What ``t0="auto"`` means, with other numbers: ``t0=Settled(improvement=0.01)``.

    Args:
        max_t0: freeze after this optimizer step at the latest; None: after half of those that the Trainer plans.
        first: the optimizer step of the first look, with which the next one is compared.
        growth: each look comes after so many times as many steps as the one before it.
        overlap: how far the overlap of successive would-be frozen sets must lie above that of pure sampling noise, from
            0, no further, to 1, equal sets.
        improvement: by how much of itself the mean loss may still fall from look to look, its noise included.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its range.
    """

    max_t0: int | None = None
    first: int = 64
    growth: float = 1.5
    overlap: float = 0.25
    improvement: float = 0.1

    def __post_init__(self) -> None:
        if self.max_t0 is not None:
            _checks.integer("max_t0", self.max_t0, at_least=1)
        _checks.integer("first", self.first, at_least=1)
        _checks.number("growth", self.growth, above=1.0)
        _checks.number("overlap", self.overlap, at_least=0.0, below=1.0)
        _checks.number("improvement", self.improvement, above=0.0)


@dataclass(frozen=True)
class Look:
    """What a look back has found."""

    overlap: float
    """Of the would-be frozen sets of this look and the one before; NaN at the first."""
    overlap_of_noise: float
    """What sampling noise alone would give."""
    improvement: float
    """Of the mean loss, relative to itself; NaN at the first."""
    improvement_noise: float
    """Its standard error."""
    order_has_settled: bool
    loss_has_settled: bool

    @property
    def settled(self) -> bool:
        """Whether it is time to freeze."""
        return self.order_has_settled and self.loss_has_settled

    def sentence(self) -> str:
        """What was found, for the log."""
        return (
            f"would-be frozen sets overlap by {self.overlap:.2f} (noise alone: {self.overlap_of_noise:.2f}), and the"
            f" loss fell by {self.improvement:.1%} (± {self.improvement_noise:.1%})"
        )


class SettlingState:
    """Watches a run until it has settled.

    Args:
        settled: when that is.
        max_t0: the last look.
        gain: of the recursion.
    """

    def __init__(self, settled: Settled, max_t0: int, gain: gains.Gain) -> None:
        self.settled, self.max_t0, self._gain = settled, max_t0, gain
        self.next_look = min(settled.first, max_t0)
        self._observed, self._power = 0, 0.0
        self._chosen: Tensor | None = None
        self._loss = LossMean()

    def look(self, scores: Tensor, moved: Tensor, observed: int, fraction: float, loss: LossMean) -> Look:
        """Look back from the step `next_look`.

        Args:
            scores: of some elements, (n,), the same ones each time.
            moved: bool (n,): whether the element has ever had a gradient. The others, which are frozen first in any
                case, say nothing.
            observed: steps that the scores rest on.
            fraction: of the elements, how many would be frozen.
            loss: over the steps since the last look.
        """
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[scores.cpu().argsort(stable=True)[: round(fraction * len(scores))]] = True
        moved = moved.cpu()
        kept, power = gains.decayed(self._gain, self._power, self._observed, observed)
        overlap = noise = math.nan
        if self._chosen is not None and observed > self._observed > 0:
            overlap = _jaccard(self._chosen & moved, chosen & moved)
            share = float((chosen & moved).sum()) / max(1, int(moved.sum()))
            noise = overlap_of_noise(kept * math.sqrt(self._power / power), share)
        improvement, improvement_noise = self._loss.above(loss)
        settled = self.settled
        self.skip()
        self._chosen, self._observed, self._power, self._loss = chosen, observed, power, loss
        return Look(
            overlap,
            noise,
            improvement,
            improvement_noise,
            order_has_settled=overlap >= noise + settled.overlap * (1 - noise),
            loss_has_settled=improvement + improvement_noise <= settled.improvement,
        )

    def skip(self) -> None:
        """Leave this look out, or be done with it: `next_look` is the one after it."""
        step = self.next_look
        self.next_look = min(max(step + 1, math.ceil(step * self.settled.growth)), max(step + 1, self.max_t0))

    def state_dict(self) -> dict[str, Any]:
        """A tensor and numbers."""
        return {
            "max_t0": self.max_t0,
            "next_look": self.next_look,
            "observed": self._observed,
            "power": self._power,
            "chosen": self._chosen,
            "loss": list(self._loss),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.max_t0, self.next_look, self._observed = state["max_t0"], state["next_look"], state["observed"]
        self._chosen, self._power, self._loss = state["chosen"], state["power"], LossMean(*state["loss"])


def overlap_of_noise(correlation: float, fraction: float) -> float:
    """The Jaccard overlap of the lowest fraction by two normal scores of that correlation; see the module."""
    if not 0.0 < fraction < 1.0:
        return 1.0
    z, end = NormalDist().inv_cdf(fraction), math.asin(min(1.0, correlation))
    width = end / _INTERVALS
    integral = 0.0
    for i in range(_INTERVALS + 1):
        weight = 1 if i in (0, _INTERVALS) else 4 if i % 2 else 2
        integral += weight * math.exp(-(z**2) / (1 + math.sin(i * width)))
    both = fraction**2 + integral * width / 3 / (2 * math.pi)
    return both / (2 * fraction - both)


def _jaccard(a: Tensor, b: Tensor) -> float:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0

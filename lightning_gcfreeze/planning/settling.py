"""t0 from the data: check at geometrically spaced steps, and freeze once the order has settled and the loss came down.

From one check to the next the number of observed steps grows by a constant factor, so there are few checks however
long a run is. Each check asks two questions.

*Has the order settled?* The would-be frozen sets of two successive checks are compared by their Jaccard overlap
|A ∩ B| / |A ∪ B|. Both sets rest on largely the same steps, so even an order that is only sampling noise keeps much of
its set. How much follows from the gain: two running means over n and N steps of pure noise have the correlation
ρ = √(n/N), and two normal scores of that correlation are both among the lowest fraction f with the probability

    P = f² + (1/2π) ∫_0^{arcsin ρ} exp(-z²/(1 + sin θ)) dθ,     Φ(z) = f,

which gives an overlap of P / (2f - P). Only an overlap above that is evidence of an order.

*Has the loss come down?* Its mean over the steps since the last check is compared with the mean before that. The loss
has come down if the relative improvement, plus one standard error of the difference, is small.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lightning_gcfreeze import _checks
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import UNSHARDED, Shards
from lightning_gcfreeze.estimators import gains
from lightning_gcfreeze.planning.losses import LossMean

SAMPLE_SIZE = 2**14
"""Elements, evenly spaced, whose overlap stands for that of all elements, to about 0.003."""
_INTERVALS = 200  # of Simpson's rule, which is then exact to 1e-9


@dataclass(frozen=True)
class Settled:
    """Freeze once the order has settled and the loss has come down: ``t0=Settled(improvement=0.01)``.

    ``t0="auto"`` is ``t0=Settled()``.

    Args:
        max_t0: freeze after this optimizer step at the latest; None: after half of the steps that the Trainer plans.
        first: optimizer step of the first check, with which the second one is compared.
        growth: ratio of the steps of successive checks, above 1.
        overlap: how far the overlap of successive would-be frozen sets must lie above that of sampling noise, in
            [0, 1). 0: at the noise level; 1: identical sets.
        improvement: the largest relative improvement of the mean loss from check to check, its standard error included,
            at which the loss counts as settled.

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
class Check:
    """Result of one check."""

    overlap: float
    """Jaccard overlap of the would-be frozen sets of this check and the one before; NaN at the first check."""
    overlap_of_noise: float
    """The overlap that sampling noise alone would give; NaN at the first check."""
    improvement: float
    """Decrease of the mean loss, relative to its value now; NaN at the first check."""
    improvement_noise: float
    """Standard error of `improvement`."""
    order_has_settled: bool
    loss_has_settled: bool

    @property
    def settled(self) -> bool:
        """Whether both the order and the loss have settled."""
        return self.order_has_settled and self.loss_has_settled

    def sentence(self) -> str:
        """Return the result in words, for the log, without a full stop."""
        return (
            f"the would-be frozen sets overlap by {self.overlap:.2f} (sampling noise alone:"
            f" {self.overlap_of_noise:.2f}), and the loss fell by {self.improvement:.1%} (±"
            f" {self.improvement_noise:.1%})"
        )


class SettlingState:
    """Check whether a run has settled, again and again.

    Args:
        settled: the criteria.
        max_t0: the step of the last check.
        gain: of the recursion that the scores are computed by.
    """

    def __init__(self, settled: Settled, max_t0: int, gain: gains.Gain) -> None:
        self.settled, self.max_t0, self._gain = settled, max_t0, gain
        self.next_check = min(settled.first, max_t0)  # optimizer step
        # Of the last check: observed steps, Σ weight² of their terms, the would-be frozen set, and the mean loss.
        self._observed, self._power = 0, 0.0
        self._chosen: Tensor | None = None
        self._loss = LossMean()

    @property
    def halfway(self) -> int:
        """The optimizer step two thirds of the way to the next check, or the last check's, if that comes later.

        At the default growth both are the same. Where `max_t0` cuts the distance of two checks short, the step has
        passed, and what is counted goes on from where it began.
        """
        return min(self.next_check - 1, int(self.next_check / min(1.5, self.settled.growth) + 1e-9))  # may round down

    def check(self, scores: Tensor, moved: Tensor, observed: int, fraction: float, loss: LossMean) -> Check:
        """Check whether the run has settled, at the step `next_check`, and set `next_check` to the one after it.

        Args:
            scores: of sampled elements, ``(n,)``, the same elements at each check (see `sampled`).
            moved: bool ``(n,)``, whether the element ever had a gradient. The others, which freeze first in any case,
                are left out of the comparison.
            observed: number of observed steps that the scores rest on.
            fraction: of all elements, that would be frozen.
            loss: the mean over the steps since the last check.
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
        improvement, improvement_noise = self._loss.increase_over(loss)
        self.skip()
        self._chosen, self._observed, self._power, self._loss = chosen, observed, power, loss
        return Check(
            overlap,
            noise,
            improvement,
            improvement_noise,
            order_has_settled=overlap >= noise + self.settled.overlap * (1 - noise),
            loss_has_settled=improvement + improvement_noise <= self.settled.improvement,
        )

    def skip(self) -> None:
        """Set `next_check` to the check after it."""
        step = self.next_check
        self.next_check = min(max(step + 1, math.ceil(step * self.settled.growth)), max(step + 1, self.max_t0))

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on.

        Returns:
            "max_t0", "next_look" (the step of the next check) and "observed": int; "power": float; "chosen": bool
            ``(n,)`` on the CPU, or None before the first check; "loss": [value, error, n].
        """
        return {
            "max_t0": self.max_t0,
            "next_look": self.next_check,
            "observed": self._observed,
            "power": self._power,
            "chosen": self._chosen,
            "loss": list(self._loss),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.max_t0, self.next_check, self._observed = state["max_t0"], state["next_look"], state["observed"]
        self._chosen, self._power, self._loss = state["chosen"], state["power"], LossMean(*state["loss"])


def sampled(named: Named, n: int, shards: Shards = UNSHARDED) -> Tensor:
    """Return at most n elements, evenly spaced over all whole tensors, the same ones on all processes at each call.

    Where several processes hold an element, its value is the mean over them.

    Args:
        named: ``{name: tensor}``; for sharded parameters the local elements.
        n: the largest number of elements to return.
        shards: the layout of the parameters.

    Returns:
        float64, ``(min(n, number of elements),)``, on the CPU.
    """
    sizes = [shards.shape(name, tensor).numel() for name, tensor in named.items()]
    total = sum(sizes)
    n = min(total, n)
    positions = torch.arange(n) * total // max(n, 1)  # in the concatenation of the whole tensors
    sums_and_counts = torch.zeros(2, n, dtype=torch.float64)
    start = 0
    for (name, tensor), size in zip(named.items(), sizes, strict=True):
        slots = ((positions >= start) & (positions < start + size)).nonzero().squeeze(1)  # in the result
        index, start = positions[slots] - start, start + size
        if shards.is_sharded:
            is_local, index = _local_index(name, tensor, index, shards)
            slots = slots[is_local]
        sums_and_counts[0, slots] = tensor.flatten()[index.to(tensor.device)].to("cpu", torch.float64)
        sums_and_counts[1, slots] = 1.0
    sums_and_counts = shards.world.all_reduce_sum(sums_and_counts)
    return sums_and_counts[0] / sums_and_counts[1]


def _local_index(name: str, tensor: Tensor, index: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """Return which flat indices into a whole parameter are local, and these as indices into the local elements."""
    local_to_whole = shards.flat_index(name, torch.arange(tensor.numel(), device=tensor.device), tensor).cpu()
    if not len(local_to_whole):
        return torch.zeros_like(index, dtype=torch.bool), index[:0]
    ascending, order = local_to_whole.sort()
    at = torch.searchsorted(ascending, index).clamp(max=len(ascending) - 1)
    is_local = ascending[at] == index
    return is_local, order[at[is_local]]


def overlap_of_noise(correlation: float, fraction: float) -> float:
    """Compute the Jaccard overlap of the lowest fraction by two normal scores of a correlation; see the module."""
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
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0

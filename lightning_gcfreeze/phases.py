"""The two phases of a run: `Observing` gathers statistics and ends in a decision, `Frozen` is that decision.

Tensors and numbers only: a phase is saved, loaded and copied without a module or a Trainer.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gcfreeze import gains, orderings, selection
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators import BatchMean, BatchSecondMoment, DiagonalCovariance, Estimator, FullCovariance
from lightning_gcfreeze.estimators.base import accumulator_dtype, finite_batch_correction


class Observing:
    """The warm-up: C_t, and what the order needs beside it.

    Args:
        parameters: the eligible parameters; none before a run has begun.
        full: keep the whole covariance matrix, not its diagonal alone.
        needs: the optional fields of `orderings.Evidence` that are to be gathered.
    """

    name = "observing"

    def __init__(self, parameters: Named, full: bool = False, needs: frozenset[str] = frozenset()) -> None:
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.covariance = FullCovariance(parameters) if full and parameters else DiagonalCovariance(parameters)
        self.moments: dict[str, Estimator] = {}
        if "mean" in needs:
            self.moments["mean"] = BatchMean(parameters)
        if "second_moment" in needs:
            self.moments["second_moment"] = BatchSecondMoment(parameters)
        self.start = {name: p.detach().clone() for name, p in parameters.items()} if "start" in needs else None
        self.observed = 0  # pairs that entered C_t
        self.skipped = 0  # pairs that did not
        self.batch_size: int | None = None  # of the first observed batch; C_t is on its scale
        self.first_gradient: Any = None  # what has been decided on how g_1 is had; numbers and strings

    @property
    def variance(self) -> Named:
        """The diagonal of C_t; empty while nothing has been observed."""
        return self.covariance.variance if self.observed else {}

    def observe(self, g_one: Named, g_batch: Named, gain: gains.Gain, batch_size: int | None = None) -> bool:
        """Take one step of the recursion, Eq. (2.6). A pair that is not finite only counts, as skipped.

        Args:
            g_one: g_1. ``{name: (*p.shape)}``. Not modified.
            g_batch: g_S. ``{name: (*p.shape)}``. Not modified.
            gain: κ.
            batch_size: S, if it is known.

        Returns:
            Whether the pair entered C_t.
        """
        if not _finite(g_one, g_batch):
            self.skipped += 1
            return False
        self.observed += 1
        self.batch_size = self.batch_size or batch_size
        kappa = gains.at(gain, self.observed)
        correction = finite_batch_correction(batch_size, self.batch_size)
        for estimator in (self.covariance, *self.moments.values()):
            estimator.update(g_one, g_batch, kappa, correction)
        return True

    def average(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Replace every statistic by its mean over processes."""
        for estimator in (self.covariance, *self.moments.values()):
            estimator.tensors = {name: mean(tensor) for name, tensor in estimator.tensors.items()}

    def scores(self, ordering: orderings.Ordering, weights: Named, seed: int) -> dict[str, Tensor]:
        """What the ordering makes of the evidence so far, in the order of the parameters, which decides ties.

        Raises:
            ValueError: the ordering did not score every element, or with NaN.
        """
        weights = {name: w.detach().clone() for name, w in weights.items()}  # what they are now may be the score
        moments = {name: estimator.tensors for name, estimator in self.moments.items()}
        evidence = orderings.Evidence(self.covariance.variance, weights, seed, start=self.start, **moments)
        scores = ordering(evidence)
        selection.check_scores(scores, weights)
        return {name: scores[name].detach() for name in weights}

    def freeze(self, ordering: orderings.Ordering, weights: Named, seed: int, k: int) -> "Frozen":
        """Rank the elements and mark the k lowest, Eq. (2.7)."""
        scores = self.scores(ordering, weights, seed)
        return Frozen(
            frozen=selection.lowest(scores, k),
            scores=scores,
            variance=dict(self.covariance.variance),
            matrix=self.covariance.matrix,
            observed=self.observed,
            skipped=self.skipped,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings alone."""
        return {
            "begun": bool(self.shapes),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "full": isinstance(self.covariance, FullCovariance),
            "covariance": self.covariance.tensors,
            "moments": {name: estimator.tensors for name, estimator in self.moments.items()},
            "start": self.start,
            "observed": self.observed,
            "skipped": self.skipped,
            "batch_size": self.batch_size,
            "first_gradient": copy.deepcopy(self.first_gradient),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Observing":
        """The phase that `state_dict` was taken of, its tensors on the device where they are."""
        parameters = {name: torch.empty(shape, device="meta") for name, shape in state["shapes"].items()}
        phase = cls(parameters, full=state["full"], needs=frozenset(state["moments"]))
        phase.covariance.tensors = _cloned(state["covariance"])  # they go on changing in place
        for name, tensors in state["moments"].items():
            phase.moments[name].tensors = _cloned(tensors)
        phase.start = state["start"]
        phase.observed, phase.skipped, phase.batch_size = state["observed"], state["skipped"], state["batch_size"]
        phase.first_gradient = copy.deepcopy(state["first_gradient"])
        return phase

    def to(self, parameters: Named) -> None:
        """Move every tensor to the device of its parameter."""
        default = next(iter(parameters.values()))
        for estimator in (self.covariance, *self.moments.values()):
            estimator.tensors = {n: t.to(parameters.get(n, default).device) for n, t in estimator.tensors.items()}
        if self.start is not None:
            self.start = {name: t.to(parameters[name].device) for name, t in self.start.items()}


def _finite(*gradients: Named) -> bool:
    """Whether all elements are finite, by their sums: one look at the device for all of them."""
    sums = [g.sum(dtype=accumulator_dtype(g)) for named in gradients for g in named.values()]
    return bool(torch.stack(sums).sum().isfinite())


def _cloned(named: Named) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named.items()}


@dataclass
class Frozen:
    """The decision at t0, and what it was based on. All tensors by parameter name, shaped like the parameter."""

    frozen: dict[str, Tensor]
    """bool, True = held constant."""
    scores: dict[str, Tensor]
    """What the order was by; the lowest are frozen."""
    variance: dict[str, Tensor]
    """The diagonal of C_t0."""
    matrix: Tensor | None
    """C_t0, (p, p), if it was kept."""
    observed: int
    skipped: int

    name = "frozen"

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: mask.shape for name, mask in self.frozen.items()}

    @property
    def fraction(self) -> float:
        """Frozen elements / eligible elements."""
        return sum(int(mask.sum()) for mask in self.frozen.values()) / sum(m.numel() for m in self.frozen.values())

    def never_moved(self) -> int:
        """How many elements froze first because they never had a gradient: no noise, and nothing scored lower.

        A dead unit, an embedding row that did not occur or an unused parameter looks like this. It has not converged.
        """
        least = min(score.min() for score in self.scores.values() if score.numel())
        dead = (m & (self.variance[n] == 0) & (self.scores[n] == least) for n, m in self.frozen.items())
        return sum(int(elements.sum()) for elements in dead)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers alone."""
        return {"begun": True} | vars(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Frozen":
        return cls(**{name: value for name, value in state.items() if name != "begun"})

"""The two phases of a run: `Observing` gathers statistics and ends in a decision, `Frozen` is that decision.

Tensors and numbers only: a phase is saved, loaded and copied without a module or a Trainer.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_gcfreeze import orderings, selection
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.distributed import SINGLE_PROCESS, UNSHARDED, Shards, World
from lightning_gcfreeze.estimators import (
    BatchMean,
    BatchSecondMoment,
    DiagonalCovariance,
    Estimator,
    FullCovariance,
    RecentBatchMean,
    gains,
)
from lightning_gcfreeze.estimators.base import Step, decayed_, finite_batch_correction
from lightning_gcfreeze.estimators.per_sample import SquaredNoise
from lightning_gcfreeze.gradients.choice import SourceChoice

_MOMENTS: dict[str, Callable[[Named], Estimator]] = {
    "mean": BatchMean,
    "second_moment": BatchSecondMoment,
    "recent_mean": RecentBatchMean,
}


class Observing:
    """The warm-up: C_t, and what the order needs beside it.

    Args:
        parameters: the eligible parameters, of sharded ones the local parts; none before a run has begun.
        full: keep the whole covariance matrix, not its diagonal alone.
        needs: the optional fields of `orderings.Evidence` that are to be gathered.
        shards: how the parameters lie on processes. All that is kept by element is that of the local parts.
        noise: whether single samples' gradients are taken; without them there is no C_t.
    """

    name = "observing"

    def __init__(
        self,
        parameters: Named,
        full: bool = False,
        needs: frozenset[str] = frozenset(),
        shards: Shards = UNSHARDED,
        noise: bool = True,
    ) -> None:
        self.shards = shards
        self.shapes = {name: shards.shape(name, p) for name, p in parameters.items()}
        self.covariance = (
            FullCovariance(parameters) if full and parameters else DiagonalCovariance(parameters if noise else {})
        )
        self.moments: dict[str, Estimator] = {}
        for field, moment in _MOMENTS.items():
            if field in needs:
                self.moments[field] = moment(parameters)
        self.start = {name: p.detach().clone() for name, p in parameters.items()} if "start" in needs else None
        self._observed = 0  # steps that entered C_t
        self.skipped = 0  # steps that did not
        self.batch_size: int | None = None  # of the first observed batch; C_t is on its scale
        self.decided: Any = None  # on how single samples' gradients are had; numbers and strings
        self._scale = 1.0  # s_t: C_t is this times the estimator's tensors
        self._verdict: Tensor | None = None  # whether the last step's gradients were finite, if only the device knows
        self._scale_without = 1.0  # s_t, if they were not

    @property
    def observed(self) -> int:
        """How many steps entered C_t."""
        self.settle()
        return self._observed

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t; empty while nothing has been observed."""
        self.settle()
        return self._variance() if self._observed else {}

    @property
    def has_noise(self) -> bool:
        """Whether single samples' gradients are taken."""
        return bool(self.covariance.tensors)

    @property
    def reads_gradients(self) -> bool:
        """Whether anything is gathered of gradients."""
        return any(estimator.tensors for estimator in self._estimators)

    def activity(self, weights: Named) -> dict[str, Tensor]:
        """0 where an element never had a gradient, as far as that is known; shaped like the weights."""
        if self.has_noise:
            return self._variance()
        for field in ("second_moment", "mean", "recent_mean"):
            if field in self.moments:
                return {name: tensor.abs() for name, tensor in self._read(self.moments[field].tensors).items()}
        return {name: torch.ones_like(w) for name, w in weights.items()}

    @property
    def matrix(self) -> Tensor | None:
        """C_t, (p, p), if it is kept."""
        self.settle()
        return None if self.covariance.matrix is None else self._scale * self.covariance.matrix

    def observe(
        self,
        samples: Mapping[str, SquaredNoise],
        g_batch: Named,
        gain: gains.Gain,
        batch_size: int | None = None,
        centred: Collection[str] = (),
    ) -> bool:
        """Take one step of the recursion, Eq. (2.6). A step with a gradient that is not finite only counts, as skipped.

        On a GPU, whether it is finite becomes known with the next step: asking at once would make the CPU wait.

        Args:
            samples: g_1 … g_m, by name. Not modified.
            g_batch: g_S. ``{name: (*p.shape)}``. Not modified.
            gain: κ.
            batch_size: S, if it is known.
            centred: names for which g_S is known to be the mean of the samples' gradients.

        Returns:
            False if it is known that the step was skipped.
        """
        self.settle()
        if not self.reads_gradients:
            self._observed += 1
            return True
        total = _total(samples.values(), g_batch.values())
        at_once = _costs_nothing_to_ask(total)
        if at_once and not math.isfinite(total):
            self.skipped += 1
            return False
        self._observed += 1
        kappa = gains.at(gain, self._observed)
        correction = finite_batch_correction(batch_size, self.batch_size or batch_size)
        gate = None if at_once else total.isfinite()
        sums = [tensor for estimator in self._estimators for tensor in estimator.tensors.values()]
        self._scale, self._scale_without = decayed_(sums, self._scale, kappa, gate)
        step = Step(samples, g_batch, kappa / self._scale, kappa, self._observed, correction, centred, gate)
        for estimator in self._estimators:
            estimator.add(step)
        self._verdict = gate
        self.batch_size = self.batch_size or batch_size
        return True

    def settle(self) -> bool:
        """Learn from the device whether the last step entered C_t, and tell."""
        verdict, self._verdict = self._verdict, None
        if verdict is not None and not verdict:
            self._observed -= 1
            self.skipped += 1
            self._scale = self._scale_without
            self.batch_size = self.batch_size if self._observed else None
            return False
        return True

    def share(self, world: World) -> None:
        """Become the same on all processes: every statistic its mean over those that have the element.

        Of their counts of observed steps the least is taken, so that one that has seen nothing is not forgotten.
        """
        self.settle()
        if world.size == 1:
            return
        for estimator in self._estimators:
            estimator.tensors = self._read(estimator.tensors)
            (self.shards if self.shards.is_sharded else Shards(world=world)).mean_over_replicas_(estimator.tensors)
        self._scale = 1.0
        self._observed = int(world.all_reduce_min(torch.tensor(self._observed)))
        self.skipped, self.batch_size = world.broadcast_object((self.skipped, self.batch_size))

    def scores(
        self,
        ordering: orderings.Ordering,
        weights: Named,
        seed: int,
        granularity: Granularity = "element",
        world: World = SINGLE_PROCESS,
    ) -> dict[str, Tensor]:
        """What the ordering makes of the evidence so far, in the order of the parameters, which decides ties.

        Elements that freeze together have the same score: the mean of what the ordering gave them.

        Raises:
            ValueError: the ordering did not score every element, or with NaN.
        """
        return self._scores(ordering, self._evidence(weights, seed, granularity), world)

    def freeze(
        self,
        ordering: orderings.Ordering,
        weights: Named,
        seed: int,
        k: int,
        granularity: Granularity = "element",
        positions: Mapping[str, int] | None = None,
        world: World = SINGLE_PROCESS,
        keep: Named | None = None,
    ) -> "Frozen":
        """Rank the elements and mark the k lowest, Eq. (2.7); the same on all processes, which is checked.

        Args:
            keep: ``{name: bool (*p.shape)}``, elements that are frozen in any case, before all others.

        Raises:
            ValueError: the ordering did not score every element, or with NaN.
            RuntimeError: processes would freeze different elements.
        """
        evidence, active = self._evidence(weights, seed, granularity), self.activity(weights)
        scores = self._scores(ordering, evidence, world)
        given = scores
        if keep is not None:
            scores = {name: score.double().masked_fill(keep[name], -math.inf) for name, score in scores.items()}
        among = self.shards.element_world
        frozen = selection.lowest_k(scores, k, granularity, self.shards)
        (self.shards if self.shards.is_sharded else Shards(world=world)).check_agreement(frozen)
        apart = any(v.numel() and v.data_ptr() != scores[name].data_ptr() for name, v in evidence.variance.items())
        by_variance = self.has_noise and not among.any(apart)
        return Frozen(
            frozen=frozen,
            scores=scores,
            variance=scores if by_variance else dict(evidence.variance),
            by_variance=by_variance,
            matrix=self.matrix,
            observed=self.observed,
            skipped=self.skipped,
            positions=dict(positions or {}),
            counts=self.shards.n_marked(frozen),
            never_moved=sum(self.shards.n_marked(_never_moved(frozen, given, active, among)).values()),
            shapes=self.shapes,
            shards=self.shards,
        )

    def _evidence(self, weights: Named, seed: int, granularity: Granularity) -> orderings.Evidence:
        self.settle()
        now = {name: w.detach().clone() for name, w in weights.items()}  # they may be the score, and will move
        moments = {name: self._read(estimator.tensors) for name, estimator in self.moments.items()}
        return orderings.Evidence(
            self._variance(), now, seed, start=self.start, granularity=granularity, shards=self.shards, **moments
        )

    def _scores(self, ordering: orderings.Ordering, evidence: orderings.Evidence, world: World) -> dict[str, Tensor]:
        failure = None
        try:
            scores = ordering(evidence)
            selection.check_scores(scores, evidence.weights)
        except Exception as error:
            failure = error
        if world.any(failure is not None):  # else the others would wait
            raise failure or RuntimeError("`order` failed on another process; see its error.")
        by_element = {name: scores[name].detach() for name in evidence.weights}
        return selection.pooled(by_element, evidence.granularity, self.shards)

    def state_dict(self, world: World = SINGLE_PROCESS) -> dict[str, Any]:
        """Tensors, numbers and strings alone; tensors are whole, those of sharded parameters on rank 0 only."""
        self.settle()
        return {
            "begun": bool(self.shapes),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "full": isinstance(self.covariance, FullCovariance),
            "covariance": self.shards.whole(self.covariance.tensors),
            "moments": {name: self.shards.whole(estimator.tensors) for name, estimator in self.moments.items()},
            "start": None if self.start is None else self.shards.whole(self.start),
            "scale": self._scale,
            "observed": self._observed,
            "skipped": self.skipped,
            "batch_size": self.batch_size,
            "decided": None if self.decided is None else self.decided.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Observing":
        """The phase that `state_dict` was taken of, its tensors on the device where they are."""
        parameters = {name: torch.empty(shape, device="meta") for name, shape in state["shapes"].items()}
        phase = cls(parameters, full=state["full"], needs=frozenset(state["moments"]))  # not sharded yet: see `to`
        phase.covariance.tensors = _cloned(state["covariance"])  # they go on changing in place
        for name, tensors in state["moments"].items():
            phase.moments[name].tensors = _cloned(tensors)
        phase.start = state["start"]
        phase._observed, phase.skipped, phase.batch_size = state["observed"], state["skipped"], state["batch_size"]
        phase._scale = state["scale"]
        if state["decided"] is not None:
            phase.decided = SourceChoice()
            phase.decided.load_state_dict(state["decided"])
        return phase

    def to(self, parameters: Named, shards: Shards = UNSHARDED) -> None:
        """Of what was loaded keep the local parts, on the devices of the parameters."""
        self.shards = shards
        default = next(iter(parameters.values()))
        for estimator in self._estimators:
            parts = shards.parts(estimator.tensors)
            estimator.tensors = {n: t.to(parameters.get(n, default).device) for n, t in parts.items()}
        if self.start is not None:
            self.start = {name: t.to(parameters[name].device) for name, t in shards.parts(self.start).items()}

    @property
    def _estimators(self) -> tuple[Estimator, ...]:
        return (self.covariance, *self.moments.values())

    def _read(self, sums: Named) -> dict[str, Tensor]:
        """The statistic whose sum this is."""
        return {name: tensor * self._scale for name, tensor in sums.items()}

    def _variance(self) -> dict[str, Tensor]:
        # What rounding leaves of no noise at all may be less than none.
        return {name: v.clamp_(min=0.0) for name, v in self._read(self.covariance.variance).items()}


def _costs_nothing_to_ask(value: Tensor) -> bool:
    """Whether the CPU has the value at hand; it would wait for another device to come that far."""
    return value.device.type == "cpu"


def _total(samples: Iterable[SquaredNoise], batch: Iterable[Tensor]) -> Tensor:
    """A sum that is not finite if an element of a gradient is not; 0-dim."""
    others = (tensor for g in samples if (tensor := g.finiteness_probe()) is not None)
    total, *more = (t.sum() if t.dtype.itemsize >= 4 else t.sum(dtype=torch.float32) for t in (*batch, *others))
    for part in more:
        total = total + part
    return total


def _cloned(named: Named) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named.items()}


@dataclass
class Frozen:
    """The decision at t0, and what it was based on. All tensors by parameter name, shaped like its local part."""

    frozen: dict[str, Tensor]
    """bool, True = held constant."""
    scores: dict[str, Tensor]
    """What the order was by; the lowest are frozen."""
    variance: dict[str, Tensor]
    """The diagonal of C_t0."""
    by_variance: bool
    """Whether these are the scores, in the same memory."""
    matrix: Tensor | None
    """C_t0, (p, p), if it was kept."""
    observed: int
    skipped: int
    positions: dict[str, int]
    """By name of a weight, at how many places of a step's batch it is applied, where that was counted."""
    counts: dict[str, int]
    """By name, how many elements are frozen, on all processes."""
    never_moved: int
    """How many elements froze first because they never had a gradient: no noise, and nothing scored lower. A dead unit,
    an embedding row that did not occur or an unused parameter looks like this. It has not converged."""
    shapes: dict[str, torch.Size]
    """Of the whole parameters."""
    shards: Shards
    """How the parameters lie on the processes."""
    again: Observing | None = None
    """What is observed for a decision to come."""

    name = "frozen"

    @property
    def count(self) -> int:
        """How many elements are frozen."""
        return sum(self.counts.values())

    @property
    def fractions(self) -> dict[str, float]:
        """Frozen elements of each parameter / its elements."""
        return {name: self.counts[name] / max(shape.numel(), 1) for name, shape in self.shapes.items()}

    @property
    def fraction(self) -> float:
        """Frozen elements / eligible elements."""
        return self.count / sum(shape.numel() for shape in self.shapes.values())

    def of_count(self, k: int, granularity: Granularity, world: World) -> "Frozen":
        """The decision for another k, along the same order."""
        frozen = selection.lowest_k(self.scores, k, granularity, self.shards)
        return replace(self, frozen=frozen, counts=self.shards.n_marked(frozen))

    def state_dict(self, world: World = SINGLE_PROCESS) -> dict[str, Any]:
        """Tensors and numbers alone; tensors are whole, those of sharded parameters on rank 0 only."""
        state = {name: value for name, value in vars(self).items() if name not in ("counts", "shapes", "shards")}
        state["again"] = self.again and self.again.state_dict(world)
        state["frozen"] = self.shards.whole(self.frozen)
        state["scores"] = self.shards.whole(self.scores)
        state["variance"] = state["scores"] if self.by_variance else self.shards.whole(self.variance)
        return {"begun": True} | state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Frozen":
        """The phase that `state_dict` was taken of, not sharded yet: see `to`."""
        counts = UNSHARDED.n_marked(state["frozen"])
        shapes = {name: mask.shape for name, mask in state["frozen"].items()}
        given = {name: value for name, value in state.items() if name != "begun"}
        given["again"] = state["again"] and Observing.from_state_dict(state["again"])
        return cls(**given, counts=counts, shapes=shapes, shards=UNSHARDED)

    def to(self, parameters: Named, shards: Shards = UNSHARDED) -> None:
        """Of what was loaded keep the local parts, on the devices of the parameters."""
        self.shards = shards
        if self.again:
            self.again.to(parameters, shards)

        def there(named: Named) -> dict[str, Tensor]:
            return {n: t.to(parameters[n].device) for n, t in shards.parts(named).items()}

        self.frozen, self.scores = there(self.frozen), there(self.scores)
        self.variance = self.scores if self.by_variance else there(self.variance)


def _never_moved(frozen: Named, scores: Named, activity: Named, world: World) -> dict[str, Tensor]:
    own = min((float(score.min()) for score in scores.values() if score.numel()), default=math.inf)
    least = float(world.all_reduce_min(torch.tensor(own, dtype=torch.float64)))
    return {name: mask & (activity[name] == 0) & (scores[name] == least) for name, mask in frozen.items()}

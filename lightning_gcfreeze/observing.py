"""`Observing`: the statistics that are gathered for the next decision, the covariance C_t above all.

Tensors and numbers in, tensors and numbers out: no module, optimizer or trainer is known here.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_gcfreeze import _torch, orderings
from lightning_gcfreeze._computed import Computed, Cut, part
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.distributed import UNSHARDED, Shards
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

_MOMENTS: dict[str, Callable[[Named], Estimator]] = {
    "mean": BatchMean,
    "second_moment": BatchSecondMoment,
    "recent_mean": RecentBatchMean,
}


class Observing:
    """Gather C_t, and the moments that the ordering reads, over the steps since the last decision.

    This is also the one place that knows whether an optimizer step was observed, left out, or is still to be observed.

    Args:
        parameters: the eligible parameters by name; of sharded ones the local parts.
        full: keep the whole covariance matrix instead of its diagonal.
        needs: the optional fields of `orderings.Evidence` to gather.
        shards: how the parameters lie on the processes. Everything kept by element is that of the local parts.
        reads_samples: whether gradients of single samples are taken; without them there is no C_t.
    """

    def __init__(
        self,
        parameters: Named,
        full: bool = False,
        needs: frozenset[str] = frozenset(),
        shards: Shards = UNSHARDED,
        reads_samples: bool = True,
    ) -> None:
        self.shards = shards
        self.shapes = {name: shards.shape(name, p) for name, p in parameters.items()}
        diagonal = parameters if reads_samples else {}
        self.covariance = FullCovariance(parameters) if full else DiagonalCovariance(diagonal)
        self.moments = {name: moment(parameters) for name, moment in _MOMENTS.items() if name in needs}
        self.start = {name: p.detach().clone() for name, p in parameters.items()} if "start" in needs else None
        self.halfway: dict[str, Tensor] | None = None  # the parameters from which their movement counts
        self.halfway_rates: dict[str, float] = {}  # the learning rates then, by parameter name
        self.skipped = 0  # steps that were left out of C_t
        self.batch_size: int | None = None  # of the first observed step; C_t is on its scale
        self._observed = 0  # steps in C_t
        self._observed_step = self._tried_step = 0  # the last optimizer steps that were
        self._scale = 1.0  # s_t: C_t is this times the estimator's tensors
        self._pending_finite: Tensor | None = None  # whether the last step's gradients were; only the device knows
        self._scale_if_skipped = 1.0  # s_t, if they were not

    @property
    def observed(self) -> int:
        """The number of steps in C_t."""
        self.resolve_pending()
        return self._observed

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t, ``{name: (*p.shape)}``; empty while nothing has been observed."""
        return dict(self._variance()) if self.observed else {}

    @property
    def matrix(self) -> Tensor | None:
        """C_t, (p, p), if it is kept."""
        self.resolve_pending()
        return None if self.covariance.matrix is None else self._scale * self.covariance.matrix

    @property
    def reads_samples(self) -> bool:
        """Whether gradients of single samples are taken."""
        return bool(self.covariance.tensors)

    @property
    def reads_gradients(self) -> bool:
        """Whether any statistic of gradients is gathered."""
        return any(estimator.tensors for estimator in self._estimators)

    def activity(self, weights: Named, moments: Mapping[str, Named] | None = None, held: Named | None = None) -> Named:
        """Return a tensor per parameter that is 0 where an element never had a gradient, as far as that is known.

        Args:
            weights: the parameters now.
            moments: see `evidence`; they tell where no gradients are observed.
            held: ``{name: bool (*p.shape)}``, elements that are frozen now: their moments are 0 whatever they had.
        """
        if self.reads_samples:
            return self._variance()
        for field in ("second_moment", "mean", "recent_mean"):
            if field in self.moments:
                return self._read(self.moments[field].tensors, Tensor.abs)

        def active(name: str, cut: Cut) -> Tensor:
            found = torch.ones_like(cut(weights[name]))
            for moment in (moments or {}).values():
                found = torch.where(part(moment, name, cut) == 0, 0.0, found)
            return found if held is None else found + cut(held[name])

        return Computed(weights, active)

    def wants(self, step: int) -> bool:
        """Return whether an optimizer step was not observed yet: a loss scaler may let the same step come again."""
        if self._observed_step >= step:
            self.resolve_pending()
        return self._observed_step < step

    def leave_out(self, step: int) -> None:
        """Count an optimizer step as left out: its gradients could not be computed, or were not finite."""
        self.skipped += 1
        self._tried_step = step

    def close_step(self, step: int) -> None:
        """Count an optimizer step that was taken without any try to observe it: there was no loss."""
        if max(self._tried_step, self._observed_step) < step:
            self.leave_out(step)

    def observe(
        self,
        step: int,
        samples: Mapping[str, SquaredNoise],
        g_batch: Named,
        gain: gains.Gain,
        batch_size: int | None = None,
        mean_is_g_batch: Collection[str] = (),
    ) -> None:
        """Take one step of the recursion, Eq. (2.6); leave it out if a gradient is not finite.

        On a GPU, whether it is finite becomes known with the next step: asking at once would make the CPU wait.

        Args:
            step: the optimizer step, from 1.
            samples: g_1 … g_m, by name. Not modified.
            g_batch: g_S. ``{name: (*p.shape)}``. Not modified.
            gain: κ.
            batch_size: S, if it is known.
            mean_is_g_batch: names for which g_S is known to be the mean of the samples' gradients.
        """
        self.resolve_pending()
        gate = None
        if self.reads_gradients:
            probe = _finiteness_probe(samples.values(), g_batch.values())
            if not _is_free_to_read(probe):
                gate = probe.isfinite()
            elif not math.isfinite(probe):
                self.leave_out(step)
                return
        self._observed += 1
        self._observed_step = self._tried_step = step
        if not self.reads_gradients:
            return
        kappa = gains.at(gain, self._observed)
        correction = finite_batch_correction(batch_size, self.batch_size or batch_size)
        sums = [tensor for estimator in self._estimators for tensor in estimator.tensors.values()]
        self._scale, self._scale_if_skipped = decayed_(sums, self._scale, kappa, gate)
        taken = Step(samples, g_batch, kappa / self._scale, kappa, self._observed, correction, mean_is_g_batch, gate)
        for estimator in self._estimators:
            estimator.add(taken)
        self._pending_finite = gate
        self.batch_size = self.batch_size or batch_size

    def resolve_pending(self) -> None:
        """Find out whether the last step entered C_t, where only the device knows (one device sync)."""
        finite, self._pending_finite = self._pending_finite, None
        if finite is not None and not finite:
            self._observed -= 1
            self._observed_step -= 1
            self.skipped += 1
            self._scale = self._scale_if_skipped
            self.batch_size = self.batch_size if self._observed else None

    def synchronize(self) -> None:
        """Replace every statistic by its mean over the processes that have the element.

        The number of observed steps becomes the least of all processes', so that one without evidence shows.
        """
        self.resolve_pending()
        world = self.shards.world
        if world.size == 1:
            return
        for estimator in self._estimators:
            for tensor in estimator.tensors.values():
                tensor.mul_(self._scale)
            self.shards.mean_over_replicas_(estimator.tensors)
        self._scale = 1.0
        self._observed = int(world.all_reduce_min(torch.tensor(self._observed)))
        self.skipped, self.batch_size = world.broadcast_object((self.skipped, self.batch_size))

    def evidence(
        self, weights: Named, seed: int, granularity: Granularity, moments: Mapping[str, Named] | None = None
    ) -> orderings.Evidence:
        """Return what an ordering may look at now. Nothing is computed before it is asked for, nor kept after that.

        Weights are copies, since scores may outlive their values.

        Args:
            weights: the parameters now.
            seed: of the random order.
            granularity: what freezes together.
            moments: fields of `orderings.Evidence` that are not gathered here, ``{field: {name: (*p.shape)}}``.
        """
        self.resolve_pending()
        now = Computed(weights, lambda name, cut: _torch.lazy_copy(cut(weights[name])))
        gathered = {name: self._read(estimator.tensors) for name, estimator in self.moments.items()}
        fields = gathered | {field: Computed.of(named) for field, named in (moments or {}).items()}
        start = None if self.start is None else Computed.of(self.start)
        return orderings.Evidence(
            self._variance(), now, seed, start=start, granularity=granularity, shards=self.shards, **fields
        )

    def begin_movement(self, weights: Named, rates: Mapping[str, float]) -> None:
        """Let the movement count from these weights and learning rates on, in place of earlier ones."""
        if self.halfway is None:
            self.halfway = {name: w.detach().clone() for name, w in weights.items()}
        else:  # in place: there is room for one copy
            for name, w in weights.items():
                self.halfway[name].copy_(w)
        self.halfway_rates = dict(rates)

    def movement(self, weights: Named, rates: Mapping[str, float]) -> Computed:
        """Return the way since `begin_movement`, divided by the mean of the learning rates then and now.

        Raises:
            RuntimeError: the state was loaded, and its order did not read "movement".
        """
        if (halfway := self.halfway) is None:
            raise RuntimeError(
                "The order reads the movement of the weights, but the checkpoint was saved by one that did not, and has"
                " no weights to count it from. Load the weights into the module and fit without `ckpt_path`."
            )
        mean = {name: (rate + self.halfway_rates[name]) / 2 or 1.0 for name, rate in rates.items()}  # 0: no way either
        return Computed(weights, lambda name, cut: (_wide(cut(weights[name])) - _wide(cut(halfway[name]))) / mean[name])

    def release(self) -> None:
        """Free the memory of all statistics: they are not needed any more."""
        for estimator in self._estimators:
            estimator.tensors = {}
        self.start = self.halfway = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds, whole tensors on the CPU of rank 0 where parameters are sharded.

        Keys: ``shapes`` {name: list of int}; ``full`` bool; ``covariance`` {name: float (*p.shape)}, or {"covariance":
        (p, p)}, divided by ``scale``; ``moments`` {statistic: {name: (*p.shape)}}, likewise; ``start`` {name:
        (*p.shape)} or None; ``halfway``, ``halfway_rates``: the parameters and the learning rates from which movement
        counts, {name: (*p.shape)} or None and {name: float}; ``scale`` float; ``observed``, ``skipped``,
        ``observed_step`` int; ``batch_size`` int or None.
        """
        self.resolve_pending()
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "full": isinstance(self.covariance, FullCovariance),
            "covariance": self.shards.whole(self.covariance.tensors),
            "moments": {name: self.shards.whole(estimator.tensors) for name, estimator in self.moments.items()},
            "start": None if self.start is None else self.shards.whole(self.start),
            "halfway": None if self.halfway is None else self.shards.whole(self.halfway),
            "halfway_rates": dict(self.halfway_rates),
            "scale": self._scale,
            "observed": self._observed,
            "observed_step": self._observed_step,
            "skipped": self.skipped,
            "batch_size": self.batch_size,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Observing":
        """Return the statistics that `state_dict` was taken of, whole, on the devices where they are; see `to`."""
        parameters = {name: torch.empty(shape, device="meta") for name, shape in state["shapes"].items()}
        observing = cls(parameters, full=state["full"], needs=frozenset(state["moments"]))
        observing.covariance.tensors = _cloned(state["covariance"])  # they go on changing in place
        for name, tensors in state["moments"].items():
            observing.moments[name].tensors = _cloned(tensors)
        observing.start = state["start"]
        halfway, observing.halfway_rates = state.get("halfway"), state.get("halfway_rates", {})
        observing.halfway = halfway and _cloned(halfway)
        observing.skipped, observing.batch_size = state["skipped"], state["batch_size"]
        observing._observed, observing._observed_step = state["observed"], state["observed_step"]
        observing._scale = state["scale"]
        return observing

    def to(self, parameters: Named, shards: Shards) -> None:
        """Keep only the local parts of loaded tensors, on the devices of the parameters."""
        cut = dict if self.shards is shards else shards.parts  # they may be local parts already
        self.shards = shards
        default = next(iter(parameters.values()))
        for estimator in self._estimators:
            parts = cut(estimator.tensors)
            estimator.tensors = {n: t.to(parameters.get(n, default).device) for n, t in parts.items()}
        self.start, self.halfway = (
            whole and {name: t.to(parameters[name].device) for name, t in cut(whole).items()}
            for whole in (self.start, self.halfway)
        )

    @property
    def _estimators(self) -> tuple[Estimator, ...]:
        return (self.covariance, *self.moments.values())

    def _read(self, sums: Named, function: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Computed:
        """Return the statistic from the estimator's running sum, after a function."""
        return Computed(sums, lambda name, cut: function(cut(sums[name]) * self._scale))

    def _variance(self) -> Computed:
        # Where there is no noise at all, rounding may leave a little less than none.
        return self._read(self.covariance.variance, lambda v: v.clamp_(min=0.0))


def _is_free_to_read(value: Tensor) -> bool:
    """Return whether the CPU has the value at hand; it would have to wait for another device."""
    return value.device.type == "cpu"


def _finiteness_probe(samples: Iterable[SquaredNoise], batch: Iterable[Tensor]) -> Tensor:
    """Return a 0-dim sum that is not finite if and only if some element of a gradient is not."""
    others = (tensor for g in samples if (tensor := g.finiteness_probe()) is not None)
    total, *more = (t.sum() if t.dtype.itemsize >= 4 else t.sum(dtype=torch.float32) for t in chain(batch, others))
    for other in more:
        total = total + other
    return total


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _cloned(named: Named) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in named.items()}

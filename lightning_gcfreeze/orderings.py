"""Orderings: what the warm-up saw -> one score per element. The lowest scores are frozen first.

"variance" is the paper's order; the others are what it is compared with. An ordering is any callable that takes
`Evidence` and returns scores; if it reads the optional fields it lists them in an attribute ``needs``. Adding one is
one function here, with a line in `ORDERINGS`.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from lightning_gcfreeze import _checks
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.distributed import UNSHARDED, Shards, whole

Name: TypeAlias = Literal[
    "variance", "random", "reverse", "magnitude", "second_moment", "snr", "displacement", "progress",
    "variance_by_tensor", "variance_by_second_moment", "variance_by_magnitude",
]  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """What an ordering may look at. All tensors are keyed by parameter name, shaped like the parameter, read-only."""

    variance: Named
    """The diagonal of C_t: the variance of the gradient noise, in squared gradients; empty where the ordering does not
    read it and ``samples="auto"``."""
    weights: Named
    """The parameters now."""
    seed: int
    """Of the random order."""
    mean: Named | None = None
    """Running mean of the batch gradient g_S; for orderings whose ``needs`` has "mean"."""
    recent_mean: Named | None = None
    """The same, late steps before all (see `estimators.RecentBatchMean`); for orderings whose ``needs`` has
    "recent_mean"."""
    second_moment: Named | None = None
    """Running mean of g_S²; for orderings whose ``needs`` has "second_moment"."""
    start: Named | None = None
    """The parameters when observing began; for orderings whose ``needs`` has "start"."""
    granularity: Granularity = "element"
    """What freezes together; scores are averaged over it afterwards."""
    shards: Shards = UNSHARDED
    """How the parameters lie on the processes: of sharded ones all tensors are the local parts, plain tensors."""


Ordering: TypeAlias = Callable[[Evidence], Named]
"""Evidence -> ``{name: scores}``, parameter-shaped and free of NaN; the lowest are frozen first. An optional attribute
``needs`` names the optional fields of `Evidence` that it reads."""

F = TypeVar("F", bound=Ordering)


def needs(*fields: str, variance: bool = True) -> Callable[[F], F]:
    """Declare which optional fields of `Evidence` an ordering reads, and whether it reads the variance.

    Where it does not, no single sample's gradient has to be taken, and ``evidence.variance`` is empty.
    """

    def mark(ordering: F) -> F:
        ordering.needs = frozenset(fields)  # type: ignore[attr-defined]
        ordering.reads_variance = variance  # type: ignore[attr-defined]
        return ordering

    return mark


def variance(evidence: Evidence) -> Named:
    """The paper's order: the variance of the gradient noise."""
    return evidence.variance


def reverse(evidence: Evidence) -> Named:
    """The paper's order turned round: the noisiest first."""
    return {name: -v for name, v in evidence.variance.items()}


@needs(variance=False)
def random(evidence: Evidence) -> Named:
    """A uniformly random order, of elements, rows or tensors: the same for a seed however the parameters lie."""
    generator = torch.Generator().manual_seed(evidence.seed)
    axes = {"element": None, "row": 1, "tensor": 0}[evidence.granularity]
    scores = {}
    for name, w in evidence.weights.items():
        shape = evidence.shards.shape(name, w)
        drawn = torch.rand(shape[:axes], generator=generator, dtype=torch.float64).to(w.device)
        scores[name] = drawn.reshape(drawn.shape + (1,) * (w.dim() - drawn.dim())).expand(shape)
    return evidence.shards.parts(scores)


@needs(variance=False)
def magnitude(evidence: Evidence) -> Named:
    """|w|: the smallest weights first."""
    return {name: w.abs() for name, w in evidence.weights.items()}


@needs("second_moment", variance=False)
def second_moment(evidence: Evidence) -> Named:
    """E[g_S²], what Adam keeps as its second moment: mean and noise together."""
    return cast("Named", evidence.second_moment)


@needs("mean")
def snr(evidence: Evidence) -> Named:
    """|E g_S| / sqrt(variance): gradients that are mostly noise first; those that are always 0 before them."""
    scores = {}
    for name, mean in cast("Named", evidence.mean).items():
        ratio = mean.abs() / evidence.variance[name].sqrt()
        scores[name] = torch.where(mean == 0, torch.zeros_like(ratio), ratio)  # 0/0 is an element that never moved
    return scores


@needs("start", variance=False)
def displacement(evidence: Evidence) -> Named:
    """|w - w at the start|: what has moved least first."""
    start = cast("Named", evidence.start)
    return {name: (w - start[name]).abs() for name, w in evidence.weights.items()}


@needs("recent_mean", "second_moment", variance=False)
def progress(evidence: Evidence) -> Named:
    """m² / sqrt(E[g_S²]), m the recent mean of g_S: how much of the loss the element's steps still take away.

    To first order a step Δw changes the loss by E[g] Δw, and Adam's step is -lr m / sqrt(v): so frozen, the element
    forgoes lr m² / sqrt(v) with every step, of which the learning rate is common to all. What has converged has m = 0.
    """
    recent, second = cast("Named", evidence.recent_mean), cast("Named", evidence.second_moment)
    return {name: _ratio(m.square(), second[name].sqrt()) for name, m in recent.items()}


def variance_by_tensor(evidence: Evidence) -> Named:
    """Variance in units of its mean over the parameter, so that each of them freezes in much the same part."""
    wrapped = evidence.shards.wrapped(evidence.variance)
    return {name: _ratio(v, whole(wrapped[name].mean()).expand_as(v)) for name, v in evidence.variance.items()}


@needs("second_moment")
def variance_by_second_moment(evidence: Evidence) -> Named:
    """Variance / E[g_S²]: that of Adam's normalised gradient. It is S at most, where the mean gradient is none."""
    second = cast("Named", evidence.second_moment)
    return {name: _ratio(v, second[name]) for name, v in evidence.variance.items()}


def variance_by_magnitude(evidence: Evidence) -> Named:
    """Variance · w²: that of the derivative by log |w|, which does not change if a layer's scale moves to the next."""
    return {name: v * evidence.weights[name].square() for name, v in evidence.variance.items()}


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The quotient; 0 where b is 0: an element that never moved."""
    return (a / b).nan_to_num_(nan=0.0, posinf=0.0)


ORDERINGS: dict[str, Ordering] = {
    "variance": variance,
    "random": random,
    "reverse": reverse,
    "magnitude": magnitude,
    "second_moment": second_moment,
    "snr": snr,
    "displacement": displacement,
    "progress": progress,
    "variance_by_tensor": variance_by_tensor,
    "variance_by_second_moment": variance_by_second_moment,
    "variance_by_magnitude": variance_by_magnitude,
}


def resolve(order: str | Ordering) -> Ordering:
    """The ordering of that name, or `order` itself if it is a callable.

    Raises:
        ValueError: an unknown name, or an unknown field among its ``needs``.
        TypeError: neither a name nor a callable.
    """
    if isinstance(order, str):
        if order not in ORDERINGS:
            raise ValueError(
                f"`order` must be one of {', '.join(map(repr, ORDERINGS))}, or a callable, got {order!r}."
                f"{_checks.did_you_mean(order, ORDERINGS)}"
            )
        return ORDERINGS[order]
    if not callable(order):
        raise TypeError(
            f"`order` must be one of {', '.join(map(repr, ORDERINGS))}, or a callable that takes"
            f" `Evidence` and returns scores by parameter name, got {order!r}."
        )
    try:
        inspect.signature(order).bind(None)
    except ValueError:  # of a callable that does not tell its arguments
        pass
    except TypeError as error:
        raise TypeError(
            f"`order` is called with one argument, an `Evidence`, and {order!r} does not take it ({error}). As in"
            " `order=lambda evidence: {name: w.abs() for name, w in evidence.weights.items()}`."
        ) from error
    if unknown := needed_by(order) - OPTIONAL_FIELDS:
        raise ValueError(f"`order.needs` may name {sorted(OPTIONAL_FIELDS)}, got {sorted(unknown)}.")
    return order


OPTIONAL_FIELDS = frozenset({"mean", "recent_mean", "second_moment", "start"})


def reads_variance(ordering: Ordering) -> bool:
    """Whether an ordering reads ``evidence.variance``; one that does not say so does."""
    return bool(getattr(ordering, "reads_variance", True))


def needed_by(ordering: Ordering) -> frozenset[str]:
    """The optional fields of `Evidence` that an ordering reads."""
    named: str | Collection[str] = getattr(ordering, "needs", ())
    return frozenset([named] if isinstance(named, str) else named)

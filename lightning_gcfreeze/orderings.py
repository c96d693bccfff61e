"""Orderings: evidence of the warm-up -> one score per element. The lowest scores are frozen first.

"variance" is the order of the paper; the others are alternatives to compare it with. An ordering is any callable that
takes `Evidence` and returns scores; `needs` declares which optional fields it reads. A new one is one function here,
and a line in `ORDERINGS`.
"""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from lightning_gcfreeze import _checks
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.distributed import UNSHARDED, Shards

Name: TypeAlias = Literal[
    "variance",
    "random",
    "reverse",
    "magnitude",
    "second_moment",
    "snr",
    "displacement",
    "progress",
    "momentum",
    "movement",
]


@dataclass(frozen=True)
class Evidence:
    """What an ordering may read.

    All tensors are ``{name: (*p.shape)}``, by parameter name; they must not be modified. For sharded parameters they
    are plain tensors of the local elements; see `shards`. In a run each is computed when it is asked for, and must not
    be asked for once the ordering has returned: keep copies, as in ``copy.deepcopy(evidence)``.
    """

    variance: Named
    """The diagonal of C_t, the variance of the gradient noise, in units of a squared gradient. Empty if the ordering
    does not read it and ``samples="auto"``."""
    weights: Named
    """The parameters at this step."""
    seed: int
    """Seed for orderings that draw random numbers, the same on all processes."""
    mean: Named | None = None
    """Running mean of the batch gradient g_S. None unless ``needs`` of the ordering has "mean"."""
    recent_mean: Named | None = None
    """Running mean of g_S with recent steps weighted most (see `estimators.RecentBatchMean`). None unless ``needs`` has
    "recent_mean"."""
    second_moment: Named | None = None
    """Running mean of g_S². None unless ``needs`` has "second_moment"."""
    start: Named | None = None
    """The parameters when observing began. None unless ``needs`` has "start"."""
    momentum: Named | None = None
    """The running mean of g_S that the optimizer keeps, from its state; see `gradients.momentum`. 0 where it has none
    yet, and where an element was frozen before. None unless ``needs`` has "momentum"."""
    update: Named | None = None
    """The optimizer's step at unit learning rate, but for its sign and its weight decay, from its state. None unless
    ``needs`` has "update"."""
    divisor: Named | None = None
    """What the optimizer divides a mean gradient by to make its update of it, from its state; 0 where it shows that no
    gradient ever came. None unless ``needs`` has "divisor"."""
    movement: Named | None = None
    """The way that an element has gone since halfway to this decision, divided by its learning rate: the sum of the
    optimizer's updates. None unless ``needs`` has "movement"."""
    granularity: Granularity = "element"
    """The units that freeze together. Scores are still one per element, and are averaged over units afterwards."""
    shards: Shards = UNSHARDED
    """The layout of the parameters over the processes."""


Ordering: TypeAlias = Callable[[Evidence], Named]
"""`Evidence` -> ``{name: scores (*p.shape)}``, of any real dtype and free of NaN; the lowest are frozen first. An
optional attribute ``needs`` names the optional fields of `Evidence` that the ordering reads; see `needs`."""

F = TypeVar("F", bound=Ordering)


def needs(*fields: str, variance: bool = True) -> Callable[[F], F]:
    """Declare which optional fields of `Evidence` an ordering reads, and whether it reads the variance.

    If it does not, per-sample gradients are not computed with ``samples="auto"``, and ``evidence.variance`` is empty.

    Args:
        fields: among "mean", "recent_mean", "second_moment", "start", "momentum", "update",
            "divisor" and "movement".
        variance: whether the ordering reads ``evidence.variance``.
    """

    def mark(ordering: F) -> F:
        ordering.needs = frozenset(fields)  # type: ignore[attr-defined]
        ordering.reads_variance = variance  # type: ignore[attr-defined]
        return ordering

    return mark


def variance(evidence: Evidence) -> Named:
    """Score by the variance of the gradient noise, the order of the paper."""
    return evidence.variance


def reverse(evidence: Evidence) -> Named:
    """Score by the negative variance: the noisiest elements first."""
    return {name: -v for name, v in evidence.variance.items()}


@needs(variance=False)
def random(evidence: Evidence) -> Named:
    """Draw a uniformly random order of elements, rows or tensors. A seed gives the same order in any sharding."""
    generator = torch.Generator().manual_seed(evidence.seed)
    axes = {"row": 1, "tensor": 0}.get(evidence.granularity)
    scores = {}
    for name, w in evidence.weights.items():
        shape = evidence.shards.shape(name, w)
        drawn = torch.rand(shape[:axes], generator=generator, dtype=torch.float64).to(w.device)
        scores[name] = drawn.reshape(drawn.shape + (1,) * (w.dim() - drawn.dim())).expand(shape)
    return evidence.shards.parts(scores)


@needs(variance=False)
def magnitude(evidence: Evidence) -> Named:
    """Score by |w|: the smallest weights first."""
    return {name: w.abs() for name, w in evidence.weights.items()}


@needs("second_moment", variance=False)
def second_moment(evidence: Evidence) -> Named:
    """Score by E[g_S²], mean and noise together; Adam keeps it as its second moment."""
    return cast("Named", evidence.second_moment)


@needs("mean")
def snr(evidence: Evidence) -> Named:
    """Score by |E g_S| / sqrt(variance): gradients that are mostly noise first, after those that are always 0."""
    scores = {}
    for name, mean in cast("Named", evidence.mean).items():
        ratio = mean.abs() / evidence.variance[name].sqrt()
        scores[name] = torch.where(mean == 0, torch.zeros_like(ratio), ratio)  # 0/0: an element that never moved
    return scores


@needs("start", variance=False)
def displacement(evidence: Evidence) -> Named:
    """Score by the distance |w - w at the start|: the elements that moved least first."""
    start = cast("Named", evidence.start)
    return {name: (w - start[name]).abs() for name, w in evidence.weights.items()}


@needs("recent_mean", "second_moment", variance=False)
def progress(evidence: Evidence) -> Named:
    """Score by m² / sqrt(E[g_S²]), m the recent mean of g_S: how much each step of the element still lowers the loss.

    To first order, a step Δw changes the loss by E[g] Δw, and the step of Adam is -lr m / sqrt(v). So an element that
    is frozen forgoes lr m² / sqrt(v) at every step; the learning rate is common to all elements. An element that has
    converged has m = 0.
    """
    recent, second = cast("Named", evidence.recent_mean), cast("Named", evidence.second_moment)
    return {name: _ratio(m.square(), second[name].sqrt()) for name, m in recent.items()}


@needs("momentum", "update", variance=False)
def momentum(evidence: Evidence) -> Named:
    """Score by m · update: what each step of the element still takes off the loss, as the optimizer itself knows it.

    The score of `progress`, from the state of the optimizer at t0 instead of statistics of our own, so nothing is
    observed and nothing kept before t0: m² / sqrt(v) with Adam, in proportion to m² with SGD. The optimizer has to keep
    a running mean of gradients, which SGD does only with ``momentum``; its memory, as a rule of ten steps, is the
    order's.
    """
    mean, update = cast("Named", evidence.momentum), cast("Named", evidence.update)
    return {name: m * update[name] for name, m in mean.items()}


@needs("movement", "divisor", variance=False)
def movement(evidence: Evidence) -> Named:
    """Score by d² · divisor, d the way since halfway to t0: what the element has taken off the loss since then.

    The score of `progress` once more. The way is the sum of the optimizer's updates, and its divisor, sqrt(v) with Adam
    and a constant with SGD, turns their mean into that of the gradients: so it is m · update with a memory of half of
    t0, for one copy of the weights and nothing in any step. Not the score of movement pruning, which has the weight in
    the place of the way.
    """
    way, divisor = cast("Named", evidence.movement), cast("Named", evidence.divisor)
    return {name: d.square() * divisor[name] for name, d in way.items()}


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0: an element that never moved."""
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
    "momentum": momentum,
    "movement": movement,
}
BY_ELEMENT: frozenset[Ordering] = frozenset(ORDERINGS.values()) - {random}
"""Orderings whose score of an element depends on nothing but that element: they can be asked for it in pieces."""
_REMOVED = ("variance_by_tensor", "variance_by_second_moment", "variance_by_magnitude")


def resolve(order: str | Ordering) -> Ordering:
    """Return the ordering of a name, or `order` itself if it is a callable.

    Raises:
        ValueError: an unknown name, or an unknown field in ``needs``.
        TypeError: neither a name nor a callable of one argument.
    """
    if isinstance(order, str):
        if order in _REMOVED:
            raise ValueError(
                f"`order={order!r}` is no longer part of the package. docs/orders.md has it as a function of a few"
                " lines: pass that function as `order`, which takes any callable."
            )
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
    except ValueError:  # no signature, as with some built-in callables
        pass
    except TypeError as error:
        raise TypeError(
            f"`order` is called with one argument, an `Evidence`, and {order!r} does not take it ({error}). As in"
            " `order=lambda evidence: {name: w.abs() for name, w in evidence.weights.items()}`."
        ) from error
    if unknown := needed_by(order) - OPTIONAL_FIELDS:
        raise ValueError(f"`order.needs` may name {sorted(OPTIONAL_FIELDS)}, got {sorted(unknown)}.")
    return order


FROM_OPTIMIZER = frozenset({"momentum", "update", "divisor", "movement"})
"""The fields that are read from the optimizer's state when they are wanted; the others are gathered before."""
OPTIONAL_FIELDS = frozenset({"mean", "recent_mean", "second_moment", "start"}) | FROM_OPTIMIZER


def reads_variance(ordering: Ordering) -> bool:
    """Return whether an ordering reads ``evidence.variance``, which it does unless it declares otherwise."""
    return bool(getattr(ordering, "reads_variance", True))


def needed_by(ordering: Ordering) -> frozenset[str]:
    """Return the optional fields of `Evidence` that an ordering reads."""
    named: str | Collection[str] = getattr(ordering, "needs", ())
    return frozenset([named] if isinstance(named, str) else named)


def needed_from_optimizer(ordering: Ordering) -> frozenset[str]:
    """Return the optional fields of `Evidence` that an ordering reads and that are in the optimizer's state."""
    return needed_by(ordering) & FROM_OPTIMIZER

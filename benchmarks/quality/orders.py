"""The orders that are compared: what was seen until t0 -> a score an element; the lowest freeze first.

`variance_first` is the paper's order, "first" and "all" being the samples whose gradients made the estimate. An order
here is one function of a `Record`, with a line in `ORDERS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gcfreeze import Evidence, orderings
from lightning_gcfreeze._types import Named


@dataclass(frozen=True)
class Record:
    """All that an order may look at. Tensors are keyed by parameter name and shaped like the parameter."""

    first: Evidence
    """What the callback saw with samples="first"."""
    all: Evidence
    """What it saw with samples="all", on the same way."""
    half: Named
    """The weights after step t0 // 2."""
    mean_half: Named
    """The mean gradient over the steps since then."""
    exp_avg: Named
    """Adam's first moment."""
    exp_avg_sq: Named
    """Adam's second moment."""
    curvature: Named | None
    """|diagonal of the Hessian| at t0, as a few random probes estimate it; None where that was not done."""
    moved: dict[str, Tensor]
    """|w_T - w_t0| of the run that goes on unfrozen: an oracle's."""
    reach: float
    """How far Adam can go about: learning rate times the steps left."""

    @property
    def recent(self) -> dict[str, Tensor]:
        """|w - w_half|."""
        return _each(lambda w, half: (w - half).abs(), self.first.weights, self.half)

    @property
    def displacement(self) -> Named:
        """|w - w at the start|."""
        return orderings.displacement(self.first)


Order = Callable[[Record], Named]


def decrease(r: Record) -> Named:
    """|E g_S · (w - start)|: how much the element lowered the loss, to first order."""
    return _each(lambda g, d: (g * d).abs(), _mean(r), r.displacement)


def decrease_recent(r: Record) -> Named:
    """The same since t0 // 2."""
    return _each(lambda g, d: (g * d).abs(), r.mean_half, r.recent)


def newton(r: Record) -> Named:
    """How much the element could yet lower the loss as a parabola says, |m|D - ½|h|D², no farther than it can go."""

    def gain(m: Tensor, h: Tensor) -> Tensor:
        distance = (m.abs() / h).nan_to_num_(nan=0.0, posinf=r.reach).clamp_(max=r.reach)
        return m.abs() * distance - h * distance.square() / 2

    return _each(gain, r.mean_half, _curvature(r))


def prefix(r: Record) -> Named:
    """The element's place in the model: first layers first."""
    scores, start = {}, 0
    for name, w in r.first.weights.items():
        scores[name] = torch.arange(start, start + w.numel()).view(w.shape)
        start += w.numel()
    return scores


def by_tensor(r: Record) -> Named:
    """The variance in units of its tensor's mean."""
    return _each(lambda v: _ratio(v, v.mean().expand_as(v)), r.all.variance)


def by_adam(r: Record) -> Named:
    """The variance of the element's step under Adam, to a factor."""
    return _each(_ratio, r.all.variance, _second_moment(r))


def by_magnitude(r: Record) -> Named:
    """The variance of the derivative by log |w|."""
    return _each(_cost, r.all.variance, r.first.weights)


ORDERS: dict[str, Order] = {
    "variance_first": lambda r: r.first.variance,
    "variance_all": lambda r: r.all.variance,
    "random": lambda r: orderings.random(r.first),
    "magnitude": lambda r: orderings.magnitude(r.first),
    "second_moment": lambda r: orderings.second_moment(r.first),
    "snr": lambda r: orderings.snr(r.first),
    "displacement": lambda r: r.displacement,
    "progress": lambda r: orderings.progress(r.first),
    "recent": lambda r: r.recent,
    "prefix": prefix,
    "decrease": decrease,
    "decrease_recent": decrease_recent,
    "fisher_cost": lambda r: _each(_cost, r.all.variance, r.recent),
    "fisher_cost_first": lambda r: _each(_cost, r.first.variance, r.recent),
    "fisher_cost_start": lambda r: _each(_cost, r.all.variance, r.displacement),
    "moment_cost": lambda r: _each(_cost, _second_moment(r), r.recent),
    "adam_decrease": lambda r: _each(lambda m, v: _ratio(m.square(), v.sqrt()), r.exp_avg, r.exp_avg_sq),
    "adam_mean": lambda r: _each(lambda m, v: _ratio(m.square(), v.sqrt()), r.mean_half, _second_moment(r)),
    "adam_ratio": lambda r: _each(lambda m, v: _ratio(m.abs(), v.sqrt()), r.mean_half, _second_moment(r)),
    "curvature_cost": lambda r: _each(_cost, _curvature(r), r.recent),
    "newton": newton,
    "by_tensor": by_tensor,
    "by_adam": by_adam,
    "by_magnitude": by_magnitude,
    "oracle_move": lambda r: r.moved,
    "oracle_cost": lambda r: _each(_cost, _curvature(r), r.moved),
}
COSTS = ("fisher_cost", "fisher_cost_first", "fisher_cost_start", "moment_cost", "curvature_cost", "oracle_cost")
"""Of these, half a score is a predicted increase of the loss: h d² / 2."""
CURVED = ("curvature_cost", "newton", "oracle_cost")
"""These need the curvature."""


def _each(function: Callable[..., Tensor], *named: Named) -> dict[str, Tensor]:
    return {name: function(*(of[name] for of in named)) for name in named[0]}


def _cost(h: Tensor, d: Tensor) -> Tensor:
    return h * d.square()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The ratio a / b; 0 where b is 0, at an element that never had a gradient."""
    return torch.where(b > 0, a / b, torch.zeros_like(a))


def _mean(r: Record) -> Named:
    assert r.first.mean is not None
    return r.first.mean


def _second_moment(r: Record) -> Named:
    assert r.first.second_moment is not None
    return r.first.second_moment


def _curvature(r: Record) -> Named:
    assert r.curvature is not None
    return r.curvature

"""What the optimizer's state says of gradients: their running mean m, its step, and what it divides m by for that.

With the optimizer's own names, and t the step of the parameter, which counts only steps with a gradient:

    Adam, AdamW, NAdam, RAdam   m = exp_avg / (1 - β1^t)                update = m / (sqrt(exp_avg_sq / (1 - β2^t)) + ε)
      with amsgrad                                                      max_exp_avg_sq in place of exp_avg_sq
    Adamax                      m = exp_avg / (1 - β1^t)                update = m / exp_inf
    Lion, and others with       m = exp_avg                             update = m
      nothing but exp_avg
    SGD                         m = (1 - μ)/(1 - τ) momentum_buffer     update = momentum_buffer
    RMSprop                     m = (1 - μ) d momentum_buffer           update = momentum_buffer

The divisor is m / update: it makes, of the way that an element has gone, the mean of the gradients that sent it there.
It is known where m is not: 1 for SGD without momentum, sqrt(sum) + ε for Adagrad. It is 0 where the state shows that no
gradient ever came. Lion's is |exp_avg|, since its true steps are signs.

μ is the momentum, τ the dampening, d the divisor of RMSprop's gradients, whose buffer is of divided gradients. Buffers
are sums of gradients with the weights 1, μ, μ², …, which the factor in front makes a mean. Left out is what an
optimizer adds that is not in its state, Nesterov's look-ahead, and what is on its way to 1, RAdam's rectification. What
the optimizer was given is what it has the mean of: clipped gradients, with the weight decay that is added to gradients
(not AdamW's), and of the opposite sign where it maximizes.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze._computed import Computed, Cut
from lightning_gcfreeze._names import shortened
from lightning_gcfreeze.distributed import local, part

_UNREADABLE = (optim.Adadelta, optim.ASGD, optim.Rprop)
_MEANS = ("exp_avg", "momentum_buffer")
_DIVISORS = ("exp_avg_sq", "exp_inf", "square_avg", "sum", "exp_avg")
_KNOWN = {*_MEANS, *_DIVISORS, "max_exp_avg_sq", "grad_avg"}
"""Entries by element whose part in a step is known."""


class Moments(NamedTuple):
    """What can be read, ``{name: (*p.shape)}``, float32 or wider: copies, of sharded parameters the local parts."""

    momentum: Computed
    """m."""
    update: Computed
    """The optimizer's step at unit learning rate, but for its sign and its weight decay."""
    divisor: Computed
    """m / update."""


def has_state(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> bool:
    """Return whether the optimizer has stepped any of the parameters."""
    return any(optimizer.state.get(p) for p in parameters.values())


def why_unreadable(optimizer: Optimizer, parameters: Mapping[str, Parameter], mean: bool = True) -> str | None:
    """Return why m, or the divisor, cannot be read, with the optimizer as the subject, or None if it can.

    Before the first step only the optimizer's class and hyper-parameters tell.

    Args:
        optimizer: one that treats every element by itself.
        parameters: whose m is wanted, by name.
        mean: whether m is wanted; else the divisor alone.
    """
    if type(optimizer) in _UNREADABLE or (mean and type(optimizer) is optim.Adagrad):
        return "keeps no running mean of gradients" if mean else "does not divide gradients by anything in its state"
    forgetful: dict[str, list[str]] = {}
    for name, group in _groups(optimizer, parameters).items():
        if mean and (setting := _setting_without_memory(optimizer, group)):
            forgetful.setdefault(setting, []).append(name)
    for setting, names in forgetful.items():
        return f"remembers no gradient but the last with {setting}, as {shortened(names)} has it"
    wanted = _MEANS if mean else _DIVISORS
    for name, p in parameters.items():
        if why := _why_unreadable(
            optimizer.state.get(p, {}), p, () if _divides_by_nothing(optimizer, mean) else wanted
        ):
            return f"{why} ({name})"
    return None


def moments(
    optimizer: Optimizer, parameters: Mapping[str, Parameter], fields: Collection[str] = Moments._fields
) -> Moments:
    """Let m, the update and the divisor be read, where `why_unreadable` knows no reason against it; else they are 0.

    Args:
        optimizer: after its step. What is read is its state at that time.
        parameters: by name. One that never had a gradient gets zeros.
        fields: of `Moments` that are wanted; the others are empty.
    """
    groups, is_sgd = _groups(optimizer, parameters), isinstance(optimizer, optim.SGD)

    @torch.no_grad()
    def read(i: int, name: str, cut: Cut) -> Tensor:
        p = parameters[name]
        return _moments(p, optimizer.state.get(p) or {}, groups[name], is_sgd, cut)[i]

    return Moments(
        *(Computed(parameters if field in fields else (), partial(read, i)) for i, field in enumerate(Moments._fields))
    )


def group_indices(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, int]:
    """Return which group of the optimizer each parameter is in, by name; those that it does not have are left out."""
    groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    return {name: groups[p] for name, p in parameters.items() if p in groups}


def learning_rates(optimizer: Optimizer, groups: Mapping[str, int]) -> dict[str, float]:
    """Return the learning rate of each parameter now, by name; 1 where its group has none.

    Args:
        optimizer: its groups may hold vectors in the place of parameters by now.
        groups: see `group_indices`.
    """
    rates = {name: optimizer.param_groups[i].get("lr") for name, i in groups.items()}
    return {name: 1.0 if rate is None else float(rate) for name, rate in rates.items()}


def _groups(optimizer: Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters of each parameter, by name."""
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    return {name: groups.get(p, optimizer.defaults) for name, p in parameters.items()}


def _setting_without_memory(optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
    if isinstance(optimizer, optim.SGD | optim.RMSprop):
        return "`momentum=0`" if float(group["momentum"]) == 0 else None
    return "`betas[0]=0`" if "betas" in group and float(group["betas"][0]) == 0 else None


def _divides_by_nothing(optimizer: Optimizer, mean: bool) -> bool:
    return not mean and isinstance(optimizer, optim.SGD)


def _why_unreadable(state: Mapping[str, Any], p: Parameter, wanted: Sequence[str]) -> str | None:
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        return None  # no gradient yet
    if wanted and not any(key in tensors and tensors[key].shape == p.shape for key in wanted):
        return f"keeps {', '.join(tensors)}, and not {' or '.join(f'`{key}`' for key in wanted)} of each element"
    if others := [key for key, value in state.items() if key not in _KNOWN and _is_by_element(value, p)]:
        return f"keeps {', '.join(others)}, whose part in a step is unknown here"
    read = [value for key, value in tensors.items() if key in _KNOWN]
    if odd := [value for value in read if type(value) not in (Tensor, Parameter, DTensor)]:
        return f"keeps its state as {type(odd[0]).__name__}"
    if odd := [value for value in read if not value.is_floating_point()]:
        return f"keeps its state as {odd[0].dtype}"
    return None


def _is_by_element(value: Any, p: Parameter) -> bool:
    """Return whether an entry has numbers for elements, or may have them: what is in a list is not looked at."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.shape == p.shape
    return isinstance(value, list | tuple | dict)


def _moments(
    p: Parameter, state: Mapping[str, Any], group: Mapping[str, Any], may_be_stateless: bool, cut: Cut
) -> tuple[Tensor, Tensor, Tensor]:
    """Return m, the update and the divisor of the elements of one parameter that `cut` selects."""
    found = {key: _wide(p, state[key], cut) for key in _KNOWN if isinstance(state.get(key), Tensor)}
    corrections = _bias_corrections(state, group)
    zeros = torch.zeros_like(cut(local(p)), dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
    if 0.0 in corrections or not (found or may_be_stateless):  # a fused step that did not count leaves a state of 0
        return zeros, zeros.clone(), zeros.clone()
    eps = float(group.get("eps", 0.0))
    if "exp_avg" not in found:
        divisor = _divisor_of_buffer(found, group, eps, zeros)
        update = found.get("momentum_buffer", zeros)
        return update * divisor, update, divisor
    squares = found.get("max_exp_avg_sq", found.get("exp_avg_sq"))
    if squares is None and "exp_inf" not in found:
        return found["exp_avg"], found["exp_avg"].clone(), found["exp_avg"].abs()
    m = found["exp_avg"] / corrections[0]
    root, eps = (found["exp_inf"], 0.0) if squares is None else ((squares / corrections[1]).sqrt_(), eps)
    update = torch.where(m == 0, m, m / (root + eps))  # 0/0 without ε: an element that never moved
    return m, update, _with_epsilon(root, eps)


def _divisor_of_buffer(found: Mapping[str, Tensor], group: Mapping[str, Any], eps: float, zeros: Tensor) -> Tensor:
    """Return what makes the mean gradient of the step of SGD, RMSprop or Adagrad."""
    momentum, dampening = (float(group.get(name) or 0.0) for name in ("momentum", "dampening"))
    # Of the buffer's weights 1, μ, μ², …, their sum in the long run. Without a buffer the gradient is not dampened.
    is_mean = 0 < momentum < 1 and dampening < 1
    share = (1 - momentum) / (1 - dampening) if is_mean else 1.0
    squares = found.get("square_avg", found.get("sum"))
    if squares is None:
        return torch.full_like(zeros, share)
    if "grad_avg" in found:
        squares = squares.addcmul(found["grad_avg"], found["grad_avg"], value=-1).clamp_(min=0.0)
    return _with_epsilon(squares.sqrt(), eps).mul_(share)


def _with_epsilon(root: Tensor, eps: float) -> Tensor:
    """Return root + ε, and 0 where there was no gradient."""
    return torch.where(root == 0, root, root + eps)


def _bias_corrections(state: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[float, float]:
    """Return 1 - β1^t and 1 - β2^t, in double precision; 1 where the optimizer does not count."""
    step = state.get("step", group.get("step"))
    if step is None or "betas" not in group:
        return 1.0, 1.0
    t = float(local(step) if isinstance(step, Tensor) else step)
    first, second, *_ = (1 - float(beta) ** t for beta in group["betas"])
    return first, second


def _wide(p: Parameter, value: Tensor, cut: Cut) -> Tensor:
    """Return a copy of the elements of a state entry, dense, like the local part of its parameter, float32 or wider."""
    value = part(p, value.detach())
    value = cut(value.to_dense() if value.layout != torch.strided else value)
    return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)

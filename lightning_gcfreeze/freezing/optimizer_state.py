"""Which entries of an optimizer's state belong to single elements of a parameter."""

from typing import Any, TypeAlias

from torch import Tensor, optim
from torch.optim import Optimizer

ELEMENTWISE: set[type[Optimizer]] = {
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad, optim.Adadelta,
    optim.Adamax, optim.ASGD, optim.Rprop,
}  # fmt: skip
"""Optimizer classes whose update of an element depends only on the value, gradient and state of that element.

Matched by exact class. Add another one before training: ``ELEMENTWISE.add(Lion)``. An order that reads the
momentum takes `exp_avg`, `exp_avg_sq` and `momentum_buffer` for what torch's optimizers keep under these names."""

State: TypeAlias = dict[str, Any]
"""An optimizer's state of one parameter, by key."""


def is_by_element(value: Any, parameter: Tensor) -> bool:
    """Return whether a state entry has a number for each element of the parameter, unlike Adam's count of steps."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def state_by_element(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Return the entries of a parameter's state that have a number for each element.

    For an optimizer that is not in `ELEMENTWISE` the result is empty: an entry of the parameter's shape may be
    something else there, for instance a matrix to be inverted.
    """
    state = optimizer.state.get(p, {}) if type(optimizer) in ELEMENTWISE else {}
    return {key: value for key, value in state.items() if is_by_element(value, p)}


def to_strided(tensor: Tensor) -> Tensor:
    """Return a sparse tensor as a dense one, any other as it is."""
    return tensor.to_dense() if tensor.is_sparse else tensor


def copied(value: Any) -> Any:
    """Return a clone of a tensor, anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value

"""Multiply learning rates for the duration of an optimizer's own update.

Between updates each group's "lr" is what its schedule says. So schedulers, whether they compute a rate from the last
one or from the step, monitors and checkpoints know nothing of the factor, and there is no state to resume.
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze import _torch
from lightning_gcfreeze.freezing.late import right_before_update


class _Rate(NamedTuple):
    """The learning rate of a parameter group during an update."""

    group: dict[str, Any]
    before: Any  # the object in the group before
    value: Any  # a copy of it, if it is a tensor; else the object itself
    during: Any  # the object in the group now
    version: int | None  # of that, if it is a tensor

    @property
    def is_untouched(self) -> bool:
        """Whether the optimizer has left the group's rate alone."""
        return self.group.get("lr") is self.during and self.version == _version(self.during)

    def is_put_back_by(self, at_start: Any) -> bool:
        """Whether the optimizer has undone a change of its own: the group has the number of the step's start again.

        If the factor came on top of that very number, the step has another copy of it, which was not multiplied.
        """
        return self.version is None and self.group.get("lr") is at_start and self.before is not at_start


class LearningRates:
    """Multiplies the learning rates of all parameter groups in each update, and puts them back, until `release`.

    A number is replaced, and the same object put back. A tensor is changed in place, and put back to the bit: fused and
    captured optimizers hold on to it. Groups may share one.

    Args:
        optimizer: each of its groups has a number or a tensor of one as "lr", see `groups_without_rate`.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._rates: list[_Rate] = []  # during an update
        self._at_start: Sequence[Any] = ()  # of the step
        # A step that raised has left them multiplied, and what is saved then must not have the factor. A wrapper that
        # does not initialise its base class `Optimizer` has no place for the hook.
        self._handle: RemovableHandle | None = None
        with suppress(AttributeError):
            self._handle = optimizer.register_state_dict_pre_hook(lambda optimizer: self._restore_quietly())

    def before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], factor: float) -> Any:
        """Multiply the rates by a factor right before the update of a step, after the closure if the step has one.

        Args:
            args: arguments that a pre-hook of the optimizer's step receives.
            kwargs: keyword arguments that the hook receives.
            factor: with 1 no rate has another value, but `restore_` still tells whether the step sets rates itself.

        Returns:
            What the hook has to return.
        """
        self.restore_()  # after a step that raised
        self._at_start = [group["lr"] for group in self._optimizer.param_groups]
        return right_before_update(args, kwargs, partial(self._multiply_, factor), self.restore_)

    @torch.no_grad()
    def restore_(self) -> bool:
        """Put the rates back, if they are multiplied. What the step itself has set is left as it is.

        Returns:
            Whether the factor was lost, or will be in the next step's rates as well: the step has set a rate, and not
            only put back what it had changed before.
        """
        rates, self._rates = self._rates, []
        untouched = [rate.is_untouched for rate in rates]  # before a tensor that groups share is written to
        for rate, own in zip(rates, untouched, strict=True):
            if own and isinstance(rate.before, Tensor):
                if rate.during is not rate.value:
                    rate.before.copy_(rate.value)
            elif own:
                rate.group["lr"] = rate.before
        return any(
            not own and not rate.is_put_back_by(at_start)
            for rate, own, at_start in zip(rates, untouched, self._at_start, strict=False)
        )

    def release(self) -> None:
        """Leave the optimizer as it was."""
        self.restore_()
        if self._handle is not None:
            self._handle.remove()

    def _restore_quietly(self) -> None:
        self.restore_()

    @torch.no_grad()
    def _multiply_(self, factor: float) -> None:
        groups = self._optimizer.param_groups
        before = [group["lr"] for group in groups]
        changes = factor != 1.0
        values = [rate.clone() if changes and isinstance(rate, Tensor) else rate for rate in before]
        for group, rate, value in zip(groups, before, values, strict=True):
            if changes and isinstance(rate, Tensor):
                rate.copy_(value * factor)
            elif not isinstance(rate, Tensor):
                group["lr"] = rate * factor  # another object, whatever the factor
        self._rates = [
            _Rate(group, rate, value, group["lr"], _version(group["lr"]))
            for group, rate, value in zip(groups, before, values, strict=True)
        ]


def groups_without_rate(optimizer: Optimizer) -> dict[int, Any]:
    """Return, by index, what parameter groups have as "lr" in place of a number; None if there is nothing."""
    rates = {i: group.get("lr") for i, group in enumerate(optimizer.param_groups)}
    return {i: rate for i, rate in rates.items() if not _is_rate(rate)}


def _is_rate(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_floating_point()
    return isinstance(value, Real) and not isinstance(value, bool)


def _version(rate: Any) -> int | None:
    return _torch.version(rate) if isinstance(rate, Tensor) else None

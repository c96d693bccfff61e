"""A learning rate multiplied by hand: around the optimizer's own step, once the closure has computed the gradients."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def multiply_by_hand(optimizer: Optimizer, factor_of: Callable[[int], float]) -> None:
    """Patch an optimizer so that step t = 1, 2, …, of those that it takes, has `factor_of(t)` times its rates.

    What else is written to the groups meanwhile stays.
    """
    step, taken = optimizer.step, 0

    @functools.wraps(step)
    def patched(optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        nonlocal taken
        taken += 1
        rates: list[tuple[Any, Any]] = []  # of each group, the object that was there, and the one in its place

        @torch.no_grad()
        def multiply() -> None:
            for group in optimizer.param_groups:
                rates.append((group["lr"], group["lr"] * factor_of(taken)))
                group["lr"] = rates[-1][1]

        def then() -> Any:
            assert closure is not None
            loss = closure()
            multiply()
            return loss

        try:
            if closure is not None:
                return step(then)
            multiply()
            return step()
        finally:
            for group, (before, during) in zip(optimizer.param_groups, rates, strict=False):
                if group["lr"] is during:
                    group["lr"] = before

    optimizer.step = types.MethodType(patched, optimizer)  # type: ignore[method-assign]

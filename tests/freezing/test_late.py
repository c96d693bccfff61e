"""When code runs that is to run right before an optimizer's update."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_gcfreeze.freezing.late import right_before_update


class Told(torch.optim.SGD):
    """Notes when it updates; evaluates a closure as often as it is told."""

    def __init__(self, log: list[str], times: int = 1) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], 0.1)
        self.log, self.times = log, times

    def step(self, closure: Any = None, *more: Any) -> Any:
        loss = None
        for _ in range(self.times if closure else 0):
            loss = closure()
        self.log.append("update")
        return loss, more


def step(times: int, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    log: list[str] = []
    optimizer = Told(log, times)

    def before(optimizer: Any, args: Any, kwargs: Any) -> Any:
        return right_before_update(args, kwargs, lambda: log.append("begin"), lambda: log.append("undo"))

    def closure() -> str:
        log.append("closure")
        return "loss"

    optimizer.register_step_pre_hook(before)
    given = [closure if value == "closure" else value for value in args]
    return optimizer.step(*given, **dict.fromkeys(kwargs, closure)), log


@pytest.mark.parametrize("place", ["positional", "by name"])
def test_code_runs_after_the_closure_whose_value_is_returned(place):
    found, log = step(1, "closure", "more") if place == "positional" else step(1, closure="closure")
    assert found == ("loss", ("more",) if place == "positional" else ())
    assert log == ["undo", "closure", "begin", "update"]


def test_code_runs_at_once_without_a_closure():
    assert step(1) == ((None, ()), ["begin", "update"])


def test_code_is_taken_back_before_a_second_evaluation():
    assert step(2, "closure")[1] == ["undo", "closure", "begin"] * 2 + ["update"]

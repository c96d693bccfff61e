"""`LearningRates` around the steps of an optimizer, by hand."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gcfreeze.freezing import LearningRates, groups_without_rate


class Spied(torch.optim.SGD):
    """Notes the rates that it steps with."""

    def __init__(self, *rates: Any) -> None:
        super().__init__([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates], foreach=False)
        self.during: list[list[float]] = []

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        self.during.append([float(group["lr"]) for group in self.param_groups])
        return loss


def attach(optimizer: torch.optim.Optimizer, factor: float = 0.5) -> LearningRates:
    rates = LearningRates(optimizer)
    optimizer.register_step_pre_hook(lambda _, args, kwargs: rates.before_step(args, kwargs, factor))
    return rates


def rates_of(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


def tensor(value: float = 0.1) -> Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize("make", [lambda: 0.1, lambda: 1, tensor, lambda: torch.tensor([0.1])])
def test_rate_is_put_back_as_the_object_with_the_bits_that_it_was(make):
    """During the step it is the factor's multiple; also a tensor that two groups share is multiplied once."""
    rate = make()
    before = float(rate)
    optimizer = Spied(rate, rate, 0.0, 1e-300)
    rates = attach(optimizer, factor=0.1)  # whose inverse does not take it back
    optimizer.step()
    assert optimizer.during[0] == pytest.approx([before * 0.1, before * 0.1, 0.0, 1e-301], rel=1e-6)
    assert not rates.restore_()
    assert rates_of(optimizer)[0] is rate
    assert rates_of(optimizer)[1] is rate
    assert float(rate) == before


def test_tensor_that_an_optimizer_holds_on_to_is_changed_in_place_itself():
    rate = tensor()
    optimizer = Spied(rate)
    rates = attach(optimizer)
    optimizer.step()
    assert rates_of(optimizer)[0] is rate
    assert rate == 0.1 * 0.5
    rates.restore_()
    assert rate == tensor()


def test_closure_sees_the_whole_rate_also_when_it_is_evaluated_twice():
    """What it sets is multiplied, and kept."""
    optimizer, seen = Spied(0.1), []
    rates = attach(optimizer)

    def closure() -> None:
        seen.append(rates_of(optimizer)[0])
        optimizer.param_groups[0]["lr"] += 1.0

    _, wrapped = rates.before_step((optimizer, closure), {}, 0.5)[0]
    wrapped()
    wrapped()
    assert seen == [0.1, 1.1]
    assert rates_of(optimizer) == [2.1 * 0.5]
    rates.restore_()
    assert rates_of(optimizer) == [2.1]
    optimizer.step(closure)
    assert optimizer.during == [[3.1 * 0.5]]


def test_group_that_the_closure_adds_is_multiplied_too():
    optimizer = Spied(0.1)
    rates = attach(optimizer)
    optimizer.step(lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3}))
    assert optimizer.during == [[0.05, 0.15]]
    assert not rates.restore_()
    assert rates_of(optimizer) == [0.1, 0.3]


@pytest.mark.parametrize("how", ["next step", "saved state", "released"])
@pytest.mark.parametrize("rate", [0.1, tensor()], ids=["float", "tensor"])
def test_step_without_an_end_is_undone_when_its_rates_would_be_seen(rate, how):
    """A step that raised has no end."""
    optimizer = Spied(rate)
    rates = attach(optimizer)
    optimizer.step()
    assert float(rates_of(optimizer)[0]) == pytest.approx(0.05)
    if how == "next step":
        optimizer.step()
        assert optimizer.during[1] == optimizer.during[0]
        rates.restore_()
    elif how == "saved state":
        assert float(optimizer.state_dict()["param_groups"][0]["lr"]) == float(rate)
    else:
        rates.release()
    assert rates_of(optimizer)[0] is rate
    assert float(rate) == (tensor() if isinstance(rate, Tensor) else 0.1)


def test_release_leaves_no_hook():
    optimizer = Spied(0.1)
    before = len(optimizer._optimizer_state_dict_pre_hooks)
    rates = LearningRates(optimizer)
    assert len(optimizer._optimizer_state_dict_pre_hooks) == before + 1
    rates.release()
    assert len(optimizer._optimizer_state_dict_pre_hooks) == before


class Around(torch.optim.Optimizer):
    """Wraps another optimizer, and leaves its own base class uninitialised, as pytorch_optimizer's OrthoGrad does."""

    def __init__(self, inside: Spied) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._patch_step_function()
        self.inside = inside

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inside.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inside.step(closure)


def test_wrapper_without_hooks_on_its_saved_state_is_served():
    """Its rates are multiplied, put back after the step, and put back by `release` if the step has no end."""
    optimizer = Around(Spied(0.1))
    rates = attach(optimizer)
    optimizer.step()
    assert not rates.restore_()
    assert rates_of(optimizer) == [0.1]
    optimizer.step()
    assert optimizer.inside.during == [[0.05], [0.05]]
    rates.release()
    assert rates_of(optimizer) == [0.1]


@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("rate", [0.1, tensor()], ids=["float", "tensor"])
def test_rate_that_the_step_sets_itself_is_told_and_stays(rate, factor):
    """The next step, which sets none, is told apart; with a factor of 1 as well."""

    class Sets(Spied):
        sets = True

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if self.sets and isinstance(rate, Tensor):
                self.param_groups[0]["lr"].fill_(7.0)
            elif self.sets:
                self.param_groups[0]["lr"] = 7.0

    optimizer = Sets(rate, 0.3)
    rates = attach(optimizer, factor)
    optimizer.step()
    assert rates.restore_()
    assert rates_of(optimizer) == [7.0, 0.3]
    optimizer.sets = False
    optimizer.step()
    assert not rates.restore_()
    assert optimizer.during[1] == pytest.approx([7.0 * factor, 0.3 * factor])


def test_rate_that_the_step_puts_back_itself_is_its_own_affair():
    class PutsBack(Spied):
        def step(self, closure: Any = None) -> Any:
            (group,) = self.param_groups
            before = group["lr"]
            group["lr"] = before * 0.5
            if closure:
                closure()
            self.during.append([group["lr"]])
            group["lr"] = before

    for closure in (None, lambda: None):
        optimizer = PutsBack(0.1)
        rates = attach(optimizer, 0.25)
        optimizer.step(closure)
        assert optimizer.during == [[0.1 * 0.5 * 0.25]]
        assert not rates.restore_()
        assert rates_of(optimizer) == [0.1]


def test_groups_whose_rate_is_no_number_are_found():
    optimizer = Spied(0.1, 1, tensor(), torch.tensor([0.1]), torch.tensor(0.1, dtype=torch.float64))
    assert groups_without_rate(optimizer) == {}
    for i, value in enumerate((None, "auto", True, torch.tensor(1))):
        optimizer.param_groups[i]["lr"] = value
    del optimizer.param_groups[4]["lr"]
    assert groups_without_rate(optimizer) == {0: None, 1: "auto", 2: True, 3: torch.tensor(1), 4: None}


class Copying(torch.optim.Optimizer):
    """Steps by an optimizer with groups of its own, as ZeroRedundancyOptimizer does."""

    def __init__(self, inside: Spied) -> None:
        self.inside = inside
        super().__init__([{"params": group["params"], "lr": group["lr"]} for group in inside.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        self._copy_rates(self, self.inside)
        loss = self.inside.step(closure)
        self._copy_rates(self.inside, self)
        return loss

    @staticmethod
    def _copy_rates(source: torch.optim.Optimizer, target: torch.optim.Optimizer) -> None:
        for a, b in zip(source.param_groups, target.param_groups, strict=True):
            b["lr"] = a["lr"]


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_rate_that_the_step_has_copied_before_its_closure_is_told(factor):
    """The factor is lost on the copy, and a factor of 1 tells before it matters."""
    optimizer = Copying(Spied(0.1))
    rates = attach(optimizer, factor)
    optimizer.step(lambda: None)
    assert optimizer.inside.during == [[0.1]]
    assert rates.restore_()
    assert rates_of(optimizer) == [0.1]


@pytest.mark.parametrize(("rate", "closure"), [(0.1, None), (tensor(), None), (tensor(), lambda: None)])
def test_rate_that_the_step_copies_with_the_factor_is_served(rate, closure):
    """Without a closure the copy is multiplied already, and a tensor is the same one in both."""
    optimizer = Copying(Spied(rate))
    rates = attach(optimizer)
    for _ in range(2):
        optimizer.step(closure)
        assert not rates.restore_()
        assert rates_of(optimizer)[0] is rate
        assert rate == (tensor() if isinstance(rate, Tensor) else 0.1)
    assert optimizer.inside.during == [[pytest.approx(0.05)]] * 2

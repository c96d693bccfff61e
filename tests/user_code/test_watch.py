"""Accesses to gradients while a run observes are recorded, also of code that reading byte code does not find."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.user_code.reached import Owners
from lightning_gcfreeze.user_code.readers import gradient_readers
from lightning_gcfreeze.user_code.watch import GradientWatch
from tests import cases


class Hidden(cases.Regression):
    """Does something by a name that no reading of its code leads to."""

    def __init__(self, act: Any) -> None:
        super().__init__(cases.mlp())
        self.__dict__["_act"] = act

    def on_train_batch_end(self, *args: Any) -> None:
        vars(self)["_" + "act"](self)


class TestGradientWatch:
    """Code that asks for gradients while a run observes is recorded, however it does so."""

    def test_code_that_reading_does_not_find_is_recorded_and_gradients_stay(self):
        """Gradients stay, also in a run that goes on from a checkpoint after the freeze."""
        norms: list[float] = []

        def measure(module: nn.Module) -> None:
            norms.append(sum(float(p.grad.norm()) for p in module.parameters()))

        module = Hidden(measure)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        assert gradient_readers(Owners(module), dict(module.named_parameters()), optimizer) == []
        callback = GradCovFreezeCallback(t0=3, k=0.8)
        trainer = cases.trainer(callbacks=[callback])
        trainer.fit(module, cases.loader())
        assert len(norms) == 16
        assert callback.savings.after.gradients == callback.savings.before.gradients
        (reader,) = callback.state_dict()["gradient_readers"]
        assert "test_watch.py:" in reader
        assert all(type(p) is nn.Parameter for p in module.parameters())

    def test_accesses_of_lightning_torch_and_the_callback_are_not_recorded(self):
        """Clipping, accumulation, stepping and observing ask for gradients all the time."""
        callback = GradCovFreezeCallback(t0=9, k=0.8, samples="all")
        cases.trainer(callbacks=[callback], gradient_clip_val=0.5, max_epochs=4).fit(
            cases.Regression(cases.mlp()), cases.loader()
        )
        assert callback.state_dict()["gradient_readers"] == []
        assert callback.savings.after.gradients < callback.savings.before.gradients

    def test_watched_parameters_are_copied_and_pickled_as_plain_ones(self):
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        watch = GradientWatch([parameter])
        watch.arm()
        try:
            copied = copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))
            assert parameter.grad.tolist() == [1.0, 1.0]
            del parameter.grad
            assert parameter.grad is None
        finally:
            watch.disarm()
        assert [type(p) for p in (*copied, parameter)] == [nn.Parameter] * 3
        assert len(watch.seen) == 3


def test_frozen_values_that_hidden_code_writes_to_are_an_error():
    """Within two steps, by name; what is put back anyhow is none."""

    def decay(module: nn.Module) -> None:
        for p in module.parameters():
            p.detach().mul_(0.99)

    for hold, wrong in (("auto", True), ("compact", True), ("restore", False)):
        trainer = cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=0.8, hold=hold)])
        if wrong:
            with pytest.raises(RuntimeError, match=r"network.*has written to frozen elements.*hold='restore'"):
                trainer.fit(Hidden(decay), cases.loader())
            assert trainer.global_step <= 5
        else:
            with pytest.warns(UserWarning, match="the fit ends with other values of frozen elements"):
                trainer.fit(Hidden(decay), cases.loader())

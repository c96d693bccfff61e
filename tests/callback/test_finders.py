"""Lightning's finders, called in the middle of training: their trials leave no trace in the run."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases
from tests.callback.finders import FindsBatchSize, FindsRate, Tuned

FINDS_AT = [0, 1, 3]
"""Epochs of 8 steps: two before the freeze at t0 = 20, one after it."""


class Constant(pl.Callback):
    """Checks after each batch that what froze has the bits of the freeze."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback, self.frozen_from = callback, 0
        self.values: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        now = {name: p.detach().clone() for name, p in module.named_parameters()}
        if self.callback.phase == "frozen" and not self.values:
            self.values, self.frozen_from = now, trainer.global_step
        for name, value in self.values.items():
            assert torch.equal(now[name][self.callback.frozen[name]], value[self.callback.frozen[name]])


def run(
    *finders: pl.Callback, last: bool = False, epochs: int = 5, **arguments: Any
) -> tuple[dict[str, Any], Constant]:
    callback = GradCovFreezeCallback(t0=20, k=0.5, **arguments)
    watch, module = Constant(callback), Tuned()
    callbacks = [callback, *finders] if last else [*finders, callback]
    cases.trainer(callbacks=[*callbacks, watch], max_epochs=epochs).fit(module)
    return dict(module.state_dict()), watch


@pytest.mark.parametrize("hold", ["auto", "compact", "restore"])
@pytest.mark.parametrize("epoch", FINDS_AT)
@pytest.mark.parametrize("last", [False, True], ids=["before ours", "after ours"])
def test_learning_rate_finder_during_training_leaves_every_bit_unchanged(hold, epoch, last):
    """Its 40 trial steps, more than t0, are not counted."""
    finder = FindsRate(num_training_steps=40, update_attr=False)
    finder.epoch = epoch
    found, watch = run(finder, last=last, hold=hold)
    assert finder.tried == 1
    assert epoch or len(finder.optimal_lr.results["loss"]) > 20  # later ones Lightning ends after a step
    assert watch.frozen_from == 20
    expected, _ = run(hold=hold)
    cases.assert_identical(found, expected)


@pytest.mark.parametrize("hold", ["compact", "restore"])
@pytest.mark.parametrize("epoch", FINDS_AT)
def test_steps_of_a_batch_size_finder_are_not_counted(hold, epoch):
    """The run goes on with larger batches; the freeze comes after 20 steps of its own."""
    finder = FindsBatchSize(steps_per_trial=3, init_val=8, max_trials=2)
    finder.epoch = epoch
    _, watch = run(finder, epochs=9, hold=hold)
    assert finder.tried == 1
    assert finder.optimal_batch_size > 8
    assert watch.frozen_from == 20
    assert watch.callback.state_dict()["steps"] > 25


def test_steps_under_other_callbacks_keep_frozen_values_and_are_not_counted():
    """Also where no finder restores the weights afterwards."""
    callback = GradCovFreezeCallback(t0=4, k=0.5)

    class Tries(pl.Callback):
        moved = 0.0

        def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            if trainer.current_epoch != 2:
                return
            before = module.network[0].weight.detach().clone()
            callbacks, trainer.callbacks = trainer.callbacks, []
            for x, y in cases.loader():
                trainer.optimizers[0].zero_grad()
                torch.nn.functional.mse_loss(module.network(x), y).backward()
                trainer.optimizers[0].step()
            trainer.callbacks = callbacks
            self.moved = float((module.network[0].weight.detach() - before).abs().max())

    tries, watch = Tries(), Constant(callback)
    cases.trainer(callbacks=[tries, callback, watch], max_epochs=4).fit(cases.Regression(cases.mlp()), cases.loader())
    assert tries.moved > 0
    assert watch.frozen_from == 4
    assert callback.state_dict()["steps"] == 32

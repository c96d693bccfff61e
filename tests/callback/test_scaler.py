"""Steps that a loss scaler leaves out count for nothing, whoever leaves them out: the scaler, or a fused optimizer.

`torch.amp.GradScaler` does not call an ordinary optimizer when a gradient overflows, so that no hook runs. A fused one
it does call, and tells it in `found_inf`; then the hooks run, and nothing has moved.
"""

from collections.abc import Collection
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.testing import assert_close

from lightning_gcfreeze import GradCovFreezeCallback, Growth, Settled, observing
from tests import cases, insides
from tests.oracles.freezing import PlainFreeze

T0, BATCHES = 4, 16
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, fused=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.3, fused=True),
}
# Not in the first batch: torch's fused SGD goes on with a momentum that it never set, if its first step overflows.
OVERFLOWS = {"before t0": {1, 2, 4}, "at t0": {3, 4}, "after t0": {8, 9, 12}, "before and after": {1, 2, 7, 13, 15}}


class Overflowing(cases.Regression):
    """A regression whose gradients overflow in some batches, counted from the start of training."""

    def __init__(self, optimizer: Any, overflowing: Collection[int]) -> None:
        super().__init__(cases.mlp(), optimizer)
        self.overflowing = overflowing

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.current_epoch * 8 + batch_idx in self.overflowing else loss


class Looking(Overflowing):
    """Has a hook that may look at gradients, so that they stay where they are until the step."""

    def on_after_backward(self) -> None: ...


class Moves(pl.Callback):
    """After which batches the weights have moved, and after which the callback has frozen."""

    def __init__(self, callback: GradCovFreezeCallback | None = None) -> None:
        self.callback, self.batch, self.frozen_after = callback, 0, -1
        self.moved: set[int] = set()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if any((p != q).any() for p, q in zip(pl_module.parameters(), self.before, strict=True)):
            self.moved.add(self.batch)
        if self.frozen_after < 0 and self.callback and self.callback.phase == "frozen":
            self.frozen_after = self.batch
        self.batch += 1


def train(module: pl.LightningModule, *callbacks: pl.Callback) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    cases.trainer(callbacks=[*callbacks], plugins=plugins).fit(module, cases.loader())


@pytest.mark.parametrize("asks", ["at once", "later"])
@pytest.mark.parametrize("hold", ["auto", "auto, looking", "restore"])
@pytest.mark.parametrize("overflows", OVERFLOWS.values(), ids=OVERFLOWS.keys())
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_step_that_overflows_is_neither_counted_nor_observed(monkeypatch, optimizer, overflows, hold, asks):
    """t0 successful steps are observed and the freeze comes right after the last; the end is the plain reference's.

    Whether a gradient was finite the callback learns at once on a CPU, and with the next step on a GPU.
    """
    if asks == "later":
        monkeypatch.setattr(observing, "_is_free_to_read", lambda total: False)
    kind: type[Overflowing] = Looking if hold == "auto, looking" else Overflowing
    callback = GradCovFreezeCallback(t0=T0, k=0.5, hold=hold.split(",")[0])  # type: ignore[arg-type]
    module, moves = kind(optimizer, overflows), Moves(callback)
    train(module, callback, moves)

    successful = [batch for batch in range(BATCHES) if batch not in overflows]
    assert moves.moved == set(successful)
    assert moves.frozen_after == successful[T0 - 1]
    assert callback.state_dict()["steps"] == len(successful)
    assert insides.observed_steps_of(callback) == T0
    assert insides.skipped_steps_of(callback) == len([batch for batch in overflows if batch < successful[T0 - 1]])

    plain = kind(optimizer, overflows)
    train(plain, PlainFreeze(moves.frozen_after + 1, callback.frozen))  # Lightning counts what the scaler leaves out
    for name, p in module.named_parameters():
        frozen, expected = callback.frozen[name], plain.get_parameter(name)
        assert torch.equal(p[frozen], expected[frozen])
        assert_close(p, expected, rtol=1e-3, atol=1e-4)  # gradients are rounded to half precision


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("t0", [6, Settled(max_t0=6, first=2)], ids=["given", "settled"])
def test_recorded_loss_does_not_depend_on_the_loss_scale(t0, accumulate):
    """Each loss is 7 before it is scaled, by a scale that doubles after every third step."""

    class Constant(cases.Regression):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss - loss.detach() + 7.0

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    callback = GradCovFreezeCallback(t0=t0, k=Growth(every=3, stages=2, forecast=False))
    trainer = cases.trainer(callbacks=[callback], plugins=plugins, accumulate_grad_batches=accumulate)
    trainer.fit(Constant(cases.mlp()), cases.loader(samples=8 * 12 * accumulate))
    assert scaler.get_scale() == 2.0**9  # no step was skipped
    growing = insides.plan_of(callback).growing
    assert growing.reference.value == pytest.approx(7.0)
    assert (growing.increase, growing.stage) == (pytest.approx(0.0, abs=1e-6), 1)

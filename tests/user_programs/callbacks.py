"""Hooks of the user's callbacks."""

from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from tests.user_programs.case import changes, halve, norm


@changes()
class CallbackBeforeZeroGrad(pl.Callback):
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.02 / (1.0 + norm(pl_module.parameters()))


@changes(accumulate=2)
class CallbackBeforeBackward(pl.Callback):
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        halve(pl_module.parameters())


@changes()
class CallbackAfterBackward(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 0.5)


@changes()
class CallbackBeforeStep(pl.Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.clamp_(-0.01, 0.01)


@changes(accumulate=2)
class CallbackBatchStart(pl.Callback):
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.mul_(0.1)


@changes(accumulate=2)
class CallbackBatchEnd(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.mul_(0.1)


@changes()
class CallbackEpochStartResetsMomentum(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for p in pl_module.parameters():
            if p in trainer.optimizers[0].state:
                trainer.optimizers[0].state[p]["momentum_buffer"].fill_(0.0)


@changes()
class CallbackBatchStartRaisesMomentum(pl.Callback):
    """Of single parameters, by name."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for name, p in pl_module.named_parameters():
            if name.endswith("weight") and p in trainer.optimizers[0].state:
                trainer.optimizers[0].state[p]["momentum_buffer"].mul_(0.5)


@changes()
class CallbackSetsLearningRateByNorm(pl.Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.02 / (1.0 + norm(pl_module.parameters()))

"""Code that overrides a hook and leaves gradients alone."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.user_programs.case import Net, Setup, harmless


@harmless
class StepWarmsUp(Net):
    """The warm-up of Lightning's documentation."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 8:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * min(1.0, (self.trainer.global_step + 1) / 8)


@harmless
class BatchEndLogs(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("loss", outputs["loss"])


@harmless
class BatchEndReadsWeights(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("norm", sum(p.detach().square().sum() for p in self.parameters()))


@harmless
class EpochEndLogs(Net):
    def on_train_epoch_end(self) -> None:
        self.log("weight", self.network[0].weight.detach().norm())


@harmless
class SchedulesRates(Net):
    """A scheduler of torch's replaces `optimizer.step` by a counting one."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@harmless
class AveragesWeights(pl.Callback):
    """An exponential moving average, in a callback."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.averages = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for name, p in pl_module.named_parameters():
            self.averages[name].lerp_(p.detach(), 0.1)


@harmless
class CountsBatches(pl.Callback):
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches = batch_idx + 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.batches == 6


@harmless
class StrategySavesItsWay(SingleDeviceStrategy):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...


@harmless
def callbacks_of_lightning(setup: Setup) -> None:
    setup.callbacks += [
        pl.callbacks.EarlyStopping("loss", strict=False, check_on_train_epoch_end=False),
        pl.callbacks.Timer(),
        pl.callbacks.LambdaCallback(on_train_epoch_start=lambda trainer, module: None),
    ]


@harmless
def forward_hook_on_layer(setup: Setup) -> None:
    setup.module.network[2].register_forward_hook(lambda layer, x, y: None)

"""Modules and callbacks that Lightning's finders try."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from tests import cases


class InMiddleOfTraining:
    """What Lightning's documentation shows: a finder that starts with an epoch, not with the fit."""

    epoch = -1
    tried = 0

    def on_fit_start(self, *args: Any) -> None: ...

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            self.tried += 1
            self.find(trainer, module)

    def find(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        raise NotImplementedError


class FindsRate(InMiddleOfTraining, LearningRateFinder):
    find = LearningRateFinder.lr_find


class FindsBatchSize(InMiddleOfTraining, BatchSizeFinder):
    find = BatchSizeFinder.scale_batch_size


class Tuned(cases.Regression):
    """Has what finders look for."""

    def __init__(self) -> None:
        super().__init__(cases.mlp())
        self.lr, self.batch_size = 0.01, 8

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.1)

    def train_dataloader(self) -> Any:
        return cases.loader(self.batch_size)

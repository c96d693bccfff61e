"""Runs that are interrupted after a batch, and resumed from the checkpoint of that moment."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases

T0, STEPS = 7, 18
ARGUMENTS: dict[str, Any] = {"t0": T0, "k": 0.5}


class Interrupted(Exception):
    """Raised by `SaveAndStop`."""


class SaveAndStop(pl.Callback):
    """Saves a checkpoint after so many batches, and raises `Interrupted`."""

    def __init__(self, path: Path, after_batches: int) -> None:
        self.path, self.left = path, after_batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise Interrupted


def module() -> cases.Regression:
    return cases.Regression(cases.convnet(), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3))


def run(callback: GradCovFreezeCallback | None, *more: pl.Callback, ckpt: Path | None = None, **kwargs: Any) -> Any:
    """Return weights, optimizer and callback after STEPS steps: three shuffled epochs, with dropout."""
    torch.manual_seed(5)
    network = module()
    trainer = cases.trainer(callbacks=[*([callback] if callback else []), *more], max_epochs=3, **kwargs)
    trainer.fit(network, cases.ResumableLoader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return {
        "weights": network.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "callback": callback.state_dict() if callback else None,
        "ranks": callback.ranks if callback else None,
        "frozen": callback.frozen if callback else None,
    }


class DropoutByStep(pl.Callback):
    """Seeds dropout by the step, since a Lightning checkpoint has no random state."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        torch.manual_seed(1000 + trainer.global_step)


def interrupted(path: Path, after: int, arguments: dict[str, Any], **kwargs: Any) -> Any:
    """Interrupt a run after so many batches, resume from its checkpoint at `path`, and return what `run` returns."""
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(**arguments), DropoutByStep(), SaveAndStop(path, after), **kwargs)
    return run(GradCovFreezeCallback(**arguments), DropoutByStep(), ckpt=path, **kwargs)

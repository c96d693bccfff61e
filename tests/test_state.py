"""Checkpoints of version 0.1, format 5, are read. `tests/format_5.py` writes their layout down by hand."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_gcfreeze import FreezeSchedule, GradCovFreezeCallback, Growth, Settled
from tests import cases
from tests.format_5 import as_format_5

ARGUMENTS: dict[str, dict[str, Any]] = {
    "variance, while observing": {"t0": 9, "k": 0.5},
    "full covariance, frozen": {"t0": 6, "k": 9, "covariance": "full"},
    "magnitude, frozen": {"t0": 6, "k": 0.5, "order": "magnitude"},
    "stages that thaw, between two": {"schedule": FreezeSchedule([(4, 0.6), (8, 0.3), (12, 0.5)], monotone=False)},
    "from the data": {
        "t0": Settled(max_t0=6, first=2),
        "k": Growth(every=2, patience=2, stages=2, max_loss_increase=0.5),
        "order": "progress",
    },
}
PROPERTIES = ("phase", "frozen", "frozen_fraction", "variance", "covariance")


class SaveAtSeven(pl.Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.path)


def fit(
    arguments: dict[str, Any], *more: pl.Callback, ckpt: Any = None
) -> tuple[cases.Regression, GradCovFreezeCallback]:
    module = cases.Regression(cases.mlp(), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3))
    callback = GradCovFreezeCallback(**arguments)
    trainer = cases.trainer(callbacks=[callback, *more], max_epochs=3)
    trainer.fit(module, cases.ResumableLoader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module, callback


@pytest.mark.parametrize("name", ARGUMENTS)
def test_run_resumed_from_a_checkpoint_of_format_5_ends_with_the_bits_of_the_unbroken_run(name, tmp_path):
    """Its properties are those of the checkpoint of today, as soon as it is loaded."""
    unbroken, whole = fit(ARGUMENTS[name], SaveAtSeven(tmp_path / "run.ckpt"))
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    today = checkpoint["callbacks"]["GradCovFreezeCallback"]
    checkpoint["callbacks"]["GradCovFreezeCallback"] = as_format_5(today)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    loaded = [GradCovFreezeCallback(**ARGUMENTS[name]) for _ in range(2)]
    for callback, state in zip(loaded, (as_format_5(today), today), strict=True):
        callback.load_state_dict(state)
    for name_of_property in PROPERTIES:
        cases.assert_identical(*(getattr(callback, name_of_property) for callback in loaded))
    assert loaded[0].variance or "order" in ARGUMENTS[name]
    resumed, callback = fit(ARGUMENTS[name], ckpt=tmp_path / "old.ckpt")
    cases.assert_identical(resumed.state_dict(), unbroken.state_dict())
    states = [one.state_dict() for one in (callback, whole)]
    for state in states:
        del state["source"]  # after the last decision format 5 forgot how gradients had been computed
        del state["history"]  # format 5 had none
    cases.assert_identical(*states)


def test_arguments_that_settled_and_growth_have_replaced_are_converted(tmp_path):
    """A run with ``t0="auto", max_t0=6`` goes on as one with ``t0=Settled(max_t0=6)``."""
    arguments = {"t0": Settled(max_t0=6), "k": Growth(max_loss_increase=0.5), "order": "progress"}
    unbroken, _ = fit(arguments, SaveAtSeven(tmp_path / "run.ckpt"))
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    old = as_format_5(checkpoint["callbacks"]["GradCovFreezeCallback"])
    old["arguments"] |= {"t0": "auto", "max_t0": 6, "k": "auto", "max_loss_increase": 0.5}
    checkpoint["callbacks"]["GradCovFreezeCallback"] = old
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed, _ = fit(arguments, ckpt=tmp_path / "old.ckpt")
    cases.assert_identical(resumed.state_dict(), unbroken.state_dict())

"""Two workers of Ray Train, or two processes of torchrun, train the same, and each leaves what it saw in a file.

As a script it trains with every preset, without Ray: `torchrun --nproc-per-node=2 tests/libraries/ray_train.py FOLDER`.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases
from tests.libraries.watch import QUIET, Watch

EPOCHS, STEPS_PER_EPOCH = 3, 6
T0 = {"recommended": 4, "paper": 9}
"""By preset: before the checkpoint that is resumed from, and after."""


def freeze(preset: Any) -> GradCovFreezeCallback:
    """The callback of a preset."""
    return GradCovFreezeCallback.preset(preset, t0=T0[preset], k=0.7)


class Sent(Logger):
    """Keeps how many bytes of gradients a process passed on at each step."""

    name, version = "sent", 0

    def __init__(self) -> None:
        super().__init__()
        self.of_steps: list[float] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        if (sent := metrics.get("gcfreeze/gradient_bytes_sent")) is not None:
            self.of_steps.append(sent)

    def log_hyperparams(self, params: Any) -> None: ...


class FailOnce(pl.Callback):
    """Ends rank 1 in the middle of the second epoch."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == STEPS_PER_EPOCH + 2 and trainer.global_rank == 1:
            raise RuntimeError("This machine is gone.")


class Save(pl.Callback):
    """Saves when Ray's callback does: saving averages the statistics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / "plain.ckpt")


def train(
    folder: Path,
    callback: GradCovFreezeCallback,
    trainer_of: Any,
    *callbacks: pl.Callback,
    ckpt_path: str | None = None,
    **kwargs: Any,
) -> None:
    """Fit, and write the weights of all steps, the masks, the variance, and the bytes that were sent in each step.

    Args:
        folder: where to.
        callback: ours.
        trainer_of: called with the Trainer's arguments.
        callbacks: further ones.
        ckpt_path: what to resume from.
        kwargs: further arguments of the Trainer.
    """
    watch, sent = Watch(), Sent()
    trainer = trainer_of(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[callback, watch, *callbacks], default_root_dir=folder,
        log_every_n_steps=1, **(QUIET | {"logger": sent}), **kwargs,
    )  # fmt: skip
    module = cases.Regression(cases.deep_mlp(16), lambda p: torch.optim.AdamW(p, 0.01))
    trainer.fit(module, cases.loader(4, 2 * 4 * STEPS_PER_EPOCH), ckpt_path=ckpt_path)
    seen = {"of_steps": watch.of_steps, "frozen": callback.frozen, "variance": callback.variance}
    seen["sent"] = sent.of_steps
    about = {"world_size": trainer.world_size, "strategy": type(trainer.strategy).__name__}
    torch.save(seen | about, folder / f"{trainer.global_rank}.pt")


def worker(config: dict[str, Any]) -> None:
    """Train as a worker of Ray's, with one callback after the other, from Ray's last checkpoint if there is one."""
    import ray.train
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

    checkpoint = ray.train.get_checkpoint()
    fails = [FailOnce()] if config["fails"] and checkpoint is None else []
    with checkpoint.as_directory() if checkpoint else contextlib.nullcontext() as saved:
        for folder, callback in config["callbacks"].items():
            train(
                Path(folder), callback, lambda **kwargs: prepare_trainer(pl.Trainer(**kwargs)),
                RayTrainReportCallback(), *fails, ckpt_path=f"{saved}/checkpoint.ckpt" if saved else None,
                devices="auto", strategy=RayDDPStrategy(), plugins=[RayLightningEnvironment()],
            )  # fmt: skip


if __name__ == "__main__":
    for name in T0:
        (here := Path(sys.argv[1]) / name).mkdir(exist_ok=True)
        train(here, freeze(name), pl.Trainer, Save(here), devices=2, strategy="ddp")
        print(f"{name} is done", flush=True)

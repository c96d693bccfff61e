"""Runs that save every few steps, to be killed or signalled, and what they have to end like."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases

T0, EVERY, STEPS = 7, 3, 18  # checkpoints at 3, 6, 9, …; three epochs of 6 batches
TIMEOUT = 40  # seconds until a collective is given up; the ranks may also start that far apart


class Shard(cases.ResumableLoader):
    """Gives a rank its samples of each batch, as DistributedSampler would; resumes in the middle of an epoch."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(batch_size=8)
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield [part[self.rank :: self.world_size] for part in batch]


class Watch(pl.Callback):
    """Keeps the batches that a rank saw, and the weights right after the freeze."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.at_freeze: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self.batches.append(batch[0].clone())

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step == T0:
            self.at_freeze = {name: p.detach().clone() for name, p in module.named_parameters()}


class Signal(pl.Callback):
    """Sends a signal to its own process after a step, on one rank or on all."""

    def __init__(self, number: signal.Signals, step: int, rank: int | None = None) -> None:
        self.number, self.step, self.rank = number, step, rank

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            Path(trainer.default_root_dir, "signalled").write_text(str(time.monotonic()))
            os.kill(os.getpid(), self.number)


def run(folder: Path, *more: pl.Callback, ckpt: Path | None = None, devices: int = 1, **kwargs: Any) -> dict[str, Any]:
    """Train up to STEPS; return weights, states and masks at the end, and the batches and weights on the way."""
    torch.manual_seed(5)
    freeze, watch = GradCovFreezeCallback(t0=T0, k=0.5), Watch()
    module = cases.Regression(cases.mlp(), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3))
    save = ModelCheckpoint(
        folder / "steps", "{step}", auto_insert_metric_name=False, every_n_train_steps=EVERY, save_top_k=-1
    )
    trainer = cases.trainer(
        callbacks=[freeze, watch, save, *more],
        devices=devices,
        strategy=DDPStrategy(timeout=timedelta(seconds=TIMEOUT)) if devices > 1 else "auto",
        max_epochs=3,
        enable_checkpointing=True,
        default_root_dir=folder,
        **kwargs,
    )
    loader = Shard(trainer.global_rank, trainer.world_size)
    trainer.fit(module, loader, ckpt_path=ckpt, weights_only=True)
    assert trainer.global_step == STEPS
    return {
        "weights": {name: p.detach().clone() for name, p in module.named_parameters()},
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "callback": freeze.state_dict(),
        "frozen": freeze.frozen,
        "batches": watch.batches,
        "at_freeze": watch.at_freeze,
    }


def assert_resumed(resumed: dict[str, Any], unbroken: dict[str, Any], after: int) -> None:
    """Fail unless both runs end alike, saw the same batches from step `after` on, and kept frozen bits since t0."""
    for key in ("frozen", "weights", "optimizer", "callback"):
        cases.assert_identical(resumed[key], unbroken[key], key)
    assert len(unbroken["batches"]) == STEPS
    cases.assert_identical(resumed["batches"], unbroken["batches"][after:])
    for name, frozen in resumed["frozen"].items():
        before, now = unbroken["at_freeze"][name], resumed["weights"][name]
        assert torch.equal(now[frozen], before[frozen]), name
        assert (now != before)[~frozen].all(), name
    assert 0.4 < torch.cat([frozen.flatten() for frozen in resumed["frozen"].values()]).float().mean() < 0.6


def assert_both_ranks_resumed(resumed: dict[str, Any], unbroken: dict[str, Any], after: int) -> None:
    """Fail unless both ranks end alike, and, if resumed after t0, as the unbroken run."""
    if after > T0:
        assert_resumed(resumed, unbroken, after)
    for key in ("frozen", "weights"):
        own = torch.cat([tensor.flatten() for tensor in resumed[key].values()])
        both = [torch.empty_like(own), torch.empty_like(own)]
        torch.distributed.all_gather(both, own)
        assert torch.equal(*both)
        assert own.any()


def last(folder: Path) -> Path | None:
    """Return the checkpoint with the most steps."""
    return max(folder.glob("steps/*.ckpt"), key=lambda file: int(file.stem), default=None)


STEPS_BEFORE_AND_AFTER_T0 = [5, 10]


def slurm(folder: Path, rank: int = 0, processes: int = 1) -> dict[str, str]:
    """Return the environment of a rank of a SLURM job; its `scontrol` writes its arguments to the file "requeued"."""
    scontrol = folder / "bin" / "scontrol"
    if rank == 0:
        scontrol.parent.mkdir()
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/requeued"\n')
        scontrol.chmod(0o755)
    return {
        "PATH": f"{scontrol.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(processes),
        "SLURM_NTASKS_PER_NODE": str(processes),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
    }


def requeued(folder: Path, step: int, number: signal.Signals, devices: int = 1) -> tuple[dict[str, Any], ...]:
    """Run a job that is signalled after a step, and the one that SLURM starts next; return the outcomes of both."""

    def job(*more: pl.Callback) -> dict[str, Any]:
        return run(folder, *more, devices=devices, plugins=[SLURMEnvironment(requeue_signal=number)])

    first = job(Signal(number, step))
    assert torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == step
    return first, job()  # takes hpc_ckpt_1.ckpt by itself

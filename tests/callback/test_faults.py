"""Killed, restarted and signalled runs end as the unbroken one does, to the bit.

The unbroken run saves checkpoints at the same steps as the broken one.
"""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases
from tests.processes.launch import launch

# A run that goes on saves where the one before it did.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

T0, EVERY, STEPS = 7, 3, 18  # checkpoints at 3, 6, 9, …; three epochs of 6 batches
TIMEOUT = 40  # seconds until a collective is given up; the ranks may also start that far apart


class Shard(cases.ResumableLoader):
    """A rank's share of each batch, as DistributedSampler deals it; goes on in the middle of an epoch."""

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
    """Sends a signal to its own process after some step."""

    def __init__(self, number: signal.Signals, step: int, rank: int | None = None) -> None:
        self.number, self.step, self.rank = number, step, rank

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and self.rank in (None, trainer.global_rank):
            Path(trainer.default_root_dir, "signalled").write_text(str(time.monotonic()))
            os.kill(os.getpid(), self.number)


def run(folder: Path, *more: pl.Callback, ckpt: Path | None = None, devices: int = 1, **kwargs: Any) -> dict[str, Any]:
    """One run up to STEPS: what it comes to, and how it came there."""
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
    """The same end, and the same batches on the way from step `after`; what is frozen has kept its bits since t0."""
    for key in ("frozen", "weights", "optimizer", "callback"):
        cases.assert_identical(resumed[key], unbroken[key], key)
    assert len(unbroken["batches"]) == STEPS
    cases.assert_identical(resumed["batches"], unbroken["batches"][after:])
    for name, frozen in resumed["frozen"].items():
        before, now = unbroken["at_freeze"][name], resumed["weights"][name]
        assert torch.equal(now[frozen], before[frozen]), name
        assert (now != before)[~frozen].all(), name
    assert 0.4 < torch.cat([frozen.flatten() for frozen in resumed["frozen"].values()]).float().mean() < 0.6


def assert_agreed(resumed: dict[str, Any], unbroken: dict[str, Any], after: int) -> None:
    """On both ranks the same end; after t0 that of the unbroken run."""
    if after > T0:
        assert_resumed(resumed, unbroken, after)
    for key in ("frozen", "weights"):
        own = torch.cat([tensor.flatten() for tensor in resumed[key].values()])
        both = [torch.empty_like(own), torch.empty_like(own)]
        torch.distributed.all_gather(both, own)
        assert torch.equal(*both)
        assert own.any()


def last(folder: Path) -> Path | None:
    """The checkpoint with the most steps."""
    return max(folder.glob("steps/*.ckpt"), key=lambda file: int(file.stem), default=None)


# Killed ------------------------------------------------------------------------------------------------------------

# torchrun looks at the ranks each second: time for the one that is left to end by itself. SIGTERM would make Lightning
# talk to the dead one.
PATIENT = "--monitor-interval=1"
KILLS = {"observing": (5, 1), "frozen": (11, 0)}  # after which step, and which rank

BREAK = """
import os, signal, sys, time
from pathlib import Path
from tests.callback import test_faults as faults

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
try:
    faults.run(folder, faults.Signal(signal.SIGKILL, {step}, rank={rank}), devices=2)
except RuntimeError as error:
    (folder / "survivor").write_text(f"{{rank}} {{time.monotonic()}} {{error}}")
    raise
"""

RESUME = """
import os, sys
from pathlib import Path
from tests.callback import test_faults as faults

unbroken = faults.run(Path(sys.argv[1]), devices=2)
for folder in {folders}:
    ckpt = faults.last(Path(folder))
    faults.assert_resumed(faults.run(Path(folder), ckpt=ckpt, devices=2), unbroken, after=int(ckpt.stem))
    print(f"rank {{os.environ['RANK']}} resumed from {{ckpt.stem}}", flush=True)
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, CompletedProcess[str]]]:
    """Where a job was broken off in a phase, and how it ended; each is run once."""

    @cache
    def run_once(phase: str) -> tuple[Path, CompletedProcess[str]]:
        folder, (step, rank) = tmp_path_factory.mktemp(phase), KILLS[phase]
        return folder, launch(BREAK.format(step=step, rank=rank), folder, timeout=150, extra_args=[PATIENT])

    return run_once


@pytest.mark.slow
@pytest.mark.parametrize("phase", KILLS)
def test_a_killed_rank_ends_the_other_and_the_job(broken, phase):
    """By an error of the other rank's own, well within the process group's timeout."""
    folder, job = broken(phase)
    assert job.returncode == 1, job.stderr[-6000:]
    killed = float((folder / "signalled").read_text())
    survivor, ended, error = (folder / "survivor").read_text().split(maxsplit=2)
    assert int(survivor) == 1 - KILLS[phase][1]
    assert float(ended) - killed < TIMEOUT / 2
    assert "gloo" in error.lower()


@pytest.mark.slow
def test_after_a_kill_the_last_checkpoint_is_enough(broken, tmp_path):
    """Before and after t0 the next job ends as the unbroken one, having seen the batches that were left."""
    folders = [str(broken(phase)[0]) for phase in KILLS]
    job = launch(RESUME.format(folders=folders), tmp_path, timeout=150)
    for rank in (0, 1):
        for step in (3, 9):
            assert f"rank {rank} resumed from {step}" in job.stdout, job.stderr[-6000:]


ELASTIC = """
import os, signal, sys
from pathlib import Path
from tests.callback import test_faults as faults

folder, restarts = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
ckpt = faults.last(folder)
assert (ckpt is None) == (restarts == 0)
kill = faults.Signal(signal.SIGKILL, 5, rank=1)
resumed = faults.run(folder, *([] if restarts else [kill]), ckpt=ckpt, devices=2)
faults.assert_resumed(resumed, faults.run(folder / "unbroken", devices=2), after=3)
print(f"rank {os.environ['RANK']} ended after {restarts} restart", flush=True)
"""


@pytest.mark.slow
def test_an_elastic_restart_goes_on_by_itself(tmp_path):
    """A script that resumes from what there is, under `torchrun --max-restarts=1`, outlives the loss of a rank."""
    # Else the restarted ranks may find the addresses of those before them: https://github.com/pytorch/pytorch/issues/135712
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    job = launch(ELASTIC, tmp_path, timeout=150, extra_args=["--max-restarts=1", PATIENT], env=own_store)
    assert job.returncode == 0, job.stderr[-6000:]
    assert (tmp_path / "signalled").exists()
    for rank in (0, 1):
        assert f"rank {rank} ended after 1 restart" in job.stdout


# Signalled ---------------------------------------------------------------------------------------------------------

STEPS_BEFORE_AND_AFTER_T0 = [5, 10]


def slurm(folder: Path, rank: int = 0, processes: int = 1) -> dict[str, str]:
    """The environment of a rank of a SLURM job, whose `scontrol` writes down what it is asked."""
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
    """A job that is told to stop after a step, and goes on meanwhile; and the one that SLURM starts next."""

    def job(*more: pl.Callback) -> dict[str, Any]:
        return run(folder, *more, devices=devices, plugins=[SLURMEnvironment(requeue_signal=number)])

    first = job(Signal(number, step))
    assert torch.load(folder / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == step
    return first, job()  # takes hpc_ckpt_1.ckpt by itself


@pytest.mark.parametrize("step", STEPS_BEFORE_AND_AFTER_T0)
def test_a_job_that_slurm_requeues_goes_on(tmp_path, monkeypatch, step):
    """On its signal Lightning saves a checkpoint and asks for another job, which ends as the unbroken one."""
    unbroken = run(tmp_path / "unbroken")
    for name, value in slurm(tmp_path).items():
        monkeypatch.setenv(name, value)
    signalled, resumed = requeued(tmp_path, step, signal.SIGUSR1)
    assert_resumed(resumed, unbroken, after=step)
    cases.assert_identical(signalled, unbroken)
    assert (tmp_path / "requeued").read_text() == "requeue 1234\n"


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from tests.callback import test_faults as faults

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
unbroken = faults.run(folder / "unbroken", devices=2)
for step in faults.STEPS_BEFORE_AND_AFTER_T0:
    try:
        save = OnExceptionCheckpoint(folder, f"sigterm{step}")
        faults.run(folder / "broken", faults.Signal(signal.SIGTERM, step), save, devices=2)
    except SIGTERMException:
        print(f"rank {rank} ended after {step}", flush=True)
    resumed = faults.run(folder / "broken", ckpt=folder / f"sigterm{step}.ckpt", devices=2)
    faults.assert_agreed(resumed, unbroken, step)

os.environ.update(faults.slurm(folder, rank, processes=2))
for step in faults.STEPS_BEFORE_AND_AFTER_T0:
    signalled, resumed = faults.requeued(folder / str(step), step, signal.SIGUSR1, devices=2)
    faults.assert_agreed(resumed, unbroken, step)
    print(f"rank {rank} resumed from {step}", flush=True)
"""


@pytest.mark.slow
def test_two_ranks_that_are_signalled_go_on(tmp_path):
    """Both get it after the same step.

    What a signal makes Lightning save has rank 0's statistics alone, since ranks may be anywhere then: before t0 both
    ranks freeze the same, if not what the unbroken run does.
    """
    job = launch(SIGNALLED, tmp_path, timeout=150)
    for rank in (0, 1):
        for step in STEPS_BEFORE_AND_AFTER_T0:
            assert f"rank {rank} ended after {step}" in job.stdout, job.stderr[-6000:]
            assert f"rank {rank} resumed from {step}" in job.stdout, job.stderr[-6000:]
    assert (tmp_path / "requeued").read_text() == "requeue 1234\n" * 2


@pytest.mark.parametrize("step", STEPS_BEFORE_AND_AFTER_T0)
@pytest.mark.parametrize(
    "save",
    [
        lambda folder: OnExceptionCheckpoint(folder, "saved"),
        lambda folder: ModelCheckpoint(folder, "saved", save_top_k=0, save_on_exception=True),
    ],
    ids=["OnExceptionCheckpoint", "ModelCheckpoint"],
)
@pytest.mark.filterwarnings("ignore:.*ckpt_path=")  # with OnExceptionCheckpoint, Lightning looks for a last one first
def test_what_is_saved_on_sigterm_goes_on(tmp_path, step, save):
    """Lightning ends the run after the batch, by an exception; the callback has let go of the optimizer by then."""
    unbroken = run(tmp_path / "unbroken")
    with pytest.raises(SIGTERMException):
        run(tmp_path / "broken", Signal(signal.SIGTERM, step), save(tmp_path))
    resumed = run(tmp_path / "broken", save(tmp_path), ckpt=tmp_path / "saved.ckpt")
    assert_resumed(resumed, unbroken, after=step)

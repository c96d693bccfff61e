"""Killed, restarted and signalled runs end as the unbroken one does, to the bit.

The unbroken run saves checkpoints at the same steps as the broken one.
"""

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests import cases
from tests.processes.faults import STEPS_BEFORE_AND_AFTER_T0, TIMEOUT, Signal, assert_resumed, requeued, run, slurm
from tests.processes.launch import SCRIPTS, launch

# A run that is resumed saves where the one before it did.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

# torchrun looks at the ranks each second: the rank that is left has time to end by itself. SIGTERM would make Lightning
# talk to the dead one.
PATIENT = "--monitor-interval=1"
KILLS = {"observing": (5, 1), "frozen": (11, 0)}
"""After which step, and which rank."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, CompletedProcess[str]]]:
    """Return the folder and the end of a job that was killed in a phase; each is run once."""

    @cache
    def run_once(phase: str) -> tuple[Path, CompletedProcess[str]]:
        folder, arguments = tmp_path_factory.mktemp(phase), [str(number) for number in KILLS[phase]]
        script = SCRIPTS / "killed.py"
        return folder, launch(script, folder, timeout=150, extra_args=[PATIENT], arguments=arguments)

    return run_once


@pytest.fixture(scope="module")
def elastic(killed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompletedProcess[str]]:
    """Return the folder and the end of a job that is restarted by itself, and resumes the killed ones."""
    folder, broken = tmp_path_factory.mktemp("elastic"), [str(killed(phase)[0]) for phase in KILLS]
    # Else the restarted ranks may find the addresses of those before them: https://github.com/pytorch/pytorch/issues/135712
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    restart = ["--max-restarts=1", PATIENT]
    script = SCRIPTS / "elastic.py"
    return folder, launch(script, folder, timeout=250, extra_args=restart, arguments=broken, env=own_store)


@pytest.mark.slow
@pytest.mark.parametrize("phase", KILLS)
def test_killed_rank_ends_the_other_rank_and_the_job(killed, phase):
    """By an error of the other rank's own, well within the process group's timeout."""
    folder, job = killed(phase)
    assert job.returncode == 1, job.stderr[-6000:]
    killed_at = float((folder / "signalled").read_text())
    survivor, ended, error = (folder / "survivor").read_text().split(maxsplit=2)
    assert int(survivor) == 1 - KILLS[phase][1]
    assert float(ended) - killed_at < TIMEOUT / 2
    assert "gloo" in error.lower()


@pytest.mark.slow
def test_elastic_restart_resumes_and_ends_as_the_unbroken_run(elastic):
    """A script that resumes from its last checkpoint survives the loss of a rank under `torchrun --max-restarts=1`."""
    folder, job = elastic
    assert (folder / "signalled").exists()
    for rank in (0, 1):
        assert f"rank {rank} ended after 1 restart" in job.stdout, job.stderr[-6000:]


@pytest.mark.slow
def test_job_after_a_kill_resumes_from_the_last_checkpoint(elastic):
    """Before and after t0 it ends as the unbroken run, having seen the batches that were left."""
    _, job = elastic
    assert job.returncode == 0, job.stderr[-6000:]
    for rank in (0, 1):
        for step in (3, 9):
            assert f"rank {rank} resumed from {step}" in job.stdout, job.stderr[-6000:]


@pytest.mark.parametrize("step", STEPS_BEFORE_AND_AFTER_T0)
def test_job_requeued_by_slurm_ends_as_the_unbroken_run(tmp_path, monkeypatch, step):
    """On SLURM's signal Lightning saves a checkpoint and asks for another job, which resumes from it."""
    unbroken = run(tmp_path / "unbroken")
    for name, value in slurm(tmp_path).items():
        monkeypatch.setenv(name, value)
    signalled, resumed = requeued(tmp_path, step, signal.SIGUSR1)
    assert_resumed(resumed, unbroken, after=step)
    cases.assert_identical(signalled, unbroken)
    assert (tmp_path / "requeued").read_text() == "requeue 1234\n"


@pytest.mark.slow
def test_two_signalled_ranks_resume_and_end_alike(tmp_path):
    """Both get the signal after the same step.

    A checkpoint that a signal triggers holds only rank 0's statistics, since the ranks may be anywhere: before t0 both
    ranks freeze the same elements, but not those of the unbroken run.
    """
    job = launch(SCRIPTS / "signalled.py", tmp_path, timeout=150)
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
def test_run_resumes_from_a_checkpoint_saved_on_sigterm(tmp_path, step, save):
    """Lightning ends the run after the batch by an exception; the optimizer is an ordinary one by then."""
    unbroken = run(tmp_path / "unbroken")
    with pytest.raises(SIGTERMException):
        run(tmp_path / "broken", Signal(signal.SIGTERM, step), save(tmp_path))
    resumed = run(tmp_path / "broken", save(tmp_path), ckpt=tmp_path / "saved.ckpt")
    assert_resumed(resumed, unbroken, after=step)

"""Programs for two and for four gloo ranks; all that are selected share one start of torchrun."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.processes import checkpoints
from tests.processes.launch import assert_agreed, launch_together

# Processes of their own do not know the filters either.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SAVE, RESUME, RESUME_FROM_ONE = "checkpoints.save", "checkpoints.resume", "checkpoints.resume_from_one"
FOR_TWO = [
    "live_elements", "observing", "callback", "freezer", "comm_hook", "support", "shards", "live_shards", "live_loops",
    "huggingface", "masks", "norms", "probe", "streams", "pains",
    SAVE, RESUME, RESUME_FROM_ONE,
]  # fmt: skip
FOR_FOUR = ["selection", "shards", "live_shards", RESUME]


@contextmanager
def single_rank() -> Iterator[None]:
    """Leave nothing of a strategy that starts a process group of one: Lightning sets variables for it."""
    with mock.patch.dict(os.environ):
        yield
        if dist.is_initialized():
            dist.destroy_process_group()


def selected(request: pytest.FixtureRequest, test: Callable[..., Any]) -> list[str]:
    """Return the programs with which pytest is to run a test."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    return [item.callspec.params["program"] for item in items if item.function is test]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all programs: some resume from what others saved."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def two_ranks(request: pytest.FixtureRequest, folder: Path) -> CompletedProcess[str]:
    """Run all that is selected for two ranks, and what the other tests resume from."""
    programs = selected(request, test_two_ranks_agree_with_one_process)
    if SAVE not in programs and programs != [RESUME_FROM_ONE]:
        programs = [SAVE, *programs]
    if RESUME_FROM_ONE in programs:
        (one := folder / "checkpoints" / "one").mkdir(parents=True)
        with single_rank():
            checkpoints.save(one)
    return launch_together(programs, folder, 2, timeout=1000)


@pytest.fixture(scope="module")
def four_ranks(request: pytest.FixtureRequest, folder: Path) -> CompletedProcess[str]:
    """Run all that is selected for four ranks."""
    programs = selected(request, test_four_ranks_agree_with_one_process)
    if RESUME in programs:
        assert_agreed(request.getfixturevalue("two_ranks"), SAVE)
    return launch_together(programs, folder, 4, timeout=600)


@pytest.mark.parametrize("program", FOR_TWO)
def test_two_ranks_agree_with_one_process(two_ranks, program):
    """What the program says; it is a file of tests/processes."""
    assert_agreed(two_ranks, program)


@pytest.mark.parametrize("program", FOR_FOUR)
def test_four_ranks_agree_with_one_process(four_ranks, program):
    """What the program says; "checkpoints.resume" resumes from what two ranks saved."""
    assert_agreed(four_ranks, program, 4)


def test_one_rank_resumes_from_checkpoints_of_two(two_ranks, folder):
    """Of DDP and of FSDP2; from after t0 it ends as the two do, to rounding."""
    assert_agreed(two_ranks, SAVE)
    with single_rank():
        checkpoints.resume(folder / "checkpoints")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("rank 0: one agrees\nrank 1: one failed\nAssertionError: 3", "one failed on ranks \\[1\\].*Error: 3"),
        ("rank 0: zero failed\n", "one: zero failed before on ranks \\[0, 1\\]"),
        ("rank 0: one agrees\n", "one: the job ended on ranks \\[1\\].*Killed"),
    ],
)
def test_failure_of_a_program_names_it_and_its_ranks(out, message):
    """Also where an earlier program ended the job, or where nobody could say anything."""
    with pytest.raises(pytest.fail.Exception, match=f"(?s){message}"):
        assert_agreed(CompletedProcess([], 1, out, "Killed"), "one")

"""Parameters that are sharded: FSDP2, tensor parallelism, both; and checkpoints for other numbers of ranks."""

import pytest

from tests.processes.launch import SCRIPTS, assert_agreed, launch

SHARDS, CHECKPOINTS = SCRIPTS / "shards.py", SCRIPTS / "checkpoints.py"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4], ids=["FSDP2, then tensor parallelism", "both at once"])
def test_shards_freeze_and_train_as_one_process_does(tmp_path, processes):
    """Statistics to 1e-10, the masks of a sort of everything, the weights of a loop by hand."""
    assert_agreed(launch(SHARDS, tmp_path, processes, timeout=200), processes)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_any_number_of_ranks(tmp_path):
    """Of DDP and of FSDP2, in one file and in parts, from before t0 and after; two ranks go on to the bit."""
    assert_agreed(launch(CHECKPOINTS, tmp_path, 2, timeout=200, arguments=["save"]), 2)
    for processes in (2, 1, 4):
        assert_agreed(launch(CHECKPOINTS, tmp_path, processes, timeout=300, arguments=["resume"]), processes)


@pytest.mark.slow
def test_two_ranks_go_on_from_one(tmp_path):
    """And back."""
    assert_agreed(launch(CHECKPOINTS, tmp_path, 1, timeout=200, arguments=["save"]), 1)
    assert_agreed(launch(CHECKPOINTS, tmp_path, 2, timeout=200, arguments=["resume"]), 2)


@pytest.mark.slow
def test_every_precision_hold_and_granularity_is_served(tmp_path):
    """What the table in docs/cluster.md says of DDP and FSDP2."""
    assert_agreed(launch(SCRIPTS / "support.py", tmp_path, timeout=200), 2)

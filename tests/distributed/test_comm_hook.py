"""The communication hook on two gloo processes: what is averaged, and how many bytes that takes."""

import pytest

from tests.processes.launch import SCRIPTS, assert_agreed, launch


@pytest.mark.slow
def test_live_gradients_are_the_means_by_hand_and_frozen_ones_zero(tmp_path):
    """Under every option of the wrapper and every hook of torch's; what is counted is the live elements' bytes."""
    assert_agreed(launch(SCRIPTS / "comm_hook.py", tmp_path, timeout=120), 2)

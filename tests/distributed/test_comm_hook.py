"""`LiveAllReduce` on two gloo processes: the gradients, and the bytes that are sent."""

import pytest

from tests.processes.launch import SCRIPTS, assert_agreed, launch


@pytest.mark.slow
def test_all_reduce_gives_means_of_live_gradients_and_zeros_where_frozen(tmp_path):
    """With every option of DDP and every hook of torch; the bytes counted are those of the live elements."""
    assert_agreed(launch(SCRIPTS / "comm_hook.py", tmp_path, timeout=120), 2)

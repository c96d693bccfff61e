"""A kill while a checkpoint is being written costs nothing but the steps since the last complete one."""

import subprocess
import sys

import pytest

from tests.processes.launch import ROOT


@pytest.mark.slow
def test_run_killed_while_saving_resumes_from_the_last_complete_checkpoint():
    """Three times at random moments; `python -m tests.processes.kills --times 100` does it more often.

    In a process of its own: children are forked from it, which a process with threads must not do.
    """
    command = [sys.executable, "-m", "tests.processes.kills", "--times", "3", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "3 resumed to the bit" in done.stdout

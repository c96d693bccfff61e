"""Kills of a training that streams and of its follower: both come to the same bits."""

import subprocess
import sys

import pytest

from tests.processes.launch import ROOT


@pytest.mark.slow
def test_a_stream_survives_kills_of_either_side():
    """A few at random moments; `python -m tests.processes.stream_kills --times 100` does it more often.

    In a process of its own: children are forked from it, which a process with threads must not do.
    """
    command = [sys.executable, "-m", "tests.processes.stream_kills", "--times", "5", "--seed", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "5 kills" in done.stdout

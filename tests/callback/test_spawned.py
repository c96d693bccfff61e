"""Strategies whose processes the main process launches itself."""

import os
import subprocess
import sys

import pytest

from tests.processes.launch import ROOT, SCRIPTS


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddp_spawn", "ddp_fork"])
def test_main_process_has_the_outcome_of_spawned_processes(method, tmp_path):
    """Masks, statistics, savings and steps; a copy of the callback has nothing of them."""
    command = [sys.executable, str(SCRIPTS / "spawned.py"), method]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "the main process has the outcome" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
    assert not list(tmp_path.glob("lightning_gcfreeze*"))  # temporary files are removed

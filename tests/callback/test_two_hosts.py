"""Two ranks on two hosts: network namespaces with a cable between them."""

import os
import subprocess
import sys

import pytest

from tests.processes.launch import ROOT, SCRIPTS, assert_agreed

HOSTS = SCRIPTS / "two_hosts.sh"


@pytest.fixture
def _two_hosts() -> None:
    try:
        check = subprocess.run([str(HOSTS), "--check"], capture_output=True, text=True, timeout=20)
    except OSError as error:
        pytest.skip(f"No two hosts here: {error}")
    if check.returncode:
        pytest.skip(f"No two hosts here: {check.stderr.strip()}")


@pytest.mark.slow
@pytest.mark.usefixtures("_two_hosts")
def test_two_hosts_train_the_live_elements_as_one_process_does(tmp_path):
    """The cable is the only way from one rank to the other; both agree as two ranks on one host do."""
    script, programs = str(SCRIPTS / "together.py"), ["interfaces", "live_elements"]
    done = subprocess.run(
        [str(HOSTS), sys.executable, script, str(tmp_path), *programs],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert_agreed(done, "live_elements")
    for rank in (0, 1):
        assert f"[rank {rank} has cable{rank} lo]" in done.stdout

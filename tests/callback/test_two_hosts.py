"""The two ranks of `test_callback_ddp` on two hosts: network namespaces with a cable between them."""

import os
import subprocess
import sys

import pytest

from tests.callback.test_ddp import TWO_RANKS
from tests.processes.launch import ROOT, SCRIPTS, assert_agreed

HOSTS = SCRIPTS / "two_hosts.sh"
WHERE = """
import os, socket
names = " ".join(sorted(name for _, name in socket.if_nameindex()))
print(f"[rank {os.environ['RANK']} has {names}]", flush=True)  # in one piece: both ranks write to one pipe
"""


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
    """Each rank has a network of its own, and no way to the other but the cable; they agree as two on one host do."""
    script = tmp_path / "two_hosts.py"
    script.write_text(WHERE + TWO_RANKS)
    done = subprocess.run(
        [str(HOSTS), sys.executable, str(script)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    for rank in (0, 1):
        assert f"[rank {rank} has cable{rank} lo]" in done.stdout
    assert_agreed(done, 2)

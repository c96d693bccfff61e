"""Programs as several processes, started by torchrun."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = Path(__file__).parent


def launch(
    script: Path,
    tmp_path: Path,
    processes: int = 2,
    *,
    timeout: float,
    extra_args: Sequence[str] = (),
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script in `processes` ranks on this host, and wait.

    Args:
        script: a file of Python; it can import this repository, and gets `tmp_path` as its first argument.
        tmp_path: the folder that the script works in; its output is written there.
        processes: the number of ranks.
        timeout: in seconds; then every process is ended, and the error raised.
        extra_args: further arguments of torchrun.
        arguments: further arguments of the script.
        env: further environment variables.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, *extra_args, str(script), str(tmp_path), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | (env or {})
    out, err = tmp_path / "stdout", tmp_path / "stderr"  # files: a rank that is left over cannot keep a pipe open
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr)
        try:
            process.wait(timeout)
        except BaseException:
            _end(process.pid)
            process.wait()
            sys.stderr.write(out.read_text()[-2000:] + err.read_text()[-6000:])
            raise
    return subprocess.CompletedProcess(command, process.returncode, out.read_text(), err.read_text())


def launch_together(
    programs: Sequence[str], tmp_path: Path, processes: int, *, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run several programs of `together.py` in one start."""
    return launch(SCRIPTS / "together.py", tmp_path, processes, timeout=timeout, arguments=programs)


def assert_agreed(done: subprocess.CompletedProcess[str], program: str, processes: int = 2) -> None:
    """Fail if a rank did not come to the end of a program; the failure shows what that rank, or the job, said.

    The exit status is no evidence: gloo's threads, still running when Python ends, may abort a process whose work is
    done.
    """
    missing = [rank for rank in range(processes) if f"rank {rank}: {program} agrees" not in done.stdout]
    if not missing:
        return
    if f"{program} failed" in done.stdout:
        errors = done.stdout[done.stdout.index(f"{program} failed") :][:6000]
        pytest.fail(f"{program} failed on ranks {missing}: {errors}", pytrace=False)
    others = sorted(set(re.findall(r"rank \d+: (\S+) failed", done.stdout)))
    why = f"{', '.join(others)} failed before" if others else "the job ended"
    pytest.fail(f"{program}: {why} on ranks {missing}.\n{done.stdout[-2000:]}{done.stderr[-6000:]}", pytrace=False)


def _end(pid: int) -> None:
    """Kill a process and its descendants: torchrun gives each rank a session of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(child) for child in children.read_text().split()] if children.exists() else []
    for child in below:
        _end(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

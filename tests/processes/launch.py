"""Scripts as several processes, started by torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = Path(__file__).parent


def launch(
    script: str | Path,
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
        script: a file of Python, or its text; it can import this repository, and finds `tmp_path` as its argument.
        tmp_path: where a text is written to, and what is printed.
        processes: how many.
        timeout: in seconds. Then every process is ended, before the error.
        extra_args: of torchrun.
        arguments: of the script, after `tmp_path`.
        env: what the processes' environment has beside this one's.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    file = script if isinstance(script, Path) else tmp_path / "script.py"
    if isinstance(script, str):
        file.write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, *extra_args, str(file), str(tmp_path), *arguments]
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


def assert_agreed(done: subprocess.CompletedProcess[str], processes: int) -> None:
    """Every rank has said that it came to its end and found all as it should be.

    Not the exit status: gloo's threads, still running when Python ends, may abort a process that has done its work.
    """
    for rank in range(processes):
        assert f"rank {rank} agrees" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]


def _end(pid: int) -> None:
    """Kill a process and its descendants: torchrun gives each rank a session of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(child) for child in children.read_text().split()] if children.exists() else []
    for child in below:
        _end(child)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

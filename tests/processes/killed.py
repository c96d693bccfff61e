"""Two ranks, one of which kills itself: `killed.py DIRECTORY STEP RANK`."""

import os
import signal
import sys
import time
from pathlib import Path

from tests.processes import faults

if __name__ == "__main__":
    folder, step, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    try:
        faults.run(folder, faults.Signal(signal.SIGKILL, step, rank), devices=2)
    except RuntimeError as error:
        (folder / "survivor").write_text(f"{os.environ['RANK']} {time.monotonic()} {error}")
        raise

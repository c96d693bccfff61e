"""Two ranks that resume from what there is: `elastic.py DIRECTORY BROKEN …`, under `torchrun --max-restarts=1`.

Rank 1 kills itself, torchrun starts both again, and they go on from the last checkpoint. Then they resume the jobs
that `killed.py` broke off in other folders.
"""

import os
import signal
import sys
from pathlib import Path

from tests.processes import faults

if __name__ == "__main__":
    folder, *broken = map(Path, sys.argv[1:])
    rank, restarts = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    ckpt = faults.last(folder)
    assert (ckpt is None) == (restarts == 0)
    kill = faults.Signal(signal.SIGKILL, 5, rank=1)
    resumed = faults.run(folder, *([] if restarts else [kill]), ckpt=ckpt, devices=2)
    unbroken = faults.run(folder / "unbroken", devices=2)
    faults.assert_resumed(resumed, unbroken, after=3)
    print(f"rank {rank} ended after {restarts} restart", flush=True)
    for other in broken:
        ckpt = faults.last(other)
        assert ckpt is not None
        faults.assert_resumed(faults.run(other, ckpt=ckpt, devices=2), unbroken, after=int(ckpt.stem))
        print(f"rank {rank} resumed from {ckpt.stem}", flush=True)

"""Two ranks that get SIGTERM, or SLURM's signal, before and after t0."""

import os
import signal
import sys
from pathlib import Path

from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from tests.processes import faults

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    unbroken = faults.run(folder / "unbroken", devices=2)
    for step in faults.STEPS_BEFORE_AND_AFTER_T0:
        try:
            save = OnExceptionCheckpoint(folder, f"sigterm{step}")
            faults.run(folder / "broken", faults.Signal(signal.SIGTERM, step), save, devices=2)
        except SIGTERMException:
            print(f"rank {rank} ended after {step}", flush=True)
        resumed = faults.run(folder / "broken", ckpt=folder / f"sigterm{step}.ckpt", devices=2)
        faults.assert_both_ranks_resumed(resumed, unbroken, step)

    os.environ.update(faults.slurm(folder, rank, processes=2))
    for step in faults.STEPS_BEFORE_AND_AFTER_T0:
        signalled, resumed = faults.requeued(folder / str(step), step, signal.SIGUSR1, devices=2)
        faults.assert_both_ranks_resumed(resumed, unbroken, step)
        print(f"rank {rank} resumed from {step}", flush=True)

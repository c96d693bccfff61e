"""Several programs, one after the other, in one start of torchrun: `together.py DIRECTORY PROGRAM …`.

    torchrun --nproc-per-node=2 tests/processes/together.py scratch comm_hook checkpoints.save

A program is a module of tests/processes, or a function in one; without a name the function is `main`. It gets the
directory if it takes an argument, and finds a gloo process group. Each rank says of each program that it agrees, or
prints the error and ends the job, since the others would wait for this rank.
"""

import importlib
import inspect
import os
import sys
import traceback
from pathlib import Path

import torch.distributed as dist


def run(program: str, directory: Path) -> None:
    """Run one program to its end."""
    name, _, function = program.partition(".")
    main = getattr(importlib.import_module(f"tests.processes.{name}"), function or "main")
    folder = directory / name
    folder.mkdir(exist_ok=True)
    main(*[folder][: len(inspect.signature(main).parameters)])


if __name__ == "__main__":
    where, programs = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for program in programs:
        try:
            run(program, where)
        except BaseException:
            # In one piece: all ranks write to one pipe. Without the clean-up of the interpreter, which may wait.
            print(f"rank {rank}: {program} failed\n{traceback.format_exc()}", flush=True)
            os._exit(1)
        print(f"rank {rank}: {program} agrees", flush=True)
        dist.barrier()
    dist.destroy_process_group()

"""Many runs over processes, each kept in a file of its own: what is there is not computed again."""

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import scipy
import sklearn
import torch

from examples.paper.run import Run, run
from examples.paper.tasks import Settings
from examples.train import ignore_known_warnings

Unit = tuple[Settings, int]  # a run by its settings and number

_SOURCES = (
    "lightning_gcfreeze/**/*.py",
    "examples/*.py",
    "examples/paper/run.py",
    "examples/paper/tasks.py",
    "examples/paper/related/*.py",
)


def missing(units: Sequence[Unit], out: Path) -> list[Unit]:
    """Those whose files are not in `out` yet."""
    return [unit for unit in units if not _file(out, *unit).exists()]


def compute(units: Sequence[Unit], jobs: int, out: Path) -> Iterator[Unit]:
    """Compute each run and keep it in a file; yield the unit once it is there.

    A run takes one thread and nothing from other runs, so the results do not depend on `jobs`.
    """
    workers = min(jobs, len(units), 61)  # more than 61 Windows cannot wait for
    if workers <= 1:
        _prepare()
        for unit in units:
            _compute(out, *unit)
            yield unit
        return
    # Workers are forked from a server that has imported everything once; where there is none, each imports for itself.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload([__name__])
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(workers, context, initializer=_prepare_worker, initargs=(scratch,)) as pool,
    ):
        futures = {pool.submit(_compute, out, *unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:  # one of them failed, or the user has seen enough: the others need not finish
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise


def load(settings: Settings, runs: int, out: Path) -> list[Run]:
    """The runs number 0 to `runs` - 1."""
    results = []
    for index in range(runs):
        with np.load(_file(out, settings, index)) as arrays:
            results.append(Run(**arrays))
    return results


def _file(out: Path, settings: Settings, index: int) -> Path:
    key = json.dumps([asdict(settings), _code()], sort_keys=True)
    return out / "parts" / f"{settings.data}-{hashlib.sha256(key.encode()).hexdigest()[:12]}" / f"run{index:03}.npz"


@cache
def _code() -> str:
    """What a run is computed by: results of other code are other results."""
    root = Path(__file__).parents[2]
    sources = [path.read_bytes() for pattern in _SOURCES for path in sorted(root.glob(pattern))]
    versions = [library.__version__.encode() for library in (torch, pl, np, scipy, sklearn)]
    return hashlib.sha256(b"\0".join([*sources, *versions])).hexdigest()


def _prepare() -> None:
    """Set up a process for runs."""
    torch.set_num_threads(1)  # the layers are small: more threads would wait for each other, and round differently
    ignore_known_warnings()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def _prepare_worker(scratch: str) -> None:
    """Set up a process of the pool, which is ended by the first one, and ends when that one is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tempfile.tempdir = scratch  # who is killed cannot tidy up
    _prepare()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _compute(out: Path, settings: Settings, index: int) -> None:
    result, path = run(settings, index), _file(out, settings, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, train=result.train, test=result.test, frozen=result.frozen)
    unfinished.replace(path)  # so that a file that is there is whole

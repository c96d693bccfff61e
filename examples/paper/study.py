"""Many runs over processes, each kept in a file of its own: what is there is not computed again."""

import hashlib
import json
import logging
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from examples.paper.run import Run, run
from examples.paper.tasks import Settings
from examples.train import ignore_known_warnings

Unit = tuple[Settings, int]  # a run by its settings and number


def compute(units: Sequence[Unit], jobs: int, out: Path) -> Iterator[Unit]:
    """Compute the runs whose files are not in `out` yet; yield each unit once its file is there.

    A run takes one thread and nothing from other runs, so the results do not depend on `jobs`.
    """
    missing = []
    for unit in units:
        if _file(out, *unit).exists():
            yield unit
        else:
            missing.append(unit)
    if min(jobs, len(missing)) <= 1:
        _prepare()
        for unit in missing:
            _compute(out, *unit)
            yield unit
        return
    # Workers are forked from a server that has imported everything once; where there is none, each imports for itself.
    context = multiprocessing.get_context(
        "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    )
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(jobs, len(missing)), context, initializer=_prepare_worker) as pool:
        futures = {pool.submit(_compute, out, *unit): unit for unit in missing}
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
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:12]
    return out / "parts" / f"{settings.data}-{digest}" / f"run{index:03}.npz"


def _prepare() -> None:
    """Set up a process for runs."""
    torch.set_num_threads(1)  # the layers are small: more threads would wait for each other, and round differently
    ignore_known_warnings()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def _prepare_worker() -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to all processes, and the first of them will end the others
    _prepare()


def _compute(out: Path, settings: Settings, index: int) -> None:
    result, path = run(settings, index), _file(out, settings, index)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, train=result.train, test=result.test, frozen=result.frozen)
    unfinished.replace(path)  # so that a file that is there is whole

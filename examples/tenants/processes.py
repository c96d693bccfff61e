"""Work on several items in as many processes as there are cores."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from examples.tenants.training import prepare

Item = TypeVar("Item")
Found = TypeVar("Found")


def compute(work: Callable[[Item], Found], items: Sequence[Item], jobs: int) -> Iterator[Found]:
    """Yield what `work` returns for each item, as it is done; each process has one thread."""
    if jobs <= 1:
        prepare()
        yield from map(work, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(items)), context, initializer=prepare) as pool:
        try:
            for future in as_completed([pool.submit(work, item) for item in items]):
                yield future.result()
        except BaseException:  # one of them failed, or the user has seen enough: the others need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""`give_back`: let the system have the memory that was freed."""

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return freed memory to the system, where the C library would keep it.

    glibc keeps what it takes for small tensors, up to 32 MiB, as a rule: it gives back no more than lies free at the
    upper end of its heap. So a process whose optimizer has let go of nine tenths of its state stays as large as it was,
    unless it is asked. It takes milliseconds, and the pages that are used again have to be asked for again: this is for
    the few moments at which much becomes free for good. Other C libraries, and GPUs, are left alone.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no glibc
        return None
    return trim

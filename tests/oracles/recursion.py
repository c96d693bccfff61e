"""Eq. (2.6) as it is written, in NumPy, float64, one matrix and one loop. Knows nothing of the package."""

from collections.abc import Callable, Iterable

import numpy as np


def covariance(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], gain: Callable[[int], float], start: np.ndarray | None = None
) -> np.ndarray:
    """C_t of pairs (g_1, g_S), each a flat vector; C_0 is `start`, or 0."""
    c = start
    for t, (g_one, g_batch) in enumerate(pairs, start=1):
        difference = np.asarray(g_one, dtype=np.float64) - np.asarray(g_batch, dtype=np.float64)
        if c is None:
            c = np.zeros((difference.size, difference.size))
        c = (1 - gain(t)) * c + gain(t) * np.outer(difference, difference)
    assert c is not None
    return c

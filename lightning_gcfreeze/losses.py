"""The mean of a loss over some steps, with its standard error; the same on all processes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gcfreeze.distributed import ALONE, Ranks

_AT_ONCE = 256
"""Losses that wait before the CPU asks a device for them."""


class Mean(NamedTuple):
    """Of a number of values: their mean, and how far off it may be."""

    value: float = math.nan
    error: float = math.nan
    """Standard error of the mean, the values taken for independent; 0 of a single one."""
    of: int = 0
    """How many values."""

    def above(self, other: "Mean") -> tuple[float, float]:
        """How far it lies above another, relative to that one's size; and the standard error of this. NaN of none."""
        scale = abs(other.value) or math.ulp(0.0)
        return (self.value - other.value) / scale, math.hypot(self.error, other.error) / scale


class Losses:
    """Gathers losses between two readings. A loss that is not finite is left out."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._count, self._mean, self._squares = 0, 0.0, 0.0  # squares: of the distances from the mean

    def add(self, loss: Tensor) -> None:
        """Take in one loss, 0-dim. Nothing is asked of its device yet."""
        self._waiting.append(loss.detach())
        if len(self._waiting) == _AT_ONCE:
            self._settle()

    def read(self, ranks: Ranks = ALONE) -> Mean:
        """The mean over all processes since the last reading; the next one begins afresh. With nothing finite, NaN."""
        self._settle()
        own = torch.tensor([self._count, self._mean, self._squares], dtype=torch.float64)
        counts, means, squares = ranks.gathered(own).unbind(1)
        self._count, self._mean, self._squares = 0, 0.0, 0.0
        n = int(counts.sum())
        if not n:
            return Mean()
        mean = float((counts * means).sum()) / n
        variance = float((squares + counts * (means - mean).square()).sum()) / max(1, n - 1)
        return Mean(mean, math.sqrt(variance / n), n)

    def state_dict(self) -> list[float]:
        """Numbers alone."""
        self._settle()
        return [self._count, self._mean, self._squares]

    def load_state_dict(self, state: list[float]) -> None:
        """Go on from what `state_dict` gave."""
        self._waiting = []
        self._count, self._mean, self._squares = int(state[0]), state[1], state[2]

    def _settle(self) -> None:
        for value in torch.stack(self._waiting).double().tolist() if self._waiting else ():
            if math.isfinite(value):  # Welford's recursion: no difference of large numbers
                self._count += 1
                apart = value - self._mean
                self._mean += apart / self._count
                self._squares += apart * (value - self._mean)
        self._waiting = []

"""The mean of a loss over some steps, with its standard error; the same on all processes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gcfreeze.distributed import SINGLE_PROCESS, World

_AT_ONCE = 256
"""Losses that wait before the CPU asks a device for them."""


class LossMean(NamedTuple):
    """Of a number of values: their mean, and how far off it may be."""

    value: float = math.nan
    error: float = math.nan
    """Standard error of the mean, the values taken for independent: infinite of a single one, unless it is exact."""
    of: int = 0
    """How many values."""

    def above(self, other: "LossMean") -> tuple[float, float]:
        """How far it lies above another, relative to that one's size; and the standard error of this. NaN of none."""
        scale = abs(other.value) or math.ulp(0.0)
        return (self.value - other.value) / scale, math.hypot(self.error, other.error) / scale


class _Sums(NamedTuple):
    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # of the distances from the mean


def _row(sums: _Sums) -> Tensor:
    return torch.tensor(sums, dtype=torch.float64)


class Losses:
    """Gathers losses between two readings. A loss that is not finite is left out."""

    def __init__(self) -> None:
        self._waiting: list[Tensor] = []
        self._own = _Sums()
        self._past = _Sums()  # what all processes have shared

    def add(self, loss: Tensor) -> None:
        """Take in one loss, of one element. Nothing is asked of its device yet."""
        self._waiting.append(loss.detach().reshape(()))
        if len(self._waiting) == _AT_ONCE:
            self._settle()

    def read(self, world: World = SINGLE_PROCESS) -> LossMean:
        """The mean over all processes since the last reading; the next one begins afresh. With nothing finite, NaN."""
        count, mean, squares = self._together(world)
        self._own = self._past = _Sums()
        if not count:
            return LossMean()
        return LossMean(mean, math.sqrt(squares / (count - 1) / count) if count > 1 else math.inf, int(count))

    def share(self, world: World) -> None:
        """Become the same on all processes."""
        if world.size > 1:
            self._past, self._own = self._together(world), _Sums()

    def state_dict(self) -> list[list[float]]:
        """Numbers alone."""
        self._settle()
        return [list(self._own), list(self._past)]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Go on from what `state_dict` gave."""
        self._waiting = []
        self._own, self._past = _Sums(*state[0]), _Sums(*state[1])

    def _together(self, world: World) -> "_Sums":
        self._settle()
        if world.size == 1 and not self._past.number:
            return self._own
        rows = torch.cat([_row(self._past)[None], world.all_gather(_row(self._own))])
        counts, means, squares = rows.unbind(1)
        n = float(counts.sum())
        mean = float((counts * means).sum()) / max(n, 1.0)
        return _Sums(n, mean, float((squares + counts * (means - mean).square()).sum()))

    def _settle(self) -> None:
        count, mean, squares = self._own
        for value in torch.stack(self._waiting).cpu().double().tolist() if self._waiting else ():
            if math.isfinite(value):  # Welford's recursion: no difference of large numbers
                count += 1
                apart = value - mean
                mean += apart / count
                squares += apart * (value - mean)
        self._own, self._waiting = _Sums(count, mean, squares), []

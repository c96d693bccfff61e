"""The mean of a loss over some steps, with its standard error; the same on all processes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gcfreeze.distributed import SINGLE_PROCESS, World

_FLUSH_EVERY = 256
"""Losses that stay on their device before the CPU reads them, which waits for the device."""


class LossMean(NamedTuple):
    """The mean of some values, and how exact it is."""

    value: float = math.nan
    error: float = math.nan
    """Standard error of the mean, with the values taken as independent; infinite for one value, 0 for an exact one."""
    n: int = 0
    """Number of values."""

    def increase_over(self, other: "LossMean") -> tuple[float, float]:
        """Return the increase over another mean, relative to its absolute value, and the standard error of that.

        Both are NaN if either mean is of no values.
        """
        scale = abs(other.value) or math.ulp(0.0)
        return (self.value - other.value) / scale, math.hypot(self.error, other.error) / scale


class _Sums(NamedTuple):
    n: float = 0.0
    mean: float = 0.0
    squares: float = 0.0  # of the differences from the mean

    def as_tensor(self) -> Tensor:
        return torch.tensor(self, dtype=torch.float64)


class Losses:
    """Collect losses, and compute their mean between two readings. Losses that are not finite are left out."""

    def __init__(self) -> None:
        self._pending: list[Tensor] = []
        self._local = _Sums()
        self._synchronized = _Sums()  # the same on all processes

    def add(self, loss: Tensor) -> None:
        """Add the loss of one step, a tensor with one element. It is read from its device later."""
        self._pending.append(loss.detach().reshape(()))
        if len(self._pending) == _FLUSH_EVERY:
            self._flush()

    def read(self, world: World = SINGLE_PROCESS) -> LossMean:
        """Return the mean over all processes since the last reading, and start anew. Of no finite loss it is NaN."""
        n, mean, squares = self._over(world)
        self._local = self._synchronized = _Sums()
        if not n:
            return LossMean()
        return LossMean(mean, math.sqrt(squares / (n - 1) / n) if n > 1 else math.inf, int(n))

    def synchronize(self, world: World) -> None:
        """Make the sums the same on all processes, so that one of them can save them for all."""
        if world.size > 1:
            self._synchronized, self._local = self._over(world), _Sums()

    def state_dict(self) -> list[list[float]]:
        """Return the sums of this process, and the synchronized ones: two lists [n, mean, squared differences]."""
        self._flush()
        return [list(self._local), list(self._synchronized)]

    def load_state_dict(self, state: list[list[float]]) -> None:
        """Restore what `state_dict` returned."""
        self._pending = []
        self._local, self._synchronized = _Sums(*state[0]), _Sums(*state[1])

    def _over(self, world: World) -> _Sums:
        self._flush()
        if world.size == 1 and not self._synchronized.n:
            return self._local
        rows = torch.cat([self._synchronized.as_tensor()[None], world.all_gather(self._local.as_tensor())])
        counts, means, squares = rows.unbind(1)
        n = float(counts.sum())
        mean = float((counts * means).sum()) / max(n, 1.0)
        return _Sums(n, mean, float((squares + counts * (means - mean).square()).sum()))

    def _flush(self) -> None:
        n, mean, squares = self._local
        for value in torch.stack(self._pending).cpu().double().tolist() if self._pending else ():
            if math.isfinite(value):  # Welford's recursion: no difference of large numbers
                n += 1
                difference = value - mean
                mean += difference / n
                squares += difference * (value - mean)
        self._local, self._pending = _Sums(n, mean, squares), []

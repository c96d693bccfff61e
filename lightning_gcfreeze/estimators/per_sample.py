"""Per-sample gradients of one parameter, in forms whose squared noise is cheap to add up.

The recursion needs Σ_j (g_j - g_S)², one number per element. For the gradients of a linear map
(`outer_products.OuterProducts`) or of an embedding (`Lookups`) that does not require writing each g_j out. Differences
are taken before squares, so that a large mean gradient cannot cancel the noise away; where squares are summed first, a
guard ensures that nothing cancels.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators.scratch import CHUNK_NUMEL, gated, wide


class SquaredNoise(Protocol):
    """The gradients g_1 … g_m of one parameter, of which only the sum of squared noise can be had."""

    count: int
    """m."""

    def finiteness_probe(self) -> Tensor | None:
        """Return a tensor that is finite only if the gradients are; None if g_S, whose terms they are, says so."""

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, mean_is_g_batch: bool = False, valid: Tensor | None = None
    ) -> None:
        """Add weight · Σ_j (g_j - g_S)² to `out`, in place.

        Args:
            out: (*p.shape), contiguous, float32 or wider. The arithmetic is done in its dtype.
            g_batch: g_S, (*p.shape). Not modified.
            weight: the factor in front of the sum.
            mean_is_g_batch: whether g_S is known to be the mean of the g_j, which then need not be computed.
            valid: 0-dim bool tensor. If it is False, nothing is added; the host does not wait for the device to know.
                None: True.
        """


class PerSample(SquaredNoise, Protocol):
    """The gradients g_1 … g_m of one parameter, each of which can be written out."""

    def scale_(self, factor: float) -> None:
        """Multiply all of them by `factor`, in place."""

    def dense(self, count: int | None = None) -> Tensor:
        """Write out the first `count` gradients, or all: (count, *p.shape), float32 or wider."""


class Stacked:
    """Gradients that are written out.

    Args:
        values: the gradients, (m, *p.shape).
        in_batch: whether they are terms of g_S.
    """

    def __init__(self, values: Tensor, in_batch: bool = True) -> None:
        self._values, self._in_batch, self.count, self._factor = values, in_batch, len(values), 1.0

    def scale_(self, factor: float) -> None:
        self._factor *= factor

    def finiteness_probe(self) -> Tensor | None:
        return None if self._in_batch else self._values

    def dense(self, count: int | None = None) -> Tensor:
        return self._values[:count].to(wide(self._values.dtype)) * self._factor

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, mean_is_g_batch: bool = False, valid: Tensor | None = None
    ) -> None:
        values = self._values[0] if self.count == 1 else self._values
        noise = torch.sub(g_batch.to(out.dtype), values.to(out.dtype), alpha=self._factor)
        add_squares_(out, noise, weight, valid)


class Lookups:
    """Gradients of a lookup table: sums of δ over the positions at which a row was looked up, zero in all other rows.

    Args:
        index: the rows that were looked up, (m, positions), int.
        delta: the gradient of the loss with respect to what was looked up, (m, positions, width).
        rows: the number of rows of the table.
    """

    def __init__(self, index: Tensor, delta: Tensor, rows: int) -> None:
        self._index, self._delta, self._rows, self.count = index, delta, rows, len(index)

    def scale_(self, factor: float) -> None:
        self._delta = self._delta.to(wide(self._delta.dtype)) * factor

    def finiteness_probe(self) -> Tensor | None:
        return None

    def dense(self, count: int | None = None) -> Tensor:
        index, delta = self._index[:count], self._delta[:count].to(wide(self._delta.dtype))
        values = delta.new_zeros(len(index) * self._rows, delta.shape[-1])
        values.index_add_(0, self._keys(index), delta.flatten(0, 1))
        return values.view(len(index), self._rows, -1)

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, mean_is_g_batch: bool = False, valid: Tensor | None = None
    ) -> None:
        # Sorting brings equal (sample, row) pairs together; segment s is the s-th distinct pair. There are as many
        # segments as positions in memory, because only the device knows how many are used.
        keys, order = self._keys(self._index).sort()
        first = torch.ones_like(keys)
        first[1:] = keys[1:] != keys[:-1]
        segment = first.cumsum(0) - 1
        width = self._delta.shape[-1]
        sums = out.new_zeros(len(keys), width).index_add_(
            0, segment, self._delta.reshape(-1, width)[order].to(out.dtype)
        )
        used = (torch.arange(len(keys), device=keys.device) <= segment[-1]).to(out.dtype)
        row = torch.zeros_like(keys).scatter_(0, segment, keys % self._rows)
        n_without = self.count - out.new_zeros(self._rows).index_add_(0, row, used)  # samples that lack the row
        noise = gated(sums - g_batch[row].to(out.dtype), valid)
        out.index_add_(0, row, noise.square_().mul_(used[:, None]), alpha=weight)
        height = max(1, CHUNK_NUMEL // width)
        for top in range(0, self._rows, height):
            g = gated(g_batch[top : top + height].to(out.dtype), valid)
            out[top : top + height].addcmul_(g * n_without[top : top + height, None], g, value=weight)

    def _keys(self, index: Tensor) -> Tensor:
        """Return the number of the (sample, row) pair of each position, flat."""
        return (index + self._rows * torch.arange(len(index), device=index.device)[:, None]).flatten()


class Summed:
    """A sum of squared noise whose gradients were not kept: a `SquaredNoise`, but no `PerSample`.

    Args:
        squares: Σ_j (g_j - g_S)², up to `factor`; (*p.shape).
        count: m.
        in_batch: whether the gradients are terms of g_S.
        factor: what the sum is to be multiplied by.
    """

    def __init__(self, squares: Tensor, count: int, in_batch: bool, factor: float = 1.0) -> None:
        self._squares, self.count, self._in_batch, self._factor = squares, count, in_batch, factor

    def finiteness_probe(self) -> Tensor | None:
        return None if self._in_batch else self._squares

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, mean_is_g_batch: bool = False, valid: Tensor | None = None
    ) -> None:
        out.add_(gated(self._squares, valid), alpha=weight * self._factor)


def one_by_one(
    samples: Iterable[Mapping[str, Tensor]], g_batch: Named, keep_each: bool
) -> dict[str, Stacked] | dict[str, Summed]:
    """Gather gradients that are computed one sample after the other.

    Args:
        samples: ``{name: (*p.shape)}`` of each sample. A name that one of them lacks is left out.
        g_batch: g_S.
        keep_each: whether to keep every gradient, instead of the sum of squared noise only.
    """
    if keep_each:
        kept = list(samples)
        names = [name for name in (kept[0] if kept else ()) if all(name in sample for sample in kept)]
        return {
            name: Stacked(
                # A single one is not copied.
                kept[0][name][None] if len(kept) == 1 else torch.stack([sample[name] for sample in kept]),
                in_batch=False,
            )
            for name in names
        }
    count, sums = 0, dict[str, Tensor]()
    for sample in samples:
        if count == 0:
            sums = {name: g_batch[name].new_zeros(g.shape, dtype=wide(g.dtype)) for name, g in sample.items()}
        count += 1
        for name in sums.keys() - sample.keys():
            del sums[name]
        for name, squares in sums.items():
            noise = sample[name].to(squares.dtype) - g_batch[name].to(squares.dtype)
            squares.addcmul_(noise, noise)
    return {name: Summed(squares, count, in_batch=False) for name, squares in sums.items()}


def add_squares_(out: Tensor, noise: Tensor, weight: float, valid: Tensor | None) -> None:
    """Add weight · noise² to `out`, or weight · Σ_j noise_j² if `noise` is (m, *out.shape). `noise` is overwritten."""
    noise = gated(noise, valid)
    if noise.dim() == out.dim():
        out.addcmul_(noise, noise, value=weight)
    elif len(noise) == 1:
        out.addcmul_(noise[0], noise[0], value=weight)
    else:
        out.add_(noise.square_().sum(0), alpha=weight)

"""Gradients of the first m samples of a batch by one parameter, in forms whose squared noise is cheap to add up.

What the recursion wants of them is Σ_j (g_j - g_S)², one number an element. A linear map's gradients need not be
written out for it, nor an embedding's; a bias's can. Differences are taken before squares, so that a large mean
gradient cannot cancel the noise away; where squares are added up first, it has been made sure that it does not.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named

CHUNK = 2**20
"""How many elements are written out at once: 4 MiB of float32, what stays in a cache."""

MAX_POSITIONS_OF_PAIRS = 4
"""Up to this many positions, all pairs of them cost less than each sample's gradient written out (measured on CPU)."""

MIN_NOISE = 0.05
"""The least share of noise in the mean square of a factor for which squares are added up before the mean is taken off:
the rounding of the squares, 10⁻⁷ of them in float32, is at most 20 times as much of the noise."""


class PerSample(Protocol):
    """The gradients g_1 … g_m by one parameter."""

    count: int
    """m."""

    def scale_(self, factor: float) -> None:
        """Multiply all of them."""

    def unchecked(self) -> Tensor | None:
        """What may not be finite although g_S is; None: these are terms of it."""

    def dense(self, count: int | None = None) -> Tensor:
        """The first `count` of them, or all, written out: (count, *p.shape)."""

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, centred: bool = False, gate: Tensor | None = None
    ) -> None:
        """Add weight · Σ_j (g_j - g_S)² to `out`.

        Args:
            out: (*p.shape), contiguous, float32 or wider: the arithmetic is done in its dtype.
            g_batch: g_S. (*p.shape). Not modified.
            weight: in front of the sum.
            centred: whether g_S is known to be the mean of the g_j, which spares computing it.
            gate: 0-dim bool; where False, nothing is added, without asking the device. None: True.
        """


class Stacked:
    """Written out: (m, *p.shape).

    Args:
        values: the gradients.
        in_batch: whether they are terms of g_S.
    """

    def __init__(self, values: Tensor, in_batch: bool = True) -> None:
        self._values, self._in_batch, self.count, self._factor = values, in_batch, len(values), 1.0

    def scale_(self, factor: float) -> None:
        self._factor *= factor

    def unchecked(self) -> Tensor | None:
        return None if self._in_batch else self._values

    def dense(self, count: int | None = None) -> Tensor:
        return self._values[:count].to(_wide(self._values.dtype)) * self._factor

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, centred: bool = False, gate: Tensor | None = None
    ) -> None:
        values = self._values[0] if self.count == 1 else self._values
        noise = torch.sub(g_batch.to(out.dtype), values.to(out.dtype), alpha=self._factor)
        _add_squares_(out, noise, weight, gate)


class Products:
    """g_j = Σ_l δ_jl ⊗ x_jl over positions l, in groups: of a linear map or a convolution.

    Args:
        delta: by the output. (m, groups, positions, rows).
        x: the input. Whatever `unfold` makes (m, groups, positions, columns) of; if there is none, this.
        shape: of the parameter: groups · rows · columns elements in this order.
        unfold: takes some samples of `x`.
    """

    def __init__(
        self, delta: Tensor, x: Tensor, shape: torch.Size, unfold: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._delta, self._x, self._shape, self._unfold = delta, x, shape, unfold
        self.count, self._factor = len(delta), 1.0

    def scale_(self, factor: float) -> None:
        self._factor *= factor

    def unchecked(self) -> Tensor | None:
        return None

    def dense(self, count: int | None = None) -> Tensor:
        delta, x = next(self._samples(self.count if count is None else count, _wide(self._delta.dtype)))
        return (delta.mT @ x).reshape(-1, *self._shape)

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, centred: bool = False, gate: Tensor | None = None
    ) -> None:
        m, groups, positions, rows = self._delta.shape
        if m == groups == positions == 1 and self._unfold is None and gate is None and out.numel() <= CHUNK:
            delta, x = self._delta.view(rows, 1).to(out.dtype), self._x.view(1, -1).to(out.dtype)
            noise = torch.addcmul(g_batch.to(out.dtype), delta, x, value=-self._factor, out=_scratch(out.shape, out))
            out.addcmul_(noise, noise, value=weight)
            return
        out, g_batch = out.view(groups, rows, -1), g_batch.to(out.dtype).reshape(groups, rows, -1)
        if m > 1 and gate is None and positions <= MAX_POSITIONS_OF_PAIRS:
            delta, x = next(self._samples(m, out.dtype))
            if _add_squares_by_pairs_(out, delta, x, g_batch, weight, centred):
                return
        columns = out.shape[-1]
        height = min(rows, max(1, CHUNK // (groups * columns)))
        at_once = max(1, CHUNK // (groups * columns * max(height, positions)))
        for delta, x in self._samples(at_once, out.dtype):
            for top in range(0, rows, height):
                part = slice(top, top + height)
                sums, of_rows, g = (
                    (out, delta, g_batch) if height == rows else (out[:, part], delta[..., part], g_batch[:, part])
                )
                noise = torch.matmul(of_rows.mT, x, out=_scratch((len(delta), *g.shape), out)).sub_(g)
                _add_squares_(sums, noise, weight, gate)

    def _samples(self, at_once: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.count, at_once):
            delta, x = self._delta, self._x
            if at_once < self.count:
                delta, x = delta[start : start + at_once], x[start : start + at_once]
            x = x.to(dtype)
            yield delta.to(dtype) * self._factor, x if self._unfold is None else self._unfold(x)


class Lookups:
    """The gradients of a table: rows that were looked up have one, added up over the places; all others are zero.

    Args:
        index: of the rows. (m, places), int.
        delta: by what was looked up. (m, places, width).
        rows: of the table.
    """

    def __init__(self, index: Tensor, delta: Tensor, rows: int) -> None:
        self._index, self._delta, self._rows, self.count = index, delta, rows, len(index)

    def scale_(self, factor: float) -> None:
        self._delta = self._delta.to(_wide(self._delta.dtype)) * factor

    def unchecked(self) -> Tensor | None:
        return None

    def dense(self, count: int | None = None) -> Tensor:
        index, delta = self._index[:count], self._delta[:count].to(_wide(self._delta.dtype))
        values = delta.new_zeros(len(index) * self._rows, delta.shape[-1])
        values.index_add_(0, self._keys(index), delta.flatten(0, 1))
        return values.view(len(index), self._rows, -1)

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, centred: bool = False, gate: Tensor | None = None
    ) -> None:
        # Equal (sample, row) pairs stand together; segment s is the s-th pair. As many segments as places are made
        # room for: how many there are only the device knows.
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
        untouched = self.count - out.new_zeros(self._rows).index_add_(0, row, used)
        noise = _gated(sums - g_batch[row].to(out.dtype), gate)
        out.index_add_(0, row, noise.square_().mul_(used[:, None]), alpha=weight)
        height = max(1, CHUNK // width)
        for top in range(0, self._rows, height):
            g = _gated(g_batch[top : top + height].to(out.dtype), gate)
            out[top : top + height].addcmul_(g * untouched[top : top + height, None], g, value=weight)

    def _keys(self, index: Tensor) -> Tensor:
        """A number for each pair of a sample and a row, for each place."""
        return (index + self._rows * torch.arange(len(index), device=index.device)[:, None]).flatten()


class Squares:
    """Not kept: Σ_j (g_j - g_S)² has been added up already, in the order in which the gradients came.

    Args:
        g_batch: g_S. (*p.shape).
    """

    def __init__(self, g_batch: Tensor) -> None:
        self._g_batch = g_batch
        self._sum = g_batch.new_zeros(g_batch.shape, dtype=_wide(g_batch.dtype))
        self.count = 0

    def append(self, g: Tensor) -> None:
        """The next sample's. (*p.shape)."""
        self.count += 1
        _add_squares_(self._sum, g.to(self._sum.dtype) - self._g_batch.to(self._sum.dtype), 1.0, None)

    def scale_(self, factor: float) -> None:
        raise TypeError("a sum of squared noise cannot be rescaled: g_S is part of it")

    def unchecked(self) -> Tensor | None:
        return self._sum

    def dense(self, count: int | None = None) -> Tensor:
        raise TypeError("single gradients were not kept")

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, centred: bool = False, gate: Tensor | None = None
    ) -> None:
        out.add_(_gated(self._sum, gate), alpha=weight)


def one_by_one(samples: Iterable[Mapping[str, Tensor]], g_batch: Named, singly: bool) -> dict[str, PerSample]:
    """Gradients that come sample by sample.

    Args:
        samples: ``{name: (*p.shape)}`` of each. A name that one of them lacks is left out.
        g_batch: g_S.
        singly: whether to keep every one, not only the sum of squared noise.
    """
    found: dict[str, Squares | list[Tensor]] = {}
    for i, sample in enumerate(samples):
        if i == 0:
            found = {name: [] if singly else Squares(g_batch[name]) for name in sample}
        for name in [name for name in found if name not in sample]:
            del found[name]
        for name, gathered in found.items():
            gathered.append(sample[name])
    return {name: Stacked(torch.stack(g), False) if isinstance(g, list) else g for name, g in found.items()}


def _add_squares_(out: Tensor, noise: Tensor, weight: float, gate: Tensor | None) -> None:
    """Add weight · noise² to `out`, or weight · Σ_j noise_j² where there are several. `noise` is used up."""
    if gate is not None:
        noise = torch.where(gate, noise, 0.0)
    if noise.dim() == out.dim():
        out.addcmul_(noise, noise, value=weight)
    elif len(noise) == 1:
        out.addcmul_(noise[0], noise[0], value=weight)
    else:
        out.add_(noise.square_().sum(0), alpha=weight)


def _add_squares_by_pairs_(
    out: Tensor, delta: Tensor, x: Tensor, g_batch: Tensor, weight: float, centred: bool
) -> bool:
    """Add weight · Σ_j (g_j - g_S)² to `out`, where g_j² is a sum over pairs of positions: one matrix product for all.

    (Σ_k δ_k x_k)² = Σ_k δ_k² x_k² + 2 Σ_{k<l} δ_k δ_l x_k x_l; Σ_j (g_j - g_S)² = Σ_j g_j² - 2 g_S Σ_j g_j + m g_S².
    If neither factor has noise, the products have none, and the mean square would cancel it away. (A gradient without
    noise whose factors have some, because each makes up for the other, keeps the rounding of its square as noise.)

    Returns:
        Whether it was done: there is noise in the factors.
    """
    squares = delta.square(), x.square()
    if not any(_is_noisy(*pair) for pair in zip((delta, x), squares, strict=True)):
        return False
    one, other = torch.triu_indices(delta.shape[2], delta.shape[2], device=delta.device)
    weights = torch.where(one == other, 1.0, 2.0).to(delta.dtype)[:, None] * weight
    for i, sums in enumerate(out):
        d, a, g = delta[:, i], x[:, i], g_batch[i]
        if len(one) == 1:
            by_output, by_input = squares[0][:, i].mul_(weight), squares[1][:, i]
        else:
            by_output, by_input = (d[:, one] * d[:, other]).mul_(weights), a[:, one] * a[:, other]
        sums.addmm_(by_output.flatten(0, 1).mT, by_input.flatten(0, 1))
        if centred:
            sums.addcmul_(g, g, value=-weight * len(delta))
        else:
            of_all = d.flatten(0, 1).mT @ a.flatten(0, 1)
            sums.addcmul_(g, of_all.mul_(2.0).sub_(g, alpha=len(delta)), value=-weight)
    return True


def _is_noisy(factor: Tensor, square: Tensor) -> bool:
    """Whether every column's spread over the samples has a share in its mean square. Of zeros all is noise."""
    mean_square = square.mean(0).sum(1)
    mean = factor.mean(0).square_().sum(1)
    return not bool((mean > (1 - MIN_NOISE) * mean_square).any())


@functools.lru_cache(maxsize=256)
def _buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One piece of memory in many shapes."""
    if len(shape) == 1:
        return torch.empty(shape, dtype=dtype)
    return _buffer((CHUNK,), dtype)[: math.prod(shape)].view(shape)


def _scratch(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for what is used up before the next call. New pages cost a CPU more than what is done with them."""
    if like.device.type != "cpu" or math.prod(shape) > CHUNK:
        return like.new_empty(shape)
    return _buffer(shape, like.dtype)


def _gated(tensor: Tensor, gate: Tensor | None) -> Tensor:
    return tensor if gate is None else torch.where(gate, tensor, 0.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

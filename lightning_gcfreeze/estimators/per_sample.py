"""Gradients of the first m samples of a batch by one parameter, in forms whose squared noise is cheap to add up.

What the recursion wants of them is Σ_j (g_j - g_S)², one number an element. A linear map's gradients need not be
written out for it, nor an embedding's; a bias's can. Differences are taken before squares, so that a large mean
gradient cannot cancel the noise away; where squares are added up first, it has been made sure that it does not.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named

CHUNK = 2**20
"""How many elements are written out at once: 4 MiB of float32, what stays in a cache."""

SMALL = 2**15
"""Up to this size, several gradients are written out by one call: more of them cost more than passes over memory."""

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
        return self._values[:count].to(wide(self._values.dtype)) * self._factor

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
        delta, x = next(self._samples(self.count if count is None else count, wide(self._delta.dtype)))
        return (delta.mT @ x).mul_(self._factor).reshape(-1, *self._shape)

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, centred: bool = False, gate: Tensor | None = None
    ) -> None:
        m, groups, positions, rows = self._delta.shape
        if m == groups == positions == 1 and self._unfold is None and gate is None and out.numel() <= CHUNK:
            delta, x = self._delta.view(rows, 1), self._x.view(1, -1)
            if not g_batch.dtype == delta.dtype == x.dtype == out.dtype:
                g_batch, delta, x = g_batch.to(out.dtype), delta.to(out.dtype), x.to(out.dtype)
            into = None if out.numel() <= SMALL else scratch("noise", out.shape, out)
            noise = torch.addcmul(g_batch, delta, x, value=-self._factor, out=into)
            out.addcmul_(noise, noise, value=weight)
            return
        out, g_batch = out.view(groups, rows, -1), g_batch.to(out.dtype).reshape(groups, rows, -1)
        if m > 1 and gate is None and positions <= MAX_POSITIONS_OF_PAIRS:
            delta, x = next(self._samples(m, out.dtype))
            # In half precision g_S has been rounded, and is not quite the mean.
            centred = centred and self._delta.dtype.itemsize >= 4
            if _add_squares_by_pairs_(out, delta, x, g_batch, weight, self._factor, centred):
                return
        columns = groups * out.shape[-1]
        height = max(1, CHUNK // columns)
        together = max(1, CHUNK // (columns * max(rows, positions))) if out.numel() <= SMALL else 1
        for deltas, xs in self._samples(max(together, CHUNK // (columns * positions)), out.dtype):
            for delta, x in zip(deltas.split(together), xs.split(together), strict=True):
                for top in range(0, rows, height):
                    part = slice(top, top + height)
                    if height >= rows:
                        _add_noise_(out, delta, x, g_batch, self._factor, weight, gate)
                    else:
                        _add_noise_(out[:, part], delta[..., part], x, g_batch[:, part], self._factor, weight, gate)

    def _samples(self, at_once: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.count, at_once):
            delta, x = self._delta, self._x
            if at_once < self.count:
                delta, x = delta[start : start + at_once], x[start : start + at_once]
            x = x.to(dtype)
            yield delta.to(dtype), x if self._unfold is None else self._unfold(x)


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
        self._delta = self._delta.to(wide(self._delta.dtype)) * factor

    def unchecked(self) -> Tensor | None:
        return None

    def dense(self, count: int | None = None) -> Tensor:
        index, delta = self._index[:count], self._delta[:count].to(wide(self._delta.dtype))
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
        noise = gated(sums - g_batch[row].to(out.dtype), gate)
        out.index_add_(0, row, noise.square_().mul_(used[:, None]), alpha=weight)
        height = max(1, CHUNK // width)
        for top in range(0, self._rows, height):
            g = gated(g_batch[top : top + height].to(out.dtype), gate)
            out[top : top + height].addcmul_(g * untouched[top : top + height, None], g, value=weight)

    def _keys(self, index: Tensor) -> Tensor:
        """A number for each pair of a sample and a row, for each place."""
        return (index + self._rows * torch.arange(len(index), device=index.device)[:, None]).flatten()


class Summed:
    """Not kept: Σ_j (g_j - g_S)² has been added up already.

    Args:
        squares: the sum. (*p.shape).
        count: m.
        in_batch: whether the gradients are terms of g_S.
    """

    def __init__(self, squares: Tensor, count: int, in_batch: bool) -> None:
        self._squares, self.count, self._in_batch, self._factor = squares, count, in_batch, 1.0

    def scale_(self, factor: float) -> None:
        """Multiply all of them, and g_S."""
        self._factor *= factor

    def unchecked(self) -> Tensor | None:
        return None if self._in_batch else self._squares

    def dense(self, count: int | None = None) -> Tensor:
        raise TypeError("single gradients were not kept")

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, centred: bool = False, gate: Tensor | None = None
    ) -> None:
        out.add_(gated(self._squares, gate), alpha=weight * self._factor**2)


def one_by_one(samples: Iterable[Mapping[str, Tensor]], g_batch: Named, singly: bool) -> dict[str, PerSample]:
    """Gradients that come sample by sample.

    Args:
        samples: ``{name: (*p.shape)}`` of each. A name that one of them lacks is left out.
        g_batch: g_S.
        singly: whether to keep every one, not only the sum of squared noise.
    """
    count, found = 0, dict[str, Tensor | list[Tensor]]()
    for sample in samples:
        if count == 0:
            found = {n: [] if singly else g_batch[n].new_zeros(g.shape, dtype=wide(g.dtype)) for n, g in sample.items()}
        count += 1
        for name in found.keys() - sample.keys():
            del found[name]
        for name, gathered in found.items():
            if isinstance(gathered, list):
                gathered.append(sample[name])
            else:
                noise = sample[name].to(gathered.dtype) - g_batch[name].to(gathered.dtype)
                gathered.addcmul_(noise, noise)
    return {
        name: Stacked(torch.stack(g), False) if isinstance(g, list) else Summed(g, count, False)
        for name, g in found.items()
    }


def _add_squares_(out: Tensor, noise: Tensor, weight: float, gate: Tensor | None) -> None:
    """Add weight · noise² to `out`, or weight · Σ_j noise_j² where there are several. `noise` is used up."""
    noise = gated(noise, gate)
    if noise.dim() == out.dim():
        out.addcmul_(noise, noise, value=weight)
    elif len(noise) == 1:
        out.addcmul_(noise[0], noise[0], value=weight)
    else:
        out.add_(noise.square_().sum(0), alpha=weight)


def _add_noise_(
    out: Tensor, delta: Tensor, x: Tensor, g_batch: Tensor, factor: float, weight: float, gate: Tensor | None
) -> None:
    """Add weight · Σ_j (g_j - g_S)² to `out`, written out."""
    if len(delta) > 1:
        noise = torch.matmul(delta.mT, x, out=scratch("noise", (len(delta), *g_batch.shape), out))
        torch.sub(g_batch, noise, alpha=factor, out=noise)
    elif len(g_batch) == 1:
        noise = scratch("noise", g_batch.shape, out)
        torch.addmm(g_batch[0], delta[0, 0].mT, x[0, 0], alpha=-factor, out=noise[0])
    else:
        noise = torch.baddbmm(g_batch, delta[0].mT, x[0], alpha=-factor, out=scratch("noise", g_batch.shape, out))
    _add_squares_(out, noise, weight, gate)


def _add_squares_by_pairs_(
    out: Tensor, delta: Tensor, x: Tensor, g_batch: Tensor, weight: float, factor: float, centred: bool
) -> bool:
    """Add weight · Σ_j (g_j - g_S)² to `out`, where g_j² is a sum over pairs of positions: one matrix product for all.

    (Σ_k δ_k x_k)² = Σ_k δ_k² x_k² + 2 Σ_{k<l} δ_k δ_l x_k x_l; Σ_j (g_j - g_S)² = Σ_j g_j² - 2 g_S Σ_j g_j + m g_S².
    If neither factor has noise, the products have none, and the mean square would cancel it away. (A gradient without
    noise whose factors have some, because each makes up for the other, keeps the rounding of its square as noise.)

    Returns:
        Whether it was done: there is noise in the factors.
    """
    squares = [torch.square(f, out=scratch(use, f.shape, f)) for use, f in (("delta²", delta), ("x²", x))]
    if not any(_is_noisy(*pair) for pair in zip((delta, x), squares, strict=True)):
        return False
    m, _, positions, _ = delta.shape
    for i, sums in enumerate(out):
        d, a, g = delta[:, i], x[:, i], g_batch[i]
        by_output, by_input = squares[0][:, i], squares[1][:, i]
        if positions > 1:
            by_output, by_input = _pairs("delta²", d), _pairs("x²", a)
            by_output[:, positions:] *= 2
        by_output.mul_(weight * factor**2)
        sums.addmm_(by_output.flatten(0, 1).mT, by_input.flatten(0, 1))
        if centred:
            sums.addcmul_(g, g, value=-weight * m)
        else:
            of_all = torch.mm(d.flatten(0, 1).mT, a.flatten(0, 1), out=scratch("noise", g.shape, g))
            sums.addcmul_(g, of_all.mul_(2.0 * factor).sub_(g, alpha=m), value=-weight)
    return True


def _pairs(use: str, factor: Tensor) -> Tensor:
    """Products of the values at two positions: at each one with itself, then at any two. (m, pairs, columns)."""
    m, n, columns = factor.shape
    products, start = scratch(use, (m, n * (n + 1) // 2, columns), factor), 0
    for apart in range(n):
        torch.mul(factor[:, apart:], factor[:, : n - apart], out=products[:, start : start + n - apart])
        start += n - apart
    return products


def _is_noisy(factor: Tensor, square: Tensor) -> bool:
    """Whether, at each position, every column's spread over the samples has a share in its mean square, or is zero."""
    mean, mean_square = factor.mean(0), square.mean(0)
    margin = torch.addcmul(mean_square.mul_(1 - MIN_NOISE), mean, mean, value=-1.0)
    return float(margin.min()) >= 0.0


class _Memory(threading.local):
    def __init__(self) -> None:
        self.known: dict[tuple[str, torch.dtype], Tensor] = {}


_memory = _Memory()


def scratch(use: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for what is used up before the next call for the same use; as large as the largest so far.

    New pages cost a CPU more than what is done with them here. Other devices' allocators keep theirs anyway.
    """
    size = math.prod(shape)
    if size <= SMALL or like.device.type != "cpu":
        return like.new_empty(shape)
    known = _memory.known.get((use, like.dtype))
    if known is None or known.numel() < size:
        known = _memory.known[use, like.dtype] = like.new_empty(size)
    return known[:size].view(shape)


def gated(tensor: Tensor, gate: Tensor | None) -> Tensor:
    """Zeros where the gate is False, whatever the tensor holds."""
    return tensor if gate is None else torch.where(gate, tensor, 0.0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the dtype itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)

"""Per-sample gradients that are sums of outer products: those of the weight of a linear map or a convolution.

Their squared noise is computed in one of four ways, the first that applies:

- one sample at one position: the outer product is never written out apart from the noise;
- up to `MAX_PAIRED_POSITIONS` positions: all samples in one matrix product, if rounding allows it;
- a large weight: each sample's gradient is written out in tiles of `CHUNK_NUMEL` elements;
- a small weight: the gradients of several samples are written out in one call.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lightning_gcfreeze.estimators.per_sample import add_squares_
from lightning_gcfreeze.estimators.scratch import CHUNK_NUMEL, scratch, wide

MAX_BATCHED_NUMEL = 2**15
"""For weights of up to this many elements, several samples' gradients are written out in one call: separate calls would
cost more than passes over memory."""

MAX_PAIRED_POSITIONS = 4
"""Up to this many positions, a matrix product over all pairs of positions replaces writing each gradient out. Measured
for a linear map of 256 to 1024 features, 64 and 128 samples, one thread of a CPU, it is at least 5 times as fast for 2
positions, 2.8 times for 3 and 2.5 times for 4."""

MIN_NOISE_SHARE = 0.05
"""Least share of noise in the mean square of a factor for which squares are summed before the mean is subtracted: then
the rounding error of the squares, 10⁻⁷ of them in float32, is at most 20 times as large relative to the noise."""


class OuterProducts:
    """Gradients g_j = Σ_l δ_jl ⊗ x_jl over positions l, in groups.

    Args:
        delta: the gradient of the loss with respect to the output, (m, groups, positions, rows).
        x: the input. What `unfold` turns into (m, groups, positions, columns); without `unfold`, that tensor itself.
        shape: the shape of the parameter, which has groups · rows · columns elements in this order.
        unfold: maps some samples of `x`, (n, …), to (n, groups, positions, columns).
    """

    def __init__(
        self, delta: Tensor, x: Tensor, shape: torch.Size, unfold: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._delta, self._x, self._shape, self._unfold = delta, x, shape, unfold
        self.count, self._factor = len(delta), 1.0

    def scale_(self, factor: float) -> None:
        self._factor *= factor

    def finiteness_probe(self) -> Tensor | None:
        return None

    def dense(self, count: int | None = None) -> Tensor:
        delta, x = next(self._chunks(self.count if count is None else count, wide(self._delta.dtype)))
        return (delta.mT @ x).mul_(self._factor).reshape(-1, *self._shape)

    def add_squared_noise_(
        self, out: Tensor, g_batch: Tensor, weight: float, mean_is_g_batch: bool = False, valid: Tensor | None = None
    ) -> None:
        m, groups, positions, rows = self._delta.shape
        if m == groups == positions == 1 and self._unfold is None and valid is None and out.numel() <= CHUNK_NUMEL:
            self._add_one_(out, g_batch, weight)
            return
        out, g_batch = out.view(groups, rows, -1), g_batch.to(out.dtype).reshape(groups, rows, -1)
        if m > 1 and valid is None and positions <= MAX_PAIRED_POSITIONS:
            delta, x = next(self._chunks(m, out.dtype))
            # In half precision g_S has been rounded, and is not quite the mean.
            mean_is_g_batch = mean_is_g_batch and self._delta.dtype.itemsize >= 4
            if _add_squares_by_pairs_(out, delta, x, g_batch, weight, self._factor, mean_is_g_batch):
                return
        columns = groups * out.shape[-1]
        height = max(1, CHUNK_NUMEL // columns)
        batched = max(1, CHUNK_NUMEL // (columns * max(rows, positions))) if out.numel() <= MAX_BATCHED_NUMEL else 1
        for deltas, xs in self._chunks(max(batched, CHUNK_NUMEL // (columns * positions)), out.dtype):
            for delta, x in zip(deltas.split(batched), xs.split(batched), strict=True):
                for top in range(0, rows, height):
                    tile = slice(top, top + height)
                    if height >= rows:
                        _add_noise_(out, delta, x, g_batch, self._factor, weight, valid)
                    else:
                        _add_noise_(out[:, tile], delta[..., tile], x, g_batch[:, tile], self._factor, weight, valid)

    def _add_one_(self, out: Tensor, g_batch: Tensor, weight: float) -> None:
        """Add the squared noise of one sample at one position."""
        delta, x = self._delta.view(-1, 1), self._x.view(1, -1)
        if not g_batch.dtype == delta.dtype == x.dtype == out.dtype:
            g_batch, delta, x = g_batch.to(out.dtype), delta.to(out.dtype), x.to(out.dtype)
        into = None if out.numel() <= MAX_BATCHED_NUMEL else scratch("noise", out.shape, out)
        noise = torch.addcmul(g_batch, delta, x, value=-self._factor, out=into)
        out.addcmul_(noise, noise, value=weight)

    def _chunks(self, n: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield δ and the unfolded x of `n` samples after the other."""
        for start in range(0, self.count, n):
            delta, x = self._delta, self._x
            if n < self.count:
                delta, x = delta[start : start + n], x[start : start + n]
            x = x.to(dtype)
            yield delta.to(dtype), x if self._unfold is None else self._unfold(x)


def _add_noise_(
    out: Tensor, delta: Tensor, x: Tensor, g_batch: Tensor, factor: float, weight: float, valid: Tensor | None
) -> None:
    """Add weight · Σ_j (g_j - g_S)² to `out`, the gradients of all samples of `delta` written out at once."""
    if len(delta) > 1:
        noise = torch.matmul(delta.mT, x, out=scratch("noise", (len(delta), *g_batch.shape), out))
        torch.sub(g_batch, noise, alpha=factor, out=noise)
    elif len(g_batch) == 1:
        noise = scratch("noise", g_batch.shape, out)
        torch.addmm(g_batch[0], delta[0, 0].mT, x[0, 0], alpha=-factor, out=noise[0])
    else:
        noise = torch.baddbmm(g_batch, delta[0].mT, x[0], alpha=-factor, out=scratch("noise", g_batch.shape, out))
    add_squares_(out, noise, weight, valid)


def _add_squares_by_pairs_(
    out: Tensor, delta: Tensor, x: Tensor, g_batch: Tensor, weight: float, factor: float, mean_is_g_batch: bool
) -> bool:
    """Add weight · Σ_j (g_j - g_S)² to `out`, where g_j² is a sum over pairs of positions: one matrix product for all.

    (Σ_k δ_k x_k)² = Σ_k δ_k² x_k² + 2 Σ_{k<l} δ_k δ_l x_k x_l; Σ_j (g_j - g_S)² = Σ_j g_j² - 2 g_S Σ_j g_j + m g_S².
    If neither factor is noisy, neither are the products, and subtracting the mean would cancel all digits. (A gradient
    without noise whose two factors are noisy, because each makes up for the other, keeps the rounding error of its
    square as noise.)

    Returns:
        False, with `out` unchanged, if neither factor is noisy.
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
        if mean_is_g_batch:
            sums.addcmul_(g, g, value=-weight * m)
        else:
            total = torch.mm(d.flatten(0, 1).mT, a.flatten(0, 1), out=scratch("noise", g.shape, g))
            sums.addcmul_(g, total.mul_(2.0 * factor).sub_(g, alpha=m), value=-weight)
    return True


def _pairs(use: str, factor: Tensor) -> Tensor:
    """Multiply the values at each two positions: first each with itself, then all others. (m, pairs, columns)."""
    m, n, columns = factor.shape
    products, start = scratch(use, (m, n * (n + 1) // 2, columns), factor), 0
    for distance in range(n):
        torch.mul(factor[:, distance:], factor[:, : n - distance], out=products[:, start : start + n - distance])
        start += n - distance
    return products


def _is_noisy(factor: Tensor, square: Tensor) -> bool:
    """Return whether each column, at each position, is zero or has at least `MIN_NOISE_SHARE` of noise in its square.

    The noise is the spread over the samples, the first axis.
    """
    mean, mean_square = factor.mean(0), square.mean(0)
    margin = torch.addcmul(mean_square.mul_(1 - MIN_NOISE_SHARE), mean, mean, value=-1.0)
    return float(margin.min()) >= 0.0

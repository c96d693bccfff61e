"""`granularity="mixed"`: freeze whole rows and columns where that saves work, single elements elsewhere.

The gradient of a weight is computed in one block: the rows with live elements times the columns with live elements.
Frozen elements inside it save memory, but no work, and where the live ones are scattered, the block is nearly the whole
weight. Here each weight gets a block that loses little of the order's scores for the work that it saves.

There is one price of work for all weights. A row leaves the block if its gain in the block's columns, what scores
exceed the threshold of k single elements by, is below the price of its products; a column likewise. Then the k lowest
freeze, first those outside of blocks. The price is the highest at which what is live has `KEPT` of the scores that it
would have without blocks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gcfreeze._computed import cuts
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import SINGLE_PROCESS
from lightning_gcfreeze.selection import radix

KEPT = 0.95
"""Least sum of live scores, relative to that of as many single elements."""
N_PRICES, LOWEST, HIGHEST = 64, 2.0**-8, 2.0**10
"""Prices that are tried, between these multiples of the mean gain of a product."""
LARGEST = 0.75
"""Largest fraction of a weight that is computed as a block; see `freezing.blocks.MAX_BLOCK_FRACTION`."""
PER_OCTAVE, OCTAVES = 8, 40
"""Scores are counted in bins, so many between a score and its half, from the threshold downwards."""


def in_blocks(
    scores: Named, k: int, costs: Mapping[str, int], work: float | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the order in which the elements outside of blocks are the lowest, in their own order, then those inside.

    Scores of elements outside become negative.

    Args:
        scores: ``{name: (*p.shape)}``, at least 0; -inf for elements that are frozen already.
        k: how many elements are to freeze.
        costs: how often a step uses each weight, by name: its gradient takes as many products for each element. The
            weights are matrices or convolutions' of (outputs, inputs, *kernel). Other parameters have no block.
        work: largest share of these weights' products inside of blocks, whatever that loses, and although more than k
            elements may lie outside then; None: no limit.

    Raises:
        ValueError: a finite score is negative, so that a sum of scores says nothing.
    """
    facts = _survey(scores)
    blocks = _blocks(scores, k, costs, facts, work) if costs and (k or work) else {}
    for name, score in scores.items():
        yield name, torch.where(blocks[name].holds(score), score, _below_zero(score)) if name in blocks else score


@dataclass(frozen=True)
class _Block:
    """What leaves a weight's block at which price, as the number of the price; `N_PRICES`: at none."""

    rows: Tensor  # int16, (rows,)
    columns: Tensor  # int16, (columns,)
    kernel: int  # elements for each pair of them
    price: int = -1
    """The one that is paid: what leaves at it, or at a lower one, is outside; `N_PRICES`: everything is."""

    @classmethod
    def of(cls, score: Tensor, threshold: float, cost: int, prices: list[float]) -> "_Block":
        gains, kernel = _gains(score, threshold), score[0, 0].numel()
        cost *= kernel
        rows, columns = (torch.full((n,), len(prices), dtype=torch.int16, device=score.device) for n in gains.shape)
        left = [torch.arange(n, device=score.device) for n in gains.shape]
        for i, price in enumerate(prices):
            for axis, leaves_at in enumerate((rows, columns)):
                stays = gains.sum(1 - axis) > price * cost * gains.shape[1 - axis]
                if not stays.all():
                    leaves_at[left[axis][~stays]] = i
                    left[axis] = left[axis][stays]
                    gains = gains[stays] if axis == 0 else gains[:, stays]
        return cls(rows, columns, kernel)

    @property
    def numel(self) -> int:
        """How many elements the weight has."""
        return len(self.rows) * len(self.columns) * self.kernel

    def computed_at(self, price: int) -> int:
        """Return of how many elements the gradient is computed at a price."""
        inside = int((self.rows > price).sum()) * int((self.columns > price).sum()) * self.kernel
        return inside if inside <= LARGEST * self.numel else self.numel

    def leaves_at(self, like: Tensor) -> Tensor:
        """Return for each element at which price it leaves, int16, expanded to the weight's shape."""
        return _expanded(torch.minimum(self.rows[:, None], self.columns), like)

    def holds(self, like: Tensor) -> Tensor:
        """Return which elements are inside, at the price that is paid."""
        return _expanded((self.rows > self.price)[:, None] & (self.columns > self.price), like)


def _blocks(scores: Named, k: int, costs: Mapping[str, int], facts: "_Facts", work: float | None) -> dict[str, _Block]:
    highest, total, dtype = facts

    def numbers() -> Iterator[Tensor]:
        for score in scores.values():
            yield from (chunk for _, chunk in radix.chunks(score, dtype, total))

    threshold = 0.0
    if k:
        kth = radix.kth_smallest(numbers, k, dtype, total, SINGLE_PROCESS.all_reduce_sum)
        threshold = max(float(kth.value), 0.0)
    if threshold > highest:
        return {}
    gain, products = 0.0, 0
    for name, cost in costs.items():
        score = scores[name]
        gain += float(_gains(score, threshold).clamp_(max=highest).sum())
        products += score.numel() * cost
        del score  # before the next one is read
    if not gain and work is None:
        return {}
    mean = gain / products
    step = (HIGHEST / LOWEST) ** (1 / (N_PRICES - 1))
    prices = [0.0, *(mean * LOWEST * step**i for i in range(N_PRICES - 1))]
    found = {name: _Block.of(scores[name], threshold, cost, prices) for name, cost in costs.items()}
    price = _highest_price(scores, (threshold, highest), total - k, found)
    while work is not None and price < N_PRICES:
        if sum(costs[name] * block.computed_at(price) for name, block in found.items()) <= work * products:
            break
        price += 1
    return {name: replace(block, price=price) for name, block in found.items()}


def _highest_price(scores: Named, bounds: tuple[float, float], n_live: int, blocks: Mapping[str, _Block]) -> int:
    """Return the number of the highest price at which enough is kept, or -1."""
    threshold, highest = bounds
    n_bins = PER_OCTAVE * OCTAVES + 2  # the first for what is much lower, the last for what is above the threshold
    counts = torch.zeros(N_PRICES + 1, n_bins, dtype=torch.float64)
    sums = torch.zeros_like(counts)
    for name, score in scores.items():
        leaves_at = blocks[name].leaves_at(score) if name in blocks else torch.full((), N_PRICES).expand(score.shape)
        for cut in cuts(score):
            values = cut(score).flatten().double().clamp(0.0, highest)
            place = cut(leaves_at).flatten().to(values.device, torch.int64) * n_bins + _bins(values, threshold, n_bins)
            counts += torch.bincount(place, minlength=counts.numel()).view_as(counts).to(counts.device)
            # Of bincount with weights, CUDA has no deterministic version.
            sums += values.new_zeros(counts.numel()).index_add_(0, place, values).view_as(sums).to(sums.device)
    # Of what is left at a price, from the highest bin on.
    counts, sums = (t.flip(0).cumsum(0).flip(0).flip(1).cumsum(1) for t in (counts, sums))
    kept = [_sum_of_highest(n_live, counts[i], sums[i]) for i in range(N_PRICES + 1)]  # [0] of all elements
    good = [i for i in range(N_PRICES) if counts[i + 1, -1] >= n_live and kept[i + 1] >= KEPT * kept[0]]
    return max(good, default=-1)


def _sum_of_highest(n: int, counts: Tensor, sums: Tensor) -> float:
    """Return the sum of the n highest scores, from numbers and sums of scores from the highest bin on."""
    i = int(torch.searchsorted(counts, n))
    if not n:
        return 0.0
    if i == len(counts):
        return float(sums[-1])
    below, sum_below = (float(counts[i - 1]), float(sums[i - 1])) if i else (0.0, 0.0)
    return sum_below + (float(sums[i]) - sum_below) * (n - below) / (float(counts[i]) - below)


def _bins(values: Tensor, threshold: float, n_bins: int) -> Tensor:
    if not threshold:
        return torch.where(values > 0, n_bins - 1, 0)
    octaves = (values / threshold).log2_().mul_(PER_OCTAVE).floor_().clamp_(-n_bins, 0)
    return torch.where(values > threshold, n_bins - 1, octaves.to(torch.int64).add_(n_bins - 2).clamp_(min=0))


def _expanded(pairs: Tensor, like: Tensor) -> Tensor:
    """Give all elements of a kernel the value of their pair of row and column."""
    return pairs.view(*pairs.shape, *[1] * (like.dim() - 2)).expand(like.shape)


def _below_zero(score: Tensor) -> Tensor:
    """Return negative numbers in the same order."""
    wide = score if score.dtype in (torch.float32, torch.float64) else score.double()
    return (-1.0 / wide.clamp(min=0.0)).clamp_(max=-torch.finfo(wide.dtype).tiny)


def _gains(score: Tensor, threshold: float) -> Tensor:
    """Return what scores exceed the threshold by, (rows, columns); of a convolution, added up over its kernel."""
    wide = score if score.dtype in (torch.float32, torch.float64) else score.float()
    gains = (wide - threshold).clamp_(min=0.0)
    return gains if gains.dim() == 2 else gains.flatten(2).sum(2)


class _Facts(NamedTuple):
    highest: float  # finite score, at least 0
    total: int  # scores
    dtype: torch.dtype  # in which they are compared


def _survey(scores: Named) -> _Facts:
    """Read the scores once for what is to be known of all of them; refuse negative ones."""
    highest, total, dtype = 0.0, 0, torch.float32
    for name, score in scores.items():
        total += score.numel()
        dtype = torch.float64 if score.dtype == torch.float64 else dtype
        finite = score.isfinite()
        highest = max(highest, float(score.masked_fill(~finite, 0.0).max())) if score.numel() else highest
        if bool(((score < 0) & finite).any()):
            raise ValueError(
                f"`granularity='mixed'` weighs sums of scores, which must not be negative: those of {name!r} are. Use"
                " 'element' or 'row' with this `order`, or an order of scores from 0 on, which has the same ranks."
            )
        del score, finite  # before the next one is read
    return _Facts(highest, total, dtype)

"""Which elements freeze: scores and k -> masks. The rule for ties stands only here.

Elements are compared by score. Equal scores go by the order of the parameters, then by the index in the parameter, row
by row. So exactly k elements are chosen, the same ones on every device and rank, and the choice for k is contained in
the choice for k + 1. With sharded parameters each process marks its local elements as it would in the whole parameter.
This is α(k) of the paper, Eq. (2.7), read as: rank <= k is frozen.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_gcfreeze._computed import cuts
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.distributed import UNSHARDED, Shards
from lightning_gcfreeze.selection import radix
from lightning_gcfreeze.selection.units import by_unit, expanded, has_units, local_units, n_units

MIN_ROWS, SUMMED_NUMEL = 64, 2**18
"""At least so many rows, and about so many elements, are added up at once, or all of them."""


def check_scores(scores: Named, parameters: Named) -> None:
    """Check that an ordering returned one score for each element.

    Raises:
        TypeError: `scores` is no mapping of tensors.
        ValueError: names or shapes differ from those of `parameters`, or a score is NaN.
    """
    if not isinstance(scores, Mapping) or not all(isinstance(score, Tensor) for score in scores.values()):
        raise TypeError(f"`order` must return a mapping of parameter names to tensors of scores, got {scores!r:.200}.")
    if scores.keys() != parameters.keys():
        raise ValueError(
            f"`order` must score every eligible parameter: {sorted(parameters.keys() - scores.keys())} missing,"
            f" {sorted(scores.keys() - parameters.keys())} unknown."
        )
    for name, score in scores.items():
        check_score(name, score, parameters[name].shape)


def check_score(name: str, score: Tensor, shape: torch.Size) -> None:
    """Check the scores of one parameter.

    Raises:
        ValueError: they have another shape than the parameter, or one of them is NaN.
    """
    if score.shape != shape:
        raise ValueError(
            f"`order` must return one score per element: {name!r} has the shape {tuple(shape)},"
            f" its scores {tuple(score.shape)}."
        )
    if n := sum(int(cut(score).isnan().count_nonzero()) for cut in cuts(score)):
        raise ValueError(f"`order` returned NaN for {n} elements of {name!r}.")


def pooled(scores: Named, granularity: Granularity, shards: Shards = UNSHARDED) -> dict[str, Tensor]:
    """Give every element the mean score of the unit that it freezes with.

    Args:
        scores: ``{name: (*p.shape)}``, any real dtype; for sharded parameters the local elements.
        granularity: "element", "mixed", "row" (see `units`) or "tensor".
        shards: the layout of the parameters.

    Returns:
        ``{name: (*p.shape)}``. With "element" and "mixed" the scores as they are; else means in float64, so
        that they are in the order of the exact means.
    """
    if not has_units(granularity):
        return dict(scores)
    return dict(means(unit_sums(name, score, granularity, shards) for name, score in scores.items()))


class UnitSums(NamedTuple):
    """Sums of scores over the units of one parameter, of those elements that are counted on this process."""

    name: str
    sums: Tensor
    """float64, (units of the whole parameter,)."""
    here: Tensor
    """The units that have local elements; see `local_units`."""
    numel: int
    """Elements of a unit."""
    shape: torch.Size
    """Of the local elements."""
    shards: Shards


def unit_sums(name: str, score: Tensor, granularity: Granularity, shards: Shards = UNSHARDED) -> UnitSums:
    """Add up the scores of each unit, "row" or "tensor". No communication."""
    shape = shards.shape(name, score)
    sums = torch.zeros(n_units(shape, granularity), dtype=torch.float64, device=score.device)
    here = local_units(name, score, granularity, shards)
    if shards.is_counted_here(name):
        sums[here] = _sum_of_each(by_unit(score, granularity))
    return UnitSums(name, sums, here, shape.numel() // max(len(sums), 1), score.shape, shards)


def means(units: Iterable[UnitSums]) -> Iterator[tuple[str, Tensor]]:
    """Give every element the mean of its unit, over all processes: a view of one number for each unit."""
    for name, sums, here, numel, shape, shards in units:
        of_units = shards.element_world.all_reduce_sum(sums) / numel
        yield name, expanded(of_units[here], shape)


def _sum_of_each(rows: Tensor) -> Tensor:
    """Return the sum of each row in float64, to which torch copies what it adds up: some rows at a time."""
    height = max(MIN_ROWS, SUMMED_NUMEL // max(rows.shape[1], 1))
    if rows.shape[1] > SUMMED_NUMEL:  # of few long rows, torch has several threads for one
        return rows.sum(1, dtype=torch.float64)
    return torch.cat([piece.sum(1, dtype=torch.float64) for piece in rows.split(height)])


def lowest_k(
    scores: Named, k: int, granularity: Granularity = "element", shards: Shards = UNSHARDED
) -> dict[str, Tensor]:
    """Mark the k elements with the lowest scores of all parameters; of whole rows or tensors, as many as fit into k.

    The k-th lowest score of elements is found digit by digit (see `radix`), without a list of all scores. For rows and
    tensors there is one score each, and these are sorted.

    Args:
        scores: ``{name: (*p.shape)}``, any real dtype, free of NaN (see `check_scores`), after `pooled`; for sharded
            parameters the local elements.
        k: from 0 to the number of elements.
        granularity: with "row" and "tensor", units are taken in the order of their scores, up to the first that does
            not fit.
        shards: the layout of the parameters.

    Returns:
        ``{name: bool (*p.shape)}``, True for exactly k elements with "element" and "mixed", else for at most k.
    """
    return dict(marks(scores, k, granularity, shards))


def marks(
    scores: Named, k: int, granularity: Granularity = "element", shards: Shards = UNSHARDED, at_least: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield the masks of `lowest_k` one after the other, with their names; scores are read one after the other, too.

    With `at_least`, units are marked until they have k elements, not as long as they have at most k.
    """
    if has_units(granularity):
        yield from _lowest_units(scores, k, granularity, shards, at_least).items()
        return
    shapes, dtypes = dict[str, torch.Size](), set[torch.dtype]()
    for name, score in scores.items():
        shapes[name] = shards.shape(name, score)
        dtypes.add(score.dtype)
        del score  # here and below: before the next one is read
    all_reduce_sum, dtype = shards.element_world.all_reduce_sum, _comparable_dtype(dtypes)
    n_elements = sum(shape.numel() for shape in shapes.values())
    chunks = partial(radix.chunks, dtype=dtype, n_numbers=n_elements)
    counted = [name for name in scores if shards.is_counted_here(name)]
    if k == 0:
        for name, score in scores.items():
            yield name, torch.zeros(score.shape, dtype=torch.bool, device=score.device)
        return
    kth = radix.kth_smallest(
        lambda: (chunk for name in counted for _, chunk in chunks(scores[name])), k, dtype, n_elements, all_reduce_sum
    )
    n_left = k - kth.n_lower  # elements to choose among those whose score equals the k-th lowest
    take_all_ties = n_left == kth.n_equal
    n_ties = torch.zeros(len(scores), dtype=torch.int64)
    if not take_all_ties:
        for i, name in enumerate(scores):
            if name in counted:
                n_ties[i] = sum(int((chunk == kth.value).count_nonzero()) for _, chunk in chunks(scores[name]))
        n_ties = all_reduce_sum(n_ties)
    compare = torch.le if take_all_ties else torch.lt
    for (name, score), n_tied in zip(scores.items(), n_ties.tolist(), strict=True):
        marked = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        for start, chunk in chunks(score):
            compare(chunk, kth.value, out=marked.view(-1)[start : start + len(chunk)])
        n_chosen = min(n_left, n_tied)
        if not take_all_ties and n_chosen:
            n_left -= n_chosen
            ties = _Ties(name, score, kth.value, n_tied, chunks, shards)
            ties.mark_first_(marked, n_chosen)
            del ties
        del score
        yield name, marked
        del marked


def ranks(scores: Named) -> dict[str, Tensor]:
    """Return the rank of every element by score, 1 for the lowest: the vector I of the paper.

    ``lowest_k(scores, k)`` is ``ranks(scores) <= k`` for every k. diag(0.3, 0.2, 0.25) has the ranks [3, 1, 2].

    Returns:
        ``{name: int64 (*p.shape)}``, a permutation of 1, …, p.
    """
    order = torch.cat([score.flatten() for score in scores.values()]).argsort(stable=True)
    flat = torch.empty_like(order)
    flat[order] = torch.arange(1, len(order) + 1, device=order.device)
    by_parameter = flat.split([score.numel() for score in scores.values()])
    return {name: r.view(score.shape) for (name, score), r in zip(scores.items(), by_parameter, strict=True)}


def _lowest_units(scores: Named, k: int, granularity: Granularity, shards: Shards, at_least: bool) -> dict[str, Tensor]:
    here, shapes, unit_scores, sizes = dict[str, Tensor](), dict[str, torch.Size](), [], []
    for name, score in scores.items():
        here[name], shapes[name] = local_units(name, score, granularity, shards), score.shape
        shape = shards.shape(name, score)
        values = score.new_full((n_units(shape, granularity),), -torch.inf, dtype=torch.float64)
        values[here[name]] = by_unit(score, granularity)[:, 0].to(torch.float64)
        unit_scores.append(shards.element_world.all_reduce_max(values))
        sizes.append(torch.full_like(values, shape.numel() // max(len(values), 1), dtype=torch.int64))
    order = torch.cat(unit_scores).argsort(stable=True)
    fits = torch.empty_like(order, dtype=torch.bool)
    in_order = torch.cat(sizes)[order]
    with_those_before = in_order.cumsum(0)
    fits[order] = with_those_before - in_order < k if at_least else with_those_before <= k
    by_parameter = fits.split([len(values) for values in unit_scores])
    return {name: expanded(f[here[name]], shapes[name]) for name, f in zip(scores, by_parameter, strict=True)}


@dataclass(frozen=True)
class _Ties:
    """The elements of one parameter whose score equals the k-th lowest."""

    name: str
    score: Tensor
    kth_value: float | int
    n_tied: int  # on all processes
    chunks: Callable[[Tensor], Iterator[tuple[int, Tensor]]]
    shards: Shards

    def mark_first_(self, marked: Tensor, n: int) -> None:
        """Set the mask of the local elements to True for the first n ties of the whole parameter."""
        last: float | int = self._size
        if n < self.n_tied:
            world = self.shards.element_world
            last = radix.kth_smallest(self._counted, n, self._index_dtype, self._size, world.all_reduce_sum).value
        for local_index, index in self._indices():
            marked.view(-1)[local_index[index <= last]] = True

    def _indices(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the flat indices of ties: in the local elements, and in the whole parameter."""
        for start, chunk in self.chunks(self.score):
            local_index = (chunk == self.kth_value).nonzero().squeeze(1).add_(start)
            index = self.shards.flat_index(self.name, local_index, self.score)
            yield local_index, index.to(self._index_dtype)

    def _counted(self) -> Iterator[Tensor]:
        """Yield the indices in the whole parameter, on one of the processes that hold the same elements."""
        if self.shards.is_counted_here(self.name):
            for _, index in self._indices():
                yield index

    @property
    def _size(self) -> int:
        return self.shards.shape(self.name, self.score).numel()

    @property
    def _index_dtype(self) -> torch.dtype:
        return torch.int32 if self._size < 2**31 else torch.int64


def _comparable_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype in which all scores are compared: float32, float64 or int64."""
    dtype = reduce(torch.promote_types, dtypes)
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype == torch.float64 else torch.float32

"""Which elements freeze: scores and k -> masks. The rule for ties stands only here.

Elements are compared by score. Equal scores go by the order of the parameters, then by the index in the parameter, row
by row. So exactly k elements are chosen, the same ones on every device and rank, and the choice for k is contained in
the choice for k + 1. With sharded parameters each process marks its local elements as it would in the whole parameter.
This is α(k) of the paper, Eq. (2.7), read as: rank <= k is frozen.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.distributed import UNSHARDED, Shards
from lightning_gcfreeze.selection import radix
from lightning_gcfreeze.selection.units import by_unit, expanded, local_units, n_units


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
        if score.shape != parameters[name].shape:
            raise ValueError(
                f"`order` must return one score per element: {name!r} has the shape {tuple(parameters[name].shape)},"
                f" its scores {tuple(score.shape)}."
            )
        if score.isnan().any():
            raise ValueError(f"`order` returned NaN for {int(score.isnan().sum())} elements of {name!r}.")


def pooled(scores: Named, granularity: Granularity, shards: Shards = UNSHARDED) -> dict[str, Tensor]:
    """Give every element the mean score of the unit that it freezes with.

    Args:
        scores: ``{name: (*p.shape)}``, any real dtype; for sharded parameters the local elements.
        granularity: "element", "row" (see `units`) or "tensor".
        shards: the layout of the parameters.

    Returns:
        ``{name: (*p.shape)}``. With "element" the scores as they are; else means in float64, so that they are in the
        order of the exact means.
    """
    if granularity == "element":
        return dict(scores)
    means = {}
    for name, score in scores.items():
        shape = shards.shape(name, score)
        sums = torch.zeros(n_units(shape, granularity), dtype=torch.float64, device=score.device)
        here = local_units(name, score, granularity, shards)
        if shards.is_counted_here(name):
            sums[here] = by_unit(score, granularity).sum(1, dtype=torch.float64)
        of_units = shards.element_world.all_reduce_sum(sums) / (shape.numel() // max(len(sums), 1))
        means[name] = expanded(of_units[here], score)
    return means


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
        ``{name: bool (*p.shape)}``, True for exactly k elements with "element", else for at most k.
    """
    if granularity != "element":
        return _lowest_units(scores, k, granularity, shards)
    marked = {name: torch.zeros(score.shape, dtype=torch.bool, device=score.device) for name, score in scores.items()}
    if k == 0:
        return marked
    all_reduce_sum, dtype = shards.element_world.all_reduce_sum, _comparable_dtype(scores)
    n_elements = sum(shards.shape(name, score).numel() for name, score in scores.items())
    chunks = partial(radix.chunks, dtype=dtype, n_numbers=n_elements)
    counted = [name for name in scores if shards.is_counted_here(name)]
    kth = radix.kth_smallest(
        lambda: (chunk for name in counted for _, chunk in chunks(scores[name])), k, dtype, n_elements, all_reduce_sum
    )
    n_left = k - kth.n_lower  # elements to choose among those whose score equals the k-th lowest
    take_all_ties = n_left == kth.n_equal
    compare = torch.le if take_all_ties else torch.lt
    n_ties = torch.zeros(len(scores), dtype=torch.int64)
    for i, (name, score) in enumerate(scores.items()):
        for start, chunk in chunks(score):
            compare(chunk, kth.value, out=marked[name].view(-1)[start : start + len(chunk)])
            if not take_all_ties and name in counted:
                n_ties[i] += int((chunk == kth.value).count_nonzero())
    if take_all_ties:
        return marked
    for (name, score), n_tied in zip(scores.items(), all_reduce_sum(n_ties).tolist(), strict=True):
        n_chosen = min(n_left, n_tied)
        n_left -= n_chosen
        if n_chosen:
            ties = _Ties(name, score, kth.value, n_tied, chunks, shards)
            ties.mark_first_(marked[name], n_chosen)
    return marked


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


def _lowest_units(scores: Named, k: int, granularity: Granularity, shards: Shards) -> dict[str, Tensor]:
    here = {name: local_units(name, score, granularity, shards) for name, score in scores.items()}
    unit_scores, sizes = [], []
    for name, score in scores.items():
        shape = shards.shape(name, score)
        values = score.new_full((n_units(shape, granularity),), -torch.inf, dtype=torch.float64)
        values[here[name]] = by_unit(score, granularity)[:, 0].to(torch.float64)
        unit_scores.append(shards.element_world.all_reduce_max(values))
        sizes.append(torch.full_like(values, shape.numel() // max(len(values), 1), dtype=torch.int64))
    order = torch.cat(unit_scores).argsort(stable=True)
    fits = torch.empty_like(order, dtype=torch.bool)
    fits[order] = torch.cat(sizes)[order].cumsum(0) <= k
    by_parameter = fits.split([len(values) for values in unit_scores])
    return {name: expanded(f[here[name]], scores[name]) for name, f in zip(scores, by_parameter, strict=True)}


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


def _comparable_dtype(scores: Named) -> torch.dtype:
    """Return the dtype in which all scores are compared: float32, float64 or int64."""
    dtype = reduce(torch.promote_types, (score.dtype for score in scores.values()))
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype == torch.float64 else torch.float32

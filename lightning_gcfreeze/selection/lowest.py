"""Which elements are eligible, and which of them freeze: scores and k -> masks. The rule for ties stands only here.

Elements are compared by score; equal scores go by the order of the parameters, then by index within the parameter
(row by row). So k elements are chosen exactly, the same ones on every device and rank, and the choice for k is
contained in the choice for k + 1. Of a sharded parameter a process has a part, and decides for that part as it would
for the whole. This is α(k) of the paper, Eq. (2.7), read as: rank <= k is frozen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial, reduce

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze._names import closest, shortened
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.distributed import SINGLE_PROCESS, UNSHARDED, Shards, World
from lightning_gcfreeze.selection import radix


def eligible(
    module: nn.Module, optimizer: Optimizer, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Parameter]:
    """The parameters that require a gradient, that the optimizer has, and whose names match.

    Args:
        include: fnmatch patterns, one of which a name must match; None: no condition.
        exclude: fnmatch patterns, none of which a name may match.

    Raises:
        ValueError: there are none, or one is complex.
    """
    candidates = trained(module, optimizer)
    chosen = {
        name: p
        for name, p in candidates.items()
        if (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
    }
    if not chosen:
        names = shortened(candidates) or "none that belongs to the module and requires a gradient"
        hint = f" Closest: {closest(include[0], candidates)}." if include and candidates else ""
        raise ValueError(
            f"No parameter is eligible with `include={include}` and `exclude={exclude}`. The optimizer trains"
            f" {names}.{hint}"
        )
    if wrong := [name for name, p in chosen.items() if p.is_complex()]:
        raise ValueError(f"Complex parameters cannot be ordered: {', '.join(wrong)}. Leave them out by `exclude`.")
    return chosen


def trained(module: nn.Module, optimizer: Optimizer) -> dict[str, Parameter]:
    """The parameters of a module that require a gradient and that the optimizer has."""
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) in optimized}


def resolve_count(k: int | float, eligible: int) -> int:
    """How many of `eligible` elements `k` means: an int is a count, a float a fraction, rounded to the nearest.

    Raises:
        ValueError: there are fewer than `k` elements.
    """
    count = k if isinstance(k, int) else round(k * eligible)
    if count > eligible:
        raise ValueError(
            f"`k={k}` is more than the {eligible} eligible elements. Lower it, pass a float in [0, 1] for a fraction,"
            " or widen `include`/`exclude`."
        )
    return count


def pooled(
    scores: Named, granularity: Granularity, shards: Shards = UNSHARDED, world: World = SINGLE_PROCESS
) -> dict[str, Tensor]:
    """Give every element the mean score of what it freezes with.

    Args:
        scores: ``{name: (*p.shape)}``, any real dtype; of sharded parameters the local parts.
        granularity: "element"; "row", what has the same first index (an output neuron, a filter, a word's embedding, an
            element of a vector); or "tensor".
        shards: how the parameters lie on the processes.
        world: these processes, where there are shards.

    Returns:
        ``{name: (*p.shape)}``; means are float64, so that their order is that of the exact ones.
    """
    if granularity == "element":
        return dict(scores)
    found = {}
    for name, score in scores.items():
        shape = shards.shape(name, score)
        sums = torch.zeros(_count_of_units(shape, granularity), dtype=torch.float64, device=score.device)
        own = _own_units(name, score, granularity, shards)
        if shards.counts(name):
            sums[own] = _units(score, granularity).sum(1, dtype=torch.float64)
        means = world.all_reduce_sum(sums) / (shape.numel() // max(len(sums), 1))
        found[name] = _for_elements(means[own], score)
    return found


def lowest_k(
    scores: Named,
    k: int,
    granularity: Granularity = "element",
    shards: Shards = UNSHARDED,
    world: World = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Mark the k elements of the lowest score over all tensors; of whole rows or tensors, as many as fit into k.

    Elements are found by counting the digits of their scores (see `kth`), so nowhere is there a list of all of them.
    Of rows and tensors there is one.

    Args:
        scores: ``{name: (*p.shape)}``, any real dtype, free of NaN (see `check_scores`); `pooled` for `granularity`; of
            sharded parameters the local parts.
        k: 0 to the number of elements.
        granularity: rows or tensors are taken in the order of their scores, up to the first that would be too much.
        shards: how the parameters lie on the processes.
        world: these processes, where there are shards.

    Returns:
        ``{name: bool (*p.shape)}``, True for exactly k elements in all, or for at most k.
    """
    if granularity != "element":
        return _lowest_units(scores, k, granularity, shards, world)
    chosen = {name: torch.zeros(score.shape, dtype=torch.bool, device=score.device) for name, score in scores.items()}
    if k == 0:
        return chosen
    dtype = _comparable(scores)
    count = sum(shards.shape(name, score).numel() for name, score in scores.items())
    pieces = partial(radix.pieces, dtype=dtype, count=count)
    counted = [name for name in scores if shards.counts(name)]
    threshold, lower, equal = radix.kth_smallest(
        lambda: (some for name in counted for _, some in pieces(scores[name])), k, dtype, count, world.all_reduce_sum
    )
    missing = k - lower
    compare = torch.le if missing == equal else torch.lt
    ties = torch.zeros(len(scores), dtype=torch.int64)
    for i, (name, score) in enumerate(scores.items()):
        for start, some in pieces(score):
            compare(some, threshold, out=chosen[name].view(-1)[start : start + len(some)])
            if missing < equal and name in counted:
                ties[i] += int((some == threshold).count_nonzero())
    if missing == equal:
        return chosen
    for (name, score), tied in zip(scores.items(), world.all_reduce_sum(ties).tolist(), strict=True):
        taken = min(missing, tied)
        missing -= taken
        if taken:
            _take_ties_(chosen[name], name, score, taken, tied, threshold, pieces, shards, world)
    return chosen


def ranks(scores: Named) -> dict[str, Tensor]:
    """The paper's vector I: for every element its place in the order, 1 = lowest score.

    ``lowest_k(scores, k)`` is ``ranks(scores) <= k`` for every k. diag(0.3, 0.2, 0.25) has the ranks [3, 1, 2].

    Returns:
        ``{name: int64 (*p.shape)}``, a permutation of 1, …, p.
    """
    flat = _flatten(scores)
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(1, len(order) + 1, device=order.device)
    return _unflatten(places, scores)


def sampled(named: Named, most: int, shards: Shards = UNSHARDED, world: World = SINGLE_PROCESS) -> Tensor:
    """At most so many elements, evenly spaced over all tensors, the same ones each time: (n,), float64, on the CPU.

    Of an element that several processes have, the mean of what they have.
    """
    sizes = [shards.shape(name, tensor).numel() for name, tensor in named.items()]
    total = sum(sizes)
    count = min(total, most)
    places = torch.arange(count) * total // max(count, 1)
    found = torch.zeros(2, count, dtype=torch.float64)  # sums of values, and how many there are
    start = 0
    for (name, tensor), size in zip(named.items(), sizes, strict=True):
        mine = (places >= start) & (places < start + size)
        where, start = places[mine] - start, start + size
        if shards:
            own = shards.flat_index(name, torch.arange(tensor.numel(), device=tensor.device), tensor).cpu()
            own, order = own.sort()
            at = torch.searchsorted(own, where).clamp(max=max(0, len(own) - 1))
            there = own[at] == where if len(own) else torch.zeros_like(where, dtype=torch.bool)
            mine[mine.clone()] = there
            where = order[at[there]] if len(own) else where[:0]
        found[0, mine] = tensor.flatten()[where.to(tensor.device)].to("cpu", torch.float64)
        found[1, mine] = 1.0
    found = world.all_reduce_sum(found)
    return found[0] / found[1]


def check_scores(scores: Named, parameters: Named) -> None:
    """Refuse scores that do not order the parameters.

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


def _lowest_units(scores: Named, k: int, granularity: Granularity, shards: Shards, world: World) -> dict[str, Tensor]:
    owns = {name: _own_units(name, score, granularity, shards) for name, score in scores.items()}
    of_units, sizes = [], []
    for name, score in scores.items():
        shape = shards.shape(name, score)
        values = torch.full(
            (_count_of_units(shape, granularity),), -torch.inf, dtype=torch.float64, device=score.device
        )
        values[owns[name]] = _units(score, granularity)[:, 0].to(torch.float64)
        of_units.append(world.all_reduce_max(values))
        sizes.append(torch.full_like(values, shape.numel() // max(len(values), 1), dtype=torch.int64))
    order = torch.cat(of_units).argsort(stable=True)
    chosen = torch.empty_like(order, dtype=torch.bool)
    chosen[order] = torch.cat(sizes)[order].cumsum(0) <= k
    of_each = chosen.split([len(values) for values in of_units])
    return {name: _for_elements(marks[owns[name]], scores[name]) for name, marks in zip(scores, of_each, strict=True)}


def _count_of_units(shape: torch.Size, granularity: Granularity) -> int:
    """How many rows or tensors a whole parameter is."""
    if not shape.numel():
        return 0
    return shape[0] if granularity == "row" and shape else 1


def _own_units(name: str, tensor: Tensor, granularity: Granularity, shards: Shards) -> Tensor:
    """Which rows or tensors of the whole parameter those of its local part are, or are pieces of."""
    if not tensor.numel():
        return torch.zeros(0, dtype=torch.int64, device=tensor.device)
    if granularity == "row":
        return shards.rows(name, tensor)
    return torch.zeros(1, dtype=torch.int64, device=tensor.device)


def _take_ties_(
    chosen: Tensor,
    name: str,
    score: Tensor,
    taken: int,
    tied: int,
    threshold: float,
    pieces: Callable[[Tensor], Iterator[tuple[int, Tensor]]],
    shards: Shards,
    world: World,
) -> None:
    """Mark so many of a parameter's equal scores, the first in the whole parameter."""
    size = shards.shape(name, score).numel()
    dtype = torch.int32 if size < 2**31 else torch.int64

    def places() -> Iterator[tuple[Tensor, Tensor]]:
        """In the local part, and in the whole parameter."""
        for start, some in pieces(score):
            where = (some == threshold).nonzero().squeeze(1).add_(start)
            yield where, shards.flat_index(name, where, score).to(dtype)

    last: float = size
    if taken < tied:
        own = (lambda: (in_whole for _, in_whole in places())) if shards.counts(name) else tuple[Tensor, ...]
        last = radix.kth_smallest(own, taken, dtype, size, world.all_reduce_sum).value
    for where, in_whole in places():
        chosen.view(-1)[where[in_whole <= last]] = True


def _comparable(scores: Named) -> torch.dtype:
    """What all scores can be compared as: float32, float64 or int64."""
    dtype = reduce(torch.promote_types, (score.dtype for score in scores.values()))
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype == torch.float64 else torch.float32


def _for_elements(of_units: Tensor, like: Tensor) -> Tensor:
    """What a tensor has for each of its units, for each of its elements."""
    if not like.numel():
        return of_units.new_empty(like.shape)
    return of_units.reshape(len(of_units), *[1] * max(0, like.dim() - 1)).expand(like.shape or (1,)).reshape(like.shape)


def _units(tensor: Tensor, granularity: Granularity) -> Tensor:
    """(rows or tensors, elements of each); of an empty tensor (0, 1)."""
    if not tensor.numel():
        return tensor.reshape(0, 1)
    return tensor.reshape(len(tensor) if granularity == "row" and tensor.dim() else 1, -1)


def _flatten(scores: Named) -> Tensor:
    return torch.cat([score.flatten() for score in scores.values()])


def _unflatten(flat: Tensor, like: Named) -> dict[str, Tensor]:
    pieces = flat.split([score.numel() for score in like.values()])
    return {name: piece.view(score.shape) for (name, score), piece in zip(like.items(), pieces, strict=True)}

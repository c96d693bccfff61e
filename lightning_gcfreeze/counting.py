"""How many elements a plan wants frozen: as many as were asked for, or as a budget makes necessary."""

from collections.abc import Collection, Iterator

import torch
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from lightning_gcfreeze import selection
from lightning_gcfreeze.distributed import local
from lightning_gcfreeze.freezing import ELEMENTWISE, Savings, blocks, room_for
from lightning_gcfreeze.options import Options
from lightning_gcfreeze.planning.budget import Budget
from lightning_gcfreeze.surroundings import Surroundings

INDEX_BYTES = 4
"""Of the index of a live element or row in its weight, and of one more in the block that is computed."""


def how_many(
    k: int | float | Budget, n_eligible: int, parameters: Collection[Parameter], options: Options, around: Surroundings
) -> int:
    """Return how many elements freeze, the same on all processes; with a budget of work, at least so many.

    Args:
        k: a count, a fraction or a budget.
        n_eligible: elements of all eligible parameters, over all processes.
        parameters: the eligible ones.
        options: what freezes together, and what may be skipped.
        around: the optimizer, with the state that it has without a freeze, and the processes.

    Raises:
        ValueError: `k` is more than there is, or less memory than what cannot freeze takes.
    """
    if not isinstance(k, Budget):
        return selection.resolve_count(k, n_eligible)
    if k.memory is None:
        return 0
    is_compact = type(around.optimizer) in ELEMENTWISE
    has_buckets = isinstance(around.wrapper, DistributedDataParallel)  # which keep all gradients
    saves_gradients = is_compact and options.skip_frozen_gradients and not has_buckets
    places = [2 * INDEX_BYTES * _n_places(p, options) for p in parameters]
    own = room_for(k.memory, around.optimizer, parameters, sum(places), saves_gradients)
    room = float(around.world.all_reduce_min(torch.tensor(own, dtype=torch.float64)))
    if room < 0:
        raise ValueError(
            f"`k={k}`: what cannot freeze takes more memory than that. It is the state and the gradients of parameters"
            " that are not eligible, state that is not by element, and all gradients under DDP, in loops that may look"
            " at them, and with optimizers that cannot be compacted. Raise it, or widen `include`/`exclude`."
        )
    return n_eligible - int(min(room, 1.0) * n_eligible)


def least_fraction(k: int | float | Budget, count: int, n_eligible: int) -> float:
    """Return which fraction will freeze, as far as it is known before the freeze."""
    work = k.work if isinstance(k, Budget) else None
    return max(count / n_eligible, 0.0 if work is None else 1 - work)


def shortfalls(options: Options, savings: Savings) -> Iterator[str]:
    """Yield sentences to warn with if a freeze takes more than its budget."""
    k = options.k
    if not isinstance(k, Budget):
        return
    taken = savings.after.state + savings.after.gradients + savings.index_bytes
    if k.memory is not None and taken > k.memory:
        yield (
            f"`k={k}` is missed: state, gradients and indices take {taken:,} bytes. Either code may look at gradients,"
            " so that all of them stay (the log names it), or live elements lie in rows that are shorter than others."
        )
    large = [p for p in savings.parameters.values() if p.flops and blocks.is_large(p.flops // 2)]
    if k.work is not None and not large:
        yield (
            f"`k={k}`: there is no weight whose gradient can be computed in part. Weights have to be large and used"
            " often, in linear layers or plain convolutions that are not compiled, and not sharded."
        )
    elif k.work is not None:
        share = 1 - sum(p.flops_skipped or 0 for p in large) / sum(p.flops or 0 for p in large)
        if share > k.work + 1e-6:
            yield (
                f"`k={k}` is missed: {share:.0%} of the products are computed, because code may look at gradients; the"
                " log names it."
            )


def _n_places(p: Parameter, options: Options) -> int:
    own = local(p.detach())
    by_granularity = {"tensor": 0, "row": len(own) if own.dim() else 1}
    return by_granularity.get(options.granularity, own.numel())

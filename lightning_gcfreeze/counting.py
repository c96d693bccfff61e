"""How many elements a plan wants frozen: as many as were asked for, or as a budget makes necessary."""

from collections.abc import Collection

import torch
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from lightning_gcfreeze import selection
from lightning_gcfreeze._types import Granularity
from lightning_gcfreeze.freezing import Savings, room_for
from lightning_gcfreeze.planning.budget import Budget
from lightning_gcfreeze.surroundings import Surroundings

PLACE_BYTES = 8
"""Of a live element's or row's place in its weight, and in the block of it that is computed; tensors need none."""


def how_many(
    k: int | float | Budget,
    n_eligible: int,
    parameters: Collection[Parameter],
    granularity: Granularity,
    around: Surroundings,
) -> int:
    """Return how many elements freeze, the same on all processes; with a budget of work, at least so many.

    Args:
        k: a count, a fraction or a budget.
        n_eligible: elements of all eligible parameters, over all processes.
        parameters: the eligible ones.
        granularity: what freezes together.
        around: the optimizer, with the state that it has without a freeze, and the processes.

    Raises:
        ValueError: `k` is more than there is, or less memory than what cannot freeze takes.
    """
    if not isinstance(k, Budget):
        return selection.resolve_count(k, n_eligible)
    if k.memory is None:
        return 0
    has_units = selection.has_units(granularity)
    memory = k.memory - (PLACE_BYTES * sum(map(_n_rows, parameters)) if granularity == "row" else 0)
    keeps_gradients = isinstance(around.wrapper, DistributedDataParallel)  # in its buckets
    own = room_for(memory, around.optimizer, parameters, 0 if has_units else PLACE_BYTES, not keeps_gradients)
    room = float(around.world.all_reduce_min(torch.tensor(own, dtype=torch.float64)))
    if room < 0:
        raise ValueError(
            f"`k={k}`: what cannot freeze takes more memory than that: state and gradients of parameters that are not"
            " eligible, state that is not by element, DDP's buckets of gradients. Raise it, or widen"
            " `include`/`exclude`."
        )
    return n_eligible - int(min(room, 1.0) * n_eligible)


def _n_rows(p: Parameter) -> int:
    return len(p) if p.dim() else 1


def over_budget(k: object, savings: Savings) -> str | None:
    """Return a sentence to warn with if state, gradients and places take more memory after all than a budget has."""
    taken = savings.after.state + savings.after.gradients + savings.index_bytes
    if not isinstance(k, Budget) or k.memory is None or taken <= k.memory:
        return None
    return (
        f"`k={k}`: state, gradients and places take {taken:,} bytes. The optimizer keeps its whole state with"
        " `hold='restore'`, and all gradients where code may look at them; the log names it."
    )

"""The `state_dict` of a compacted optimizer, as it would be if the optimizer had not been compacted."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gcfreeze.freezing.optimizer_state import State


def ordinary_state_dict(
    optimizer: Optimizer,
    packed: dict[str, Any],
    members: Sequence[Sequence[Tensor]],
    names: Sequence[Any],
    full: Mapping[Tensor, State],
) -> dict[str, Any]:
    """Rewrite a `state_dict` of vectors of live elements as one of the parameters.

    Args:
        optimizer: the optimizer; groups that were added to it since it was compacted follow unchanged.
        packed: what its `state_dict` has made, with the vectors in the place of parameters.
        members: for each group the parameters it had before it was compacted.
        names: for each group their "param_names", or None.
        full: the states, in their ordinary shapes, of all parameters that are not in the optimizer themselves.

    Returns:
        ``{"state": {i: {key: value}}, "param_groups": [{"params": [i, ...], "lr": ..., ...}, ...]}``. The indices i
        count the parameters of all groups, group by group, in the order they had before they were compacted; a
        parameter without state has no entry. Entries by element have their parameter's shape (of a sharded one they
        are DTensors that lie as it does) and are zero where frozen; all others, such as Adam's count of steps, are
        those of the vector. If the optimizer was given names, each group has them as "param_names".
    """
    added = [group["params"] for group in optimizer.param_groups[len(members) :]]
    state = {key: value for key, value in packed["state"].items() if not isinstance(key, int)}
    groups, start = [], 0
    of_all = zip(
        packed["param_groups"], [*members, *added], itertools.chain(names, itertools.repeat(None)), strict=False
    )
    for group, params, own_names in of_all:
        indices = range(start, start + len(params))
        start = indices.stop
        states = (full.get(p) or optimizer.state.get(p, {}) for p in params)
        state |= {i: own for i, own in zip(indices, states, strict=True) if own}
        own_params = {"params": [*indices]} if own_names is None else {"params": [*indices], "param_names": own_names}
        groups.append(group | own_params)
    return {**packed, "state": state, "param_groups": groups}

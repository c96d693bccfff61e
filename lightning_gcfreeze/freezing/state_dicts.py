"""The `state_dict` of a compacted optimizer, as it would be if the optimizer had not been compacted."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gcfreeze.distributed import is_sharded
from lightning_gcfreeze.freezing.optimizer_state import State, copied, is_by_element


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
    full = _with_zero_states(full, members, optimizer)
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


def _with_zero_states(
    full: Mapping[Tensor, State], members: Sequence[Sequence[Tensor]], optimizer: Optimizer
) -> dict[Tensor, State]:
    """Add states of zeros for sharded parameters that were frozen before they had any state.

    ``torch.distributed.checkpoint`` steps a fresh optimizer to have a state to load into, and then misses what was not
    saved. As everywhere, elements that are frozen have zeros, and the count of steps of the others.

    Args:
        full: states of parameters that are not in the optimizer themselves; empty where there never was one.
        members: for each group of the optimizer, its parameters.
        optimizer: has the states of the others.
    """
    found = dict(full)
    for group in members:
        known = ((p, found.get(p) or optimizer.state.get(p)) for p in group)
        like, state = next(((p, state) for p, state in known if state), (None, None))
        for p in group:
            if state and like is not None and p in found and not found[p] and is_sharded(p):
                found[p] = {
                    key: torch.zeros_like(p, dtype=v.dtype, requires_grad=False)
                    if is_by_element(v, like)
                    else copied(v)
                    for key, v in state.items()
                }
    return found

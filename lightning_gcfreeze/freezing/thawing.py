"""Optimizer states of frozen elements, kept for as long as the elements may thaw.

The optimizer drops the state of a frozen element, or lets it decay. An element that thawed with zeros in its place
would take steps of up to 6.6 times the learning rate: Adam divides by the root of a second moment that has to be
accumulated anew, but corrects it by a count of steps that is large by then. So a thawed element resumes with the
optimizer state it had at the freeze. Nothing is kept for optimizers that are not in `ELEMENTWISE`: their state is left
as it is.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze._masks import MaskIndex
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import UNSHARDED, Shards, in_layout_of, is_sharded, local, part
from lightning_gcfreeze.freezing.optimizer_state import state_by_element, to_strided


class ThawStates:
    """Optimizer states of frozen elements, flat, one entry for each time that elements froze."""

    def __init__(self) -> None:
        self._masks: list[dict[str, Tensor]] = []
        self._states: list[dict[str, dict[str, Tensor]]] = []
        self._is_loaded = False  # whole, on the CPU, and not in use yet

    @torch.no_grad()
    def store(self, optimizer: Optimizer, parameters: Mapping[str, Parameter], freezing: Named) -> None:
        """Store the optimizer's state of elements that are about to freeze.

        Args:
            optimizer: with a state of the ordinary shapes.
            parameters: the parameters, by name.
            freezing: ``{name: bool (*p.shape)}``, True = live until now, and frozen from now on.
        """
        states = {}
        for name, mask in freezing.items():
            p, index = parameters[name], MaskIndex(mask.to(parameters[name].device))
            by_element = state_by_element(optimizer, p) if len(index) or is_sharded(p) else {}
            states[name] = {key: index.gather(part(p, to_strided(value))) for key, value in by_element.items()}
        self._masks.append(dict(freezing))
        self._states.append(states)

    @torch.no_grad()
    def restore_to(self, optimizer: Optimizer, parameters: Mapping[str, Parameter], thawing: Named) -> None:
        """Write the stored state of thawing elements into the optimizer's state, and drop it here.

        Args:
            optimizer: with a state of the ordinary shapes; sparse entries become dense.
            parameters: the parameters, by name.
            thawing: ``{name: bool (*p.shape)}``, True = frozen until now, and live from now on.
        """
        for masks, states in zip(self._masks, self._states, strict=True):
            for name, mask in masks.items():
                p = parameters[name]
                thaws = (mask & thawing[name])[mask].to(p.device)  # of the stored elements, in their order
                index, leaving, staying = (MaskIndex(m) for m in ((mask & thawing[name]).to(p.device), thaws, ~thaws))
                for key, value in state_by_element(optimizer, p).items():
                    if key in states[name] and (len(index) or is_sharded(p)):
                        value = optimizer.state[p][key] = in_layout_of(p, to_strided(value))
                        index.scatter_(local(value), leaving.gather(states[name][key].to(p.device)))
                states[name] = {key: staying.gather(value.to(p.device)) for key, value in states[name].items()}
                masks[name] = mask & ~thawing[name]

    @torch.no_grad()
    def to(self, parameters: Mapping[str, Parameter], shards: Shards = UNSHARDED) -> None:
        """Keep only the local parts of loaded states, on the devices of the parameters.

        Args:
            parameters: the parameters, by name.
            shards: how they lie on the processes.
        """
        for i, (whole_masks, states) in enumerate(zip(self._masks, self._states, strict=True)):
            masks = shards.parts(whole_masks) if self._is_loaded else whole_masks
            self._masks[i] = {name: mask.to(parameters[name].device) for name, mask in masks.items()}
            for name, by_element in states.items():
                for key, value in by_element.items():
                    if self._is_loaded and is_sharded(parameters[name]):
                        whole = shards.parts({name: _unflattened(whole_masks[name], value)})[name]
                        value = MaskIndex(masks[name]).gather(whole)
                    by_element[key] = value.to(parameters[name].device)
        self._is_loaded = False

    def forget(self) -> None:
        """Drop all stored states: no element will thaw any more."""
        self._masks, self._states = [], []

    @torch.no_grad()
    def state_dict(self, shards: Shards = UNSHARDED) -> dict[str, Any]:
        """Return the stored states, whole on the CPU of rank 0 where parameters are sharded; all processes must call.

        Args:
            shards: how the parameters lie on the processes.

        Returns:
            ``{"masks": [{name: Tensor}, ...], "states": [{name: {key: Tensor}}, ...]}``, two lists with an entry for
            each call of `store`. A mask is bool (*p.shape), True = the element's state is stored. A state has the
            optimizer's keys, such as "exp_avg", and values (number of True in the mask,) of the optimizer's dtype, in
            row-major order of the mask; no keys, if the optimizer had no state by element.
        """
        masks = [shards.whole(named) for named in self._masks]
        if not shards.is_sharded:
            return {"masks": masks, "states": [dict(states) for states in self._states]}
        found: list[dict[str, dict[str, Tensor]]] = []
        for own_masks, whole_masks, states in zip(self._masks, masks, self._states, strict=True):
            found.append({name: {} for name in whole_masks})
            for name, by_element in states.items():
                for key, value in by_element.items():  # one after the other
                    for full in shards.whole({name: _unflattened(own_masks[name], value)}).values():  # on rank 0
                        found[-1][name][key] = MaskIndex(whole_masks[name]).gather(full)
        return {"masks": masks, "states": found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; `to` has to follow before anything else."""
        self._masks = [dict(masks) for masks in state["masks"]]
        self._states = [{name: dict(own) for name, own in states.items()} for states in state["states"]]
        self._is_loaded = True


def _unflattened(mask: Tensor, values: Tensor) -> Tensor:
    """Return a tensor of the mask's shape with these values where the mask is True, in row-major order; else zeros."""
    full = values.new_zeros(mask.shape)
    MaskIndex(mask.to(values.device)).scatter_(full, values)
    return full

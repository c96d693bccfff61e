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
from lightning_gcfreeze.freezing.optimizer_state import state_by_element, to_strided


class ThawStates:
    """Optimizer states of frozen elements, flat, one entry for each time that elements froze."""

    def __init__(self) -> None:
        self._masks: list[dict[str, Tensor]] = []
        self._states: list[dict[str, dict[str, Tensor]]] = []

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
            by_element = state_by_element(optimizer, p) if len(index) else {}
            states[name] = {key: index.gather(to_strided(value)) for key, value in by_element.items()}
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
                    if key in states[name] and len(index):
                        value = optimizer.state[p][key] = to_strided(value)
                        index.scatter_(value, leaving.gather(states[name][key].to(p.device)))
                states[name] = {key: staying.gather(value.to(p.device)) for key, value in states[name].items()}
                masks[name] = mask & ~thawing[name]

    def to(self, parameters: Mapping[str, Parameter]) -> None:
        """Move loaded tensors to the devices of the parameters."""
        self._masks = [{n: m.to(parameters[n].device) for n, m in masks.items()} for masks in self._masks]
        self._states = [
            {n: {k: v.to(parameters[n].device) for k, v in by_element.items()} for n, by_element in states.items()}
            for states in self._states
        ]

    def forget(self) -> None:
        """Drop all stored states: no element will thaw any more."""
        self._masks, self._states = [], []

    def state_dict(self) -> dict[str, Any]:
        """Return the stored states.

        Returns:
            ``{"masks": [{name: Tensor}, ...], "states": [{name: {key: Tensor}}, ...]}``, two lists with an entry for
            each call of `store`. A mask is bool (*p.shape), True = the element's state is stored. A state has the
            optimizer's keys, such as "exp_avg", and values (number of True in the mask,) of the optimizer's dtype, in
            row-major order of the mask; no keys, if the optimizer had no state by element.
        """
        return {"masks": [dict(masks) for masks in self._masks], "states": [dict(states) for states in self._states]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._masks, self._states = [dict(m) for m in state["masks"]], [dict(s) for s in state["states"]]

"""What the optimizer remembered of elements when they froze, kept for as long as they may thaw.

A frozen element's state is let go of, or decays. An element that thaws with zeros in its place would leap: Adam
divides by the root of a second moment that has to be gathered anew, but corrects it by a count of steps that is large
by now, so its first steps are up to 6.6 times as long as the learning rate. So it goes on with the state that it froze
with: to the element no time has passed. Of an optimizer that is not in `ELEMENTWISE` nothing is kept: its state stays
as the optimizer has it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze._masks import MaskIndex, state_by_element
from lightning_gcfreeze._types import Named


class ThawStates:
    """Optimizer states of frozen elements, flat: of those that froze at one time, by parameter name."""

    def __init__(self) -> None:
        self._masks: list[dict[str, Tensor]] = []
        self._states: list[dict[str, dict[str, Tensor]]] = []

    @torch.no_grad()
    def keep(self, optimizer: Optimizer, parameters: Mapping[str, Parameter], freezing: Named) -> None:
        """Keep the state of what is about to freeze. The optimizer's state is of ordinary shape.

        Args:
            freezing: ``{name: bool (*p.shape)}``, True = live until now, and frozen from now on.
        """
        states = {}
        for name, mask in freezing.items():
            p, places = parameters[name], MaskIndex(mask.to(parameters[name].device))
            by_element = state_by_element(optimizer, p) if len(places) else {}
            states[name] = {key: places.take(_strided(value)) for key, value in by_element.items()}
        self._masks.append(dict(freezing))
        self._states.append(states)

    @torch.no_grad()
    def give_back(self, optimizer: Optimizer, parameters: Mapping[str, Parameter], thawing: Named) -> None:
        """Write the kept state of what thaws into the optimizer's, which is of ordinary shape; and forget it.

        Args:
            thawing: ``{name: bool (*p.shape)}``, True = frozen until now, and live from now on.
        """
        for masks, states in zip(self._masks, self._states, strict=True):
            for name, mask in masks.items():
                p = parameters[name]
                thaws = (mask & thawing[name])[mask].to(p.device)  # of those that are kept, in their order
                where, back, still = MaskIndex((mask & thawing[name]).to(p.device)), MaskIndex(thaws), MaskIndex(~thaws)
                for key, value in state_by_element(optimizer, p).items():
                    if key in states[name] and len(where):
                        value = optimizer.state[p][key] = _strided(value)
                        where.put_(value, back.take(states[name][key].to(p.device)))
                states[name] = {key: still.take(value.to(p.device)) for key, value in states[name].items()}
                masks[name] = mask & ~thawing[name]

    def to(self, parameters: Mapping[str, Parameter]) -> None:
        """Move what was loaded to the devices of the parameters."""
        self._masks = [{n: m.to(parameters[n].device) for n, m in masks.items()} for masks in self._masks]
        self._states = [
            {n: {k: v.to(parameters[n].device) for k, v in by_element.items()} for n, by_element in states.items()}
            for states in self._states
        ]

    def forget(self) -> None:
        """Nothing will thaw any more."""
        self._masks, self._states = [], []

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name."""
        return {"masks": [dict(masks) for masks in self._masks], "states": [dict(states) for states in self._states]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._masks, self._states = [dict(m) for m in state["masks"]], [dict(s) for s in state["states"]]


def _strided(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor

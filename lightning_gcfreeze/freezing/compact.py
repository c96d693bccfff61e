"""Hold by compacting: the optimizer gets the live elements alone. Saves its state, its work, and gradients' memory.

In each parameter group the live elements of all partly frozen parameters become one flat vector, with the group's
hyper-parameters and with the optimizer's state, gathered. Gradients are gathered into the vector's as they come, and
the parameters' own let go of; after the step the values are scattered back. Frozen elements are never written, so they
cannot move. Wholly live parameters stay in the optimizer as they are, wholly frozen ones leave it.

This is exact for optimizers that treat every element by itself, see `ELEMENTWISE`. The optimizer stays the same object,
so that schedulers, clipping and loss scalers find what they know: parameter groups. Its `state_dict` has the ordinary
shapes, with zeros where frozen.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, optim
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.freezing.base import Live

ELEMENTWISE: set[type[Optimizer]] = {
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad, optim.Adadelta,
    optim.Adamax, optim.ASGD, optim.Rprop,
}  # fmt: skip
"""Optimizers, by exact class, whose update of an element depends on that element's value, gradient and state alone.
Another one that does is added before training: ``ELEMENTWISE.add(Lion)``."""

State = dict[str, Any]


class _Part:
    """One parameter's live elements, and which piece of which vector they are; if none, of no vector."""

    def __init__(self, parameter: Parameter, frozen: Tensor) -> None:
        self.parameter = parameter
        self.live = Live(frozen.to(parameter.device))
        self.vector: _Vector | None = None
        self.piece = slice(0)
        self.leaf: Tensor | None = None  # the piece, as what a graph may use in place of the parameter

    def taken(self, state: State) -> State:
        """The parameter's optimizer state with live elements alone, flat."""
        return {
            key: self.live.take(value) if _by_element(value, self.parameter) else _copied(value)
            for key, value in state.items()
        }

    def piece_of(self, state: State, vector: Parameter) -> State:
        """The same from the vector's state."""
        return {key: value[self.piece] if _by_element(value, vector) else value for key, value in state.items()}

    def filled_up(self, state: State, vector: Parameter) -> State:
        """The parameter's state in its ordinary shape, from the vector's: zero where frozen."""
        full = {}
        for key, value in state.items():
            if _by_element(value, vector):
                full[key] = torch.zeros_like(self.parameter, dtype=value.dtype, requires_grad=False)
                self.live.put_(full[key], value[self.piece])
            else:
                full[key] = _copied(value)
        return full


class _Vector:
    """The live elements of parameters that the optimizer treats alike, as one parameter."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        start = 0
        for part in parts:
            part.vector, part.piece = self, slice(start, start + len(part.live))
            start = part.piece.stop
        self.parameter = Parameter(torch.cat([part.live.take(part.parameter) for part in parts]))
        for part in parts:
            if part.leaf is not None:
                part.leaf = self.leaf(part)
        self.filled: set[_Part] = set()  # whose gradients have come
        self._gradient: Tensor | None = None  # stays in memory from step to step

    def leaf(self, part: _Part) -> Tensor:
        """A piece of the vector whose gradient, wherever it comes from, becomes the vector's."""
        leaf = self.parameter.detach()[part.piece].requires_grad_()
        leaf.register_post_accumulate_grad_hook(lambda leaf: self._take_from(part, leaf))
        return leaf

    def add(self, part: _Part, gradient: Tensor) -> None:
        """Take over a gradient's live elements; of several before a step, their sum.

        Args:
            gradient: shaped like the parameter, or flat and live alone.
        """
        if self.parameter.grad is None:  # `zero_grad` has set it to None
            if self._gradient is None:
                self._gradient = torch.empty_like(self.parameter)
            self.parameter.grad = self._gradient.detach()
            self.filled.clear()
        piece = self.parameter.grad[part.piece]
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        is_live_alone = gradient.shape == piece.shape  # a parameter with as many elements is wholly live
        if part in self.filled:
            piece += gradient if is_live_alone else part.live.take(gradient)
        elif is_live_alone:
            piece.copy_(gradient)
        else:
            part.live.take(gradient, piece)
        self.filled.add(part)

    def _take_from(self, part: _Part, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if gradient is not None:
            self.add(part, gradient)


class Compact:
    """Makes an optimizer step the live elements alone, until `release`.

    Args:
        optimizer: of a class in `ELEMENTWISE`; changed in place, and put back by `release`.
        parameters: the parameters, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; the names are among those of `parameters`.
        early: take each parameter's gradient, and let go of it, as soon as a backward pass has it. Not with DDP,
            which averages it later; then `take_gradients_` does it.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Mapping[str, Parameter], frozen: Named, early: bool = True
    ) -> None:
        self._optimizer = optimizer
        self._early = early
        self._parts = {parameters[name]: _Part(parameters[name], mask) for name, mask in frozen.items() if mask.any()}
        self._names = {name: parameters[name] for name in frozen}
        self._left: dict[Parameter, State] = {}  # the state of those that are not in the optimizer
        self._compact()
        self._handles: list[RemovableHandle] = [
            optimizer.register_state_dict_post_hook(self._in_full),
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: self._expand()),
            optimizer.register_load_state_dict_post_hook(lambda optimizer: self._compact()),
        ]
        if early:
            self._handles += [
                p.register_post_accumulate_grad_hook(self._take_gradient) for p in self._parts if p.requires_grad
            ]

    @property
    def index_bytes(self) -> int:
        """What knowing the live elements takes."""
        return sum(part.live.index.nbytes for part in self._parts.values())

    def leaf(self, name: str) -> Tensor:
        """What a graph may use in place of a partly frozen parameter: its live elements, flat, (number of them,)."""
        part = self._parts[self._names[name]]
        if part.leaf is None:
            assert part.vector is not None
            part.leaf = part.vector.leaf(part)
        return part.leaf

    @torch.no_grad()
    def take_gradients_(self) -> None:
        """Complete the live elements' gradient. Once a step, after the last backward pass and before unscaling."""
        if not self._early:
            for p in self._parts:
                self._take_gradient(p)
        if self._nothing is not None:  # a loss scaler wants to see some gradient
            self._nothing.grad = torch.empty_like(self._nothing)
        for vector in [*self._vectors()]:
            if vector.parameter.grad is not None and len(vector.filled) < len(vector.parts):
                self._split(vector)

    @torch.no_grad()
    def restore_(self) -> None:
        """Scatter the live elements to the parameters. Right after each step of the optimizer."""
        for vector in self._vectors():
            for part in vector.parts:
                part.live.put_(part.parameter, vector.parameter[part.piece])

    def release(self) -> None:
        """Give the optimizer its parameters back, with a state of the ordinary shape."""
        for handle in self._handles:
            handle.remove()
        self._expand()

    def _vectors(self) -> Iterator[_Vector]:
        return iter({part.vector: None for part in self._parts.values() if part.vector is not None})

    def _take_gradient(self, p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        part = self._parts[p]  # type: ignore[index]
        if gradient is not None and part.vector is not None:
            part.vector.add(part, gradient)

    @torch.no_grad()
    def _compact(self) -> None:
        """Put vectors in the place of what is partly frozen, and leave out what is wholly frozen."""
        for p in self._parts:
            p.grad = None  # `zero_grad` does not know it any more
        self._members = [list(group["params"]) for group in self._optimizer.param_groups]
        self._member_names = [group.get("param_names") for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            alike: dict[Any, list[_Part]] = {}
            for p in group["params"]:
                part = self._parts.get(p)
                if part is not None and len(part.live):
                    alike.setdefault(self._kind(p), []).append(part)
                elif part is not None:
                    self._left[p] = {
                        key: value.new_zeros(()).expand_as(value) if _by_element(value, p) else value
                        for key, value in self._optimizer.state.pop(p, {}).items()
                    }
            vectors = []
            for parts in alike.values():
                states = [part.taken(self._optimizer.state.pop(part.parameter, {})) for part in parts]
                vectors.append(self._make(parts, states))
            self._replace(group, [p for p in group["params"] if p not in self._parts] + vectors)
        self._nothing = None
        if not any(group["params"] for group in self._optimizer.param_groups):
            p = next(iter(self._parts))
            self._nothing = Parameter(torch.empty(0, dtype=p.dtype, device=p.device))
            self._replace(self._optimizer.param_groups[0], [self._nothing])

    @torch.no_grad()
    def _expand(self) -> None:
        """The inverse."""
        for group, members, names in zip(self._optimizer.param_groups, self._members, self._member_names, strict=False):
            for p in members:
                if p in self._parts:
                    self._optimizer.state[p] = self._full_state(p)
            group["params"][:] = members
            if names is not None:
                group["param_names"] = names
        for vector in self._vectors():
            self._optimizer.state.pop(vector.parameter, None)
        for part in self._parts.values():
            part.vector = None
        if self._nothing is not None:
            self._optimizer.state.pop(self._nothing, None)

    def _full_state(self, p: Parameter) -> State:
        part = self._parts[p]
        if part.vector is not None:
            return part.filled_up(self._optimizer.state.get(part.vector.parameter, {}), part.vector.parameter)
        return {
            key: torch.zeros_like(p, dtype=value.dtype, requires_grad=False)
            if _by_element(value, p)
            else _copied(value)
            for key, value in self._left[p].items()
        }

    def _kind(self, p: Parameter) -> tuple[Any, ...]:
        """What makes two parameters of a group alike: Adam, for instance, counts the steps with a gradient."""
        state = tuple(
            (key, value.dtype if _by_element(value, p) else None if value is None else float(value))
            for key, value in self._optimizer.state.get(p, {}).items()
        )
        return (p.dtype, p.device, state)

    def _make(self, parts: Sequence[_Part], states: Sequence[State]) -> Parameter:
        """A vector with its state, from the flat states of its parts; what is not by element is the first one's."""
        vector = _Vector(parts).parameter
        if states[0]:
            self._optimizer.state[vector] = {
                key: torch.cat([state[key] for state in states])
                if isinstance(value, Tensor) and value.dim()
                else _copied(value)
                for key, value in states[0].items()
            }
        return vector

    def _split(self, vector: _Vector) -> None:
        """Part those that have a gradient from those that have none: in this step the optimizer leaves these alone."""
        old = vector.parameter
        state, gradient = self._optimizer.state.pop(old, {}), old.grad
        assert gradient is not None
        with_gradient = [part for part in vector.parts if part in vector.filled]
        without = [part for part in vector.parts if part not in vector.filled]
        pieces = {part: (part.piece_of(state, old), gradient[part.piece]) for part in vector.parts}
        made = [self._make(parts, [pieces[part][0] for part in parts]) for parts in (with_gradient, without)]
        for part in with_gradient:
            assert part.vector is not None
            part.vector.add(part, pieces[part][1])
        for group in self._optimizer.param_groups:
            if any(p is old for p in group["params"]):
                self._replace(group, [p for p in group["params"] if p is not old] + made)

    def _replace(self, group: dict[str, Any], params: list[Parameter]) -> None:
        group["params"][:] = params
        if "param_names" in group:
            known = {p: name for name, p in self._names.items()}
            group["param_names"] = [known.get(p, f"live elements {i}") for i, p in enumerate(params)]

    def _in_full(self, optimizer: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
        """A `state_dict` as it would be of the parameters themselves."""
        state = {key: value for key, value in packed["state"].items() if not isinstance(key, int)}
        groups, index = [], 0
        members = [*self._members, *(group["params"] for group in optimizer.param_groups[len(self._members) :])]
        for group, params, names in zip(
            packed["param_groups"], members, itertools.chain(self._member_names, itertools.repeat(None)), strict=False
        ):
            for p in params:
                of_p = self._full_state(p) if p in self._parts else optimizer.state.get(p, {})
                if of_p:
                    state[index] = of_p
                index += 1
            own = {"params": list(range(index - len(params), index))}
            groups.append({**group, **own} if names is None else {**group, **own, "param_names": names})
        return {**packed, "state": state, "param_groups": groups}


def _by_element(value: Any, parameter: Tensor) -> bool:
    """Whether an entry of the optimizer's state has a number for each element, unlike Adam's count of steps."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

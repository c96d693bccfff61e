"""Hold by compacting: the optimizer gets the live elements alone. Saves its state, its work, and gradients' memory.

In each parameter group the live elements of all partly frozen parameters become one flat vector, with the group's
hyper-parameters and with the optimizer's state, gathered. Gradients are gathered into the vector's as they come, and
the parameters' own let go of; after the step the values are scattered back. Frozen elements are never written, so they
cannot move. Wholly live parameters stay in the optimizer as they are, wholly frozen ones leave it.

This is exact for optimizers that treat every element by itself, see `ELEMENTWISE`. The optimizer stays the same object,
so that schedulers, clipping and loss scalers find what they know: parameter groups. Its `state_dict` has the ordinary
shapes, with zeros where frozen.

Where somebody else may look at gradients, all of this happens *late*: the optimizer has its ordinary parameters at all
times but during its own steps, and gradients stay where they are. That saves state and work alone.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze._masks import MaskIndex
from lightning_gcfreeze._types import Named

SMALL = 2**14
"""Parameters of at most so many elements travel together: copying them costs less than an operation for each."""

State = dict[str, Any]


class _Part:
    """The live elements of a parameter, or of several small ones together; and which piece of which vector they are."""

    def __init__(self, parameters: list[Parameter], frozen: Sequence[Tensor]) -> None:
        self.parameters: list[Tensor] = [*parameters]
        masks = [mask.to(p.device) for p, mask in zip(parameters, frozen, strict=True)]
        self.live = MaskIndex(~masks[0] if len(masks) == 1 else ~_joined(masks))
        self.piece = slice(0)
        if len(parameters) > 1:
            self._together = _joined(parameters).detach()
            self._views = _views(self._together, self.parameters)
        self.leaf: Tensor | None = None  # the piece, as what a graph may use in place of the parameter

    def take(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The live elements of tensors shaped like the parameters, flat."""
        return self.live.take(tensors[0] if len(tensors) == 1 else _joined(tensors), out)

    def put_(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Write flat values over the live elements of tensors shaped like the parameters."""
        if len(tensors) == 1:
            self.live.put_(tensors[0], values)
        else:
            together = _joined(tensors)
            self.live.put_(together, values)
            torch._foreach_copy_([*tensors], _views(together, tensors))

    def read_(self, into: Tensor) -> None:
        """Take the live elements out of the parameters."""
        if len(self.parameters) == 1:
            self.live.take(self.parameters[0], into)
        else:
            torch.cat([p.reshape(-1) for p in self.parameters], out=self._together)
            self.live.take(self._together, into)

    def write_(self, values: Tensor) -> None:
        """Write the live elements of the parameters, which were read before."""
        if len(self.parameters) == 1:
            self.live.put_(self.parameters[0], values)
        else:
            self.live.put_(self._together, values)
            torch._foreach_copy_(self.parameters, self._views)

    def taken(self, states: Sequence[State]) -> State:
        """The parameters' optimizer state with live elements alone, flat; what is not by element is the first one's."""
        first = self.parameters[0]
        return {
            key: self.take([_strided(state[key]) for state in states]) if _by_element(value, first) else _copied(value)
            for key, value in states[0].items()
        }

    def filled_up(self, state: State, vector: Parameter) -> list[State]:
        """Each parameter's state in its ordinary shape, from the vector's: zero where frozen."""
        full: list[State] = [{} for _ in self.parameters]
        for key, value in state.items():
            if _by_element(value, vector):
                tensors = [torch.zeros_like(p, dtype=value.dtype, requires_grad=False) for p in self.parameters]
                self.put_(tensors, value[self.piece])
            for i, of_p in enumerate(full):
                of_p[key] = tensors[i] if _by_element(value, vector) else _copied(value)
        return full


class _Vector:
    """The live elements of parameters that the optimizer treats alike, as one parameter."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = parts
        start = 0
        for part in parts:
            part.piece = slice(start, start + len(part.live))
            start = part.piece.stop
        self.parameter = Parameter(torch.cat([part.take(part.parameters) for part in parts]).detach())
        self._gradient = torch.empty_like(self.parameter, requires_grad=False)  # stays in memory from step to step
        self.slots = {part: self._gradient[part.piece] for part in parts}
        self.values = {part: self.parameter.detach()[part.piece] for part in parts}
        self.filled: set[_Part] = set()  # whose gradients have come
        for part in parts:
            if part.leaf is not None:
                part.leaf = self.leaf(part)

    def leaf(self, part: _Part) -> Tensor:
        """A piece of the vector whose gradient, wherever it comes from, becomes the vector's."""
        leaf = self.parameter.detach()[part.piece].requires_grad_()
        leaf.register_post_accumulate_grad_hook(lambda leaf: self._take_from(part, leaf))
        return leaf

    def slot(self, part: _Part) -> tuple[Tensor, bool]:
        """Where a part's gradient belongs, and whether there is one already: then both are to be added up."""
        gradient = self.parameter.grad
        if gradient is None or gradient.data_ptr() != self._gradient.data_ptr():
            if gradient is None:  # `zero_grad` has set it to None
                self.filled.clear()
            else:  # somebody has put another one in its place
                self._gradient.copy_(gradient)
            self.parameter.grad = self._gradient.detach()
        was_filled = part in self.filled
        self.filled.add(part)
        return self.slots[part], was_filled

    def take(self, part: _Part) -> None:
        """Take over the live elements of the parameters' gradients; of several passes before a step, the sum."""
        gradients = [_strided(cast("Tensor", p.grad)) for p in part.parameters]
        slot, was_filled = self.slot(part)
        if was_filled:
            slot += part.take(gradients)
        else:
            part.take(gradients, slot)

    def _take_from(self, part: _Part, leaf: Tensor) -> None:
        gradient, leaf.grad = cast("Tensor", leaf.grad), None
        slot, was_filled = self.slot(part)
        if was_filled:
            slot += gradient
        else:
            slot.copy_(gradient)


class Compact:
    """Makes an optimizer step the live elements alone, until `release`.

    Args:
        optimizer: of a class in `ELEMENTWISE`; changed in place, and put back by `release`.
        parameters: the parameters, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; the names are among those of `parameters`.
        early: take each parameter's gradient, and let go of it, as soon as a backward pass has it, but for small ones.
            Not with DDP, which averages it later; then `take_gradients_` does it.
        alone: names of those whose `leaf` will be asked for.
        late: hand the vectors over for the length of each step only, and take gradients right before it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, Parameter],
        frozen: Named,
        early: bool = True,
        alone: Collection[str] = (),
        late: bool = False,
    ) -> None:
        self._optimizer, self._late = optimizer, late
        self._frozen = {parameters[name]: mask for name, mask in frozen.items() if mask.any()}
        self._names = {name: parameters[name] for name in frozen}
        self._inside = False  # whether the optimizer has the vectors
        self._compacted: tuple[list[list[Tensor]], list[Any]] = ([], [])  # its groups, when it has them
        self._alone = {p for name, p in self._names.items() if name in alone or p.numel() > SMALL}
        self._left: dict[Parameter, State] = {}  # the state of those that are wholly frozen
        self._compact()
        self._leave()
        if not late:
            self.drop_gradients_()
        early = early and not late
        by_themselves = [p for p in self._frozen if early and (p in self._alone or p in self._left) and p.requires_grad]
        self._handles: list[RemovableHandle] = [
            optimizer.register_state_dict_post_hook(self._in_full),
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: self._expand()),
            optimizer.register_load_state_dict_post_hook(lambda optimizer: self._compact_again()),
            *([optimizer.register_state_dict_pre_hook(lambda optimizer: self._enter())] if late else []),
            *(p.register_post_accumulate_grad_hook(self._arrived) for p in by_themselves),
        ]

    @property
    def index_bytes(self) -> int:
        """What knowing the live elements takes."""
        return sum(part.live.index.nbytes for vector in self._vectors for part in vector.parts)

    def leaf(self, name: str) -> Tensor:
        """What a graph may use in place of a parameter of `alone`: its live elements, flat, (number of them,)."""
        vector, part = self._places[self._names[name]]
        if part.leaf is None:
            part.leaf = vector.leaf(part)
        return part.leaf

    @torch.no_grad()
    def take_gradients_(self) -> None:
        """Complete the live elements' gradient. After the last backward pass of a step, and before unscaling."""
        for vector in self._vectors:
            for part in vector.parts:
                missing = sum(p.grad is None for p in part.parameters)
                if 0 < missing < len(part.parameters):
                    return self._part_company()
                if not missing:
                    vector.take(part)
                    if not self._late:
                        self._drop(part.parameters)
        if not self._late:
            self.drop_gradients_()
        for vector in self._vectors[:]:
            if vector.parameter.grad is not None and len(vector.filled) < len(vector.parts):
                self._split(vector)
        if self._nothing is not None:  # a loss scaler wants to see some gradient
            self._nothing.grad = torch.empty_like(self._nothing)
        return None

    def drop_gradients_(self) -> None:
        """Let go of gradients that were not taken: `zero_grad` does not know these parameters."""
        self._drop(self._frozen)

    @staticmethod
    def _drop(parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            p.grad = None

    @torch.no_grad()
    def read_(self) -> None:
        """Take over the parameters' live elements as they are: others may have written them. Before each step."""
        for vector in self._vectors:
            for part in vector.parts:
                part.read_(vector.values[part])

    @torch.no_grad()
    def restore_(self) -> None:
        """Scatter the live elements to the parameters. Right after each step of the optimizer."""
        for vector in self._vectors:
            for part in vector.parts:
                part.write_(vector.values[part])
        self._leave()

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the frozen elements' gradients where they are still there, before they are clipped; a NaN, too."""
        for p, mask in self._frozen.items():
            if p.grad is not None:
                p.grad = _strided(p.grad)
                p.grad.masked_fill_(mask, 0.0)

    def release(self) -> None:
        """Give the optimizer its parameters back, with a state of the ordinary shape."""
        for handle in self._handles:
            handle.remove()
        self._expand()

    def before_late_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the gradients over as late as can be: after the closure that computes them, if the step is given one.

        Args:
            args: of a hook that runs before the optimizer's step.
            kwargs: likewise.

        Returns:
            What the step is to be given in their place, or None.
        """
        itself, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if not callable(closure):
            self._begin_late_step()
            return None

        def closed() -> Any:
            self._leave()  # a second evaluation in one step
            loss = closure()
            self._begin_late_step()
            return loss

        return ((itself, closed, *given[1:]), kwargs) if given else (args, kwargs | {"closure": closed})

    def _begin_late_step(self) -> None:
        self._enter()
        for vector in self._vectors:
            vector.parameter.grad = None
        self.take_gradients_()
        self.read_()

    def _enter(self) -> None:
        """Give the optimizer the vectors in place of the parameters."""
        if not self._inside:
            for group, params, names in zip(self._optimizer.param_groups, *self._compacted, strict=False):
                self._put(group, params, names)
            self._inside = True

    def _leave(self) -> None:
        """Give it the parameters back, for the time between its steps."""
        if self._late and self._inside:
            groups = self._optimizer.param_groups
            self._compacted = [list(g["params"]) for g in groups], [g.get("param_names") for g in groups]
            for group, members, names in zip(groups, self._members, self._member_names, strict=False):
                self._put(group, members, names)
            self._inside = False

    def _compact_again(self) -> None:
        self._compact()
        self._leave()

    @staticmethod
    def _put(group: dict[str, Any], params: Sequence[Tensor], names: Any) -> None:
        group["params"][:] = params
        if names is not None:
            group["param_names"] = names

    def _arrived(self, p: Tensor) -> None:
        """A backward pass is done with a parameter's gradient."""
        if p in self._places:
            vector, part = self._places[p]
            vector.take(part)
        p.grad = None

    @torch.no_grad()
    def _compact(self) -> None:
        """Put vectors in the place of what is partly frozen, and leave out what is wholly frozen."""
        self._inside = True
        groups = self._optimizer.param_groups
        self._members: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self._member_names: list[Any] = [group.get("param_names") for group in groups]
        self._vectors: list[_Vector] = []
        self._places: dict[Tensor, tuple[_Vector, _Part]] = {}  # of what is partly frozen
        for group in groups:
            alike: dict[Any, list[Parameter]] = {}
            for p in group["params"]:
                if p in self._frozen and self._frozen[p].all():
                    self._left[p] = {
                        key: value.new_zeros(()).expand_as(value) if _by_element(value, p) else value
                        for key, value in self._optimizer.state.pop(p, {}).items()
                    }
                elif p in self._frozen:
                    alike.setdefault(self._kind(p), []).append(p)
            vectors = []
            for partly in alike.values():
                together = [p for p in partly if p not in self._alone]
                bundles = [[p] for p in partly if p in self._alone] + ([together] if together else [])
                parts = [_Part(ps, [self._frozen[p] for p in ps]) for ps in bundles]
                parts.sort(key=lambda part: len(part.live) % 16)  # so that rows lie in memory as they like it
                states = [part.taken([self._optimizer.state.pop(p, {}) for p in part.parameters]) for part in parts]
                vectors.append(self._make(parts, states))
            self._replace(group, [p for p in group["params"] if p not in self._frozen] + vectors)
        self._nothing = None
        if not any(group["params"] for group in groups):
            p = next(iter(self._frozen))
            self._nothing = Parameter(torch.empty(0, dtype=p.dtype, device=p.device))
            self._replace(groups[0], [self._nothing])

    @torch.no_grad()
    def _expand(self) -> None:
        """The inverse."""
        full = self._full_states()
        for vector in self._vectors:
            self._optimizer.state.pop(vector.parameter, None)
        if self._nothing is not None:
            self._optimizer.state.pop(self._nothing, None)
        self._optimizer.state.update(full)
        for group, members, names in zip(self._optimizer.param_groups, self._members, self._member_names, strict=False):
            self._put(group, members, names)

    def _full_states(self) -> dict[Tensor, State]:
        """The states in their ordinary shape of all that is not in the optimizer itself."""
        full: dict[Tensor, State] = {
            p: {
                key: torch.zeros_like(p, dtype=value.dtype, requires_grad=False) if _by_element(value, p) else value
                for key, value in state.items()
            }
            for p, state in self._left.items()
        }
        for vector in self._vectors:
            state = self._optimizer.state.get(vector.parameter, {})
            for part in vector.parts:
                full |= zip(part.parameters, part.filled_up(state, vector.parameter), strict=True)
        return full

    def _kind(self, p: Parameter) -> tuple[Any, ...]:
        """What makes two parameters of a group alike: Adam, for instance, counts the steps with a gradient."""
        state = tuple(
            (key, value.dtype if _by_element(value, p) else None if value is None else float(value))
            for key, value in self._optimizer.state.get(p, {}).items()
        )
        return (p.dtype, p.device, state)

    def _make(self, parts: Sequence[_Part], states: Sequence[State]) -> Parameter:
        """A vector with its state, from the flat states of its parts; what is not by element is the first one's."""
        vector = _Vector(parts)
        self._vectors.append(vector)
        self._places |= {p: (vector, part) for part in parts for p in part.parameters}
        if states[0]:
            self._optimizer.state[vector.parameter] = {
                key: torch.cat([state[key] for state in states])
                if isinstance(value, Tensor) and value.dim()
                else _copied(value)
                for key, value in states[0].items()
            }
        return vector.parameter

    def _part_company(self) -> None:
        """Small parameters travel alone from now on, since of some that were together a few have no gradient."""
        for vector in self._vectors:
            # Taken late, their gradients are still in their places.
            for part in vector.filled if vector.parameter.grad is not None and not self._late else ():
                full = [torch.zeros_like(p) for p in part.parameters]
                part.put_(full, vector.slots[part])
                for p, gradient in zip(part.parameters, full, strict=True):
                    p.grad = gradient if p.grad is None else gradient + p.grad
        self._alone = set(self._frozen)
        self._expand()
        self._compact()
        self.take_gradients_()

    def _split(self, vector: _Vector) -> None:
        """Part those that have a gradient from those that have none: in this step the optimizer leaves these alone."""
        old = vector.parameter
        state = self._optimizer.state.pop(old, {})
        pieces = {
            part: (
                {key: value[part.piece] if _by_element(value, old) else value for key, value in state.items()},
                vector.slots[part],
            )
            for part in vector.parts
        }
        self._vectors.remove(vector)
        made = []
        for filled in (True, False):
            parts = [part for part in vector.parts if (part in vector.filled) is filled]
            made.append(self._make(parts, [pieces[part][0] for part in parts]))
            for part in parts if filled else ():
                self._vectors[-1].slot(part)[0].copy_(pieces[part][1])
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
        self._leave()
        full = self._full_states()
        state = {key: value for key, value in packed["state"].items() if not isinstance(key, int)}
        groups, index = [], 0
        members = [*self._members, *(group["params"] for group in optimizer.param_groups[len(self._members) :])]
        for group, params, names in zip(
            packed["param_groups"], members, itertools.chain(self._member_names, itertools.repeat(None)), strict=False
        ):
            for p in params:
                if of_p := full.get(p) or optimizer.state.get(p, {}):
                    state[index] = of_p
                index += 1
            own = {"params": list(range(index - len(params), index))}
            groups.append({**group, **own} if names is None else {**group, **own, "param_names": names})
        return {**packed, "state": state, "param_groups": groups}


def _by_element(value: Any, parameter: Tensor) -> bool:
    """Whether an entry of the optimizer's state has a number for each element, unlike Adam's count of steps."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _views(together: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = together.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _strided(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value

"""Hold by compacting: the optimizer receives only the live elements. Saves its state, its work and gradient memory.

In each parameter group the live elements of all partly frozen parameters become one flat vector, with the group's
hyper-parameters and with the optimizer's state, gathered. Gradients are gathered into the vector's gradient as soon as
they arrive, then freed; after the step the values are scattered back. Frozen elements are never written, so they cannot
move. Fully live parameters stay in the optimizer as they are, fully frozen ones leave it.

This is exact for optimizers that treat every element on its own, see `ELEMENTWISE`. The optimizer stays the same
object, so that schedulers, clipping and loss scalers find the parameter groups they know. Its `state_dict` has the
ordinary shapes, with zeros where frozen.

Where other code may read gradients, all of this happens *late*: the optimizer has its ordinary parameters except during
its own steps, and gradients stay where they are. That saves only state and work.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.freezing.late import right_before_update
from lightning_gcfreeze.freezing.live_vector import Bundle, LiveVector, join_states, slice_state
from lightning_gcfreeze.freezing.optimizer_state import State, is_by_element, to_strided

MAX_BUNDLED_NUMEL = 2**14
"""Parameters of at most so many elements are bundled: copying them costs less than one operation for each."""


class Compact:
    """Makes an optimizer step only the live elements, until `release`.

    Args:
        optimizer: of a class in `ELEMENTWISE`; changed in place, and put back by `release`.
        parameters: the parameters, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; the names are among those of `parameters`.
        free_grads_in_backward: gather each large parameter's gradient, and free it, as soon as a backward pass has
            computed it. Not with DDP, which averages gradients later; then `gather_gradients_` does it.
        unbundled: names of parameters that are not bundled, however small, because `leaf` is needed of them.
        late: give the optimizer the vectors only for the duration of each step, and gather gradients right before it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, Parameter],
        frozen: Named,
        free_grads_in_backward: bool = True,
        unbundled: Collection[str] = (),
        late: bool = False,
    ) -> None:
        self._optimizer, self._late = optimizer, late
        self._frozen = {parameters[name]: mask for name, mask in frozen.items() if mask.any()}
        self._names = {name: parameters[name] for name in frozen}
        self._has_vectors = False  # the optimizer, in place of its ordinary parameters
        self._swapped_out: tuple[list[list[Tensor]], list[Any]] = ([], [])  # its groups' "params", "param_names" then
        self._unbundled = {p for name, p in self._names.items() if name in unbundled or p.numel() > MAX_BUNDLED_NUMEL}
        self._fully_frozen_state: dict[Parameter, State] = {}
        self._compact()
        self._swap_out()
        if not late:
            self.drop_gradients_()
        own = {*self._unbundled, *self._fully_frozen_state} if free_grads_in_backward and not late else set()
        freed = [p for p in self._frozen if p in own and p.requires_grad]
        self._handles: list[RemovableHandle] = [
            optimizer.register_state_dict_post_hook(self._ordinary_state_dict),
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: self._expand()),
            optimizer.register_load_state_dict_post_hook(lambda optimizer: self._compact_again()),
            *([optimizer.register_state_dict_pre_hook(lambda optimizer: self._swap_in())] if late else []),
            *(p.register_post_accumulate_grad_hook(self._free_gradient) for p in freed),
        ]

    @property
    def index_bytes(self) -> int:
        """Bytes of the indices of the live elements."""
        return sum(bundle.index.index.nbytes for _, bundle in self._bundles())

    def leaf(self, name: str) -> Tensor:
        """Return a leaf that a graph uses in place of an `unbundled` parameter: its live elements, (number of them,).

        Gradients of the leaf are added to the optimizer's, and kept nowhere else.
        """
        vector, bundle = self._place[self._names[name]]
        if bundle.leaf is None:
            bundle.leaf = vector.make_leaf(bundle)
        return bundle.leaf

    @torch.no_grad()
    def gather_gradients_(self) -> None:
        """Complete the gradients of the live elements: after the last backward pass of a step, before unscaling."""
        self._rebundle_if_needed()
        for vector, bundle in self._bundles():
            if bundle.parameters[0].grad is not None:
                vector.add_gradients_(bundle)
                if not self._late:
                    _drop_gradients(bundle.parameters)
        if not self._late:
            self.drop_gradients_()
        for vector in self._vectors[:]:
            if vector.parameter.grad is not None and len(vector.arrived) < len(vector.bundles):
                self._split(vector)
        if self._placeholder is not None:  # a loss scaler fails if no parameter has a gradient
            self._placeholder.grad = torch.empty_like(self._placeholder)

    def drop_gradients_(self) -> None:
        """Free gradients that were not gathered: `zero_grad` does not reach these parameters."""
        _drop_gradients(self._frozen)

    @torch.no_grad()
    def gather_values_(self) -> None:
        """Copy the parameters' live elements into the vectors, before each step: other code may have changed them."""
        for vector, bundle in self._bundles():
            bundle.gather_values(vector.values[bundle])

    @torch.no_grad()
    def scatter_values_(self) -> None:
        """Write the live elements back to the parameters, right after each step of the optimizer."""
        for vector, bundle in self._bundles():
            bundle.scatter_values_(vector.values[bundle])
        self._swap_out()

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the frozen elements of gradients that still exist, NaN included, before gradients are clipped."""
        for p, mask in self._frozen.items():
            if p.grad is not None:
                p.grad = to_strided(p.grad)
                p.grad.masked_fill_(mask, 0.0)

    def release(self) -> None:
        """Give the optimizer its parameters back, with a state of the ordinary shapes."""
        for handle in self._handles:
            handle.remove()
        self._expand()

    def before_late_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare a step: give the optimizer the vectors with gradients, after the closure if the step has one.

        Args:
            args: arguments that a pre-hook of the optimizer's step receives; the first is the optimizer.
            kwargs: keyword arguments that the hook receives.

        Returns:
            The arguments to call the step with instead, as the hook has to return them, or None.
        """
        return right_before_update(args, kwargs, self._begin_late_step, self._swap_out)

    def _begin_late_step(self) -> None:
        self._swap_in()
        for vector in self._vectors:
            vector.parameter.grad = None
        self.gather_gradients_()
        self.gather_values_()

    def _swap_in(self) -> None:
        """Give the optimizer the vectors in place of the parameters."""
        if not self._has_vectors:
            for group, params, names in zip(self._optimizer.param_groups, *self._swapped_out, strict=False):
                _set_params(group, params, names)
            self._has_vectors = True

    def _swap_out(self) -> None:
        """Give the optimizer its parameters back for the time between its steps, if this happens late."""
        if self._late and self._has_vectors:
            groups = self._optimizer.param_groups
            self._swapped_out = [list(g["params"]) for g in groups], [g.get("param_names") for g in groups]
            self._set_members()
            self._has_vectors = False

    def _set_members(self) -> None:
        for group, members, names in zip(self._optimizer.param_groups, self._members, self._member_names, strict=False):
            _set_params(group, members, names)

    def _replace(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Set a group's parameters; vectors among them are named by their place."""
        group["params"][:] = params
        if "param_names" in group:
            names: dict[Tensor, str] = {p: name for name, p in self._names.items()}
            group["param_names"] = [names.get(p, f"live elements {i}") for i, p in enumerate(params)]

    def _compact_again(self) -> None:
        self._compact()
        self._swap_out()

    @torch.no_grad()
    def _compact(self) -> None:
        """Replace partly frozen parameters by vectors, and take fully frozen ones out of the optimizer."""
        self._has_vectors = True
        groups = self._optimizer.param_groups
        self._members: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self._member_names: list[Any] = [group.get("param_names") for group in groups]
        self._vectors: list[LiveVector] = []
        self._place: dict[Tensor, tuple[LiveVector, Bundle]] = {}  # of each partly frozen parameter
        for group in groups:
            self._compact_group(group)
        self._placeholder: Parameter | None = None  # an optimizer without parameters is an error to some callers
        if not any(group["params"] for group in groups):
            p = next(iter(self._frozen))
            self._placeholder = Parameter(torch.empty(0, dtype=p.dtype, device=p.device))
            self._replace(groups[0], [self._placeholder])

    def _compact_group(self, group: dict[str, Any]) -> None:
        alike: dict[Any, list[Parameter]] = {}
        for p in group["params"]:
            if p not in self._frozen:
                continue
            if self._frozen[p].all():
                # Its elements cost nothing: a single zero, expanded, stands for their state.
                self._fully_frozen_state[p] = {
                    key: value.new_zeros(()).expand_as(value) if is_by_element(value, p) else value
                    for key, value in self._optimizer.state.pop(p, {}).items()
                }
            else:
                alike.setdefault(self._kind(p), []).append(p)
        vectors = [self._vector_of(partly) for partly in alike.values()]
        self._replace(group, [*(p for p in group["params"] if p not in self._frozen), *vectors])

    def _vector_of(self, partly: Sequence[Parameter]) -> Parameter:
        """Return the vector of partly frozen parameters that the optimizer treats alike."""
        small = [p for p in partly if p not in self._unbundled]
        members = [[p] for p in partly if p in self._unbundled] + ([small] if small else [])
        bundles = [Bundle(ps, [self._frozen[p] for p in ps]) for ps in members]
        bundles.sort(key=lambda bundle: len(bundle.index) % 16)  # multiples of 16 first: aligned slices of the vector
        states = [
            bundle.gather_state([self._optimizer.state.pop(p, {}) for p in bundle.parameters]) for bundle in bundles
        ]
        return self._make(bundles, states).parameter

    def _kind(self, p: Parameter) -> tuple[Any, ...]:
        """Return what parameters of one vector agree in: Adam, for instance, counts the steps with a gradient."""
        state = tuple(
            (key, value.dtype if is_by_element(value, p) else None if value is None else float(value))
            for key, value in self._optimizer.state.get(p, {}).items()
        )
        return (p.dtype, p.device, state)

    def _make(self, bundles: Sequence[Bundle], states: Sequence[State]) -> LiveVector:
        """Make a vector of bundles, with its state from their flat states."""
        vector = LiveVector(bundles)
        self._vectors.append(vector)
        self._place |= {p: (vector, bundle) for bundle in bundles for p in bundle.parameters}
        if states[0]:
            self._optimizer.state[vector.parameter] = join_states(states)
        return vector

    @torch.no_grad()
    def _expand(self) -> None:
        """Undo `_compact`."""
        full = self._full_states()
        for vector in self._vectors:
            self._optimizer.state.pop(vector.parameter, None)
        if self._placeholder is not None:
            self._optimizer.state.pop(self._placeholder, None)
        self._optimizer.state.update(full)
        self._set_members()

    def _full_states(self) -> dict[Tensor, State]:
        """Return the states, in their ordinary shapes, of all parameters that are not in the optimizer themselves."""
        full: dict[Tensor, State] = {
            p: {
                key: torch.zeros_like(p, dtype=value.dtype, requires_grad=False) if is_by_element(value, p) else value
                for key, value in state.items()
            }
            for p, state in self._fully_frozen_state.items()
        }
        for vector, bundle in self._bundles():
            state = self._optimizer.state.get(vector.parameter, {})
            full.update(zip(bundle.parameters, bundle.expand_state(state, vector.parameter), strict=True))
        return full

    def _ordinary_state_dict(self, optimizer: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
        """Rewrite a `state_dict` of the vectors as one of the parameters, as it would be without `Compact`.

        Returns:
            ``{"state": {i: {key: value}}, "param_groups": [{"params": [i, ...], "lr": ..., ...}, ...]}``. The indices i
            count the parameters of all groups, group by group, in the order they had before they were compacted; a
            parameter without state has no entry. Entries by element have their parameter's shape and are zero where
            frozen; all others, such as Adam's count of steps, are those of the vector. If the optimizer was given
            names, each group has them as "param_names". Groups that were added since then follow unchanged.
        """
        self._swap_out()
        full = self._full_states()
        added = [group["params"] for group in optimizer.param_groups[len(self._members) :]]
        members, names = [*self._members, *added], itertools.chain(self._member_names, itertools.repeat(None))
        state = {key: value for key, value in packed["state"].items() if not isinstance(key, int)}
        groups, start = [], 0
        for group, params, own_names in zip(packed["param_groups"], members, names, strict=False):
            indices = range(start, start + len(params))
            start = indices.stop
            states = (full.get(p) or optimizer.state.get(p, {}) for p in params)
            state |= {i: own for i, own in zip(indices, states, strict=True) if own}
            own_params = (
                {"params": [*indices]} if own_names is None else {"params": [*indices], "param_names": own_names}
            )
            groups.append(group | own_params)
        return {**packed, "state": state, "param_groups": groups}

    def _bundles(self) -> list[tuple[LiveVector, Bundle]]:
        return [(vector, bundle) for vector in self._vectors for bundle in vector.bundles]

    def _free_gradient(self, p: Tensor) -> None:
        """Gather a parameter's gradient and free it, as soon as a backward pass has accumulated it."""
        if p in self._place:
            vector, bundle = self._place[p]
            vector.add_gradients_(bundle)
        p.grad = None

    def _rebundle_if_needed(self) -> None:
        """Stop bundling small parameters if some of those in a bundle, and not all, received no gradient."""
        for _, bundle in self._bundles():
            if len(bundle.parameters) > 1 and len({p.grad is None for p in bundle.parameters}) > 1:
                return self._unbundle_all()
        return None

    def _unbundle_all(self) -> None:
        """Make every parameter a bundle of its own. No gradient is lost."""
        for vector in self._vectors:
            # Gathered late, gradients are still in their places.
            for bundle in vector.arrived if vector.parameter.grad is not None and not self._late else ():
                vector.return_gradients_(bundle)
        self._unbundled = set(self._frozen)
        self._expand()
        self._compact()

    def _split(self, vector: LiveVector) -> None:
        """Split a vector into bundles with and without a gradient: the optimizer passes the latter by in this step."""
        old = vector.parameter
        state = self._optimizer.state.pop(old, {})
        states = {bundle: slice_state(state, vector, bundle) for bundle in vector.bundles}
        self._vectors.remove(vector)
        arrived = [bundle for bundle in vector.bundles if bundle in vector.arrived]
        absent = [bundle for bundle in vector.bundles if bundle not in vector.arrived]
        made = [self._make(bundles, [states[bundle] for bundle in bundles]) for bundles in (arrived, absent)]
        for bundle in arrived:
            made[0].grad_slice(bundle)[0].copy_(vector.grad_slices[bundle])
        for group in self._optimizer.param_groups:
            if any(p is old for p in group["params"]):
                self._replace(group, [*(p for p in group["params"] if p is not old), *(v.parameter for v in made)])


def _set_params(group: dict[str, Any], params: Sequence[Tensor], names: Any) -> None:
    """Set a parameter group's parameters in place, and their names if it has any."""
    group["params"][:] = params
    if names is not None:
        group["param_names"] = names


def _drop_gradients(parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        p.grad = None

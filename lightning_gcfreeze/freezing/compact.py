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

Where parameters are sharded, each process's optimizer has the live elements of its own shards, and it has its ordinary
parameters between the step and the next step's last backward pass: ``torch.distributed.checkpoint`` looks up their
names then. What is decided here is the same on all processes, also on those without any of a parameter's elements.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import is_sharded, layout_of
from lightning_gcfreeze.freezing.late import right_before_update
from lightning_gcfreeze.freezing.live_vector import Bundle, LiveVector
from lightning_gcfreeze.freezing.optimizer_state import State, is_by_element
from lightning_gcfreeze.freezing.state_dicts import ordinary_state_dict

MAX_BUNDLED_NUMEL = 2**14
"""Parameters of at most so many elements are bundled: copying them costs less than one operation for each."""


class _Zeros(NamedTuple):
    """Stands for an entry by element of a fully frozen parameter's state, which is all zeros."""

    dtype: torch.dtype


class Compact:
    """Makes an optimizer step only the live elements, until `release`.

    Args:
        optimizer: of a class in `ELEMENTWISE`; changed in place, and put back by `release`.
        parameters: the parameters, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; the names are among those of `parameters`. For a
            sharded parameter, the mask of its local part.
        free_grads_in_backward: gather each large parameter's gradient, and free it, as soon as a backward pass has
            computed it. Not with DDP, which averages gradients later; then `gather_gradients_` does it.
        unbundled: names of parameters that are not bundled, however small, because `leaf` is needed of them.
        late: give the optimizer the vectors only for the duration of each step, and gather gradients right before it.
        n_frozen: by name, how many elements are frozen, on all processes; needed where parameters are sharded.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Mapping[str, Parameter],
        frozen: Named,
        free_grads_in_backward: bool = True,
        unbundled: Collection[str] = (),
        late: bool = False,
        n_frozen: Mapping[str, int] | None = None,
    ) -> None:
        self._optimizer, self._late = optimizer, late
        counts = n_frozen or {name: int(mask.count_nonzero()) for name, mask in frozen.items()}
        self._n_live = {parameters[n]: parameters[n].numel() - counts[n] for n in frozen if counts[n]}
        """The number of live elements of each parameter with frozen ones, on all processes."""
        self._names = {name: parameters[name] for name in frozen}
        self._swaps = late or any(map(is_sharded, self._n_live))
        """Whether the optimizer has its ordinary parameters at times."""
        self._has_vectors = False  # the optimizer, in place of its ordinary parameters
        self._swapped_out: tuple[list[list[Tensor]], list[Any]] = ([], [])  # its groups' "params", "param_names" then
        self._unbundled = {p for name, p in self._names.items() if name in unbundled or p.numel() > MAX_BUNDLED_NUMEL}
        self._fully_frozen_state: dict[Parameter, State] = {}
        self._place: dict[Tensor, tuple[LiveVector, Bundle]] = {}  # of each partly frozen parameter
        if not late:
            self.drop_gradients_()
        self._compact({parameters[name]: mask for name, mask in frozen.items()})
        self._swap_out()
        own = {*self._unbundled, *self._fully_frozen_state} if free_grads_in_backward and not late else set()
        freed = [p for p in self._n_live if p in own and p.requires_grad]
        self._handles: list[RemovableHandle] = [
            optimizer.register_state_dict_post_hook(self._ordinary_state_dict),
            optimizer.register_load_state_dict_pre_hook(lambda optimizer, state_dict: self._expand()),
            optimizer.register_load_state_dict_post_hook(lambda optimizer: self._compact_again()),
            *([optimizer.register_state_dict_pre_hook(lambda optimizer: self._swap_in())] if self._swaps else []),
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

    @contextmanager
    def vectors_in(self) -> Iterator[None]:
        """Let the optimizer have the vectors, as during its steps."""
        had_vectors = self._has_vectors
        self._swap_in()
        try:
            yield
        finally:
            if not had_vectors:
                self._swap_out()

    def begin_step(self) -> None:
        """Zero the gradients that ``optimizer.zero_grad`` does not reach: before the first backward pass of a step."""
        if self._late:
            return
        self.drop_gradients_()
        self._swap_out()  # a loss scaler has left the last step out
        for vector in self._vectors if self._swaps else ():
            vector.parameter.grad = None

    @torch.no_grad()
    def gather_gradients_(self) -> None:
        """Complete the gradients of the live elements: after the last backward pass of a step, before unscaling."""
        self._swap_in()
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
        _drop_gradients(self._n_live)

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
        for _, bundle in self._bundles():
            bundle.mask_gradients_()
        for p in self._fully_frozen_state:
            if p.grad is not None:
                p.grad = p.grad.zero_()

    def release(self) -> None:
        """Give the optimizer its parameters back, with a state of the ordinary shapes."""
        for handle in self._handles:
            handle.remove()
        self._expand()

    def before_update(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the optimizer the vectors for its step, after the closure if the step has one.

        Args:
            args: arguments that a pre-hook of the optimizer's step receives; the first is the optimizer.
            kwargs: keyword arguments that the hook receives.

        Returns:
            The arguments to call the step with instead, as the hook has to return them, or None.
        """
        if self._late:
            return right_before_update(args, kwargs, self._begin_late_step, self._swap_out)
        if self._swaps:  # they are there, unless somebody has asked for a `state_dict` since the backward pass
            return right_before_update(args, kwargs, self._swap_in, lambda: None)
        return None

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
        """Give the optimizer its parameters back for the time between its steps, where it has them then."""
        if self._swaps and self._has_vectors:
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
    def _compact(self, frozen: Mapping[Parameter, Tensor] | None = None) -> None:
        """Replace partly frozen parameters by vectors, and take fully frozen ones out of the optimizer.

        One parameter's state at a time is gathered and freed, then one entry of all of them joined.

        Args:
            frozen: the masks, the first time: from then on the vectors' indices tell what is live.
        """
        self._has_vectors = True
        groups = self._optimizer.param_groups
        self._members: list[list[Tensor]] = [list(group["params"]) for group in groups]
        self._member_names: list[Any] = [group.get("param_names") for group in groups]
        self._vectors: list[LiveVector] = []
        for group in groups:
            self._compact_group(group, frozen)
        self._placeholder: Parameter | None = None  # an optimizer without parameters is an error to some callers
        if not any(group["params"] for group in groups):
            p = next(iter(self._n_live))
            self._placeholder = Parameter(torch.empty(0, dtype=p.dtype, device=p.device))
            self._replace(groups[0], [self._placeholder])

    def _compact_group(self, group: dict[str, Any], frozen: Mapping[Parameter, Tensor] | None) -> None:
        alike: dict[Any, list[Parameter]] = {}
        for p in group["params"]:
            if p not in self._n_live:
                continue
            if self._n_live[p]:
                alike.setdefault(self._kind(p), []).append(p)
            elif (state := self._optimizer.state.pop(p, None)) or p not in self._fully_frozen_state:
                self._fully_frozen_state[p] = {
                    key: _Zeros(value.dtype) if is_by_element(value, p) else value
                    for key, value in (state or {}).items()
                }
        made = [self._vector_of(partly, frozen) for partly in alike.values()]
        self._replace(group, [*(p for p in group["params"] if p not in self._n_live), *made])

    def _vector_of(self, partly: Sequence[Parameter], frozen: Mapping[Parameter, Tensor] | None) -> Parameter:
        """Return the vector of partly frozen parameters that the optimizer treats alike."""
        small = [p for p in partly if p not in self._unbundled]
        members = [[p] for p in partly if p in self._unbundled] + ([small] if small else [])
        bundles = [self._bundle_of(ps, frozen) for ps in members]
        if not is_sharded(partly[0]):  # of shards, all processes have the same order of bundles
            bundles.sort(key=lambda bundle: len(bundle.index) % 16)  # multiples of 16 first: aligned slices
        states = [
            bundle.gather_state([self._optimizer.state.pop(p, {}) for p in bundle.parameters]) for bundle in bundles
        ]
        return self._make(bundles, states).parameter

    def _bundle_of(self, parameters: Sequence[Parameter], frozen: Mapping[Parameter, Tensor] | None) -> Bundle:
        n_live = [self._n_live[p] for p in parameters]
        if frozen is not None:
            return Bundle(parameters, [~frozen[p] for p in parameters], n_live)
        known = [self._place[p][1] for p in parameters]
        if len(known[0].parameters) == len(parameters) and all(bundle is known[0] for bundle in known):
            return known[0]
        return Bundle(parameters, [bundle.live_mask(p) for bundle, p in zip(known, parameters, strict=True)], n_live)

    def _kind(self, p: Parameter) -> tuple[Any, ...]:
        """Return what parameters of one vector agree in: Adam, for instance, counts the steps with a gradient."""
        state = tuple(
            (key, value.dtype if is_by_element(value, p) else None if value is None else float(value))
            for key, value in self._optimizer.state.get(p, {}).items()
        )
        return (p.dtype, p.device, layout_of(p), state)

    def _make(self, bundles: Sequence[Bundle], states: Sequence[State]) -> LiveVector:
        """Make a vector of bundles, with its state from their flat states."""
        self._vectors.append(vector := LiveVector(bundles))
        self._place |= {p: (vector, bundle) for bundle in bundles for p in bundle.parameters}
        if states[0]:
            self._optimizer.state[vector.parameter] = vector.join_states(states)
        return vector

    @torch.no_grad()
    def _expand(self) -> None:
        """Undo `_compact`. The entries of a vector's state are expanded and freed one by one."""
        full = self._full_states(frees=True)
        if self._placeholder is not None:
            self._optimizer.state.pop(self._placeholder, None)
        self._optimizer.state.update({p: state for p, state in full.items() if state})
        self._set_members()

    def _full_states(self, frees: bool = False) -> dict[Tensor, State]:
        """Return the states, in their ordinary shapes, of all parameters that are not in the optimizer themselves.

        Args:
            frees: whether to take the vectors' states from the optimizer.
        """
        full: dict[Tensor, State] = {
            p: {
                key: torch.zeros_like(p, dtype=value.dtype, requires_grad=False) if isinstance(value, _Zeros) else value
                for key, value in state.items()
            }
            for p, state in self._fully_frozen_state.items()
        }
        for vector in self._vectors:
            full |= {p: {} for bundle in vector.bundles for p in bundle.parameters}
            state = self._optimizer.state.get(vector.parameter, {})
            for key in [*state]:
                value = state.pop(key) if frees else state[key]
                for bundle in vector.bundles:
                    for p, own in zip(bundle.parameters, bundle.expand(value, vector.parameter), strict=True):
                        full[p][key] = own
            if frees:
                self._optimizer.state.pop(vector.parameter, None)
        return full

    def _ordinary_state_dict(self, optimizer: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
        self._swap_out()
        return ordinary_state_dict(optimizer, packed, self._members, self._member_names, self._full_states())

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
        self._unbundled = set(self._n_live)
        self._expand()
        self._compact()

    def _split(self, vector: LiveVector) -> None:
        """Split a vector into bundles with and without a gradient: the optimizer passes the latter by in this step."""
        old = vector.parameter
        state = self._optimizer.state.pop(old, {})
        states = {bundle: vector.slice_state(state, bundle) for bundle in vector.bundles}
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

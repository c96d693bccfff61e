"""One vector in place of several partly frozen parameters: their live elements, with gradients and optimizer state.

Of sharded parameters each process has the live elements of its own shards. Its part of the vector is the local part of
a DTensor, over the same processes as the parameters: an ordinary tensor would give the norm of this process's gradients
where that of all is asked for. The parts are of unequal lengths and may be empty.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gcfreeze import _torch
from lightning_gcfreeze._masks import MaskIndex
from lightning_gcfreeze.distributed import flat_like, in_layout_of, local, part
from lightning_gcfreeze.freezing.optimizer_state import State, copied, is_by_element, to_strided


class Bundle:
    """The live elements of one parameter, or of several small ones that are copied together.

    Tensors that methods take may be DTensors; what is flat, (number of live elements,), is plain and of this process.

    Args:
        parameters: at least one; if there are several, of one dtype, on one device, and sharded in the same way or not.
        live: of each parameter, bool (*p.shape), False = held constant; of a sharded one for its local part.
        n_live: of each parameter, how many elements are live, on all processes.
    """

    def __init__(self, parameters: Sequence[Tensor], live: Sequence[Tensor], n_live: Sequence[int]) -> None:
        self.parameters: list[Tensor] = [*parameters]
        self.n_live = [*n_live]
        self.index = MaskIndex(_joined([mask.to(p.device) for p, mask in zip(parameters, live, strict=True)]))
        self.slice = slice(0)
        """Where its elements lie in the vector; set by `LiveVector`."""
        self.leaf: Tensor | None = None
        """That slice of the vector, for graphs to use in place of the parameter; see `LiveVector.make_leaf`."""
        if len(parameters) > 1:
            own = [local(p.detach()) for p in parameters]
            self._buffer = _joined(own)  # all values, live and frozen; kept from step to step
            self._views = _split_like(self._buffer, own)

    def live_mask(self, p: Tensor) -> Tensor:
        """Return which local elements of one of the parameters are live, as a new mask, bool (*local part's shape)."""
        own = [local(parameter.detach()) for parameter in self.parameters]
        joined = torch.zeros(sum(tensor.numel() for tensor in own), dtype=torch.bool, device=p.device)
        self.index.fill_(joined, True)
        i = next(i for i, parameter in enumerate(self.parameters) if parameter is p)
        return _split_like(joined, own)[i]

    def gather(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Return the live elements of tensors of the parameters' shapes, flat, in `out` if it is given."""
        own = [part(p, tensor) for p, tensor in zip(self.parameters, tensors, strict=True)]
        return self.index.gather(_joined(own), out)

    def scatter_(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Write flat values over the live elements of tensors that lie as the parameters do."""
        own = [local(tensor) for tensor in tensors]
        joined = _joined(own)
        self.index.scatter_(joined, values)
        if len(own) > 1:
            _torch.foreach_copy_(own, _split_like(joined, own))

    def mask_gradients_(self) -> None:
        """Zero the frozen elements of the parameters' gradients, those that there are, NaN included."""
        given = [p for p in self.parameters if p.grad is not None]
        for p in given:
            p.grad = in_layout_of(p, to_strided(cast("Tensor", p.grad)))
        gradients = [local(cast("Tensor", p.grad)) for p in given]
        if len(self.parameters) > 1:
            own = {id(p): gradient for p, gradient in zip(given, gradients, strict=True)}
            all_of_them = [own.get(id(p), torch.zeros_like(local(p.detach()))) for p in self.parameters]
            joined = _joined(all_of_them)
        elif given:
            joined = gradients[0]
        else:
            return
        values = self.index.gather(joined)
        self.index.scatter_(joined.zero_(), values)
        if len(self.parameters) > 1:
            _torch.foreach_copy_(all_of_them, _split_like(joined, all_of_them))

    def gather_values(self, out: Tensor) -> None:
        """Copy the parameters' live elements to `out`, flat."""
        if len(self.parameters) == 1:
            self.index.gather(local(self.parameters[0]), out)
        else:
            torch.cat([local(p).reshape(-1) for p in self.parameters], out=self._buffer)
            self.index.gather(self._buffer, out)

    def scatter_values_(self, values: Tensor) -> None:
        """Write flat values over the parameters' live elements. `gather_values` has to have run since others wrote."""
        if len(self.parameters) == 1:
            self.index.scatter_(local(self.parameters[0]), values)
        else:
            self.index.scatter_(self._buffer, values)
            _torch.foreach_copy_([local(p) for p in self.parameters], self._views)

    def gather_state(self, states: Sequence[State]) -> State:
        """Return one state of the live elements from the parameters' states, whose entries are removed one by one.

        Entries by element become flat. The others are copied from the first parameter: bundled parameters agree.
        """
        first, gathered = self.parameters[0], dict[str, Any]()
        for key in [*states[0]]:
            values = [state.pop(key) for state in states]
            by_element = is_by_element(values[0], first)
            gathered[key] = self.gather([to_strided(v) for v in values]) if by_element else copied(values[0])
        return gathered

    def expand(self, value: Any, vector: Parameter) -> list[Any]:
        """Return an entry of the vector's state for each parameter, in its ordinary shape; zero where frozen."""
        if not is_by_element(value, vector):
            return [copied(value) for _ in self.parameters]
        tensors = [torch.zeros_like(p, dtype=value.dtype, requires_grad=False) for p in self.parameters]
        self.scatter_(tensors, local(value)[self.slice])
        return tensors


class LiveVector:
    """The live elements of parameters that the optimizer treats alike, as one parameter of the optimizer.

    Args:
        bundles: of parameters of one dtype, on one device, sharded in the same way or not, with as many steps behind
            them.
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self.bundles = bundles
        self._like, self._n_live = bundles[0].parameters[0], sum(sum(bundle.n_live) for bundle in bundles)
        start = 0
        for bundle in bundles:
            bundle.slice = slice(start, start + len(bundle.index))
            start = bundle.slice.stop
        values = local(self._like.detach()).new_empty(start)
        self.values = {bundle: values[bundle.slice] for bundle in bundles}
        for bundle in bundles:
            bundle.gather_values(self.values[bundle])
        self.parameter = Parameter(self.wrapped(values))
        self._gradient = torch.empty_like(values)  # stays in memory from step to step
        self._wrapped_gradient = self.wrapped(self._gradient)
        self.grad_slices = {bundle: self._gradient[bundle.slice] for bundle in bundles}
        self.arrived: set[Bundle] = set()
        """Bundles whose gradients are in the vector's gradient."""
        for bundle in bundles:
            if bundle.leaf is not None:
                bundle.leaf = self.make_leaf(bundle)

    def wrapped(self, values: Tensor) -> Tensor:
        """Return flat values of this process as part of the vector: a DTensor where parameters are sharded."""
        return flat_like(self._like, values, self._n_live)

    def make_leaf(self, bundle: Bundle) -> Tensor:
        """Return the bundle's slice of the vector as a leaf; gradients of the leaf are added to the vector's."""
        leaf = self.values[bundle].detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(lambda leaf: self._add_leaf_gradient_(bundle, leaf))
        return leaf

    def grad_slice(self, bundle: Bundle) -> tuple[Tensor, bool]:
        """Mark a bundle as arrived. Return its slice of the gradient, and whether that has a gradient to add to."""
        gradient = self.parameter.grad
        if gradient is None or local(gradient).data_ptr() != self._gradient.data_ptr():
            if gradient is None:  # `zero_grad` has set it to None
                self.arrived.clear()
            else:  # somebody has put another one in its place
                self._gradient.copy_(local(gradient))
            self.parameter.grad = self._wrapped_gradient.detach()
        has_gradient = bundle in self.arrived
        self.arrived.add(bundle)
        return self.grad_slices[bundle], has_gradient

    @torch.no_grad()
    def add_gradients_(self, bundle: Bundle) -> None:
        """Add the live elements of the parameters' gradients to the vector's gradient."""
        gradients = [to_strided(cast("Tensor", p.grad)) for p in bundle.parameters]
        grad_slice, has_gradient = self.grad_slice(bundle)
        if has_gradient:
            grad_slice += bundle.gather(gradients)
        else:
            bundle.gather(gradients, grad_slice)

    def return_gradients_(self, bundle: Bundle) -> None:
        """Add a bundle's part of the vector's gradient to the gradients of its parameters; zero where frozen."""
        full = [torch.zeros_like(p, requires_grad=False) for p in bundle.parameters]
        bundle.scatter_(full, self.grad_slices[bundle])
        for p, gradient in zip(bundle.parameters, full, strict=True):
            p.grad = gradient if p.grad is None else gradient + p.grad

    def _add_leaf_gradient_(self, bundle: Bundle, leaf: Tensor) -> None:
        gradient, leaf.grad = cast("Tensor", leaf.grad), None
        grad_slice, has_gradient = self.grad_slice(bundle)
        if has_gradient:
            grad_slice += gradient
        else:
            grad_slice.copy_(gradient)

    def join_states(self, states: Sequence[State]) -> State:
        """Return the vector's state from the flat states of its bundles, whose entries are removed one by one.

        What is not by element is copied from the first.
        """
        joined = dict[str, Any]()
        for key in [*states[0]]:
            values = [state.pop(key) for state in states]
            flat = isinstance(values[0], Tensor) and values[0].dim() > 0
            joined[key] = self.wrapped(torch.cat(values)) if flat else copied(values[0])
        return joined

    def slice_state(self, state: State, bundle: Bundle) -> State:
        """Return a bundle's part of the vector's state; the inverse of `join_states`."""
        return {
            key: local(value)[bundle.slice] if is_by_element(value, self.parameter) else value
            for key, value in state.items()
        }


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return several tensors as one flat tensor; a single one as it is, so that its rows can be indexed."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split_like(joined: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a flat tensor in the shapes of the tensors that it was joined from."""
    slices = joined.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(slices, tensors, strict=True)]

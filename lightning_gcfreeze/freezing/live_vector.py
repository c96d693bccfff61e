"""One vector in place of several partly frozen parameters: their live elements, with gradients and optimizer state."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gcfreeze import _torch
from lightning_gcfreeze._masks import MaskIndex
from lightning_gcfreeze.freezing.optimizer_state import State, copied, is_by_element, to_strided


class Bundle:
    """The live elements of one parameter, or of several small ones that are copied together.

    Args:
        parameters: at least one; if there are several, of one dtype and on one device.
        frozen: of each parameter, bool (*p.shape), True = held constant.
    """

    def __init__(self, parameters: Sequence[Parameter], frozen: Sequence[Tensor]) -> None:
        self.parameters: list[Tensor] = [*parameters]
        self.index = MaskIndex(~_joined([mask.to(p.device) for p, mask in zip(parameters, frozen, strict=True)]))
        self.slice = slice(0)
        """Where its elements lie in the vector; set by `LiveVector`."""
        self.leaf: Tensor | None = None
        """That slice of the vector, for graphs to use in place of the parameter; see `LiveVector.make_leaf`."""
        if len(parameters) > 1:
            self._buffer = _joined(parameters).detach()  # all values, live and frozen; kept from step to step
            self._views = _split_like(self._buffer, self.parameters)

    def gather(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """Return the live elements of tensors of the parameters' shapes, flat, in `out` if it is given."""
        return self.index.gather(_joined(tensors), out)

    def scatter_(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Write flat values over the live elements of tensors of the parameters' shapes."""
        joined = _joined(tensors)
        self.index.scatter_(joined, values)
        if len(tensors) > 1:
            _torch.foreach_copy_(tensors, _split_like(joined, tensors))

    def gather_values(self, out: Tensor) -> None:
        """Copy the parameters' live elements to `out`, flat."""
        if len(self.parameters) == 1:
            self.index.gather(self.parameters[0], out)
        else:
            torch.cat([p.reshape(-1) for p in self.parameters], out=self._buffer)
            self.index.gather(self._buffer, out)

    def scatter_values_(self, values: Tensor) -> None:
        """Write flat values over the parameters' live elements. `gather_values` has to have run since others wrote."""
        if len(self.parameters) == 1:
            self.index.scatter_(self.parameters[0], values)
        else:
            self.index.scatter_(self._buffer, values)
            _torch.foreach_copy_(self.parameters, self._views)

    def gather_state(self, states: Sequence[State]) -> State:
        """Return one state of the live elements from the parameters' states.

        Entries by element become flat. The others are copied from the first parameter: bundled parameters agree.
        """
        first = self.parameters[0]
        return {
            key: self.gather([to_strided(state[key]) for state in states])
            if is_by_element(value, first)
            else copied(value)
            for key, value in states[0].items()
        }

    def expand_state(self, state: State, vector: Parameter) -> list[State]:
        """Return each parameter's state in its ordinary shapes from the vector's state; zero where frozen."""
        expanded = {key: self._expanded(value, vector) for key, value in state.items()}
        return [{key: values[i] for key, values in expanded.items()} for i in range(len(self.parameters))]

    def _expanded(self, value: Any, vector: Parameter) -> list[Any]:
        """Return an entry of the vector's state for each parameter."""
        if not is_by_element(value, vector):
            return [copied(value) for _ in self.parameters]
        tensors = [torch.zeros_like(p, dtype=value.dtype, requires_grad=False) for p in self.parameters]
        self.scatter_(tensors, value[self.slice])
        return tensors


class LiveVector:
    """The live elements of parameters that the optimizer treats alike, as one parameter of the optimizer.

    Args:
        bundles: of parameters of one dtype, on one device, with as many steps behind them.
    """

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self.bundles = bundles
        start = 0
        for bundle in bundles:
            bundle.slice = slice(start, start + len(bundle.index))
            start = bundle.slice.stop
        self.parameter = Parameter(torch.cat([bundle.gather(bundle.parameters) for bundle in bundles]).detach())
        self._gradient = torch.empty_like(self.parameter, requires_grad=False)  # stays in memory from step to step
        self.grad_slices = {bundle: self._gradient[bundle.slice] for bundle in bundles}
        self.values = {bundle: self.parameter.detach()[bundle.slice] for bundle in bundles}
        self.arrived: set[Bundle] = set()
        """Bundles whose gradients are in the vector's gradient."""
        for bundle in bundles:
            if bundle.leaf is not None:
                bundle.leaf = self.make_leaf(bundle)

    def make_leaf(self, bundle: Bundle) -> Tensor:
        """Return the bundle's slice of the vector as a leaf; gradients of the leaf are added to the vector's."""
        leaf = self.parameter.detach()[bundle.slice].requires_grad_()
        leaf.register_post_accumulate_grad_hook(lambda leaf: self._add_leaf_gradient_(bundle, leaf))
        return leaf

    def grad_slice(self, bundle: Bundle) -> tuple[Tensor, bool]:
        """Mark a bundle as arrived. Return its slice of the gradient, and whether that has a gradient to add to."""
        gradient = self.parameter.grad
        if gradient is None or gradient.data_ptr() != self._gradient.data_ptr():
            if gradient is None:  # `zero_grad` has set it to None
                self.arrived.clear()
            else:  # somebody has put another one in its place
                self._gradient.copy_(gradient)
            self.parameter.grad = self._gradient.detach()
        has_gradient = bundle in self.arrived
        self.arrived.add(bundle)
        return self.grad_slices[bundle], has_gradient

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
        full = [torch.zeros_like(p) for p in bundle.parameters]
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


def join_states(states: Sequence[State]) -> State:
    """Return a vector's state from the flat states of its bundles; what is not by element is copied from the first."""
    return {
        key: torch.cat([state[key] for state in states]) if isinstance(value, Tensor) and value.dim() else copied(value)
        for key, value in states[0].items()
    }


def slice_state(state: State, vector: LiveVector, bundle: Bundle) -> State:
    """Return a bundle's part of a vector's state; the inverse of `join_states`."""
    return {
        key: value[bundle.slice] if is_by_element(value, vector.parameter) else value for key, value in state.items()
    }


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return several tensors as one flat tensor; a single one as it is, so that its rows can be indexed."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split_like(joined: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a flat tensor in the shapes of the tensors that it was joined from."""
    slices = joined.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(slices, tensors, strict=True)]

"""Where some elements of a tensor lie, and how they are taken out of one and put back.

By sorted indices, never by a boolean mask: on a CPU masks cost several times more, because of branch misses.
"""

import functools

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

ELEMENTWISE: set[type[Optimizer]] = {
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.RMSprop, optim.Adagrad, optim.Adadelta,
    optim.Adamax, optim.ASGD, optim.Rprop,
}  # fmt: skip
"""Optimizers, by exact class, whose update of an element depends on that element's value, gradient and state alone.
Another one that does is added before training: ``ELEMENTWISE.add(Lion)``."""


class MaskIndex:
    """The places of the elements that a mask marks, in the order of its rows. To be used without gradients.

    Where whole rows are marked and nothing else, an index is kept for each row; else one for each element.

    Args:
        mask: bool, on the device of the tensors of its shape to which this will be applied.
    """

    def __init__(self, mask: Tensor) -> None:
        rows = mask.reshape(len(mask) if mask.dim() else 1, -1) if mask.numel() else mask.reshape(0, 1)
        some = rows.any(1)
        if rows.shape[1] > 1 and torch.equal(some, rows.all(1)):
            self.index, self._unit = some.nonzero().squeeze(1), rows.shape[1]
        else:
            dtype = torch.int32 if rows.numel() < 2**31 and _scatters_int32(mask.device.type) else torch.int64
            self.index, self._unit = rows.flatten().nonzero().squeeze(1).to(dtype), 1

    def __len__(self) -> int:
        """How many elements are marked."""
        return self.index.numel() * self._unit

    def take(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The marked elements of a tensor, flat; into `out` if it is there."""
        if self._unit == 1:
            return torch.index_select(tensor.reshape(-1), 0, self._index(tensor), out=out)
        out = None if out is None else out.view(-1, self._unit)
        return torch.index_select(tensor.reshape(-1, self._unit), 0, self._index(tensor), out=out).view(-1)

    def put_(self, tensor: Tensor, values: Tensor) -> None:
        """Write flat `values` over the marked elements, bit by bit; the others are not touched."""
        elements = tensor.reshape(-1)
        if self._unit == 1:
            elements.scatter_(0, self._index(tensor), values)
        else:
            rows, values = elements.view(-1, self._unit), values.view(-1, self._unit)
            if tensor.device.type == "cpu" and _in_sixteens(rows) and _in_sixteens(values):
                # Rows are copied number by number: four times fewer are four times faster.
                rows, values = rows.view(torch.complex128), values.view(torch.complex128)
            rows.index_copy_(0, self._index(tensor), values)
        if not tensor.is_contiguous():  # `reshape` had to copy
            tensor.copy_(elements.view_as(tensor))

    def fill_(self, tensor: Tensor, value: float) -> None:
        """Write a number over the marked elements."""
        elements = tensor.reshape(-1)
        if self._unit == 1:
            elements.scatter_(0, self._index(tensor), value)
        else:
            elements.view(-1, self._unit).index_fill_(0, self._index(tensor), value)
        if not tensor.is_contiguous():
            tensor.copy_(elements.view_as(tensor))

    def _index(self, tensor: Tensor) -> Tensor:
        """Where the tensor is: at the end of a fit Lightning takes the module and the optimizer's state to the CPU."""
        if self.index.device == tensor.device:
            return self.index
        index = self.index.to(tensor.device)
        return index if index.dtype == torch.int64 or _scatters_int32(tensor.device.type) else index.long()


def state_by_element(optimizer: Optimizer, p: Tensor) -> dict[str, Tensor]:
    """The entries of a parameter's state that have a number for each element, unlike Adam's count of steps.

    None of an optimizer that is not in `ELEMENTWISE`: what has the parameter's shape need not be by element there.
    """
    state = optimizer.state.get(p, {}) if type(optimizer) in ELEMENTWISE else {}
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.dim() and v.shape == p.shape}


def _in_sixteens(rows: Tensor) -> bool:
    """Whether rows lie in memory in pieces of 16 bytes."""
    size = rows.element_size()
    return rows.shape[1] * size % 16 == 0 and int(rows.storage_offset()) * size % 16 == 0


@functools.cache
def _scatters_int32(device: str) -> bool:
    """Whether this version of torch scatters by 4-byte indices there: half the memory, and faster."""
    index = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        torch.zeros(1, device=device).scatter_(0, index, torch.ones(1, device=device))
    except RuntimeError:
        return False
    return True

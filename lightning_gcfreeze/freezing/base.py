"""Where some elements of a tensor lie, and how they are taken out of one and put back.

By sorted indices, never by a boolean mask: on a CPU masks cost several times more, because of branch misses.
"""

import functools

import torch
from torch import Tensor


class Places:
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
            return torch.index_select(tensor.reshape(-1), 0, self.index, out=out)
        out = None if out is None else out.view(-1, self._unit)
        return torch.index_select(tensor.reshape(-1, self._unit), 0, self.index, out=out).view(-1)

    def put_(self, tensor: Tensor, values: Tensor) -> None:
        """Write flat `values` over the marked elements, bit by bit; the others are not touched."""
        elements = tensor.reshape(-1)
        if self._unit == 1:
            elements.scatter_(0, self.index, values)
        else:
            rows, values = elements.view(-1, self._unit), values.view(-1, self._unit)
            if tensor.device.type == "cpu" and _in_sixteens(rows) and _in_sixteens(values):
                # Rows are copied number by number: four times fewer are four times faster.
                rows, values = rows.view(torch.complex128), values.view(torch.complex128)
            rows.index_copy_(0, self.index, values)
        if not tensor.is_contiguous():  # `reshape` had to copy
            tensor.copy_(elements.view_as(tensor))

    def fill_(self, tensor: Tensor, value: float) -> None:
        """Write a number over the marked elements."""
        elements = tensor.reshape(-1)
        if self._unit == 1:
            elements.scatter_(0, self.index, value)
        else:
            elements.view(-1, self._unit).index_fill_(0, self.index, value)
        if not tensor.is_contiguous():
            tensor.copy_(elements.view_as(tensor))


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

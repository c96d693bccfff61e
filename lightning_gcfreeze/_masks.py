"""`MaskIndex`: gather the elements that a mask marks, and scatter values back to them."""

import functools

import torch
from torch import Tensor


class MaskIndex:
    """Indices of the elements that a mask marks, in row-major order. For use without gradients.

    Sorted indices are used instead of the boolean mask: on a CPU masks cost several times more, because of branch
    misses. If the mask marks whole rows and nothing else, one index is kept for each row, otherwise one for each
    element.

    Args:
        mask: bool, of the shape of the tensors that the index will be applied to, and on their device.
    """

    def __init__(self, mask: Tensor) -> None:
        rows = mask.reshape(len(mask) if mask.dim() else 1, -1) if mask.numel() else mask.reshape(0, 1)
        marked = rows.any(1)
        if rows.shape[1] > 1 and torch.equal(marked, rows.all(1)):
            self.index, self._row_numel = marked.nonzero().squeeze(1), rows.shape[1]
        else:
            dtype = torch.int32 if rows.numel() < 2**31 and _scatters_int32(mask.device.type) else torch.int64
            self.index, self._row_numel = rows.flatten().nonzero().squeeze(1).to(dtype), 1

    def __len__(self) -> int:
        """Return the number of marked elements."""
        return self.index.numel() * self._row_numel

    def gather(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the marked elements of a tensor, (number of them,), in `out` if it is given."""
        if self._row_numel == 1:
            return torch.index_select(tensor.reshape(-1), 0, self._index(tensor), out=out)
        out = None if out is None else out.view(-1, self._row_numel)
        return torch.index_select(tensor.reshape(-1, self._row_numel), 0, self._index(tensor), out=out).view(-1)

    def scatter_(self, tensor: Tensor, values: Tensor) -> None:
        """Write `values`, (number of marked elements,), over the marked elements, bit by bit; change no other."""
        elements = tensor.reshape(-1)
        if self._row_numel == 1:
            elements.scatter_(0, self._index(tensor), values)
        else:
            rows, values = elements.view(-1, self._row_numel), values.view(-1, self._row_numel)
            if tensor.device.type == "cpu" and _has_aligned_rows(rows) and _has_aligned_rows(values):
                # `index_copy_` copies number by number: with numbers of 16 bytes that is four times faster.
                rows, values = rows.view(torch.complex128), values.view(torch.complex128)
            rows.index_copy_(0, self._index(tensor), values)
        if not tensor.is_contiguous():  # `reshape` had to copy
            tensor.copy_(elements.view_as(tensor))

    def fill_(self, tensor: Tensor, value: float) -> None:
        """Write a number over the marked elements; change no other."""
        elements = tensor.reshape(-1)
        if self._row_numel == 1:
            elements.scatter_(0, self._index(tensor), value)
        else:
            elements.view(-1, self._row_numel).index_fill_(0, self._index(tensor), value)
        if not tensor.is_contiguous():  # `reshape` had to copy
            tensor.copy_(elements.view_as(tensor))

    def _index(self, tensor: Tensor) -> Tensor:
        """Return the index on the tensor's device: after a fit Lightning moves module and optimizer to the CPU."""
        if self.index.device == tensor.device:
            return self.index
        index = self.index.to(tensor.device)
        return index if index.dtype == torch.int64 or _scatters_int32(tensor.device.type) else index.long()


def _has_aligned_rows(rows: Tensor) -> bool:
    """Return whether each row starts and ends at a multiple of 16 bytes."""
    size = rows.element_size()
    return rows.shape[1] * size % 16 == 0 and int(rows.storage_offset()) * size % 16 == 0


@functools.cache
def _scatters_int32(device: str) -> bool:
    """Return whether this version of torch scatters by 4-byte indices, which take half the memory and are faster."""
    index = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        torch.zeros(1, device=device).scatter_(0, index, torch.ones(1, device=device))
    except RuntimeError:
        return False
    return True

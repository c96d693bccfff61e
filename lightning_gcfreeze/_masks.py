"""`MaskIndex`: gather what a mask marks, and scatter values back to it. `PackedMasks`: masks in a bit an element."""

import functools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor


class PackedMasks(Mapping[str, Tensor]):
    """Masks by name, in one bit an element; each is unpacked when it is asked for. They cannot be changed.

    Args:
        masks: bool tensors of any shape, with their names; each is let go of before the next one is asked for. Those
            that repeat a few values, as masks of rows do, are kept as they are.
    """

    def __init__(self, masks: Iterable[tuple[str, Tensor]]) -> None:
        self._masks: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}  # of those that are packed
        for name, mask in masks:
            if mask.untyped_storage().nbytes() < mask.numel():
                self._masks[name] = mask
            else:
                self._masks[name], self._shapes[name] = packed(mask), mask.shape
            del mask

    def __getitem__(self, name: str) -> Tensor:
        mask = self._masks[name]
        return unpacked(mask, self._shapes[name]) if name in self._shapes else mask

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        """Return the number of masks."""
        return len(self._masks)

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a mask, without unpacking it."""
        return name in self._masks

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(mask.untyped_storage().nbytes() for mask in self._masks.values())


def packed(mask: Tensor) -> Tensor:
    """Return the elements of a mask row by row, eight in a byte, the first one in the lowest bit, uint8."""
    flat = mask.reshape(-1)
    packed = torch.zeros((len(flat) + 7) // 8, dtype=torch.uint8, device=mask.device)
    for bit in range(8):
        bits = flat[bit::8].view(torch.uint8)
        packed[: len(bits)] |= bits << bit
    return packed


def unpacked(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the mask of a shape, bool, from what `packed` returned."""
    bits = torch.empty(len(packed), 8, dtype=torch.uint8, device=packed.device)
    for bit in range(8):
        torch.bitwise_and(packed >> bit, 1, out=bits[:, bit])
    return bits.view(-1)[: shape.numel()].view(torch.bool).view(shape)


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

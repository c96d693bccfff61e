"""Where the live elements of a parameter lie, and how they are taken out of a tensor like it and put back.

By sorted indices, never by a boolean mask: on a CPU masks cost several times more, because of branch misses.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Live:
    """The live elements of one parameter, in the order of its rows.

    Where whole rows live and all others are frozen, an index is kept for each row; else one for each element.

    Args:
        frozen: bool (*p.shape), on the parameter's device; True = held constant.
    """

    def __init__(self, frozen: Tensor) -> None:
        rows = (~frozen).reshape(len(frozen), -1) if frozen.dim() else (~frozen).reshape(1, 1)
        live = rows.any(1)
        if rows.shape[1] > 1 and torch.equal(live, rows.all(1)):
            self.index, self._unit = live.nonzero().squeeze(1), rows.shape[1]
        else:
            dtype = torch.int32 if rows.numel() < 2**31 and _scatters_int32(frozen.device.type) else torch.int64
            self.index, self._unit = rows.flatten().nonzero().squeeze(1).to(dtype), 1

    def __len__(self) -> int:
        """How many elements live."""
        return self.index.numel() * self._unit

    def take(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """The live elements, flat: of a tensor shaped like the parameter, into `out` if it is there."""
        units = tensor.detach().reshape(-1, self._unit)
        if out is None:
            return units.index_select(0, self.index).flatten()
        return torch.index_select(units, 0, self.index, out=out.view(-1, self._unit)).flatten()

    def put_(self, tensor: Tensor, values: Tensor) -> None:
        """Write flat `values` over the live elements; the others are not touched."""
        with flat(tensor) as elements:
            if self._unit == 1:
                elements.scatter_(0, self.index, values)
            else:
                elements.view(-1, self._unit).index_copy_(0, self.index, values.view(-1, self._unit))


@contextmanager
def flat(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of a tensor row by row, to be changed in place; of any memory format."""
    tensor = tensor.detach()
    elements = tensor.reshape(-1)
    yield elements
    if not tensor.is_contiguous():  # `reshape` had to copy
        tensor.copy_(elements.view_as(tensor))


@functools.cache
def _scatters_int32(device: str) -> bool:
    """Whether this version of torch scatters by 4-byte indices there: half the memory, and faster."""
    zero = torch.zeros(1, device=device)
    try:
        zero.scatter_(0, zero.int(), zero)
    except RuntimeError:
        return False
    return True

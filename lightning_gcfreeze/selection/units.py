"""The units of a parameter, what freezes together: its rows, or the tensor itself.

A row is what has the same first index: an output neuron, a filter, the embedding of a word, an element of a vector. A
scalar is one row; an empty tensor has no units.
"""

import torch
from torch import Tensor

from lightning_gcfreeze._types import Granularity
from lightning_gcfreeze.distributed import Shards


def has_units(granularity: Granularity) -> bool:
    """Return whether elements freeze together, and have one score: the mean of theirs."""
    return granularity in ("row", "tensor")


def n_units(shape: torch.Size, granularity: Granularity) -> int:
    """Return the number of units of a whole parameter."""
    if not shape.numel():
        return 0
    return shape[0] if granularity == "row" and shape else 1


def local_units(name: str, tensor: Tensor, granularity: Granularity, shards: Shards) -> Tensor:
    """Return the index, in the whole parameter, of each unit that has local elements, int64, ``(local units,)``.

    Args:
        name: of the parameter.
        tensor: its local elements.
        granularity: "row" or "tensor".
        shards: the layout of the parameters.
    """
    if not tensor.numel():
        return torch.zeros(0, dtype=torch.int64, device=tensor.device)
    if granularity == "row":
        return shards.rows(name, tensor)
    return torch.zeros(1, dtype=torch.int64, device=tensor.device)


def by_unit(tensor: Tensor, granularity: Granularity) -> Tensor:
    """Reshape local elements to ``(local units, elements of each)``; an empty tensor to (0, 1)."""
    if not tensor.numel():
        return tensor.reshape(0, 1)
    return tensor.reshape(len(tensor) if granularity == "row" and tensor.dim() else 1, -1)


def expanded(values: Tensor, shape: torch.Size) -> Tensor:
    """Give every element the value of its unit: a view.

    Args:
        values: ``(local units,)``.
        shape: of the local elements.
    """
    if not shape.numel():
        return values.new_empty(shape)
    column = values.reshape(len(values), *[1] * max(0, len(shape) - 1))
    return column.expand(shape or (1,)).reshape(shape)

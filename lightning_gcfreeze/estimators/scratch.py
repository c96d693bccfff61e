"""Memory and dtypes of intermediate results: buffers that are used again and again, masking, widening."""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_NUMEL = 2**20
"""Elements of per-sample gradients that are written out at once: 4 MiB of float32, which stays in a cache."""

MAX_FRESH_NUMEL = 2**15
"""Tensors of up to this many elements are allocated anew, which is cheaper than looking a buffer up."""


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.known: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(use: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Return uninitialized memory, which the next call for the same use returns again.

    Fresh pages cost a CPU more than the arithmetic that is done in them here. Each thread has buffers of its own, as
    large as the largest request so far. On other devices, whose allocators keep freed memory, a new tensor is returned.

    Args:
        use: names the buffer.
        shape: of the result.
        like: a tensor with the dtype and device wanted.
    """
    size = math.prod(shape)
    if size <= MAX_FRESH_NUMEL or like.device.type != "cpu":
        return like.new_empty(shape)
    known = _buffers.known.get((use, like.dtype))
    if known is None or known.numel() < size:
        known = _buffers.known[use, like.dtype] = like.new_empty(size)
    return known[:size].view(shape)


def release() -> None:
    """Free the buffers of this thread."""
    _buffers.known.clear()


def gated(tensor: Tensor, valid: Tensor | None) -> Tensor:
    """Return zeros if `valid` (0-dim bool) is False, whatever `tensor` holds; with None, or True, `tensor`."""
    return tensor if valid is None else torch.where(valid, tensor, 0.0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or `dtype` itself if it is wider."""
    return torch.promote_types(dtype, torch.float32)

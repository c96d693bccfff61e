"""`put_aside`: tensors that are there to be looked at later wait in a file, so that training has the memory.

The file is temporary and has no name: it is gone with the process, however that ends. `TMPDIR` says where it lies.
"""

import os
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_NBYTES = 2**22
"""Tensors of fewer bytes, all together, stay in memory."""


class _Entry(NamedTuple):
    """A tensor in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _File:
    """A file without a name, closed when nobody needs it any more.

    Raises:
        OSError: there is no folder for it.
    """

    def __init__(self) -> None:
        with tempfile.TemporaryFile(buffering=0) as file:
            self.number = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.number)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_File":
        return self


class Aside(Mapping[str, Tensor]):
    """Tensors by name, each read from a file when it is asked for, onto the device that it came from.

    They cannot be changed: whoever asks gets memory of its own. A copy reads the same file, a pickle is a dict of the
    tensors.

    Args:
        file: with the tensors; it does not change any more.
        entries: what is in the file, and tensors that are not.
    """

    def __init__(self, file: _File, entries: dict[str, _Entry | Tensor]) -> None:
        self._file, self._entries = file, entries

    def __getitem__(self, name: str) -> Tensor:
        entry = self._entries[name]
        if isinstance(entry, Tensor):
            return entry
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        left, offset = _bytes(tensor), entry.offset
        while left:
            if not (n := os.preadv(self._file.number, [left], offset)):
                raise RuntimeError(f"The temporary file with {name!r} has been cut short.")
            left, offset = left[n:], offset + n
        return tensor.to(entry.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a tensor, without reading it."""
        return name in self._entries

    def __deepcopy__(self, memo: dict[int, Any]) -> "Aside":
        return Aside(self._file, {name: deepcopy(entry, memo) for name, entry in self._entries.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def put_aside(tensors: Iterable[tuple[str, Tensor]], nbytes: int) -> Mapping[str, Tensor]:
    """Write tensors to a file, one after the other, if they are large.

    In memory stay small ones, those that repeat a few numbers, and, with a warning, those that the disk has no room
    for.

    Args:
        tensors: with their names; each is let go of before the next one is asked for. Not modified.
        nbytes: how large they are, all together, at least roughly.
    """
    if nbytes < MIN_NBYTES or not hasattr(os, "preadv"):  # Windows
        return dict(tensors)
    entries: dict[str, _Entry | Tensor] = {}
    try:
        file = _File()
    except OSError as error:
        _warn(error)
        return dict(tensors)
    offset, has_room = 0, True
    for name, tensor in tensors:
        entries[name] = tensor
        if has_room and tensor.untyped_storage().nbytes() >= tensor.nbytes > 0:
            try:
                _write(file, tensor, offset)
            except OSError as error:
                _warn(error)
                has_room = False
            else:
                entries[name] = _Entry(offset, tensor.shape, tensor.dtype, tensor.device)
                offset += tensor.nbytes
        del tensor
    return Aside(file, entries)


def _write(file: _File, tensor: Tensor, offset: int) -> None:
    left = _bytes(tensor.detach().cpu().contiguous())
    while left:
        n = os.pwritev(file.number, [left], offset)
        left, offset = left[n:], offset + n


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _warn(error: OSError) -> None:
    warnings.warn(
        f"Scores and variance stay in memory: the temporary folder {tempfile.gettempdir()} cannot take them ({error})."
        " Set TMPDIR to a folder with room for 8 bytes an eligible element.",
        stacklevel=2,
    )

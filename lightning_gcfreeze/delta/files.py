"""A delta in a file: places coded, all values in one piece, and a digest over everything. See docs/delta-format.md.

The file is a safetensors file, so reading it runs no code. Its tensors, all uint8 but the scalars, which are int64:

    format   ()      2
    layout   (L,)    JSON: [[name, dtype, shape, unit, n_live, low_bits, code_bytes], …], names ascending; dtype is null
                     where unit is "frozen", and the last three are left out where unit is "whole" or "frozen"
    places   (P,)    the codes of the live places, one after another, see `places`
    frozen   (F, 32) the fingerprints of all entries but those of unit "whole"
    values   (V,)    the values of all entries, one after another, little-endian
    mask     (32,)   SHA-256 of layout, then places
    base     (32,)   `fingerprint` of the model that training started from; left out where nobody said it
    number, step (), previous (32,)   in a stream: the update's number, its optimizer step, the digest of the one before
    digest   (32,)   SHA-256 over all tensors above in the order of their names, of each: name, dtype and shape as
                     in "values uint8 (5,)" with a newline behind it, then its bytes

A file of values alone leaves out layout, places and frozen, and names by `mask` the delta that has them.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_gcfreeze.delta import places
from lightning_gcfreeze.delta.errors import CorruptFileError, MismatchError

FORMAT = 2
FORMATS = (1, FORMAT)
"""What is read: the first one had no shapes and no digest, and was saved as it is in memory."""
_ABOUT = {"base", "number", "step", "previous", "digest"}
"""What a delta says of itself as a whole, and may leave out."""
MASK_PARTS = {"layout", "places", "frozen"}
"""What a whole file has besides its values."""
_CODED = MASK_PARTS | {"values", "mask"}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and re.fullmatch(r"bool|u?int(8|16|32|64)|b?float\d+(_\w+)?|complex\d+", f"{dtype}"[6:])
}
"""By their names in a file: all but the quantized ones and those of less than a byte."""

Plain = Mapping[str, Tensor]
Source = Plain | str | Path | bytes


class _Item(NamedTuple):
    """A line of the layout."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    unit: str
    n_live: int = 0
    low_bits: int = 0
    code_bytes: int = 0

    @property
    def values_shape(self) -> tuple[int, ...]:
        if self.unit == "whole":
            return self.shape
        return (self.n_live, *(self.shape[1:] if self.unit == "rows" else ()))

    @property
    def nbytes(self) -> int:
        return math.prod(self.values_shape) * self.dtype.itemsize if self.dtype else 0


def save(delta: Source, file: str | Path, *, mask: Source | None = None, base: str | None = None) -> None:
    """Write a delta as a safetensors file.

    Args:
        delta: a delta, or where it is.
        file: where to write. A file that is there is replaced.
        mask: a delta of the same places. If given, only the values are written, and to read them takes this mask.
        base: what `fingerprint` says of the model before training, for readers of the file.

    Raises:
        MismatchError: `mask` has other names, shapes, dtypes or places.
        ImportError: safetensors is not installed.
    """
    write_atomically(Path(file), pack(delta, mask=mask, base=base))


def pack(delta: Source, *, mask: Source | None = None, base: str | None = None) -> bytes:
    """Return what `save` writes."""
    tensors = coded(load(delta))
    if base is not None:
        tensors["base"] = as_tensor(bytes.fromhex(base))
    if mask is not None:
        if not torch.equal(coded(load(mask))["mask"], tensors["mask"]):
            raise MismatchError("The delta has other names, shapes, dtypes or places than `mask`: save it without.")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in MASK_PARTS}
    return sealed(tensors)


def load(source: Source, *, mask: Source | None = None) -> dict[str, Tensor]:
    """Read a delta into a flat dict of tensors; see `lightning_gcfreeze.delta`.

    Args:
        source: the path of a file, the bytes of one, its tensors as safetensors reads them, or a delta in memory.
        mask: the delta that has the places, if the file has values alone.

    Raises:
        CorruptFileError: it is no delta, cut off or damaged.
        MismatchError: it has values alone, and `mask` is missing or another one.
        OSError: the file cannot be read.
        TypeError: `source` is none of these.
        ImportError: safetensors is not installed.
    """
    tensors = read(source)
    if "values" not in tensors:
        return dict(tensors)
    if "layout" not in tensors:
        if mask is None:
            raise MismatchError("This file has values alone: pass the delta that has their places as `mask`.")
        of_places = coded(load(mask))
        if not torch.equal(of_places["mask"], tensors["mask"]):
            raise MismatchError("`mask` has other names, shapes, dtypes or places than the delta of these values had.")
        tensors = {key: of_places[key] for key in MASK_PARTS} | dict(tensors)
    return _plain(tensors)


def read(source: Source) -> Plain:
    """Return the tensors of a delta or of its file as they are, with a digest that is right."""
    if isinstance(source, str | Path):
        source = Path(source).read_bytes()
    if isinstance(source, bytes | bytearray | memoryview):
        source = _tensors(bytes(source))
    if not isinstance(source, Mapping):
        raise TypeError(f"`delta` must be a mapping of tensors, or the path or bytes of a file, got {source!r:.200}.")
    version = scalar(source, "format")
    if version not in FORMATS:
        raise CorruptFileError(f"The delta has the format {version}, this version reads 1 and 2: is it a delta's file?")
    if not _CODED & source.keys():
        if unknown := [key for key in source if ":" not in key and key not in _ABOUT | {"format"}]:
            raise CorruptFileError(f"The delta has {unknown!s:.200}, which no version writes.")
        for name, parts in by_name(source).items():
            _check_parts(name, parts)
        return source
    needed = {"values", "mask", "digest"}
    if missing := sorted((needed | MASK_PARTS if MASK_PARTS & source.keys() else needed) - source.keys()):
        raise CorruptFileError(f"The delta's file has no {missing}: it is damaged.")
    for key, tensor in source.items():
        if tensor.dtype != (torch.int64 if key in ("format", "number", "step") else torch.uint8):
            raise CorruptFileError(f"{key!r} of the delta's file is {tensor.dtype}: it is damaged, or no delta.")
    if source["values"].dim() != 1:
        raise CorruptFileError(
            f"'values' of the delta's file have the shape {tuple(source['values'].shape)}, not (V,)."
        )
    if content(source["digest"]) != digest(source):
        raise CorruptFileError("The digest is not that of the content: the file is damaged. Fetch it again.")
    return source


def _check_parts(name: str, parts: Plain) -> None:
    """Check one entry as far as it goes without a model: its parts go together."""
    unit = unit_of(parts)
    needed = {unit} if unit == "whole" else {"frozen"} if unit == "frozen" else {unit, "values", "frozen"}
    if parts.keys() - {"shape"} != needed or (unit == "whole" and "shape" in parts):
        raise CorruptFileError(f"The delta has {sorted(parts)} of {name!r}, but {sorted(needed)} go together.")
    integers = torch.int32, torch.int64
    shape = parts.get("shape")
    if (shape is not None and (shape.dtype not in integers or shape.dim() != 1)) or (
        "frozen" in parts and (parts["frozen"].dtype != torch.uint8 or parts["frozen"].shape != (32,))
    ):
        raise CorruptFileError(f"Shape or fingerprint of {name!r} cannot be such: the delta is damaged.")


def with_digest(tensors: Plain) -> dict[str, Tensor]:
    """Return coded tensors with the digest over them."""
    return {**tensors, "digest": as_tensor(digest(tensors))}


def sealed(tensors: Plain) -> bytes:
    """Return the file of coded tensors, with their digest."""
    return to_file(with_digest(tensors))


def to_file(tensors: Plain) -> bytes:
    """Return the file of coded tensors that have their digest."""
    try:
        from safetensors.torch import save as to_bytes
    except ImportError as error:
        raise missing_package("safetensors", "export") from error
    data: bytes = to_bytes(dict(tensors), metadata={"format": "pt", "lightning_gcfreeze": f"delta {FORMAT}"})
    return data


def digest(tensors: Plain) -> bytes:
    """Return the SHA-256 of all tensors but the digest."""
    found = hashlib.sha256()
    for key in sorted(tensors.keys() - {"digest"}):
        dtype = str(tensors[key].dtype).removeprefix("torch.")
        found.update(f"{key} {dtype} {tuple(tensors[key].shape)}\n".encode())
        found.update(content(tensors[key]))
    return found.digest()


def content(tensor: Tensor) -> bytes:
    """Return the bytes of the elements, row by row."""
    return bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def by_name(delta: Plain) -> dict[str, dict[str, Tensor]]:
    """Return the parts of a delta by the tensor that they belong to, in the order of the names."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(key for key in delta if ":" in key):
        name, _, part = key.rpartition(":")
        found.setdefault(name, {})[part] = delta[key]
    return dict(sorted(found.items()))


def about(delta: Plain) -> dict[str, Tensor]:
    """Return what a delta says of itself as a whole."""
    return {key: delta[key] for key in sorted(_ABOUT & delta.keys())}


def scalar(tensors: Plain, key: str) -> int | None:
    """Return a number that a delta may have."""
    if key not in tensors:
        return None
    if tensors[key].numel() != 1 or tensors[key].dtype not in (torch.int64, torch.int32):
        raise CorruptFileError(f"{key!r} of a delta must be one whole number, got {tensors[key]!r:.100}.")
    return int(tensors[key])


def unit_of(parts: Plain) -> str:
    """Return what the entry's places count; "whole", "frozen" if there are none."""
    return next((unit for unit in ("whole", "elements", "rows") if unit in parts), "frozen")


def layout_of(delta: Plain) -> tuple[bytes, bytes]:
    """Return layout and places of a delta as they are in its file."""
    lines: list[list[Any]] = []
    codes = []
    for name, parts in by_name(delta).items():
        unit = unit_of(parts)
        if unit != "whole" and "shape" not in parts:
            raise MismatchError(f"The delta is of format 1, without shapes ({name!r}): apply it, and take `diff` anew.")
        shape = parts["whole"].shape if unit == "whole" else parts["shape"].tolist()
        values = parts.get("whole", parts.get("values"))
        lines.append([name, None if values is None else str(values.dtype).removeprefix("torch."), [*shape], unit])
        if unit in ("elements", "rows"):
            code, low_bits = places.encode(parts[unit].long().numpy())
            lines[-1] += [len(parts[unit]), low_bits, len(code)]
            codes.append(code)
    return json.dumps(lines, separators=(",", ":")).encode(), b"".join(codes)


def mask_hash(layout: bytes, codes: bytes) -> bytes:
    """Return the name of a mask: all values of it have the same places."""
    return hashlib.sha256(layout + codes).digest()


def values_of(tensors: list[Tensor]) -> Tensor:
    """Return the values of a file."""
    return as_tensor(b"".join(content(tensor) for tensor in tensors))


def coded(delta: Plain) -> dict[str, Tensor]:
    """Return the tensors of the file of a delta in memory, without the digest."""
    layout, codes = layout_of(delta)
    all_parts = by_name(delta).values()
    values = [parts.get("whole", parts.get("values")) for parts in all_parts]
    frozen = [parts["frozen"] for parts in all_parts if "frozen" in parts]
    return about(delta) | {
        "format": torch.tensor(FORMAT),
        "layout": as_tensor(layout),
        "places": as_tensor(codes),
        "frozen": torch.stack(frozen) if frozen else torch.empty(0, 32, dtype=torch.uint8),
        "values": values_of([tensor for tensor in values if tensor is not None]),
        "mask": as_tensor(mask_hash(layout, codes)),
    }


def _plain(tensors: Plain) -> dict[str, Tensor]:
    """Return the delta of a file whose digest is right."""
    try:
        items = [_item(*line) for line in json.loads(content(tensors["layout"]))]
    except (TypeError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"The layout of the delta's file cannot be read: {error!s:.200}") from error
    codes, values = content(tensors["places"]), tensors["values"]
    fingerprinted = [item for item in items if item.unit != "whole"]
    if (
        [item.name for item in items] != sorted({item.name for item in items})
        or sum(item.code_bytes for item in items) != len(codes)
        or sum(item.nbytes for item in items) != values.numel()
        or tensors["frozen"].shape != (len(fingerprinted), 32)
        or mask_hash(content(tensors["layout"]), codes) != content(tensors["mask"])
    ):
        raise CorruptFileError("The layout of the delta's file does not fit the rest of it.")
    delta = about(tensors) | {"format": torch.tensor(FORMAT)}
    fingerprints = iter(tensors["frozen"])
    at_code = at_value = 0
    for item in items:
        entry = _entry(item, codes[at_code : at_code + item.code_bytes], values[at_value : at_value + item.nbytes])
        if item.unit != "whole":
            entry["frozen"] = next(fingerprints).clone()
        delta |= {f"{item.name}:{part}": tensor for part, tensor in entry.items()}
        at_code, at_value = at_code + item.code_bytes, at_value + item.nbytes
    return delta


def _entry(item: _Item, code: bytes, values: Tensor) -> dict[str, Tensor]:
    """Return one entry but its fingerprint, by the part of the key behind the colon."""
    if item.unit == "frozen":
        return {"shape": torch.tensor(item.shape, dtype=torch.int64)}
    assert item.dtype
    tensor = values.clone().view(item.dtype).view(item.values_shape)
    if item.unit == "whole":
        return {"whole": tensor}
    found = torch.from_numpy(places.decode(code, item.n_live, item.low_bits))
    small = (item.shape[0] if item.unit == "rows" else math.prod(item.shape)) < 2**31
    return {
        item.unit: found.to(torch.int32) if small else found,
        "shape": torch.tensor(item.shape, dtype=torch.int64),
        "values": tensor,
    }


def _item(
    name: str, dtype: str | None, shape: list[int], unit: str, n_live: int = 0, low_bits: int = 0, code_bytes: int = 0
) -> _Item:
    """Check a line of the layout."""
    numbers = [*shape, n_live, low_bits, code_bytes]
    if (
        not isinstance(name, str)
        or unit not in ("whole", "elements", "rows", "frozen")
        or (dtype is None) != (unit == "frozen")
        or (dtype is not None and dtype not in _DTYPES)
        or any(type(number) is not int or not 0 <= number < 2**62 for number in numbers)
        or math.prod(max(size, 1) for size in shape) >= 2**62
        or (unit in ("elements", "rows") and 0 in shape)  # places for nothing
        or (unit == "rows" and len(shape) < 2)
    ):
        raise ValueError(f"{[name, dtype, shape, unit, n_live, low_bits, code_bytes]!s:.200}")
    return _Item(name, _DTYPES[dtype] if dtype else None, tuple(shape), unit, n_live, low_bits, code_bytes)


def _tensors(data: bytes) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load as from_bytes
    except ImportError as error:
        raise missing_package("safetensors", "export") from error
    try:
        tensors: dict[str, Tensor] = from_bytes(data)
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise CorruptFileError(f"This is no whole safetensors file: {error!s:.200}") from error
    return tensors


def as_tensor(data: bytes) -> Tensor:
    """Return bytes as uint8."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that, after a kill or a power cut, is there as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make what was put into a folder, or removed from it, last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def missing_package(package: str, extra: str) -> ImportError:
    """Return the error for an optional dependency that is not installed."""
    return ImportError(f"This needs {package}: `pip install lightning-gcfreeze[{extra}]`.")

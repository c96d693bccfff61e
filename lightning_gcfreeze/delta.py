"""Save what training changed since t0, the live elements' indices and values, and apply it to a model.

Frozen elements keep their bits from step t0 on, so the weights of that step and the live elements are the trained
model. A delta is a flat dict of CPU tensors, which safetensors saves as they are. For a parameter or buffer ``name``:

    name:elements, name:values, name:frozen     some elements are live
    name:rows,     name:values, name:frozen     every row, an index along the first axis, is wholly frozen or live
    name:frozen                                 nothing is live
    name:whole                                  everything is live, or storing all takes no more bytes

``elements`` and ``rows`` ascend, int32 or, from 2³¹ on, int64; elements count row by row, whatever the memory format.
``values`` are the new values, not differences, so applying a delta is exact to the bit. ``frozen`` is a fingerprint of
the elements that a delta leaves unchanged, which identifies the weights of t0. ``format`` is the version of all this.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import whole

_FORMAT = 1


def of(module: nn.Module, frozen: Named) -> dict[str, Tensor]:
    """Copy everything of `module` that can have moved since its elements froze to the CPU.

    A delta holds the live elements of the parameters in `frozen`, all other parameters that require a gradient, and
    the persistent buffers. Parameters that do not require a gradient and are not in `frozen` are left out, even if
    something other than a gradient moves them. A tied parameter is stored under its first name.

    Args:
        module: the module after t0. Not modified.
        frozen: ``{name: bool (*p.shape)}``, True = constant since t0. These parameters need not require a gradient.

    Returns:
        The tensors under the names in the header of this file, contiguous, in the dtypes of `module`.

    Raises:
        ValueError: a name of `frozen` is no parameter of `module`, or a mask has another shape or dtype.
    """
    parameters = dict(module.named_parameters())
    if unknown := frozen.keys() - parameters.keys():
        raise ValueError(f"`frozen` has {shortened(sorted(unknown))}, no parameters of the {type(module).__name__}.")
    saved = module.state_dict().keys()
    delta = {"format": torch.tensor(_FORMAT)}
    for name, p in parameters.items():
        if name in frozen:
            if frozen[name].dtype != torch.bool or frozen[name].shape != p.shape:
                raise ValueError(
                    f"A mask of `frozen` must be bool and have its parameter's shape, {tuple(p.shape)} for {name!r};"
                    f" got {frozen[name].dtype} of {tuple(frozen[name].shape)}."
                )
            delta |= {
                f"{name}:{part}": tensor
                for part, tensor in _parts(whole(p.detach()), whole(frozen[name]).cpu()).items()
            }
        elif p.requires_grad:
            delta[f"{name}:whole"] = _copy(p)
    return delta | {f"{name}:whole": _copy(buffer) for name, buffer in module.named_buffers() if name in saved}


def save(delta: Mapping[str, Tensor], file: str | Path) -> None:
    """Write a delta as a safetensors file.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise missing_package("safetensors", "export") from error
    save_file(dict(delta), file, metadata={"format": "pt", "lightning_gcfreeze": f"delta {_FORMAT}"})


def apply_delta(model: nn.Module, delta: Mapping[str, Tensor] | str | Path) -> None:
    """Turn the weights of step t0 into the weights that the delta was taken from, in place and to the bit.

    Everything is checked before anything is written. Names are exact: a delta of a LightningModule fits the
    LightningModule, not its network. Some entries of a delta, with ``format``, are a delta of fewer tensors.

    Args:
        model: a model with the weights of t0 where the delta leaves them unchanged, on any device.
        delta: a delta, or the path of its file.

    Raises:
        ValueError: the delta does not fit in format, completeness, names, dtypes, shapes or indices, or an element that
            it leaves unchanged has other bits than at t0.
        TypeError: `delta` is neither a mapping nor a path.
        ImportError: `delta` is a path, and safetensors is not installed.
    """
    with torch.no_grad():
        for entry in checked_entries(model, delta):
            entry.write_(entry.target)


class Entry(NamedTuple):
    """The entries of a delta for one tensor of a model. With nothing live, `indices` and `values` are empty."""

    name: str
    target: Tensor
    unit: str
    """What `indices` count: "elements" or "rows"; or "whole"."""
    indices: Tensor
    values: Tensor
    fingerprint: Tensor | None
    """Of the unchanged elements; None if the tensor is stored as a whole."""

    def write_(self, tensor: Tensor) -> None:
        """Write the values to a tensor of any memory format."""
        if self.unit == "whole":
            tensor.copy_(self.values)
            return
        units = _units(tensor, self.unit)
        units.index_copy_(0, self.indices.long().to(tensor.device), self.values.to(tensor.device))
        if not tensor.is_contiguous():  # `reshape` had to copy
            tensor.copy_(units.view_as(tensor))


def checked_entries(model: nn.Module, delta: Mapping[str, Tensor] | str | Path) -> list[Entry]:
    """Return the entries of a delta with the tensors of a model that they fit.

    Raises:
        ValueError, TypeError, ImportError: as `apply_delta` does.
    """
    if isinstance(delta, str | Path):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise missing_package("safetensors", "export") from error
        delta = load_file(delta)
    if not isinstance(delta, Mapping):
        raise TypeError(f"`delta` must be a mapping of tensors or the path of a file, got {delta!r:.200}.")
    version = int(delta["format"]) if "format" in delta else None
    if version != _FORMAT:
        raise ValueError(f"The delta has the format {version}, this version reads {_FORMAT}: is it a delta's file?")
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    by_name: dict[str, dict[str, Tensor]] = {}
    for key in sorted(delta.keys() - {"format"}):
        name, _, part = key.rpartition(":")
        by_name.setdefault(name, {})[part] = delta[key].cpu()
    if unknown := by_name.keys() - targets.keys():
        raise ValueError(
            f"The delta has {shortened(sorted(unknown))}, but the {type(model).__name__} has not. Pass the module that"
            " it was taken from: names are exact, so a prefix must be neither added nor left out."
        )
    entries = [_entry(name, targets[name], parts) for name, parts in by_name.items()]
    differing = [
        name
        for name, target, unit, indices, _, fingerprint in entries
        if fingerprint is not None and fingerprint.tolist() != _fingerprint(target, unit, indices).tolist()
    ]
    if differing:
        raise ValueError(
            f"These weights are not those of step t0: {shortened(differing)} differ in dtype, shape or frozen elements."
            " Load the checkpoint of that step first."
        )
    return entries


def _entry(name: str, target: Tensor, parts: Mapping[str, Tensor]) -> Entry:
    """Check one entry, except for its fingerprint."""
    unit = next((unit for unit in ("whole", "elements", "rows") if unit in parts), "frozen")
    needed = {unit} if unit in ("whole", "frozen") else {unit, "values", "frozen"}
    if parts.keys() != needed:
        raise ValueError(f"The delta has {sorted(parts)} of {name!r}, but {sorted(needed)} go together.")
    nothing = torch.empty(0, dtype=torch.int32)
    indices = parts[unit] if unit in ("elements", "rows") else nothing
    values = parts.get("whole", parts.get("values", nothing.to(target.dtype)))
    end = target.numel() if unit != "rows" else len(target) if target.dim() else 0
    integers = indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1
    if not integers or (torch.cat([torch.tensor([-1]), indices, torch.tensor([end])]).diff() <= 0).any():
        raise ValueError(f"The {unit} of {name!r} must ascend within [0, {end}), got {indices.tolist()!s:.80}.")
    shape = target.shape if unit == "whole" else (len(indices), *(target.shape[1:] if unit == "rows" else ()))
    if values.dtype != target.dtype or values.shape != shape:
        raise ValueError(
            f"{name!r} is {target.dtype} of {tuple(target.shape)} in the model and takes values of {tuple(shape)}, but"
            f" the delta's are {values.dtype} of {tuple(values.shape)}. Build the model as it was trained."
        )
    return Entry(name, target, unit, indices, values, parts.get("frozen"))


def _parts(p: Tensor, frozen: Tensor) -> dict[str, Tensor]:
    """Return the entries of a parameter with a mask, by the part of the key after the colon."""
    if not frozen.any():
        return {"whole": _copy(p)}
    rows = frozen.reshape(len(frozen), -1) if p.dim() > 1 else frozen.reshape(1, -1)
    by_row = p.dim() > 1 and bool((rows == rows[:, :1]).all())
    unit = "rows" if by_row else "elements"
    live = ~(rows[:, 0] if by_row else rows.flatten())
    indices = live.nonzero().squeeze(1).to(torch.int32 if live.numel() < 2**31 else torch.int64)
    values = _copy(_units(p, unit).index_select(0, indices.to(p.device)))
    if indices.nbytes + values.nbytes >= p.nbytes:
        return {"whole": _copy(p)}
    parts = {unit: indices, "values": values} if len(indices) else {}
    return parts | {"frozen": _fingerprint(p, unit, indices)}


def _fingerprint(tensor: Tensor, unit: str, indices: Tensor) -> Tensor:
    """Return the SHA-256, (32,) uint8, of dtype, shape, live indices, and the bits of all other elements."""
    units = _units(_copy(tensor), unit).index_fill_(0, indices.long(), 0)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(indices.numpy().data)
    digest.update(units.reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _units(tensor: Tensor, unit: str) -> Tensor:
    """Return what indices count along the first axis: rows, or elements row by row; a view if contiguous."""
    return tensor if unit == "rows" else tensor.reshape(-1)


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def missing_package(package: str, extra: str) -> ImportError:
    """Return the error for an optional dependency that is not installed."""
    return ImportError(f"This needs {package}: `pip install lightning-gcfreeze[{extra}]`.")

"""A delta in memory: which parts it has, how it is taken from a module, and how it is checked against one."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.delta.errors import MismatchError, WrongBaseError
from lightning_gcfreeze.delta.files import FORMAT, Source, by_name, content, load, unit_of
from lightning_gcfreeze.distributed import sharded_parameters, whole

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of(module: nn.Module, frozen: Named) -> dict[str, Tensor]:
    """Copy everything of `module` that can have moved since its elements froze to the CPU.

    A delta holds the live elements of the parameters in `frozen`, all other parameters that require a gradient, and
    the persistent buffers. Parameters that do not require a gradient and are not in `frozen` are left out, even if
    something other than a gradient moves them. A tied parameter is stored under its first name.

    Args:
        module: the module after t0. Not modified.
        frozen: ``{name: bool (*p.shape)}``, True = constant since t0. These parameters need not require a gradient.

    Returns:
        The tensors that `lightning_gcfreeze.delta` describes, contiguous, in the dtypes of `module`.

    Raises:
        ValueError: a name of `frozen` is no parameter of `module`, or a mask has another shape or dtype.
    """
    parameters = sharded_parameters(module)  # what is gathered now has no memory after `state_dict`
    if unknown := frozen.keys() - parameters.keys():
        raise ValueError(f"`frozen` has {shortened(sorted(unknown))}, no parameters of the {type(module).__name__}.")
    saved = module.state_dict().keys()
    delta = {"format": torch.tensor(FORMAT)}
    for name, p in parameters.items():
        if name in frozen:
            if frozen[name].dtype != torch.bool or frozen[name].shape != p.shape:
                raise ValueError(
                    f"A mask of `frozen` must be bool and have its parameter's shape, {tuple(p.shape)} for {name!r};"
                    f" got {frozen[name].dtype} of {tuple(frozen[name].shape)}."
                )
            delta |= parts_of(name, whole(p.detach()), whole(frozen[name]).cpu())
        elif p.requires_grad:
            delta[f"{name}:whole"] = _copy(p)
    return delta | {f"{name}:whole": _copy(buffer) for name, buffer in module.named_buffers() if name in saved}


def masks(model: nn.Module | Named, delta: Source) -> dict[str, Tensor]:
    """Return what a delta leaves unchanged, as masks: ``{name: bool (*p.shape)}``, True = unchanged.

    A training with these masks has a delta of the same places: of its values alone, there is an update.

    Args:
        model: the base, or its state dict.
        delta: as for `apply`.

    Returns:
        Masks of the parameters that the delta names, of a state dict of all tensors; False where one is stored whole.

    Raises:
        MismatchError, CorruptFileError: as for `apply`.
    """
    entries = fitting_entries(model, delta)
    maskable = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
    return {entry.name: ~entry.written() for entry in entries if entry.name in maskable}


def fingerprint(model: nn.Module | Named) -> str:
    """Return the name of a base: the SHA-256, in hex, of all tensors of a module's state dict.

    Over the tensors in the order of their names, of each a line as in ``weight float32 (5, 3)`` with a newline behind
    it, then its elements' bytes, row by row.

    Args:
        model: a module, or its state dict. Entries that are no tensors do not count.
    """
    found = hashlib.sha256()
    state = model.state_dict() if isinstance(model, nn.Module) else model
    for name in sorted(name for name, tensor in state.items() if isinstance(tensor, Tensor)):
        tensor = whole(state[name])
        found.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        found.update(content(tensor))
    return found.hexdigest()


class Entry(NamedTuple):
    """The entries of a delta for one tensor of a model. With nothing live, `indices` and `values` are empty."""

    name: str
    target: Tensor
    unit: str
    """What `indices` count: "elements" or "rows"; "whole", or "frozen" with nothing live."""
    indices: Tensor
    values: Tensor
    fingerprint: Tensor | None
    """Of the unchanged elements; None if the tensor is stored as a whole."""

    def write_(self, tensor: Tensor) -> None:
        """Write the values to a tensor of any memory format."""
        if self.unit == "whole":
            tensor.copy_(self.values)
        elif len(self.indices):
            units, indices = _units(tensor, self.unit), self.indices.long().to(tensor.device)
            bits(units).index_copy_(0, indices, bits(self.values.to(tensor.device)))
            if not tensor.is_contiguous():  # `reshape` had to copy
                tensor.copy_(units.view_as(tensor))

    def read(self, tensor: Tensor) -> "Entry":
        """Return the entry with the values that a tensor has in its places."""
        if self.unit == "whole":
            return self._replace(values=_copy(tensor))
        indices = self.indices.long().to(tensor.device)
        values = bits(_units(tensor.detach(), self.unit)).index_select(0, indices).view(tensor.dtype)
        return self._replace(values=values.to(self.values.device))

    def written(self) -> Tensor:
        """Return which elements the entry writes, bool, of the target's shape, on the CPU."""
        mask = torch.zeros(self.target.shape, dtype=torch.bool)
        self._replace(values=torch.ones(self.values.shape, dtype=torch.bool)).write_(mask)
        return mask

    def parts(self) -> dict[str, Tensor]:
        """Return the entry as the parts of a delta."""
        if self.unit == "whole":
            return {f"{self.name}:whole": self.values.cpu()}
        assert self.fingerprint is not None
        live = {self.unit: self.indices.cpu(), "values": self.values.cpu()} if self.unit != "frozen" else {}
        shape = torch.tensor(self.target.shape, dtype=torch.int64)
        return {f"{self.name}:{part}": t for part, t in (live | {"shape": shape, "frozen": self.fingerprint}).items()}


def checked_entries(model: nn.Module | Named, delta: Source) -> list[Entry]:
    """Return the entries of a delta with the tensors of a model that they fit.

    Raises:
        DeltaError, TypeError, ImportError: as `apply` does.
    """
    entries = fitting_entries(model, delta)
    check_unchanged(entries)
    return entries


def fitting_entries(model: nn.Module | Named, delta: Source) -> list[Entry]:
    """Return the entries of a delta; whether the rest of the model is the base is not looked at."""
    delta = load(delta)
    targets = tensors_of(model)
    entries = by_name(delta)
    first_names = _first_names(model) if entries.keys() - targets.keys() else {}
    for name in entries.keys() & first_names.keys():  # of two state dicts, `diff` has a tied tensor twice
        if _same(entries[name], entries.get(first_names[name], {})):
            del entries[name]
    if unknown := entries.keys() - targets.keys():
        raise MismatchError(
            f"The delta has {shortened(sorted(unknown))}, but the {type(model).__name__} has not. Pass the module that"
            " it was taken from: names are exact, so a prefix must be neither added nor left out."
        )
    return [_entry(name, targets[name], parts) for name, parts in entries.items()]


def check_unchanged(entries: list[Entry]) -> None:
    """Raise a WrongBaseError if elements that a delta leaves unchanged are not those of its base."""
    differing = [
        name
        for name, target, unit, indices, _, expected in entries
        if expected is not None and expected.tolist() != unchanged(target, unit, indices).tolist()
    ]
    if differing:
        raise WrongBaseError(
            f"These weights are not those of step t0: {shortened(differing)} differ in dtype, shape or frozen elements."
            " Load the checkpoint of that step first."
        )


def tensors_of(model: nn.Module | Named) -> dict[str, Tensor]:
    """Return parameters and buffers, a tied one under its first name; of a state dict all tensors."""
    if isinstance(model, nn.Module):
        return dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}


def _first_names(model: nn.Module | Named) -> dict[str, str]:
    """Return the first names of tied parameters and buffers by their other names."""
    if not isinstance(model, nn.Module):
        return {}
    first = {id(tensor): name for name, tensor in tensors_of(model).items()}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first[id(tensor)] for name, tensor in named if first[id(tensor)] != name}


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Return whether two entries have the same parts, to the bit."""
    return first.keys() == second.keys() and all(
        t.dtype == second[part].dtype and t.shape == second[part].shape and content(t) == content(second[part])
        for part, t in first.items()
    )


def _entry(name: str, target: Tensor, parts: Mapping[str, Tensor]) -> Entry:
    """Check one entry, except for its fingerprint."""
    unit = unit_of(parts)
    parts = {part: tensor.cpu() for part, tensor in parts.items()}
    if "shape" in parts and parts["shape"].tolist() != list(target.shape):
        raise MismatchError(
            f"{name!r} has the shape {tuple(parts['shape'].tolist())} in the delta and {tuple(target.shape)} in the"
            " model. Build the model as it was trained."
        )
    nothing = torch.empty(0, dtype=torch.int32)
    indices = parts[unit] if unit in ("elements", "rows") else nothing
    values = parts.get("whole", parts.get("values", nothing.to(target.dtype)))
    end = target.numel() if unit != "rows" else len(target) if target.dim() else 0
    integers = indices.dtype in (torch.int32, torch.int64) and indices.dim() == 1
    if not integers or (torch.cat([torch.tensor([-1]), indices, torch.tensor([end])]).diff() <= 0).any():
        raise MismatchError(f"The {unit} of {name!r} must ascend within [0, {end}), got {indices.tolist()!s:.80}.")
    shape = target.shape if unit == "whole" else (len(indices), *(target.shape[1:] if unit == "rows" else ()))
    if values.dtype != target.dtype or values.shape != shape:
        raise MismatchError(
            f"{name!r} is {target.dtype} of {tuple(target.shape)} in the model and takes values of {tuple(shape)}, but"
            f" the delta's are {values.dtype} of {tuple(values.shape)}. Build the model as it was trained."
        )
    return Entry(name, target, unit, indices, values, parts.get("frozen"))


def parts_of(name: str, tensor: Tensor, frozen: Tensor) -> dict[str, Tensor]:
    """Return the parts of a tensor with a mask: the live places, of rows or of elements, if any element is frozen."""
    if not frozen.any():
        return {f"{name}:whole": _copy(tensor)}
    rows = frozen.reshape(len(frozen), -1) if tensor.dim() > 1 else frozen.reshape(1, -1)
    by_row = tensor.dim() > 1 and bool((rows == rows[:, :1]).all())
    unit = "rows" if by_row else "elements"
    live = ~(rows[:, 0] if by_row else rows.flatten())
    indices = live.nonzero().squeeze(1).to(_place_dtype(len(live)))
    values = _copy(bits(_units(tensor, unit)).index_select(0, indices.to(tensor.device)).view(tensor.dtype))
    entry = Entry(name, tensor, unit, indices, values, unchanged(tensor, unit, indices))
    return (entry if len(indices) else entry._replace(unit="frozen")).parts()


def unchanged(tensor: Tensor, unit: str, indices: Tensor) -> Tensor:
    """Return the SHA-256, (32,) uint8, of dtype, shape, live indices, and the bits of all other elements."""
    units = bits(_units(_copy(tensor), unit)).index_fill_(0, indices.long(), 0)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(indices.to(_place_dtype(len(units))).numpy().data)
    digest.update(units.reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _place_dtype(units: int) -> torch.dtype:
    return torch.int32 if units < 2**31 else torch.int64


def bits(tensor: Tensor) -> Tensor:
    """Return a view of the elements as integers, for which torch has all operations; complex128 as it is."""
    return tensor.view(_INTEGERS[tensor.element_size()]) if tensor.element_size() in _INTEGERS else tensor


def _units(tensor: Tensor, unit: str) -> Tensor:
    """Return what indices count along the first axis: rows, or elements row by row; a view if contiguous."""
    return tensor if unit == "rows" else tensor.reshape(-1)


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

"""Deltas of models that others trained, deltas in one, and where they meet."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.delta.entries import bits, checked_entries, fingerprint, parts_of, tensors_of
from lightning_gcfreeze.delta.errors import ConflictError, MismatchError
from lightning_gcfreeze.delta.files import FORMAT, Source, as_tensor, by_name, content, load, unit_of
from lightning_gcfreeze.distributed import whole


class Overlap(NamedTuple):
    """Where two deltas write to the same places of one tensor."""

    shared: int
    """Places that both write."""
    differing: int
    """Those of them to which they write different bits."""


def diff(base: nn.Module | Named, tuned: nn.Module | Named, *, frozen: Named | None = None) -> dict[str, Tensor]:
    """Return the delta that turns one model into another, however that was trained.

    Bits are compared, so -0.0 differs from 0.0 and a NaN equals itself. A tensor in which nothing differs is named as
    unchanged. Two state dicts give the deltas of models that do not fit into memory as modules.

    Args:
        base: a module, or a state dict as ``safetensors.torch.load_file`` returns it.
        tuned: the same, after training.
        frozen: ``{name: bool (*p.shape)}``: of these tensors the delta has all places with False, differing or not, and
            no others: places that are known in advance, or one share of what changed.

    Raises:
        MismatchError: they have other names, a tensor or mask has another shape or dtype, or what is no tensor differs.
    """
    if other := _other_state(base, tuned):
        raise MismatchError(
            f"The state dicts differ in {shortened(other)}, which are no tensors (quantized weights, extra state): a"
            " delta cannot have them."
        )
    before, after = _saved(base), _saved(tuned)
    if isinstance(base, nn.Module) != isinstance(tuned, nn.Module):  # a state dict has a tied tensor twice
        aliased = base if isinstance(base, nn.Module) else tuned
        assert isinstance(aliased, nn.Module)
        twice = aliased.state_dict().keys() - _saved(aliased).keys()
        before, after = ({name: t for name, t in of.items() if name not in twice} for of in (before, after))
    if different := sorted(before.keys() ^ after.keys()):
        raise MismatchError(f"Only one of the two models has {shortened(different)}.")
    delta = {"format": torch.tensor(FORMAT), "base": as_tensor(bytes.fromhex(fingerprint(base)))}
    for name, old in before.items():
        old, new = whole(old.detach()), whole(after[name].detach())
        if old.dtype != new.dtype or old.shape != new.shape:
            raise MismatchError(
                f"{name!r} is {old.dtype} of {tuple(old.shape)} in the base and {new.dtype} of {tuple(new.shape)} in"
                " the tuned model."
            )
        mask = None if frozen is None else frozen.get(name)
        if mask is None:
            delta |= parts_of(name, new, same_bits(old.cpu(), new.cpu()))
            continue
        if mask.dtype != torch.bool or mask.shape != old.shape:
            raise MismatchError(
                f"The mask of {name!r} must be bool of {tuple(old.shape)}, got {mask.dtype} of {tuple(mask.shape)}."
            )
        delta |= parts_of(name, torch.where(whole(mask).to(old.device), old, new.to(old.device)), whole(mask).cpu())
    return delta


def merge(base: nn.Module, *deltas: Source, on_conflict: str = "error") -> dict[str, Tensor]:
    """Return one delta that writes what several write.

    Args:
        base: the model that all of them start from. Not modified.
        deltas: in this order.
        on_conflict: what happens where two write different bits to one place: "error", or "last", whose bits stay.

    Raises:
        ConflictError: they do so, and `on_conflict` is "error". `overlap` says where.
        DeltaError: one of them does not fit `base`, see `apply`.
    """
    if on_conflict not in ("error", "last"):
        raise ValueError(f'`on_conflict` must be "error" or "last", got {on_conflict!r}.')
    new: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    found = [load(delta) for delta in deltas]
    for number, delta in enumerate(found):
        for entry in checked_entries(base, delta):
            old = entry.target.detach()
            current = new.setdefault(entry.name, old.clone())
            known = written.setdefault(entry.name, torch.zeros(old.shape, dtype=torch.bool))
            touched = entry.written()
            before = current.clone()
            entry.write_(current)
            conflicts = int((known & touched & ~same_bits(before, current).cpu()).sum())
            if conflicts and on_conflict == "error":
                raise ConflictError(
                    f"Delta {number} writes other bits than an earlier one to {conflicts} elements of {entry.name!r}."
                    ' `overlap` compares two deltas; on_conflict="last" lets the last one win.'
                )
            known |= touched
    bases = [delta.get("base") for delta in found]
    merged = {"format": torch.tensor(FORMAT)}
    if bases and bases[0] is not None and all(b is not None and torch.equal(b, bases[0]) for b in bases):
        merged["base"] = bases[0]
    for name, tensor in new.items():
        merged |= parts_of(name, tensor, ~written[name])
    return merged


def overlap(first: Source, second: Source) -> dict[str, Overlap]:
    """Return where two deltas of one base meet: the tensors in which they write to the same places.

    An empty dict means that they are disjoint: applied in either order, they give the same model.
    """
    ours, theirs = by_name(load(first)), by_name(load(second))
    found = {}
    for name in sorted(ours.keys() & theirs.keys()):
        (places, values), (other_places, other_values) = (_flat(parts[name]) for parts in (ours, theirs))
        _, at, other_at = np.intersect1d(places, other_places, assume_unique=True, return_indices=True)
        if len(at):
            differing = (values[at] != other_values[other_at]).any(axis=1)
            found[name] = Overlap(len(at), int(differing.sum()))
    return found


def state_dict(base: nn.Module, delta: Source) -> dict[str, Tensor]:
    """Return the state dict of a model with a delta applied, and leave the model as it is.

    Tensors that the delta does not change are the model's own, not copies.

    Raises:
        DeltaError: the delta does not fit, see `apply`.
    """
    entries = {id(entry.target): entry for entry in checked_entries(base, delta)}
    names = {name: id(t) for of in (base.named_parameters, base.named_buffers) for name, t in of("", True, False)}
    state = {}
    found = set()
    for name, tensor in base.state_dict(keep_vars=True).items():
        state[name] = tensor.detach() if isinstance(tensor, Tensor) else tensor
        key = id(tensor) if id(tensor) in entries else names.get(name)  # a hook may have put copies there
        if key in entries:
            state[name] = state[name].clone()
            entries[key].write_(state[name])
            found.add(key)
    if lost := [entry.name for key, entry in entries.items() if key not in found]:
        raise MismatchError(
            f"The state dict of the {type(base).__name__} does not have {shortened(lost)}: use `apply`."
        )
    return state


class Patch(NamedTuple):
    """What changes in one tensor, in the form that inference engines take: vLLM's ``CheckpointWeightPatch``.

    Source: vLLM, vllm/model_executor/model_loader/checkpoint_weight_patch.py, November 2026. Its sparse_nccl engine
    takes name, indices, values and shape (as full_shape). Both refuse values that are NaN.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    """(n,) at `indices`; without them all elements, row by row."""
    indices: Tensor | None = None
    """(n,) int32 or int64: elements, counted row by row."""


def patches(model: nn.Module | Named, delta: Source) -> list[Patch]:
    """Return a delta as the patches of an inference engine; tensors that do not change are left out.

    Args:
        model: the base, or its state dict: for the shapes, and to check the delta.
        delta: as for `apply`.

    Raises:
        DeltaError: the delta does not fit, see `apply`.
    """
    found = []
    for entry in checked_entries(model, delta):
        target = entry.target
        if entry.unit == "whole":
            found.append(Patch(entry.name, tuple(target.shape), target.dtype, entry.values.reshape(-1)))
        elif entry.unit != "frozen":
            indices = entry.indices
            if entry.unit == "rows":
                width = entry.values[0].numel()
                indices = (indices.long()[:, None] * width + torch.arange(width)).reshape(-1)
                indices = indices.to(torch.int32 if target.numel() < 2**31 else torch.int64)
            found.append(Patch(entry.name, tuple(target.shape), target.dtype, entry.values.reshape(-1), indices))
    return found


def same_bits(first: Tensor, second: Tensor) -> Tensor:
    """Return which elements of two tensors of one shape and dtype are the same to the bit."""
    if first.dtype == torch.complex128:
        return same_bits(torch.view_as_real(first), torch.view_as_real(second)).all(-1)
    return bits(first) == bits(second)


def _saved(model: nn.Module | Named) -> Named:
    """Return parameters, also those that a `state_dict` of one's own leaves out, and persistent buffers."""
    tensors = tensors_of(model)
    if not isinstance(model, nn.Module):
        return tensors
    saved = model.state_dict().keys() | dict(model.named_parameters()).keys()
    return {name: tensor for name, tensor in tensors.items() if name in saved}


def _other_state(base: nn.Module | Named, tuned: nn.Module | Named) -> list[str]:
    """Return the names of what both have, differs and is no tensor."""
    before, after = (
        {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for state in (model.state_dict() if isinstance(model, nn.Module) else model for model in (base, tuned))
    )
    return [name for name in sorted(before.keys() & after.keys()) if not _is_same(before[name], after[name])]


def _is_same(first: object, second: object) -> bool:
    """Return whether two values of a state dict, which may have tensors in them, are equal."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_is_same, first, second))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_is_same(first[key], second[key]) for key in first)
    try:
        return bool(first == second)
    except (RuntimeError, TypeError, ValueError):  # of an array, say
        return False


def _flat(parts: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return the elements that an entry writes, (n,), and their bytes, (n, itemsize)."""
    unit = unit_of(parts)
    if unit == "frozen":
        return np.empty(0, dtype=np.int64), np.empty((0, 1), dtype=np.uint8)
    values = parts["whole" if unit == "whole" else "values"]
    bits = np.frombuffer(content(values), np.uint8).reshape(values.numel(), values.element_size())
    if unit == "whole":
        return np.arange(values.numel()), bits
    if parts[unit].dim() != 1 or values.shape[:1] != parts[unit].shape:
        raise MismatchError(f"A delta has {tuple(values.shape)} values for {tuple(parts[unit].shape)} {unit}.")
    places = parts[unit].long().numpy()
    width = values[0].numel() if len(places) else 1
    return (places[:, None] * width + np.arange(width)).reshape(-1), bits

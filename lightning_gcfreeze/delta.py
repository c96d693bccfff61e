"""What training changed since t0: the live elements' places and values, in a file, and back into a model.

Frozen elements keep their bits from step t0 on, so the weights of that step and the live elements are the trained
model. A delta is a flat dict of CPU tensors, which safetensors saves as they are. Of a parameter or buffer ``name``:

    name:elements, name:values, name:frozen     some elements are live
    name:rows,     name:values, name:frozen     every row, an index along the first axis, is wholly frozen or live
    name:frozen                                 nothing is live
    name:whole                                  everything is, or storing it all takes no more bytes

``elements`` and ``rows`` ascend, int32 or, from 2³¹ on, int64; elements count row by row, whatever the memory format.
``values`` are the values, not differences: putting them in place is exact to the bit. ``frozen`` is a fingerprint of
what a delta leaves alone, by which it knows the weights that it fits. ``format`` is the version of all this.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import local, whole

if TYPE_CHECKING:
    from peft import PeftModel

_FORMAT = 1
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**20  # elements whose bits are looked at


def of(module: nn.Module, frozen: Named) -> dict[str, Tensor]:
    """All of `module` that can have moved since its elements froze, as copies on the CPU.

    Those are the live elements of the parameters in `frozen`, and whole the other parameters that require a gradient
    and the persistent buffers. Parameters that do not require a gradient and are not in `frozen` are left out, even if
    something else than a gradient moves them. A tied parameter goes by its first name.

    Args:
        module: after t0. Not modified.
        frozen: ``{name: bool (*p.shape)}``, True = constant since t0; these need not require a gradient any more.

    Returns:
        The tensors under the names of the module's header, contiguous, in the dtypes of `module`.

    Raises:
        ValueError: a name of `frozen` is no parameter of `module`, or a mask has another shape or dtype.
    """
    parameters = dict(module.named_parameters())
    if unknown := frozen.keys() - parameters.keys():
        raise ValueError(f"`frozen` has {_some(unknown)}, no parameters of the {type(module).__name__}.")
    saved = module.state_dict().keys()
    delta = {"format": torch.tensor(_FORMAT)}
    for name, p in parameters.items():
        if name in frozen:
            if frozen[name].dtype != torch.bool or frozen[name].shape != p.shape:
                raise ValueError(
                    f"A mask of `frozen` is bool and has its parameter's shape: {name!r} has {tuple(p.shape)}, its mask"
                    f" {frozen[name].dtype} and {tuple(frozen[name].shape)}."
                )
            delta |= {
                f"{name}:{part}": tensor
                for part, tensor in _parts(whole(p.detach()), whole(frozen[name]).cpu()).items()
            }
        elif p.requires_grad:
            delta[f"{name}:whole"] = _copy(p)
    return delta | {f"{name}:whole": _copy(buffer) for name, buffer in module.named_buffers() if name in saved}


@torch.no_grad()
def fingerprints(parameters: Mapping[str, Tensor], frozen: Named) -> dict[str, int]:
    """For each parameter a number that changes with any bit of one of its frozen elements.

    Args:
        parameters: by name; of sharded ones the local part counts.
        frozen: ``{name: bool (*local part's shape)}``, True = counts.
    """
    found = {}
    for name, mask in frozen.items():
        p = local(parameters[name]).contiguous()
        bits, marks = p.view(_BITS[p.element_size()]).flatten(), mask.to(p.device).flatten()
        total = torch.zeros((), dtype=torch.int64, device=p.device)  # asked for once: a GPU would wait each time
        for start in range(0, len(bits), _AT_ONCE):
            some = bits[start : start + _AT_ONCE].to(torch.int64, copy=True)
            odd = torch.arange(start, start + len(some), device=p.device).mul_(2).add_(1)
            total += some.mul_(odd).mul_(marks[start : start + len(some)]).sum()
        found[name] = int(total) % 2**64
    return found


def save(delta: Mapping[str, Tensor], file: str | Path) -> None:
    """Write a delta as a safetensors file.

    Raises:
        ImportError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise _missing("safetensors", "export") from error
    save_file(dict(delta), file, metadata={"format": "pt", "lightning_gcfreeze": f"delta {_FORMAT}"})


def apply_delta(model: nn.Module, delta: Mapping[str, Tensor] | str | Path) -> None:
    """Turn the weights of step t0 into those that the delta was taken from, in place and to the bit.

    All is checked before anything is written. Names are exact: a delta of a LightningModule fits that, not its network.
    Part of a delta, ``format`` included, is a delta of fewer tensors.

    Args:
        model: with the weights of t0 wherever the delta leaves them alone, on any device.
        delta: or the path of its file.

    Raises:
        ValueError: the delta does not fit in format, completeness, names, dtypes, shapes or places, or what it leaves
            alone has other bits than at t0.
        TypeError: `delta` is neither a mapping nor a path.
        ImportError: it is a path, and safetensors is not installed.
    """
    with torch.no_grad():
        for entry in _fitting(model, delta):
            entry.write_(entry.target)


def to_shira(delta: Mapping[str, Tensor] | str | Path, base: nn.Module, adapter_name: str = "default") -> "PeftModel":
    """A PEFT model over `base` with a SHiRA adapter that adds what the delta changes; ``save_pretrained`` writes it.

    SHiRA adds r·(in + out) elements to the weight of each of its Linear layers, with one r for all: here the smallest
    that is enough for each, filled up with zeros at places that did not change. The weights are then
    ``base + (new - base)``, the trained ones up to rounding; only `apply_delta` is exact.

    Args:
        delta: or the path of its file.
        base: the model with the weights of t0. Its Linear layers are wrapped in place, as by PEFT's ``get_peft_model``.
        adapter_name: PEFT's name for the adapter.

    Raises:
        ValueError: the delta does not fit (see `apply_delta`), or changes nothing, or what SHiRA cannot express:
            anything but weights of plain Linear layers, or so much of one that r·(in + out) exceeds some weight's size.
        ImportError: PEFT is not installed.
    """
    try:
        from peft import ShiraConfig, get_peft_model, set_peft_model_state_dict
    except ImportError as error:
        raise _missing("peft", "peft") from error
    uses = Counter(id(p) for _, p in base.named_parameters(remove_duplicate=False))
    changes: dict[str, tuple[torch.Size, Tensor, Tensor]] = {}  # layer: its weight's shape, flat places, differences
    refused = []
    for entry in _fitting(base, delta):
        old = entry.target.detach()
        new = old.clone()
        entry.write_(new)
        layer, _, own_name = entry.name.rpartition(".")
        if torch.equal(new, old):
            continue
        # A subclass may use its weight in another way, as MultiheadAttention does that of its out_proj.
        plain = type(base.get_submodule(layer)) is nn.Linear and own_name == "weight" and uses[id(entry.target)] == 1
        if plain and layer:  # the model itself cannot be wrapped
            wide = torch.promote_types(old.dtype, torch.float32)  # as PEFT keeps the adapters of half precision
            difference = (new.to(wide) - old.to(wide)).flatten().cpu()
            places = difference.nonzero().squeeze(1)
            changes[layer] = old.shape, places, difference[places]
        else:
            refused.append(entry.name)
    if refused:
        raise ValueError(
            f"SHiRA adds to weights of nn.Linear layers that are used once; the delta also changes {_some(refused)}."
            " Use `apply_delta`, for all or for these alone on `base` before the conversion; or keep them from training"
            " by `requires_grad_(False)`."
        )
    if not changes:
        raise ValueError("The delta changes nothing in `base`: it has the trained weights. Pass those of step t0.")
    r = max(-(-len(places) // sum(shape)) for shape, places, _ in changes.values())
    if small := [f"{layer} {tuple(shape)}" for layer, (shape, *_) in changes.items() if r * sum(shape) > shape.numel()]:
        raise ValueError(
            f"SHiRA takes r·(in + out) elements of each layer, here with r={r}: more than {_some(small)} has. Use"
            " `apply_delta`, for all or for these alone on `base` before the conversion; or freeze more by `k`."
        )
    state = {}
    for layer, (shape, places, difference) in changes.items():
        count = r * sum(shape)
        unused = torch.ones(count, dtype=torch.bool)  # the first `count` places hold enough of them
        unused[places[places < count]] = False
        padding = unused.nonzero().squeeze(1)[: count - len(places)]
        row_column = torch.stack(torch.unravel_index(torch.cat([places, padding]), shape))
        state[f"base_model.model.{layer}.shira_indices"] = row_column.int()
        state[f"base_model.model.{layer}.shira_weight"] = nn.functional.pad(difference, (0, len(padding)))
    config = ShiraConfig(r=r, target_modules="|".join(map(re.escape, changes)))
    config.mask_fn = None  # the places come with the state
    model = get_peft_model(base, config, adapter_name)
    if unexpected := set_peft_model_state_dict(model, state, adapter_name).unexpected_keys:
        raise RuntimeError(f"PEFT did not take {_some(unexpected)} of the SHiRA state.")
    return model


class _Entry(NamedTuple):
    """What a delta has for one tensor of a model. With nothing live, `places` and `values` are empty."""

    name: str
    target: Tensor
    unit: str  # what `places` count, "elements" or "rows"; or "whole"
    places: Tensor
    values: Tensor
    fingerprint: Tensor | None  # None: whole

    def write_(self, tensor: Tensor) -> None:
        """Put the values in their places, in a tensor of any memory format."""
        if self.unit == "whole":
            tensor.copy_(self.values)
            return
        units = _units(tensor, self.unit)
        units.index_copy_(0, self.places.long().to(tensor.device), self.values.to(tensor.device))
        if not tensor.is_contiguous():  # `reshape` had to copy
            tensor.copy_(units.view_as(tensor))


def _fitting(model: nn.Module, delta: Mapping[str, Tensor] | str | Path) -> list[_Entry]:
    """The entries of a delta beside their targets, all of them checked."""
    if isinstance(delta, str | Path):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise _missing("safetensors", "export") from error
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
            f"The delta has {_some(unknown)}, but the {type(model).__name__} has not. Pass the module that it was taken"
            " from: names are exact, without a prefix more or less."
        )
    entries = [_entry(name, targets[name], parts) for name, parts in by_name.items()]
    strange = [
        name
        for name, target, unit, places, _, fingerprint in entries
        if fingerprint is not None and fingerprint.tolist() != _fingerprint(target, unit, places).tolist()
    ]
    if strange:
        raise ValueError(
            f"These weights are not those of step t0: {_some(strange)} differ in dtype, shape or elements that were"
            " frozen. Load the checkpoint of that step first."
        )
    return entries


def _entry(name: str, target: Tensor, parts: Mapping[str, Tensor]) -> _Entry:
    """Check one entry, as far as that goes without its fingerprint."""
    unit = next((unit for unit in ("whole", "elements", "rows") if unit in parts), "frozen")
    needed = {unit} if unit in ("whole", "frozen") else {unit, "values", "frozen"}
    if parts.keys() != needed:
        raise ValueError(f"The delta has {sorted(parts)} of {name!r}, but {sorted(needed)} go together.")
    nothing = torch.empty(0, dtype=torch.int32)
    places = parts[unit] if unit in ("elements", "rows") else nothing
    values = parts.get("whole", parts.get("values", nothing.to(target.dtype)))
    end = (*target.shape, 0)[0] if unit == "rows" else target.numel()
    integers = places.dtype in (torch.int32, torch.int64) and places.dim() == 1
    if not integers or (torch.cat([torch.tensor([-1]), places, torch.tensor([end])]).diff() <= 0).any():
        raise ValueError(f"The {unit} of {name!r} must ascend within [0, {end}), got {places.tolist()!s:.80}.")
    shape = target.shape if unit == "whole" else (len(places), *(target.shape[1:] if unit == "rows" else ()))
    if values.dtype != target.dtype or values.shape != shape:
        raise ValueError(
            f"{name!r} is {target.dtype} of {tuple(target.shape)} in the model and takes values of {tuple(shape)}, but"
            f" the delta's are {values.dtype} of {tuple(values.shape)}. Bring the model into the form that was trained."
        )
    return _Entry(name, target, unit, places, values, parts.get("frozen"))


def _parts(p: Tensor, frozen: Tensor) -> dict[str, Tensor]:
    """What a delta has for a parameter with a mask, by the part after the colon."""
    if not frozen.any():
        return {"whole": _copy(p)}
    rows = frozen.reshape(len(frozen), -1) if p.dim() > 1 else frozen.reshape(1, -1)
    by_row = p.dim() > 1 and bool((rows == rows[:, :1]).all())
    unit = "rows" if by_row else "elements"
    live = ~(rows[:, 0] if by_row else rows.flatten())
    places = live.nonzero().squeeze(1).to(torch.int32 if live.numel() < 2**31 else torch.int64)
    values = _copy(_units(p, unit).index_select(0, places.to(p.device)))
    if places.nbytes + values.nbytes >= p.nbytes:
        return {"whole": _copy(p)}
    parts = {unit: places, "values": values} if len(places) else {}
    return parts | {"frozen": _fingerprint(p, unit, places)}


def _fingerprint(tensor: Tensor, unit: str, places: Tensor) -> Tensor:
    """SHA-256, (32,) uint8, of dtype, shape, the live places, and the bits at all others."""
    units = _units(_copy(tensor), unit).index_fill_(0, places.long(), 0)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(places.numpy().data)
    digest.update(units.reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _units(tensor: Tensor, unit: str) -> Tensor:
    """What places count along the first axis: rows, or elements row by row; a view if the tensor is contiguous."""
    return tensor if unit == "rows" else tensor.reshape(-1)


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listing = sorted(names)
    return ", ".join(listing[:3]) + (f" and {len(listing) - 3} more" if len(listing) > 3 else "")


def _missing(package: str, extra: str) -> ImportError:
    return ImportError(f"This needs {package}: `pip install lightning-gcfreeze[{extra}]`.")

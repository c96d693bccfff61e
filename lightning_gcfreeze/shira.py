"""Convert a delta into a SHiRA adapter of PEFT, and back."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_gcfreeze._names import shortened
from lightning_gcfreeze.delta.comparing import diff
from lightning_gcfreeze.delta.entries import checked_entries
from lightning_gcfreeze.delta.files import missing_package

if TYPE_CHECKING:
    from peft import PeftModel


def to_shira(delta: Mapping[str, Tensor] | str | Path, base: nn.Module, adapter_name: str = "default") -> "PeftModel":
    """Return a PEFT model over `base` with a SHiRA adapter that adds what the delta changes.

    ``save_pretrained`` of the result writes the adapter. SHiRA adds r·(in + out) elements to the weight of each of its
    Linear layers, with the same r for all layers. Here r is the smallest one that suffices, and unused elements are
    zeros at indices that did not change. The resulting weights are ``base + (new - base)``, equal to the trained ones
    up to rounding; only `apply_delta` is exact.

    Args:
        delta: a delta, or the path of its file.
        base: the model with the weights of t0. Its Linear layers are wrapped in place, as by PEFT's ``get_peft_model``.
        adapter_name: PEFT's name for the adapter.

    Raises:
        ValueError: the delta does not fit (see `apply_delta`) or changes nothing; or SHiRA cannot express it, because
            it changes anything but weights of plain Linear layers, or because r·(in + out) exceeds some weight's size.
        ImportError: PEFT is not installed.
    """
    try:
        from peft import ShiraConfig, get_peft_model, set_peft_model_state_dict
    except ImportError as error:
        raise missing_package("peft", "peft") from error
    uses = Counter(id(p) for _, p in base.named_parameters(remove_duplicate=False))
    changes: dict[str, tuple[torch.Size, Tensor, Tensor]] = {}  # layer: its weight's shape, flat indices, differences
    refused = []
    for entry in checked_entries(base, delta):
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
            indices = difference.nonzero().squeeze(1)
            changes[layer] = old.shape, indices, difference[indices]
        else:
            refused.append(entry.name)
    if refused:
        raise ValueError(
            "SHiRA changes only weights of nn.Linear layers that are used once; the delta also changes"
            f" {shortened(refused)}. Use `apply_delta`, for all or only for these on `base` before the conversion; or"
            " keep them from training by `requires_grad_(False)`."
        )
    if not changes:
        raise ValueError("The delta changes nothing in `base`: it has the trained weights. Pass those of step t0.")
    r = max(-(-len(indices) // sum(shape)) for shape, indices, _ in changes.values())
    if small := [f"{layer} {tuple(shape)}" for layer, (shape, *_) in changes.items() if r * sum(shape) > shape.numel()]:
        raise ValueError(
            f"SHiRA takes r·(in + out) elements of each layer, here with r={r}: more than {shortened(small)} has. Use"
            " `apply_delta`, for all or only for these on `base` before the conversion; or freeze more by `k`."
        )
    state = {}
    for layer, (shape, indices, difference) in changes.items():
        n_elements = r * sum(shape)
        unused = torch.ones(n_elements, dtype=torch.bool)  # the first `n_elements` indices hold enough of them
        unused[indices[indices < n_elements]] = False
        padding = unused.nonzero().squeeze(1)[: n_elements - len(indices)]
        row_column = torch.stack(torch.unravel_index(torch.cat([indices, padding]), shape))
        state[f"base_model.model.{layer}.shira_indices"] = row_column.int()
        state[f"base_model.model.{layer}.shira_weight"] = nn.functional.pad(difference, (0, len(padding)))
    config = ShiraConfig(r=r, target_modules="|".join(map(re.escape, changes)))
    config.mask_fn = None  # the indices come with the state
    model = get_peft_model(base, config, adapter_name)
    if unexpected := set_peft_model_state_dict(model, state, adapter_name).unexpected_keys:
        raise RuntimeError(f"PEFT did not take {shortened(unexpected)} of the SHiRA state.")
    return model


def from_shira(model: "PeftModel", adapter_name: str = "default") -> dict[str, Tensor]:
    """Return the delta of a SHiRA adapter: what its merged weights are, to the bit, where they differ from the base's.

    PEFT adds values to the base; the delta has the sums, so it can be taken back exactly.

    Args:
        model: a PEFT model with such an adapter, not merged. Not modified.
        adapter_name: PEFT's name for it.

    Raises:
        ValueError: it has no such adapter, the adapter is merged, or other modules were trained with it.
        ImportError: PEFT is not installed.
    """
    try:
        from peft.tuners.shira import ShiraLayer
    except ImportError as error:
        raise missing_package("peft", "peft") from error
    network = model.get_base_model()
    wrapped = {name: layer for name, layer in network.named_modules() if isinstance(layer, ShiraLayer)}
    layers = {name: layer for name, layer in wrapped.items() if adapter_name in layer.shira_weight}
    state = network.state_dict()
    if not layers or any(layer.merged for layer in layers.values()):
        raise ValueError(f"The model has no SHiRA adapter {adapter_name!r} that is not merged: load it, or `unmerge`.")
    if others := [name for name in state if "modules_to_save" in name.split(".")]:
        raise ValueError(f"Other modules were trained as well, {shortened(others)}: merge the model, and use `diff`.")
    base = {}
    for name, tensor in state.items():
        layer, _, own_name = name.rpartition(".base_layer.")
        if ".shira_weight." not in name:
            base[f"{layer}.{own_name}" if layer in wrapped else name] = tensor
    tuned = dict(base)
    with torch.no_grad():
        for name, layer in layers.items():
            tuned[f"{name}.weight"] = base[f"{name}.weight"].clone()
            tuned[f"{name}.weight"] += layer.get_delta_weight(adapter_name)  # in place, as PEFT rounds when it merges
    return diff(base, tuned)

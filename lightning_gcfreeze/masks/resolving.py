"""From what a user gave as `masks` to the masks of a module, the same on all processes."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_gcfreeze._names import closest
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import Shards, part, whole
from lightning_gcfreeze.masks.files import load
from lightning_gcfreeze.masks.selections import Names, Selection, constant

Masks: TypeAlias = str | PathLike[str] | Mapping[str, Any] | Selection
"""A file of masks; ``{name: bool (*p.shape), or True or False for all of it}``; or a `Selection`."""


def check(masks: Any) -> None:
    """Check the kind of an argument, before there is a module.

    Raises:
        TypeError: it is none of `Masks`.
    """
    if not isinstance(masks, str | PathLike | Mapping | Selection):
        raise TypeError(
            "`masks` must be a file that `save_masks` wrote, a mapping of parameter names to bool tensors, or a"
            f" selection such as `lightning_gcfreeze.masks.rows(...)`; got {masks!r:.100} ({type(masks).__name__})."
        )


def resolve(masks: Masks, module: nn.Module, parameters: Named, shards: Shards) -> dict[str, Tensor]:
    """Return the masks of all eligible parameters; of sharded ones those of the local elements.

    All processes must call it. What a process finds wrong is raised on all of them.

    Args:
        masks: as the user gave them.
        module: what is trained.
        parameters: the eligible parameters, by name.
        shards: their layout.

    Raises:
        ValueError: the masks do not fit the module, mark nothing, or come from a file that is none or is damaged.
        TypeError: a mask is no bool.
        OSError: a file cannot be read.
    """
    found, failure = dict[str, Tensor](), None
    try:
        found = _resolved(masks, module, parameters, shards)
    except Exception as error:
        failure = error
    if shards.world.any(failure is not None):  # else the other processes would wait for this one
        raise failure or ValueError("`masks` do not fit on another process; see its error.")
    if shards.world.any(not sum(shards.n_marked(found).values())):
        raise ValueError(
            "`masks` mark nothing: no element would be frozen. True means held constant; masks of what is to be trained"
            " are inverted by `~`."
        )
    return found


def _resolved(masks: Masks, module: nn.Module, parameters: Named, shards: Shards) -> dict[str, Tensor]:
    first = {id(p): name for name, p in parameters.items()}
    every = dict(module.named_parameters(remove_duplicate=False))
    aliases = {name: first[id(p)] for name, p in every.items() if id(p) in first and name not in parameters}
    names = Names({name: shards.shape(name, p) for name, p in parameters.items()}, aliases)
    if isinstance(masks, Selection):
        try:
            given: Mapping[str, Any] = masks.of(names)
        except ValueError as error:
            raise ValueError(f"`masks={masks!r}`: {str(error).removesuffix('.')}.") from error
    else:
        given = load(masks) if isinstance(masks, str | PathLike) else masks
    found = dict[str, Tensor]()
    for name, mask in given.items():
        if name not in names.all:
            raise ValueError(_stranger(name, names, every))
        own = names.all[name]
        p, checked = parameters[own], _checked(name, mask, names.shapes[own])
        local_mask = part(p, checked if _lies_alike(checked, p) else whole(checked))
        is_theirs = isinstance(masks, Mapping) and not isinstance(mask, bool | np.bool_)
        local_mask = local_mask.to(p.device, copy=is_theirs)  # whoever gave it may change it later
        if not torch.equal(found.setdefault(own, local_mask), local_mask):
            raise ValueError(f"`masks` have {name!r} and another name of the same parameter, with different masks.")
    return {
        name: found[name] if name in found else part(p, constant(False, names.shapes[name])).to(p.device)
        for name, p in parameters.items()
    }


def _lies_alike(mask: Tensor, parameter: Tensor) -> bool:
    """Return whether the local elements of a mask are those of its parameter."""
    if not isinstance(mask, DTensor):
        return True  # every process has all of it
    return isinstance(parameter, DTensor) and (mask.device_mesh, mask.placements) == (
        parameter.device_mesh,
        parameter.placements,
    )


def _stranger(name: str, names: Names, every: Mapping[str, Tensor]) -> str:
    if name in every:
        return (
            f"`masks` have {name!r}, which is not eligible: it requires no gradient, the optimizer does not have it, or"
            " `include` or `exclude` leaves it out. What does not train needs no mask."
        )
    return (
        f"`masks` have {name!r}, no parameter of the module: {closest(name, names.all)}. Are they of another model?"
        " Names are exact, so a prefix must be neither added nor left out."
    )


def _checked(name: str, mask: Any, shape: torch.Size) -> Tensor:
    if isinstance(mask, bool | np.bool_):
        return constant(bool(mask), shape)
    try:
        tensor = (mask if isinstance(mask, Tensor) else torch.as_tensor(mask)).detach()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"The mask of {name!r} must be a bool tensor, or True or False, got {mask!r:.80} ({type(mask).__name__})."
        ) from error
    if tensor.dtype != torch.bool:
        raise TypeError(f"The mask of {name!r} must be bool, True = held constant, got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(
            f"The mask of {name!r} must have its parameter's shape, {tuple(shape)}, got {tuple(tensor.shape)}. Is it of"
            " another model?"
        )
    return tensor

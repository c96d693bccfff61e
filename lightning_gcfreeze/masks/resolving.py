"""From what a user gave as `masks` to the masks of a module, the same on all processes."""

import hashlib
from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gcfreeze._names import closest, shortened
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import Shards, is_sharded, layout_of, local, part, sharded_parameters, whole
from lightning_gcfreeze.masks.files import load
from lightning_gcfreeze.masks.selections import Names, Selection, constant

Masks: TypeAlias = Mapping[str, Any] | Selection | str | PathLike[str]  # a mapping first: a YAML file may have one
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
        ValueError: the masks do not fit the module, differ between processes or mark nothing, or the file is damaged or
            no file of masks.
        TypeError: a mask is no bool.
        OSError: a file cannot be read.
    """
    whole_masks, failure = dict[str, Tensor](), None
    try:
        whole_masks = _by_name(masks, module, parameters, shards)
    except Exception as error:
        failure = error
    if shards.world.any(failure is not None):  # else the other processes would wait for this one
        raise failure or ValueError("`masks` do not fit on another process; see its error.")
    if differing := _differing(whole_masks, shards):
        raise ValueError(
            f"`masks` differ between processes, of {shortened(differing)}: the processes would freeze different"
            " elements. Give the same masks to all of them."
        )
    found = {}
    for name, p in parameters.items():
        mask = whole_masks.get(name, constant(False, shards.shape(name, p)))
        lies_alike = layout_of(mask) in (None, layout_of(p))  # None: every process has all of it
        found[name] = part(p, mask if lies_alike else whole(mask)).to(p.device)
        if isinstance(masks, Mapping):
            found[name] = found[name].clone()  # whoever gave it may change it later
    if shards.world.any(not sum(shards.n_marked(found).values())):
        raise ValueError(
            "`masks` mark nothing: no element would be frozen. True means held constant; masks of what is to be trained"
            " are inverted by `~`."
        )
    return found


def _by_name(masks: Masks, module: nn.Module, parameters: Named, shards: Shards) -> dict[str, Tensor]:
    """Return the given masks, as whole as they came, by the names of the eligible parameters. Without communication."""
    first = {id(p): name for name, p in parameters.items()}
    every = sharded_parameters(module, remove_duplicate=False)
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
        checked = _checked(name, mask, names.shapes[own])
        if not torch.equal(local(found.setdefault(own, checked)), local(checked)):
            raise ValueError(f"`masks` have {name!r} and another name of the same parameter, with different masks.")
    return found


def _differing(masks: Named, shards: Shards) -> list[str]:
    """Return the names of which not all processes were given the same. Only whole masks can be compared."""
    if shards.world.size == 1:
        return []
    digests = {
        name: None if is_sharded(mask) else hashlib.sha256(mask.contiguous().cpu().numpy().data).hexdigest()
        for name, mask in masks.items()
    }
    first, *others = shards.world.all_gather_object(digests)
    names = dict.fromkeys(name for known in (first, *others) for name in known)
    return [name for name in names if any(name not in known or known[name] != first.get(name) for known in others)]


def _stranger(name: str, names: Names, every: Mapping[str, Tensor]) -> str:
    if name in every:
        return (
            f"`masks` have {name!r}, which is not eligible: it requires no gradient, the optimizer does not have it, or"
            " `include` or `exclude` leaves it out. What does not train needs no mask."
        )
    return (
        f"`masks` have {name!r}, no parameter of the module: {closest(str(name), names.all)}. Are they of another"
        " model? Names are exact, so a prefix must be neither added nor left out."
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

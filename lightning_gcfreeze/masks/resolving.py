"""From what a user gave as `masks` to the masks of a module, the same on all processes."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_gcfreeze._names import closest
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import Shards, part
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
    except (OSError, TypeError, ValueError) as error:
        failure = error
    if shards.world.any(failure is not None):  # else the other processes would wait for this one
        raise failure or ValueError("`masks` do not fit on another process; see its error.")
    if not sum(shards.n_marked(found).values()):
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
            raise ValueError(f"`masks={masks!r}`: {error}.") from error
    else:
        given = load(masks) if isinstance(masks, str | PathLike) else masks
    found = {name: part(p, constant(False, names.shapes[name])) for name, p in parameters.items()}
    for name, mask in given.items():
        if name not in names.all:
            raise ValueError(_stranger(name, names, every))
        own = names.all[name]
        found[own] = part(parameters[own], _checked(name, mask, names.shapes[own]))
    return {name: mask.to(parameters[name].device) for name, mask in found.items()}


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
    if isinstance(mask, bool):
        return constant(mask, shape)
    tensor = mask if isinstance(mask, Tensor) else torch.as_tensor(mask)
    if tensor.dtype != torch.bool:
        raise TypeError(f"The mask of {name!r} must be bool, True = held constant, got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(
            f"The mask of {name!r} must have its parameter's shape, {tuple(shape)}, got {tuple(tensor.shape)}. Is it of"
            " another model?"
        )
    return tensor.detach()

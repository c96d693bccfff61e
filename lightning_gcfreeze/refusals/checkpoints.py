"""States that a run cannot go on from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Named


def other_masks(differing: Sequence[str]) -> str | None:
    """A checkpoint of a run with other masks.

    Args:
        differing: names of the parameters whose masks differ.
    """
    if not differing:
        return None
    return (
        f"`masks` are not those that the checkpoint was saved with: {shortened(differing)} differ. Resume with the"
        " saved ones; to begin with others, load the weights into the module and fit without `ckpt_path`."
    )


def not_resumable(
    saved: Mapping[str, Any], now: Mapping[str, Any], saved_shapes: Mapping[str, torch.Size], parameters: Named
) -> str | None:
    """A checkpoint of a run with other arguments or other eligible parameters.

    Args:
        saved: the arguments in the checkpoint.
        now: the present arguments.
        saved_shapes: the shapes of the eligible parameters in the checkpoint.
        parameters: the present eligible parameters.
    """
    if (saved.get("samples"), now.get("samples")) == ("first", "auto"):  # the default of 0.1; the state says it
        saved = {**saved, "samples": "auto"}
    if different := [name for name in now if (type(saved.get(name)), saved.get(name)) != (type(now[name]), now[name])]:
        listing = ", ".join(f"{name}={saved.get(name)!r} (now {now[name]!r})" for name in different)
        return (
            f"The checkpoint was saved with other arguments of the callback: {listing}. Resume with the saved ones; to"
            " begin a new observation from these weights, load them into the module and fit without `ckpt_path`."
        )
    shapes = {name: p.shape for name, p in parameters.items()}
    if differing := dict(saved_shapes.items() ^ shapes.items()):
        return (
            f"The checkpoint's state is for other eligible parameters: {', '.join(sorted(differing))} differ in name or"
            " shape. Resume with the module and optimizer that it was saved with."
        )
    return None

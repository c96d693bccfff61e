"""Files of masks, a bit for each element, and of orders, a score for each.

`torch.save` writes them; they hold tensors, numbers and strings, and load with ``weights_only=True``:

    kind        "masks" or "order"
    format      1
    shapes      {name: list of int}, of whole parameters
    tensors     {name: uint8 (ceil(n / 8),)}, the n bits of a mask, row by row, the first in the lowest bit of a byte;
                or {name: scores (*p.shape)}
    digest      uint8 (32,), the SHA-256 of all of that
"""

import hashlib
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_gcfreeze._masks import packed, unpacked
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import Shards

_FORMAT = 1
_WRITERS = {"masks": "save_masks", "order": "save_order"}


def save(masks: Named, file: str | PathLike[str]) -> None:
    """Write masks, a bit for each element.

    Args:
        masks: ``{name: bool (*p.shape)}``, True = held constant; whole ones.
        file: where to; an existing file is replaced.
    """
    bits = {name: packed(mask.cpu()) for name, mask in masks.items()}
    _save("masks", {name: mask.shape for name, mask in masks.items()}, bits, file)


def load(file: str | PathLike[str]) -> dict[str, Tensor]:
    """Read masks, ``{name: bool (*p.shape)}``, True = held constant.

    Raises:
        ValueError: it is no file of masks, or it is damaged.
        OSError: it cannot be read.
    """
    shapes, bits = _load("masks", file)
    return {name: unpacked(bits[name], shape) for name, shape in shapes.items()}


def save_order(scores: Named, file: str | PathLike[str]) -> None:
    """Write scores, by which elements are ordered, lowest first: ``{name: (*p.shape)}``, whole ones."""
    kept = {name: score.detach().cpu().contiguous().clone() for name, score in scores.items()}
    _save("order", {name: score.shape for name, score in kept.items()}, kept, file)


def load_order(file: str | PathLike[str]) -> dict[str, Tensor]:
    """Read scores; see `save_order`. Raises as `load` does."""
    return _load("order", file)[1]


def save_gathered(
    write: Callable[[Named, str | PathLike[str]], None], named: Named, shards: Shards, file: str | PathLike[str]
) -> None:
    """Let rank 0 write whole tensors, of which processes have parts. All processes must call it.

    Args:
        write: `save` or `save_order`.
        named: masks or scores of the local parts.
        shards: how they lie on the processes.
        file: where to.
    """
    whole = shards.whole(named)
    if shards.world.rank == 0:
        write(whole, file)


def _save(
    kind: Literal["masks", "order"], shapes: Mapping[str, torch.Size], tensors: Named, file: str | PathLike[str]
) -> None:
    content = {"kind": kind, "format": _FORMAT, "shapes": {n: list(s) for n, s in shapes.items()}, "tensors": tensors}
    torch.save({**content, "digest": _digest(content)}, Path(file))


def _load(kind: str, file: str | PathLike[str]) -> tuple[dict[str, torch.Size], dict[str, Tensor]]:
    path = Path(file)
    with path.open("rb"):  # a missing file, or one that may not be read, says so itself
        pass
    way_out = f"Write one with `{_WRITERS[kind]}`."
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged data can make torch raise anything, OSError included
        raise ValueError(f"{str(path)!r} cannot be read as a file of {kind}. {way_out}") from error
    if not isinstance(content, dict) or content.get("kind") not in [*_WRITERS]:
        raise ValueError(f"{str(path)!r} is no file of {kind}. {way_out}")
    if content["kind"] != kind:
        raise ValueError(
            f"{str(path)!r} holds {'an order' if kind == 'masks' else 'masks'}, not {kind}. An order becomes masks by"
            " `lightning_gcfreeze.masks.lowest(file, k)`."
        )
    if content.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} has the format {content.get('format')}, and this version reads {_FORMAT}.")
    if not _is_intact(content):
        raise ValueError(f"{str(path)!r} is damaged: its content is not what was written. {way_out}")
    return {name: torch.Size(shape) for name, shape in content["shapes"].items()}, content["tensors"]


def _is_intact(content: Mapping[str, Any]) -> bool:
    try:
        shapes, tensors = content["shapes"], content["tensors"]
        if content["kind"] == "masks":
            sizes = {name: -(-torch.Size(shape).numel() // 8) for name, shape in shapes.items()}
            fits = sizes == {name: len(packed) for name, packed in tensors.items()}
        else:
            fits = shapes == {name: list(scores.shape) for name, scores in tensors.items()}
        return fits and torch.equal(content["digest"], _digest(content))
    except Exception:  # a part is missing, or of another type
        return False


def _digest(content: Mapping[str, Any]) -> Tensor:
    found = hashlib.sha256(f"{content['kind']} {content['format']} {content['shapes']}".encode())
    for name, tensor in content["tensors"].items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(found.digest()), dtype=torch.uint8)

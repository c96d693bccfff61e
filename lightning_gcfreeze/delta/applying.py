"""Write a delta to a model, take it back, and put another one in its place; all to the bit."""

import torch
from torch import Tensor, nn

from lightning_gcfreeze.delta.entries import Entry, checked_entries
from lightning_gcfreeze.delta.files import FORMAT, Source, load


def apply(model: nn.Module, delta: Source, *, mask: Source | None = None) -> dict[str, Tensor]:
    """Turn the weights of step t0 into the weights that the delta was taken from, in place and to the bit.

    Everything is checked before anything is written. Names are exact: a delta of a LightningModule fits the
    LightningModule, not its network. Some entries of a delta, with ``format``, are a delta of fewer tensors.

    Args:
        model: a model with the weights of t0 where the delta leaves them unchanged, on any device.
        delta: a delta, or the path or the bytes of its file.
        mask: the delta that has the places, if `delta` is a file of values alone.

    Returns:
        The delta that takes this one back: the same places with the values that they had, for `revert` and `swap`.

    Raises:
        WrongBaseError: an element that the delta leaves unchanged has other bits than at t0.
        MismatchError: the delta does not fit in names, dtypes, shapes or places.
        CorruptFileError: it is no delta, incomplete or damaged.
        TypeError: `delta` is neither a mapping, nor a path, nor bytes.
        ImportError: `delta` is a file, and safetensors is not installed.
    """
    return as_delta(write(checked_entries(model, load(delta, mask=mask))))


def apply_delta(model: nn.Module, delta: Source) -> None:
    """Turn the weights of step t0 into those that the delta was taken from; see `lightning_gcfreeze.delta.apply`.

    Raises:
        DeltaError, TypeError, ImportError: as `apply` does.
    """
    apply(model, delta)


def revert(model: nn.Module, undo: Source) -> None:
    """Take back an `apply`, to the bit.

    Args:
        model: the model that a delta was applied to.
        undo: what `apply` returned.

    Raises:
        DeltaError, TypeError: as `apply` does.
    """
    apply(model, undo)


def swap(model: nn.Module, undo: Source, delta: Source, *, mask: Source | None = None) -> dict[str, Tensor]:
    """Take back one delta and apply another one, of the same or of other places.

    This is for one thread; `Tenants` serves several, and does not check the base at each swap.

    Args:
        model: the model that a delta was applied to.
        undo: what `apply` or `swap` returned for it.
        delta, mask: as for `apply`.

    Returns:
        The delta that takes the new one back.

    Raises:
        DeltaError, TypeError, ImportError: as `apply` does. The model still has the delta that it had.
    """
    delta = load(delta, mask=mask)
    back = write(checked_entries(model, undo))
    try:
        return apply(model, delta)
    except BaseException:
        write(back)
        raise


def write(entries: list[Entry]) -> list[Entry]:
    """Write all entries, or none if one fails, and return them with the values that were there."""
    with torch.no_grad():
        before = [entry.read(entry.target) for entry in entries]
    try:
        overwrite(entries)
    except BaseException:
        overwrite(before)
        raise
    return before


def overwrite(entries: list[Entry]) -> None:
    """Write entries to their targets, whether these are ordinary tensors or made in inference mode."""
    with torch.inference_mode(any(entry.target.is_inference() for entry in entries)), torch.no_grad():
        for entry in entries:
            entry.write_(entry.target)
    torch.clear_autocast_cache()  # or autocast goes on with its copies of what was there before


def as_delta(entries: list[Entry]) -> dict[str, Tensor]:
    """Return entries as a delta."""
    delta = {"format": torch.tensor(FORMAT)}
    for entry in entries:
        delta |= entry.parts()
    return delta

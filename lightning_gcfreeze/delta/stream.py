"""A training that publishes its live elements' values every few steps, and the folder that it publishes them in.

The folder has a file for each update, ``000000000017-values.safetensors``: its number, from 0 without gaps, and whether
it has the places ("whole") or values alone. The first one is whole, and so is each one whose places are new. All live
values are in each, so the newest one and the last whole one give the model. Each names the digest of the one before.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from lightning_gcfreeze import _checks
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.delta.entries import Entry, checked_entries, fingerprint, fitting_entries, of, tensors_of
from lightning_gcfreeze.delta.errors import ChainError, CorruptFileError
from lightning_gcfreeze.delta.files import (
    FORMAT,
    MASK_PARTS,
    as_tensor,
    coded,
    content,
    read,
    to_file,
    values_of,
    with_digest,
    write_atomically,
)
from lightning_gcfreeze.distributed import World, whole

_NAME = re.compile(r"(\d{12})-(whole|values)\.safetensors")


@dataclass(frozen=True)
class Stream:
    """Publish the live elements' values while training, for `lightning_gcfreeze.delta.Follower`.

    Each update is there as a whole or not at all, whenever either side is killed. A run that goes on from a checkpoint,
    or a new run from the same base, goes on with the updates that it finds in the folder; two at once are refused. The
    first update is written when elements freeze, with the places and the fingerprint of the model; it fits a model with
    the weights of that step, which are those of the pre-trained model with ``masks=``. Where stages change the masks,
    the places of an update are those that were live at any time.

    If an update cannot be written, training goes on with a warning, and the next one has all that the lost one had; at
    the end of training it is an error.

    Args:
        folder: where: a path, or an address that fsspec knows, such as ``s3://bucket/run``.
        every: optimizer steps from one update to the next; one more is written at the end of training.
        keep: how many of the newest updates to keep, besides whole ones; None: all.
    """

    folder: str | Path
    every: int = 50
    keep: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | Path) or not str(self.folder):
            raise ValueError(f"`folder` must be a path or an address, got {self.folder!r}.")
        _checks.integer("every", self.every, at_least=1)
        if self.keep is not None:
            _checks.integer("keep", self.keep, at_least=1)


class Folder:
    """The updates of a stream, by number."""

    def __init__(self, folder: str | Path) -> None:
        self._files, self._root = fsspec.core.url_to_fs(str(folder))
        self._is_local = isinstance(self._files, LocalFileSystem)

    def updates(self) -> dict[int, str]:
        """Return the kinds of the updates that are there, "whole" or "values", by their numbers in ascending order."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self._root, detail=False)
        except FileNotFoundError:
            return {}
        found = (_NAME.fullmatch(path.rpartition("/")[2]) for path in paths)
        return dict(sorted((int(match[1]), match[2]) for match in found if match))

    def read(self, number: int, kind: str) -> bytes:
        """Return the file of an update."""
        data: bytes = self._files.cat_file(self._path(number, kind))
        return data

    def write(self, number: int, kind: str, data: bytes) -> None:
        """Write the file of an update, which is there at once or not at all."""
        path = self._path(number, kind)
        self._files.makedirs(self._root, exist_ok=True)
        if self._is_local:
            write_atomically(Path(path), data)
        else:  # an object store shows whole objects only
            self._files.pipe_file(path, data)

    def clean(self) -> None:
        """Remove what a kill left behind."""
        if self._is_local:
            for path in Path(self._root).glob(".*-*.safetensors.*.tmp"):
                path.unlink(missing_ok=True)

    def remove(self, number: int, kind: str) -> None:
        """Remove the file of an update."""
        self._files.rm_file(self._path(number, kind))

    def _path(self, number: int, kind: str) -> str:
        return f"{self._root}/{number:012d}-{kind}.safetensors"


class Writer:
    """What writes the updates of a run. All processes call it at the same steps; rank 0 writes.

    Args:
        stream: where, and how often.
        module: what is trained.
        world: all processes.
        warn: what is called with a sentence if an update cannot be written.
    """

    def __init__(self, stream: Stream, module: nn.Module, world: World, warn: Callable[[str], None]) -> None:
        self._stream, self._module, self._world, self._warn = stream, module, world, warn
        self._folder = Folder(stream.folder)
        self._seen: object = None  # the masks at the last call
        self._frozen: dict[str, Tensor] = {}  # what was frozen at every time
        self._entries: list[Entry] = []
        self._whole: dict[str, Tensor] | None = None  # what the next update has besides values, if it is whole
        self._mask = self._previous = self._base = b""
        self._number = -1  # of the last update that was written
        self._step = -1  # of the last update that was tried
        self._error: OSError | None = None

    def record(self, decision: object, frozen: Callable[[], Named], step: int, is_last: bool = False) -> None:
        """Write an update, if it is time.

        Args:
            decision: the same object as long as the masks are the same.
            frozen: returns the masks, whole or sharded as the parameters are.
            step: optimizer steps taken.
            is_last: whether training ends.

        Raises:
            WrongBaseError: the updates in the folder are of another base.
            ChainError: another run writes to the folder.
            OSError: the last update could not be written.
        """
        has_changed, every = self._seen is not decision, self._stream.every
        if has_changed or is_last or step // every > self._step // every:
            if has_changed or any(name not in self._frozen for name in self._trained()):
                self._take_masks({name: whole(mask).cpu() for name, mask in frozen().items()})
                self._seen = decision
            self._write(step, only_news=is_last and not has_changed and self._error is None)
        if is_last and self._error:
            raise self._error

    def _take_masks(self, frozen: dict[str, Tensor]) -> None:
        """Prepare updates of the places that are, or were, live."""
        parameters = dict(self._module.named_parameters())
        for name in self._trained():
            frozen.setdefault(name, torch.zeros(parameters[name].shape, dtype=torch.bool))
        if self._seen is None:
            last = self._world.broadcast_object(self._last_updates() if self._world.rank == 0 else None)
            if last is None:
                self._base = bytes.fromhex(fingerprint(self._module))
            else:
                whole_file, self._number, self._previous = last
                tensors = read(whole_file)
                self._mask, self._base = content(tensors["mask"]), content(tensors["base"])
                for entry in checked_entries(self._module, whole_file):
                    if entry.name in parameters:  # what was trained before and is not now goes on with its values
                        still = ~entry.written()
                        frozen[entry.name] = frozen.get(entry.name, still) & still
        else:
            for name, mask in self._frozen.items():
                frozen[name] = frozen.get(name, mask) & mask
        self._frozen = frozen
        delta = of(self._module, frozen)
        self._entries = fitting_entries(self._module, delta)
        tensors = coded(delta)
        if content(tensors["mask"]) != self._mask:
            self._mask = content(tensors["mask"])
            self._whole = {key: tensors[key] for key in MASK_PARTS}

    def _last_updates(self) -> tuple[bytes, int, bytes] | None:
        """Return the last whole file, and number and digest of the last update; None if there is no update."""
        self._folder.clean()
        updates = self._folder.updates()
        if not updates:
            return None
        number = max(updates)
        if "whole" not in updates.values():
            raise CorruptFileError(f"{self._stream.folder} has updates, but none with places: use an empty folder.")
        newest = max(n for n, kind in updates.items() if kind == "whole")
        of_last = read(self._folder.read(number, updates[number]))["digest"]
        return self._folder.read(newest, "whole"), number, content(of_last)

    def _trained(self) -> list[str]:
        """Return the parameters that require a gradient now; a callback may unfreeze some on the way."""
        return [name for name, p in self._module.named_parameters() if p.requires_grad]

    def _write(self, step: int, only_news: bool = False) -> None:
        targets = tensors_of(self._module)  # as they are now: code may assign a buffer anew
        now = [entry.read(whole(targets[entry.name].detach())) for entry in self._entries]  # sharded: on all processes
        before, self._step = self._step, step
        if self._world.rank:
            return
        values = values_of([entry.values for entry in now])
        updates = self._folder.updates()
        if only_news and step == before and self._number in updates:
            last = read(self._folder.read(self._number, updates[self._number]))
            if torch.equal(values, last["values"]):  # else buffers moved in a step that a loss scaler left out
                return
        newest = max(updates, default=-1)
        if newest != self._number:
            raise ChainError(
                f"{self._stream.folder} has update {newest}, and this run wrote {self._number} last: another run writes"
                " to it. Give each run a folder of its own."
            )
        number = self._number + 1
        contents = {
            "format": torch.tensor(FORMAT),
            "values": values,
            "mask": as_tensor(self._mask),
            "base": as_tensor(self._base),
            "number": torch.tensor(number),
            "step": torch.tensor(step),
            **(self._whole or {}),
            **({"previous": as_tensor(self._previous)} if self._previous else {}),
        }
        tensors = with_digest(contents)
        try:
            self._folder.write(number, "whole" if self._whole else "values", to_file(tensors))
        except OSError as error:
            self._error = error
            self._warn(f"update {number} of the stream could not be written ({error}): the next one makes up for it.")
            return
        self._error, self._number, self._whole = None, number, None
        self._previous = content(tensors["digest"])
        self._prune()

    def _prune(self) -> None:
        if self._stream.keep is None:
            return
        for number, kind in self._folder.updates().items():
            if kind == "values" and number <= self._number - self._stream.keep:
                self._folder.remove(number, kind)

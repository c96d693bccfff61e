"""Tenants' deltas in a folder and over one model: what was acknowledged is on the disk.

A tenant is ``NAME.safetensors``, the file of its delta, and optionally ``NAME.json``, ``{"classes": ["ham", "spam"]}``.
A file is replaced in one step and reaches the disk before the call returns. A process killed at any moment leaves the
last acknowledged delta or, if it was killed while it wrote, the next one. A store is the only writer of its folder.
"""

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_gcfreeze import delta
from lightning_gcfreeze.delta.files import sync_folder, write_atomically

Encode = Callable[[list[str]], Tensor]
SUFFIX = ".safetensors"
_NAME = re.compile(r"[a-z0-9_-]{1,64}")


class UnknownTenantError(LookupError):
    """No tenant has this name."""


class RefusedError(ValueError):
    """A name or classes that no tenant may have."""


class TakenError(RefusedError):
    """The name is taken, or the store is full."""


@dataclass
class Record:
    """What a store tells of a tenant. Counts are since the store was opened."""

    classes: list[str]
    """By index of the logit; empty if unknown."""
    file_bytes: int = 0
    memory_bytes: int = 0
    """Of the values; tenants with the same places share these."""
    live_elements: int = 0
    updates: int = 0
    requests: int = 0
    swap_ms: float | None = None
    """Of the last answer that had to swap."""


@dataclass(frozen=True)
class Answer:
    """The class of a text by one tenant's model."""

    label: str
    scores: list[float]
    """Softmax of the logits, by class."""
    swap_ms: float
    """What writing the tenant's values took, without waiting for other answers; 0 if they were there."""


class Store:
    """Answer texts by tenants' models, and keep their deltas in a folder. Safe to call from several threads.

    Args:
        model: maps what `encode` returns to logits, (texts, classes). Has the base's weights; written to from now on.
        encode: turns texts into the model's input. Called by one thread at a time.
        folder: is made if it is missing. Temporary files of a killed process are removed.
        classes: of a tenant that has no others, by index of the logit.
        max_tenants: the most tenants that `add` allows.

    Raises:
        DeltaError: a delta in the folder does not fit the model, or is damaged.
        RefusedError: a file in the folder has a name that is no tenant's, or classes that are none.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: Encode,
        folder: str | Path,
        *,
        classes: Sequence[str] = (),
        max_tenants: int = 64,
    ) -> None:
        self._encode, self._folder, self._max_tenants = encode, Path(folder), max_tenants
        self._classes = list(classes)
        self._tenants = delta.Tenants(model.eval())
        self._records: dict[str, Record] = {}
        self._writing, self._encoding, self._counting = threading.Lock(), threading.Lock(), threading.Lock()
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob(".*.tmp"):
            leftover.unlink()
        for file in sorted(self._folder.glob(f"*{SUFFIX}")):
            name = _checked_name(file.stem)
            try:
                self._tenants.add(name, file)
            except delta.DeltaError as error:
                raise type(error)(f"{file.name}: {error}") from error
            self._records[name] = record = Record(self._read_classes(name))
            self._measure(name, record)

    @property
    def base(self) -> str:
        """Fingerprint of the weights that all tenants share."""
        return self._tenants.base

    def records(self) -> dict[str, Record]:
        """Return what is known of every tenant, by name."""
        return dict(sorted(self._records.copy().items()))

    def answer(self, name: str, text: str) -> Answer:
        """Classify a text by one tenant's model.

        Raises:
            UnknownTenantError: no tenant has this name.
            ArithmeticError: the tenant's weights give scores that are no numbers.
        """
        record = self._record(name)
        with self._encoding:
            tokens = self._encode([text])
        try:
            swaps = self._tenants.info(name).swaps
            with self._tenants.use(name) as model, torch.inference_mode():
                info = self._tenants.info(name)
                scores = model(tokens)[0].softmax(-1).tolist()
        except KeyError:
            self._record(name)  # removed in the meantime?
            raise
        swap_ms = 1e3 * info.swap_seconds if info.swaps != swaps else 0.0
        best = max(range(len(scores)), key=scores.__getitem__)
        if not all(0.0 <= score <= 1.0 for score in scores):
            raise ArithmeticError(f"The weights of {name!r} give scores that are no numbers.")
        with self._counting:
            record.requests += 1
            record.swap_ms = swap_ms or record.swap_ms
        label = record.classes[best] if best < len(record.classes) else str(best)
        return Answer(label, scores, swap_ms)

    def add(self, name: str, body: bytes, classes: Sequence[str] = ()) -> None:
        """Take in a new tenant with the whole file of its delta.

        Raises:
            DeltaError: the delta is damaged or does not fit.
            RefusedError: the name or the classes are not allowed; as TakenError, the name is taken or the store full.
            OSError: the folder could not be written, and the tenant is not there.
        """
        record = Record(_checked_classes(list(classes) or self._classes))
        _checked_name(name)
        with self._writing:
            if name in self._records:
                raise TakenError(f"There is a tenant {name!r}: update or delete it.")
            if len(self._records) >= self._max_tenants:
                raise TakenError(f"There are {self._max_tenants} tenants, the most allowed: delete one first.")
            new = delta.load(body)
            content = delta.pack(new)

            def save() -> None:
                # First the classes: the delta's file is what makes a tenant.
                write_atomically(self._file(name, ".json"), json.dumps({"classes": record.classes}).encode())
                write_atomically(self._file(name), content)

            self._tenants.add(name, new, save=save)
            self._measure(name, record)
            self._records[name] = record

    def update(self, name: str, body: bytes) -> None:
        """Replace a tenant's delta by another, whole or values-only.

        Raises:
            UnknownTenantError: no tenant has this name.
            DeltaError: the delta is damaged or does not fit, and the tenant is as it was.
            OSError: the folder could not be written, and the tenant is as it was. If what failed is the last step, to
                sync the folder, a restart may find either delta.
        """
        with self._writing:
            record = self._record(name)
            current = delta.load(self._file(name))
            new = delta.load(body, mask=current)
            content = delta.pack(new)
            self._tenants.update(name, new, save=lambda: write_atomically(self._file(name), content))
            self._measure(name, record)
            record.updates += 1

    def remove(self, name: str) -> None:
        """Forget a tenant and delete its files.

        Raises:
            UnknownTenantError: no tenant has this name.
            OSError: its file could not be deleted, and the tenant is as it was.
        """
        with self._writing:
            self._record(name)
            self._file(name).unlink(missing_ok=True)
            sync_folder(self._folder)
            del self._records[name]
            self._tenants.remove(name)
            self._file(name, ".json").unlink(missing_ok=True)

    def _record(self, name: str) -> Record:
        if (record := self._records.get(name)) is None:
            raise UnknownTenantError(f"There is no tenant {name!r:.80}.")
        return record

    def _file(self, name: str, suffix: str = SUFFIX) -> Path:
        return self._folder / f"{name}{suffix}"

    def _read_classes(self, name: str) -> list[str]:
        file = self._file(name, ".json")
        try:
            return _checked_classes(json.loads(file.read_bytes())["classes"])
        except FileNotFoundError:
            return self._classes
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedError(f'{file} must be {{"classes": [names]}}.') from error

    def _measure(self, name: str, record: Record) -> None:
        info = self._tenants.info(name)
        record.file_bytes, record.memory_bytes = self._file(name).stat().st_size, info.nbytes
        record.live_elements = info.live


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise RefusedError(f"A tenant's name has 1 to 64 of a-z, 0-9, - and _, got {name!r:.80}.")
    return name


def _checked_classes(classes: object) -> list[str]:
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise RefusedError(f"Classes must be a list of names, got {classes!r:.80}.")
    return classes

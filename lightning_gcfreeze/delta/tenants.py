"""One module, many deltas: only the live places are kept for each, and any number of threads may ask."""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from lightning_gcfreeze._names import shortened
from lightning_gcfreeze.delta.applying import as_delta, overwrite
from lightning_gcfreeze.delta.entries import Entry, check_unchanged, fingerprint, fitting_entries
from lightning_gcfreeze.delta.errors import ChainError
from lightning_gcfreeze.delta.files import Source, about, content, load, scalar


class TenantInfo(NamedTuple):
    """What is known of a tenant."""

    live: int
    """Elements that it writes."""
    nbytes: int
    """Of its values in memory. Its places are shared with all tenants that have the same ones."""
    number: int | None
    """Of the last update, if its delta came out of a stream."""
    swaps: int
    """How often its values were written to the module."""
    swap_seconds: float
    """How long that took the last time, what was there before taken back."""


class _Mask(NamedTuple):
    """Places that tenants share."""

    base: list[Entry]
    """With the values of the base."""
    fingerprints: list[bytes | None]


@dataclass
class _Tenant:
    mask: _Mask
    entries: list[Entry]
    about: dict[str, Tensor]
    swaps: int = 0
    swap_seconds: float = 0.0


_ALONE = object()
"""Whom nobody shares the module with."""


class Tenants:
    """Serve many fine-tuned versions from one copy of their base.

        tenants = delta.Tenants(model)
        tenants.add("alice", "alice.safetensors")
        with tenants.use("alice"):
            answer = model(x)

    Values are written to the module in place, at the live places alone, and the base's are kept for these places. So a
    forward pass and a swap must not meet: `use` is a lock. Passes of one tenant run side by side; another tenant waits
    until they are over, in the order of asking, and all who wait for it by then go in together. The other way, a copy
    of what a tenant touches for the time of a pass, would copy every matrix that has a live element: most of the model.

    While tenants are served, nothing else may write to the module, and it stays on its device. In training mode a
    forward pass writes to buffers: call ``model.eval()`` before.

    Args:
        model: the base, as it is now. Sharded modules are not supported.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base = fingerprint(model)
        """Of the base, hex."""
        self._tenants: dict[str, _Tenant] = {}
        self._masks: dict[bytes, _Mask] = {}
        self._current: str | None = None
        self._readers = 0
        self._changed = threading.Condition()
        self._queue: deque[tuple[object, object]] = deque()  # who waits, and for whom
        self._invited: set[object] = set()  # of these
        self._held = threading.local()

    def __len__(self) -> int:
        return len(self._tenants)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._tenants))

    def __contains__(self, name: object) -> bool:
        return name in self._tenants

    @property
    def current(self) -> str | None:
        """Whose values are in the module; None: the base's."""
        return self._current

    def info(self, name: str) -> TenantInfo:
        """Return what is known of a tenant."""
        tenant = self._of(name)
        values = [entry.values for entry in tenant.entries]
        number = scalar(tenant.about, "number")
        live, nbytes = sum(v.numel() for v in values), sum(v.nbytes for v in values)
        return TenantInfo(live, nbytes, number, tenant.swaps, tenant.swap_seconds)

    def delta(self, name: str) -> dict[str, Tensor]:
        """Return a tenant's delta, to save it."""
        tenant = self._of(name)
        return as_delta(tenant.entries) | tenant.about

    def add(
        self, name: str, delta: Source, *, mask: Source | None = None, save: Callable[[], object] = lambda: None
    ) -> None:
        """Take in a tenant, checked against the base.

        The first tenant of some places waits until no pass runs, and hashes what it leaves unchanged; tenants of the
        same places do neither.

        Args:
            name: what to call it.
            delta: see `apply`.
            mask: see `apply`.
            save: called when the delta has been checked, and before it is served: to keep it on disk. If it raises, all
                is as it was.

        Raises:
            TypeError: the name is no string.
            ValueError: the name is taken.
            DeltaError, TypeError, OSError, ImportError: as `apply` does. All is as it was.
        """
        if not isinstance(name, str):
            raise TypeError(f"A tenant's name must be a string, got {name!r}.")
        self._put(name, load(delta, mask=mask), True, save)

    def update(self, name: str, delta: Source, *, save: Callable[[], object] = lambda: None) -> None:
        """Replace a tenant's delta, after the passes that run with it.

        Args:
            name: whose.
            delta: a delta of any places, or values alone for the places that the tenant has. One that says its number
                in a stream must have a higher one than the last.
            save: see `add`.

        Raises:
            ChainError: its number is not higher.
            DeltaError, TypeError, OSError, ImportError: as `apply` does. All is as it was.
            KeyError: there is no such tenant.
        """
        self._put(name, load(delta, mask=self.delta(name)), False, save)

    def remove(self, name: str) -> None:
        """Forget a tenant, after the passes that run with it.

        Raises:
            KeyError: there is no such tenant.
        """
        self._of(name)
        with self._alone():
            self._write(None)
            self._of(name)
            del self._tenants[name]
            self._forget_masks()

    @contextmanager
    def use(self, name: str | None) -> Iterator[nn.Module]:
        """Hold the module with a tenant's values, or with the base's, for the time of a ``with`` block.

        Args:
            name: whose; None: the base's.

        Raises:
            KeyError: there is no such tenant.
            RuntimeError: this thread holds the module for another tenant. A coroutine must not wait within the block:
                run the pass in a worker thread.
        """
        held = self._names()  # of the thread that enters: a generator may be closed by another one
        if held and held[-1] != name:
            raise RuntimeError(f"This thread uses {held[-1]!r} and asked for {name!r}: leave the first `with` block.")
        if name is not None:
            self._of(name)
        with self._changed:
            if not held:
                self._wait(name)
            if self._current != name:
                self._write(name)
                self._invited = {ticket for ticket, wanted in self._queue if wanted == name}
            self._readers += 1
            held.append(name)
        try:
            yield self.model
        finally:
            with self._changed:
                held.pop()
                self._readers -= 1
                self._changed.notify_all()

    def verify(self) -> str:
        """Take back what is applied, and return the fingerprint of the module: that of the base, to the bit."""
        with self._alone():
            self._write(None)
            return fingerprint(self.model)

    # Internals -----------------------------------------------------------------------------------------------------

    def _names(self) -> list[str | None]:
        """Return whose values this thread holds, once for each block that it entered and that is open."""
        if not hasattr(self._held, "names"):
            self._held.names = []
        names: list[str | None] = self._held.names
        return names

    def _of(self, name: str) -> _Tenant:
        if name not in self._tenants:
            raise KeyError(f"There is no tenant {name!r}; there are: {shortened(sorted(self._tenants))}.")
        return self._tenants[name]

    def _put(self, name: str, delta: dict[str, Tensor], is_new: bool, save: Callable[[], object]) -> None:
        entries = fitting_entries(self.model, delta)
        key = _key_of(entries)
        fingerprints = [None if e.fingerprint is None else content(e.fingerprint) for e in entries]
        with self._alone():
            self._check_turn(name, delta, is_new)
            mask = self._masks.get(key)
            if mask is None or mask.fingerprints != fingerprints:
                self._write(None)
                check_unchanged(entries)
                places = [e._replace(indices=e.indices.long().to(e.target.device)) for e in entries]
                mask = _Mask([e.read(e.target) for e in places], fingerprints)
        entries = [
            e._replace(indices=of_base.indices, values=e.values.to(e.target.device))
            for e, of_base in zip(entries, mask.base, strict=True)
        ]
        save()
        with self._alone():
            self._check_turn(name, delta, is_new)
            if self._current == name:
                self._write(None)
            mask = self._masks.setdefault(key, mask)
            old = None if is_new else self._of(name)
            swaps, seconds = (old.swaps, old.swap_seconds) if old else (0, 0.0)
            self._tenants[name] = _Tenant(mask, entries, about(delta), swaps, seconds)
            self._forget_masks()

    def _check_turn(self, name: str, delta: dict[str, Tensor], is_new: bool) -> None:
        """Refuse a name that is taken, and an update that is older than the last one."""
        if is_new and name in self._tenants:
            raise ValueError(f"There is a tenant {name!r} already: `update` replaces its delta, `remove` takes it out.")
        number, last = scalar(delta, "number"), None if is_new else scalar(self._of(name).about, "number")
        if number is not None and last is not None and number <= last:
            raise ChainError(f"Update {number} of {name!r} comes after update {last}: it is an old one.")

    def _forget_masks(self) -> None:
        """Let go of the places that no tenant has any more."""
        in_use = {id(tenant.mask) for tenant in self._tenants.values()}
        self._masks = {key: mask for key, mask in self._masks.items() if id(mask) in in_use}

    def _write(self, name: str | None) -> None:
        """Write a tenant's values to the module, or the base's; nobody else is in it."""
        if name == self._current:
            return
        begin = time.perf_counter()
        tenant = None if name is None else self._of(name)
        before = None if self._current is None else self._tenants[self._current].mask
        try:
            if before is not None and (tenant is None or tenant.mask is not before):
                overwrite(before.base)
            if tenant is not None:
                overwrite(tenant.entries)
        except BaseException:  # a KeyboardInterrupt among them
            for mask in (before, None if tenant is None else tenant.mask):
                overwrite([] if mask is None else mask.base)
            self._current = None
            raise
        if tenant is not None:
            tenant.swaps, tenant.swap_seconds = tenant.swaps + 1, time.perf_counter() - begin
        self._current = name

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the module against all other threads."""
        if held := self._names():
            raise RuntimeError(f"This thread uses {held[-1]!r}: leave the `with` block first.")
        with self._changed:
            self._wait(_ALONE)
            yield

    def _wait(self, name: object) -> None:
        """Wait until the module is free, in the order of asking, or has the tenant's values.

        Who waits for a tenant when its values are written goes in with the first; who comes later queues behind all.
        """
        ticket = object()
        self._queue.append((ticket, name))

        def may_enter() -> bool:
            if self._current == name and ticket in self._invited:
                return True
            return self._queue[0][0] is ticket and (not self._readers or self._current == name)

        try:
            self._changed.wait_for(may_enter)
        finally:
            self._queue.remove((ticket, name))
            self._invited.discard(ticket)
            self._changed.notify_all()


def _key_of(entries: list[Entry]) -> bytes:
    """Return a hash of the places that a delta writes."""
    found = hashlib.sha256()
    for name, _, unit, indices, _, _ in entries:
        found.update(f"{name} {unit} {len(indices)}\n".encode())
        found.update(content(indices.long()))
    return found.digest()

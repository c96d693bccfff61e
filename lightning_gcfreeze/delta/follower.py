"""What applies the updates of a stream to a serving module."""

from pathlib import Path

from torch import nn

from lightning_gcfreeze.delta.errors import ChainError
from lightning_gcfreeze.delta.files import Plain, content, read, scalar
from lightning_gcfreeze.delta.stream import Folder
from lightning_gcfreeze.delta.tenants import Tenants


class Follower:
    """Apply the updates of a stream in their order, to a tenant of a module that serves meanwhile.

        follower = delta.Follower(model, "runs/live")
        while serving:
            follower.poll()
            with follower.tenants.use("stream"):
                answer = model(x)

    It keeps nothing on disk: killed and started again from the base, it is where the folder is. Of a tenant that is
    there it goes on from the update that the tenant has.

    Args:
        model: the base, in memory, or `Tenants` of it.
        folder: that of the `Stream`.
        name: of the tenant that the updates are for. It is there after the first one.
    """

    def __init__(self, model: nn.Module | Tenants, folder: str | Path, name: str = "stream") -> None:
        self.tenants = model if isinstance(model, Tenants) else Tenants(model)
        self.name = name
        self.number: int | None = None
        """Of the last update that was applied."""
        self.step: int | None = None
        """The optimizer step that it was taken at."""
        self.digest: str | None = None
        """Of its file, hex. Writer and follower are at the same point if they have the same."""
        self._folder = Folder(folder)
        if name in self.tenants:
            self._stand_at(self.tenants.delta(name))

    def poll(self) -> int:
        """Apply the updates that have come, and return how many.

        At first these are the last whole one and the newest one; afterwards all, one by one.

        Raises:
            ChainError: an update does not follow the last one that was applied.
            DeltaError: an update is damaged, or not for this base. Those before it have been applied.
            OSError: the folder cannot be read.
        """
        updates = self._folder.updates()
        if self.name not in self.tenants:
            self.number = None
        if self.number is None:
            wholes = [number for number, kind in updates.items() if kind == "whole"]
            due = sorted({wholes[-1], max(updates)}) if wholes else []
        else:
            due = [number for number in updates if number > self.number]
        applied = 0
        for number in due:
            try:
                data = self._folder.read(number, updates[number])
            except FileNotFoundError:  # pruned since the folder was listed
                continue
            self._apply(number, data)
            applied += 1
        return applied

    def _apply(self, number: int, data: bytes) -> None:
        tensors = read(data)
        previous = content(tensors["previous"]).hex() if "previous" in tensors else None
        if scalar(tensors, "number") != number:
            raise ChainError(f"The file of update {number} has update {scalar(tensors, 'number')}.")
        if self.number is not None and number == self.number + 1 and previous != self.digest:
            raise ChainError(f"Update {number} does not follow the update {self.number} that was applied.")
        if self.name in self.tenants:
            self.tenants.update(self.name, data)
        else:
            self.tenants.add(self.name, data)
        self._stand_at(tensors)

    def _stand_at(self, update: Plain) -> None:
        self.number, self.step = scalar(update, "number"), scalar(update, "step")
        self.digest = content(update["digest"]).hex() if "digest" in update else None

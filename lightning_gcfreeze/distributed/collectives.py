"""Collectives: sum, maximum, minimum, mean, gather, broadcast. With one process they do nothing."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class World:
    """All processes of a run.

    Every method that communicates must be called by all processes, in the same order. Inputs are not modified, except
    by `all_reduce_mean_`; results are on the device of the input, except those of `all_gather`.

    Args:
        size: number of processes.
        device: where the backend of the process group expects tensors: the CPU for gloo, this process's GPU for NCCL.
    """

    def __init__(self, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.size, self._device = size, device

    @classmethod
    def current(cls, device: torch.device) -> "World":
        """Return the processes of the default group, whose parameters are on `device`; one if there is no group."""
        if not (dist.is_available() and dist.is_initialized()):
            return SINGLE_PROCESS
        return cls(dist.get_world_size(), device if dist.get_backend() != "gloo" else "cpu")

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return dist.get_rank() if self.size > 1 else 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, element by element."""
        return self._all_reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Return the maximum over all processes, element by element."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def all_reduce_min(self, tensor: Tensor) -> Tensor:
        """Return the minimum over all processes, element by element."""
        return self._all_reduce(tensor, dist.ReduceOp.MIN)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is True on at least one process."""
        return bool(self.all_reduce_max(torch.tensor(int(flag))))

    def all_reduce_mean_(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Replace a tensor by its mean over all processes, or over the processes of `group`."""
        if self.size > 1:
            sent = tensor.to(self._device)
            dist.all_reduce(sent, group=group)
            tensor.copy_(sent.div_(dist.get_world_size(group)))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes in the order of their ranks, ``(size, *tensor.shape)``, on the CPU."""
        if self.size == 1:
            return tensor.cpu()[None]
        sent = tensor.to(self._device)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        return torch.stack(received).cpu()

    def broadcast_object(self, value: T) -> T:
        """Return the value of rank 0: a number, a string, or a container of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device(self._device))
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all processes in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def _all_reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        sent = tensor.to(self._device, copy=True)
        dist.all_reduce(sent, operation)
        return sent.to(tensor.device)


SINGLE_PROCESS = World()
"""The world of a run with one process."""

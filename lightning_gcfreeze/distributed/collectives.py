"""What the processes of a run tell each other: sums, means, rank 0's word. With one process nothing is sent."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class World:
    """All processes of a run. Every method with traffic must be called by all of them, in the same order.

    Args:
        size: how many there are.
        device: where the backend wants tensors.
    """

    def __init__(self, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.size, self._device = size, device

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return dist.get_rank() if self.size > 1 else 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """The largest over the processes, element by element."""
        return self._reduced(tensor, dist.ReduceOp.MAX)

    def all_reduce_mean_(self, tensor: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """Replace a tensor by its mean over the processes, or over those of a group."""
        if self.size > 1:
            there = tensor.to(self._device)
            dist.all_reduce(there, group=group)
            tensor.copy_(there.div_(dist.get_world_size(group)))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(processes, *tensor.shape), on the CPU."""
        if self.size == 1:
            return tensor.cpu()[None]
        there = tensor.to(self._device)
        of_each = [torch.empty_like(there) for _ in range(self.size)]
        dist.all_gather(of_each, there)
        return torch.stack(of_each).cpu()

    def broadcast_object(self, value: T) -> T:
        """What rank 0 has: numbers, strings, containers of them."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device(self._device))
        return values[0]

    def all_gather_object(self, value: T) -> list[T]:
        """What each of them has, in their order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return tensor
        there = tensor.to(self._device, copy=True)
        dist.all_reduce(there, operation)
        return there.to(tensor.device)


SINGLE_PROCESS = World()

"""The hook by which DistributedDataParallel averages gradients: of all elements, later of the live ones alone.

DDP asks it for the mean of one bucket of gradients after the other, in the order in which a backward pass has them.
As soon as it is known which elements are frozen, only the others are sent, packed one behind the other: every process
knows their places, so no places are sent. DDP takes one hook, once, before the first backward pass; so this one is
there from the beginning, and until then does what DDP, or the user's own hook, would do.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.futures import Future
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from lightning_gcfreeze._masks import MaskIndex

Hook: TypeAlias = Callable[[Any, dist.GradBucket], Future[Tensor]]

_BYTES: dict[Callable[..., Any], int | None] = {
    default_hooks.allreduce_hook: None,  # those of the gradient's dtype
    default_hooks.fp16_compress_hook: 2,
    default_hooks.bf16_compress_hook: 2,
    default_hooks.fp16_compress_wrapper: 2,
    default_hooks.bf16_compress_wrapper: 2,
}
"""Hooks and wrappers of hooks that treat every number of a bucket alike, and how many bytes they send of each."""


class LiveAllReduce:
    """Averages the gradients of a DistributedDataParallel, and counts what that sends.

    Args:
        hook: the user's own, in whose way the gradients travel; None: as without one.
        state: of that hook.
        wrapper: of that hook.
    """

    def __init__(
        self, hook: Hook | None = None, state: object = None, wrapper: Callable[[Hook], Hook] | None = None
    ) -> None:
        self._given = hook
        self._hook, self._state = hook if hook is None or wrapper is None else wrapper(hook), state
        self.packs = hook is None or (hook in _BYTES and (wrapper is None or wrapper in _BYTES))
        """Whether live elements can travel alone; not through a hook that looks at whole gradients."""
        self._bytes = None if hook is None else _BYTES.get(hook) or (wrapper and _BYTES.get(wrapper))
        self._frozen: dict[Tensor, Tensor] = {}
        self._places: dict[tuple[Tensor, ...], MaskIndex | None] = {}
        self._group: dist.ProcessGroup | None = None
        self._sent = 0

    @classmethod
    def in_place_of_hook(cls, strategy: Any) -> "LiveAllReduce | None":
        """Of Lightning's DDPStrategy, before it sets DDP up: with the hook that it was given. None: it is another."""
        if not hasattr(strategy, "_ddp_comm_hook"):
            return None
        mean = cls(strategy._ddp_comm_hook, strategy._ddp_comm_state, strategy._ddp_comm_wrapper)
        strategy._ddp_comm_hook = None  # DDP takes one
        return mean

    def install(self, strategy: Any) -> str | None:
        """Become the communication hook, before the first backward pass; and give the user's back to the strategy.

        Returns:
            Why all gradients go on being sent, if they do.
        """
        self.give_back(strategy)
        return self.register(strategy.model)

    def give_back(self, strategy: Any) -> None:
        """Leave the strategy as it was before `in_place_of_hook`."""
        strategy._ddp_comm_hook = self._given

    def register(self, ddp: Any) -> str | None:
        """Become the communication hook of a DistributedDataParallel; see `install`."""
        if not isinstance(ddp, DistributedDataParallel):
            self.packs = False
            return f"the strategy trains a {type(ddp).__name__}"
        self._group = ddp.process_group
        try:
            ddp.register_comm_hook(self, _mean)
        except RuntimeError as error:
            if "only be called once" not in str(error):
                raise
            self.packs = False
            return "DDP has another communication hook"
        return None if self.packs else "the `ddp_comm_hook` may need them"

    @property
    def sent(self) -> int | None:
        """Bytes that this process gave to be averaged since `begin_step`; None: that is another hook's business."""
        return self._sent if self.packs else None

    def begin_step(self) -> None:
        """Count from 0 again."""
        self._sent = 0

    def leave_out(self, frozen: Mapping[Parameter, Tensor]) -> None:
        """Send the elements alone that are not frozen, from the next backward pass on.

        Args:
            frozen: by parameter, bool (*p.shape), the same on all processes; the gradients of these will be zero.
        """
        self._frozen = {p: mask for p, mask in frozen.items() if mask.any()} if self.packs else {}
        self._places.clear()

    def of_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """The mean of a bucket's gradients."""
        buffer = bucket.buffer()
        places = self._live(bucket) if self._frozen and buffer.layout == torch.strided else None
        elements = buffer.numel() if places is None else len(places)
        self._sent += elements * (self._bytes or buffer.element_size())
        if places is None:
            return self._mean_of(bucket)
        live = places.take(buffer)
        buffer.zero_()
        if not len(places):
            nothing: Future[Tensor] = Future(devices=[buffer.device] if buffer.device.type == "cuda" else None)
            nothing.set_result(buffer)
            return nothing
        bucket.set_buffer(live)

        def unpacked(mean: Future[Tensor]) -> Tensor:
            places.put_(buffer, mean.value().to(buffer.dtype))  # a wrapper leaves it compressed
            return buffer

        return self._mean_of(bucket).then(unpacked)

    def _mean_of(self, bucket: dist.GradBucket) -> Future[Tensor]:
        if self._hook is not None:
            return self._hook(self._state, bucket)
        group = self._group or dist.group.WORLD
        # As DDP itself does: the product with 1/R is not the quotient by R to the bit.
        buffer = bucket.buffer().mul_(1.0 / dist.get_world_size(group))
        return dist.all_reduce(buffer, group=group, async_op=True).get_future().then(lambda done: done.value()[0])

    def _live(self, bucket: dist.GradBucket) -> MaskIndex | None:
        """The places in the buffer of what is live; None: all of it is. DDP makes its buckets anew once."""
        parameters = tuple(bucket.parameters())
        if parameters not in self._places:
            live = torch.ones_like(bucket.buffer(), dtype=torch.bool)
            start = 0
            for p in parameters:
                if p in self._frozen:
                    # DDP keeps gradients in the order in which the parameter lies in memory, if it does without gaps.
                    stride = p.stride() if torch.empty_like(p).stride() == p.stride() else _stride(p.shape)
                    live.as_strided(p.shape, stride, start).logical_and_(~self._frozen[p])
                start += p.numel()
            self._places[parameters] = None if live.all() else MaskIndex(live)
        return self._places[parameters]


def _mean(state: LiveAllReduce, bucket: dist.GradBucket) -> Future[Tensor]:
    """DDP wants a plain function."""
    return state.of_bucket(bucket)


def _stride(shape: torch.Size) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return torch.empty(shape, device="meta").stride()

"""`LiveAllReduce`: a communication hook of DistributedDataParallel that averages only the live elements' gradients.

DDP calls its hook with one bucket of gradients after the other, in the order in which a backward pass computes them,
and expects their mean over all processes. After the freeze only the live elements are sent, packed together. Every
process knows their indices, so no indices are sent. DDP accepts one hook, once, before the first backward pass. So this
hook is registered from the beginning, and until the freeze it does what DDP, or the user's own hook, would do.
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

_BYTES_PER_ELEMENT: dict[Callable[..., Any], int | None] = {
    default_hooks.allreduce_hook: None,  # those of the gradient's dtype
    default_hooks.fp16_compress_hook: 2,
    default_hooks.bf16_compress_hook: 2,
    default_hooks.fp16_compress_wrapper: 2,
    default_hooks.bf16_compress_wrapper: 2,
}
"""Hooks, and wrappers of hooks, that treat all elements of a bucket alike: how many bytes they send for each."""


class LiveAllReduce:
    """Averages the gradients of a DistributedDataParallel over its processes, and counts the bytes this sends.

    Args:
        hook: the user's own hook, whose compression is used; None: gradients are averaged as DDP does without a hook.
        state: state of that hook.
        wrapper: wrapper of that hook.
    """

    def __init__(
        self, hook: Hook | None = None, state: object = None, wrapper: Callable[[Hook], Hook] | None = None
    ) -> None:
        self.user_hook = hook
        self._hook, self._state = hook if hook is None or wrapper is None else wrapper(hook), state
        self.packs = hook is None or (hook in _BYTES_PER_ELEMENT and (wrapper is None or wrapper in _BYTES_PER_ELEMENT))
        """Whether only live elements can be sent; not through a hook that needs whole gradients."""
        known = _BYTES_PER_ELEMENT
        self._bytes_per_element = None if hook is None else known.get(hook) or (wrapper and known.get(wrapper))
        self._frozen: dict[Tensor, Tensor] = {}
        self._live_index: dict[tuple[Tensor, ...], MaskIndex | None] = {}  # by parameters of a bucket
        self._group: dist.ProcessGroup | None = None
        self._bytes_sent = 0

    def register(self, ddp: Any, inform: Callable[[str], None]) -> None:
        """Become the communication hook of a DistributedDataParallel, before its first backward pass.

        Args:
            ddp: what the loop trains.
            inform: is told why all gradients are still communicated after the freeze, if they are.
        """
        if why := self._try_to_register(ddp):
            inform(f"all gradients are still communicated because {why}.")

    def _try_to_register(self, ddp: Any) -> str | None:
        if not isinstance(ddp, DistributedDataParallel):
            self.packs = False
            return f"the strategy trains a {type(ddp).__name__}"
        self._group = ddp.process_group
        try:
            ddp.register_comm_hook(self, _reduce_bucket)
        except RuntimeError as error:
            if "only be called once" not in str(error):
                raise
            self.packs = False
            return "DDP has another communication hook"
        return None if self.packs else "the `ddp_comm_hook` may need them"

    @property
    def bytes_sent(self) -> int | None:
        """Bytes that this process gave to be averaged since `begin_step`; None: unknown, another hook communicates."""
        return self._bytes_sent if self.packs else None

    def begin_step(self) -> None:
        """Start counting bytes at 0."""
        self._bytes_sent = 0

    def leave_out(self, frozen: Mapping[Parameter, Tensor]) -> None:
        """Send only elements that are not frozen, from the next backward pass on.

        Args:
            frozen: by parameter, bool (*p.shape), the same on all processes. Gradients of frozen elements become zero.
        """
        self._frozen = {p: mask for p, mask in frozen.items() if mask.any()} if self.packs else {}
        self._live_index.clear()

    def reduce_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Average a bucket's gradients over all processes.

        Returns:
            A future of the bucket's buffer with the mean of the live elements, and zeros where frozen.
        """
        buffer = bucket.buffer()
        index = self._index_of(bucket) if self._frozen and buffer.layout == torch.strided else None
        n_elements = buffer.numel() if index is None else len(index)
        self._bytes_sent += n_elements * (self._bytes_per_element or buffer.element_size())
        if index is None:
            return self._mean(bucket)
        live = index.gather(buffer)
        buffer.zero_()
        if not len(index):
            done: Future[Tensor] = Future(devices=[buffer.device] if buffer.device.type == "cuda" else None)
            done.set_result(buffer)
            return done
        bucket.set_buffer(live)

        def unpacked(mean: Future[Tensor]) -> Tensor:
            index.scatter_(buffer, mean.value().to(buffer.dtype))  # a wrapper leaves the mean compressed
            return buffer

        return self._mean(bucket).then(unpacked)

    def _mean(self, bucket: dist.GradBucket) -> Future[Tensor]:
        if self._hook is not None:
            return self._hook(self._state, bucket)
        group = self._group or dist.group.WORLD
        # As DDP does without a hook: the product with 1/R is not the quotient by R to the bit.
        buffer = bucket.buffer().mul_(1.0 / dist.get_world_size(group))
        return dist.all_reduce(buffer, group=group, async_op=True).get_future().then(lambda done: done.value()[0])

    def _index_of(self, bucket: dist.GradBucket) -> MaskIndex | None:
        """Return the indices of the live elements in the bucket's buffer; None: all elements are live.

        Indices are kept by the bucket's parameters: DDP makes its buckets anew after the first backward pass.
        """
        parameters = tuple(bucket.parameters())
        if parameters not in self._live_index:
            live = torch.ones_like(bucket.buffer(), dtype=torch.bool)
            start = 0
            for p in parameters:
                if p in self._frozen:
                    # DDP keeps gradients in the order in which the parameter lies in memory, if it does without gaps.
                    contiguous = torch.empty(p.shape, device="meta").stride()
                    stride = p.stride() if torch.empty_like(p).stride() == p.stride() else contiguous
                    live.as_strided(p.shape, stride, start).logical_and_(~self._frozen[p])
                start += p.numel()
            self._live_index[parameters] = None if live.all() else MaskIndex(live)
        return self._live_index[parameters]


def _reduce_bucket(all_reduce: LiveAllReduce, bucket: dist.GradBucket) -> Future[Tensor]:
    """Call `LiveAllReduce.reduce_bucket`: DDP requires a plain function."""
    return all_reduce.reduce_bucket(bucket)

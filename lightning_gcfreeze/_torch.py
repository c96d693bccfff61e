"""Private names of torch that have no public counterpart, one helper each. Docstrings state what is assumed of them."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

import torch
from torch import Tensor, nn

# FSDP2 over tensor parallelism shards an axis twice, in an order of its own; a `Shard` in some versions of torch only.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.nn import Parameter

__all__ = ["StridedShard"]


def is_ordinary_autograd() -> bool:
    """Return whether gradients are recorded for an ordinary backward pass.

    False without gradients, inside a transform of ``torch.func``, under forward-mode differentiation and in a trace.

    Assumes that ``forward_ad._current_level`` is -1 outside of ``forward_ad.dual_level``, and that
    ``_are_functorch_transforms_active`` covers every transform of ``torch.func``.
    """
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    other = forward_mode or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not other


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Return whether a tensor stands for many, as in `torch.vmap`, or is differentiated by torch.func.

    Assumes that `torch._C._functorch` tells its wrappers, whose type is `Tensor`, apart.
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def version(tensor: Tensor) -> int:
    """Return a counter that each change of the tensor's memory in place increases. Assumes ``Tensor._version``."""
    return tensor._version


def lazy_copy(tensor: Tensor) -> Tensor:
    """Return a copy, detached, that takes memory only once it or `tensor` is written to, by whomever.

    Who writes then gets new memory. So this is for a CPU alone: graphs recorded on a GPU count on addresses. Elsewhere,
    and of memory that is not torch's alone, as where processes share it, it is copied at once.

    Assumes that ``torch._lazy_clone`` lets two tensors share memory until either of them, or a view of it, is written
    to, also through ``.data``; and that it raises RuntimeError where it cannot.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and type(tensor) is Tensor and tensor.layout == torch.strided:
        try:
            return torch._lazy_clone(tensor)
        except (RuntimeError, AttributeError):
            pass
    return tensor.clone()


def has_same_memory(tensor: Tensor, copy: Tensor) -> bool:
    """Return whether a `lazy_copy` still shares the memory of its tensor: neither was written to.

    Assumes that ``torch._C._data_address`` only tells the address; ``data_ptr`` counts as a write.
    """
    if type(copy) is not Tensor or tensor.device.type != "cpu":
        return False
    return bool(torch._C._data_address(tensor) == torch._C._data_address(copy))  # type: ignore[attr-defined]


def own_parameters(module: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Yield the parameters of a module itself, by own name; one that has two names comes twice.

    Assumes the dictionary ``Module._parameters``. `named_parameters(recurse=False)` takes several times as long, and
    modules may override it.
    """
    return ((name, p) for name, p in module._parameters.items() if p is not None)


def padding_of_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Return what `torch.nn.functional.pad` is to be given, also for ``padding="same"``.

    Assumes ``_reversed_padding_repeated_twice``, which convolutions keep for their own padding.
    """
    return layer._reversed_padding_repeated_twice


def statistics_of_batch_norm(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and inverse deviation, (channels,), that BatchNorm used; None if the graph does not keep them.

    Assumes that the second and third result of ``native_batch_norm`` are saved on the graph's node.
    """
    mean, inverse = (getattr(output.grad_fn, f"_saved_result{i}", None) for i in (1, 2))
    return (mean, inverse) if isinstance(mean, Tensor) and isinstance(inverse, Tensor) else None


def own_parameter(layer: nn.Module, name: str) -> Tensor | None:
    """Return what a layer has registered as its parameter `name`, or None.

    Unlike ``getattr`` this ignores weights that are plain attributes, computed by a normalisation or by pruning.
    Assumes that a module keeps its own parameters in the dictionary ``_parameters``.
    """
    return layer._parameters.get(name)


def replace_parameters(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of a layer's own parameters, also plain tensors, which ``setattr`` refuses.

    Assumes that attribute access reads ``_parameters``, and that ``torch.nn`` modules use their weights that way.
    """
    layer._parameters.update(tensors)  # type: ignore[arg-type]


def has_gradient_hooks(p: Tensor) -> bool:
    """Return whether hooks are registered on a tensor: on its gradient, or after the gradient was accumulated.

    Assumes that both dictionaries are None or empty without hooks.
    """
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


def foreach_copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in one operation: faster than a loop of ``copy_`` over small tensors."""
    torch._foreach_copy_([*targets], [*sources])


def sparse_nbytes(tensor: Tensor) -> int:
    """Return the bytes of a sparse COO tensor's values and indices; ``coalesce`` would copy them.

    Assumes that ``_values`` and ``_indices`` give uncoalesced tensors as they are stored.
    """
    return tensor._values().nbytes + tensor._indices().nbytes


def is_step_for_checkpoint() -> bool:
    """Return whether ``torch.distributed.checkpoint`` takes the optimizer step that is running.

    To have a state to save or to load, it steps an optimizer without one, with gradients and learning rates of zero.
    Assumes that it does so from its module ``state_dict``; where the optimizer has a state, nobody need ask.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False


def queue_after_backward(callback: Callable[[], None]) -> None:
    """Call a function at the end of the backward pass that is running, once, in the order of being queued.

    Assumes ``queue_callback`` of the engine, as DDP and FSDP use it. Gradients are not recorded in the callback.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def keeps_own_result(tensor: Tensor) -> bool:
    """Return whether the operation that made a tensor, or what it is a view of, needs it in its backward pass.

    ReLU and tanh do, and attention.
    """
    made_by = (tensor if tensor._base is None else tensor._base).grad_fn
    return hasattr(made_by, "_raw_saved_result") or hasattr(made_by, "_raw_saved_output")

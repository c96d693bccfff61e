"""Private parts of torch that this package relies on, one helper each; an upgrade of torch breaks here, if anywhere."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import Parameter


def is_ordinary_autograd() -> bool:
    """Return whether gradients are recorded for an ordinary backward pass.

    That is: no torch.func transform, no forward mode, no tracing. Assumes that `torch.autograd.forward_ad` counts its
    nested levels from -1, and that `torch._C` knows whether a transform of functorch is active.
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

"""Private names of torch that have no public counterpart, one helper each. Docstrings state what is assumed of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def is_ordinary_autograd() -> bool:
    """Return whether gradients are recorded for an ordinary backward pass.

    False without gradients, inside a transform of ``torch.func``, under forward-mode differentiation and in a trace.

    Assumes that ``forward_ad._current_level`` is -1 outside of ``forward_ad.dual_level``, and that
    ``_are_functorch_transforms_active`` covers every transform of ``torch.func``.
    """
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    other = forward_mode or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not other


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

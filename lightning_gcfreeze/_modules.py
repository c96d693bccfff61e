"""Walks over modules and graphs: what is compiled, checkpointed or without running statistics."""

import torch
from torch import Tensor, nn

# Private base classes: libraries derive layers of their own from them, synchronized batch norms above all.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.conv import _ConvNd as Convolution
from torch.nn.modules.dropout import _DropoutNd as Dropout

__all__ = [
    "BatchNorm",
    "Convolution",
    "Dropout",
    "batch_norms_without_statistics",
    "has_compiled",
    "has_reentrant_checkpoint",
    "uncompiled",
]


def uncompiled(module: nn.Module) -> list[nn.Module]:
    """All modules inside, once each, without those that `torch.compile` runs: hooks would split their graphs."""
    found: dict[nn.Module, None] = {}
    left = [module]
    while left:
        if not _is_compiled(m := left.pop()) and m not in found:
            found[m] = None
            left.extend(reversed([*m.children()]))
    return list(found)


def has_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` runs any of it."""
    return any(map(_is_compiled, module.modules()))


def _is_compiled(module: nn.Module) -> bool:
    of_lightning = getattr(module, "_compiler_ctx", None) is not None  # a LightningModule whose steps are compiled
    return of_lightning or isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether a part of the graph is checkpointed in the way that keeps its parameters out of the graph."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            return True
        seen.add(node)
        left.extend(function for function, _ in node.next_functions)
    return False


def batch_norms_without_statistics(module: nn.Module) -> list[str]:
    """Names of the BatchNorm layers in train mode without running statistics: they cannot take a single sample."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, BatchNorm) and layer.running_mean is None and layer.training
    ]

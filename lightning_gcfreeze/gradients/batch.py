"""g_S, the gradient of the batch: what the backward pass left in ``p.grad``."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gcfreeze._computed import Computed
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import local, part


def batch_gradients(parameters: Mapping[str, Parameter], scale: float = 1.0) -> Named:
    """Return g_S, the gradient that the optimizer will use.

    Args:
        parameters: by name, after the backward pass.
        scale: the factor by which ``p.grad`` is too large: a loss scale, or the share of a short accumulation window.

    Returns:
        ``{name: (*p.shape)}``, of sharded parameters the local parts. ``p.grad`` itself where it is dense and unscaled:
        do not write to it; with a scale, each is computed when it is asked for. Zeros for a parameter without a
        gradient, which took no part in the loss.
    """
    if scale == 1.0:
        return {name: dense(p, p.grad) for name, p in parameters.items()}
    return Computed(parameters, lambda name, cut: cut(dense(parameters[name], parameters[name].grad, scale)))


def dense(parameter: Parameter, grad: Tensor | None, scale: float = 1.0) -> Tensor:
    """Return a gradient over `scale`, detached, dense and like the local part of its parameter; zeros for None."""
    if grad is None:
        return torch.zeros_like(local(parameter), requires_grad=False)
    grad = part(parameter, grad.detach())
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    return grad if scale == 1.0 else grad / scale

"""Rules: a layer's per-sample gradients from its input and the gradient of the loss with respect to its output.

A rule takes a layer, its input x and the gradient δ with respect to its output, both of m samples, and returns {own
name of a parameter: its per-sample gradients}. ``Stacked(values)``, with values of shape (m, *p.shape), is always
correct; `OuterProducts` and `Lookups` are cheaper. To add a rule, write one function here with ``@rule(LayerType)``. A
layer whose type has no rule is run once more on each sample and differentiated as a whole, by `rerun`.

Rules are looked up by the exact type, because a subclass may compute something else.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gcfreeze import _modules, _torch
from lightning_gcfreeze.estimators.outer_products import OuterProducts
from lightning_gcfreeze.estimators.per_sample import Lookups, PerSample, Stacked
from lightning_gcfreeze.estimators.scratch import scratch, wide

Rule: TypeAlias = Callable[..., dict[str, PerSample]]
"""(layer, x, δ) -> gradients by own name. A layer with several outputs has one δ for each, None for an unused one."""

R = TypeVar("R", bound=Rule)
_RULES: dict[type[nn.Module], tuple[Rule, Callable[[Any], bool]]] = {}


def rule(*layers: type[nn.Module], unless: Callable[[Any], bool] = lambda layer: False) -> Callable[[R], R]:
    """Register a rule.

    Args:
        layers: the types of layer that the rule is for.
        unless: tells whether a layer of these types is configured in a way that the rule does not cover.
    """

    def register(function: R) -> R:
        _RULES.update(dict.fromkeys(layers, (function, unless)))
        return function

    return register


def for_layer(layer: nn.Module) -> Rule:
    """Return the rule for the type of a layer, or `rerun`."""
    known, unless = _RULES.get(type(layer), (rerun, lambda layer: False))
    return rerun if unless(layer) else known


def is_known(layer: nn.Module) -> bool:
    """Return whether some rule covers a layer; `rerun` covers no module of modules, and no unknown BatchNorm."""
    if for_layer(layer) is not rerun:
        return True
    return not isinstance(layer, _modules.BatchNorm) and not any(True for _ in layer.children())


def has_samples(layer: nn.Module, x: Tensor) -> bool:
    """Return whether the input of a layer has an axis for samples, judging by its number of axes."""
    if isinstance(layer, nn.RNNBase):
        return x.dim() == 3
    if isinstance(layer, _modules.Convolution):
        return x.dim() == layer.weight.dim()
    return x.dim() > (1 if x.is_floating_point() else 0)


def sample_axis(layer: nn.Module, output: int | None = None) -> int:
    """Return the axis of the samples in a layer's input, or in one of its outputs, given by its number."""
    if isinstance(layer, nn.RNNBase):
        return 1 if output or not layer.batch_first else 0  # the final states come layer by layer
    return 0


def preparation(layer: nn.Module, x: Tensor, output: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what to apply to some samples' input before the rule: for BatchNorm, the normalization of this pass."""
    if for_layer(layer) is not batch_norm:
        return lambda x: x
    assert isinstance(layer, _modules.BatchNorm)
    mean, inverse_deviation = (s.view(1, -1, *[1] * (x.dim() - 2)) for s in _statistics(layer, x, output))
    return lambda x: (x - mean) * inverse_deviation


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a layer's output in order, those of nested tuples included."""
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in tensors(part)]
    return [output] if isinstance(output, Tensor) else []


def rerun(layer: nn.Module, x: Tensor, *deltas: Tensor | None) -> dict[str, PerSample]:
    """Run any layer once more on *one* sample, and return its vector-Jacobian product."""
    own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    if x.is_floating_point():  # under autocast it may be narrower
        x = x.to(next(iter(own.values())).dtype)
    with torch.enable_grad():
        pairs = [
            (y, delta.to(y.dtype))
            for y, delta in zip(tensors(layer.forward(x)), deltas, strict=True)
            if delta is not None
        ]
        outputs, output_grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, list(own.values()), output_grads, allow_unused=True)
    values = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(own.items(), found, strict=True)}
    return {name: Stacked(g.detach()[None], in_batch=False) for name, g in values.items()}


@rule(nn.Linear)
def linear(layer: nn.Linear, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """Σ δ ⊗ x over positions: all axes between the first and the last."""
    bias = delta if delta.dim() == 2 else _sum(delta.flatten(1, -2), (1,))
    x, delta = (t.reshape(t.shape[0], 1, -1, t.shape[-1]) for t in (x, delta))
    return {"weight": OuterProducts(delta, x, layer.weight.shape), "bias": Stacked(bias)}


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """A linear map of the window around each position of the output."""
    delta = delta.flatten(2)  # (m, channels, positions)
    by_group = delta.unflatten(1, (layer.groups, -1)).mT
    return {
        "weight": OuterProducts(by_group, x, layer.weight.shape, lambda x: _windows(layer, x)),
        "bias": Stacked(_sum(delta, (2,))),
    }


@rule(nn.Embedding, unless=lambda layer: layer.scale_grad_by_freq or layer.max_norm is not None)
def embedding(layer: nn.Embedding, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """Σ δ over the positions at which a row was looked up."""
    x, delta = x.reshape(len(x), -1), delta.reshape(len(delta), -1, delta.shape[-1])
    if layer.padding_idx is not None:
        delta = delta.masked_fill((x == layer.padding_idx)[..., None], 0.0)
    return {"weight": Lookups(x, delta, layer.num_embeddings)}


@rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """δ times the normalized input, and δ, summed over all axes that are not normalized."""
    normalized = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    axes = tuple(range(1, x.dim() - len(layer.normalized_shape)))
    return _scale_and_shift(normalized, delta, axes)


@rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """δ times the normalized input, and δ, summed over all axes but the channels."""
    return _scale_and_shift(F.group_norm(x, layer.num_groups, eps=layer.eps), delta, tuple(range(2, x.dim())))


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: _modules.BatchNorm, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """As above, for x that `preparation` has normalized by the statistics of the batch; one sample has none."""
    return _scale_and_shift(x, delta, tuple(range(2, x.dim())))


def _scale_and_shift(normalized: Tensor, delta: Tensor, axes: tuple[int, ...]) -> dict[str, PerSample]:
    product = delta * normalized
    if axes:  # `sum` takes no axes for all of them
        product, delta = _sum(product, axes), _sum(delta, axes)
    return {"weight": Stacked(product), "bias": Stacked(delta)}


def _sum(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Sum in float32 or wider: in half precision one sample's sum could overflow although the batch's does not."""
    return tensor.sum(axes, dtype=wide(tensor.dtype))


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Return the part of the input that each position of the output sees, (m, groups, positions, columns)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, _torch.padding_of_convolution(layer), mode).contiguous()
    geometry = [*zip(x.shape[2:], x.stride()[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)]
    sizes = [(n - dilation * (kernel - 1) - 1) // stride + 1 for n, _, kernel, stride, dilation in geometry]
    if len(sizes) == 2 and sizes[-1] < 8:  # copying such short rows takes longer
        windows = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    else:
        in_window = [step * dilation for _, step, _, _, dilation in geometry]
        between_windows = [step * stride for _, step, _, stride, _ in geometry]
        strides = (*x.stride()[:2], *in_window, *between_windows)
        view = x.as_strided((*x.shape[:2], *layer.kernel_size, *sizes), strides)
        windows = scratch("windows", view.shape, x).copy_(view)
    return windows.view(len(x), layer.groups, -1, math.prod(sizes)).mT


def _statistics(layer: _modules.BatchNorm, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean that BatchNorm subtracted and the inverse deviation that it multiplied by, (channels,) each."""
    if not layer.training and layer.running_mean is not None and layer.running_var is not None:
        return layer.running_mean.clone(), (layer.running_var + layer.eps).rsqrt()
    # Computing them again would be a pass over the whole batch.
    saved = _torch.statistics_of_batch_norm(output)
    if saved is not None and saved[0].numel() == saved[1].numel() == x.shape[1]:
        return saved
    axes = (0, *range(2, x.dim()))
    variance, mean = torch.var_mean(x.detach(), axes, correction=0)
    return mean, (variance + layer.eps).rsqrt()

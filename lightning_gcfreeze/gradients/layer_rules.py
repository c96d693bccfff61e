"""A layer's gradients on single samples, from what the batch's own pass knows: its input and its output's gradient.

A rule takes a layer, the input x and the gradient δ of the loss by the output, both of m samples, and returns {own name
of a parameter: its gradients, a `PerSample`}; ``Stacked(values)`` with values of (m, *p.shape) is always one. Adding a
rule is one function here with ``@rule(type)``; a layer whose type has none is run once more on each of the samples, and
differentiated as a whole.

Rules are looked up by the exact type: a subclass may compute something else.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gcfreeze import _modules
from lightning_gcfreeze.estimators.per_sample import Lookups, PerSample, Products, Stacked, scratch, wide

Rule: TypeAlias = Callable[..., dict[str, PerSample]]
"""(layer, x, δ) -> gradients by own name; a layer with several outputs has as many δ, None for one without use."""

R = TypeVar("R", bound=Rule)
_RULES: dict[type[nn.Module], tuple[Rule, Callable[[Any], bool]]] = {}


def rule(*layers: type[nn.Module], unless: Callable[[Any], bool] = lambda layer: False) -> Callable[[R], R]:
    """Say which layers a rule is for, and which of them are set up in a way that it does not know."""

    def register(function: R) -> R:
        _RULES.update(dict.fromkeys(layers, (function, unless)))
        return function

    return register


def for_layer(layer: nn.Module) -> Rule:
    """The rule for its type, or `of_any_layer`."""
    known, unless = _RULES.get(type(layer), (of_any_layer, lambda layer: False))
    return of_any_layer if unless(layer) else known


def applies(layer: nn.Module) -> bool:
    """Whether a rule can say what a layer of this type does in a pass; a module of modules is not one."""
    alone = for_layer(layer) is of_any_layer
    return not (alone and (isinstance(layer, _modules.BatchNorm) or any(True for _ in layer.children())))


def takes(layer: nn.Module, x: Tensor) -> bool:
    """Whether x has an axis for samples."""
    if isinstance(layer, nn.RNNBase):
        return x.dim() == 3
    if isinstance(layer, _modules.Convolution):
        return x.dim() == layer.weight.dim()
    return x.dim() > (1 if x.is_floating_point() else 0)


def sample_axis(layer: nn.Module, output: int | None = None) -> int:
    """Along which axis the samples lie in a layer's input, or in one of its outputs by number."""
    if isinstance(layer, nn.RNNBase):
        return 1 if output or not layer.batch_first else 0  # the states at the end come layer by layer
    return 0


def preparation(layer: nn.Module, x: Tensor, output: Tensor) -> Callable[[Tensor], Tensor]:
    """What to do with some samples' input before it goes to the rule: BatchNorm's is normalised as in this pass."""
    if for_layer(layer) is not batch_norm:
        return lambda x: x
    assert isinstance(layer, _modules.BatchNorm)
    mean, inverse_deviation = (s.view(1, -1, *[1] * (x.dim() - 2)) for s in _statistics(layer, x, output))
    return lambda x: (x - mean) * inverse_deviation


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a layer's output, of nested tuples in their order."""
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in tensors(part)]
    return [output] if isinstance(output, Tensor) else []


def of_any_layer(layer: nn.Module, x: Tensor, *deltas: Tensor | None) -> dict[str, PerSample]:
    """The layer once more on *one* sample, and its vector-Jacobian product."""
    own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    if x.is_floating_point():  # under autocast it may be narrower
        x = x.to(next(iter(own.values())).dtype)
    with torch.enable_grad():
        pairs = [
            (y, delta.to(y.dtype))
            for y, delta in zip(tensors(layer.forward(x)), deltas, strict=True)
            if delta is not None
        ]
        outputs, by_outputs = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, list(own.values()), by_outputs, allow_unused=True)
    values = {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(own.items(), found, strict=True)}
    return {name: Stacked(g.detach()[None], in_batch=False) for name, g in values.items()}


@rule(nn.Linear)
def linear(layer: nn.Linear, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """Σ δ ⊗ x, over all axes between the first and the last as positions."""
    bias = delta if delta.dim() == 2 else _sum(delta.flatten(1, -2), (1,))
    x, delta = (t.reshape(t.shape[0], 1, -1, t.shape[-1]) for t in (x, delta))
    return {"weight": Products(delta, x, layer.weight.shape), "bias": Stacked(bias)}


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """A linear map of the window around each position of the output."""
    delta = delta.flatten(2)  # (m, channels, positions)
    by_group = delta.unflatten(1, (layer.groups, -1)).mT
    return {
        "weight": Products(by_group, x, layer.weight.shape, lambda x: _windows(layer, x)),
        "bias": Stacked(_sum(delta, (2,))),
    }


@rule(nn.Embedding, unless=lambda layer: layer.scale_grad_by_freq or layer.max_norm is not None)
def embedding(layer: nn.Embedding, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """δ, to be added up over the places where a row was looked up."""
    x, delta = x.reshape(len(x), -1), delta.reshape(len(delta), -1, delta.shape[-1])
    if layer.padding_idx is not None:
        delta = delta.masked_fill((x == layer.padding_idx)[..., None], 0.0)
    return {"weight": Lookups(x, delta, layer.num_embeddings)}


@rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """δ times the normalised input, and δ, summed over all axes that are not normalised."""
    normalised = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    axes = tuple(range(1, x.dim() - len(layer.normalized_shape)))
    return _scale_and_shift(normalised, delta, axes)


@rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """δ times the normalised input, and δ, summed over all axes but the channels."""
    return _scale_and_shift(F.group_norm(x, layer.num_groups, eps=layer.eps), delta, tuple(range(2, x.dim())))


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: _modules.BatchNorm, x: Tensor, delta: Tensor) -> dict[str, PerSample]:
    """As above, x being normalised already, by the statistics of the batch: a sample alone has none."""
    return _scale_and_shift(x, delta, tuple(range(2, x.dim())))


def _scale_and_shift(normalised: Tensor, delta: Tensor, axes: tuple[int, ...]) -> dict[str, PerSample]:
    product = delta * normalised
    if axes:  # no axes mean all to `sum`
        product, delta = _sum(product, axes), _sum(delta, axes)
    return {"weight": Stacked(product), "bias": Stacked(delta)}


def _sum(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Of one sample, in half precision, it could leave the range although the batch's does not."""
    return tensor.sum(axes, dtype=wide(tensor.dtype))


def _windows(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """What each position of the output sees of the input. (m, groups, positions, columns)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode).contiguous()
    geometry = [*zip(x.shape[2:], x.stride()[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True)]
    sizes = [(n - dilation * (kernel - 1) - 1) // stride + 1 for n, _, kernel, stride, dilation in geometry]
    if len(sizes) == 2 and sizes[-1] < 8:  # a copy of so short pieces takes longer
        windows = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    else:
        by_place = [step * dilation for _, step, _, _, dilation in geometry]
        by_position = [step * stride for _, step, _, stride, _ in geometry]
        view = x.as_strided((*x.shape[:2], *layer.kernel_size, *sizes), (*x.stride()[:2], *by_place, *by_position))
        windows = scratch("windows", view.shape, x).copy_(view)
    return windows.view(len(x), layer.groups, -1, math.prod(sizes)).mT


def _statistics(layer: _modules.BatchNorm, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The mean that BatchNorm has subtracted and the inverse deviation that it has multiplied by, (channels,)."""
    if not layer.training and layer.running_mean is not None and layer.running_var is not None:
        return layer.running_mean.clone(), (layer.running_var + layer.eps).rsqrt()
    # The node of the graph keeps them; computing them again would be a pass over the whole batch.
    mean, inverse = (getattr(output.grad_fn, f"_saved_result{i}", None) for i in (1, 2))
    if isinstance(mean, Tensor) and isinstance(inverse, Tensor) and mean.numel() == inverse.numel() == x.shape[1]:
        return mean, inverse
    axes = (0, *range(2, x.dim()))
    variance, mean = torch.var_mean(x.detach(), axes, correction=0)
    return mean, (variance + layer.eps).rsqrt()

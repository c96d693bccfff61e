"""A layer's gradient on single samples, from what the batch's own pass knows: their input and their output's gradient.

A rule takes a layer, the input x and the gradient δ of the loss by the output, both cut to the samples wanted, and
returns {own name of a parameter: its gradient, summed over these samples}. Adding one is one function here with
``@rule(type)``; a layer whose type has none is run once more on these samples, and differentiated as a whole.

Rules are looked up by the exact type: a subclass may compute something else.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Rule: TypeAlias = Callable[..., dict[str, Tensor]]
"""(layer, x, δ) -> ``{name: (*p.shape)}``; a layer with several outputs has as many δ, None for one without use."""

R = TypeVar("R", bound=Rule)
_RULES: dict[type[nn.Module], Rule] = {}


def rule(*layers: type[nn.Module]) -> Callable[[R], R]:
    """Say which layers a rule is for."""

    def register(function: R) -> R:
        _RULES.update(dict.fromkeys(layers, function))
        return function

    return register


def for_layer(layer: nn.Module) -> Rule:
    """The rule for its type, or `of_any_layer`."""
    return _RULES.get(type(layer), of_any_layer)


def applies(layer: nn.Module) -> bool:
    """Whether a rule can say what a layer of this type does in a pass; a module of modules is not one."""
    alone = for_layer(layer) is of_any_layer
    return not (alone and (isinstance(layer, _BatchNorm) or any(True for _ in layer.children())))


def takes(layer: nn.Module, x: Tensor) -> bool:
    """Whether x has an axis for samples."""
    if isinstance(layer, nn.RNNBase):
        return x.dim() == 3
    if isinstance(layer, _ConvNd):
        return x.dim() == layer.weight.dim()
    return x.dim() > (1 if x.is_floating_point() else 0)


def sample_axis(layer: nn.Module, output: int | None = None) -> int:
    """Along which axis the samples lie in a layer's input, or in one of its outputs by number."""
    if isinstance(layer, nn.RNNBase):
        return 1 if output or not layer.batch_first else 0  # the states at the end come layer by layer
    return 0


def kept(layer: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """What of the first sample's input a rule needs after the pass: a copy of it, or normalised by the batch."""
    if for_layer(layer) is batch_norm:
        assert isinstance(layer, _BatchNorm)
        mean, inverse_deviation = _statistics(layer, x, output)
        shape = (1, -1, *[1] * (x.dim() - 2))
        return (x[:1].detach() - mean.view(shape)) * inverse_deviation.view(shape)
    return x.detach().narrow(sample_axis(layer), 0, 1).clone()


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a layer's output, of nested tuples in their order."""
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in tensors(part)]
    return [output] if isinstance(output, Tensor) else []


def of_any_layer(layer: nn.Module, x: Tensor, *deltas: Tensor | None) -> dict[str, Tensor]:
    """The layer once more on these samples, and its vector-Jacobian product."""
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
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(own.items(), found, strict=True)}


@rule(nn.Linear)
def linear(layer: nn.Linear, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """δᵀx, with all axes between the first and the last as further rows."""
    x, delta = x.reshape(-1, x.shape[-1]).to(delta.dtype), delta.reshape(-1, delta.shape[-1])
    return {"weight": delta.T @ x, "bias": delta.sum(0)}


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """PyTorch's own backward of a convolution, without the part that leads to the input."""
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return of_any_layer(layer, x, delta)
    _, weight, bias = torch.ops.aten.convolution_backward(
        delta,
        x.to(delta.dtype),
        layer.weight.detach().to(delta.dtype),
        [layer.out_channels],
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        layer.output_padding,
        layer.groups,
        (False, True, True),
    )
    return {"weight": weight, "bias": bias}


@rule(nn.Embedding)
def embedding(layer: nn.Embedding, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """δ added up over the places where a row was looked up."""
    if layer.scale_grad_by_freq or layer.max_norm is not None:
        return of_any_layer(layer, x, delta)
    weight = delta.new_zeros(layer.weight.shape)
    weight.index_add_(0, x.reshape(-1), delta.reshape(-1, delta.shape[-1]))
    if layer.padding_idx is not None:
        weight[layer.padding_idx] = 0
    return {"weight": weight}


@rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """δ times the normalised input, and δ, summed over all axes that are not normalised."""
    axes = tuple(range(x.dim() - len(layer.normalized_shape)))
    normalised = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return {"weight": (delta * normalised).sum(axes), "bias": delta.sum(axes)}


@rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """δ times the normalised input, and δ, summed over all axes but the channels."""
    return _by_channel(F.group_norm(x, layer.num_groups, eps=layer.eps), delta)


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(layer: _BatchNorm, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """As above, x being normalised already, by the statistics of the batch: a sample alone has none."""
    return _by_channel(x, delta)


def _by_channel(normalised: Tensor, delta: Tensor) -> dict[str, Tensor]:
    axes = (0, *range(2, delta.dim()))
    return {"weight": (delta * normalised).sum(axes), "bias": delta.sum(axes)}


def _statistics(layer: _BatchNorm, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The mean that BatchNorm has subtracted and the inverse deviation that it has multiplied by, (channels,)."""
    if not layer.training and layer.running_mean is not None and layer.running_var is not None:
        return layer.running_mean, (layer.running_var + layer.eps).rsqrt()
    # The node of the graph keeps them; computing them again would be a pass over the whole batch.
    mean, inverse = (getattr(output.grad_fn, f"_saved_result{i}", None) for i in (1, 2))
    if isinstance(mean, Tensor) and isinstance(inverse, Tensor) and mean.numel() == inverse.numel() == x.shape[1]:
        return mean, inverse
    axes = (0, *range(2, x.dim()))
    variance, mean = torch.var_mean(x.detach(), axes, correction=0)
    return mean, (variance + layer.eps).rsqrt()

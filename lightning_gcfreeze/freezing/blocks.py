"""Which block of a weight's gradient has to be computed, and whether computing only that block is worth it."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, grad
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze import _modules, _torch
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import is_sharded

MIN_SAVED_MACS = 2**22
"""Multiply-adds that a block has to save in each step; if it saves fewer, its hooks cost more."""
MIN_SAVED_ELEMENTS = 2**20
"""Elements of an embedding's gradient that a block has to save: they are not multiplied, but zeroed, written, read."""
MAX_BLOCK_FRACTION = 0.75
"""Largest fraction of a weight that a block may be: selecting rows and columns takes time, too."""
MAX_COPIED_COLUMNS = 1 / 3
"""Largest fraction of the columns of a layer's input that is kept for the backward pass as a copy, in place of all: the
three projections of an attention, which have one input, keep no more than that."""

_WEIGHT_GRADIENT: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: grad.conv1d_weight,
    nn.Conv2d: grad.conv2d_weight,
    nn.Conv3d: grad.conv3d_weight,
}


class WeightUses:
    """Counts how often a step applies each layer's weight, in forward passes between `listen` and `stop`.

    A weight is used once for each sample, token or pixel of the output. With n uses, the gradient of a weight of p
    elements takes n·p multiply-adds. Only layers are counted whose weight's gradient can be computed in a block on its
    own. An embedding looks rows up and multiplies nothing: 0 uses.

    Args:
        module: the module that is trained.
        parameters: the parameters to count, by name.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Parameter]) -> None:
        names = {id(p): name for name, p in parameters.items()}
        self._layers = {
            layer: name
            for layer in _modules.uncompiled(module)
            if has_blocks(layer) and (name := names.get(id(_torch.own_parameter(layer, "weight"))))
        }
        self._handles: list[RemovableHandle] = []
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightUses":
        """Return itself, so that a module can be copied while hooks are on its layers.

        ``copy.deepcopy`` copies a layer's hooks, and with a bound method the object behind it: here all layers once
        more. The copied hook keeps this object instead, which does not know the copied layer and ignores it.
        """
        return self

    @property
    def names(self) -> list[str]:
        """Names of the weights that are counted."""
        return list(dict.fromkeys(self._layers.values()))

    @property
    def uses_per_step(self) -> dict[str, int]:
        """Number of uses by name of the weight; empty if the step computed gradients of gradients."""
        return {} if self._has_double_backward else dict(self._uses)

    def clear(self) -> None:
        """Start again at 0."""
        self._uses: dict[str, int] = {}
        self._has_double_backward = False

    def listen(self) -> None:
        """Count in forward passes from now on."""
        self.stop()
        self._handles = [layer.register_forward_hook(self._count) for layer in self._layers]

    def stop(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        name = self._layers.get(layer)  # None: a copy of the layer
        if name and isinstance(output, Tensor) and output.requires_grad:
            weight = layer.get_parameter("weight")
            uses = 0 if isinstance(layer, nn.Embedding) else output.numel() // len(weight)
            self._uses[name] = self._uses.get(name, 0) + uses
            output.register_hook(self._notice_double_backward)

    def _notice_double_backward(self, gradient: Tensor) -> None:
        self._has_double_backward |= torch.is_grad_enabled()


class Block:
    """The smallest block of rows and columns of a weight that contains all live elements.

    Rows are outputs, columns inputs; those of a convolution are channels with their whole kernels. The rows of an
    embedding are what it looks up.

    Args:
        frozen: bool (*weight.shape), True = held constant.
    """

    def __init__(self, frozen: Tensor) -> None:
        live = ~frozen.reshape(*frozen.shape[:2], -1)  # (outputs, inputs, kernel)
        rows, columns = live.any(2).any(1), live.any(2).any(0)
        self.shape = (int(rows.sum()), int(columns.sum()), *frozen.shape[2:])
        self.rows = None if rows.all() else rows.nonzero().squeeze(1)
        self.columns = None if columns.all() else columns.nonzero().squeeze(1)
        inside = live[rows][:, columns].flatten()
        short = torch.int32 if len(inside) < 2**31 else torch.int64
        self.index = None if inside.all() else inside.nonzero().squeeze(1).to(short)
        """Flat indices of the live elements in the block; None: all of the block is live."""
        self.numel = math.prod(self.shape)
        self._weight_shape = frozen.shape
        self.axis = 1 - frozen.dim()
        """Axis of the channels in a layer's input and output, with or without a batch axis.

        Counted from the end it is the last axis for a linear layer, and for a convolution the one before its spatial
        axes. A weight has two axes more than there are spatial ones, so the axis is 1 - weight.dim() for both.
        """

    def needed(self, layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what to keep of a layer's input for `gradient`: a copy of its live columns, or all of it.

        All of it, if the copy would not be much smaller, or if the input stays in memory anyway: convolutions keep it
        themselves, and operations such as ReLU need their own output in their backward pass.

        Args:
            layer: one that `has_blocks`.
            x: its input.
            dtype: of its output; under autocast the layer computes in it.
        """
        if self.columns is None or len(self.columns) > MAX_COPIED_COLUMNS * self._weight_shape[1]:
            return x
        if not isinstance(layer, nn.Linear) or _torch.keeps_own_result(x):
            return x
        return x.index_select(self.axis, self.columns).to(dtype)

    def gradient(self, layer: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """Compute the block of the weight's gradient.

        Args:
            layer: one that `has_blocks`.
            x: what is `needed` of the layer's input.
            delta: the gradient of the layer's output.

        Returns:
            The gradient, of shape `shape`.
        """
        if isinstance(layer, nn.Embedding):
            return self._gradient_of_table(layer, x, delta)
        x = x.to(delta.dtype)  # under autocast the layer has done so, too
        if self.rows is not None:
            delta = delta.index_select(self.axis, self.rows)
        if self.columns is not None and x.shape[self.axis] > len(self.columns):
            x = x.index_select(self.axis, self.columns)
        if isinstance(layer, nn.Linear):
            return delta.reshape(-1, delta.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        assert isinstance(layer, _modules.Convolution)
        if x.dim() < len(self.shape):
            x, delta = x[None], delta[None]
        weight_gradient = _WEIGHT_GRADIENT[type(layer)]
        return weight_gradient(x, self.shape, delta, layer.stride, layer.padding, layer.dilation, 1)

    def _gradient_of_table(self, layer: nn.Embedding, index: Tensor, delta: Tensor) -> Tensor:
        row = index.flatten()
        if self.rows is not None:
            place = torch.full(self._weight_shape[:1], -1, device=row.device)
            place[self.rows] = torch.arange(len(self.rows), device=row.device)
            row = place[row]
        is_live = row >= 0 if layer.padding_idx is None else (row >= 0) & (index.flatten() != layer.padding_idx)
        delta = delta.reshape(-1, delta.shape[-1])[is_live]
        delta = delta if self.columns is None else delta.index_select(1, self.columns)
        return delta.new_zeros(self.shape).index_add_(0, row[is_live], delta)

    def live(self, gradient: Tensor) -> Tensor:
        """Return the live elements of the block's gradient, flat, in the order of the weight."""
        return gradient.flatten() if self.index is None else gradient.flatten().index_select(0, self.index)

    def embedded(self, gradient: Tensor) -> Tensor:
        """Return the block's gradient in a tensor of the weight's shape, zero outside of the block."""
        full = gradient.new_zeros(self._weight_shape)
        rows = torch.arange(self._weight_shape[0], device=full.device) if self.rows is None else self.rows
        if self.columns is None:
            return full.index_copy_(0, rows, gradient)
        full[rows[:, None], self.columns] = gradient
        return full


def small_blocks(parameters: Mapping[str, Parameter], frozen: Named, names: Collection[str]) -> dict[str, Block]:
    """Return the blocks of partly frozen weights that are small enough; see `MAX_BLOCK_FRACTION`.

    Weights with hooks of their own have no block: the hooks expect the whole gradient.

    Args:
        parameters: the parameters, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant.
        names: of the weights that `WeightUses` counts; others have no block.
    """
    partly = {
        name: mask
        for name, mask in frozen.items()
        if name in names and mask.any() and not mask.all() and not _torch.has_gradient_hooks(parameters[name])
    }
    blocks = {name: Block(mask) for name, mask in partly.items()}
    return {n: block for n, block in blocks.items() if block.numel <= MAX_BLOCK_FRACTION * partly[n].numel()}


def worth_it(
    blocks: Mapping[str, Block], parameters: Mapping[str, Parameter], uses_per_step: Mapping[str, int]
) -> dict[str, Block]:
    """Return the blocks that save enough; see `MIN_SAVED_MACS` and `MIN_SAVED_ELEMENTS`.

    Args:
        blocks: by name of the weight.
        parameters: by name.
        uses_per_step: what `WeightUses` counted, by name of the weight; other weights have no block.
    """
    found = {}
    for name, block in blocks.items():
        saved, uses = parameters[name].numel() - block.numel, uses_per_step.get(name)
        if uses is not None and (uses * saved >= MIN_SAVED_MACS or (uses == 0 and saved >= MIN_SAVED_ELEMENTS)):
            found[name] = block
    return found


def is_large(macs: int) -> bool:
    """Return whether any block of up to three quarters saves enough, of a gradient of so many multiply-adds a step."""
    return macs >= 4 * MIN_SAVED_MACS


def worth_cutting(parameters: Mapping[str, Parameter], uses_per_step: Mapping[str, int]) -> dict[str, int]:
    """Return the uses of those weights of which a block could save enough, whatever froze; see `MIN_SAVED_MACS`."""
    return {
        name: uses
        for name, uses in uses_per_step.items()
        if (p := parameters.get(name)) is not None
        and is_large(uses * p.numel())
        and not is_sharded(p)
        and not _torch.has_gradient_hooks(p)
    }


def blocks_worth_it(
    parameters: Mapping[str, Parameter], frozen: Named, uses_per_step: Mapping[str, int]
) -> dict[str, Block]:
    """Return the blocks that are small enough and save enough; see `small_blocks` and `worth_it`."""
    return worth_it(small_blocks(parameters, frozen, uses_per_step), parameters, uses_per_step)


def has_blocks(layer: nn.Module) -> bool:
    """Return whether a block of the layer's weight gradient can be computed on its own.

    True for linear layers, plain convolutions and embeddings, by exact type: a subclass may compute something else.
    """
    if "forward" in vars(layer):  # patched
        return False
    if type(layer) in _WEIGHT_GRADIENT:
        assert isinstance(layer, _modules.Convolution)
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if type(layer) is nn.Embedding:
        return layer.max_norm is None and not (layer.sparse or layer.scale_grad_by_freq)
    return type(layer) is nn.Linear

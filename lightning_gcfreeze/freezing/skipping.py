"""GradientSkipper: what froze as a whole stops costing.

A wholly frozen parameter needs no gradient, and what lies before the first live one no backward pass at all. Where
output neurons or inputs of a layer froze as a whole (rows or columns of its weight), the product that makes the
weight's gradient is taken of the others alone: of the smallest block of rows and columns that holds all live elements.

Nothing else changes: forward passes, the gradients of activations and the values of all live elements' gradients, but
for rounding. Weights are frozen by `Compact` or `Restore`, whatever is promoted.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter, grad
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze import _modules
from lightning_gcfreeze._types import Named

WORTH = 2**22
"""Multiply-adds that a block has to save in each step; with fewer its hooks cost more."""
MOST = 0.75
"""How much of a weight a block may be: to pick rows and columns out, and to compute them apart, costs, too."""

_WEIGHT_GRADIENT: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: grad.conv1d_weight,
    nn.Conv2d: grad.conv2d_weight,
    nn.Conv3d: grad.conv3d_weight,
}


class WeightUses:
    """Counts at how many places of the batch each layer's weight is applied, in passes from `listen` to `stop`.

    A place is a sample, a token, a pixel of the output: with n of them, the gradient of a weight of p elements takes
    n·p multiply-adds. Counted are linear layers and convolutions whose weight's gradient can be had in part.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Parameter]) -> None:
        names = {id(p): name for name, p in parameters.items()}
        self._layers = {
            layer: name
            for layer in _modules.uncompiled(module)
            if _has_block(layer) and (name := names.get(id(layer._parameters.get("weight"))))
        }
        self._handles: list[RemovableHandle] = []
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightUses":
        """A copy of the module that is made during a pass takes the hooks along: its layers are not counted."""
        return self

    @property
    def counts(self) -> dict[str, int]:
        """By name of the weight; nothing where gradients of gradients were asked for."""
        return {} if self._twice else dict(self._counts)

    def clear(self) -> None:
        """Begin again at 0."""
        self._counts: dict[str, int] = {}
        self._twice = False

    def listen(self) -> None:
        """Count in forward passes to come."""
        self.stop()
        self._handles = [layer.register_forward_hook(self._count) for layer in self._layers]

    def stop(self) -> None:
        """Count no further pass."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        name = self._layers.get(layer)  # None: a copy of the layer
        if name and isinstance(output, Tensor) and output.requires_grad:
            weight = layer.get_parameter("weight")
            self._counts[name] = self._counts.get(name, 0) + output.numel() // len(weight)
            output.register_hook(self._look)

    def _look(self, gradient: Tensor) -> None:
        self._twice |= torch.is_grad_enabled()


class Block:
    """The smallest block of rows and columns of a weight that holds all live elements.

    Rows are outputs, columns inputs; of a convolution, channels with their whole kernels.

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
        self.index = None if inside.all() else inside.nonzero().squeeze(1)  # of the live elements in the block
        self.numel = math.prod(self.shape)
        self._size = frozen.shape
        self.axis = 1 - frozen.dim()  # of the channels of inputs and outputs, in batches and single samples

    def gradient(self, layer: nn.Module, x: Tensor, delta: Tensor) -> Tensor:
        """The weight's gradient in the block.

        Args:
            x: the layer's input.
            delta: the gradient of its output.
        """
        x = x.to(delta.dtype)  # under autocast the layer has done so, too
        if self.rows is not None:
            delta = delta.index_select(self.axis, self.rows)
        if self.columns is not None:
            x = x.index_select(self.axis, self.columns)
        if isinstance(layer, nn.Linear):
            return delta.reshape(-1, delta.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        assert isinstance(layer, _modules.Convolution)
        if x.dim() < len(self.shape):
            x, delta = x[None], delta[None]
        of_weight = _WEIGHT_GRADIENT[type(layer)]
        return of_weight(x, self.shape, delta, layer.stride, layer.padding, layer.dilation, 1)

    def live(self, gradient: Tensor) -> Tensor:
        """Its live elements, flat, in the order of the weight's."""
        return gradient.flatten() if self.index is None else gradient.flatten().index_select(0, self.index)

    def embedded(self, gradient: Tensor) -> Tensor:
        """In a tensor of the weight's shape, zero outside the block."""
        full = gradient.new_zeros(self._size)
        rows = torch.arange(self._size[0], device=full.device) if self.rows is None else self.rows
        if self.columns is None:
            return full.index_copy_(0, rows, gradient)
        full[rows[:, None], self.columns] = gradient
        return full


def blocks_worth_it(
    parameters: Mapping[str, Parameter], frozen: Named, positions: Mapping[str, int]
) -> dict[str, Block]:
    """The blocks of partly frozen weights that are smaller than `MOST` of them, and save `WORTH` in each step.

    Weights with hooks of their own have none: the hooks want to see the whole gradient.

    Args:
        parameters: by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant.
        positions: what `WeightUses` counted; weights without a count have no block.
    """
    partly = {
        name: mask
        for name, mask in frozen.items()
        if name in positions
        and mask.any()
        and not mask.all()
        and not (parameters[name]._backward_hooks or parameters[name]._post_accumulate_grad_hooks)
    }
    blocks = {name: Block(mask) for name, mask in partly.items()}
    sizes = {name: mask.numel() for name, mask in partly.items()}
    return {
        name: block
        for name, block in blocks.items()
        if block.numel <= MOST * sizes[name] and positions[name] * (sizes[name] - block.numel) >= WORTH
    }


class _WeightGradient(torch.autograd.Function):
    """Leaves a layer's output as it is, and makes the gradient of its weight, which the layer itself took for granted.

    In place, so that the output is no view: what follows may change it in place as it could before.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, target: Tensor, bias: Tensor | None, layer: nn.Module, block: Block
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.block, ctx.live_alone = layer, block, target.dim() == 1
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Gradients of gradients cannot be taken where the product for a weight's gradient was shortened, and"
                " in the step before the freeze none were. Use GradCovFreezeCallback(..., promote=False)."
            )
        of_target = of_bias = None
        if ctx.needs_input_grad[2]:
            (x,) = ctx.saved_tensors
            gradient = ctx.block.gradient(ctx.layer, x, delta)
            of_target = ctx.block.live(gradient) if ctx.live_alone else ctx.block.embedded(gradient)
        if ctx.needs_input_grad[3]:
            channels = delta.dim() + ctx.block.axis
            of_bias = delta.sum([axis for axis in range(delta.dim()) if axis != channels])
        return delta, None, of_target, of_bias, None, None


class _Shortened:
    """A layer's hooks: the forward pass takes the weight for a constant, and `_WeightGradient` makes its gradient.

    A copy of the layer with other weights (an average of them, one for a functional call) is left alone.
    """

    def __init__(self, layer: nn.Module, weight: Parameter, block: Block, target: Callable[[], Tensor]) -> None:
        self._layer, self._weight, self._block, self._target = layer, weight, block, target
        self._replaced: dict[str, Parameter] = {}  # by constants, during the forward pass
        self.handles = [
            layer.register_forward_pre_hook(_LayerHook(self.before)),
            layer.register_forward_hook(_LayerHook(self.after), prepend=True, with_kwargs=True, always_call=True),
        ]

    def before(self, layer: nn.Module, inputs: Any) -> None:
        if layer._parameters["weight"] is self._weight and self._weight.requires_grad and _is_recorded():
            self._replaced = {"weight": self._weight}
            bias = layer._parameters.get("bias")
            if isinstance(layer, _modules.Convolution) and bias is not None and bias.requires_grad:
                self._replaced["bias"] = bias  # a convolution that makes its gradient makes the whole weight's as well
            for name, p in self._replaced.items():
                layer._parameters[name] = p.detach()  # type: ignore[assignment]

    def after(self, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        replaced, self._replaced = self._replaced, {}
        layer._parameters.update(replaced)
        if not replaced or not isinstance(output, Tensor):  # none is there after an error
            return None
        x = inputs[0] if inputs else keywords["input"]
        return _WeightGradient.apply(output, x, self._target(), replaced.get("bias"), layer, self._block)

    def release(self) -> None:
        """Let go of the layer, also if it was left in the middle of a forward pass."""
        for handle in self.handles:
            handle.remove()
        self._layer._parameters.update(self._replaced)


def _is_recorded() -> bool:
    """Whether a forward pass is for an ordinary backward pass: not for a trace, nor for torch.func or forward mode."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    other = forward_mode or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not other


class _Absent(torch.autograd.Function):
    """A number that depends on parameters, and has no gradient for them."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class GradientSkipper:
    """Spares the training steps of a module what its frozen parameters do not need, until `release`.

    Args:
        module: the module that is trained.
        parameters: of it, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant.
        blocks: by name of a weight, the part of its gradient that is to be computed; see `blocks_worth_it`.
        leaf: name of a weight -> its live elements, flat, in whose ``grad`` those of its gradient are wanted; None:
            they are wanted in the weight's own ``grad``, in their places.
        reducer_waits: DistributedDataParallel expects to hear of every parameter in every backward pass.
        lets_go: whether wholly frozen parameters may be without a gradient. To an optimizer that does not treat every
            element by itself, that may mean something else than a gradient of zeros.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Parameter],
        frozen: Named,
        blocks: Mapping[str, Block],
        leaf: Callable[[str], Tensor] | None = None,
        reducer_waits: bool = False,
        lets_go: bool = True,
    ) -> None:
        self._shortened: list[_Shortened] = []
        self._module = module
        frozen = frozen if lets_go else {}
        whole = {n: parameters[n] for n, mask in frozen.items() if mask.all() and parameters[n].requires_grad}
        self._stop_gradients(whole, module, reducer_waits)
        layers = [layer for layer in _modules.uncompiled(module) if _has_block(layer)]
        for name, block in blocks.items():
            weight = parameters[name]
            target = (lambda weight=weight: weight) if leaf is None else functools.partial(leaf, name)
            for layer in layers:
                if layer._parameters.get("weight") is weight:
                    self._shortened.append(_Shortened(layer, weight, block, target))

    def begin_backward(self, loss: Tensor) -> None:
        """Tell the reducer that the parameters without a gradient have come. Before every backward pass.

        A loss that depends on wholly frozen parameters alone has a backward pass all the same: of no effect.
        """
        if self.without_gradient and not loss.requires_grad:
            loss.requires_grad_()
        if self._absent is not None:
            self._absent.backward(retain_graph=True)

    def release(self) -> None:
        """Let all parameters have gradients again."""
        for layer in self._shortened:
            layer.release()
        for p in self.without_gradient.values():
            p.requires_grad_(True)
        self._absent = None
        if self.without_gradient and _modules.has_compiled(self._module):
            torch.compiler.reset()  # compiled code does not notice (pytorch#139476)

    def _stop_gradients(self, whole: dict[str, Parameter], module: nn.Module, reducer_waits: bool) -> None:
        """Wholly frozen parameters require none."""
        self.without_gradient = whole
        self._absent = _Absent.apply(*whole.values()) if whole and reducer_waits else None
        for p in whole.values():
            p.requires_grad_(False)
            p.grad = None
        if whole and _modules.has_compiled(module):
            torch.compiler.reset()  # compiled code does not notice (pytorch#139476)


def _has_block(layer: nn.Module) -> bool:
    """Whether it is a linear map whose weight's gradient can be had in part; by exact type, see `rules`."""
    if "forward" in vars(layer):  # patched
        return False
    if type(layer) in _WEIGHT_GRADIENT:
        assert isinstance(layer, _modules.Convolution)
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


class _LayerHook:
    """One of `_Shortened`. A copy of the module takes it along, where it rests; a pickle does not."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LayerHook":
        return self

    def __reduce__(self) -> Any:
        return _Nothing, ()

    @property
    def __name__(self) -> str:
        raise RuntimeError(  # `torch.jit.script` asks for it, to compile the hook
            "A layer whose weight's gradient is computed in part cannot be scripted during training. Script the module"
            " after `fit`, use `torch.jit.trace`, or pass GradCovFreezeCallback(..., promote=False)."
        )


class _Nothing:
    """What a layer's hook becomes in a pickled module."""

    def __call__(self, *args: Any) -> None: ...

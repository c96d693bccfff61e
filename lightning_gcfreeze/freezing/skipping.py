"""`GradientSkipper`: skip gradient work for fully frozen weights, rows and columns.

A fully frozen parameter needs no gradient, and what lies before the first live parameter needs no backward pass at all.
Where output neurons or inputs of a layer are fully frozen (rows or columns of its weight), only a block of the weight's
gradient is computed: the smallest block of rows and columns that contains all live elements.

Nothing else changes: forward passes, gradients of activations and gradients of live elements are the same except for
rounding. `Compact` or `Restore` hold the frozen values, whatever is skipped here.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_gcfreeze import _modules, _torch
from lightning_gcfreeze.freezing.blocks import Block, has_blocks


class GradientSkipper:
    """Skips gradient work that frozen parameters do not need, in the training steps of a module, until `release`.

    Args:
        module: the module that is trained.
        parameters: parameters of the module, by name.
        fully_frozen: names of parameters that no gradient is computed for: all of their elements are frozen, of sharded
            ones on all processes. Leave them out if the optimizer does not treat every element on its own: no gradient
            may mean something else to it than a gradient of zeros.
        blocks: the block of the weight's gradient to compute, by name of the weight; see `blocks_worth_it`.
        leaf: returns, for the name of a weight, a flat leaf of its live elements that receives their gradient; None:
            the gradient goes to the weight's own ``grad``, zero outside of the block.
        announce_unused: announce parameters without a gradient to autograd before each backward pass, as
            DistributedDataParallel expects without ``find_unused_parameters``.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Parameter],
        fully_frozen: Collection[str],
        blocks: Mapping[str, Block],
        leaf: Callable[[str], Tensor] | None = None,
        announce_unused: bool = False,
    ) -> None:
        self._module = module
        self.without_gradient = {n: parameters[n] for n in fully_frozen if parameters[n].requires_grad}
        """Fully frozen parameters that require no gradient until `release`, by name."""
        unused = self.without_gradient.values() if announce_unused else ()
        self._unused = _AnnounceUnused.apply(*unused) if unused else None
        for p in self.without_gradient.values():
            p.requires_grad_(False)
            p.grad = None
        self._recompile()
        self._parameters, self._leaf = parameters, leaf
        self._hooks: list[_BlockGradientHooks] = []
        self.skip_outside_of(blocks)

    def skip_outside_of(self, blocks: Mapping[str, Block]) -> None:
        """Compute only these blocks of weights' gradients from now on, by name of the weight."""
        layers = [layer for layer in _modules.uncompiled(self._module) if has_blocks(layer)]
        for name, block in blocks.items():
            weight = self._parameters[name]
            target = (lambda weight=weight: weight) if self._leaf is None else functools.partial(self._leaf, name)
            own = [layer for layer in layers if _torch.own_parameter(layer, "weight") is weight]
            self._hooks += [_BlockGradientHooks(layer, weight, block, target) for layer in own]

    def begin_backward(self, loss: Tensor) -> None:
        """Prepare a backward pass; call before every one.

        Announces parameters without a gradient, and gives a loss that depends only on frozen parameters a backward
        pass without effect.
        """
        if self.without_gradient and not loss.requires_grad:
            loss.requires_grad_()
        if self._unused is not None:
            self._unused.backward(retain_graph=True)

    def release(self) -> None:
        """Let all parameters have gradients again."""
        for hooks in self._hooks:
            hooks.release()
        for p in self.without_gradient.values():
            p.requires_grad_(True)
        self._unused = None
        self._recompile()

    def _recompile(self) -> None:
        """Compile again after ``requires_grad`` has changed: compiled code does not notice (pytorch#139476)."""
        if self.without_gradient and _modules.has_compiled(self._module):
            torch.compiler.reset()


class _BlockGradientHooks:
    """Hooks on a layer: the forward pass takes the weight as a constant, and `_BlockGradient` computes its gradient.

    A copy of the layer with other weights, for instance an average of them or a functional call, is not affected.

    Args:
        layer: a layer that `has_blocks`.
        weight: its weight.
        block: the block of the weight's gradient to compute.
        target: returns the tensor that receives the gradient: the weight, or a flat leaf of its live elements.
    """

    def __init__(self, layer: nn.Module, weight: Parameter, block: Block, target: Callable[[], Tensor]) -> None:
        self._layer, self._weight, self._block, self._target = layer, weight, block, target
        self._replaced: dict[str, Tensor] = {}  # parameters, while the forward pass has constants in their place
        self._handles = [
            layer.register_forward_pre_hook(_LayerHook(self._before)),
            layer.register_forward_hook(_LayerHook(self._after), prepend=True, with_kwargs=True, always_call=True),
        ]

    def release(self) -> None:
        """Remove the hooks, also if the layer was left in the middle of a forward pass."""
        for handle in self._handles:
            handle.remove()
        _torch.replace_parameters(self._layer, self._replaced)

    def _before(self, layer: nn.Module, inputs: Any) -> None:
        own = _torch.own_parameter(layer, "weight") is self._weight
        if own and self._weight.requires_grad and _torch.is_ordinary_autograd():
            self._replaced = {"weight": self._weight}
            bias = _torch.own_parameter(layer, "bias")
            if isinstance(layer, _modules.Convolution) and bias is not None and bias.requires_grad:
                # A convolution that computes its bias's gradient computes the whole weight's as well.
                self._replaced["bias"] = bias
            _torch.replace_parameters(layer, {name: p.detach() for name, p in self._replaced.items()})

    def _after(self, layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        replaced, self._replaced = self._replaced, {}
        _torch.replace_parameters(layer, replaced)
        if not replaced or not isinstance(output, Tensor):  # after an error there is no output
            return None
        x = inputs[0] if inputs else keywords["input"]
        return _BlockGradient.apply(output, x, self._target(), replaced.get("bias"), layer, self._block)


class _BlockGradient(torch.autograd.Function):
    """Returns a layer's output as it is; computes a block of the gradient of the weight, and the bias's gradient.

    In place, so that the output is no view: later operations may change it in place as they could before.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, target: Tensor, bias: Tensor | None, layer: nn.Module, block: Block
    ) -> Tensor:
        ctx.save_for_backward(block.needed(layer, x, output.dtype))
        ctx.layer, ctx.block, ctx.is_flat = layer, block, target.dim() == 1
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"Gradients of gradients are not available for the weight of this {type(ctx.layer).__name__} layer:"
                " only a block of its gradient is computed, because the step before the freeze or, with given masks,"
                " the first step took no gradients of gradients. Use"
                " GradCovFreezeCallback(..., skip_frozen_gradients=False)."
            )
        target_grad = bias_grad = None
        if ctx.needs_input_grad[2]:
            (x,) = ctx.saved_tensors
            gradient = ctx.block.gradient(ctx.layer, x, delta)
            target_grad = ctx.block.live(gradient) if ctx.is_flat else ctx.block.embedded(gradient)
        if ctx.needs_input_grad[3]:
            channels = delta.dim() + ctx.block.axis
            bias_grad = delta.sum([axis for axis in range(delta.dim()) if axis != channels])
        return delta, None, target_grad, bias_grad, None, None


class _AnnounceUnused(torch.autograd.Function):
    """Returns a zero that depends on parameters; its backward pass runs their hooks, without a gradient."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _LayerHook:
    """A hook of `_BlockGradientHooks`. Deep copies of the layer share it, see `WeightUses`; pickles drop it."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        return self._hook(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_LayerHook":
        return self

    def __reduce__(self) -> Any:
        return _Unhooked, ()

    @property
    def __name__(self) -> str:
        raise RuntimeError(  # `torch.jit.script` asks for the name, to compile the hook
            "A layer of which only a block of the weight's gradient is computed cannot be scripted during training."
            " Script the module after `fit`, use `torch.jit.trace`, or pass"
            " GradCovFreezeCallback(..., skip_frozen_gradients=False)."
        )


class _Unhooked:
    """What a hook of `_BlockGradientHooks` becomes in a pickled module: a hook that does nothing."""

    def __call__(self, *args: Any) -> None: ...

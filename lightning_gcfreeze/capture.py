"""g_1 by capture: from the batch's own forward and backward pass, without a second one.

A layer's forward hook keeps the first sample of its input, a hook on its output the first sample of the gradient that
comes back: 1/S of the activations. The layer's rule makes the parameters' gradients of the two; see `rules`.

What is captured is the first sample's share of the batch's gradient. That it is 1/S of the gradient of its own loss
holds if the loss is the mean over samples that do not interact; whether it is, `first_gradient` finds out.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze import gradients, rules


class _Seen(NamedTuple):
    """A layer's view of the first sample."""

    x: Tensor
    deltas: list[Tensor | None]  # one for each tensor that it returned


class Capture:
    """Watches the layers that own parameters, from `listen` to `gradients`.

    Seen are layers that are called once, with one tensor of all S samples, and return one such tensor or several. The
    parameters of other layers, of compiled ones, those that two layers own, and a module's own ones beside submodules
    are not; `gradients` leaves them out.

    Args:
        module: contains the layers.
        parameters: by name, those whose gradient is wanted.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Parameter]) -> None:
        names = {id(p): name for name, p in parameters.items()}
        owners = Counter(id(p) for layer in module.modules() for p in layer._parameters.values())
        self._layers: dict[nn.Module, dict[str, str]] = {}  # layer -> own name of a parameter -> its name
        for layer in _uncompiled(module):
            own = {n: names[id(p)] for n, p in layer._parameters.items() if id(p) in names and owners[id(p)] == 1}
            if own and rules.applies(layer):
                self._layers[layer] = own
        self._hooks: list[RemovableHandle] = []
        self._size = 0
        self._seen: dict[nn.Module, _Seen | None] = {}  # None: not as it has to be
        self.tolerance: dict[str, float] = {}
        """How far, relatively, rounding may take the gradients found last from those of another way to compute them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Capture":
        """A copy of the module that is made during a pass takes the hooks along: they know the layers, and rest."""
        return self

    def listen(self, size: int) -> None:
        """Forget what was seen, and watch the pass of S samples to come, not longer: some layers run otherwise then."""
        self.forget()
        self._size = size
        self._hooks = [layer.register_forward_hook(self._after_layer) for layer in self._layers]

    def stop(self) -> None:
        """Watch no further pass; what was seen stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def forget(self) -> None:
        """Watch nothing, and let go of what was seen."""
        self.stop()
        self._seen.clear()

    def begin_backward(self) -> None:
        """Gradients that came back so far were not the training step's, which might have asked for some itself."""
        for seen in self._seen.values() if self._hooks else ():  # without hooks it is a later batch's
            if seen is not None:
                seen.deltas[:] = [None] * len(seen.deltas)

    def gradients(self, factor: float = 1.0) -> dict[str, Tensor]:
        """The first sample's share of the batch's gradient, times `factor`, of the parameters that were seen."""
        self.stop()
        found: dict[str, Tensor] = {}
        for layer, seen in self._seen.items():
            if seen is not None and any(delta is not None for delta in seen.deltas):
                found.update(self._of_layer(layer, seen, factor))
        self._seen.clear()
        return found

    def _of_layer(self, layer: nn.Module, seen: _Seen, factor: float) -> dict[str, Tensor]:
        known = [delta for delta in seen.deltas if delta is not None]
        early = all(delta.dtype in (torch.float32, torch.float64) for delta in known)
        if early:  # they are smaller than what is made of them; in half precision they might leave its range
            for delta in known:
                delta.mul_(factor)
        rule = rules.for_layer(layer)
        try:
            with gradients.no_trace(layer) if rule is rules.of_any_layer else nullcontext():
                by_own_name = rule(layer, seen.x, *seen.deltas)
        except Exception:  # of this call alone: whatever it was, replay knows
            return {}
        found = {}
        for own, name in self._layers[layer].items():
            p = layer.get_parameter(own)
            if own in by_own_name and by_own_name[own].shape == p.shape and p.requires_grad:
                g = by_own_name[own].to(p.dtype)
                found[name] = g if early else g.mul_(factor)
                self.tolerance[name] = min(0.1, 3 * max(torch.finfo(delta.dtype).eps for delta in known) ** 0.5)
        return found

    def _after_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._hooks or layer not in self._layers:  # a copy of it
            return
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        outputs = rules.tensors(output)
        self._seen[layer] = None if layer in self._seen else self._look(layer, args, outputs)

    def _look(self, layer: nn.Module, args: tuple[Any, ...], outputs: list[Tensor]) -> _Seen | None:
        """The first sample, if the call is as it has to be."""
        if len(args) != 1 or not all(map(_is_plain, [*args, *outputs])) or not rules.takes(layer, args[0]):
            return None
        axes = [rules.sample_axis(layer, i) for i in range(len(outputs))]
        if args[0].shape[rules.sample_axis(layer)] != self._size or not outputs:
            return None  # of other samples, or of some of them
        if any(
            y.is_leaf or y.dim() <= axis or y.shape[axis] != self._size for y, axis in zip(outputs, axes, strict=True)
        ):
            return None
        seen = _Seen(rules.kept(layer, args[0], outputs[0]), [None] * len(outputs))
        for i, (y, axis) in enumerate(zip(outputs, axes, strict=True)):
            y.register_hook(partial(_keep, seen.deltas, i, axis))
        return seen


def _keep(deltas: list[Tensor | None], i: int, axis: int, delta: Tensor) -> None:
    """As a copy: a view would keep the gradient of the whole batch alive. Several backward passes add up."""
    first = delta.detach().narrow(axis, 0, 1).clone()
    known = deltas[i]
    deltas[i] = first if known is None else known + first


def _is_plain(value: Any) -> bool:
    """A tensor, no subclass, and not one that stands for many in `torch.vmap`."""
    return type(value) in (Tensor, Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(value)


def _uncompiled(module: nn.Module) -> Iterator[nn.Module]:
    """All modules inside, without those that `torch.compile` runs: its hooks would split their graphs."""
    if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
        return
    yield module
    for child in module.children():
        yield from _uncompiled(child)

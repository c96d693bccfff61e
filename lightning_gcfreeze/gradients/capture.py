"""Single samples' gradients by capture: from the batch's own forward and backward pass, without a second one.

A layer's forward hook keeps the first m samples of its input, a hook on its output those of the gradient that comes
back: of one sample that is 1/S of the activations. The layer's rule makes the parameters' gradients of the two; see
`rules`. Of many samples, a layer whose activations are larger than its parameters adds up the squared noise as soon as
its gradient is there, and lets go of them.

What is captured is a sample's share of the batch's gradient. That it is 1/S of the gradient of its own loss holds if
the loss is the mean over samples that do not interact; whether it is, `sample_gradients` finds out.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze import _modules
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import part
from lightning_gcfreeze.estimators.per_sample import PerSample, Summed, one_by_one, wide
from lightning_gcfreeze.gradients import isolation, layer_rules

_LITTLE = 2**19
"""So many numbers may be kept until the end of a pass: 2 MiB of float32."""


@dataclass
class _Seen:
    """A layer's view of the first m samples."""

    x: Tensor
    version: int | None  # of x, if it is no copy
    prepare: Callable[[Tensor], Tensor]
    deltas: list[Tensor | None]  # one for each tensor that it returned
    found: dict[str, PerSample] | None = None  # by own name, once the first of its parameters has its gradient

    @property
    def is_complete(self) -> bool:
        """Whether a gradient came back to the output, and the input is as it was."""
        unchanged = self.version is None or self.x._version == self.version
        return unchanged and any(delta is not None for delta in self.deltas)


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
        for layer in _modules.uncompiled(module):
            own = {n: names[id(p)] for n, p in layer._parameters.items() if id(p) in names and owners[id(p)] == 1}
            if own and layer_rules.applies(layer):
                self._layers[layer] = own
        self._parameters = parameters
        self._hooks: list[RemovableHandle] = []
        self._size = self._count = 0
        self._factors: Mapping[str, float] = {}
        self._early: dict[str, bool] = {}  # whose noise to add up in the pass -> if there was no gradient before it
        self._centred: Collection[str] = ()
        self._seen: dict[nn.Module, _Seen | None] = {}  # None: not as it has to be, or done with
        self._summed: dict[str, Summed] = {}
        self._memory: dict[tuple[Any, ...], Tensor] = {}  # taken again in each step

    def __deepcopy__(self, memo: dict[int, Any]) -> "Capture":
        """A copy of the module that is made during a pass takes the hooks along: they know the layers, and rest."""
        return self

    def listen(
        self, size: int, count: int, factors: Mapping[str, float] | None = None, centred: Collection[str] = ()
    ) -> None:
        """Forget what was seen, and watch the first samples in the pass to come.

        Args:
            size: S, of the pass.
            count: m, how many of them.
            factors: by name, those whose squared noise may be added up as soon as they have a gradient: of the shares
                times a factor, around ``p.grad`` as it is then.
            centred: of these, for which all S shares times the factor are known to have ``p.grad`` as their mean.
        """
        self.forget()
        self._size, self._count = size, min(size, count)
        self._early = {}
        self._factors, self._centred = factors or {}, centred if self._count == size else ()
        self._hooks = [layer.register_forward_hook(self._after_layer, with_kwargs=True) for layer in self._layers]

    def stop(self) -> None:
        """Watch no further pass; what was seen stays. Some layers run otherwise while they are watched."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def forget(self) -> None:
        """Watch nothing, and let go of what was seen."""
        self.stop()
        self._seen.clear()
        self._summed.clear()

    def release(self) -> None:
        """Let go of the memory, too."""
        self.forget()
        self._memory.clear()

    def begin_backward(self) -> None:
        """Gradients that came back so far were not the training step's, which might have asked for some itself."""
        if not self._hooks:  # it is a later batch's
            return
        for seen in self._seen.values():
            if seen is not None:
                seen.deltas[:] = [None] * len(seen.deltas)
        self._summed.clear()
        self._early = {name: self._parameters[name].grad is None for name in self._early}

    def shares(self) -> Iterator[tuple[str, Tensor, float]]:
        """The first sample's share of the batch's gradient, by one parameter that was seen after the other.

        Of sharded parameters the local parts.

        Yields:
            Its name, a tensor like it, and how far, relatively, rounding may take that from the same gradient computed
            otherwise. What was seen stays.
        """
        for layer, seen in self._complete():
            narrowest = max(torch.finfo(delta.dtype).eps for delta in seen.deltas if delta is not None)
            for own, g in self._of_layer(layer, seen, slice(0, 1)).items():
                if (name := self._layers[layer].get(own)) is not None:
                    p = self._parameters[name]
                    yield name, part(p, g.dense(1)[0].to(p.dtype)), min(0.1, 3 * narrowest**0.5)

    def gradients(
        self, factors: Mapping[str, float], g_batch: Named, singly: bool, of_sums: float = 1.0
    ) -> dict[str, PerSample]:
        """The samples' shares of the batch's gradient times a factor, by the parameters that were seen. Forgets them.

        Args:
            factors: by name of the parameters wanted.
            g_batch: g_S.
            singly: whether each single one is needed, not only the sum of squared noise.
            of_sums: factor of the gradients whose squared noise was added up in the pass.
        """
        found: dict[str, PerSample] = {}
        for name in self._summed.keys() & factors.keys():
            found[name] = self._summed[name]
            found[name].scale_(of_sums)
        for layer, seen in self._complete():
            wanted = {own: name for own, name in self._layers[layer].items() if name in factors and name not in found}
            whole = not any(isinstance(self._parameters[name], DTensor) for name in wanted.values())
            if wanted and whole and layer_rules.for_layer(layer) is not layer_rules.of_any_layer:
                of_layer = self._of_layer(layer, seen, slice(0, self._count))
                for own, name in wanted.items():
                    if own in of_layer:
                        found[name] = of_layer[own]
                        found[name].scale_(factors[name])
            elif wanted:
                singles = self._singles(layer, seen, {name: (own, factors[name]) for own, name in wanted.items()})
                found.update(one_by_one(singles, g_batch, singly or self._count == 1))
        self.forget()
        return found

    def _complete(self) -> Iterator[tuple[nn.Module, _Seen]]:
        for layer, seen in self._seen.items():
            if seen is not None and seen.is_complete:
                yield layer, seen

    def _singles(
        self, layer: nn.Module, seen: _Seen, wanted: Mapping[str, tuple[str, float]]
    ) -> Iterator[dict[str, Tensor]]:
        """The gradients of one sample after the other, times a factor."""
        for i in range(self._count):
            g = self._of_layer(layer, seen, slice(i, i + 1))
            yield {
                name: part(self._parameters[name], g[own].dense()[0] * factor)
                for name, (own, factor) in wanted.items()
                if own in g
            }

    def _of_layer(self, layer: nn.Module, seen: _Seen, samples: slice) -> dict[str, PerSample]:
        """By own name of those parameters that require a gradient."""
        start, length = samples.start, samples.stop - samples.start
        x, deltas = seen.x, seen.deltas
        if length < self._count:
            x = x.narrow(layer_rules.sample_axis(layer), start, length)
            deltas = [
                None if delta is None else delta.narrow(layer_rules.sample_axis(layer, i), start, length)
                for i, delta in enumerate(seen.deltas)
            ]
        x = seen.prepare(x)
        rule = layer_rules.for_layer(layer)
        try:
            if rule is layer_rules.of_any_layer:
                with isolation.no_trace(layer):
                    found = rule(layer, x, *deltas)
            else:
                found = rule(layer, x, *deltas)
        except Exception:  # of this call alone: whatever it was, replay knows
            return {}
        return {own: g for own, g in found.items() if (p := layer._parameters.get(own)) is not None and p.requires_grad}

    def _after_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._hooks or layer not in self._layers:  # a copy of it
            return
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._seen[layer] = seen = None if kwargs or layer in self._seen else self._look(layer, args, output)
        if seen is None or not self._factors or layer_rules.for_layer(layer) is layer_rules.of_any_layer:
            return
        kept = seen.x.numel() + sum(y.numel() for y in layer_rules.tensors(output)) * self._count // self._size
        if kept <= max(_LITTLE, *(p.numel() for p in layer.parameters(recurse=False))):
            return
        for own, name in self._layers[layer].items():
            p = layer.get_parameter(own)
            if p.requires_grad and name in self._factors:
                self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._add_up, layer, own, name)))
                self._early[name] = False

    def _add_up(self, layer: nn.Module, own: str, name: str, p: Parameter) -> None:
        """The squared noise, in the middle of the backward pass, where ``p.grad`` is that of this pass alone."""
        seen = self._seen.get(layer)
        if seen is None or not self._early[name]:
            return
        if seen.found is None:
            seen.found = self._of_layer(layer, seen, slice(0, self._count)) if seen.is_complete else {}
        if own in seen.found:
            g = seen.found.pop(own)
            g.scale_(self._factors[name])
            squares = self._reused((name,), p.shape, wide(p.dtype), p.device).zero_()
            g.add_squared_noise_(squares, isolation.dense(p, p.grad), 1.0, name in self._centred)
            self._summed[name] = Summed(squares, g.count, in_batch=True)
        if not any(self._layers[layer].get(other) in self._factors for other in seen.found):
            self._seen[layer] = None

    def _reused(self, key: tuple[Any, ...], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that is the same in each step. Taken anew, it would lie between what comes and goes in a pass."""
        known = self._memory.get(key)
        if known is None or known.shape != shape or known.dtype != dtype or known.device != device:
            known = self._memory[key] = torch.empty(shape, dtype=dtype, device=device)
        return known

    def _copied(self, key: tuple[Any, ...], part: Tensor) -> Tensor:
        return self._reused(key, part.shape, part.dtype, part.device).copy_(part)

    def _look(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> _Seen | None:
        """The first samples, if the call is as it has to be."""
        outputs = [output] if type(output) is Tensor else layer_rules.tensors(output)
        if len(args) != 1 or not outputs or not _is_plain(x := args[0]) or not layer_rules.takes(layer, x):
            return None
        axis = layer_rules.sample_axis(layer)
        if x.shape[axis] != self._size:
            return None  # of other samples, or of some of them
        axes = [layer_rules.sample_axis(layer, i) for i in range(len(outputs))]
        for y, a in zip(outputs, axes, strict=True):
            if not _is_plain(y) or y.is_leaf or y.dim() <= a or y.shape[a] != self._size:
                return None
        whole = self._count == self._size
        x = x.detach() if whole else self._copied((layer,), x.detach().narrow(axis, 0, self._count))
        prepare = layer_rules.preparation(layer, args[0], outputs[0])
        seen = _Seen(x, x._version if whole else None, prepare, [None] * len(outputs))
        for i, (y, a) in enumerate(zip(outputs, axes, strict=True)):
            # The node stays the layer's own when its output is changed in place; a tensor's hooks cost more.
            keep = partial(self._keep, layer, seen.deltas, i, y.output_nr, a)
            y.grad_fn.register_prehook(keep)  # type: ignore[union-attr]  # y is no leaf
        return seen

    def _keep(
        self,
        layer: nn.Module,
        deltas: list[Tensor | None],
        i: int,
        number: int,
        axis: int,
        by_outputs: tuple[Tensor | None, ...],
    ) -> None:
        """Several backward passes add up. A part is copied: a view would keep the gradient of the whole batch alive."""
        delta = by_outputs[number]
        if delta is None:  # only another output of the same node has one
            return
        delta, known = delta.detach() if delta.requires_grad else delta, deltas[i]
        if self._count < self._size:
            delta = delta.narrow(axis, 0, self._count)
            if known is None:
                delta = self._copied((layer, i), delta)
        deltas[i] = delta if known is None else known + delta


def _is_plain(value: Any) -> bool:
    """A tensor, no subclass, and not one that stands for many in `torch.vmap`."""
    return type(value) in (Tensor, Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(value)

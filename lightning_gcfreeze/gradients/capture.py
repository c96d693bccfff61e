"""Per-sample gradients by capture: from the batch's own forward and backward pass, without an extra pass.

A layer's forward hook keeps the input of the first m samples, and a hook on its output the gradient that comes back to
them: for one sample that is 1/S of the activation memory. A rule (see `layer_rules`) turns the two into the gradients
of the layer's parameters. With many samples, a layer whose activations are larger than its parameters adds up the
squared noise during the backward pass, as soon as its gradient is there, and frees the activations.

A captured gradient is the *share* of a sample in the batch's gradient. The share is 1/S of the gradient of the sample's
own loss if the loss is a mean over samples that do not interact; `comparison` tests that.
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

from lightning_gcfreeze import _modules, _torch
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import part
from lightning_gcfreeze.estimators.per_sample import PerSample, SquaredNoise, Summed, one_by_one
from lightning_gcfreeze.estimators.scratch import wide
from lightning_gcfreeze.gradients import isolation, layer_rules
from lightning_gcfreeze.gradients.batch import dense

MAX_KEPT_NUMEL = 2**19
"""Elements of activations that a layer may keep until the end of the pass in any case: 2 MiB of float32."""


@dataclass
class _Call:
    """What was kept of a layer's call: the input of the first m samples, and the gradients that came back to them."""

    x: Tensor
    version: int | None  # of x when it was kept; None: x is a copy
    prepare: Callable[[Tensor], Tensor]
    deltas: list[Tensor | None]  # one for each tensor that the layer returned
    gradients: dict[str, PerSample] | None = None  # by own name, as soon as one parameter has its gradient

    @property
    def is_complete(self) -> bool:
        """Whether a gradient came back to the output, and the input is unchanged."""
        unchanged = self.version is None or _torch.version(self.x) == self.version
        return unchanged and any(delta is not None for delta in self.deltas)


class Capture:
    """Watches the layers that own parameters during one pass, from `watch` to `gradients`.

    A layer can be captured if it is called once, with one tensor that holds all S samples, and returns one such tensor
    or several. Not captured are parameters of other layers and of compiled ones, parameters that two layers own, and
    those of a module with submodules; `gradients` leaves them out.

    Args:
        module: contains the layers.
        parameters: by name, those whose gradients are required.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Parameter]) -> None:
        names = {id(p): name for name, p in parameters.items()}
        own = {m: dict(_torch.own_parameters(m)) for m in module.modules()}
        owners = Counter(id(p) for of_layer in own.values() for p in of_layer.values())
        self._layers: dict[nn.Module, dict[str, str]] = {}  # layer -> own name of a parameter -> its name
        for layer in _modules.uncompiled(module):
            found = {n: names[id(p)] for n, p in own[layer].items() if id(p) in names and owners[id(p)] == 1}
            if found and layer_rules.is_known(layer):
                self._layers[layer] = found
        self._parameters = parameters
        self._hooks: list[RemovableHandle] = []
        self._batch_size = self._n_samples = 0
        self._factors: Mapping[str, float] = {}
        self._mean_is_g_batch: Collection[str] = ()
        self._sum_in_backward: list[str] = []  # parameters whose squared noise is added up during the backward pass
        self._without_grad: set[str] = set()  # those of them that had no gradient when the backward pass began
        self._calls: dict[nn.Module, _Call | None] = {}  # None: it cannot be captured, or is done with
        self._squares: dict[str, Tensor] = {}  # what was added up
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Capture":
        """Return itself: a module that is copied during a pass takes the hooks along, which ignore unknown layers."""
        return self

    def watch(
        self,
        batch_size: int,
        n_samples: int,
        factors: Mapping[str, float] | None = None,
        mean_is_g_batch: Collection[str] = (),
    ) -> None:
        """Forget the last pass, and capture the first samples in the next one.

        Args:
            batch_size: S, the number of samples in the pass.
            n_samples: m, how many of them to capture.
            factors: by name of the parameters whose squared noise may be added up during the backward pass: what their
                shares are to be multiplied by. The noise is around ``p.grad`` as it is then.
            mean_is_g_batch: those of them for which the mean of all S shares times the factor is known to be
                ``p.grad``.
        """
        self.reset()
        self._batch_size, self._n_samples = batch_size, min(n_samples, batch_size)
        self._sum_in_backward, self._without_grad = [], set()
        self._factors = factors or {}
        self._mean_is_g_batch = mean_is_g_batch if self._n_samples == batch_size else ()
        self._hooks = [layer.register_forward_hook(self._after_layer, with_kwargs=True) for layer in self._layers]

    def remove_hooks(self) -> None:
        """Watch no further pass; what was captured stays. Some layers run otherwise while they have hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def reset(self) -> None:
        """Watch no further pass, and forget what was captured."""
        self.remove_hooks()
        self._calls.clear()
        self._squares.clear()

    def close(self) -> None:
        """Free the buffers, too."""
        self.reset()
        self._buffers.clear()

    def begin_backward(self) -> None:
        """Drop the gradients that came back so far: the training step itself asked for them."""
        if not self._hooks:  # this is a later micro-batch
            return
        for call in self._calls.values():
            if call is not None:
                call.deltas[:] = [None] * len(call.deltas)
        self._squares.clear()
        self._without_grad = {name for name in self._sum_in_backward if self._parameters[name].grad is None}

    def first_shares(self) -> dict[str, tuple[Callable[[], Tensor], float]]:
        """Return how to compute the first sample's share of the batch's gradient, by name of the captured parameters.

        Returns:
            A function that returns the share, shaped like the local part of the parameter; and the relative distance
            that rounding may put between the share and the same gradient computed otherwise. What was captured stays.
        """
        found: dict[str, tuple[Callable[[], Tensor], float]] = {}
        for layer, call in self._complete():
            narrowest = max(torch.finfo(delta.dtype).eps for delta in call.deltas if delta is not None)
            for own, g in self._apply_rule(layer, call, slice(0, 1)).items():
                name = self._layers[layer][own]
                found[name] = partial(self._first_share, self._parameters[name], g), min(0.1, 3 * narrowest**0.5)
        return found

    @staticmethod
    def _first_share(p: Parameter, g: PerSample) -> Tensor:
        return part(p, g.dense(1)[0].to(p.dtype))

    def gradients(
        self, factors: Mapping[str, float], g_batch: Named, keep_each: bool, sum_factor: float = 1.0
    ) -> dict[str, SquaredNoise]:
        """Return the samples' shares times a factor, by name of the captured parameters, and forget them.

        Args:
            factors: by name of the parameters wanted.
            g_batch: g_S.
            keep_each: whether every single gradient is needed, not only the sum of squared noise.
            sum_factor: for parameters whose squared noise was added up during the backward pass, the factor on the
                noise.
        """
        found: dict[str, SquaredNoise] = {
            name: Summed(self._squares[name], self._n_samples, in_batch=True, factor=sum_factor**2)
            for name in self._squares.keys() & factors.keys()
        }
        for layer, call in self._complete():
            wanted = {own: name for own, name in self._layers[layer].items() if name in factors and name not in found}
            whole = not any(isinstance(self._parameters[name], DTensor) for name in wanted.values())
            if wanted and whole and layer_rules.for_layer(layer) is not layer_rules.rerun:
                of_layer = self._apply_rule(layer, call, slice(0, self._n_samples))
                for own, name in wanted.items():
                    if own in of_layer:
                        of_layer[own].scale_(factors[name])
                        found[name] = of_layer[own]
            elif wanted:
                samples = self._one_after_another(layer, call, wanted, factors)
                found.update(one_by_one(samples, g_batch, keep_each or self._n_samples == 1))
        self.reset()
        return found

    def _complete(self) -> Iterator[tuple[nn.Module, _Call]]:
        for layer, call in self._calls.items():
            if call is not None and call.is_complete:
                yield layer, call

    def _one_after_another(
        self, layer: nn.Module, call: _Call, wanted: Mapping[str, str], factors: Mapping[str, float]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield each sample's shares times a factor, by name."""
        for i in range(self._n_samples):
            g = self._apply_rule(layer, call, slice(i, i + 1))
            yield {
                name: part(self._parameters[name], g[own].dense()[0] * factors[name])
                for own, name in wanted.items()
                if own in g
            }

    def _apply_rule(self, layer: nn.Module, call: _Call, samples: slice) -> dict[str, PerSample]:
        """Return the samples' shares by own name, of those parameters of the layer that require a gradient."""
        start, length = samples.start, samples.stop - samples.start
        x, deltas = call.x, call.deltas
        if length < self._n_samples:
            x = x.narrow(layer_rules.sample_axis(layer), start, length)
            deltas = [
                None if delta is None else delta.narrow(layer_rules.sample_axis(layer, i), start, length)
                for i, delta in enumerate(call.deltas)
            ]
        x = call.prepare(x)
        rule = layer_rules.for_layer(layer)
        try:
            if rule is layer_rules.rerun:
                with isolation.no_trace(layer):
                    found = rule(layer, x, *deltas)
            else:
                found = rule(layer, x, *deltas)
        except Exception:  # whatever failed in the rule: the parameters are replayed
            return {}
        names = self._layers[layer]
        return {own: g for own, g in found.items() if own in names and self._parameters[names[own]].requires_grad}

    def _after_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep a call, and decide whether its noise is added up during the backward pass. Runs as a forward hook."""
        if not self._hooks or layer not in self._layers:  # a copy of it
            return
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        self._calls[layer] = call = None if kwargs or layer in self._calls else self._kept(layer, args, output)
        if call is None or not self._factors or layer_rules.for_layer(layer) is layer_rules.rerun:
            return
        n_outputs = sum(y.numel() for y in layer_rules.tensors(output)) * self._n_samples // self._batch_size
        if call.x.numel() + n_outputs <= max(MAX_KEPT_NUMEL, *(p.numel() for p in layer.parameters(recurse=False))):
            return
        for own, name in self._layers[layer].items():
            p = layer.get_parameter(own)
            if p.requires_grad and name in self._factors:
                self._hooks.append(p.register_post_accumulate_grad_hook(partial(self._add_up, layer, own, name)))
                self._sum_in_backward.append(name)

    def _add_up(self, layer: nn.Module, own: str, name: str, p: Parameter) -> None:
        """Add up the squared noise during the backward pass, when ``p.grad`` is the gradient of this pass only."""
        call = self._calls.get(layer)
        if call is None or name not in self._without_grad:
            return
        if call.gradients is None:
            call.gradients = self._apply_rule(layer, call, slice(0, self._n_samples)) if call.is_complete else {}
        if own in call.gradients:
            g = call.gradients.pop(own)
            g.scale_(self._factors[name])
            squares = self._buffer((name,), p.shape, wide(p.dtype), p.device).zero_()
            g.add_squared_noise_(squares, dense(p, p.grad), 1.0, name in self._mean_is_g_batch)
            self._squares[name] = squares
        if not any(self._layers[layer][other] in self._factors for other in call.gradients):
            self._calls[layer] = None

    def _buffer(self, key: tuple[Any, ...], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return memory that is the same in each step: new memory would fragment what a pass takes and frees."""
        known = self._buffers.get(key)
        if known is None or known.shape != shape or known.dtype != dtype or known.device != device:
            known = self._buffers[key] = torch.empty(shape, dtype=dtype, device=device)
        return known

    def _copied(self, key: tuple[Any, ...], part: Tensor) -> Tensor:
        return self._buffer(key, part.shape, part.dtype, part.device).copy_(part)

    def _kept(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> _Call | None:
        """Keep the input of the first samples, and wait for the gradient; None if the call cannot be captured."""
        outputs = [output] if type(output) is Tensor else layer_rules.tensors(output)
        if len(args) != 1 or not outputs or not _is_plain(x := args[0]) or not layer_rules.has_samples(layer, x):
            return None
        axis = layer_rules.sample_axis(layer)
        if x.shape[axis] != self._batch_size:
            return None  # it holds other samples, or some of them
        axes = [layer_rules.sample_axis(layer, i) for i in range(len(outputs))]
        for y, a in zip(outputs, axes, strict=True):
            if not _is_plain(y) or y.is_leaf or y.dim() <= a or y.shape[a] != self._batch_size:
                return None
        whole = self._n_samples == self._batch_size
        x = x.detach() if whole else self._copied((layer,), x.detach().narrow(axis, 0, self._n_samples))
        prepare = layer_rules.preparation(layer, args[0], outputs[0])
        call = _Call(x, _torch.version(x) if whole else None, prepare, [None] * len(outputs))
        for i, (y, a) in enumerate(zip(outputs, axes, strict=True)):
            # The node stays the layer's own when its output is changed in place; a tensor's hooks cost more.
            keep = partial(self._keep_delta, layer, call.deltas, i, y.output_nr, a)
            y.grad_fn.register_prehook(keep)  # type: ignore[union-attr]  # y is no leaf
        return call

    def _keep_delta(
        self,
        layer: nn.Module,
        deltas: list[Tensor | None],
        i: int,
        output_nr: int,
        axis: int,
        output_grads: tuple[Tensor | None, ...],
    ) -> None:
        """Keep the gradient of the i-th output; several backward passes add up. Runs as a hook on the graph's node."""
        delta = output_grads[output_nr]
        if delta is None:  # only another output of the same node has one
            return
        delta, known = delta.detach() if delta.requires_grad else delta, deltas[i]
        if self._n_samples < self._batch_size:
            delta = delta.narrow(axis, 0, self._n_samples)
            if known is None:  # a view would keep the gradient of the whole batch alive
                delta = self._copied((layer, i), delta)
        deltas[i] = delta if known is None else known + delta


def _is_plain(value: Any) -> bool:
    """Return whether it is a tensor, of no subclass, that stands for itself."""
    return type(value) in (Tensor, Parameter) and not _torch.is_functorch_wrapped(value)

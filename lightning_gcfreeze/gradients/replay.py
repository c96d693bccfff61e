"""Per-sample gradients by replay: `training_step` once more, on a batch of one sample.

The gradient is computed by `torch.autograd.grad`, which leaves ``p.grad``, and DDP, which waits for it, alone. That is
right for every module whose samples do not interact; what the extra pass would leave behind, `isolation` undoes.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_gcfreeze import _modules, _torch
from lightning_gcfreeze.gradients import isolation, slicing
from lightning_gcfreeze.gradients.batch import dense
from lightning_gcfreeze.gradients.slicing import Sample
from lightning_gcfreeze.gradients.window import StepWindow

Take = Callable[[str, Tensor], None]
"""(name, gradient) -> None. The gradient is (*p.shape), of a sharded parameter the local part, and is freed then."""

TrainingStep = Callable[[Any, int], Tensor | Mapping[str, Any] | None]
"""(batch, batch_idx) -> the loss, a mapping with the loss under "loss", or None."""


class Replay:
    """Computes gradients by running `training_step` again. Nothing of a batch or a step is kept.

    Args:
        module: its state is left as it was.
        parameters: by name, those whose gradients are required.
        training_step: (batch, batch_idx) -> the loss, or a mapping with "loss", or None.
        context: returns a context manager that the training step has to run in.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Parameter],
        training_step: TrainingStep,
        context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._module, self._parameters = module, parameters
        self._training_step, self._context = training_step, context
        self._n_copies = 1  # of a sample in its batch; 2 once `training_step` has failed on one
        self._graph_is_checked = False

    def gradient(
        self,
        window: StepWindow,
        index: int = 0,
        names: Collection[str] | None = None,
        prepare_module: Callable[[], None] | None = None,
        take: Take | None = None,
    ) -> dict[str, Tensor] | None:
        """Compute the gradient on one sample, or on two copies of it if `training_step` cannot take a batch of one.

        Args:
            window: the optimizer step that the sample is of.
            index: of the sample in the first micro-batch. 0 needs ``window.sample``, all others ``window.batch``.
            names: of the parameters; None: all.
            prepare_module: called right before the training step; what it changes in the module is undone.
            take: called with the gradient of each parameter as soon as it is complete, in any order, so that they need
                not be in memory at once.

        Returns:
            ``{name: (*p.shape)}``, of sharded parameters the local parts, empty if there is a `take`; None if the
            training step returned no loss.

        Raises:
            RuntimeError: the training step fails on one and on two copies.
        """
        try:
            return self._on_sample(window, index, names, prepare_module, take)
        except Exception as error:
            failure = error
        explanation = f"`training_step` fails on a batch of a single sample: {failure!r}."
        try:
            if self._n_copies == 2 or window.is_cut_by_module:
                raise failure
            self._n_copies = 2
            gradient = self._on_sample(window, index, names, prepare_module, take)
        except Exception:
            raise RuntimeError(f"{explanation} If the sample was cut wrongly: {slicing.HINT}") from failure
        warnings.warn(
            f"{explanation} The gradient is computed on two copies of the sample instead, which is the same if the loss"
            f" is a mean over samples that do not interact. To make the batch yourself: {slicing.HINT}",
            stacklevel=2,
        )
        return gradient

    def on_batch(
        self,
        batch: Any,
        batch_idx: int,
        names: Collection[str] | None = None,
        prepare_module: Callable[[], None] | None = None,
        before_backward: Callable[[], None] | None = None,
        take: Take | None = None,
    ) -> dict[str, Tensor] | None:
        """Compute the gradient of the loss on any batch; arguments and result as for `gradient`."""
        parameters = {name: p for name, p in self._parameters.items() if names is None or name in names}

        def loss() -> Tensor | None:
            if prepare_module is not None:
                prepare_module()
            value = self._loss(batch, batch_idx)
            if before_backward is not None:
                before_backward()
            return value

        with self._context():
            return isolated_gradient(self._module, loss, parameters, take)

    def _on_sample(
        self,
        window: StepWindow,
        index: int,
        names: Collection[str] | None,
        prepare_module: Callable[[], None] | None,
        take: Take | None,
    ) -> dict[str, Tensor] | None:
        batch = window.cut(Sample(index, self._n_copies))
        return self.on_batch(batch, window.batch_idx, names, prepare_module, take=take)

    def _loss(self, batch: Any, batch_idx: int) -> Tensor | None:
        output = self._training_step(batch, batch_idx)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not self._graph_is_checked and loss is not None:
            if _modules.has_reentrant_checkpoint(loss):
                raise RuntimeError(
                    "activation checkpointing with `use_reentrant=True` hides parameters from `torch.autograd.grad`;"
                    " set `use_reentrant=False`"
                )
            self._graph_is_checked = True
        return loss


def isolated_gradient(
    module: nn.Module,
    loss: Callable[[], Tensor | None],
    parameters: Mapping[str, Parameter],
    take: Take | None = None,
) -> dict[str, Tensor] | None:
    """Compute the gradient of a loss without a trace in the module, ``p.grad`` or the random streams.

    Args:
        module: keeps all state that `loss` may change.
        loss: runs the module on a batch and returns a 0-dim tensor, or None if the batch has no loss.
        parameters: parameters of the module, by name.
        take: is called with each gradient, in place of returning them; see `Replay.gradient`.

    Returns:
        ``{name: (*p.shape)}``, zeros where the loss does not depend on the parameter or none is required. None if there
        was no loss.
    """
    taken: set[str] = set()
    with isolation.no_trace(module), torch.enable_grad():
        with _used_by_fsdp(module, parameters) as used:
            value = loss()
        if value is None:
            return None
        active = {name: used.get(name, p) for name, p in parameters.items() if p.requires_grad}
        # Of shards a gradient may have to be communicated, in an order that is the same on all processes.
        early = {} if take is None or used else {n: p for n, p in active.items() if not isinstance(p, DTensor)}
        hooks = [p.register_hook(partial(_take_early, take, taken, name)) for name, p in early.items()]
        try:
            grads = torch.autograd.grad(value, list(active.values()), allow_unused=True) if active else ()
        finally:
            for hook in hooks:
                hook.remove()
        found = dict(zip(active, grads, strict=True))
        del value, grads
    if take is None:
        return {name: dense(p, found.get(name)) for name, p in parameters.items()}
    for name, p in parameters.items():
        if name not in taken:
            take(name, dense(p, found.pop(name, None)))
    return {}


def _take_early(take: Take | None, taken: set[str], name: str, gradient: Tensor) -> Tensor | None:
    """Let a gradient be taken, and return zeros that take no memory in its place. Runs as a hook on the parameter.

    All contributions to the gradient of a leaf have been added up by then.
    """
    if take is None or gradient.layout != torch.strided:
        return None
    taken.add(name)
    take(name, gradient.detach())
    return gradient.new_zeros(()).expand_as(gradient)


@contextmanager
def _used_by_fsdp(module: nn.Module, parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict of name -> the whole parameter that FSDP2 has put in place of its shards in a forward pass."""
    used: dict[str, Tensor] = {}
    names = {id(p): name for name, p in parameters.items()}
    owners = [
        (layer, own, name)
        for layer in module.modules()
        for own, p in _torch.own_parameters(layer)
        if (name := names.get(id(p))) is not None
    ]

    def look(*_: Any) -> None:
        for layer, own, name in owners:
            p = getattr(layer, own)
            if p is not None and p is not parameters[name]:
                used[name] = p

    hooks = [layer.register_forward_pre_hook(look) for layer in module.modules() if isinstance(layer, FSDPModule)]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()

"""g_S and g_1 of a module as {name: tensor}, and what computing g_1 must not leave behind.

g_S is what backward left in ``p.grad``. g_1 is had by *replay*: the loss once more, on the first sample alone, and its
gradient by `torch.autograd.grad`, which leaves ``p.grad``, and DDP, which waits for it, alone. Right for every module
whose samples do not interact. During a replay

- BatchNorm uses its running statistics: a batch of one has none of its own;
- dropout stays active, and draws from the random stream as it stands; the stream is put back afterwards;
- whatever the module keeps (buffers, metric states, plain attributes, lists) is a copy that is thrown away, and
  `log` says nothing.
"""

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import Parameter

from lightning_gcfreeze import _modules
from lightning_gcfreeze.distributed import local, part

# Attributes that every module has. Buffers and the training flag may change in a step; the others may not, and hooks
# must not be copied, since their handles point at these very dictionaries.
_OF_EVERY_MODULE = nn.Module().__dict__.keys() - {"_buffers", "training"}
_CONTAINERS = (dict, list, deque, set, tuple)


def of_batch(parameters: Mapping[str, Parameter], scale: float = 1.0) -> dict[str, Tensor]:
    """g_S, the gradient that the optimizer will use.

    Args:
        parameters: by name, after backward.
        scale: what the gradients are too large by: a loss scale, or the share of a short accumulation window.

    Returns:
        ``{name: (*p.shape)}``, ``p.grad`` itself where it is dense and unscaled: do not write to it. A parameter
        without a gradient took no part in the loss: zeros.
    """
    return {name: dense(p, p.grad, scale) for name, p in parameters.items()}


def of_sample(
    module: nn.Module, loss: Callable[[], Tensor | None], parameters: Mapping[str, Parameter]
) -> dict[str, Tensor] | None:
    """g_1, the gradient of a loss on one sample, without a trace in the module, ``p.grad`` or the random streams.

    Args:
        module: keeps all state that `loss` may change.
        loss: runs the module on the sample; None if it has no loss.
        parameters: of the module, by name.

    Returns:
        ``{name: (*p.shape)}``, zeros where the loss does not depend on the parameter; None if there was no loss.
    """
    with no_trace(module), torch.enable_grad():
        with _in_use(module, parameters) as used:
            value = loss()
        if value is None:
            return None
        active = {name: used.get(name, p) for name, p in parameters.items() if p.requires_grad}
        grads = torch.autograd.grad(value, list(active.values()), allow_unused=True) if active else ()
        found = dict(zip(active, grads, strict=True))
    return {name: dense(p, found.get(name)) for name, p in parameters.items()}


def dense(parameter: Parameter, grad: Tensor | None, scale: float = 1.0) -> Tensor:
    """A gradient as a tensor like the local part of its parameter, detached, over `scale`; zeros for None."""
    if grad is None:
        return torch.zeros_like(local(parameter), requires_grad=False)
    grad = part(parameter, grad.detach())
    if grad.layout != torch.strided:
        grad = grad.to_dense()
    return grad if scale == 1.0 else grad / scale


@contextmanager
def _in_use(module: nn.Module, parameters: Mapping[str, Parameter]) -> Iterator[dict[str, Tensor]]:
    """What stands in for parameters in forward passes, by name: FSDP2 puts whole ones in the place of its shards."""
    used: dict[str, Tensor] = {}
    names = {id(p): name for name, p in parameters.items()}
    owners = [
        (layer, own, name)
        for layer in module.modules()
        for own, p in layer._parameters.items()
        if (name := names.get(id(p))) is not None
    ]

    def look(*_: Any) -> None:
        for layer, own, name in owners:
            p = layer._parameters[own]
            if p is not None and p is not parameters[name]:
                used[name] = p

    hooks = [layer.register_forward_pre_hook(look) for layer in module.modules() if isinstance(layer, FSDPModule)]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Whatever a module does inside leaves its state and the random streams as they were, to the bit."""
    modules = _modules_within(module)
    before = [dict(m.__dict__) for m in modules]
    # Parameters are put back rather than replaced by copies: recurrent layers want them where they are in memory.
    parameters = {p for m in modules for p in m._parameters.values() if p is not None}
    kept = [(p, p.requires_grad, p.detach().clone()) for p in parameters]
    copies: dict[int, Any] = {}
    with _same_random_numbers(module):
        try:
            for m in modules:
                for name in m.__dict__.keys() - _OF_EVERY_MODULE:
                    m.__dict__[name] = _private(m.__dict__[name], copies)
                if isinstance(m, _modules.BatchNorm):
                    m.__dict__["training"] = False
                if hasattr(m, "log_dict"):  # a LightningModule, or one nested in it
                    m.__dict__.update(log=_silence, log_dict=_silence)
            yield
        finally:
            for m, attributes in zip(modules, before, strict=True):
                m.__dict__.clear()
                m.__dict__.update(attributes)
            for p, requires_grad, values in kept:
                p.data.copy_(values)
                p.requires_grad_(requires_grad)


def _modules_within(module: nn.Module) -> list[nn.Module]:
    """The module and all others it can reach, also those in plain containers, like the metrics of a composite loss."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    left: list[Any] = [module]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.append(value)
            left.extend(value.__dict__.values())
        elif isinstance(value, _CONTAINERS):
            left.extend(value.values() if isinstance(value, dict) else value)
    return found


def _private(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of tensors and plain containers, all the way down; the rest as it is, parameters above all.

    `copies` maps the id of what was copied to its copy, so that things shared stay shared.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        copied: Any = value if value.requires_grad else value.detach().clone()  # else a parameter, or made from one
    elif isinstance(value, dict | list | deque):
        copied = copies[id(value)] = copy.copy(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            copied[key] = _private(item, copies)
    elif isinstance(value, set):
        copied = copy.copy(value)
    elif isinstance(value, _own_kinds()):
        copied = copy.deepcopy(value)
    elif isinstance(value, torch.Generator):
        copied = torch.Generator(value.device).set_state(value.get_state())
    elif isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_fields")):
        items = [_private(item, copies) for item in value]
        copied = tuple(items) if type(value) is tuple else type(value)(*items)
    else:
        return value
    copies[id(value)] = copied
    return copied


def _own_kinds() -> tuple[type, ...]:
    """Arrays and random generators that a module may keep for itself."""
    if (numpy := sys.modules.get("numpy")) is None:
        return (random.Random,)
    return (random.Random, numpy.ndarray, numpy.random.Generator, numpy.random.RandomState)


@contextmanager
def _same_random_numbers(module: nn.Module) -> Iterator[None]:
    """Put the random streams of Python, NumPy and torch (the module's devices) back afterwards."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    devices = {p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def _silence(*args: Any, **kwargs: Any) -> None:
    """In place of `LightningModule.log` during a replay."""

"""Run a module without leaving a trace in its state, its parameters or the random streams.

Inside of `no_trace`

- BatchNorm uses its running statistics: a batch of one sample has none of its own;
- dropout stays active and draws from the random streams as they stand; the streams are restored afterwards;
- whatever the module keeps (buffers, metric states, plain attributes, lists) is a copy that is thrown away;
- `log` and `log_dict` of a LightningModule do nothing.
"""

import copy
import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gcfreeze import _modules, _torch

# Attributes that every module has. Buffers and the training flag may change in a step. The others may not, and hooks
# must not be copied, because their handles point at these very dictionaries.
_OF_EVERY_MODULE = nn.Module().__dict__.keys() - {"_buffers", "training"}
_CONTAINERS = (dict, list, deque, set, tuple)


@contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Restore the state of a module and the random streams afterwards, to the bit."""
    modules = _modules_within(module)
    before = [dict(m.__dict__) for m in modules]
    # Parameters are restored rather than replaced by copies: recurrent layers need them where they are in memory.
    parameters = {p for m in modules for _, p in _torch.own_parameters(m)}
    kept = [(p, p.requires_grad, _torch.lazy_copy(p)) for p in parameters]
    copies: dict[int, Any] = {}
    with _same_random_numbers(module):
        try:
            for m in modules:
                for name in m.__dict__.keys() - _OF_EVERY_MODULE:
                    m.__dict__[name] = _private_copy(m.__dict__[name], copies)
                if isinstance(m, _modules.BatchNorm):
                    m.__dict__["training"] = False
                if hasattr(m, "log_dict"):  # a LightningModule, or one nested in it
                    m.__dict__.update(log=_log_nothing, log_dict=_log_nothing)
            yield
        finally:
            for m, attributes in zip(modules, before, strict=True):
                m.__dict__.clear()
                m.__dict__.update(attributes)
            for p, requires_grad, values in kept:
                if not _torch.has_same_memory(p, values):
                    p.data.copy_(values)
                p.requires_grad_(requires_grad)


def _modules_within(module: nn.Module) -> list[nn.Module]:
    """Return all modules that can be reached, also those in plain containers, like the metrics of a composite loss."""
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


def _private_copy(value: Any, copies: dict[int, Any]) -> Any:
    """Copy tensors and plain containers, all the way down; return everything else, above all parameters, as it is.

    Args:
        value: an attribute of a module.
        copies: id of what was copied -> its copy, so that shared objects stay shared.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        copied: Any = value if value.requires_grad else value.detach().clone()  # else a parameter, or made from one
    elif isinstance(value, dict | list | deque):
        copied = copies[id(value)] = copy.copy(value)
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            copied[key] = _private_copy(item, copies)
    elif isinstance(value, set):
        copied = copy.copy(value)
    elif isinstance(value, _deeply_copied_types()):
        copied = copy.deepcopy(value)
    elif isinstance(value, torch.Generator):
        copied = torch.Generator(value.device).set_state(value.get_state())
    elif isinstance(value, tuple) and (type(value) is tuple or hasattr(value, "_fields")):
        items = [_private_copy(item, copies) for item in value]
        copied = tuple(items) if type(value) is tuple else type(value)(*items)
    else:
        return value
    copies[id(value)] = copied
    return copied


def _deeply_copied_types() -> tuple[type, ...]:
    """Return the types of arrays and random generators that a module may keep for itself."""
    if (numpy := sys.modules.get("numpy")) is None:
        return (random.Random,)
    return (random.Random, numpy.ndarray, numpy.random.Generator, numpy.random.RandomState)


@contextmanager
def _same_random_numbers(module: nn.Module) -> Iterator[None]:
    """Restore the random streams of Python, NumPy and torch (also on the module's devices) afterwards."""
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


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for `LightningModule.log`."""

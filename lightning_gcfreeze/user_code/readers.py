"""Who, beside Lightning itself, may look at gradients, or change them.

`Compact` takes gradients away from the parameters, and `GradientSkipper` does not compute some of them. Both are right
only where nobody looks. So the question is not which hooks are known to look, but whether anybody can: gradients are
taken away where none of the places below has code from outside of Lightning that overrides a hook in the gradient's
way, or that mentions gradients.

Looked through are the LightningModule, the callbacks, the strategy and its precision plugin; hooks on parameters, on
modules and on the optimizer; and the functions that these call by name. See docs/decisions/gradient-access.md.
"""

import dis
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

IN_THE_GRADIENTS_WAY = frozenset(
    {
        "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "clip_gradients",
        "clip_grad_by_norm", "clip_grad_by_value", "main_params", "optimizer_step", "optimizer_zero_grad",
        "pre_backward", "post_backward",
    }
)  # fmt: skip
"""Hooks of modules, callbacks, strategies and precision plugins whose business are gradients. Whoever overrides one
counts, whatever the code says."""

_KNOWN = frozenset(
    {
        __name__.split(".")[0], "lightning", "pytorch_lightning", "lightning_fabric", "torch", "torchmetrics",
        "torchvision", "numpy", "scipy", "pandas", "sklearn", "matplotlib", "PIL", "tqdm", "rich", "builtins",
        "collections", "contextlib", "copy", "dataclasses", "functools", "logging", "typing", "warnings", "weakref",
    }
)  # fmt: skip
"""Where code comes from that is known not to look: Lightning and torch, and what has nothing to do with them."""
_LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})
_NOTHING: Any = object()
_REGISTRY = 64  # items
_BETWEEN = frozenset({"PRECALL", "CACHE", "PUSH_NULL", "COPY", "SWAP", "NOP", "RESUME"})
_GRADIENT = re.compile(r"(^|_)(auto)?grad(ient)?s?(_|$)|(^|_)backward($|_)|^register_(\w+_)?hook$", re.IGNORECASE)
_HARMLESS = frozenset(
    {
        "no_grad", "enable_grad", "set_grad_enabled", "is_grad_enabled", "requires_grad", "requires_grad_",
        "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "configure_gradient_clipping",
    }
)  # fmt: skip
_IN_PLACE = re.compile(r"[a-z]\w*[a-z0-9]_")
_OF_GRADIENTS = frozenset({"requires_grad_", "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"})
_WEIGHTS = frozenset(
    {"parameters", "named_parameters", "get_parameter", "params", "weight", "bias", "data", "state_dict"}
)
_STATE = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "acc_delta"})


class Owners(NamedTuple):
    """Whose code is looked through."""

    module: nn.Module
    """The LightningModule."""
    others: Sequence[Any] = ()
    """Callbacks, the strategy, the precision plugin, the data module, loggers, schedulers and their functions, the
    Trainer itself."""

    def methods(self) -> Iterator[tuple[str, "Code"]]:
        """All that comes from outside of Lightning and torch, by a name that its author knows it by."""
        for owner in (self.module, *self.others):
            if isinstance(owner, FunctionType):
                yield owner.__qualname__, Code(owner, None, self.module)
                continue
            for name, function in _foreign_methods(owner):
                yield name, Code(function, owner, self.module)


class Code(NamedTuple):
    """A function, with what its variables stand for."""

    function: Any
    owner: Any = None
    """What its first argument is."""
    module: nn.Module | None = None
    """What an argument of the usual names is."""


def of_run(owners: Owners, parameters: Mapping[str, Parameter], optimizer: Optimizer) -> list[str]:
    """Everything in a run that may look at gradients, by a name that its author knows it by; empty if there is none.

    Args:
        owners: whose methods are looked through.
        parameters: the eligible ones.
        optimizer: the one that steps them.
    """
    found = [
        _told(name, code)
        for name, code in owners.methods()
        if name in IN_THE_GRADIENTS_WAY or any(map(_names_gradients, _codes_reached(code)))
    ]
    found += [
        f"a hook on {name}" for name, p in parameters.items() if p._backward_hooks or p._post_accumulate_grad_hooks
    ]
    for name, layer in owners.module.named_modules():
        if layer._backward_hooks or layer._backward_pre_hooks:
            found.append(f"a backward hook on {name or type(layer).__name__}")
        for hook in (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()):
            if _is_foreign(hook) and any(map(_names_gradients, _codes_reached(Code(hook)))):
                found.append(f"the forward hook {_name(hook)}")
    if _global_backward_hooks or _global_backward_pre_hooks:
        found.append("a backward hook on all modules")
    found += [f"the optimizer's hook {_name(hook)}" for hook in _optimizer_hooks(optimizer) if _is_foreign(hook)]
    found += [
        f"the patched {type(optimizer).__name__}.{name}"
        for name, value in vars(optimizer).items()
        if hasattr(type(optimizer), name) and callable(value) and not hasattr(value, "_wrapped_by_lr_sched")
    ]
    return list(dict.fromkeys(found))


def of_accumulators(parameters: Mapping[str, Parameter]) -> list[str]:
    """Parameters whose gradient accumulator somebody holds, as libraries do that hook into the backward pass there.

    To be asked while no graph is alive: that holds them, too. Nobody else does, and they are made anew for each graph.
    """

    def accumulator(p: Parameter) -> Any:
        with torch.enable_grad():
            return p.expand_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    found = []
    for name, p in parameters.items():
        accumulator(p).metadata[__name__] = True
        if accumulator(p).metadata.pop(__name__, False):
            found.append(f"a hook on the gradient accumulator of {name}")
    return found


def of_weights(owners: Owners, parameters: Mapping[str, Parameter], optimizer: Optimizer) -> list[str]:
    """Code that may write to weights between steps, frozen ones included; arguments as for `of_run`."""
    found = [_told(name, code) for name, code in owners.methods() if any(map(_may_write_weights, _codes_reached(code)))]
    for name, layer in owners.module.named_modules():
        own = [value for cls in type(layer).__mro__ if not _is_known(cls) and (value := vars(cls).get("forward"))]
        hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
        codes = [Code(value, layer) for value in (*own, *filter(_is_foreign, hooks))]
        reached = (inner for code in codes for inner in _codes_reached(code))
        if layer is not owners.module and any(map(_may_write_weights, reached)):
            found.append(f"{name} ({type(layer).__name__})")
    found += [f"a hook on {name}" for name, p in parameters.items() if p._post_accumulate_grad_hooks]
    return found + [f"the optimizer's hook {_name(hook)}" for hook in _optimizer_hooks(optimizer) if _is_foreign(hook)]


def of_optimizer_state(owners: Owners) -> list[str]:
    """Methods that look an optimizer's state up by parameter, or change it."""
    return [_told(name, code) for name, code in owners.methods() if any(map(_looks_for_state, _whole(code)))]


def _whole(code: Code) -> Iterator[frozenset[str]]:
    """The names in each function that is reached, those of its inner functions included."""
    for function in _functions_reached(code):
        codes = [*_codes(function.function)]
        yield frozenset(name for c in codes for name in (*c.co_names, *c.co_varnames, *_strings(c)))


def _looks_for_state(names: frozenset[str]) -> bool:
    of_optimizer = any("optim" in name or name == "opt" for name in names)
    by_parameter = bool(names & {"parameters", "named_parameters", "params"}) or not names & {"values", "items"}
    changes = any(_IN_PLACE.fullmatch(name) for name in names) or bool(names & {"clear", "pop", "popitem"})
    known = bool(names & _STATE)
    return (known and by_parameter) or (changes and (known or (of_optimizer and "state" in names)))


def _told(name: str, code: Code) -> str:
    return name if code.owner is None else f"{type(code.owner).__name__}.{name}"


def _foreign_methods(owner: Any) -> Iterator[tuple[str, Any]]:
    """What an object's class, and the object itself where it was patched, has from outside of Lightning and torch."""
    defined = [(name, value) for cls in type(owner).__mro__ if not _is_known(cls) for name, value in vars(cls).items()]
    patched = [(name, value) for name, value in _own(owner).items() if hasattr(type(owner), name)]
    for name, value in [*patched, *defined]:
        if name.startswith(("__", "configure_")) and name not in IN_THE_GRADIENTS_WAY:
            continue  # they run before training
        if isinstance(value, property):
            value = value.fget
        outermost = next(iter(_layers(value)), None)
        if isinstance(outermost, nn.Module | type) or not callable(outermost) or not _is_foreign(value):
            continue
        if isinstance(outermost, FunctionType) or not _is_known(type(outermost)):
            yield name, value


def _own(owner: Any) -> dict[str, Any]:
    return getattr(owner, "__dict__", {})


def _is_foreign(value: Any) -> bool:
    """Whether code comes from outside of Lightning, torch and this package; what cannot be told does."""
    return any(not _is_known(layer) for layer in _layers(value))


def _is_known(function: Any) -> bool:
    # Not ``__module__``, which `functools.wraps` copies.
    scope = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None)
    return str(scope).split(".")[0] in _KNOWN


def _layers(value: Any) -> list[Any]:
    """What a method, a partial or a decorated function is made of, from the outside in."""
    layers = []
    while value is not None:
        if isinstance(value, MethodType):
            value = value.__func__
        elif isinstance(value, functools.partial | functools.partialmethod):
            value = value.func
        elif isinstance(value, staticmethod | classmethod):
            value = value.__wrapped__
        else:
            layers.append(value)
            value = getattr(value, "__wrapped__", None)
    return layers


def _names_gradients(code: CodeType) -> bool:
    names = _strings(code).union(code.co_names)
    return "params" in names or any(_GRADIENT.search(n) and n not in _HARMLESS and "checkpoint" not in n for n in names)


def _may_write_weights(code: CodeType) -> bool:
    names = _strings(code).union(code.co_names)
    if names & {"vector_to_parameters", "load_state_dict"} or any(name.startswith("_foreach_") for name in names):
        return True
    instructions = [*dis.get_instructions(code)]
    if any(i.opname == "STORE_ATTR" and i.argval == "data" for i in instructions):
        return True
    in_place = {name for name in names if _IN_PLACE.fullmatch(name)} - _OF_GRADIENTS
    stores = any(i.opname == "STORE_SUBSCR" for i in instructions)
    augmented = any(i.opname.startswith(("INPLACE", "BINARY_OP")) and i.argrepr[-1:] in ("=", "") for i in instructions)
    arrays = augmented and names & {"numpy", "state_dict"}
    return bool(names & _WEIGHTS) and bool(in_place or stores or arrays)


def _codes_reached(code: Code) -> Iterator[CodeType]:
    """The code of a function, and of the foreign functions that it reaches by name."""
    return (inner for function in _functions_reached(code) for inner in _codes(function.function))


def _functions_reached(code: Code) -> Iterator[Code]:
    """A function, and the foreign functions that it reaches: each once, with what its first argument is."""
    left, seen = [code], set[int]()
    while left:
        function, owner, module = left.pop()
        if isinstance(function, MethodType):
            owner = function.__self__
        for layer in _layers(function):
            if id(layer) in seen or _is_known(layer):
                continue
            seen.add(id(layer))
            if isinstance(layer, FunctionType):
                yield Code(layer, owner, module)
                reached = _reached(Code(layer, owner, module))
                left += [Code(value, holder, module) for value, holder in reached if _is_foreign(value)]
            elif not isinstance(layer, type | nn.Module) and not _is_known(type(layer)):  # an object that is called
                left += [Code(value, layer, module) for value in vars(type(layer)).values() if callable(value)]


def _reached(code: Code) -> Iterator[tuple[Any, Any]]:
    """What a function reaches by chains of names, ``self.a.b``, and can be called; with what it is a method of."""
    function = code.function
    outer = function.__code__
    known = dict(zip(outer.co_freevars, function.__closure__ or (), strict=False))
    roots: dict[str, Any] = {name: cell.cell_contents for name, cell in known.items() if _is_filled(cell)}
    roots |= {} if code.module is None else {"pl_module": code.module, "module": code.module}
    if code.owner is not None and outer.co_argcount:
        roots[outer.co_varnames[0]] = code.owner
    for inner in _codes(function):
        here: Any = _NOTHING
        for i in dis.get_instructions(inner):
            holder = _NOTHING
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                here = function.__globals__.get(i.argval, _NOTHING)
            elif "LOAD_FAST" in i.opname or i.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
                name = i.argval[-1] if isinstance(i.argval, tuple) else i.argval  # Python 3.13 does two at once
                here = roots.get(name, _NOTHING)
            elif i.opname == "IMPORT_NAME":
                here = sys.modules.get(i.argval, _NOTHING)
            elif i.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                holder, here = here, _attribute(here, i.argval)
                if i.opname == "IMPORT_FROM":
                    yield from _callables(here, None)
                    here = holder
                    continue
            elif i.opname not in _BETWEEN:
                here = _NOTHING
                continue
            yield from _callables(here, holder)


def _attribute(value: Any, name: str) -> Any:
    """An attribute, without running any code for it."""
    if value is _NOTHING or (isinstance(value, ModuleType) and _is_known_module(value)):
        return _NOTHING
    own = _own(value)
    for place in (own, own.get("_modules") or {}):
        if isinstance(place, Mapping) and name in place:
            return place[name]
    found = inspect.getattr_static(value, name, _NOTHING)
    return found.fget if isinstance(found, property) else found


def _callables(value: Any, holder: Any, depth: int = 3) -> Iterator[tuple[Any, Any]]:
    """What can be called of a value, or of what a small container holds: a registry, not a data set."""
    if isinstance(value, dict | list | tuple | set):
        if depth and len(value) <= _REGISTRY:
            for item in value.values() if isinstance(value, dict) else value:
                yield from _callables(item, holder, depth - 1)
    elif value is not _NOTHING and callable(value) and not isinstance(value, type | nn.Module | Tensor | ModuleType):
        yield value, None if holder is _NOTHING or isinstance(holder, ModuleType | type) else holder
    elif isinstance(value, nn.Module) and "forward" in vars(value):
        yield value.forward, value


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_known_module(module: ModuleType) -> bool:
    return module.__name__.split(".")[0] in _KNOWN


def _codes(function: FunctionType) -> Iterator[CodeType]:
    """The code of a function and of all functions that are defined in it."""
    left = [function.__code__]
    while left:
        yield (code := left.pop())
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _strings(code: CodeType) -> set[str]:
    """Constants that are names, as in ``getattr(p, "grad")`` or ``state["exp_avg"]``."""
    return {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}


def _optimizer_hooks(optimizer: Optimizer) -> Iterator[Any]:
    for hooks in (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    ):
        yield from hooks.values()


def _name(hook: Any) -> str:
    function = _layers(hook)[-1]
    return str(getattr(function, "__qualname__", type(function).__qualname__))


class GradientWatch:
    """Notes, for a while, who reads or writes ``p.grad`` in Python: code that no reading of names would lead to.

    A read counts by the first function above it that is not torch's or this package's; what Lightning does is known.

    Args:
        parameters: to be watched, those that are plain `Parameter`.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._parameters = [p for p in parameters if type(p) is Parameter]
        self.seen: dict[str, None] = {}

    def arm(self) -> None:
        """Watch from now on."""
        for p in self._parameters:
            _WATCHES[id(p)] = self.seen
            self._become(p, _Watched)

    def disarm(self) -> None:
        """Watch no longer; what was seen stays."""
        for p in self._parameters:
            if type(p) is _Watched:
                self._become(p, Parameter)
                _WATCHES.pop(id(p), None)

    @staticmethod
    def _become(p: Tensor, cls: type[Parameter]) -> None:
        p.__class__ = cls


class _Watched(Parameter):
    """A parameter whose gradient says who asks for it."""

    @property
    def grad(self) -> Any:
        _note(self)
        return _GRAD.__get__(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        _note(self)
        _GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        _note(self)
        _GRAD.__delete__(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        copied = memo[id(self)] = Parameter(
            self.detach().clone(memory_format=torch.preserve_format), self.requires_grad
        )
        return copied


_GRAD: Any = inspect.getattr_static(Tensor, "grad")
_WATCHES: dict[int, dict[str, None]] = {}  # by the parameter's id: tensors are not equal to one another


def _note(p: Tensor) -> None:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        root = str(frame.f_globals.get("__name__")).split(".")[0]
        if root in _LIGHTNING:
            return
        if root not in _KNOWN:
            seen = _WATCHES.get(id(p))
            if seen is not None:
                seen[f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"] = None
            return
        frame = frame.f_back

"""Find the functions that a piece of code reaches by names, by reading byte code. No code is run.

A walk follows names and chains of attributes, such as ``self.a.b``, from a function to the functions that these stand
for. The walk ends at code of packages that are known not to look at gradients. See docs/decisions/gradient-access.md.
"""

import dis
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

TRAINING_HOOKS_WITH_GRADIENTS = frozenset(
    {
        "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "clip_gradients",
        "clip_grad_by_norm", "clip_grad_by_value", "main_params", "optimizer_step", "optimizer_zero_grad",
        "pre_backward", "post_backward",
    }
)  # fmt: skip
"""Hooks of modules, callbacks, strategies and precision plugins that handle gradients."""
KNOWN_PACKAGES = frozenset(
    {
        __name__.split(".")[0], "lightning", "pytorch_lightning", "lightning_fabric", "torch", "torchmetrics",
        "torchvision", "transformers", "accelerate", "numpy", "scipy", "pandas", "sklearn", "matplotlib", "PIL", "tqdm",
        "rich", "builtins", "collections", "contextlib", "copy", "dataclasses", "functools", "logging", "typing",
        "warnings", "weakref",
    }
)  # fmt: skip
"""Packages whose code is known not to look at gradients, except where this package accounts for it."""
MAX_REGISTRY_LENGTH = 64
"""Longer containers hold data, not functions to call."""
_MISSING: Any = object()
_OPCODES_BETWEEN_NAMES = frozenset({"PRECALL", "CACHE", "PUSH_NULL", "COPY", "SWAP", "NOP", "RESUME"})


class Code(NamedTuple):
    """A function, and what its variables stand for."""

    function: Any
    owner: Any = None
    """The value of its first argument, ``self``."""
    module: nn.Module | None = None
    """The value of arguments named ``module`` or ``pl_module``."""


class Method(NamedTuple):
    """A method of an owner, and the functions that it reaches."""

    name: str
    """The name of the hook or function."""
    label: str
    """The name that its author knows: ``Class.method``."""
    functions: Sequence[FunctionType]
    """The method itself and the foreign functions that it reaches, each once."""


class Owners:
    """The objects of a run that may have code of the user.

    Args:
        module: the LightningModule, or the model of a plain loop.
        others: callbacks, the strategy, the precision plugin, the data module, loggers, schedulers and their functions,
            the Trainer itself. Functions are allowed.
    """

    def __init__(self, module: nn.Module, others: Sequence[Any] = ()) -> None:
        self.module, self.others = module, others

    @functools.cached_property
    def methods(self) -> list[Method]:
        """The methods and functions from outside of the known packages; read once, since walking is slow."""
        found = []
        for owner in (self.module, *self.others):
            if isinstance(owner, FunctionType):
                code = Code(owner, None, self.module)
                found.append(Method(owner.__qualname__, owner.__qualname__, reached_functions(code)))
                continue
            for name, function in _foreign_methods(owner):
                code = Code(function, owner, self.module)
                found.append(Method(name, f"{type(owner).__name__}.{name}", reached_functions(code)))
        return found


def reached_functions(code: Code) -> list[FunctionType]:
    """Return a function and the foreign functions that it reaches by names, each once."""
    found, left, seen = [], [code], set[int]()
    while left:
        function, owner, module = left.pop()
        if isinstance(function, MethodType):
            owner = function.__self__
        for layer in unwrapped(function):
            if id(layer) in seen or is_known(layer):
                continue
            seen.add(id(layer))
            if isinstance(layer, FunctionType):
                found.append(layer)
                named = _named_callables(Code(layer, owner, module))
                left += [Code(value, holder, module) for value, holder in named if is_foreign(value)]
            elif not isinstance(layer, type | nn.Module) and not is_known(type(layer)):  # an object that is called
                left += [Code(value, layer, module) for value in vars(type(layer)).values() if callable(value)]
    return found


def code_objects(function: FunctionType) -> Iterator[CodeType]:
    """Yield the code of a function and of all functions that are defined in it."""
    left = [function.__code__]
    while left:
        yield (code := left.pop())
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def unwrapped(value: Any) -> list[Any]:
    """Return the functions that a method, a partial or a decorated function consists of, the outermost first."""
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


def is_foreign(value: Any) -> bool:
    """Return whether a part of a function comes from outside of the known packages, or from an unknown place."""
    return any(not is_known(layer) for layer in unwrapped(value))


def is_known(function: Any) -> bool:
    """Return whether a function or class was defined in one of the known packages."""
    # Not ``__module__``, which `functools.wraps` copies.
    scope = getattr(function, "__globals__", None)  # of the class of a compiled function it is a descriptor
    name = scope.get("__name__") if isinstance(scope, dict) else None
    return str(name or getattr(function, "__module__", None)).split(".")[0] in KNOWN_PACKAGES


def _foreign_methods(owner: Any) -> Iterator[tuple[str, Any]]:
    """Yield the methods, by name, that an object's class defines outside of the known packages or that were patched."""
    defined = [(name, value) for cls in type(owner).__mro__ if not is_known(cls) for name, value in vars(cls).items()]
    patched = [(name, value) for name, value in _instance_attributes(owner).items() if hasattr(type(owner), name)]
    for name, value in [*patched, *defined]:
        if name.startswith(("__", "configure_")) and name not in TRAINING_HOOKS_WITH_GRADIENTS:
            continue  # they run before training
        if isinstance(value, property):
            value = value.fget
        outermost = next(iter(unwrapped(value)), None)
        if isinstance(outermost, nn.Module | type) or not callable(outermost) or not is_foreign(value):
            continue
        if isinstance(outermost, FunctionType) or not is_known(type(outermost)):
            yield name, value


def _named_callables(code: Code) -> Iterator[tuple[Any, Any]]:
    """Yield what a function names and could call, each with the object that it is an attribute of."""
    function = code.function
    outer = function.__code__
    cells = dict(zip(outer.co_freevars, function.__closure__ or (), strict=False))
    variables: dict[str, Any] = {name: cell.cell_contents for name, cell in cells.items() if _is_filled(cell)}
    variables |= {} if code.module is None else {"pl_module": code.module, "module": code.module}
    if code.owner is not None and outer.co_argcount:
        variables[outer.co_varnames[0]] = code.owner
    for inner in code_objects(function):
        here: Any = _MISSING  # the value of the chain of names so far
        for i in dis.get_instructions(inner):
            holder = _MISSING
            if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                here = function.__globals__.get(i.argval, _MISSING)
            elif "LOAD_FAST" in i.opname or i.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
                name = i.argval[-1] if isinstance(i.argval, tuple) else i.argval  # Python 3.13 loads two at once
                here = variables.get(name, _MISSING)
            elif i.opname == "IMPORT_NAME":
                here = sys.modules.get(i.argval, _MISSING)
            elif i.opname in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"):
                holder, here = here, _attribute(here, i.argval)
                if i.opname == "IMPORT_FROM":
                    yield from _callables(here, None)
                    here = holder
                    continue
            elif i.opname not in _OPCODES_BETWEEN_NAMES:
                here = _MISSING
                continue
            yield from _callables(here, holder)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute without running code for it."""
    if value is _MISSING or (isinstance(value, ModuleType) and value.__name__.split(".")[0] in KNOWN_PACKAGES):
        return _MISSING
    attributes = _instance_attributes(value)
    for place in (attributes, attributes.get("_modules") or {}):
        if isinstance(place, Mapping) and name in place:
            return place[name]
    found = inspect.getattr_static(value, name, _MISSING)
    return found.fget if isinstance(found, property) else found


def _callables(value: Any, holder: Any, depth: int = 3) -> Iterator[tuple[Any, Any]]:
    """Yield a value that can be called, or those in a small container: a registry, not a data set."""
    if isinstance(value, dict | list | tuple | set):
        if depth and len(value) <= MAX_REGISTRY_LENGTH:
            for item in value.values() if isinstance(value, dict) else value:
                yield from _callables(item, holder, depth - 1)
    elif value is not _MISSING and callable(value) and not isinstance(value, type | nn.Module | Tensor | ModuleType):
        yield value, None if holder is _MISSING or isinstance(holder, ModuleType | type) else holder
    elif isinstance(value, nn.Module) and "forward" in vars(value):
        yield value.forward, value


def _instance_attributes(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False

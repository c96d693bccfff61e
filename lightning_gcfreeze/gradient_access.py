"""Who, beside Lightning itself, may look at gradients, or change them.

`Compact` takes gradients away from the parameters, and `Promotion` does not compute some of them. Both are right only
where nobody looks. So the question is not which hooks are known to look, but whether anybody can: gradients are taken
away where none of the places below has code from outside of Lightning that overrides a hook in the gradient's way, or
that mentions gradients.

Looked through are the LightningModule, the callbacks, the strategy and its precision plugin; hooks on parameters, on
modules and on the optimizer; and the functions that these call by name. See docs/decisions/gradient-access.md.
"""

import dis
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

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

_KNOWN = ("lightning", "pytorch_lightning", "lightning_fabric", "torch", "builtins", "weakref", __name__.split(".")[0])
_GRADIENT = re.compile(r"(^|_)(auto)?grad(ient)?s?(_|$)|(^|_)backward($|_)|^register_(\w+_)?hook$", re.IGNORECASE)
_HARMLESS = frozenset(
    {
        "no_grad", "enable_grad", "set_grad_enabled", "is_grad_enabled", "requires_grad", "requires_grad_",
        "accumulate_grad_batches",
        "gradient_clip_val", "gradient_clip_algorithm", "gradient_checkpointing", "gradient_checkpointing_enable",
        "gradient_checkpointing_disable", "configure_gradient_clipping", "use_grad_checkpointing",
    }
)  # fmt: skip
_IN_PLACE = re.compile(r"[a-z]\w*[a-z0-9]_")
_OF_GRADIENTS = frozenset({"requires_grad_", "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"})
_WEIGHTS = frozenset({"parameters", "named_parameters", "get_parameter", "params", "weight", "bias", "data"})
_STATE = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "acc_delta"})


def of_run(
    module: nn.Module,
    callbacks: Iterable[Any],
    plugins: Iterable[Any],
    parameters: Mapping[str, Parameter],
    optimizer: Optimizer,
) -> list[str]:
    """Everything in a run that may look at gradients, by a name that its author knows it by; empty if there is none.

    Args:
        module: the LightningModule.
        callbacks: the Trainer's.
        plugins: the strategy and the precision plugin.
        parameters: the eligible ones.
        optimizer: the one that steps them.
    """
    owners = [module, *callbacks, *plugins]
    found = [name for owner in owners for name in _of_owner(owner)]
    found += [
        f"a hook on {name}" for name, p in parameters.items() if p._backward_hooks or p._post_accumulate_grad_hooks
    ]
    for name, layer in module.named_modules():
        if layer._backward_hooks or layer._backward_pre_hooks:
            found.append(f"a backward hook on {name or type(layer).__name__}")
        hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
        found += [f"the forward hook {_name(hook)}" for hook in hooks if _is_foreign(hook) and _mentions(hook)]
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


def of_weights(module: nn.Module, callbacks: Iterable[Any], plugins: Iterable[Any], optimizer: Optimizer) -> list[str]:
    """Code that may write to weights between steps, frozen ones included."""
    found = [
        f"{type(owner).__name__}.{name}"
        for owner in (module, *callbacks, *plugins)
        for name, function in _foreign_methods(owner)
        if any(map(_may_write_weights, _codes_reached(function, owner)))
    ]
    return found + [f"the optimizer's hook {_name(hook)}" for hook in _optimizer_hooks(optimizer) if _is_foreign(hook)]


def of_optimizer_state(module: nn.Module, callbacks: Iterable[Any], plugins: Iterable[Any]) -> list[str]:
    """Methods that look an optimizer's state up by parameter, or change it."""
    return [
        f"{type(owner).__name__}.{name}"
        for owner in (module, *callbacks, *plugins)
        for name, function in _foreign_methods(owner)
        if _looks_for_state(function)
    ]


def _looks_for_state(function: Any) -> bool:
    codes = [code for layer in _layers(function) if isinstance(layer, FunctionType) for code in _codes(layer)]
    names, strings = {name for code in codes for name in code.co_names}, set[str]().union(*map(_strings, codes))
    variables = {name for code in codes for name in code.co_varnames}
    of_optimizer = any("optim" in name or name == "opt" for name in names | variables)
    by_parameter = bool((names | strings) & {"parameters", "named_parameters", "params"})
    changes = any(_IN_PLACE.fullmatch(name) for name in names) or bool(names & {"clear", "pop", "popitem"})
    known = bool(strings & _STATE)
    return (known and by_parameter) or (changes and (known or (of_optimizer and "state" in names)))


def _of_owner(owner: Any) -> Iterator[str]:
    for name, function in _foreign_methods(owner):
        if name in IN_THE_GRADIENTS_WAY or _mentions(function, owner):
            yield f"{type(owner).__name__}.{name}"


def _foreign_methods(owner: Any) -> Iterator[tuple[str, Any]]:
    """What an object's class, and the object itself where it was patched, has from outside of Lightning and torch."""
    defined = [(name, value) for cls in type(owner).__mro__ if not _is_known(cls) for name, value in vars(cls).items()]
    patched = [(name, value) for name, value in _own(owner).items() if hasattr(type(owner), name)]
    for name, value in [*patched, *defined]:
        if name.startswith(("__", "configure_")) and name not in IN_THE_GRADIENTS_WAY:
            continue  # they run before training
        if isinstance(value, property):
            value = value.fget
        for code in _layers(value)[:1]:
            is_code = isinstance(code, FunctionType) or (callable(code) and not _is_known(type(code)))
            if is_code and _is_foreign(value) and not isinstance(code, nn.Module | type):
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


def _mentions(function: Any, owner: Any = None) -> bool:
    """Whether the code of a function, or of the foreign functions that it calls by name, has a name for gradients."""
    return any(map(_names_gradients, _codes_reached(function, owner)))


def _names_gradients(code: CodeType) -> bool:
    names = _strings(code).union(code.co_names)
    return "params" in names or any(_GRADIENT.search(name) and name not in _HARMLESS for name in names)


def _may_write_weights(code: CodeType) -> bool:
    names = _strings(code).union(code.co_names)
    in_place = {name for name in names if _IN_PLACE.fullmatch(name)} - _OF_GRADIENTS
    stores = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_ATTR"}
    return bool((in_place or "load_state_dict" in names) and names & _WEIGHTS) or "data" in stores


def _codes_reached(function: Any, owner: Any = None) -> Iterator[CodeType]:
    """The code of a function, and of the foreign functions that it reaches by name."""
    left, seen = [function], set[int]()
    while left:
        for layer in _layers(left.pop()):
            if id(layer) in seen or _is_known(layer):
                continue
            seen.add(id(layer))
            if not isinstance(layer, FunctionType):  # an object that is called
                left += [method for method in vars(type(layer)).values() if isinstance(method, FunctionType)]
                continue
            for code in _codes(layer):
                yield code
                left += [value for value in _reached(layer, code, owner) if _is_foreign(value)]


def _reached(function: FunctionType, code: CodeType, owner: Any) -> Iterator[Any]:
    """Functions, and objects that can be called, that code reaches by a name."""
    instructions = [*dis.get_instructions(code)]
    loaded = {i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    known = [function.__globals__[name] for name in loaded if name in function.__globals__]
    known += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    known += [_own(owner)[name] for name in code.co_names if name in _own(owner)]
    for module in [value for value in known if isinstance(value, ModuleType) and not _is_known_module(value)]:
        known += [getattr(module, name) for name in code.co_names if hasattr(module, name)]
    yield from (v for v in known if callable(v) and not isinstance(v, type | nn.Module | Tensor | ModuleType))


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

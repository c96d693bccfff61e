"""Who, beside Lightning itself, may look at gradients, or change them.

`Compact` takes gradients away from the parameters, and `Promotion` does not compute some of them. Both are right only
where nobody looks. So the question is not which hooks are known to look, but whether anybody can: gradients are taken
away where none of the places below has code from outside of Lightning that overrides a hook in the gradient's way, or
that mentions gradients.

Looked through are the LightningModule, the callbacks, the strategy and its precision plugin; hooks on parameters, on
modules and on the optimizer; and the functions that these call by name. See docs/decisions/gradient-access.md.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

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
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
        found.append(f"the patched {type(optimizer).__name__}.step")
    return list(dict.fromkeys(found))


def of_optimizer_state(module: nn.Module, callbacks: Iterable[Any], plugins: Iterable[Any]) -> list[str]:
    """Methods that look an optimizer's state up by parameter, or change it."""
    return [
        f"{type(owner).__name__}.{name}"
        for owner in (module, *callbacks, *plugins)
        for name, function in _foreign_methods(owner)
        if _looks_for_state(function)
    ]


def _looks_for_state(function: Any) -> bool:
    codes = [*_codes(function)]
    names, strings = {name for code in codes for name in code.co_names}, set[str]().union(*map(_strings, codes))
    variables = {name for code in codes for name in code.co_varnames}
    of_optimizer = any("optim" in name or name == "opt" for name in names | variables)
    by_parameter = bool((names | strings) & {"parameters", "named_parameters", "params"})
    changes = any(re.fullmatch(r"[a-z]\w*[a-z]_|clear|pop|popitem", name) for name in names)
    known = bool(strings & _STATE)
    return (known and by_parameter) or (changes and (known or (of_optimizer and "state" in names)))


def _of_owner(owner: Any) -> Iterator[str]:
    for name, function in _foreign_methods(owner):
        if name in IN_THE_GRADIENTS_WAY or _mentions(function, owner):
            yield f"{type(owner).__name__}.{name}"


def _foreign_methods(owner: Any) -> Iterator[tuple[str, Any]]:
    """What an object's class, and the object itself where it was patched, has from outside of Lightning and torch."""
    defined = [(name, value) for cls in type(owner).__mro__ if _is_foreign(cls) for name, value in vars(cls).items()]
    patched = [(name, value) for name, value in _own(owner).items() if hasattr(type(owner), name)]
    for name, value in [*patched, *defined]:
        if name.startswith(("__", "configure_")) and name not in IN_THE_GRADIENTS_WAY:
            continue  # they run before training
        if isinstance(value, property):
            value = value.fget
        code = _function(value)
        is_code = isinstance(code, FunctionType) or (callable(code) and _is_foreign(type(code)))
        if is_code and _is_foreign(value) and not isinstance(code, nn.Module | type):
            yield name, value


def _own(owner: Any) -> dict[str, Any]:
    return getattr(owner, "__dict__", {})


def _is_foreign(value: Any) -> bool:
    """Whether code comes from outside of Lightning, torch and this package; what cannot be told does."""
    function = _function(value)
    return str(getattr(function, "__module__", None)).split(".")[0] not in _KNOWN


def _function(value: Any) -> Any:
    """What a method, a partial or a decorated function is made of."""
    while True:
        if isinstance(value, MethodType):
            value = value.__func__
        elif isinstance(value, functools.partial | functools.partialmethod):
            value = value.func
        elif isinstance(value, staticmethod | classmethod) or hasattr(value, "__wrapped__"):
            value = value.__wrapped__
        else:
            return value


def _mentions(function: Any, owner: Any = None) -> bool:
    """Whether the code of a function, or of the foreign functions that it calls by name, has a name for gradients."""
    left, seen = [_function(function)], set[int]()
    while left:
        function = _function(left.pop())
        if id(function) in seen:
            continue
        seen.add(id(function))
        if not isinstance(function, FunctionType):
            if _is_foreign(type(function)):  # an object that is called
                left += [value for value in vars(type(function)).values() if isinstance(value, FunctionType)]
            continue
        codes = [*_codes(function)]
        names = {name for code in codes for name in code.co_names}.union(*map(_strings, codes))
        if any(_GRADIENT.search(name) and name not in _HARMLESS for name in names):
            return True
        left += [value for value in _reached(function, names, owner) if _is_foreign(value)]
    return False


def _reached(function: FunctionType, names: set[str], owner: Any) -> Iterator[Any]:
    """Functions, and objects that can be called, that a function reaches by these names."""
    known = [function.__globals__[name] for name in names if name in function.__globals__]
    known += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    known += [value for name in names if (value := _own(owner).get(name)) is not None]
    for module in [value for value in known if isinstance(value, ModuleType) and _is_user_module(value)]:
        known += [getattr(module, name) for name in names if hasattr(module, name)]
    yield from (v for v in known if callable(v) and not isinstance(v, type | nn.Module | Tensor | ModuleType))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_user_module(module: ModuleType) -> bool:
    return module.__name__.split(".")[0] not in _KNOWN


def _codes(function: Any) -> Iterator[CodeType]:
    """The code of a function and of all functions that are defined in it."""
    left = [code] if isinstance(code := getattr(_function(function), "__code__", None), CodeType) else []
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
    function = _function(hook)
    return str(getattr(function, "__qualname__", type(function).__qualname__))

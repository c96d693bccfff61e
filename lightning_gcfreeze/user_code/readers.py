"""Find the code of a run that may read gradients, write to weights, or read the optimizer's state.

`Compact` takes gradients away from the parameters, and `GradientSkipper` does not compute some of them. Both are right
only if nobody else looks at gradients. So every hook and method from outside of the known packages is searched: one
counts if it overrides a hook that handles gradients, or if it mentions gradients, itself or in a function that it calls
by name. See docs/decisions/gradient-access.md.
"""

import dis
import re
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.modules.module import _global_backward_hooks, _global_backward_pre_hooks
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_gcfreeze.user_code.reached import (
    TRAINING_HOOKS_WITH_GRADIENTS,
    Code,
    Owners,
    code_objects,
    is_foreign,
    is_known,
    reached_functions,
    unwrapped,
)

_GRADIENT_NAME = re.compile(r"(^|_)(auto)?grad(ient)?s?(_|$)|(^|_)backward($|_)|^register_(\w+_)?hook$", re.IGNORECASE)
_HARMLESS_NAMES = frozenset(
    {
        "no_grad", "enable_grad", "set_grad_enabled", "is_grad_enabled", "requires_grad", "requires_grad_",
        "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "configure_gradient_clipping",
    }
)  # fmt: skip
_IN_PLACE_NAME = re.compile(r"[a-z]\w*[a-z0-9]_")
_IN_PLACE_ON_GRADIENTS = frozenset({"requires_grad_", "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"})
_WEIGHT_NAMES = frozenset(
    {"parameters", "named_parameters", "get_parameter", "params", "weight", "bias", "data", "state_dict"}
)
_STATE_NAMES = frozenset(
    {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_inf", "acc_delta"}
)


def gradient_readers(owners: Owners, parameters: Mapping[str, Parameter], optimizer: Optimizer) -> list[str]:
    """Return everything in a run that may look at gradients, by the name that its author knows.

    Args:
        owners: the objects whose methods are searched.
        parameters: the eligible parameters, by name.
        optimizer: the optimizer that steps them.
    """
    found = [
        method.label
        for method in owners.methods
        if method.name in TRAINING_HOOKS_WITH_GRADIENTS or _any_code(_names_gradients, method.functions)
    ]
    found += [
        f"a hook on {name}" for name, p in parameters.items() if p._backward_hooks or p._post_accumulate_grad_hooks
    ]
    for name, layer in owners.module.named_modules():
        if layer._backward_hooks or layer._backward_pre_hooks:
            found.append(f"a backward hook on {name or type(layer).__name__}")
        for hook in _foreign_forward_hooks(layer):
            if _any_code(_names_gradients, reached_functions(Code(hook))):
                found.append(f"the forward hook {_hook_name(hook)}")
    if _global_backward_hooks or _global_backward_pre_hooks:
        found.append("a backward hook on all modules")
    found += _foreign_optimizer_hooks(optimizer)
    found += [
        f"the patched {type(optimizer).__name__}.{name}"
        for name, value in vars(optimizer).items()
        if hasattr(type(optimizer), name) and callable(value) and not hasattr(value, "_wrapped_by_lr_sched")
    ]
    return list(dict.fromkeys(found))


def accumulator_holders(parameters: Mapping[str, Parameter]) -> list[str]:
    """Return the parameters whose gradient accumulator somebody holds, as libraries do that hook the backward pass.

    Must be called while no graph is alive, since a graph holds accumulators as well. Otherwise they are made anew for
    each graph.
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


def weight_writers(owners: Owners, parameters: Mapping[str, Parameter], optimizer: Optimizer) -> list[str]:
    """Return code that may write to weights between steps, frozen ones included; arguments as in `gradient_readers`."""
    found = [method.label for method in owners.methods if _any_code(_may_write_weights, method.functions)]
    for name, layer in owners.module.named_modules():
        forwards = [value for cls in type(layer).__mro__ if not is_known(cls) and (value := vars(cls).get("forward"))]
        reached = (
            function
            for value in (*forwards, *_foreign_forward_hooks(layer))
            for function in reached_functions(Code(value, layer))
        )
        if layer is not owners.module and _any_code(_may_write_weights, reached):
            found.append(f"{name} ({type(layer).__name__})")
    found += [f"a hook on {name}" for name, p in parameters.items() if p._post_accumulate_grad_hooks]
    return found + _foreign_optimizer_hooks(optimizer)


def optimizer_state_readers(owners: Owners) -> list[str]:
    """Return the methods that look up an optimizer's state by parameter, or change it."""
    return [method.label for method in owners.methods if any(map(_looks_for_state, method.functions))]


def _any_code(condition: Any, functions: Iterable[FunctionType]) -> bool:
    return any(condition(code) for function in functions for code in code_objects(function))


def _names_gradients(code: CodeType) -> bool:
    names = _string_names(code).union(code.co_names)
    return "params" in names or any(
        _GRADIENT_NAME.search(name) and name not in _HARMLESS_NAMES and "checkpoint" not in name for name in names
    )


def _may_write_weights(code: CodeType) -> bool:
    names = _string_names(code).union(code.co_names)
    if names & {"vector_to_parameters", "load_state_dict"} or any(name.startswith("_foreach_") for name in names):
        return True
    instructions = [*dis.get_instructions(code)]
    if any(i.opname == "STORE_ATTR" and i.argval == "data" for i in instructions):
        return True
    in_place = {name for name in names if _IN_PLACE_NAME.fullmatch(name)} - _IN_PLACE_ON_GRADIENTS
    stores = any(i.opname == "STORE_SUBSCR" for i in instructions)
    augmented = any(i.opname.startswith(("INPLACE", "BINARY_OP")) and i.argrepr[-1:] in ("=", "") for i in instructions)
    arrays = augmented and names & {"numpy", "state_dict"}
    return bool(names & _WEIGHT_NAMES) and bool(in_place or stores or arrays)


def _looks_for_state(function: FunctionType) -> bool:
    codes = [*code_objects(function)]
    names = {name for code in codes for name in (*code.co_names, *code.co_varnames, *_string_names(code))}
    of_optimizer = any("optim" in name or name == "opt" for name in names)
    by_parameter = bool(names & {"parameters", "named_parameters", "params"}) or not names & {"values", "items"}
    changes = any(_IN_PLACE_NAME.fullmatch(name) for name in names) or bool(names & {"clear", "pop", "popitem"})
    known = bool(names & _STATE_NAMES)
    return (known and by_parameter) or (changes and (known or (of_optimizer and "state" in names)))


def _string_names(code: CodeType) -> set[str]:
    """Return the constants that are names, as in ``getattr(p, "grad")`` or ``state["exp_avg"]``."""
    return {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}


def _foreign_forward_hooks(layer: nn.Module) -> Iterator[Any]:
    return filter(is_foreign, (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()))


def _foreign_optimizer_hooks(optimizer: Optimizer) -> list[str]:
    hooks = (
        *optimizer._optimizer_step_pre_hooks.values(),
        *optimizer._optimizer_step_post_hooks.values(),
        *_global_optimizer_pre_hooks.values(),
        *_global_optimizer_post_hooks.values(),
    )
    return [f"the optimizer's hook {_hook_name(hook)}" for hook in hooks if is_foreign(hook)]


def _hook_name(hook: Any) -> str:
    function = unwrapped(hook)[-1]
    return str(getattr(function, "__qualname__", type(function).__qualname__))

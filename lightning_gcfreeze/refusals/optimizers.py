"""Optimizers whose elements cannot be held, or whose state cannot be read."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, Optimizer

from lightning_gcfreeze._names import class_names, shortened
from lightning_gcfreeze.freezing import ELEMENTWISE, groups_without_rate
from lightning_gcfreeze.gradients import momentum

_TWO_SETS_OF_WEIGHTS = {
    frozenset({"train", "eval"}): "trains with other weights than it is evaluated with",
    frozenset({"weight_sum", "weight_lr_power"}): "trains with other weights than it is evaluated with",
    frozenset({"first_step", "second_step"}): "takes its gradients at other weights than those that it steps",
    frozenset({"Lookahead"}): "keeps slow weights next to those that are trained",
    frozenset({"sync_lookahead"}): "keeps slow weights next to those that are trained",
    frozenset({"swap_swa_sgd"}): "keeps averaged weights next to those that are trained",
}
"""Classes, methods and keys of parameter groups that identify optimizers with two sets of weights."""


def unsupported_optimizer(optimizer: Any) -> str | None:
    """Optimizers whose steps cannot be followed, or whose frozen elements affect the live ones."""
    if isinstance(optimizer, LBFGS):
        return (
            "LBFGS evaluates the loss several times a step, along directions that mix frozen and live elements: holding"
            " some of them constant is not exact. Use a first-order optimizer."
        )
    if not isinstance(optimizer, Optimizer):
        return (
            f"{type(optimizer).__name__} is no torch.optim.Optimizer, so no hook runs right after its steps. Use the"
            " optimizer that it wraps."
        )
    signs = class_names(optimizer).union(*optimizer.param_groups)
    signs |= {name for name in dir(type(optimizer)) if callable(getattr(type(optimizer), name, None))}
    for known, reason in _TWO_SETS_OF_WEIGHTS.items():
        if known <= signs:
            by = ", ".join(f"`{sign}`" for sign in sorted(known))
            return (
                f"{type(optimizer).__name__} {reason} ({by}): frozen elements would not be constant in both. Use an"
                " optimizer with one set of weights."
            )
    hooked = getattr(type(optimizer).step, "hooked", not hasattr(Optimizer, "_patch_step_function"))
    if not hooked or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return no_step_hooks(optimizer)
    return None


def already_followed(optimizer: Any, is_followed: bool) -> str | None:
    """Optimizers that another run follows."""
    if not is_followed:
        return None
    return (
        f"This {type(optimizer).__name__} is followed by another Freezer or callback, and an optimizer serves one only."
        " Close the other one first (`freezer.close()`)."
    )


def no_step_hooks(optimizer: Any) -> str:
    """Return the error for an optimizer in whose steps no hooks run."""
    return (
        f"{type(optimizer).__name__} does not run hooks after its steps (`register_step_post_hook`), which count steps"
        " and restore frozen values: its `__init__` does not call that of torch.optim.Optimizer, or it steps something"
        " else. Use the optimizer that it wraps."
    )


def several_evaluations(optimizer: Any) -> str:
    """Return the error for an optimizer that evaluates the loss more than once a step."""
    return (
        f"{type(optimizer).__name__} evaluates the loss several times in one step, at weights that are not those of the"
        " step: elements cannot be held constant to the bit meanwhile. Use an optimizer that evaluates it once; or, if"
        " the loop runs several backward passes before a step of a `Freezer`, pass their number as `accumulate`."
    )


def unreadable_momentum(optimizer: Any, named: Mapping[str, Parameter], has_stepped: bool, mean: bool) -> str | None:
    """Optimizers whose state does not tell the mean of each element's gradient, or without `mean` their divisor."""
    kind, why = type(optimizer), momentum.why_unreadable(optimizer, named, mean)
    if kind not in ELEMENTWISE:
        why = (
            "is not known to treat each element as torch's optimizers do (if it does, under the same names in its"
            " state, add its class to `lightning_gcfreeze.freezing.ELEMENTWISE`)"
        )
    elif has_stepped and not momentum.has_state(optimizer, named) and (mean or not isinstance(optimizer, SGD)):
        why = "has no state of any eligible parameter after its step"
    return why and (
        f"The order reads the {'running mean' if mean else 'scale'} of the gradients in the optimizer's state, but"
        f" {kind.__name__} {why}. Use `order='progress'`, which observes the gradients itself."
    )


def unsupported_rates(optimizer: Optimizer, sets_them: bool = False) -> str | None:
    """Optimizers whose learning rates `lr_after_freeze` cannot multiply, since they make them themselves."""
    missing = ", ".join(f"{rate!r} in group {i}" for i, rate in groups_without_rate(optimizer).items())
    if not (missing or sets_them):
        return None
    why = f"has no number as `lr`, but {missing}" if missing else "sets them within its own step"
    return (
        f"`lr_after_freeze` multiplies the learning rates of an optimizer, but {type(optimizer).__name__} {why}: the"
        " factor would be lost, or would be in the next step's rates as well. Let `lr` be a float in each group, and"
        " change it between steps only, as schedulers do; or leave `lr_after_freeze` out."
    )


def not_compactable(optimizer: Optimizer, module: nn.Module) -> str | None:
    """Optimizers that need the frozen elements, and layers that write to their weights themselves."""
    if type(optimizer) not in ELEMENTWISE:
        return (
            f"`hold='compact'` passes only the live elements to the optimizer, but {type(optimizer).__name__} is not"
            f" known to treat every element by itself; {', '.join(sorted(c.__name__ for c in ELEMENTWISE))} are. Use"
            " `hold='restore'` or 'auto', or, if it does, add its class to `lightning_gcfreeze.freezing.ELEMENTWISE`."
        )
    if writing := [name for name, layer in module.named_modules() if getattr(layer, "max_norm", None) is not None]:
        return (
            f"{shortened(writing)}: an embedding with `max_norm` rescales its weights in each forward pass, frozen ones"
            " too. Use `hold='restore'` or 'auto', which restores them."
        )
    return None


def gradients_are_kept(readers: Sequence[str]) -> str:
    """Return the reason why gradients stay in ``p.grad`` until the optimizer steps."""
    return (
        f"{shortened(readers)} may look at gradients, so all of them are computed and stay in `p.grad` until the"
        " optimizer steps. That saves optimizer state and work, but no gradients."
    )


def optimizer_state_is_read(readers: Sequence[str]) -> str | None:
    """Code that looks up a parameter's state in the optimizer, where `hold="compact"` keeps that of live elements."""
    if not readers:
        return None
    return (
        f"{shortened(readers)} looks up a parameter's entries in the optimizer's state, but with `hold='compact'` the"
        " state has entries for live elements only, not for parameters. Use `hold='restore'` or 'auto'."
    )

"""Configurations that are supported but probably not meant. Each function returns a sentence to warn with, or None."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze._names import class_names, closest, shortened


def before_the_first_step(
    decision_steps: Sequence[int],
    planned_steps: float,
    patterns: Mapping[str, Sequence[str] | None],
    names: Collection[str],
    ks: Iterable[Any],
    n_eligible: int,
) -> list[str | None]:
    """Return all there is to warn of before the first step; see the functions below."""
    return [
        freeze_never_reached(decision_steps, planned_steps),
        *(useless_patterns(argument, given, names) for argument, given in patterns.items()),
        *(small_count(k, n_eligible) for k in ks),
    ]


def freeze_never_reached(decision_steps: Sequence[int], planned_steps: float) -> str | None:
    """Warn of decisions after the end of training.

    Args:
        decision_steps: the optimizer steps after which something is frozen, ascending.
        planned_steps: all optimizer steps that are planned; infinite, negative or NaN if unknown.
    """
    if not 0 <= planned_steps < math.inf or all(t < planned_steps for t in decision_steps):
        return None
    t = next(t for t in decision_steps if t >= planned_steps)
    stage = "frozen elements" if t == decision_steps[0] else f"the stage of t={t}"
    return (
        f"No step will train with {stage}: `t0={t}` is not below the {planned_steps:.0f} optimizer steps planned. Lower"
        " `t0` or train longer."
    )


def useless_patterns(argument: str, patterns: Sequence[str] | None, names: Collection[str]) -> str | None:
    """Warn of patterns that match no parameter.

    Args:
        argument: `include` or `exclude`.
        patterns: its value.
        names: the names of all parameters.
    """
    useless = [pattern for pattern in patterns or () if not any(fnmatchcase(name, pattern) for name in names)]
    if not useless:
        return None
    listing = ", ".join(closest(pattern, names) for pattern in useless)
    return f"`{argument}` has patterns that match no parameter: {listing}."


def small_count(k: Any, n_eligible: int) -> str | None:
    """Warn of an integer `k` below 1 % of the eligible elements, which may have been meant as a percentage."""
    if not isinstance(k, int) or not 0 < k < 0.01 * n_eligible:
        return None
    instead = f"a fraction is {k / 100:g}" if k <= 100 else f"a fraction is a float in [0, 1], as in `k={0.8}`"
    return f"`k={k}` is a count: {k:,} of {n_eligible:,} eligible elements freeze; {instead}."


def averaged_weights(callbacks: Iterable[Any]) -> str | None:
    """Warn of callbacks that replace the weights, frozen ones included, by averages over steps before the freeze."""
    averaging = [
        type(callback).__name__
        for callback in callbacks
        if {"WeightAveraging", "StochasticWeightAveraging"} & class_names(callback)
    ]
    if not averaging:
        return None
    return (
        f"{', '.join(averaging)} replaces the weights by averages over steps before the freeze as well: frozen elements"
        " will not keep the values of the freeze, and `delta()` will raise an error. Start averaging after `t0`."
    )


def moved_at_the_end(moved: Sequence[str]) -> str | None:
    """Warn of parameters whose frozen elements were replaced after the last step.

    Args:
        moved: their names.
    """
    if not moved:
        return None
    return (
        f"the fit ends with other values of frozen elements in {shortened(moved)} than they froze with: something"
        " replaced them after the last step, such as averages of weights, in a callback or within the optimizer."
        " `delta()` will raise an error."
    )


def late_parameters(module: nn.Module, optimizer: Optimizer, observable: Mapping[str, Parameter]) -> str | None:
    """Warn of parameters that began to train after observing had begun, as with Lightning's BaseFinetuning.

    Args:
        module: the module that is trained.
        optimizer: the optimizer that steps it.
        observable: the parameters that trained when observing began, whether eligible or not.
    """
    known = {id(p) for p in observable.values()}
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    late = {n: p for n, p in module.named_parameters() if p.requires_grad and id(p) in optimized and id(p) not in known}
    if not late:
        return None
    return (
        f"{shortened(late)} began to train after observing had begun, so these"
        f" {sum(map(Tensor.numel, late.values())):,} elements are not ranked and stay live. Let them train from the"
        " first step, or `fit` again with a new callback once they do."
    )

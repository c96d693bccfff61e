"""What is probably not meant, though it can be served: each function returns a sentence to warn with, or None."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer


def of_planned_steps(decisions: Sequence[int], planned: float) -> str | None:
    """Decisions that training ends before.

    Args:
        decisions: the steps after which something is frozen, ascending.
        planned: optimizer steps that the Trainer will take in all; infinite or negative if it does not know.
    """
    if not 0 <= planned < math.inf or all(t < planned for t in decisions):
        return None
    t = next(t for t in decisions if t >= planned)
    first = t == decisions[0]
    what = "No step will train with frozen elements" if first else f"No step will train with the stage of t={t}"
    return f"{what}: `t0={t}` is not below the {planned:.0f} optimizer steps planned. Lower `t0` or train longer."


def of_patterns(name: str, patterns: Sequence[str] | None, trained: Collection[str]) -> str | None:
    """Patterns of `include` or `exclude` that match no parameter.

    Args:
        name: of the argument.
        patterns: its value.
        trained: the names of all parameters that could match.
    """
    useless = [p for p in patterns or () if not any(fnmatchcase(known, p) for known in trained)]
    if not useless:
        return None
    return f"`{name}` has patterns that match no parameter: {', '.join(closest(p, trained) for p in useless)}."


def closest(pattern: str, names: Collection[str]) -> str:
    """A pattern that matches nothing, with what may have been meant: a few names, however many there are."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"{pattern!r} (a prefix is written '{pattern}.*')"
    likely = get_close_matches(pattern, names, n=3, cutoff=0.5) or get_close_matches(
        pattern, {f"*.{name.rpartition('.')[2]}" for name in names}, n=3, cutoff=0.5
    )
    likely = likely or list(names)[:3]
    return f"{pattern!r} (closest: {', '.join(map(repr, likely))})"


def of_small_count(k: Any, eligible: int) -> str | None:
    """An integer so small that it may have been meant as a percentage."""
    if not isinstance(k, int) or not 0 < k < 0.01 * eligible:
        return None
    instead = f"a fraction is {k / 100:g}" if k <= 100 else f"a fraction is a float in [0, 1], as in `k={0.8}`"
    return f"`k={k}` is a count: {k:,} of {eligible:,} eligible elements freeze; {instead}."


def of_averages(callbacks: Iterable[Any]) -> str | None:
    """Callbacks that replace the weights, frozen ones included, by averages over steps before the freeze."""
    averaging = [
        type(callback).__name__
        for callback in callbacks
        if {"WeightAveraging", "StochasticWeightAveraging"} & {cls.__name__ for cls in type(callback).__mro__}
    ]
    if not averaging:
        return None
    return (
        f"{', '.join(averaging)} replaces the weights by averages over steps before the freeze as well: frozen elements"
        " will not have the values that they froze with then, and `delta()` refuses them. Start averaging after `t0`."
    )


def of_late_parameters(module: nn.Module, optimizer: Optimizer, eligible: Mapping[str, Parameter]) -> str | None:
    """Parameters that began to train after observing had begun, as BaseFinetuning lets them.

    Args:
        module: the module that is trained.
        optimizer: the one that steps it.
        eligible: the parameters that were observed, with those that were left out by name.
    """
    known = {id(p) for p in eligible.values()}
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    late = {n: p for n, p in module.named_parameters() if p.requires_grad and id(p) in optimized and id(p) not in known}
    if not late:
        return None
    return (
        f"{some(late)} began to train after observing had begun, so these {sum(map(Tensor.numel, late.values())):,}"
        " elements are not ranked and stay live. Let them train from the first step, or `fit` again with a new callback"
        " once they do."
    )


def some(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    listing = list(names)
    return ", ".join(listing[:5]) + (f" and {len(listing) - 5} more" if len(listing) > 5 else "")

"""Which parameters are eligible to freeze, and how many of their elements k means."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze import _names


def eligible(
    module: nn.Module, optimizer: Optimizer | None, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Parameter]:
    """Return the parameters that require a gradient, that the optimizer has, and whose names match.

    Args:
        module: the module that is trained.
        optimizer: the optimizer that steps it; None: there is none yet, and all parameters are its.
        include: fnmatch patterns, one of which a name must match; None: no condition.
        exclude: fnmatch patterns, none of which a name may match.

    Raises:
        ValueError: no parameter is eligible, or one of them is complex.
    """
    candidates = trained(module, optimizer)
    chosen = {
        name: p
        for name, p in candidates.items()
        if (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
    }
    if not chosen:
        names = _names.shortened(candidates) or "none that belongs to the module and requires a gradient"
        hint = f" Closest: {_names.closest(include[0], candidates)}." if include and candidates else ""
        raise ValueError(
            f"No parameter is eligible with `include={include}` and `exclude={exclude}`."
            f" {'The optimizer trains' if optimizer else 'There are'} {names}.{hint}"
        )
    if wrong := [name for name, p in chosen.items() if p.is_complex()]:
        raise ValueError(f"Complex parameters cannot be ordered: {', '.join(wrong)}. Leave them out by `exclude`.")
    return chosen


def trained(module: nn.Module, optimizer: Optimizer | None) -> dict[str, Parameter]:
    """Return the parameters of a module that require a gradient and that the optimizer, if there is one, has."""
    able = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if optimizer is None:
        return able
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in able.items() if id(p) in optimized}


def resolve_count(k: int | float, n_eligible: int) -> int:
    """Return how many elements `k` means: an int is a count, a float a fraction, rounded to the nearest count.

    Raises:
        ValueError: `k` is more than `n_eligible`.
    """
    count = k if isinstance(k, int) else round(k * n_eligible)
    if count > n_eligible:
        raise ValueError(
            f"`k={k}` is more than the {n_eligible} eligible elements. Lower it, pass a float in [0, 1] for a fraction,"
            " or widen `include`/`exclude`."
        )
    return count

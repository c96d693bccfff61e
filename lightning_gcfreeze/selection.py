"""Which elements are eligible, and which of them freeze: scores and k -> masks. The rule for ties stands only here.

Elements are compared by score; equal scores go by the order of the parameters, then by index within the parameter
(row by row). So k elements are chosen exactly, the same ones on every device and rank, and the choice for k is
contained in the choice for k + 1. This is α(k) of the paper, Eq. (2.7), read as: rank <= k is frozen.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze._types import Named


def eligible(
    module: nn.Module, optimizer: Optimizer, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Parameter]:
    """The parameters that require a gradient, that the optimizer has, and whose names match.

    Args:
        include: fnmatch patterns, one of which a name must match; None: no condition.
        exclude: fnmatch patterns, none of which a name may match.

    Raises:
        ValueError: there are none, or one is complex.
    """
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) in optimized}
    chosen = {
        name: p
        for name, p in trained.items()
        if (include is None or any(fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatchcase(name, pattern) for pattern in exclude or ())
    }
    if not chosen:
        raise ValueError(
            f"No parameter is eligible with `include={include}` and `exclude={exclude}`. The optimizer trains"
            f" {', '.join(trained) or 'none that belongs to the module and requires a gradient'}."
        )
    if wrong := [name for name, p in chosen.items() if p.is_complex()]:
        raise ValueError(f"Complex parameters cannot be ordered: {', '.join(wrong)}. Leave them out by `exclude`.")
    return chosen


def resolve_count(k: int | float, eligible: int) -> int:
    """How many of `eligible` elements `k` means: an int is a count, a float a fraction, rounded to the nearest.

    Raises:
        ValueError: there are fewer than `k` elements.
    """
    count = k if isinstance(k, int) else round(k * eligible)
    if count > eligible:
        raise ValueError(
            f"`k={k}` is more than the {eligible} eligible elements. Lower it, pass a float in [0, 1] for a fraction,"
            " or widen `include`/`exclude`."
        )
    return count


def lowest(scores: Named, k: int) -> dict[str, Tensor]:
    """Mark the k elements of the lowest score over all tensors.

    Args:
        scores: ``{name: (*p.shape)}``, any real dtype, free of NaN (see `check_scores`).
        k: 0 to the number of elements.

    Returns:
        ``{name: bool (*p.shape)}``, True for exactly k elements in all.
    """
    flat = _flatten(scores)
    if 0 < k < flat.numel():
        threshold = flat.sort().values[k - 1]  # kthvalue is not deterministic on CUDA, and refused where that is asked
        chosen = flat < threshold
        missing = k - int(chosen.sum())
        chosen[(flat == threshold).nonzero()[:missing]] = True
    else:
        chosen = torch.full_like(flat, k > 0, dtype=torch.bool)
    return _unflatten(chosen, scores)


def ranks(scores: Named) -> dict[str, Tensor]:
    """The paper's vector I: for every element its place in the order, 1 = lowest score.

    ``lowest(scores, k)`` is ``ranks(scores) <= k`` for every k. diag(0.3, 0.2, 0.25) has the ranks [3, 1, 2].

    Returns:
        ``{name: int64 (*p.shape)}``, a permutation of 1, …, p.
    """
    flat = _flatten(scores)
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(1, len(order) + 1, device=order.device)
    return _unflatten(places, scores)


def check_scores(scores: Named, parameters: Named) -> None:
    """Refuse scores that do not order the parameters.

    Raises:
        TypeError: `scores` is no mapping of tensors.
        ValueError: names or shapes differ from those of `parameters`, or a score is NaN.
    """
    if not isinstance(scores, Mapping) or not all(isinstance(score, Tensor) for score in scores.values()):
        raise TypeError(f"`order` must return a mapping of parameter names to tensors of scores, got {scores!r:.200}.")
    if scores.keys() != parameters.keys():
        raise ValueError(
            f"`order` must score every eligible parameter: {sorted(parameters.keys() - scores.keys())} missing,"
            f" {sorted(scores.keys() - parameters.keys())} unknown."
        )
    for name, score in scores.items():
        if score.shape != parameters[name].shape:
            raise ValueError(
                f"`order` must return one score per element: {name!r} has the shape {tuple(parameters[name].shape)},"
                f" its scores {tuple(score.shape)}."
            )
        if score.isnan().any():
            raise ValueError(f"`order` returned NaN for {int(score.isnan().sum())} elements of {name!r}.")


def _flatten(scores: Named) -> Tensor:
    return torch.cat([score.flatten() for score in scores.values()])


def _unflatten(flat: Tensor, like: Named) -> dict[str, Tensor]:
    pieces = flat.split([score.numel() for score in like.values()])
    return {name: piece.view(score.shape) for (name, score), piece in zip(like.items(), pieces, strict=True)}

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

from lightning_gcfreeze._types import Granularity, Named


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


def pooled(scores: Named, granularity: Granularity) -> dict[str, Tensor]:
    """Give every element the mean score of what it freezes with.

    Args:
        scores: ``{name: (*p.shape)}``, any real dtype.
        granularity: "element"; "row", what has the same first index (an output neuron, a filter, a word's embedding, an
            element of a vector); or "tensor".

    Returns:
        ``{name: (*p.shape)}``; means are float64, so that their order is that of the exact ones.
    """
    if granularity == "element":
        return dict(scores)
    return {
        name: _for_elements(_units(score, granularity).mean(1, dtype=torch.float64), score)
        for name, score in scores.items()
    }


def lowest(scores: Named, k: int, granularity: Granularity = "element") -> dict[str, Tensor]:
    """Mark the k elements of the lowest score over all tensors; of whole rows or tensors, as many as fit into k.

    Args:
        scores: ``{name: (*p.shape)}``, any real dtype, free of NaN (see `check_scores`); `pooled` for `granularity`.
        k: 0 to the number of elements.
        granularity: rows or tensors are taken in the order of their scores, up to the first that would be too much.

    Returns:
        ``{name: bool (*p.shape)}``, True for exactly k elements in all, or for at most k.
    """
    if granularity != "element":
        return _lowest_units(scores, k, granularity)
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


def _lowest_units(scores: Named, k: int, granularity: Granularity) -> dict[str, Tensor]:
    units = {name: _units(score, granularity) for name, score in scores.items()}
    order = torch.cat([unit[:, 0] for unit in units.values()]).argsort(stable=True)
    sizes = torch.cat([order.new_full((len(unit),), unit.shape[1]) for unit in units.values()])
    chosen = torch.empty_like(order, dtype=torch.bool)
    chosen[order] = sizes[order].cumsum(0) <= k
    of_each = chosen.split([len(unit) for unit in units.values()])
    return {name: _for_elements(marks, scores[name]) for name, marks in zip(units, of_each, strict=True)}


def _for_elements(of_units: Tensor, like: Tensor) -> Tensor:
    """What a tensor has for each of its units, for each of its elements."""
    if not like.numel():
        return of_units.new_empty(like.shape)
    return of_units.reshape(len(of_units), *[1] * max(0, like.dim() - 1)).expand(like.shape or (1,)).reshape(like.shape)


def _units(tensor: Tensor, granularity: Granularity) -> Tensor:
    """(rows or tensors, elements of each); of an empty tensor (0, 1)."""
    if not tensor.numel():
        return tensor.reshape(0, 1)
    return tensor.reshape(len(tensor) if granularity == "row" and tensor.dim() else 1, -1)


def _flatten(scores: Named) -> Tensor:
    return torch.cat([score.flatten() for score in scores.values()])


def _unflatten(flat: Tensor, like: Named) -> dict[str, Tensor]:
    pieces = flat.split([score.numel() for score in like.values()])
    return {name: piece.view(score.shape) for (name, score), piece in zip(like.items(), pieces, strict=True)}

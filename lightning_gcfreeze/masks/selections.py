"""`Selection`: elements by a wish, such as some rows of an embedding, that is applied to a module when it trains."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_gcfreeze import _checks, selection
from lightning_gcfreeze._names import closest, shortened
from lightning_gcfreeze._types import Granularity, Named
from lightning_gcfreeze.masks.files import load_order

_SIGNS = {"logical_or": "|", "logical_and": "&"}
_AXES: dict[str, int | None] = {"element": None, "row": 1, "tensor": 0}
"""Of a parameter, those that tell its units apart; None: all."""


@dataclass(frozen=True)
class Names:
    """The eligible parameters of a module, as a `Selection` sees them."""

    shapes: Mapping[str, torch.Size]
    """Of whole parameters, by name."""
    aliases: Mapping[str, str]
    """Further names of parameters that several layers share, with the name in `shapes`."""

    @property
    def all(self) -> dict[str, str]:
        """Every name, with the one in `shapes`."""
        return {**{name: name for name in self.shapes}, **self.aliases}

    def find(self, name: str) -> str:
        """Return the name in `shapes` of a parameter.

        Raises:
            ValueError: there is no such eligible parameter.
        """
        if name not in self.all:
            raise ValueError(f"no eligible parameter is named {closest(name, self.all)}")
        return self.all[name]


@dataclass(frozen=True, eq=False)
class Selection:
    """Elements of parameters, by a rule that is applied to a module later; made by the functions of this file.

    ``a | b`` are the elements of either, ``a & b`` those of both, ``a - b`` those of `a` without those of `b`, and
    ``~a`` all eligible elements that are not in `a`.
    """

    rule: Callable[..., dict[str, Tensor]]
    """(names, *arguments) -> ``{name: bool (*p.shape)}`` of parameters that have selected elements."""
    arguments: tuple[Any, ...] = ()

    def of(self, names: Names) -> dict[str, Tensor]:
        """Return the masks of all eligible parameters, whole ones, ``{name: bool (*p.shape)}``, True = selected.

        Raises:
            ValueError: a name, a pattern or an index fits nothing, or a file is none.
        """
        found = self.rule(names, *self.arguments)
        return {name: found[name] if name in found else constant(False, s) for name, s in names.shapes.items()}

    def __or__(self, other: "Selection") -> "Selection":
        if not isinstance(other, Selection):
            return NotImplemented
        return Selection(_combined, ("logical_or", self, other))

    def __and__(self, other: "Selection") -> "Selection":
        if not isinstance(other, Selection):
            return NotImplemented
        return Selection(_combined, ("logical_and", self, other))

    def __sub__(self, other: "Selection") -> "Selection":
        return self & ~other if isinstance(other, Selection) else NotImplemented

    def __invert__(self) -> "Selection":
        return Selection(_inverted, (self,))

    def __repr__(self) -> str:
        """Return the call, or the operation, that made it."""
        if self.rule is _combined:
            operation, a, b = self.arguments
            return f"({a!r} {_SIGNS[operation]} {b!r})"
        if self.rule is _inverted:
            return f"~{self.arguments[0]!r}"
        return f"{self.rule.__name__.lstrip('_')}({', '.join(map(_shown, self.arguments))})"


def _shown(argument: Any) -> str:
    if isinstance(argument, Tensor):
        n_rows = int(argument.sum()) if argument.dtype == torch.bool else argument.numel()
        return f"<{n_rows} rows>"
    return f"<of {len(argument)} parameters>" if isinstance(argument, Mapping) else f"{argument!r:.80}"


def everything() -> Selection:
    """Select all eligible elements."""
    return Selection(_everything)


def rows(name: str, indices: Iterable[int] | Tensor) -> Selection:
    """Select rows of a parameter, what has the same first index: words of an embedding, output neurons, filters.

    Args:
        name: of the parameter.
        indices: of the rows, negative ones from the end; or a bool for each row.

    Raises:
        TypeError: they are neither.
    """
    return Selection(_rows, (*_names("rows", name), _as_indices(indices)))


def pattern(*patterns: str) -> Selection:
    """Select whole parameters whose names match one of the patterns (fnmatch): ``pattern("*.bias", "encoder.*")``."""
    return Selection(_pattern, _names("pattern", *patterns))


def layer(*layers: str) -> Selection:
    """Select all parameters of layers, by the names of these in the module: ``layer("encoder.layer.0")``."""
    return Selection(_layer, _names("layer", *layers))


def lowest(order: str | PathLike[str] | Named, k: int | float, granularity: Granularity = "element") -> Selection:
    """Select the k lowest elements of a saved order.

    Args:
        order: a file that `save_order` wrote, or its scores, ``{name: (*p.shape)}``.
        k: how many of the elements: an int is a count, a float in [0, 1] a fraction.
        granularity: what is selected together: "element", "row" or "tensor"; see `GradCovFreezeCallback`.

    Raises:
        TypeError: `k` is no number.
        ValueError: `k` or `granularity` is not among what is allowed.
    """
    if granularity == "mixed":
        raise ValueError(
            "`granularity='mixed'` needs to know how often a step uses each weight, which an order does not tell. Let a"
            " `Probe` write masks (`save_masks(file, k, 'mixed')`), or choose 'element', 'row' or 'tensor'."
        )
    _checks.one_of("granularity", granularity, get_args(Granularity))
    return Selection(_lowest, (order, _checks.count_or_fraction("k", k), granularity))


def at_random(k: int | float, granularity: Granularity = "element", seed: int = 0) -> Selection:
    """Select k elements at random, the same ones wherever the seed is the same.

    Args:
        k: how many of the elements: an int is a count, a float in [0, 1] a fraction.
        granularity: what is selected together: "element", "row" or "tensor"; see `GradCovFreezeCallback`.
        seed: of the draw.

    Raises:
        TypeError: `k` or `seed` is no number.
        ValueError: `k` or `granularity` is not among what is allowed.
    """
    _checks.one_of("granularity", granularity, list(_AXES))
    count, seed = _checks.count_or_fraction("k", k), _checks.integer("seed", seed, at_least=0)
    return Selection(_at_random, (count, granularity, seed))


def _names(function: str, *names: Any) -> tuple[str, ...]:
    """Return names that are given one by one."""
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"`{function}` takes names, one by one, got {names!r:.80}. A list is passed as `*names`.")
    return names


def _as_indices(indices: Any) -> Tensor:
    """Return indices, or a bool for each row, in memory of their own."""
    try:
        values = indices if hasattr(indices, "__array__") else list(indices)
        found = values.detach().clone() if isinstance(values, Tensor) else torch.tensor(np.array(values))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`indices` must be a list of ints, or a bool for each row, got {indices!r:.80}.") from error
    if not found.numel():
        return found.reshape(-1).long() if found.dtype != torch.bool else found
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.uint8 or found.dim() != 1:
        way_out = " Of uint8, nobody knows which of both is meant." if found.dtype == torch.uint8 else ""
        raise TypeError(
            "`indices` must be a list of ints, or a bool for each row, got"
            f" {found.dtype} of {tuple(found.shape)}.{way_out}"
        )
    return found


def _everything(names: Names) -> dict[str, Tensor]:
    return {name: constant(True, shape) for name, shape in names.shapes.items()}


def _rows(names: Names, name: str, indices: Tensor) -> dict[str, Tensor]:
    found = names.find(name)
    shape = names.shapes[found]
    if not shape:
        raise ValueError(f"{name!r} is a single number and has no rows; use `pattern({name!r})`")
    if indices.dtype == torch.bool:
        if indices.shape != shape[:1]:
            raise ValueError(f"{name!r} has {shape[0]} rows, and there are {indices.numel()} bools")
        marked = indices.cpu()
    else:
        if outside := [i for i in indices.tolist() if not -shape[0] <= i < shape[0]]:
            raise ValueError(f"{name!r} has the rows 0 to {shape[0] - 1}, and no {shortened(map(str, outside))}")
        marked = torch.zeros(shape[0], dtype=torch.bool)
        marked[indices.long().cpu()] = True
    return {found: marked.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)}


def _pattern(names: Names, *patterns: str) -> dict[str, Tensor]:
    found = dict[str, Tensor]()
    for wanted in patterns:
        matching = [name for known, name in names.all.items() if fnmatchcase(known, wanted)]
        if not matching:
            raise ValueError(f"no eligible parameter matches {closest(wanted, names.all)}")
        found |= {name: constant(True, names.shapes[name]) for name in matching}
    return found


def _layer(names: Names, *layers: str) -> dict[str, Tensor]:
    found = dict[str, Tensor]()
    for wanted in layers:
        inside = [name for known, name in names.all.items() if known.startswith(f"{wanted}.")]
        if not inside:
            known_layers = {name.rpartition(".")[0] for name in names.all}
            raise ValueError(f"no layer with eligible parameters is named {closest(wanted, known_layers)}")
        found |= {name: constant(True, names.shapes[name]) for name in inside}
    return found


def _lowest(names: Names, order: Any, k: int | float, granularity: Granularity) -> dict[str, Tensor]:
    given = load_order(order) if isinstance(order, str | PathLike) else order
    scores = {names.all.get(name, name): score for name, score in given.items()}
    if missing := names.shapes.keys() - scores.keys():
        raise ValueError(f"the order has no scores of {shortened(sorted(missing))}: it is of another model")
    scores = {name: scores[name] for name in names.shapes}
    parameters = {name: torch.empty(shape, device="meta") for name, shape in names.shapes.items()}
    selection.check_scores(scores, parameters)
    count = selection.resolve_count(k, sum(shape.numel() for shape in names.shapes.values()))
    return selection.lowest_k(selection.pooled(scores, granularity), count, granularity)


def _at_random(names: Names, k: int | float, granularity: Granularity, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = dict[str, Tensor]()
    for name, shape in names.shapes.items():
        drawn = torch.rand(shape[: _AXES[granularity]], generator=generator)  # one for each unit
        scores[name] = drawn.reshape(drawn.shape + (1,) * (len(shape) - drawn.dim())).expand(shape)
    return _lowest(names, scores, k, granularity)


def _combined(names: Names, operation: str, a: Selection, b: Selection) -> dict[str, Tensor]:
    first, second = a.of(names), b.of(names)
    return {name: getattr(torch, operation)(first[name], second[name]) for name in first}


def _inverted(names: Names, a: Selection) -> dict[str, Tensor]:
    return {name: ~mask for name, mask in a.of(names).items()}


def constant(value: bool, shape: torch.Size) -> Tensor:
    """Return a mask of one value, in the memory of one element."""
    return torch.full((), value).expand(shape)

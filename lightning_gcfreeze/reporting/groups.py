"""Frozen fractions by layer: which parameters are shown together, and what was frozen at each step."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

MAX_GROUPS = 16
"""Parameters that are shown one by one, unless a number is given. Of more, those of a module are taken together."""

History: TypeAlias = Sequence[tuple[int, Mapping[str, float]]]
"""Optimizer steps, and the frozen fractions, by parameter or layer, that hold from there on. What is missing has 0."""


def by_module(names: Iterable[str], most: int) -> dict[str, list[str]]:
    """Return parameters by the module that they are shown as: each by itself if there are no more than `most`.

    Of more, the module with most parameters is parted into its children, siblings with as many together with it, and
    so on, as long as there are at most `most` groups.

    Args:
        names: of parameters.
        most: groups; 0: there are none.

    Returns:
        ``{name of a module, or of a parameter that is alone: names of parameters}``, in the order of `names`.
    """
    return {group: list(members) for group, members in _groups(tuple(names), most).items()} if most else {}


@functools.lru_cache(maxsize=64)
def _groups(names: tuple[str, ...], most: int) -> dict[str, tuple[str, ...]]:
    if len(names) <= most:
        return {name: (name,) for name in names}
    found: dict[str, list[str]] = {"": list(names)}
    while (parted := _parted(found, most)) is not None:
        found = parted
    order = {name: i for i, name in enumerate(names)}
    named = {members[0] if len(members) == 1 else group or "all": tuple(members) for group, members in found.items()}
    return dict(sorted(named.items(), key=lambda item: order[item[1][0]]))


def _parted(found: dict[str, list[str]], most: int) -> dict[str, list[str]] | None:
    """Part the largest group, and with it siblings of its size; None if there would be too many."""
    largest = max(found, key=lambda group: len(found[group]))
    alike = [
        group
        for group, members in found.items()
        if len(members) == len(found[largest]) and group.rpartition(".")[0] == largest.rpartition(".")[0]
    ]
    parts: dict[str, list[str]] = {}
    for group in alike:
        start = len(group) + 1 if group else 0
        for name in found[group]:
            parts.setdefault(name[: start + len(name[start:].partition(".")[0])], []).append(name)
    too_many = len(found) - len(alike) + len(parts) > most
    return None if too_many else {group: found[group] for group in found if group not in alike} | parts


def grouped(fractions: Mapping[str, float], shapes: Mapping[str, torch.Size], most: int) -> dict[str, float]:
    """Return the frozen fractions of at most `most` groups; parameters count by their elements, or as 1."""
    found = {}
    for group, members in by_module(fractions, most).items():
        sizes = [shapes[name].numel() if name in shapes else 1 for name in members]
        total = math.fsum(fractions[name] * size for name, size in zip(members, sizes, strict=True))
        found[group] = fractions[group] if members == [group] else total / max(1, sum(sizes))
    return found


def history_by_layer(history: History, shapes: Mapping[str, torch.Size], most: int) -> History:
    """Return a history of parameters as one of at most `most` layers that begins with step 0."""
    by_layer = [(step, grouped(fractions, shapes, most)) for step, fractions in history]
    return by_layer if by_layer and by_layer[0][0] == 0 else [(0, {}), *by_layer]


def shortened_name(name: str, most: int = 40) -> str:
    """Return a name of a layer that fits: what is too long loses its beginning."""
    return name if len(name) <= most else f"…{name[len(name) + 1 - most :]}"

"""`FreezeSchedule`: several decisions, one after the other, each with its own step and its own count."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from lightning_gcfreeze import _checks

Stage: TypeAlias = tuple[int, int | float]


@dataclass(frozen=True)
class FreezeSchedule:
    """Stages (t, k): after optimizer step t, k of the eligible elements are frozen.

    The statistics of a stage are those of the steps since the stage before it, so each decides on fresh evidence.

    Args:
        stages: (t, k), t rising from at least 1; an int k is a count, a float in [0, 1] a fraction of the eligible
            elements.
        monotone: what is frozen stays so, and a stage adds to it; k does not fall. False: each stage ranks all elements
            anew, and what is no longer among the k lowest thaws, with the optimizer state that it froze with.

    Raises:
        TypeError: a stage is no pair of an int and a number.
        ValueError: no stages, t does not rise, or k falls although the schedule is monotone.
    """

    stages: Sequence[Stage]
    monotone: bool = True

    def __post_init__(self) -> None:
        _checks.boolean("monotone", self.monotone)
        stages = tuple(_stage(i, given) for i, given in enumerate(_checks.sequence("stages", self.stages)))
        object.__setattr__(self, "stages", stages)
        for (t, k), (later, k_later) in pairwise(stages):
            if later <= t:
                raise ValueError(f"`stages` must come one after the other, got t={t} before t={later}.")
            if type(k) is not type(k_later):
                raise TypeError(f"`stages` must all give k as a count or all as a fraction, got {k!r} and {k_later!r}.")
            if self.monotone and k_later < k:
                raise ValueError(
                    f"`stages` goes from k={k} to k={k_later}, but what is frozen stays so in a monotone schedule."
                    " Raise k, or set `monotone=False`, so that elements may thaw."
                )


def _stage(i: int, given: object) -> Stage:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise TypeError(f"`stages[{i}]` must be a pair (t, k), got {given!r}.")
    t, k = given
    return _checks.integer(f"stages[{i}][0]", t, at_least=1), _checks.count_or_fraction(f"stages[{i}][1]", k)

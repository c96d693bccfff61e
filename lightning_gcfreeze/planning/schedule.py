"""`FreezeSchedule`: several decisions, one after the other, each with its own step and its own k."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from lightning_gcfreeze import _checks

Stage: TypeAlias = tuple[int, int | float]


@dataclass(frozen=True)
class FreezeSchedule:
    """Stages (t, k): after optimizer step t, k of the eligible elements are frozen.

    The statistics of a stage are those of the steps since the stage before it, so each stage decides on new evidence.

    Args:
        stages: pairs (t, k). t rises, from at least 1. k is a count (int) or a fraction in [0, 1] of the eligible
            elements (float), the same kind in all stages.
        monotone: True: frozen elements stay frozen and each stage adds to them, so k may not fall. False: each stage
            ranks all elements anew; an element that is no longer among the k lowest thaws, with the optimizer state
            that it had when it froze.

    Raises:
        TypeError: a stage is not a pair of an int and a number, or counts and fractions are mixed.
        ValueError: there are no stages, t does not rise, or k falls in a monotone schedule.
    """

    stages: Sequence[Stage]
    monotone: bool = True

    def __post_init__(self) -> None:
        _checks.boolean("monotone", self.monotone)
        stages = tuple(_stage(i, given) for i, given in enumerate(_checks.sequence("stages", self.stages)))
        object.__setattr__(self, "stages", stages)
        for (t, k), (later, k_later) in pairwise(stages):
            if later <= t:
                raise ValueError(f"`stages` must have rising steps t, got t={t} before t={later}.")
            if type(k) is not type(k_later):
                raise TypeError(f"`stages` must all give k as a count or all as a fraction, got {k!r} and {k_later!r}.")
            if self.monotone and k_later < k:
                raise ValueError(
                    f"`stages` goes from k={k} down to k={k_later}, but frozen elements stay frozen in a monotone"
                    " schedule. Raise k, or set `monotone=False`, so that elements may thaw."
                )

    @classmethod
    def growing(cls, begin: int, end: int, k: float, stages: int = 10) -> "FreezeSchedule":
        """Make a monotone schedule that freezes as much more at each of several stages, at equal distances.

        Where much freezes it loses less than one freeze that saves as much; see docs/orders.md, "When to freeze".

        Args:
            begin: optimizer step of the first stage, which freezes ``k / stages``.
            end: optimizer step of the last stage, which freezes `k`.
            k: fraction of the eligible elements.
            stages: how many, at least 2.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: an argument outside its range, or fewer steps between `begin` and `end` than stages need.
        """
        _checks.integer("stages", stages, at_least=2)
        _checks.integer("begin", begin, at_least=1)
        _checks.integer("end", end, at_least=begin + stages - 1)
        _checks.number("k", k, above=0.0)
        _checks.count_or_fraction("k", float(k))
        distance = (end - begin) / (stages - 1)
        return cls([(round(begin + i * distance), k * ((i + 1) / stages)) for i in range(stages)])


def _stage(i: int, given: object) -> Stage:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise TypeError(f"`stages[{i}]` must be a pair (t, k), got {given!r}.")
    t, k = given
    return _checks.integer(f"stages[{i}][0]", t, at_least=1), _checks.count_or_fraction(f"stages[{i}][1]", k)

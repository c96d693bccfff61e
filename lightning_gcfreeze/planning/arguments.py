"""What a user's `t0`, `k` and `schedule` stand for: decisions, each with its step and its k."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

from lightning_gcfreeze import _checks
from lightning_gcfreeze.planning.budget import Budget
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.planning.schedule import FreezeSchedule
from lightning_gcfreeze.planning.settling import Settled

PlannedDecision: TypeAlias = tuple[int | float | Settled, int | float | Growth | Budget]
"""(t0, k): the optimizer step after which to decide, a fraction of the planned ones, and how much to freeze then."""


def decisions_from_arguments(t0: Any, k: Any, schedule: Any) -> tuple[tuple[PlannedDecision, ...], bool]:
    """Return the decisions that a user's arguments stand for, and whether frozen elements stay frozen.

    Args:
        t0: an int, a float in (0, 1), "auto", a `Settled`, or None with a schedule.
        k: an int, a float in [0, 1], "auto", a `Growth`, a `Budget`, or None with a schedule.
        schedule: a `FreezeSchedule`, a list of pairs (t, k), or None.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its range, both or neither of a schedule and `t0` with `k`.
    """
    if (schedule := as_schedule(schedule)) is not None:
        if t0 is not None or k is not None:
            raise ValueError(f"`schedule` says when and how much: leave out `t0` and `k`, got t0={t0!r} and k={k!r}.")
        return tuple(schedule.stages), schedule.monotone
    if t0 is None or k is None:
        raise ValueError(f"Pass `t0` and `k`, a `schedule`, or `masks`; got t0={t0!r} and k={k!r}.")
    return ((_when(t0), _how_much(k)),), True


def as_schedule(schedule: Any) -> FreezeSchedule | None:
    """Return a `FreezeSchedule` as it is, or made of a list of pairs (t, k); None stays None.

    Raises:
        TypeError: `schedule` is something else.
    """
    if isinstance(schedule, Sequence) and not isinstance(schedule, str):
        return FreezeSchedule(schedule)
    if schedule is not None and not isinstance(schedule, FreezeSchedule):
        raise TypeError(f"`schedule` must be a FreezeSchedule or a list of pairs (t, k), got {schedule!r}.")
    return schedule


def _when(t0: Any) -> int | float | Settled:
    if isinstance(t0, Settled):
        return t0
    if isinstance(t0, str) and t0 == "auto":
        return Settled()
    if not isinstance(t0, Real) or isinstance(t0, bool):
        raise TypeError(
            f"`t0` must be an int of at least 1, a float in (0, 1), 'auto' or a Settled, got {t0!r}"
            f" ({type(t0).__name__})."
        )
    if not isinstance(t0, Integral):
        if 0.0 < float(t0) < 1.0:
            return float(t0)
        raise TypeError(
            f"`t0` must be an int of at least 1, got {t0!r} ({type(t0).__name__}): a float is a fraction of the planned"
            " optimizer steps, between 0 and 1."
        )
    return _checks.integer("t0", t0, at_least=1)


def _how_much(k: Any) -> int | float | Growth | Budget:
    if k == "auto":
        return Growth()
    if isinstance(k, str):
        raise TypeError(f"`k` must be an int, a float in [0, 1], 'auto', a Growth or a Budget, got {k!r} of type str.")
    return k if isinstance(k, Growth | Budget) else _checks.count_or_fraction("k", k)


def check_every(every: int, decisions: Sequence[PlannedDecision]) -> None:
    """Check that at least one step is observed before each decision, if each `every`-th step is.

    Raises:
        ValueError: no step would be observed before a decision.
    """
    before = 0
    for t, _ in decisions:
        last = t.max_t0 if isinstance(t, Settled) else None if isinstance(t, float) else t
        if last is not None and last // every == before // every:
            where = f"the first `t0={last}`" if not before else f"those from t={before} to t={last}"
            raise ValueError(
                f"`every={every}` leaves no step to observe among {where}. Lower the first or raise the second."
            )
        before = last or 0

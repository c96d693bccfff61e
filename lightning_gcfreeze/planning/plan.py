"""When a run decides, and how much is to be frozen then: as it was told, or as the data say.

A decision ranks the elements by what was observed since the one before it. Its step is given, or found by
`SettlingState`; its k is given, or grows from there on along the same order, by `GrowthState`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_gcfreeze import _checks
from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.estimators import gains
from lightning_gcfreeze.planning.growing import Growth, GrowthState, Verdict
from lightning_gcfreeze.planning.losses import Losses, LossMean
from lightning_gcfreeze.planning.schedule import FreezeSchedule
from lightning_gcfreeze.planning.settling import Look, Settled, SettlingState

Decision: TypeAlias = tuple[int | Settled, int | float | Growth]


def decisions(
    t0: Any, k: Any, max_t0: int | None, max_loss_increase: float | None, monitor: str | None, schedule: Any
) -> tuple[tuple[Decision, ...], bool]:
    """The callback's arguments as decisions, and whether what is frozen stays so.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its range, or that does not go with another.
    """
    if schedule is not None:
        if not isinstance(schedule, FreezeSchedule):
            raise TypeError(f"`schedule` must be a FreezeSchedule, got {schedule!r}.")
        if t0 is not None or k is not None:
            raise ValueError(f"`schedule` says when and how much: leave out `t0` and `k`, got t0={t0!r} and k={k!r}.")
    elif t0 is None or k is None:
        raise ValueError(f"Pass `t0` and `k`, or a `schedule`; got t0={t0!r} and k={k!r}.")
    if max_t0 is not None and t0 != "auto":
        raise ValueError(f"`max_t0={max_t0}` goes with `t0='auto'`, got t0={t0!r}. A `Settled` has its own.")
    if (max_loss_increase is not None or monitor is not None) and k != "auto":
        raise ValueError(
            f"`max_loss_increase={max_loss_increase}` and `monitor={monitor!r}` go with `k='auto'`, got k={k!r}. A"
            " `Growth` has its own."
        )
    if schedule is not None:
        return tuple(schedule.stages), schedule.monotone
    when = Settled(max_t0=max_t0) if t0 == "auto" else t0
    if isinstance(when, str):
        raise TypeError(f"`t0` must be an int of at least 1, 'auto' or a Settled, got {t0!r} (str).")
    if not isinstance(when, Settled):
        when = _checks.integer("t0", when, at_least=1)
    growth = Growth(Growth.max_loss_increase if max_loss_increase is None else max_loss_increase, monitor)
    how_much = growth if k == "auto" else k
    if isinstance(how_much, str):
        raise TypeError(f"`k` must be an int, a float in [0, 1], 'auto' or a Growth, got {k!r} of type str.")
    if not isinstance(how_much, Growth):
        how_much = _checks.count_or_fraction("k", how_much)
    return ((when, how_much),), True


def check_every(every: int, decisions: Sequence[Decision]) -> None:
    """Refuse to observe so rarely that a decision would come without evidence.

    Raises:
        ValueError: it would.
    """
    before = 0
    for t, _ in decisions:
        last = t.max_t0 if isinstance(t, Settled) else t
        if last is not None and last // every == before // every:
            where = f"the first `t0={last}`" if not before else f"those from t={before} to t={last}"
            raise ValueError(
                f"`every={every}` leaves no step to observe among {where}. Lower the first or raise the second."
            )
        before = last or 0


class Plan:
    """What is to be decided in a run, and how far it has come.

    Args:
        decisions: (t, k), in the order of t; only a single one may be left to the data.
        gain: of the recursion.
    """

    def __init__(self, decisions: Sequence[Decision], gain: gains.Gain) -> None:
        self.decisions, self._gain = decisions, gain
        self.made = 0  # decisions
        self.t0: int | None = None  # the step of the first
        self.settling: SettlingState | None = None
        self.growing: GrowthState | None = None
        self.news: dict[str, float] = {}  # what was found since this was last emptied, for loggers
        self._losses = Losses()
        self._before = LossMean()  # the loss before the first freeze
        self._validated: LossMean | None = None  # a validation's loss that was not judged yet

    @property
    def growth(self) -> Growth | None:
        """How k grows, if it does."""
        k = self.decisions[-1][1]
        return k if isinstance(k, Growth) else None

    @property
    def observes(self) -> bool:
        """Whether there is a decision to come."""
        return self.made < len(self.decisions)

    @property
    def unfinished(self) -> bool:
        """Whether masks may still change."""
        return self.observes or (self.growing is not None and not self.growing.done)

    @property
    def k(self) -> int | float:
        """How much is to be frozen: by the last decision that was made, or before it by the first."""
        if self.growing:
            return self.growing.fraction
        k = self.decisions[max(0, self.made - 1)][1]
        return k.fractions()[0] if isinstance(k, Growth) else k

    @property
    def latest(self) -> int:
        """The step after which the next decision is made at the latest."""
        t, _ = self.decisions[self.made]
        if isinstance(t, int):
            return t
        assert self.settling is not None
        return self.settling.max_t0

    def begin(self, planned: Callable[[], float]) -> str | None:
        """Find out what depends on the optimizer steps that are planned in all, if anything does.

        Returns:
            Why it cannot be: there is no end to them, and no latest step was given.
        """
        (t, _), *_ = self.decisions
        if isinstance(t, Settled) and self.settling is None:
            steps = math.nan if t.max_t0 else planned()
            if not t.max_t0 and not 0 < steps < math.inf:
                return (
                    "`t0='auto'` freezes after half of the planned steps at the latest, but this Trainer has no end, or"
                    " a loader without a length. Pass `max_t0`, or give the Trainer `max_steps`."
                )
            self.settling = SettlingState(t, t.max_t0 or max(1, int(steps) // 2), self._gain)
        return None

    def may_decide_after(self, step: int) -> bool:
        """Whether a decision may come right after this optimizer step."""
        if not self.observes:
            return False
        return step == (self.settling.next_look if self.settling else self.latest)

    def listens(self, step: int) -> bool:
        """Whether the training loss of this optimizer step is of interest."""
        by_training_loss = self.growth is not None and self.growth.monitor is None
        if self.observes:
            return bool(self.settling) or (by_training_loss and step > self.latest - self._every(self.latest))
        return by_training_loss and self.unfinished

    def hear(self, loss: Tensor) -> None:
        """Take in a training loss."""
        self._losses.add(loss)

    def hear_of_validation(self, loss: float) -> None:
        """Take in the monitored loss, the same on all processes. NaN is no loss, and after the freeze too much."""
        if not self.observes:
            self._validated = LossMean(math.inf if math.isnan(loss) else loss, 0.0, 1)
        elif math.isfinite(loss):
            self._before = LossMean(loss, 0.0, 1)

    def look(self, scores: Tensor, moved: Tensor, observed: int, fraction: float, world: World) -> Look:
        """Look back from this step; see `SettlingState.look`."""
        assert self.settling is not None
        loss = self._losses.read(world)
        if self.growth and self.growth.monitor is None:
            self._before = loss
        look = self.settling.look(scores, moved, observed, fraction, loss)
        self.news |= {
            "gcfreeze/settling/overlap": look.overlap,
            "gcfreeze/settling/overlap_of_noise": look.overlap_of_noise,
            "gcfreeze/settling/improvement": look.improvement,
            "gcfreeze/settling/improvement_noise": look.improvement_noise,
            "gcfreeze/settling/settled": float(look.settled),
        }
        return look

    def decided(self, step: int, world: World) -> None:
        """A decision was made after this step."""
        self.made += 1
        self.t0 = self.t0 or step
        self.news["gcfreeze/t0"] = float(self.t0)
        if self.growth:
            loss = self._losses.read(world) if self.growth.monitor is None else LossMean()
            self.growing = GrowthState(self.growth, self._every(step), loss if loss.of else self._before)

    def judge(self, step: int, world: World) -> Verdict:
        """What becomes of the last stage, right after this step, on all processes."""
        growing = self.growing
        if growing is None or growing.done or self.t0 is None:
            return "wait"
        if growing.growth.monitor is not None:
            if self._validated is None:
                return "wait"
            loss, self._validated = self._validated, None
        elif (step - self.t0) % growing.every:
            return "wait"
        else:
            loss = self._losses.read(world)
        verdict = growing.take(loss)
        self.news |= {
            "gcfreeze/growing/loss_increase": growing.increase,
            "gcfreeze/growing/loss_increase_noise": growing.noise,
            "gcfreeze/growing/stage": float(growing.stage + 1),
        }
        return verdict

    def share(self, world: World) -> None:
        """Become the same on all processes."""
        self._losses.share(world)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings."""
        return {
            "made": self.made,
            "t0": self.t0,
            "settling": self.settling.state_dict() if self.settling else None,
            "growing": self.growing.state_dict() if self.growing else None,
            "losses": self._losses.state_dict(),
            "before": list(self._before),
            "validated": None if self._validated is None else self._validated.value,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave of a plan with the same arguments."""
        self.made, self.t0 = state["made"], state["t0"]
        (t, _), *_ = self.decisions
        if state["settling"] and isinstance(t, Settled):
            self.settling = SettlingState(t, state["settling"]["max_t0"], self._gain)
            self.settling.load_state_dict(state["settling"])
        if state["growing"] and self.growth:
            self.growing = GrowthState.from_state_dict(self.growth, state["growing"])
        self._losses.load_state_dict(state["losses"])
        self._before = LossMean(*state["before"])
        self._validated = None if state["validated"] is None else LossMean(state["validated"], 0.0, 1)

    def _every(self, t0: int) -> int:
        """Steps over which the training loss is averaged, between stages."""
        assert self.growth is not None
        return self.growth.every or max(20, t0 // 10)

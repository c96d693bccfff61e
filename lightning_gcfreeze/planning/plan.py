"""The decisions of a run: when each is made, and how much it freezes, as given or as found from the data.

A decision ranks the elements by what was observed since the decision before it. Its step t0 is given, or found by
`SettlingState`. Its k is given, or grows from there on along the same order, by `GrowthState`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.estimators import gains
from lightning_gcfreeze.planning.arguments import PlannedDecision
from lightning_gcfreeze.planning.budget import Budget
from lightning_gcfreeze.planning.growing import Growth, GrowthState, Verdict
from lightning_gcfreeze.planning.losses import Losses, LossMean
from lightning_gcfreeze.planning.settling import Check, Settled, SettlingState
from lightning_gcfreeze.planning.trend import Fall, Trend


class Plan:
    """The decisions of a run, which of them have been made, and the losses that they depend on.

    Args:
        decisions: in the order of their steps. Only a single decision may have a `Settled` or a `Growth`. None where
            masks are given.
        gain: of the recursion that the scores are computed by.
    """

    def __init__(self, decisions: Sequence[PlannedDecision], gain: gains.Gain) -> None:
        self.decisions = self._given = decisions
        self._gain = gain
        self.n_decisions = 0
        """Number of decisions that have been made."""
        self.t0: int | None = None
        """Optimizer step of the first decision, once it has been made."""
        self.settling: SettlingState | None = None
        """With a `Settled`, once the plan has started."""
        self.growing: GrowthState | None = None
        """With a `Growth`, from the first freeze on."""
        self.metrics: dict[str, float] = {}
        """What was found since these were last logged, by tag; whoever logs them empties the dict."""
        self._losses = Losses()
        self._trend, self._validations = Trend(), Trend()  # of the training loss, and of a monitored one
        self._planned_steps = math.inf
        self._loss_before = LossMean()  # before the first freeze
        self._validation_loss: LossMean | None = None  # that was not judged yet

    @property
    def growth(self) -> Growth | None:
        """How k grows, if it does."""
        k = self.decisions[-1][1] if self.decisions else None
        return k if isinstance(k, Growth) else None

    @property
    def monitor(self) -> str | None:
        """The validation loss that is waited for, by the name under which it is logged; None: there is none."""
        return self.growth.monitor if self.growth and self.masks_may_change else None

    @property
    def has_next_decision(self) -> bool:
        """Whether there is a decision to come."""
        return self.n_decisions < len(self.decisions)

    @property
    def masks_may_change(self) -> bool:
        """Whether there is a decision to come, or k may still grow."""
        return self.has_next_decision or (self.growing is not None and not self.growing.done)

    @property
    def waits_for_forecast(self) -> bool:
        """Whether k grows as soon as the loss has less left to lose; until then nothing freezes or thaws."""
        return self.growing is not None and self.growing.is_waiting

    @property
    def remark(self) -> str:
        """A sentence to add to what a decision says of itself."""
        return " More freeze as soon as the loss has less left to lose." * self.waits_for_forecast

    @property
    def may_change_soon(self) -> bool:
        """Whether there is a decision to come, or a stage that is not judged yet, or the first one."""
        return self.masks_may_change and not (self.waits_for_forecast and self.k)

    @property
    def k(self) -> int | float | Budget:
        """How much to freeze, by the last decision that was made; before the first decision, by that one."""
        if self.growing:
            return self.growing.fraction
        k = self.decisions[max(0, self.n_decisions - 1)][1]
        return k.fractions()[0] if isinstance(k, Growth) else k

    @property
    def budget(self) -> Budget | None:
        """What `k` has to make room for, if it is a `Budget`."""
        return k if isinstance(k := self.k, Budget) else None

    @property
    def next_deadline(self) -> int:
        """The optimizer step after which the next decision is made at the latest."""
        t = self.decisions[self.n_decisions][0]
        if isinstance(t, int):
            return t
        assert self.settling is not None
        return self.settling.max_t0

    @property
    def last_step(self) -> int:
        """The optimizer step of the last decision; 0 where masks were given."""
        t = self.decisions[self.n_decisions - 1][0] if 0 < self.n_decisions <= len(self.decisions) else 0
        return t if isinstance(t, int) else self.t0 or 0

    @property
    def halfway(self) -> int:
        """The optimizer step half of the way to the next decision, or what `SettlingState.halfway` says."""
        t = self.decisions[self.n_decisions][0]
        if isinstance(t, int):
            before = self.decisions[self.n_decisions - 1][0] if self.n_decisions else 0
            return (before + t) // 2 if isinstance(before, int) else t
        assert self.settling is not None
        return self.settling.halfway

    def start(self, planned_steps: Callable[[], float]) -> str | None:
        """Find where training ends, the step that a fraction of it is, and the latest one where the data tell.

        Args:
            planned_steps: returns the number of optimizer steps that are planned; infinite, NaN or negative if it is
                not known. It is called only if it is needed.

        Returns:
            The reason why the plan cannot start, if it cannot.
        """
        if self.growth:
            steps = planned_steps()
            self._planned_steps = steps if steps > 0 else math.inf  # so is NaN
        t0 = self.decisions[0][0] if self.decisions else 0
        if isinstance(t0, int) or self.settling is not None:
            return None
        step = t0.max_t0 if isinstance(t0, Settled) else None
        if step is None:
            steps = planned_steps()
            if not 0 < steps < math.inf:
                return _no_end(t0)
            step = max(1, int(steps * (t0 if isinstance(t0, float) else 0.5) + 1e-9))  # .29 * 100 is below 29
        if isinstance(t0, Settled):
            self.settling = SettlingState(t0, step, self._gain)
        else:
            self.decisions = [(step, self.decisions[0][1])]
        return None

    def is_decision_step(self, step: int) -> bool:
        """Return whether a decision is due right after an optimizer step, or a check whether it is."""
        if not self.has_next_decision:
            return False
        return step == (self.settling.next_check if self.settling else self.next_deadline)

    def needs_loss(self, step: int) -> bool:
        """Return whether the training loss of an optimizer step is to be recorded."""
        return self._may_grow or (self.settling is not None and self.has_next_decision)

    @property
    def _may_grow(self) -> bool:
        """Whether k grows, or is to grow."""
        return self.growth is not None and self.masks_may_change

    def record_loss(self, loss: Tensor, step: int) -> None:
        """Record a training loss of this process, a tensor with one element. It is read from its device later.

        Args:
            loss: of the batch, or of a micro-batch.
            step: the optimizer step that it is part of.
        """
        if self._may_grow:
            self._trend.add(loss)
        checks = self.settling is not None and self.has_next_decision
        by_training_loss = self._may_grow and self.monitor is None
        judges = by_training_loss and (not self.has_next_decision or step > self._reference_begins)
        if checks or judges:
            self._losses.add(loss)

    @property
    def _reference_begins(self) -> int:
        """The last step before those whose mean loss later ones are compared with, where t0 is given."""
        return self.next_deadline - self._averaged_steps(self.next_deadline)

    def end_step(self, step: int, world: World) -> None:
        """Note that an optimizer step has ended. All processes must call it."""
        if self._may_grow:
            self._trend.end_step(step, world)

    def record_validation_loss(self, loss: float, step: int) -> None:
        """Record the monitored loss, the same on all processes.

        A loss that is not finite is ignored before the freeze; afterwards NaN counts as infinite.

        Args:
            loss: of the validation.
            step: optimizer steps before it.
        """
        self._validations.add_validation(step, loss)
        if not self.has_next_decision:
            self._validation_loss = LossMean(math.inf if math.isnan(loss) else loss, 0.0, 1)
        elif math.isfinite(loss):
            self._loss_before = LossMean(loss, 0.0, 1)

    def check_settled(self, scores: Tensor, moved: Tensor, observed: int, fraction: float, world: World) -> Check:
        """Check at this step whether the run has settled; see `SettlingState.check`. All processes must call it."""
        assert self.settling is not None
        loss = self._losses.read(world)
        if self.growth and self.growth.monitor is None:
            self._loss_before = loss
        check = self.settling.check(scores, moved, observed, fraction, loss)
        self.metrics |= {
            "gcfreeze/settling/overlap": check.overlap,
            "gcfreeze/settling/overlap_of_noise": check.overlap_of_noise,
            "gcfreeze/settling/improvement": check.improvement,
            "gcfreeze/settling/improvement_noise": check.improvement_noise,
            "gcfreeze/settling/settled": float(check.settled),
        }
        return check

    def record_decision(self, step: int, world: World) -> None:
        """Record that a decision is made right after an optimizer step. All processes must call it."""
        self.n_decisions += 1
        self.t0 = self.t0 or step
        self.metrics["gcfreeze/t0"] = float(self.t0)
        if self.growth:
            loss = self._losses.read(world) if self.growth.monitor is None else LossMean()
            self.growing = GrowthState(self.growth, self._averaged_steps(step), loss if loss.n else self._loss_before)
            self.growing.begin(*self._forecast(step))
            self.metrics["gcfreeze/growing/forgone"] = self.growing.forgone

    def judge_stage(self, step: int, world: World) -> Verdict:
        """Judge the last stage right after an optimizer step, if a loss is due. All processes must call it."""
        growing, loss = self.growing, self._stage_loss(step, world)
        if growing is None or loss is None or step == self._planned_steps:
            return "wait"
        verdict = growing.judge(loss, *self._forecast(step))
        self.metrics |= {
            "gcfreeze/growing/forgone": growing.forgone,
            "gcfreeze/growing/loss_increase": growing.increase,
            "gcfreeze/growing/loss_increase_noise": growing.noise,
            "gcfreeze/growing/stage": float(growing.stage + 1),
        }
        return verdict

    def synchronize(self, world: World) -> None:
        """Make the recorded losses the same on all processes. All processes must call it."""
        self._losses.synchronize(world)
        self._trend.synchronize(world)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on with a plan of the same arguments.

        Returns:
            "made" (number of decisions made): int; "t0": int or None; "first_step" (of the first decision, where it
            is known before): int or None; "settling" and "growing": the dicts of
            `SettlingState` and `GrowthState`, or None; "losses": the lists of `Losses`; "trend" and "validations": the
            dicts of `Trend`; "before" (the loss before the first freeze): [value, error, n]; "validated" (a validation
            loss that was not judged yet): float or None.
        """
        return {
            "made": self.n_decisions,
            "t0": self.t0,
            "first_step": t if self.decisions and isinstance(t := self.decisions[0][0], int) else None,
            "settling": self.settling.state_dict() if self.settling else None,
            "growing": self.growing.state_dict() if self.growing else None,
            "losses": self._losses.state_dict(),
            "trend": self._trend.state_dict(),
            "validations": self._validations.state_dict(),
            "before": list(self._loss_before),
            "validated": None if self._validation_loss is None else self._validation_loss.value,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.decisions, self.settling, self.growing = self._given, None, None
        self.n_decisions, self.t0 = state["made"], state["t0"]
        if (step := state.get("first_step")) and self.decisions and isinstance(self.decisions[0][0], float):
            self.decisions = [(step, self.decisions[0][1])]  # whatever is planned now
        if state["settling"] and self._settled:
            self.settling = SettlingState(self._settled, state["settling"]["max_t0"], self._gain)
            self.settling.load_state_dict(state["settling"])
        if state["growing"] and self.growth:
            self.growing = GrowthState.from_state_dict(self.growth, state["growing"])
        self._losses.load_state_dict(state["losses"])
        if "trend" in state:  # 0.1.0 had none
            self._trend.load_state_dict(state["trend"])
            self._validations.load_state_dict(state["validations"])
        self._loss_before = LossMean(*state["before"])
        self._validation_loss = None if state["validated"] is None else LossMean(state["validated"], 0.0, 1)

    @property
    def _settled(self) -> Settled | None:
        t0 = self.decisions[0][0] if self.decisions else None
        return t0 if isinstance(t0, Settled) else None

    def _forecast(self, step: int) -> tuple[Fall, float]:
        """What the loss still falls, and the training loss at the start; NaN for that where a monitored loss tells.

        Where there are too few validations for that, the training loss does.
        """
        fall = self._validations.fall(step, self._planned_steps)
        if not math.isnan(fall.value):
            return fall, math.nan
        return self._trend.fall(step, self._planned_steps), self._trend.first

    def _averaged_steps(self, t0: int) -> int:
        """Return the number of optimizer steps over which the training loss of a stage is averaged."""
        assert self.growth is not None
        return self.growth.every or max(20, t0 // 10)

    def _stage_loss(self, step: int, world: World) -> LossMean | None:
        """Return the loss to judge the last stage by; None if k does not grow any more, or no loss is due."""
        if self.growing is None or self.growing.done or self.t0 is None:
            return None
        if self.growing.growth.monitor is not None:
            loss, self._validation_loss = self._validation_loss, None
            return loss
        if (step - self.t0) % self.growing.every:
            return None
        return self._losses.read(world)


def _no_end(t0: float | Settled) -> str:
    """Return why `t0` has no step."""
    means, instead = f"`t0={t0}` is a fraction of the planned optimizer steps", "a number of steps"
    if isinstance(t0, Settled):
        means = "`t0='auto'` freezes after half of the planned optimizer steps at the latest"
        instead = "`t0=Settled(max_t0=...)`"
    return (
        f"{means}, but this training has no end, or a loader without a length. Pass {instead}, or say where it ends:"
        " `max_steps` of a Trainer, `planned_steps` of a Freezer."
    )

"""k from the data: freeze more and more elements along the order, as far as the loss at the end allows.

*Before each stage* a forecast: what the loss would still fall until the end of training (`Trend`), of which a frozen
fraction forgoes at most a share (`share_forgone`). A stage is let in if what all stages forgo together leaves the loss
at most `max_loss_increase` above that of the unfrozen run; until then it is waited for. A loss that goes on falling
never rises, however much of its fall is lost: only a forecast can tell.

*After each stage* a look back: the mean loss is compared with a reference, the lowest mean since shortly before t0. A
stage is good if the increase, plus one standard error, is at most what is allowed. It costs too much if the increase,
minus one standard error, is more than that, twice in a row. In between, noise hides the cost: more means are collected,
and after `patience` of them the current stage is kept.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_gcfreeze import _checks
from lightning_gcfreeze.planning.losses import LossMean
from lightning_gcfreeze.planning.trend import Fall

Verdict: TypeAlias = Literal["wait", "grow", "keep", "stay", "thaw"]
"""On a stage: "wait" for more losses, or for the forecast; "grow" to the next one; "keep" this one until the forecast
lets in the next; "stay" for good; or "thaw" it and keep the one before."""

EXPONENT = 1.5
FLOOR = 0.03
"""Of the training loss at the start: what is lower counts as this much. A model that has learned its data by heart has
a training loss of nearly nothing, and a hundredth of that says nothing of the loss on other data."""


def share_forgone(fraction: float) -> float:
    """Return which share of what the loss still falls a frozen fraction forgoes at most: fraction^1.5.

    Found on seventeen small trainings, frozen after a half and three quarters of their steps; see docs/choosing.md.
    """
    return float(fraction**EXPONENT)


@dataclass(frozen=True)
class Growth:
    """Freeze more and more elements, as far as the loss at the end allows: ``k=Growth(most=0.99, monitor="val_loss")``.

    ``k="auto"`` is ``k=Growth()``.

    Args:
        max_loss_increase: by how much the loss at the end of training may be above that of the unfrozen run, relative
            to it. A forecast keeps to it before a stage freezes, and afterwards the loss may not rise by more above the
            lowest loss since t0. A training loss below 3 % of what it began with counts as those 3 %.
        monitor: name of a logged loss, which is read after each validation. None: the training loss, averaged over
            `every` steps.
        first: fraction of the eligible elements that the first stage freezes, at t0 or when the forecast allows it.
        most: fraction that the last stage freezes.
        stages: number of stages.
        spacing: "geometric": the live fraction shrinks by the same factor from stage to stage; "linear": by the same
            difference.
        every: optimizer steps over which the training loss is averaged; None: a tenth of t0, at least 20.
        patience: loss means to collect before an undecided stage is kept.
        forecast: whether a stage waits until the forecast allows it: of the monitored loss, from the third validation
            in the second half of the steps on, else of the training loss. False: it follows once no loss has risen.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its range.
    """

    max_loss_increase: float = 0.02
    monitor: str | None = None
    first: float = 0.6
    most: float = 0.95
    stages: int = 4
    spacing: Literal["geometric", "linear"] = "geometric"
    every: int | None = None
    patience: int = 3
    forecast: bool = True

    def __post_init__(self) -> None:
        _checks.number("max_loss_increase", self.max_loss_increase, above=0.0)
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise TypeError(f"`monitor` must be the name of a logged loss, or None, got {self.monitor!r}.")
        _checks.number("first", self.first, above=0.0, below=1.0)
        _checks.number("most", self.most, at_least=self.first, below=1.0)
        _checks.integer("stages", self.stages, at_least=1)
        _checks.one_of("spacing", self.spacing, ["geometric", "linear"])
        if self.every is not None:
            _checks.integer("every", self.every, at_least=1)
        _checks.integer("patience", self.patience, at_least=2)
        if not isinstance(self.forecast, bool):
            raise TypeError(f"`forecast` must be True or False, got {self.forecast!r}.")

    def fractions(self) -> list[float]:
        """Return the fraction of the eligible elements that each stage freezes."""
        shares = [i / max(1, self.stages - 1) for i in range(self.stages)]
        if self.spacing == "linear":
            return [self.first + share * (self.most - self.first) for share in shares]
        return [1 - (1 - self.first) ** (1 - share) * (1 - self.most) ** share for share in shares]


_NO_FALL = Fall()


class GrowthState:
    """The stages of a run, from t0 on.

    Args:
        growth: their definition.
        every: optimizer steps over which the training loss is averaged.
        reference: the loss before the first freeze. If it is of no values, the first loss to be judged is taken.
    """

    def __init__(self, growth: Growth, every: int, reference: LossMean) -> None:
        self.growth, self.every, self.reference = growth, every, reference
        self.stage = 0  # that is frozen; -1 before the first one, and after it has thawed
        self.done = False
        self.is_waiting = False
        """Whether the next stage waits for the forecast: the one before is good, or nothing is frozen yet."""
        self.forgone = 0.0
        """By how much the loss at the end will be above that of the unfrozen run, relative to it, at most."""
        self.increase = self.noise = math.nan  # of the loss, relative, and its standard error, as last judged
        self._means: list[LossMean] = []  # since the stage began
        self._n_too_high = 0  # means in a row with an increase that is too high beyond noise

    @property
    def fraction(self) -> float:
        """Fraction of the eligible elements that is frozen."""
        return self.growth.fractions()[self.stage] if self.stage >= 0 else 0.0

    def begin(self, fall: Fall, first: float) -> None:
        """Begin at t0 with the first stage, or wait for it; see `judge` for the arguments."""
        if not self._admits(0, fall, first):
            self.stage, self.is_waiting = -1, True

    def judge(self, loss: LossMean, fall: Fall = _NO_FALL, first: float = math.nan) -> Verdict:
        """Judge the stage by its loss means so far and one more, and go to the next stage if it is good.

        Args:
            loss: the mean since the last judgement.
            fall: what the loss still falls until the end, with the elements frozen that are.
            first: what counts as the least loss times 1 / `FLOOR`; NaN: any loss counts as it is.
        """
        if not loss.n:
            return "wait"
        if self.is_waiting:
            self.increase = self.noise = math.nan  # nothing is judged
            if math.isfinite(loss.value):
                self.reference = min(self.reference, loss) if self.reference.n else loss
            return self._next(fall, first, "wait")
        if not self.reference.n:
            self.reference = loss
            return "wait"
        self._means.append(loss)
        mean = _joined(self._means)
        self.increase, self.noise = mean.increase_over(self.reference)
        allowed, is_patient = self.growth.max_loss_increase, len(self._means) >= self.growth.patience
        self._n_too_high = self._n_too_high + 1 if self.increase - self.noise > allowed else 0
        if self._n_too_high >= 2:
            self.done, self.stage = True, self.stage - 1
            return "thaw"
        if self.increase + self.noise <= allowed or (self.increase <= allowed and is_patient):
            self.reference = min(self.reference, mean)  # by value
            self._means, self._n_too_high = [], 0
            if self.stage + 1 == self.growth.stages:
                self.done = True
                return "stay"
            return self._next(fall, first, "keep")
        if is_patient and not self._n_too_high:
            self.done = True
            return "stay"
        return "wait"

    def _next(self, fall: Fall, first: float, otherwise: Verdict) -> Verdict:
        """Go to the next stage if the forecast lets it in, and wait for that if not."""
        self.is_waiting = not self._admits(self.stage + 1, fall, first)
        if self.is_waiting:
            return otherwise
        self.stage += 1
        return "grow"

    def _admits(self, stage: int, fall: Fall, first: float) -> bool:
        """Whether the forecast lets a stage in; count what it forgoes if so."""
        if not self.growth.forecast:
            return True
        if math.isnan(fall.value):
            return False
        shares = [share_forgone(fraction) for fraction in self.growth.fractions()]
        now = shares[stage - 1] if stage else 0.0
        unfrozen = max(0.0, fall.value + fall.error) / (1 - now)  # the frozen ones no longer add to the fall
        least = FLOOR * abs(first) if math.isfinite(first) else 0.0
        forgone = self.forgone + (shares[stage] - now) * unfrozen / max(abs(fall.end), least, math.ulp(0.0))
        allowed = self.growth.max_loss_increase * shares[stage] / shares[-1]  # so that something is left for the others
        if forgone > allowed:
            return False
        self.forgone = forgone
        return True

    def sentence(self, verdict: Verdict) -> str:
        """Return the last judgement in words, for the log, with a colon at the end."""
        found = f"the loss is {self.increase:+.2%} (± {self.noise:.2%}) above the reference"
        if math.isnan(self.increase):
            found = "the loss has little left to lose"
        consequence = {
            "grow": "so the next stage begins:",
            "keep": "so this stage stays, and the next waits until the loss has less left to lose:",
            "thaw": "so the last stage thaws:",
            "stay": "this stage stays:",
        }
        return f"{found}, {consequence.get(verdict, '')}"

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on.

        Returns:
            "every", "stage" and "over" (means in a row that were too high): int; "done" and "waiting": bool;
            "forgone", "increase" and "noise": float; "reference": [value, error, n]; "means": a list of such lists.
        """
        return {
            "every": self.every,
            "reference": list(self.reference),
            "stage": self.stage,
            "done": self.done,
            "waiting": self.is_waiting,
            "forgone": self.forgone,
            "increase": self.increase,
            "noise": self.noise,
            "means": [list(mean) for mean in self._means],
            "over": self._n_too_high,
        }

    @classmethod
    def from_state_dict(cls, growth: Growth, state: dict[str, Any]) -> "GrowthState":
        """Create the state that `state_dict` was called on."""
        growing = cls(growth, state["every"], LossMean(*state["reference"]))
        growing.stage, growing.done = state["stage"], state["done"]
        growing.is_waiting, growing.forgone = state.get("waiting", False), state.get("forgone", 0.0)  # 0.1.0 had none
        growing.increase, growing.noise, growing._n_too_high = state["increase"], state["noise"], state["over"]
        growing._means = [LossMean(*mean) for mean in state["means"]]
        return growing


def _joined(means: list[LossMean]) -> LossMean:
    n = sum(mean.n for mean in means)
    value = sum(mean.n * mean.value for mean in means) / n
    return LossMean(value, math.sqrt(sum((mean.n * mean.error) ** 2 for mean in means)) / n, n)

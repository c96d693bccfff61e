"""k from the data: freeze more and more elements along the order, as long as the loss does not rise.

After each stage the mean loss is compared with a reference: the mean before the first freeze, or the lowest mean since.
A stage is good if the increase, plus one standard error, is at most what is allowed. It costs too much if the increase,
minus one standard error, is more than that, twice in a row. In between, noise hides the cost: more means are collected,
and after `patience` of them the current stage is kept.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_gcfreeze import _checks
from lightning_gcfreeze.planning.losses import LossMean

Verdict: TypeAlias = Literal["wait", "grow", "stay", "thaw"]
"""On a stage: "wait" for more losses, "grow" to the next one, "stay" for good, or "thaw" it and keep the one before."""


@dataclass(frozen=True)
class Growth:
    """Freeze more and more elements, as long as the loss does not rise: ``k=Growth(most=0.99, monitor="val_loss")``.

    ``k="auto"`` is ``k=Growth()``.

    Args:
        max_loss_increase: the largest increase of the loss that is allowed, relative to the reference: the loss before
            the first freeze or the lowest since. If no monitored loss is known before the freeze, the first one after
            it is the reference.
        monitor: name of a logged loss, which is read after each validation. None: the training loss, averaged over
            `every` steps.
        first: fraction of the eligible elements that the first stage freezes.
        most: fraction that the last stage freezes.
        stages: number of stages.
        spacing: "geometric": the live fraction shrinks by the same factor from stage to stage; "linear": by the same
            difference.
        every: optimizer steps over which the training loss is averaged; None: a tenth of t0, at least 20.
        patience: loss means to collect before an undecided stage is kept.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its range.
    """

    max_loss_increase: float = 0.01
    monitor: str | None = None
    first: float = 0.8
    most: float = 0.95
    stages: int = 3
    spacing: Literal["geometric", "linear"] = "geometric"
    every: int | None = None
    patience: int = 3

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

    def fractions(self) -> list[float]:
        """Return the fraction of the eligible elements that each stage freezes."""
        shares = [i / max(1, self.stages - 1) for i in range(self.stages)]
        if self.spacing == "linear":
            return [self.first + share * (self.most - self.first) for share in shares]
        return [1 - (1 - self.first) ** (1 - share) * (1 - self.most) ** share for share in shares]


class GrowthState:
    """The stages of a run, from the first freeze on.

    Args:
        growth: their definition.
        every: optimizer steps over which the training loss is averaged.
        reference: the loss before the first freeze. If it is of no values, the first loss to be judged is taken.
    """

    def __init__(self, growth: Growth, every: int, reference: LossMean) -> None:
        self.growth, self.every, self.reference = growth, every, reference
        self.stage = 0  # that is frozen; -1 after the first one has thawed
        self.done = False
        self.increase = self.noise = math.nan  # of the loss, relative, and its standard error, as last judged
        self._means: list[LossMean] = []  # since the stage began
        self._n_too_high = 0  # means in a row with an increase that is too high beyond noise

    @property
    def fraction(self) -> float:
        """Fraction of the eligible elements that is frozen."""
        return self.growth.fractions()[self.stage] if self.stage >= 0 else 0.0

    def judge(self, loss: LossMean) -> Verdict:
        """Judge the stage by its loss means so far and one more, and go to the next stage if it is good."""
        if not loss.n:
            return "wait"
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
            self.stage += 1
            return "grow"
        if is_patient and not self._n_too_high:
            self.done = True
            return "stay"
        return "wait"

    def sentence(self, verdict: Verdict) -> str:
        """Return the last judgement in words, for the log, with a colon at the end."""
        found = f"the loss is {self.increase:+.2%} (± {self.noise:.2%}) above the reference"
        consequence = {
            "grow": "so the next stage begins:",
            "thaw": "so the last stage thaws:",
            "stay": "this stage stays:",
        }
        return f"{found}, {consequence.get(verdict, '')}"

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on.

        Returns:
            "every", "stage" and "over" (means in a row that were too high): int; "done": bool; "increase" and "noise":
            float; "reference": [value, error, n]; "means": a list of such lists.
        """
        return {
            "every": self.every,
            "reference": list(self.reference),
            "stage": self.stage,
            "done": self.done,
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
        growing.increase, growing.noise, growing._n_too_high = state["increase"], state["noise"], state["over"]
        growing._means = [LossMean(*mean) for mean in state["means"]]
        return growing


def _joined(means: list[LossMean]) -> LossMean:
    n = sum(mean.n for mean in means)
    value = sum(mean.n * mean.value for mean in means) / n
    return LossMean(value, math.sqrt(sum((mean.n * mean.error) ** 2 for mean in means)) / n, n)

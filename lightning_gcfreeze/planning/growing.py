"""k from the data: freeze more and more along the order, as long as the loss does not mind.

After each stage the mean loss is compared with the one before the first freeze, or the lowest mean since. A stage is
good if its increase, with one standard error on top, stays below what is allowed; it costs too much if the increase is
above that even with a standard error less, twice in a row. What lies between is noise: it is looked at longer, and in
the end decides for nothing but to stay.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lightning_gcfreeze import _checks
from lightning_gcfreeze.planning.losses import LossMean

Verdict: TypeAlias = Literal["wait", "grow", "stay", "thaw"]


@dataclass(frozen=True)
class Growth:
    """What ``k="auto"`` means, with other numbers: ``k=Growth(most=0.99, monitor="val_loss")``.

    Args:
        max_loss_increase: relative to the loss before the first freeze, or the lowest since. Where no monitored one was
            known by then, the first that comes.
        monitor: the loss to watch, by the name under which it is logged; it is read after each validation. None: the
            training loss, over `every` steps.
        first: the fraction of the eligible elements that the first stage freezes.
        most: that of the last stage.
        stages: how many there are.
        spacing: "geometric", the live fraction shrinks by the same factor from stage to stage; "linear", by the same
            difference.
        every: optimizer steps over which the training loss is averaged; None: a tenth of t0, at least 20.
        patience: means of a stage, before it is settled that noise hides its cost.

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
        """What the stages freeze."""
        shares = [i / max(1, self.stages - 1) for i in range(self.stages)]
        if self.spacing == "linear":
            return [self.first + share * (self.most - self.first) for share in shares]
        return [1 - (1 - self.first) ** (1 - share) * (1 - self.most) ** share for share in shares]


class GrowthState:
    """The stages of a run, from the first freeze on.

    Args:
        growth: what they are.
        every: optimizer steps over which the training loss is averaged.
        reference: the loss before the first freeze, if it is known; else the first that comes.
    """

    def __init__(self, growth: Growth, every: int, reference: LossMean) -> None:
        self.growth, self.every, self.reference = growth, every, reference
        self.stage = 0  # the one that is frozen; -1: none
        self.done = False
        self.increase = self.noise = math.nan  # of the last mean
        self._means: list[LossMean] = []  # of this stage
        self._over = 0  # how many of them in a row lay above, beyond noise

    @property
    def fraction(self) -> float:
        """What is to be frozen."""
        return self.growth.fractions()[self.stage] if self.stage >= 0 else 0.0

    def take(self, loss: LossMean) -> Verdict:
        """Judge a stage by one more mean of the loss since it began, and go to the next one if it is good."""
        if not loss.of:
            return "wait"
        if not self.reference.of:
            self.reference = loss
            return "wait"
        self._means.append(loss)
        found = _joined(self._means)
        self.increase, self.noise = found.above(self.reference)
        most = self.growth.max_loss_increase
        self._over = self._over + 1 if self.increase - self.noise > most else 0
        if self._over >= 2:
            self.done, self.stage = True, self.stage - 1
            return "thaw"
        if self.increase + self.noise <= most or (self.increase <= most and self._patient):
            self.reference = min(self.reference, found)  # by value
            self._means, self._over = [], 0
            self.done = self.stage + 1 == self.growth.stages
            self.stage += not self.done
            return "stay" if self.done else "grow"
        if self._patient and not self._over:
            self.done = True
            return "stay"
        return "wait"

    def sentence(self, verdict: Verdict) -> str:
        """What was found, for the log."""
        found = f"the loss is {self.increase:+.2%} (± {self.noise:.2%}) above what it was"
        then = {"grow": "so more is frozen:", "thaw": "so the last stage thaws:", "stay": "and it stays at that:"}
        return f"{found}, {then.get(verdict, '')}"

    def state_dict(self) -> dict[str, Any]:
        """Numbers alone."""
        return {
            "every": self.every,
            "reference": list(self.reference),
            "stage": self.stage,
            "done": self.done,
            "increase": self.increase,
            "noise": self.noise,
            "means": [list(mean) for mean in self._means],
            "over": self._over,
        }

    @classmethod
    def from_state_dict(cls, growth: Growth, state: dict[str, Any]) -> "GrowthState":
        """Go on from what `state_dict` gave."""
        growing = cls(growth, state["every"], LossMean(*state["reference"]))
        growing.stage, growing.done = state["stage"], state["done"]
        growing.increase, growing.noise, growing._over = state["increase"], state["noise"], state["over"]
        growing._means = [LossMean(*mean) for mean in state["means"]]
        return growing

    @property
    def _patient(self) -> bool:
        """Whether the stage has been looked at for long enough."""
        return len(self._means) >= self.growth.patience


def _joined(means: list[LossMean]) -> LossMean:
    count = sum(mean.of for mean in means)
    value = sum(mean.of * mean.value for mean in means) / count
    return LossMean(value, math.sqrt(sum((mean.of * mean.error) ** 2 for mean in means)) / count, count)

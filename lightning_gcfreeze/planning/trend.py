"""Where a loss is heading: how much it would still fall until the end of training, by its fall so far.

A loss falls fast at first and ever more slowly. Over the last halving of time most losses are close to a straight line
in log t, so that line is fitted to the steps in (t/2, t] and followed to the end:

    L(s) ≈ a - b log s,    what L still falls until T:  b log(T/t)

Losses that level off fall less than that, so the forecast errs to the careful side. The line of (t/√2, t] does so less,
and is noisier: it counts where it promises less with two standard errors than the other with one. Not on the careful
side are losses that have only begun to fall, and those that fall faster at the end as the learning rate does.
"""

import math
from typing import Any, NamedTuple

from torch import Tensor

from lightning_gcfreeze.distributed import SINGLE_PROCESS, World
from lightning_gcfreeze.planning.losses import Losses, LossMean

PER_OCTAVE = 8
"""Means of the loss that are kept for each doubling of the steps."""
FIRST = 8
"""Steps, or validations, whose mean is the loss that training began with."""


class Fall(NamedTuple):
    """What a loss would still lose until the end, as a difference; and the level that it would end at."""

    value: float = math.nan
    error: float = math.nan
    """Standard error of `value`, by the scatter of the means around the line; or two of them, see above."""
    end: float = math.nan


class Trend:
    """The means of a loss over the last octave of steps, and that over the first few steps; the same on all processes.

    A mean ends with a step that is a power of 2^(1/8), rounded; with validations, each is one.
    """

    def __init__(self) -> None:
        self._losses = Losses()
        self._begun = 0  # the last step of the last mean
        self._means: list[tuple[float, float, int]] = []  # the log of the step in its middle, value, n
        self._first = LossMean(0.0, 0.0, 0)

    def add(self, loss: Tensor) -> None:
        """Add the loss of one step on this process, a tensor with one element."""
        self._losses.add(loss)

    def end_step(self, step: int, world: World = SINGLE_PROCESS) -> None:
        """Close the mean that ends with an optimizer step, if one does. All processes must call it, after each step."""
        if step >= self._begun + 1 and _ends_mean(step):
            middle = (self._begun + 1 + step) / 2
            self._close(middle, step, self._losses.read(world))

    def add_validation(self, step: int, loss: float) -> None:
        """Add the loss of a validation after an optimizer step, the same on all processes."""
        if not (math.isfinite(loss) and step):
            return
        if self._means and step == self._begun:  # another one after the same step: their mean is one point of the line
            x, mean, n = self._means.pop()
            self._means.append((x, mean + (loss - mean) / (n + 1), n + 1))
        else:
            self._close(step, step, LossMean(loss, 0.0, 1))

    def _close(self, middle: float, step: int, mean: LossMean) -> None:
        self._begun = step
        if not mean.n:
            return
        if self._first.n < FIRST:
            n = self._first.n + mean.n
            self._first = LossMean(self._first.value + (mean.value - self._first.value) * mean.n / n, 0.0, n)
        self._means = [one for one in self._means if one[0] > math.log(step / 2)]
        self._means.append((math.log(middle), mean.value, mean.n))

    @property
    def first(self) -> float:
        """The loss that training began with; NaN before any."""
        return self._first.value if self._first.n else math.nan

    def fall(self, step: int, planned_steps: float) -> Fall:
        """Forecast from an optimizer step on; NaN throughout from fewer than three means.

        Args:
            step: t.
            planned_steps: T; if it is not known, as many steps again as there have been.
        """
        left = math.log(planned_steps / step) if step <= planned_steps < math.inf else math.log(2)
        late = [one for one in self._means if one[0] > math.log(step / math.sqrt(2))]
        falls = []
        for means, errors in ((self._means, 1.0), (late, 2.0)):
            if len(means) >= 3:
                slope, error, now = _line(means, math.log(step))
                falls.append(Fall(-slope * left, errors * error * left, now + slope * left))
        return min(falls, key=lambda fall: fall.value + fall.error, default=Fall())

    def synchronize(self, world: World) -> None:
        """Make the losses of the mean that is not closed the same on all processes."""
        self._losses.synchronize(world)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on.

        Returns:
            "losses": the lists of `Losses`; "begun" (the last step of the last mean): int; "means": a list of [log of
            the step, value, n]; "first": [value, error, n].
        """
        return {
            "losses": self._losses.state_dict(),
            "begun": self._begun,
            "means": [list(one) for one in self._means],
            "first": list(self._first),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._losses.load_state_dict(state["losses"])
        self._begun, self._first = state["begun"], LossMean(*state["first"])
        self._means = [(x, y, n) for x, y, n in state["means"]]


def _line(means: list[tuple[float, float, int]], x: float) -> tuple[float, float, float]:
    """Fit a line to three means or more by least squares: its slope, the standard error of that, its value at x."""
    weight = sum(n for _, _, n in means)
    x_mean = sum(n * x for x, _, n in means) / weight
    y_mean = sum(n * y for _, y, n in means) / weight
    xx = sum(n * (x - x_mean) ** 2 for x, _, n in means)
    slope = sum(n * (x - x_mean) * (y - y_mean) for x, y, n in means) / xx
    scatter = sum(n * (y - y_mean - slope * (x - x_mean)) ** 2 for x, y, n in means)
    return slope, math.sqrt(scatter / (len(means) - 2) / xx), y_mean + slope * (x - x_mean)


def _ends_mean(step: int) -> bool:
    """Whether a step is the last that is not above some power of 2^(1/8)."""
    return math.floor(PER_OCTAVE * math.log2(step) + 1e-9) != math.floor(PER_OCTAVE * math.log2(step + 1) + 1e-9)

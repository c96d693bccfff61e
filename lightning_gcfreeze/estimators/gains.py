"""The gain κ_t of the recursion, the weight of the newest term.

κ_t = 1/t, the paper's choice, gives the plain mean over all observed steps. A constant gain forgets geometrically, with
a memory of about 1/κ steps. t counts *observed* steps from 1.
"""

from collections.abc import Callable
from numbers import Real
from typing import Literal, TypeAlias

_MOMENTUM = 0.9  # of nearly all optimizers, by default or by habit

Gain: TypeAlias = Literal["1/t"] | float | Callable[[int], float]


def check(gain: Gain) -> Gain:
    """Return `gain` if it is valid.

    Raises:
        ValueError: `gain` is a number outside (0, 1], or a string other than "1/t".
        TypeError: `gain` is neither a string, a number nor a callable.
    """
    if callable(gain):
        return gain
    if isinstance(gain, str):
        if gain == "1/t":
            return gain
        raise ValueError(f"`gain` must be '1/t', a number in (0, 1] or a callable t -> κ, got {gain!r}.")
    if isinstance(gain, bool) or not isinstance(gain, Real):
        raise TypeError(f"`gain` must be '1/t', a number in (0, 1] or a callable t -> κ, got {gain!r}.")
    return _in_range(float(gain), "`gain` (κ)")


def at(gain: Gain, t: int) -> float:
    """Return κ_t of the observed step t = 1, 2, …

    Raises:
        ValueError: a callable gain returned something outside (0, 1].
    """
    if callable(gain):
        return _in_range(float(gain(t)), f"`gain({t})` (κ_t)")
    return 1.0 / t if isinstance(gain, str) else gain


def recent(kappa: float, t: int) -> float:
    """Return a larger gain, which forgets faster: with κ_t = 1/t, the weight of step i grows as i⁴."""
    return max(kappa, 5 / (t + 4))


def of_momentum(t: int, every: int) -> float:
    """Return the gain of an optimizer's running mean, of 0.9 a step as a rule, from one of `every` steps to the next.

    It is that of a mean with a corrected bias: 1 at first.
    """
    return (1 - _MOMENTUM**every) / (1 - _MOMENTUM ** (every * t))


def decayed(gain: Gain, power: float, earlier: int, later: int) -> tuple[float, float]:
    """Return the share of X_earlier that is left in X_later, Π (1 - κ), and the sum of squared weights of its terms.

    If each term were pure noise, X_earlier and X_later would have the correlation
    kept · sqrt(power before / power after).

    Args:
        gain: κ.
        power: the sum of squared weights after `earlier` steps; 0 if there were none.
        earlier: observed steps before.
        later: observed steps after.
    """
    kept = 1.0
    for t in range(earlier + 1, later + 1):
        kappa = at(gain, t)
        kept *= 1 - kappa
        power = (1 - kappa) ** 2 * power + kappa**2
    return kept, power


def _in_range(kappa: float, what: str) -> float:
    if not 0.0 < kappa <= 1.0:  # also catches NaN
        raise ValueError(f"{what} must lie in (0, 1], got {kappa}.")
    return kappa

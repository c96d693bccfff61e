"""The gain κ_t of the recursion: step -> weight of the newest term.

κ_t = 1/t (the paper's) gives the plain mean over all observed steps; a constant gain forgets geometrically, with a
memory of about 1/κ steps. t counts *observed* steps from 1.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal, TypeAlias

Gain: TypeAlias = Literal["1/t"] | float | Callable[[int], float]


def check(gain: Gain) -> Gain:
    """Return `gain` if it is one.

    Raises:
        ValueError: a number outside (0, 1], or a string other than "1/t".
        TypeError: neither a string, a number nor a callable.
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
    """κ_t of observed step t = 1, 2, …

    Raises:
        ValueError: a callable gain returned something outside (0, 1].
    """
    if callable(gain):
        return _in_range(float(gain(t)), f"`gain({t})` (κ_t)")
    return 1.0 / t if isinstance(gain, str) else gain


def correlation(gain: Gain, earlier: int, later: int) -> float:
    """Of the recursion's values after so many observed steps and after more of them, were each term pure noise.

    What is left of the earlier value is Π (1 - κ); the variance of a value is the sum of its terms' squared weights.
    """
    if isinstance(gain, str):
        return math.sqrt(earlier / later)
    kept, power, power_earlier = 1.0, 0.0, 0.0
    for t in range(1, later + 1):
        kappa = at(gain, t)
        power = (1 - kappa) ** 2 * power + kappa**2
        if t == earlier:
            kept, power_earlier = 1.0, power
        elif t > earlier:
            kept *= 1 - kappa
    return kept * math.sqrt(power_earlier / power)


def _in_range(kappa: float, what: str) -> float:
    if not 0.0 < kappa <= 1.0:  # also catches NaN
        raise ValueError(f"{what} must lie in (0, 1], got {kappa}.")
    return kappa

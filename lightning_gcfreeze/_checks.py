"""Checks of single arguments. An error names what came, what is allowed and, where it is not obvious, the way out."""

import math
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


def integer(name: str, value: Any, at_least: int, at_most: int | None = None) -> int:
    """Return `value` as an int.

    Raises:
        TypeError: `value` is no integer (a bool is none).
        ValueError: `value` is below `at_least` or above `at_most`.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an int of at least {at_least}, got {value!r} ({type(value).__name__}).")
    number = int(value)
    if number < at_least:
        raise ValueError(f"`{name}` must be at least {at_least}, got {number}.")
    if at_most is not None and number > at_most:
        raise ValueError(f"`{name}` must be at most {at_most}, got {number}.")
    return number


def integer_or_none(name: str, value: Any, at_least: int) -> int | None:
    """Return `value` as an int, see `integer`; None stays None."""
    return None if value is None else integer(name, value, at_least)


def count_or_fraction(name: str, value: Any) -> int | float:
    """Return `value` as a non-negative int (a count) or a float in [0, 1] (a fraction).

    Raises:
        TypeError: `value` is neither an int nor a float (a bool is neither).
        ValueError: `value` is negative, NaN, or a float above 1.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be an int (a count of elements) or a float in [0, 1] (a fraction of them),"
            f" got {value!r} of type {type(value).__name__}."
        )
    if isinstance(value, Integral):
        if value < 0:
            raise ValueError(f"`{name}` counts elements, so it must be at least 0, got {value}.")
        return int(value)
    fraction = float(value)
    if math.isnan(fraction) or not 0.0 <= fraction <= 1.0:
        raise ValueError(
            f"`{name}` as a float is a fraction and must lie in [0, 1], got {value}. A count is given as an int."
        )
    return fraction


def one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """Return `value` if it is among `allowed`.

    Raises:
        ValueError: it is not; the message lists the allowed values.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.{did_you_mean(value, allowed)}"
        )
    return value


def did_you_mean(value: Any, allowed: Collection[str]) -> str:
    """Return a question for the end of an error, or "" if a value resembles no allowed one."""
    close = get_close_matches(value, allowed, n=1) if isinstance(value, str) else []
    return f" Did you mean {close[0]!r}?" if close else ""


def boolean(name: str, value: Any) -> bool:
    """Return `value` if it is True or False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return value


def integer_or_name(name: str, value: Any, at_least: int, allowed: Collection[str]) -> int | str:
    """Return an int of at least `at_least`, or one of the allowed names.

    Raises:
        TypeError: it is neither an int nor a string.
        ValueError: it is too small, or another string.
    """
    if isinstance(value, str):
        return one_of(name, value, allowed)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an int or one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return integer(name, value, at_least)


def number(
    name: str, value: Any, above: float = -math.inf, below: float = math.inf, at_least: float | None = None
) -> float:
    """Return `value` as a float strictly between `above` and `below`, and not less than `at_least`.

    Raises:
        TypeError: `value` is no number (a bool is none).
        ValueError: `value` is NaN or outside the bounds.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
    found = float(value)
    if math.isnan(found) or not above < found < below or (at_least is not None and found < at_least):
        wanted = ["finite"] if math.isinf(found) else []
        wanted += [f"above {above:g}"] if above > -math.inf else []
        wanted += [f"below {below:g}"] if below < math.inf else []
        wanted += [] if at_least is None else [f"at least {at_least:g}"]
        raise ValueError(f"`{name}` must be {' and '.join(wanted)}, got {value}.")
    return found


def sequence(name: str, value: Any) -> Sequence[Any]:
    """Return `value` if it is a sequence of something, and no string.

    Raises:
        TypeError: it is none.
        ValueError: it is empty.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"`{name}` must be a list, got {value!r}.")
    if not value:
        raise ValueError(f"`{name}` must not be empty.")
    return value


def patterns(name: str, value: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return one fnmatch pattern or several as a tuple; None stays None.

    Raises:
        TypeError: `value` is not a string, a sequence of strings or None.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"`{name}` must be a parameter-name pattern or a list of them, got {value!r}.")
    return tuple(value)

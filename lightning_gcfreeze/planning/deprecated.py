"""Arguments that `Settled` and `Growth` have replaced."""

import warnings
from typing import Any

from lightning_gcfreeze import _checks
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.planning.settling import Settled


def from_deprecated(
    t0: Any, k: Any, max_t0: int | None, max_loss_increase: float | None, monitor: str | None
) -> tuple[Any, Any]:
    """Return `t0` and `k` with the deprecated arguments in them, as a `Settled` and a `Growth`.

    Call it in the ``__init__`` that takes these arguments: the warnings point to the line that calls that.

    Raises:
        TypeError: a deprecated argument of the wrong kind.
        ValueError: `max_t0` without ``t0="auto"``, `max_loss_increase` or `monitor` without ``k="auto"``, or a value
            outside its range.
    """
    if max_t0 is not None:
        replacement = f"t0=Settled(max_t0={max_t0!r})"
        if t0 != "auto":
            raise ValueError(
                f"`max_t0={max_t0}` needs `t0='auto'`, got t0={t0!r}. Leave it out, or use `{replacement}`."
            )
        t0 = Settled(max_t0)
        _warn("`max_t0`", replacement)
    values = {"max_loss_increase": max_loss_increase, "monitor": monitor}
    given = [f"{name}={value!r}" for name, value in values.items() if value is not None]
    if given:
        replacement = f"k=Growth({', '.join(given)})"
        if k != "auto":
            names = " and ".join(f"`{argument}`" for argument in given)
            raise ValueError(f"{names} needs `k='auto'`, got k={k!r}. Leave it out, or use `{replacement}`.")
        k = Growth(Growth.max_loss_increase if max_loss_increase is None else max_loss_increase, monitor)
        _warn("`max_loss_increase` or `monitor`", replacement)
    return t0, k


def from_promote(skip_frozen_gradients: bool, promote: bool | None) -> bool:
    """Return `skip_frozen_gradients`, or what its old name `promote` was given. Call it like `from_deprecated`."""
    if promote is None:
        return skip_frozen_gradients
    warnings.warn("`promote` is now called `skip_frozen_gradients`.", DeprecationWarning, stacklevel=3)
    return _checks.boolean("promote", promote)


def _warn(deprecated: str, replacement: str) -> None:
    warnings.warn(f"{deprecated} is deprecated: use `{replacement}`.", DeprecationWarning, stacklevel=4)

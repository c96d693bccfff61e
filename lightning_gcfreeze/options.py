"""`Options`: what to observe, how to rank, what to freeze. Checked once, and shared by all fronts."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from lightning_gcfreeze import _checks, orderings
from lightning_gcfreeze import masks as given_masks
from lightning_gcfreeze._types import Granularity
from lightning_gcfreeze.delta import Stream
from lightning_gcfreeze.estimators import gains
from lightning_gcfreeze.gradients.choice import Source
from lightning_gcfreeze.planning.arguments import (
    PlannedDecision,
    as_schedule,
    check_every,
    decisions_from_arguments,
)
from lightning_gcfreeze.planning.budget import Budget
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.planning.schedule import FreezeSchedule, Stage
from lightning_gcfreeze.planning.settling import Settled
from lightning_gcfreeze.reporting import MAX_GROUPS

_DECISIVE = (
    "t0", "k", "schedule", "order", "samples", "every", "gain", "granularity", "include", "exclude", "seed",
    "covariance",
)  # fmt: skip
_OBSERVED = {*_DECISIVE, "gradients"} - {"include", "exclude"}
"""Arguments of a run that observes; with `masks` nothing is observed."""
_SHOWN = ("t0", "k", "order", "granularity", "hold", "every", "samples")
"""Arguments that loggers get even if they have their default."""

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"order": "variance", "samples": "first", "every": 1, "gain": "1/t", "granularity": "element"},
    "recommended": {"order": "movement"},
}
"""Arguments by the name of a preset, for any front: ``Freezer(model, optimizer, t0, k, **PRESETS["recommended"])``."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of a run, checked; `GradCovFreezeCallback` documents each.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside its range, or does not go with another.
    """

    t0: int | float | Literal["auto"] | Settled | None = None
    k: int | float | Literal["auto"] | Growth | Budget | None = None
    order: orderings.Name | orderings.Ordering = "variance"
    samples: Literal["auto", "first", "all"] | int = "auto"
    every: int = 1
    covariance: Literal["diagonal", "full"] = "diagonal"
    gain: gains.Gain = "1/t"
    gradients: Source = "auto"
    granularity: Granularity = "element"
    hold: Literal["auto", "compact", "restore"] = "auto"
    skip_frozen_gradients: bool = True
    batch_norm: Literal["track", "freeze"] = "track"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    seed: int | None = None
    lr_after_freeze: float | None = None
    schedule: FreezeSchedule | Sequence[Stage] | None = None
    masks: given_masks.Masks | None = None
    stream: Stream | None = None
    log_parameters: int = MAX_GROUPS
    ordering: orderings.Ordering = field(init=False, repr=False)
    """The function that `order` names, or is."""
    decisions: tuple[PlannedDecision, ...] = field(init=False, repr=False)
    """When to freeze, and how much: by `t0` and `k`, or by `schedule`. None with `masks`, which freeze at once."""
    monotone: bool = field(init=False, repr=False)
    """Whether elements stay frozen from one stage to the next."""

    def __post_init__(self) -> None:
        schedule = as_schedule(self.schedule)
        decisions, monotone = tuple[PlannedDecision, ...](), True
        if self.masks is None:
            decisions, monotone = decisions_from_arguments(self.t0, self.k, schedule)
        else:
            given_masks.check(self.masks)
            self._refuse_others_than_masks()
        check_every(_checks.integer("every", self.every, at_least=1), decisions)
        _checks.integer_or_name("samples", self.samples, at_least=1, allowed=["auto", "first", "all"])
        _checks.one_of("covariance", self.covariance, ["diagonal", "full"])
        gains.check(self.gain)
        _checks.one_of("gradients", self.gradients, ["auto", "replay", "capture"])
        _checks.one_of("granularity", self.granularity, get_args(Granularity))
        _checks.one_of("hold", self.hold, ["auto", "compact", "restore"])
        _checks.boolean("skip_frozen_gradients", self.skip_frozen_gradients)
        _checks.one_of("batch_norm", self.batch_norm, ["track", "freeze"])
        _checks.integer("log_parameters", self.log_parameters, at_least=0)
        if self.granularity == "mixed" and not self.skip_frozen_gradients:
            raise ValueError(
                "`granularity='mixed'` freezes rows and columns so that their gradients can be skipped: pass"
                " `skip_frozen_gradients=True`, or use granularity='element'."
            )
        if self.granularity == "mixed" and self.order == "reverse":
            raise ValueError("`granularity='mixed'` weighs sums of scores, which are negative with order='reverse'.")
        if isinstance(self.k, Budget) and self.k.memory is not None and self.hold == "restore":
            raise ValueError(
                f"`k={self.k}` saves no memory with hold='restore', which keeps the optimizer's whole state."
            )
        if isinstance(self.k, Budget) and self.k.work is not None and self.granularity != "mixed":
            raise ValueError(
                f"`k=Budget(work={self.k.work})` needs granularity='mixed', which chooses rows and columns by the work"
                f" that they save; got {self.granularity!r}."
            )
        if self.seed is not None:
            _checks.integer("seed", self.seed, at_least=0, at_most=2**63 - 1)
        factor = self.lr_after_freeze
        self.__dict__.update(  # the dataclass is frozen
            lr_after_freeze=None if factor is None else _checks.number("lr_after_freeze", factor, above=0.0),
            schedule=schedule,
            ordering=orderings.resolve(self.order),
            include=_checks.patterns("include", self.include),
            exclude=_checks.patterns("exclude", self.exclude),
            decisions=decisions,
            monotone=monotone,
        )

    @property
    def may_thaw(self) -> bool:
        """Whether an element that froze may train again."""
        return not self.monotone or any(isinstance(k, Growth) for _, k in self.decisions)

    @property
    def reads_samples(self) -> bool:
        """Whether gradients of single samples are taken."""
        asked = self.samples != "auto" or self.covariance == "full"
        return self.masks is None and (asked or orderings.reads_variance(self.ordering))

    @property
    def reads_losses(self) -> bool:
        """Whether training losses are listened to."""
        return any(isinstance(t, Settled) or (isinstance(k, Growth) and k.monitor is None) for t, k in self.decisions)

    @property
    def n_samples(self) -> int | None:
        """How many samples of a batch are observed; None: all."""
        return self.samples if isinstance(self.samples, int) else None if self.samples == "all" else 1

    def gain_of_scores(self, t: int) -> float:
        """Return the gain of the noisiest statistic that the ordering reads, at observed step t."""
        kappa = gains.at(self.gain, t)
        needed = orderings.needed_by(self.ordering)
        if needed & {"recent_mean", "movement"}:
            kappa = gains.recent(kappa, t)
        if needed & {"momentum", "update"}:
            kappa = max(kappa, gains.of_momentum(t, self.every))
        return kappa

    def decisive(self) -> dict[str, Any]:
        """Return the arguments that decide what freezes, as numbers, strings and lists of them."""
        found = {name: _plain(getattr(self, name)) for name in _DECISIVE}
        return {**found, "masks": None if self.masks is None else "given"}  # the state holds what they are

    def given(self) -> str:
        """Return the arguments that differ from their defaults, as in a call."""
        shown = {name: getattr(self, name) for name in self._changed()}
        if isinstance(shown.get("masks"), Mapping):
            shown["masks"] = f"<of {len(shown['masks'])} parameters>"
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def hyperparameters(self) -> dict[str, int | float | str]:
        """Return the arguments by tag, as numbers and text for loggers: what says most, and what was given."""
        shown = [name for name in _SHOWN if self.masks is None or name not in _OBSERVED]
        named = {name: getattr(self, name) for name in dict.fromkeys([*shown, *self._changed()])}
        named |= {} if self.masks is None else {"masks": "given"}
        return {f"gcfreeze/{name}": _as_text(value) for name, value in named.items() if value is not None}

    def _changed(self) -> list[str]:
        """Return the names of the arguments that differ from their defaults."""
        defaults = {name: p.default for name, p in inspect.signature(Options).parameters.items()}
        return [n for n, default in defaults.items() if getattr(self, n) is not default and getattr(self, n) != default]

    def _refuse_others_than_masks(self) -> None:
        if others := [name for name in self._changed() if name in _OBSERVED]:
            raise ValueError(
                f"`masks` say what freezes, from the first step on, and nothing is observed: leave out"
                f" {', '.join(f'`{name}`' for name in others)}. A saved order becomes masks by"
                " `lightning_gcfreeze.masks.lowest(file, k)`."
            )


def arguments_of_preset(name: str) -> dict[str, Any]:
    """Return the arguments of a preset.

    Raises:
        ValueError: there is none of that name.
    """
    _checks.one_of("name", name, list(PRESETS))
    return dict(PRESETS[name])


def _as_text(value: Any) -> int | float | str:
    """Return numbers and strings as they are, a function by its name, and anything else as it is written in a call."""
    if isinstance(value, int | float | str):
        return value
    return str(_plain(value)) if callable(value) else repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, FreezeSchedule | Settled | Growth | Budget):
        return {"class": type(value).__name__, **{name: _plain(v) for name, v in vars(value).items()}}
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, Real) and not isinstance(value, bool):  # NumPy's are not plain
        return int(value) if isinstance(value, Integral) else float(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value

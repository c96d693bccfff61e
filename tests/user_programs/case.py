"""What a case is made of: the module and the fit into which user code is planted, and the lists of cases."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from tests import cases

T0 = 2  # optimizer steps before the freeze


def network() -> nn.Sequential:
    """Two weights above the size of which "compact" takes gradients early, and small parameters around them."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 128), nn.Tanh(), nn.Linear(128, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 1)
    ).double()


class Net(cases.Regression):
    """The module that the cases override."""

    def __init__(self) -> None:
        super().__init__(network(), lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01))
        self.flown: list[Tensor] = []  # for the cases that keep something
        self.norms = [torch.ones((), dtype=torch.float64)]

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@dataclass
class Setup:
    """What a fit is made of, before its Trainer exists."""

    module: Net = field(default_factory=Net)
    callbacks: list[pl.Callback] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    undo: list[Callable[[], Any]] = field(default_factory=list)
    """Takes the user's code out again, in the middle of a fit."""
    seen: list[list[Tensor | None]] = field(default_factory=list)
    """What code that reads gradients has read."""
    validation: bool = False
    """Whether the fit validates, after three batches."""

    def plant(self, owner: Any, base: type) -> None:
        """Add an object whose class overrides hooks of `base`."""
        if isinstance(owner, pl.Callback):
            self.callbacks.append(owner)
        elif isinstance(owner, Precision):
            self.options["plugins"] = [owner]
        else:
            self.options["strategy"] = owner
        self.undo.append(lambda: setattr(owner, "__class__", base))

    def when_optimizer_is_made(self, then: Callable[[Optimizer], Any]) -> None:
        """Call `then` in `configure_optimizers`."""
        make = self.module.make_optimizer

        def make_and_tell(parameters: Any) -> Optimizer:
            optimizer = make(parameters)
            then(optimizer)
            return optimizer

        self.module.make_optimizer = make_and_tell


@dataclass(frozen=True)
class Case:
    """One piece of user code."""

    plant: Callable[[Setup], None]
    told: tuple[str, ...] = ()
    """Words that an error has to contain that refuses this code: the hook, and whose it is."""
    accumulate: int = 1
    clip: float | None = None
    without: Callable[[Setup], None] | None = None
    """Plants what the code is compared with from t0 on, to show that it matters; None: nothing."""


CHANGES: dict[str, Case] = {}
READS: dict[str, Case] = {}
HARMLESS: dict[str, Case] = {}
_BASES: tuple[type, ...] = (Net, pl.Callback, Precision, SingleDeviceStrategy)
T = TypeVar("T", bound=Callable[..., Any])


def _case_of(cls: type, **options: Any) -> Case:
    """A class that overrides hooks of a module, callback, plugin or strategy."""
    base = next(base for base in _BASES if issubclass(cls, base))
    *_, hook = (name for name, value in vars(cls).items() if callable(value) and not name.startswith("__"))

    def plant(setup: Setup) -> None:
        setup.validation = "validation" in hook
        if base is Net:
            setup.module.__class__ = cls
            setup.undo.append(lambda: setattr(setup.module, "__class__", Net))
        else:
            setup.plant(cls("cpu") if base is SingleDeviceStrategy else cls(), base)

    return Case(plant, (hook, cls.__name__), **options)


def changes(*told: str, **options: Any) -> Callable[[T], T]:
    """Add a class, or a function that plants, to `CHANGES`; `told` as in `Case`, for functions."""

    def add(planted: T) -> T:
        case = _case_of(planted, **options) if isinstance(planted, type) else Case(planted, told, **options)
        CHANGES[planted.__name__] = case
        return planted

    return add


def harmless(planted: T) -> T:
    """Add a class, or a function that plants, to `HARMLESS`."""
    HARMLESS[planted.__name__] = _case_of(planted) if isinstance(planted, type) else Case(planted)
    return planted


def halve(parameters: Iterable[Parameter]) -> None:
    """A helper whose callers do not mention gradients."""
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(0.5)


def norm(parameters: Iterable[Parameter]) -> float:
    return float(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None) ** 0.5)

"""The five experiments of the paper's table 1: model, data, and the settings that give each of them power."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from examples.data import MNIST, ArrayDataModule, BostonHousing, Synthetic
from examples.models import LinearRegression, LogisticRegression, MLPClassifier, MLPRegressor, SupervisedModule

Name = Literal["boston", "mnist", "synthetic1", "synthetic2", "synthetic3"]


@dataclass(frozen=True)
class Settings:
    """What decides, beside its number and the code, what a run computes."""

    data: Name
    t0: int  # optimizer steps observed
    steps: int  # optimizer steps in all
    batch_size: int
    lr: float
    orders: tuple[str, ...]
    fractions: tuple[float, ...]  # ascending, from 0 to 1
    seed: int
    objects: int = 1000  # of a synthetic data set, in training, validation and test together
    noise: float = 1.0  # standard deviation of y around wᵀx in a synthetic regression
    same_data: bool = False  # all runs share objects and split, and differ in initial weights and batches only
    prune: bool = False  # set to zero after the last step, which t0 then is, instead of freezing at t0


@dataclass(frozen=True)
class Task:
    """A model, its data, and defaults for what the paper leaves open."""

    title: str
    model: Callable[[], SupervisedModule]
    data: Callable[[Settings, int], ArrayDataModule]  # of the settings and the seed of objects and split
    t0: int
    steps: int
    batch_size: int
    lr: float
    scan: tuple[int, ...]  # values of t0: early, at the knee of the loss, late, converged
    options: frozenset[str] = frozenset()  # the settings that only some data sets have
    published: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)  # order -> stage -> losses


def _boston(settings: Settings, seed: int) -> ArrayDataModule:
    return BostonHousing(settings.batch_size, seed)


def _mnist(settings: Settings, seed: int) -> ArrayDataModule:
    return MNIST(settings.batch_size, seed)


def _synthetic(task: Literal["regression", "classification"]) -> Callable[[Settings, int], ArrayDataModule]:
    def make(settings: Settings, seed: int) -> ArrayDataModule:
        return Synthetic(
            task,
            objects=settings.objects,
            batch_size=settings.batch_size,
            seed=seed,
            w_seed=settings.seed,  # parameter i means the same in every run
            noise=settings.noise,
        )

    return make


# Read off the paper's figures 1 and 5 by eye, at the fractions 0, 0.1, …, 1. Its figures of Boston and MNIST show no
# difference between the orders, and Synthetic 2 has none.
_SYNTHETIC1 = {
    "variance": {
        "train": (0.22, 0.23, 0.23, 0.23, 0.24, 0.25, 0.26, 0.27, 0.29, 0.31, 0.45),
        "test": (0.78, 0.78, 0.77, 0.77, 0.78, 0.78, 0.77, 0.78, 0.82, 0.85, 1.06),
    },
    "random": {
        "train": (0.21, 0.22, 0.25, 0.25, 0.28, 0.30, 0.33, 0.37, 0.40, 0.43, 0.45),
        "test": (0.77, 0.78, 0.81, 0.82, 0.86, 0.87, 0.92, 0.95, 1.01, 1.04, 1.06),
    },
}
_SYNTHETIC3 = {
    "variance": {
        "train": (0.27, 0.34, 0.44, 0.54, 0.64, 0.77, 0.92, 0.99, 1.17, 1.41, 2.8),
        "test": (0.36, 0.46, 0.60, 0.76, 0.90, 1.08, 1.27, 1.37, 1.65, 2.13, 4.1),
    },
    "random": {
        "train": (0.27, 0.60, 0.91, 1.1, 1.4, 1.7, 2.0, 2.2, 2.4, 2.55, 2.8),
        "test": (0.36, 0.78, 1.2, 1.5, 1.95, 2.3, 2.75, 3.0, 3.3, 3.65, 4.05),
    },
}

TASKS: dict[Name, Task] = {
    "boston": Task(
        "Boston Housing, MLP 13-20-1",
        lambda: MLPRegressor(13),
        _boston,
        t0=100,
        steps=1000,
        batch_size=32,
        lr=3e-3,
        scan=(50, 200, 600, 2000),
    ),
    "mnist": Task(
        "MNIST, MLP 784-10-10",
        lambda: MLPClassifier(784, 10),
        _mnist,
        t0=100,
        steps=1000,
        batch_size=64,
        lr=3e-3,
        scan=(50, 200, 600, 2000),
    ),
    "synthetic1": Task(
        "Synthetic 1, MLP 200-20-1",
        lambda: MLPRegressor(200),
        _synthetic("regression"),
        t0=100,
        steps=1000,
        batch_size=32,
        lr=3e-3,
        scan=(50, 200, 600, 2000),
        options=frozenset({"objects", "noise"}),
        published=_SYNTHETIC1,
    ),
    "synthetic2": Task(
        "Synthetic 2, logistic regression",
        lambda: LogisticRegression(200),
        _synthetic("classification"),
        t0=50,
        steps=500,
        batch_size=32,
        lr=1e-2,
        scan=(25, 100, 300, 1000),
        options=frozenset({"objects"}),
    ),
    "synthetic3": Task(
        "Synthetic 3, linear regression",
        lambda: LinearRegression(200),
        _synthetic("regression"),
        t0=100,
        steps=1000,
        batch_size=32,
        lr=1e-2,
        scan=(50, 200, 600, 2000),
        options=frozenset({"objects", "noise"}),
        published=_SYNTHETIC3,
    ),
}


def n_parameters(data: Name) -> int:
    """The number p of parameters of an experiment's model."""
    return sum(w.numel() for w in TASKS[data].model().parameters())

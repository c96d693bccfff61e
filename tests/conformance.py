"""What every sibling must satisfy: one suite for all estimators, one table for all optimizers.

A test module inherits from a suite, once for each class, and says what is particular to it; the suite does the rest.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze.estimators import gains
from lightning_gcfreeze.estimators.base import Step, decayed_
from lightning_gcfreeze.estimators.per_sample import PerSample, Stacked
from tests.oracles import recursion

GAINS: dict[str, tuple[Any, Callable[[int], float]]] = {  # for the package, for the oracle
    "1/t": ("1/t", lambda t: 1 / t),
    "0.1": (0.1, lambda t: 0.1),
    "callable": (lambda t: t**-0.6, lambda t: t**-0.6),
}

Pairs = list[tuple[dict[str, Tensor], dict[str, Tensor]]]


def pairs(
    steps: int = 12, mean: float = 3.0, dtype: torch.dtype = torch.float64, shapes: tuple[tuple[int, ...], ...] = ()
) -> Pairs:
    """Gradients (g_1, g_S) by name, of a scalar, a vector and a matrix, with their own spread and a mean off zero."""
    generator = torch.Generator().manual_seed(11)

    def draw(scale: float) -> dict[str, Tensor]:
        return {
            f"w{i}": (mean + scale * (i + 1) * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for i, shape in enumerate(shapes or ((), (3,), (2, 2)))
        }

    return [(draw(1.0), draw(0.3)) for _ in range(steps)]


def vector(named: dict[str, Tensor]) -> np.ndarray:
    """All elements, one tensor behind the other, in float64."""
    return np.concatenate([tensor.double().flatten().numpy() for tensor in named.values()])


def samples(named: dict[str, Tensor]) -> dict[str, PerSample]:
    """One sample's gradients, in the form that estimators take."""
    return {name: Stacked(g[None], in_batch=False) for name, g in named.items()}


def advance(
    estimator: Any, g_one: dict[str, Tensor], g_batch: dict[str, Tensor], gain: float, correction: float = 1.0
) -> None:
    """A step of the recursion; the scale of the estimator's sum is kept at it."""
    estimator.scale, _ = decayed_(estimator.tensors.values(), getattr(estimator, "scale", 1.0), gain)
    estimator.t = getattr(estimator, "t", 0) + 1
    estimator.add(Step(samples(g_one), g_batch, gain / estimator.scale, gain, estimator.t, correction))


def value(estimator: Any) -> np.ndarray:
    """The statistic, flat."""
    return estimator.scale * vector(estimator.tensors)


def weights_of_terms(gain: gains.Gain, steps: int) -> tuple[list[float], float]:
    """Return the final weight of each of the terms 1, …, `steps`, and that of C_0: the recursion unrolled."""
    left, of_terms = 1.0, list[float]()
    for t in range(1, steps + 1):
        kappa = gains.at(gain, t)
        of_terms = [(1 - kappa) * weight for weight in of_terms] + [kappa]
        left *= 1 - kappa
    return of_terms, left


class EstimatorSuite:
    """A subclass brings `estimator` and what is expected of it: `expected`, or `project` for a covariance."""

    estimator: ClassVar[type]

    @staticmethod
    def project(full_covariance: np.ndarray) -> np.ndarray:
        """The part of C_t that the estimator keeps, flat."""
        raise NotImplementedError

    def expected(
        self, observed: list[tuple[np.ndarray, np.ndarray]], gain: Callable[[int], float], correction: float
    ) -> np.ndarray:
        """The estimator's state, flat, after flat pairs (g_1, g_S)."""
        scaled = [(g_batch + correction**0.5 * (g_one - g_batch), g_batch) for g_one, g_batch in observed]
        return self.project(recursion.covariance(scaled, gain))

    def after(self, observed: Pairs, gain: Any = "1/t", correction: float = 1.0) -> Any:
        """An estimator that has seen the pairs."""
        kappa = (lambda t: 1 / t) if gain == "1/t" else gain if callable(gain) else (lambda t: gain)
        estimator = self.estimator(observed[0][0])
        for t, (g_one, g_batch) in enumerate(observed, start=1):
            advance(estimator, g_one, g_batch, kappa(t), correction)
        return estimator

    def compare(self, observed: Pairs, rtol: float, gain: str = "1/t", correction: float = 1.0) -> None:
        """Package against oracle; `rtol` relates to the largest entry."""
        ours, theirs = GAINS[gain]
        state = value(self.after(observed, ours, correction))
        flat = [(vector(g_one), vector(g_batch)) for g_one, g_batch in observed]
        expected = self.expected(flat, theirs, correction)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(state, expected, rtol=rtol, atol=rtol * np.abs(expected).max())

    @pytest.mark.parametrize("correction", [1.0, 0.75])
    @pytest.mark.parametrize("gain", GAINS)
    def test_follows_the_recursion(self, gain, correction):
        """In float64 the state is that of the recursion as it is written, for every gain, from C_0 = 0."""
        self.compare(pairs(), rtol=1e-13, gain=gain, correction=correction)

    def test_a_large_mean_does_not_cancel_the_noise(self):
        """In float32, noise of 1 on gradients of 10,000: mean squares minus squared means would be off by a factor."""
        self.compare(pairs(steps=200, mean=1e4, dtype=torch.float32), rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_accumulates_in_float32(self, dtype):
        """Small steps of a mean over 1,000 terms would be lost in half precision; 1e-5 holds in float32 alone."""
        observed = pairs(steps=1000, dtype=dtype)
        assert {tensor.dtype for tensor in self.after(observed[:1]).tensors.values()} == {torch.float32}
        self.compare(observed, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_keeps_the_dtype_of_wide_parameters(self, dtype):
        """float32 stays float32 and float64 stays float64."""
        state = self.after(pairs(steps=2, dtype=dtype)).tensors
        assert {tensor.dtype for tensor in state.values()} == {dtype}

    def test_gradients_of_any_dtype_fold_into_the_state(self):
        """A float32 parameter may have gradients in another dtype; the state's dtype does not change."""
        estimator = self.estimator(pairs(dtype=torch.float32)[0][0])
        advance(estimator, pairs(dtype=torch.bfloat16)[0][0], pairs(dtype=torch.float64)[0][1], 1.0)
        assert {tensor.dtype for tensor in estimator.tensors.values()} == {torch.float32}

    def test_inputs_are_not_modified(self):
        """Neither parameters nor gradients change, nor does the state share memory with them; the state does change."""
        ((g_one, g_batch),) = pairs(steps=1, dtype=torch.float32)
        parameters = {name: g.clone() for name, g in g_one.items()}
        copies = [{name: tensor.clone() for name, tensor in named.items()} for named in (parameters, g_one, g_batch)]
        estimator = self.estimator(parameters)
        assert not vector(estimator.tensors).any()
        advance(estimator, g_one, g_batch, 1.0)
        state = vector(estimator.tensors)
        assert state.all()
        for named, copied in zip((parameters, g_one, g_batch), copies, strict=True):
            assert all(torch.equal(named[name], copied[name]) for name in named)
            for tensor in named.values():
                tensor.zero_()
        assert np.array_equal(vector(estimator.tensors), state)

    def test_the_tensors_are_all_its_state(self):
        """A second estimator that takes over `tensors` goes on to the same bits: a checkpoint relies on it."""
        observed = pairs(dtype=torch.float32)
        unbroken, resumed = self.after(observed), self.estimator(observed[0][0])
        resumed.scale, resumed.t = 1 / 5, 5
        resumed.tensors = {name: tensor.clone() for name, tensor in self.after(observed[:5]).tensors.items()}
        for t, (g_one, g_batch) in enumerate(observed[5:], start=6):
            advance(resumed, g_one, g_batch, 1 / t)
        assert unbroken.tensors.keys() == resumed.tensors.keys()
        assert all(torch.equal(unbroken.tensors[name], resumed.tensors[name]) for name in unbroken.tensors)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "NAdam": {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"lr": 0.2, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.05, "centered": True, "momentum": 0.9},
    "Adagrad": {"lr": 0.5, "weight_decay": 0.1},
    "Adadelta": {"lr": 10.0, "eps": 1e-3, "weight_decay": 0.1},
    "Adamax": {"lr": 0.05, "weight_decay": 0.1},
    "ASGD": {"lr": 0.05, "weight_decay": 0.1},
    "Rprop": {"lr": 0.05},
    "SparseAdam": {"lr": 0.05},
    "Adafactor": {"lr": 0.05, "weight_decay": 0.1},
    "Muon": {"lr": 0.05, "weight_decay": 0.1},
}
"""Every optimizer of torch but LBFGS, with what makes it move weights without a gradient; far enough for bfloat16."""

HELD_BY_A_ZERO_GRADIENT = {"Rprop"}
"""Optimizers that need a gradient to move a weight: masking is enough for them."""


def optimizers_of_torch() -> dict[str, type[Optimizer]]:
    """Those of `OPTIMIZERS` that this version of torch has."""
    return {name: getattr(torch.optim, name) for name in OPTIMIZERS if hasattr(torch.optim, name)}


def parameters_for(optimizer: str, dtype: torch.dtype) -> dict[str, Parameter]:
    """Parameters of 0, 1, 2 and 4 axes, rows-first and otherwise; of them, those that the optimizer takes."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    every = {
        "scalar": draw(),
        "vector": draw(7),
        "matrix": draw(4, 6),
        "transposed": draw(6, 4).t(),
        "conv": draw(3, 2, 3, 3).to(memory_format=torch.channels_last),
    }
    only = {"Muon": ("matrix", "transposed"), "SparseAdam": ("vector", "matrix")}.get(optimizer, tuple(every))
    return {name: Parameter(every[name]) for name in only}


def set_gradients_(parameters: dict[str, Parameter], sparse: bool = False) -> None:
    """Gradients of ½|p|², with noise; sparse ones have a few rows, some of them twice."""
    for p in parameters.values():
        noisy = p.detach() + torch.randn_like(p)
        if sparse:
            rows = torch.randint(0, len(p), (5,))
            noisy = torch.sparse_coo_tensor(rows[None], noisy[rows], p.shape, check_invariants=True)
        p.grad = noisy


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def variants() -> list[Any]:
    """Return every optimizer in each of its implementations: one loop, many tensors at once, one kernel."""
    found: list[Any] = []
    for name, optimizer in optimizers_of_torch().items():
        arguments = inspect.signature(optimizer).parameters
        choices: list[dict[str, bool]] = [{}]
        if "foreach" in arguments and name != "Muon" and name != "Adafactor":
            choices = [{"foreach": False}, {"foreach": True}]
        if "fused" in arguments:
            choices.append({"fused": True})
        found += [pytest.param(name, choice, id="-".join([name, *choice])) for choice in choices]
    return found


def half_of(parameters: dict[str, Parameter]) -> dict[str, Tensor]:
    """Return masks of about half the elements of every parameter, in its memory format; all of a scalar."""
    generator = torch.Generator().manual_seed(5)
    masks = {}
    for name, p in parameters.items():
        draw = torch.empty_like(p, dtype=torch.float32)  # keeps the strides
        draw.copy_(torch.rand(p.shape, generator=generator))
        masks[name] = draw < 0.5 if p.dim() else torch.tensor(True)
    return masks

"""Every optimizer of the table: served as a plain freeze is, to the bit for frozen elements, or refused at once."""

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing import assert_close

from lightning_gcfreeze import Evidence, GradCovFreezeCallback
from lightning_gcfreeze.freezing import ELEMENTWISE
from tests import cases
from tests.optimizers import LEFT_OUT, LIBRARIES, TABLE, Case, find
from tests.optimizers.case import COULD_BE_COMPACT, MIXES, SECOND_ORDER, SPARSE, around_adam
from tests.optimizers.page import PAGE, page
from tests.oracles.freezing import PlainFreeze
from tests.oracles.learning_rate import multiply_by_hand

T0, STEPS = 6, 16
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
SERVED = [path for path, case in TABLE.items() if case.outcome != "refused"]
REFUSED = [path for path, case in TABLE.items() if case.outcome == "refused"]


class Words(nn.Module):
    """A table of rows whose gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x * 10).long().remainder(7)).sum((1, 2))[:, None]


def network(case: Case) -> nn.Module:
    """5-6-6-1: of its square weight some optimizers have state of the same shape that is not by element."""
    torch.manual_seed(1)
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)]
    return (Words() if case.reason == SPARSE else nn.Sequential(*layers)).to(case.dtype)


class Training(cases.Regression):
    """Trains the network with the optimizer of a case, and keeps the values that the last forward pass used."""

    def __init__(self, path: str, case: Case) -> None:
        super().__init__(network(case))
        self.path, self.case = path, case
        self.used: dict[str, Tensor] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.used = {name: p.detach().clone() for name, p in self.named_parameters()}
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Optimizer:
        return self.case.optimizer(self.path, self.network)


class SecondOrder(Training):
    """Keeps the graph of the gradients."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(create_graph=True)


class Trace(pl.Callback):
    """Keeps every parameter's values in the forward pass of each step and after it, and how they are held."""

    def __init__(self) -> None:
        self.in_forward: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.outcome = "restore"

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, *args: Any) -> None:
        self.in_forward.append(pl_module.used)
        self.after.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
        own = set(pl_module.parameters())
        if any(isinstance(key, Tensor) and key not in own for key in trainer.optimizers[0].state):
            self.outcome = "compact"  # the state is of other tensors


def masks(case: Case) -> dict[str, Tensor]:
    """Half of the elements and a whole bias, drawn by NumPy: True = to be frozen."""
    draw = np.random.default_rng(5)
    drawn = {
        f"network.{name}": torch.as_tensor(draw.random(p.shape) < 0.5)
        for name, p in network(case).named_parameters()
        if case.takes(p)
    }
    if "network.2.bias" in drawn:
        drawn["network.2.bias"].fill_(True)
    return drawn


class Quarter(pl.Callback):
    """Multiplies the rates by hand."""

    def on_fit_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        multiply_by_hand(trainer.optimizers[0], lambda t: 0.25 if t > T0 else 1.0)


def train(path: str, case: Case, *callbacks: pl.Callback) -> Trace:
    """Sixteen steps."""
    module, trace = (SecondOrder if case.reason == SECOND_ORDER else Training)(path, case), Trace()
    torch.manual_seed(3)
    cases.trainer(callbacks=[*callbacks, trace]).fit(module, cases.loader(dtype=case.dtype))
    return trace


def freezing(frozen: dict[str, Tensor], lr_after_freeze: float | None = None) -> GradCovFreezeCallback:
    """The callback, made to freeze what the masks mark."""

    def as_drawn(evidence: Evidence) -> dict[str, Tensor]:
        return {name: (~frozen[name]).double() for name in evidence.weights}

    k = sum(int(mask.sum()) for mask in frozen.values())
    return GradCovFreezeCallback(T0, k, order=as_drawn, lr_after_freeze=lr_after_freeze)


def check(path: str, case: Case) -> Trace:
    """Train with the callback and the plain way; compare every step."""
    frozen = masks(case)
    callback = freezing(frozen)
    ours, plain = train(path, case, callback), train(path, case, PlainFreeze(T0, frozen))
    assert len(ours.after) == len(plain.after) == STEPS
    at_t0, last = ours.after[T0 - 1], ours.after[-1]
    for name, mask in frozen.items():
        assert torch.equal(callback.frozen[name], mask)
        as_bits = BITS[case.dtype]
        for values in (*ours.in_forward[T0:], *ours.after[T0:]):
            assert torch.equal(values[name][mask].view(as_bits), at_t0[name][mask].view(as_bits)), name
    for step, (values, expected) in enumerate(zip(ours.after, plain.after, strict=True), start=1):
        assert_close(values, expected, rtol=case.rtol, atol=case.rtol, msg=lambda text, t=step: f"step {t}: {text}")
    moves = torch.cat([(last[name] - at_t0[name]).abs()[~mask] for name, mask in frozen.items()])
    assert (moves > 0).double().mean() > 0.5
    assert moves.max() > 1e-3, "too little to compare"
    return ours


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Let other libraries use what torch deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("path", SERVED)
def test_served_optimizer_ends_where_a_plain_freeze_ends(path):
    """Frozen elements keep the bits of step t0, in forward and after steps; live ones go the reference's way."""
    assert check(path, TABLE[path]).outcome == TABLE[path].outcome


@pytest.mark.parametrize("path", [path for path in SERVED if TABLE[path].reason == COULD_BE_COMPACT])
def test_optimizer_that_could_be_compact_is_right_when_it_is(path):
    """With its class in `ELEMENTWISE` it is held by compacting, and ends at the same place."""
    ELEMENTWISE.add(find(path))
    try:
        assert check(path, TABLE[path]).outcome == "compact"
    finally:
        ELEMENTWISE.discard(find(path))


@pytest.mark.parametrize("path", [path for path in SERVED if TABLE[path].make is around_adam])
def test_wrapped_optimizer_has_the_factor_on_its_rates(path):
    """As with rates multiplied by hand around the wrapper's step, to the bit; and the factor does make a difference."""
    case = TABLE[path]
    frozen = masks(case)
    ours, plain = train(path, case, freezing(frozen, 0.25)), train(path, case, freezing(frozen))
    by_hand = train(path, case, freezing(frozen), Quarter())
    for step, values in enumerate(ours.after, start=1):
        assert_close(values, by_hand.after[step - 1], rtol=0, atol=0, msg=lambda text, t=step: f"step {t}: {text}")
        assert (step > T0) == any(not torch.equal(p, plain.after[step - 1][name]) for name, p in values.items())


@pytest.mark.parametrize("path", REFUSED)
def test_refused_optimizer_is_refused_before_the_first_step(path):
    """The message names the class and says what to do; nothing has moved."""
    case = TABLE[path]
    module = Training(path, case)
    with pytest.raises(MisconfigurationException) as error:
        cases.trainer(callbacks=[freezing(masks(case))]).fit(module, cases.loader(dtype=case.dtype))
    assert path.rpartition(".")[2] in str(error.value)
    assert "Use " in str(error.value)
    assert not module.used
    assert all(torch.equal(p, q) for p, q in zip(module.network.parameters(), network(case).parameters(), strict=True))


class OnTop(torch.optim.Adam):
    """Goes on after its parent's step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 0.999)
        return loss


def test_step_that_calls_its_parents_counts_once():
    """Once an Adam was made, torch runs the step hooks of a subclass twice: in its own step and in its parent's."""
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    check(f"{__name__}.OnTop", Case("restore", MIXES, {"lr": 0.01}))


@pytest.mark.parametrize("module", LIBRARIES)
def test_table_has_every_optimizer_of_a_library(module):
    """Another one in a new version has to be looked at."""
    exported = {
        f"{module}.{name}"
        for name, cls in vars(importlib.import_module(module)).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
        if module == "torch.optim" or not cls.__module__.startswith("torch.")
    }
    listed = {path for path in (*TABLE, *LEFT_OUT) if path.rpartition(".")[0] == module}
    assert exported == listed


def test_page_is_what_the_command_writes():
    """`uv run python -m tests.optimizers` brings it up to date."""
    assert PAGE.read_text(encoding="utf-8") == page()

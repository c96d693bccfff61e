"""`order="momentum"` in a Trainer: scores against sums over recorded gradients, and nothing is observed for them."""

import re
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gcfreeze import Evidence, FreezeSchedule, GradCovFreezeCallback, Settled, orderings, run
from lightning_gcfreeze.freezing import ELEMENTWISE
from tests import cases
from tests.interruptions import DropoutByStep, interrupted
from tests.interruptions import run as run_to_the_end
from tests.oracles import momentum as oracle

# What is found at t0 is looked at here, so many runs end there.
pytestmark = pytest.mark.filterwarnings("ignore:.*optimizer steps planned")
T0 = 6
MOMENTUM: dict[str, Any] = {"t0": T0, "k": 0.5, "order": "momentum"}


class Late(cases.Regression):
    """An MLP in double precision; the last layer's weight has gradients from step 3 on, and one parameter has none."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(cases.mlp(torch.float64), optimizer)
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.network[2].weight.requires_grad_(self.global_step >= 2)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> optim.Optimizer:
        self.network[2].weight.requires_grad_(True)
        return self.make_optimizer(self)


class Recorder(pl.Callback):
    """The gradients that the optimizer steps by, {name: (*p.shape) or None} of each step."""

    def __init__(self, index: int = 0, t0: int = T0) -> None:
        self.index, self.t0, self.steps = index, t0, list[dict[str, Any]]()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[self.index]
        own = {p for group in optimizer.param_groups for p in group["params"]}
        named = {name: p for name, p in pl_module.named_parameters() if p in own}

        def record(*args: Any) -> None:  # with a closure the gradients are there after the step only
            if len(self.steps) < self.t0:
                grads = {n: None if p.grad is None else p.grad.detach().numpy().copy() for n, p in named.items()}
                self.steps.append(grads)

        optimizer.register_step_post_hook(record)

    def scores(self, shapes: dict[str, torch.Size], of_element: Any) -> np.ndarray:
        """The product m · update of all elements, by the oracle; `of_element` is (name, gradients) -> m, update."""
        found = []
        for name, shape in shapes.items():
            for index in np.ndindex(*shape):
                gradients = [None if g[name] is None else float(g[name][index]) for g in self.steps]
                found.append(np.prod(of_element(name, gradients)))
        return np.array(found)


def two_groups(kind: Any, second: dict[str, Any], **first: Any) -> Any:
    return lambda m: kind(
        [{"params": list(m.network[0].parameters())}, {"params": [*m.network[2].parameters(), m.unused], **second}],
        lr=0.02,
        **first,
    )


def by_group(first: Any, second: Any) -> Any:
    return lambda name, g: (first if name.startswith("network.0") else second)(g)


def adam(beta1: float, beta2: float, eps: float = 1e-8, amsgrad: bool = False) -> Any:
    return lambda g: oracle.adam(g, beta1, beta2, eps, amsgrad)


RUNS = {
    "Adam": (
        two_groups(optim.Adam, {"betas": (0.5, 0.8), "eps": 0.1}),
        by_group(adam(0.9, 0.999), adam(0.5, 0.8, 0.1)),
    ),
    "AdamW": (
        two_groups(optim.AdamW, {"betas": (0.7, 0.99)}, weight_decay=0.4),
        by_group(adam(0.9, 0.999), adam(0.7, 0.99)),
    ),
    "amsgrad": (
        two_groups(optim.Adam, {"betas": (0.9, 0.6)}, amsgrad=True),
        by_group(adam(0.9, 0.999, amsgrad=True), adam(0.9, 0.6, amsgrad=True)),
    ),
    "NAdam": (two_groups(optim.NAdam, {"betas": (0.7, 0.99)}), by_group(adam(0.9, 0.999), adam(0.7, 0.99))),
    "SGD": (
        two_groups(optim.SGD, {"momentum": 0.5}, momentum=0.9, nesterov=True),
        by_group(lambda g: oracle.sgd(g, 0.9), lambda g: oracle.sgd(g, 0.5)),
    ),
}


@pytest.mark.parametrize("hold", ["compact", "restore"])
@pytest.mark.parametrize("name", RUNS)
def test_order_is_that_of_the_recorded_gradients(name, hold):
    """Two groups of other hyper-parameters, clipping, a late parameter and one without gradients: that one is first."""
    make, of_element = RUNS[name]
    callback, recorder, module = GradCovFreezeCallback(**(MOMENTUM | {"hold": hold})), Recorder(), Late(make)
    trainer = cases.trainer(callbacks=[callback, recorder], max_epochs=1, gradient_clip_val=0.7)
    trainer.fit(module, cases.loader(dtype=torch.float64))
    scores = recorder.scores({n: p.shape for n, p in module.named_parameters()}, of_element)
    order = np.argsort(scores, kind="stable")
    expected = np.empty(60, dtype=int)
    expected[order] = np.arange(1, 61)
    assert torch.cat([r.flatten() for r in callback.ranks.values()]).tolist() == expected.tolist()
    assert torch.cat([f.flatten() for f in callback.frozen.values()]).tolist() == (expected <= 30).tolist()
    assert (np.diff(scores[order])[2:] > 1e-9 * scores[order][3:]).all()  # beyond rounding
    assert scores[order][2] == 0.0 < scores[order][3]


def test_parameters_that_never_had_a_gradient_are_counted():
    """They freeze first, and the warning says so."""
    callback = GradCovFreezeCallback(t0=T0, k=9, order="momentum")
    with pytest.warns(UserWarning, match="3 of the 9 frozen elements never had a gradient"):
        cases.trainer(callbacks=[callback], max_epochs=1).fit(Late(RUNS["Adam"][0]), cases.loader(dtype=torch.float64))
    assert callback.frozen["unused"].all()


class Stopping(cases.Regression):
    """One parameter has gradients other than zero in the first two of eight steps only."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(cases.mlp(), optimizer)
        self.early = nn.Parameter(torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.early.sum() * float(self.global_step < 2)

    def configure_optimizers(self) -> optim.Optimizer:
        return self.make_optimizer(self)


@pytest.mark.parametrize(
    ("order", "text"),
    [
        ("momentum", "3 of the 4 .* never had a gradient, or none that the state of the optimizer still"),
        ("progress", None),
    ],
)
def test_gradients_that_the_mean_has_forgotten_are_not_said_to_have_never_been(order, text, recwarn):
    """With a short memory the mean underflows to 0 in a few steps; "progress" knows that there were gradients."""
    callback = GradCovFreezeCallback(t0=7, k=4, order=order)
    module = Stopping(lambda m: optim.Adam(m.parameters(), 1e-4, betas=(1e-9, 0.999)))
    cases.trainer(callbacks=[callback], max_epochs=1).fit(module, cases.loader())
    found = [str(w.message) for w in recwarn if "never had a gradient" in str(w.message)]
    assert bool(found) == (text is not None)
    assert all(re.search(str(text), sentence) for sentence in found)
    assert order == "progress" or callback.frozen["early"].all()


class Allocations(TorchDispatchMode):
    """The elements of all results of operations."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.total += found.numel() if isinstance(found, Tensor) else 0
        return found


class Counted(pl.Callback):
    """Counts what tensors the hooks of a callback compute, while it observes."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.numel: list[int] = []
        for hook in ("on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step"):
            setattr(callback, hook, self.counted(getattr(callback, hook)))

    def counted(self, hook: Any) -> Any:
        def counting(*args: Any) -> None:
            with Allocations() as allocations:
                hook(*args)
            self.numel.append(allocations.total)

        return counting


@pytest.mark.filterwarnings("ignore:Nothing was frozen")
def test_nothing_is_computed_or_kept_before_t0(monkeypatch):
    """No gradient is asked for, no operation runs in a hook, no tensor is in the state; "progress" does all of this."""
    asked: list[int] = []
    original = run.batch_gradients

    def spying(parameters: Any, *args: Any) -> Any:
        asked.append(len(parameters))
        return original(parameters, *args)

    monkeypatch.setattr(run, "batch_gradients", spying)
    found = {}
    for order in ("momentum", "progress"):
        callback = GradCovFreezeCallback(t0=20, k=0.5, order=order)
        counted = Counted(callback)
        asked.clear()
        module = cases.Regression(cases.mlp(), lambda p: optim.AdamW(p, 0.01))
        cases.trainer(callbacks=[callback], max_steps=8).fit(module, cases.loader())
        state = callback.state_dict()["observing"]
        assert state["observed"] == 8
        assert state["covariance"] == {}
        found[order] = (max(asked), max(counted.numel), len(state["moments"]), state["start"])
    assert found["momentum"] == (0, 0, 0, None)
    assert found["progress"][0] == 4
    assert found["progress"][1] > 2 * 57
    assert found["progress"][2] == 2


class Asks(pl.Callback):
    """The ranks before each step, and after it."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback, self.before, self.after = callback, list[Any](), list[Any]()

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.before.append(self.callback.ranks)

    def on_train_batch_end(self, *args: Any) -> None:
        self.after.append(self.callback.ranks)


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
def test_ranks_while_observing_are_empty_before_the_first_step_and_known_from_then_on(granularity):
    """After step t they are what a run with t0 = t decides by."""
    callback = GradCovFreezeCallback(**(MOMENTUM | {"granularity": granularity, "k": 0.9}))
    asks = Asks(callback)
    module = cases.Regression(cases.mlp(), lambda p: optim.Adam(p, 0.01))
    cases.trainer(callbacks=[callback, asks], max_epochs=1).fit(module, cases.loader())
    assert asks.before[0] == {}
    other = GradCovFreezeCallback(**(MOMENTUM | {"granularity": granularity, "k": 0.9, "t0": 3}))
    module = cases.Regression(cases.mlp(), lambda p: optim.Adam(p, 0.01))
    cases.trainer(callbacks=[other], max_steps=4).fit(module, cases.loader())
    cases.assert_identical(asks.after[2], other.ranks)
    changed = any(not torch.equal(asks.after[2][name], ranks) for name, ranks in asks.after[T0 - 1].items())
    assert changed or granularity == "tensor"


@pytest.mark.parametrize("after", [1, 4, 6, 7, 12])
def test_resumed_run_equals_the_unbroken_one(tmp_path, after):
    """To the bit. Before t0 the optimizer's state is all that it needs of the checkpoint."""
    arguments = MOMENTUM | {"t0": 7}
    unbroken = run_to_the_end(GradCovFreezeCallback(**arguments), DropoutByStep())
    cases.assert_identical(interrupted(tmp_path / "run.ckpt", after, arguments), unbroken)


def test_t0_from_the_data_freezes_as_that_t0_does():
    """The order of this little problem is clear at once; the same masks as with the number."""
    masks, t0s = [], []
    for t0 in (Settled(first=8, overlap=0.0, improvement=0.9), None):
        callback = GradCovFreezeCallback(t0=t0 or t0s[0], k=0.5, order="momentum")
        module = cases.Regression(cases.mlp(), lambda p: optim.Adam(p, 0.003))
        cases.trainer(callbacks=[callback], max_epochs=8).fit(module, cases.loader())
        t0s.append(callback.state_dict()["plan"]["t0"])
        masks.append(callback.frozen)
    assert t0s[0] == t0s[1] < 32
    cases.assert_identical(*masks)


def test_frozen_elements_are_the_lowest_at_the_next_stage_and_not_counted_as_without_gradients(recwarn):
    """Their state is 0 under "restore": what froze first does not thaw, as long as enough freezes."""
    schedule = FreezeSchedule([(3, 0.6), (6, 0.3), (9, 0.5)], monotone=False)
    callback = GradCovFreezeCallback(schedule=schedule, order="momentum")
    masks: list[Any] = []

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step in (3, 6, 9):
                masks.append(torch.cat([f.flatten() for f in callback.frozen.values()]))

    module = cases.Regression(cases.mlp(), lambda p: optim.AdamW(p, 0.01))
    cases.trainer(callbacks=[callback, Looks()]).fit(module, cases.loader())
    first, second, third = masks
    assert [int(m.sum()) for m in masks] == [34, 17, 28]
    assert (second <= first).all()
    assert (second <= third).all()
    assert not [w for w in recwarn if "never had a gradient" in str(w.message)]


def test_scores_do_not_depend_on_the_loss_scale():
    """The state is of unscaled gradients. A fused optimizer has one of zeros after a first step that overflows."""

    class Overflows(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 0 else 1.0)

    found = []
    for scale in (2.0**4, 2.0**12):
        callback, asks = GradCovFreezeCallback(**MOMENTUM), []
        plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))

        class Ranks(pl.Callback):
            def on_train_batch_end(self, *args: Any, callback: Any = callback, asks: Any = asks) -> None:
                asks.append(callback.ranks)

        module = Overflows(cases.mlp(), lambda p: optim.Adam(p, 0.01, fused=True))
        cases.trainer(callbacks=[callback, Ranks()], plugins=[plugin], max_epochs=1).fit(module, cases.loader())
        assert asks[0] == {}
        assert callback.state_dict()["decision"]["observed"] == T0
        found.append(callback.frozen)
    cases.assert_identical(*found)


class Foreign(optim.Optimizer):
    """SGD that keeps no state, or one of its own."""

    def __init__(self, parameters: Any, **state: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.kept = state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.01)
            if self.kept:
                self.state[p] = {name: torch.zeros_like(p) for name in self.kept}


class Steps(pl.Callback):
    """How many steps were taken."""

    taken = 0

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.optimizers[0].register_step_pre_hook(self.count)

    def count(self, *args: Any) -> None:
        self.taken += 1


@orderings.needs("update", variance=False)
def smallest_updates(evidence: Evidence) -> Any:
    assert evidence.momentum is None
    assert evidence.variance == {}
    return {name: update.abs() for name, update in evidence.update.items()}


@pytest.mark.parametrize("order", ["momentum", smallest_updates], ids=["momentum", "own"])
@pytest.mark.parametrize(
    ("make", "text", "steps"),
    [
        (lambda p: optim.SGD(p, 0.1), "SGD remembers no gradient but the last with `momentum=0`", 0),
        (lambda p: optim.RMSprop(p, 0.1), "RMSprop remembers no gradient", 0),
        (lambda p: optim.Adagrad(p, 0.1), "Adagrad keeps no running mean of gradients", 0),
        (lambda p: optim.Adafactor(p, 0.1), "Adafactor is not known to treat each element.*ELEMENTWISE", 0),
        (type("OwnAdam", (optim.Adam,), {}), "OwnAdam is not known to treat each element", 0),
        (lambda p: Foreign(p), "Foreign has no state of any eligible parameter after its step", 1),
        (lambda p: Foreign(p, exp_avg=0, z=0), r"Foreign keeps z, whose part.*\(network\.0\.weight\)", 1),
    ],
    ids=["SGD", "RMSprop", "Adagrad", "Adafactor", "subclass", "no state", "own state"],
)
def test_optimizer_without_a_known_mean_is_refused_before_or_at_its_first_step(monkeypatch, order, make, text, steps):
    """The error names the optimizer, the reason and the order that observes gradients."""
    monkeypatch.setattr("lightning_gcfreeze.refusals.optimizers.ELEMENTWISE", ELEMENTWISE | {Foreign})
    taken = Steps()
    trainer = cases.trainer(callbacks=[GradCovFreezeCallback(t0=T0, k=0.5, order=order), taken])
    with pytest.raises(MisconfigurationException, match=rf"{text}.*Use `order='progress'`, which observes"):
        trainer.fit(cases.Regression(cases.mlp(), make), cases.loader())
    assert taken.taken == steps


def test_own_order_may_read_the_update_alone():
    """|update| of SGD is |momentum_buffer|: the masks of the named order."""
    masks = []
    for order in ("momentum", smallest_updates):
        callback = GradCovFreezeCallback(t0=T0, k=0.5, order=order)
        cases.trainer(callbacks=[callback], max_epochs=1).fit(cases.Regression(cases.mlp()), cases.loader())
        masks.append(callback.frozen)
    cases.assert_identical(*masks)


def test_samples_may_be_observed_as_well():
    """The variance is there, and the order is the same."""
    found = []
    for samples in ("auto", "first"):
        callback = GradCovFreezeCallback(**MOMENTUM, samples=samples)
        cases.trainer(callbacks=[callback], max_epochs=1).fit(cases.Regression(cases.mlp()), cases.loader())
        found.append(callback.frozen)
        assert len(callback.variance) == (4 if samples == "first" else 0)
    cases.assert_identical(*found)


class ManualSteps(pl.LightningModule):
    """Two optimizers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.other = cases.mlp(torch.float64), nn.Linear(5, 1).double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self.network(x) + self.other(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.other.parameters(), 0.01), optim.Adam(self.network.parameters(), 0.01)


def test_manual_optimization_is_ordered_by_the_state_of_its_optimizer():
    """Of that with the index 1; the other one has no momentum, and need not."""
    callback, recorder, module = GradCovFreezeCallback(**MOMENTUM, optimizer=1), Recorder(1), ManualSteps()
    cases.trainer(callbacks=[callback, recorder], max_epochs=1).fit(module, cases.loader(dtype=torch.float64))
    shapes = {f"network.{n}": p.shape for n, p in module.network.named_parameters()}
    scores = recorder.scores(shapes, lambda _, g: oracle.adam(g, 0.9, 0.999, 1e-8))
    expected = np.zeros(57, dtype=bool)
    expected[np.argsort(scores, kind="stable")[:28]] = True
    assert torch.cat([f.flatten() for f in callback.frozen.values()]).tolist() == expected.tolist()

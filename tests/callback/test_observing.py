"""What the callback observes in a Trainer, against a training loop by hand, and that it leaves no trace."""

import copy
import dataclasses
import random
from collections import namedtuple
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lightning_gcfreeze import Evidence, GradCovFreezeCallback, orderings
from lightning_gcfreeze.gradients.capture import Capture
from tests import cases, insides
from tests.oracles.recursion import covariance
from tests.oracles.training import observed_run

# What is observed, or said at the end, is looked at here, so many runs end at t0.
pytestmark = pytest.mark.filterwarnings("ignore:.*optimizer steps planned")


def mse(network: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(network(x), y)


def first_of(batch: Any) -> Any:
    return [tensor[:1] for tensor in batch]


def fit(callback: GradCovFreezeCallback, batch_size: int = 8, samples: int = 64, **kwargs: Any) -> cases.Regression:
    module = cases.Regression(cases.mlp(torch.float64))
    trainer = cases.trainer(callbacks=[callback], **kwargs)
    trainer.fit(module, cases.loader(batch_size, samples, torch.float64))
    return module


def by_hand(steps: list[list[Any]], **kwargs: Any) -> np.ndarray:
    network = cases.mlp(torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    return observed_run(network, steps, mse, first_of, optimizer, **kwargs)


def flat(named: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([t.flatten() for t in named.values()]).numpy()


@pytest.mark.parametrize(
    ("gain", "kappa"),
    [("1/t", lambda t: 1 / t), (0.2, lambda t: 0.2), (lambda t: 2 / (t + 1), lambda t: 2 / (t + 1))],
    ids=["1/t", "constant", "callable"],
)
def test_variance_is_the_diagonal_of_the_literal_recursion(gain, kappa):
    """C_t0 of a run in a Trainer is that of a loop by hand, to float64 rounding."""
    callback = GradCovFreezeCallback(t0=12, k=0.5, gain=gain)
    captured = GradCovFreezeCallback(t0=12, k=0.5, gain=gain, gradients="auto")
    fit(callback)
    fit(captured)
    steps = [[batch] for batch in [*cases.loader(8, 64, torch.float64)] * 2][:12]
    for found in (callback, captured):
        np.testing.assert_allclose(flat(found.variance), np.diag(by_hand(steps, gain=kappa)), rtol=1e-10)


def test_full_covariance_is_that_of_the_literal_recursion():
    """All p x p of it, rows in the order of named_parameters; its diagonal is the diagonal run's variance."""
    full = GradCovFreezeCallback(t0=12, k=0.5, covariance="full")
    diagonal = GradCovFreezeCallback(t0=12, k=0.5)
    fit(full)
    fit(diagonal)
    steps = [[batch] for batch in [*cases.loader(8, 64, torch.float64)] * 2][:12]
    expected = by_hand(steps)
    assert full.covariance is not None
    np.testing.assert_allclose(full.covariance, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())
    assert diagonal.covariance is None
    np.testing.assert_allclose(flat(full.variance), flat(diagonal.variance), rtol=1e-12)
    assert_close(full.frozen, diagonal.frozen)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("how", ["replay", "capture", "auto"])
@pytest.mark.parametrize(("samples", "count"), [("all", 8), (3, 3), (8, 8), (20, 8)])
def test_noise_of_several_samples_is_averaged(samples, count, how, covariance):
    """C is the mean over steps of 1/m Σ_j (g_j - g_S)(g_j - g_S)ᵀ: NumPy on one autograd call a sample.

    Of the last batch, of 4, all 4 are taken; its noise is put on the scale of batches of 8.
    """
    callback = GradCovFreezeCallback(t0=6, k=0.5, samples=samples, gradients=how, covariance=covariance)
    fit(callback, samples=44)
    network = cases.mlp(torch.float64)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    terms = []
    for batch in [*cases.loader(8, 44, torch.float64)][:6]:
        size = len(batch[0])
        optimizer.zero_grad()
        mse(network, batch).backward()
        g_batch = torch.cat([p.grad.flatten() for p in parameters])
        noise = []
        for j in range(min(count, size)):
            g = torch.autograd.grad(mse(network, [part[j : j + 1] for part in batch]), parameters)
            noise.append((torch.cat([part.flatten() for part in g]) - g_batch).numpy())
        terms.append(np.mean([np.outer(n, n) for n in noise], axis=0) * (1 - 1 / 8) / (1 - 1 / size))
        optimizer.step()
    expected = np.mean(terms, axis=0)
    np.testing.assert_allclose(flat(callback.variance), np.diag(expected), rtol=1e-9)
    if covariance == "full":
        np.testing.assert_allclose(callback.covariance, expected, rtol=1e-8, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_large_layers_are_summed_within_the_backward_pass(accumulate, monkeypatch):
    """The variance is that of a sum after the pass; under accumulation it is close to it."""
    sums: list[str] = []
    add_up = Capture._add_up

    def counted(self: Capture, layer: nn.Module, own: str, name: str, p: nn.Parameter) -> None:
        before = len(self._squares)
        add_up(self, layer, own, name, p)
        sums.extend([name] * (len(self._squares) - before))

    monkeypatch.setattr(Capture, "_add_up", counted)

    def run(little: int, **kwargs: Any) -> tuple[GradCovFreezeCallback, pl.Trainer]:
        insides.sum_in_backward_from(monkeypatch, little)
        callback = GradCovFreezeCallback(t0=8, k=0.5, samples="all")
        trainer = cases.trainer(callbacks=[callback], accumulate_grad_batches=accumulate, max_epochs=2)
        module = cases.Regression(cases.mlp(torch.float64))
        trainer.fit(module, cases.loader(64, 64 * 8, torch.float64), **kwargs)
        return callback, trainer

    late, _ = run(2**30)
    assert not sums
    early, _ = run(0)
    assert sums
    tolerance = 1e-9 if accumulate == 1 else 0.2  # around the mean of a micro-batch, not of all
    np.testing.assert_allclose(flat(early.variance), flat(late.variance), rtol=tolerance)


@pytest.mark.parametrize("how", ["replay", "capture", "auto"])
def test_unused_parameter_has_zero_covariance(how):
    network = cases.mlp(torch.float64)
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Linear))
    first.register_parameter("spare", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    callback = GradCovFreezeCallback(t0=3, k=40, covariance="full", samples="all", gradients=how)
    cases.trainer(callbacks=[callback]).fit(cases.Regression(network), cases.loader(dtype=torch.float64))
    assert callback.covariance is not None
    unused = [name for name in callback.variance if name.endswith("spare")]
    assert [name for name, v in callback.variance.items() if not v.any()] == unused
    assert len(unused) == 1


@pytest.mark.parametrize("how", ["replay", "capture", "auto"])
def test_accumulated_micro_batches_make_one_step_of_the_recursion(how):
    """g_S is the mean over the micro-batches, g_1 belongs to the first sample of the first of them.

    In the last window, of two micro-batches, the optimizer gets two thirds of the mean: Lightning divides by three all
    the same. C must see the mean itself, or a mean gradient far from zero would pass for noise.
    """
    callback = GradCovFreezeCallback(t0=3, k=0.5, gradients=how)
    fit(callback, accumulate_grad_batches=3, max_epochs=1)
    batches = [*cases.loader(8, 64, torch.float64)]  # 8 batches: 3 + 3 + 2
    steps = [batches[:3], batches[3:6], batches[6:]]
    network = cases.mlp(torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)

    pairs = []
    parameters = list(network.parameters())
    for micro_batches in steps:
        grads = [torch.autograd.grad(mse(network, b), parameters) for b in micro_batches]
        g_batch = [sum(g) / len(micro_batches) for g in zip(*grads, strict=True)]
        g_one = torch.autograd.grad(mse(network, first_of(micro_batches[0])), parameters)
        factor = np.sqrt((1 - 1 / 24) / (1 - 1 / (8 * len(micro_batches))))
        difference = np.concatenate([(a - b).numpy().ravel() for a, b in zip(g_one, g_batch, strict=True)])
        pairs.append((factor * difference, np.zeros_like(difference)))
        for p, g in zip(parameters, g_batch, strict=True):
            p.grad = g * len(micro_batches) / 3
        optimizer.step()
    expected = np.diag(covariance(pairs, lambda t: 1 / t))
    np.testing.assert_allclose(flat(callback.variance), expected, rtol=1e-10)


def test_every_nth_step_is_observed():
    """every=3 takes the steps 3, 6, 9, … into C, and no other."""
    callback = GradCovFreezeCallback(t0=10, k=0.5, every=3)
    fit(callback)
    steps = [[batch] for batch in [*cases.loader(8, 64, torch.float64)] * 2][:10]
    np.testing.assert_allclose(flat(callback.variance), np.diag(by_hand(steps, every=3)), rtol=1e-10)


def test_noise_of_a_short_last_batch_is_rescaled():
    """With S = 8 and a last batch of 4, its squared noise counts (1 - 1/8) / (1 - 1/4) times."""
    callback = GradCovFreezeCallback(t0=3, k=0.5, gain=lambda t: 1.0)  # κ = 1: C is the last step's alone
    fit(callback, samples=20, max_epochs=1)
    batches = [*cases.loader(8, 20, torch.float64)]
    uncorrected = np.diag(by_hand([[b] for b in batches], gain=lambda t: 1.0))
    np.testing.assert_allclose(flat(callback.variance), uncorrected * (7 / 8) / (3 / 4), rtol=1e-10)


def test_last_batch_of_one_sample_is_not_observed():
    """Its g_1 is its g_S: C is that of the other steps."""
    callback = GradCovFreezeCallback(t0=3, k=0.5)
    fit(callback, samples=17, max_epochs=1)
    steps = [[b] for b in [*cases.loader(8, 17, torch.float64)][:2]]
    np.testing.assert_allclose(flat(callback.variance), np.diag(by_hand(steps)), rtol=1e-10)


def test_k_lowest_elements_freeze_after_step_t0():
    """Masks and ranks follow from the oracle's diagonal; the phase changes with step t0, not before."""
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(callback.phase)

    callback = GradCovFreezeCallback(t0=5, k=20)
    module = cases.Regression(cases.mlp(torch.float64))
    cases.trainer(callbacks=[Watch(), callback]).fit(module, cases.loader(dtype=torch.float64))
    steps = [[batch] for batch in [*cases.loader(8, 64, torch.float64)]][:5]
    order = np.argsort(np.diag(by_hand(steps)), kind="stable")
    expected = np.zeros(57, dtype=bool)
    expected[order[:20]] = True
    assert flat(callback.frozen).tolist() == expected.tolist()
    assert flat(callback.ranks)[order].tolist() == list(range(1, 58))
    assert callback.frozen_fraction == 20 / 57
    assert seen == ["observing"] * 4 + ["frozen"] * 12


def test_evidence_of_other_orders_is_that_of_the_loop_by_hand():
    """Start weights, E[g_S²] and E[g_S], which displacement, second_moment and snr read."""
    network = cases.mlp(torch.float64)
    start = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    gradients = []
    for x, y in [*cases.loader(8, 64, torch.float64)][:6]:
        optimizer.zero_grad()
        mse(network, (x, y)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]).numpy().copy())
        optimizer.step()
    end = torch.cat([p.detach().flatten() for p in network.parameters()])
    g = np.stack(gradients)
    callbacks = {
        order: GradCovFreezeCallback(t0=6, k=0.5, order=order) for order in ("displacement", "second_moment", "snr")
    }
    for callback in callbacks.values():
        fit(callback)
    variance = flat(callbacks["snr"].variance)
    expected = {
        "displacement": (end - start).abs().numpy(),
        "second_moment": (g**2).mean(0),
        "snr": np.divide(np.abs(g.mean(0)), np.sqrt(variance), out=np.zeros(57), where=variance > 0),
    }
    for order, callback in callbacks.items():
        by_rank = expected[order][np.argsort(flat(callback.ranks))]
        assert (np.diff(by_rank) >= -1e-12).all(), order
        assert by_rank[0] < by_rank[-1]


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Record:
    x: Tensor
    y: Tensor
    note: str = "plain"


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
        (lambda x, y: {"in": {"x": x}, "out": [y]}, lambda b: (b["in"]["x"], b["out"][0])),
        (lambda x, y: Pair(x, y), lambda b: (b.x, b.y)),
        (lambda x, y: Record(x, y), lambda b: (b.x, b.y)),
        (lambda x, y: torch.cat([x, y], 1), lambda b: (b[:, :5], b[:, 5:])),
        (lambda x, y: ((x, ["text"] * len(x)), y), lambda b: (b[0][0], b[1])),
    ],
    ids=["dict", "nested", "named tuple", "dataclass", "tensor", "texts"],
)
def test_batches_of_any_type_give_the_same_covariance(pack, unpack):
    """Tuples, mappings, dataclasses and the like."""

    class AnyForm(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(unpack(batch), batch_idx)

    callback = GradCovFreezeCallback(t0=4, k=0.5)
    loader = DataLoader(
        cases.data(dtype=torch.float64),
        batch_size=8,
        collate_fn=lambda rows: pack(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])),
    )
    cases.trainer(callbacks=[callback], max_epochs=1).fit(AnyForm(cases.mlp(torch.float64)), loader)
    plain = GradCovFreezeCallback(t0=4, k=0.5)
    fit(plain)
    assert_close(callback.variance, plain.variance, rtol=1e-12, atol=0.0)  # a strided y may sum in another order


def test_hook_of_the_module_slices_the_batch():
    """`gcfreeze_first_sample` comes first: time-major batches, which would be cut along time, come out right."""

    class TimeMajor(cases.Regression):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.mse_loss(self.network(x.T), y.T)

        def gcfreeze_first_sample(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, y = batch
            return x[:, :1], y[:, :1]

    callback = GradCovFreezeCallback(t0=4, k=0.5)
    loader = DataLoader(
        cases.data(dtype=torch.float64),
        batch_size=8,
        collate_fn=lambda rows: (torch.stack([r[0] for r in rows], 1), torch.stack([r[1] for r in rows], 1)),
    )
    cases.trainer(callbacks=[callback], max_epochs=1).fit(TimeMajor(cases.mlp(torch.float64)), loader)
    plain = GradCovFreezeCallback(t0=4, k=0.5)
    fit(plain)
    assert_close(callback.variance, plain.variance, rtol=1e-12, atol=0.0)


class Talkative(cases.Regression):
    """Keeps metrics, lists, counters and tensors, logs, and draws random numbers from three sources."""

    def __init__(self) -> None:
        super().__init__(cases.convnet(), lambda p: torch.optim.AdamW(p, lr=0.01))
        self.metric = MeanSquaredError()
        self.outputs: list[Tensor] = []
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))
        self.history: dict[str, list[float]] = {"loss": []}
        self.step_logged: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x.mul_(1.0 + 0.01 * random.random())
        y = y + 0.01 * float(np.random.rand())
        prediction = self.network(x)
        loss = nn.functional.mse_loss(prediction, y)
        self.calls += 1
        self.seen += len(x)
        self.outputs.append(loss.detach())
        self.history["loss"].append(float(loss.detach()))
        self.metric(prediction, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("metric", self.metric, on_epoch=True)
        self.metric_updates = self.metric.update_count  # Lightning resets it with the epoch
        return loss


def run_talkative(callbacks: list[pl.Callback]) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    module = Talkative()
    trainer = cases.trainer(callbacks=callbacks, max_epochs=2)
    trainer.fit(module, cases.loader())
    return {
        "state": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "metrics": {n: value for n, value in trainer.callback_metrics.items() if n != "gcfreeze/frozen_fraction"},
        "outputs": module.outputs,
        "history": module.history["loss"],
        "calls": module.calls,
        "metric updates": module.metric_updates,
        "random": (random.random(), float(np.random.rand()), float(torch.rand(()))),
    }


@pytest.mark.parametrize("how", ["replay", "capture", "auto"])
def test_observing_leaves_all_state_bit_identical(how):
    """Weights, BatchNorm's buffers, metrics, logged values, plain attributes and random streams."""
    plain = run_talkative([])
    with pytest.warns(UserWarning, match="Nothing was frozen"):
        observed = run_talkative([observer := GradCovFreezeCallback(t0=1000, k=0.5, gradients=how)])
    assert observer.variance["network.1.weight"].min() > 0  # it did observe
    cases.assert_identical(observed, plain)
    assert plain["calls"] == 16
    assert plain["state"]["network.2.num_batches_tracked"] == 16


def test_comparison_of_all_state_fails_once_elements_are_frozen():
    """So the comparison of the test above can fail."""
    plain = run_talkative([])
    frozen = run_talkative([GradCovFreezeCallback(t0=2, k=0.5)])
    with pytest.raises(AssertionError):
        cases.assert_identical(frozen["state"], plain["state"])


def test_training_step_that_returns_a_mapping_is_observed():
    """{"loss": ...}: the same C as with the loss alone."""

    class Dict(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "more": 1}

    callback, plain = GradCovFreezeCallback(t0=4, k=0.5), GradCovFreezeCallback(t0=4, k=0.5)
    cases.trainer(callbacks=[callback]).fit(Dict(cases.mlp(torch.float64)), cases.loader(dtype=torch.float64))
    fit(plain)
    cases.assert_identical(callback.variance, plain.variance)


def test_replay_writes_to_no_logger(tmp_path):
    """What `training_step` writes to `self.logger` itself is written once."""

    class Counting(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "by hand" in metrics:
                written.append(step)

    class Direct(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.logger.log_metrics({"by hand": 1.0}, step=batch_idx)
            self.logger.experiment.log_metrics({"really": 1.0})
            return super().training_step(batch, batch_idx)

    written: list[int | None] = []
    callback = GradCovFreezeCallback(t0=4, k=0.5)
    trainer = cases.trainer(callbacks=[callback], max_epochs=1, logger=Counting(tmp_path), log_every_n_steps=1)
    trainer.fit(Direct(cases.mlp()), cases.loader())
    assert callback.phase == "frozen"
    assert written == list(range(8))


def test_non_finite_gradients_are_skipped_and_counted():
    """A step with an infinite loss does not enter C; training goes on, and the order has no NaN."""

    class Poisoned(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 2 and len(batch[0]) == 1 else loss

    callback = GradCovFreezeCallback(t0=6, k=0.5, gradients="replay")
    cases.trainer(callbacks=[callback], max_epochs=1).fit(
        Poisoned(cases.mlp(torch.float64)), cases.loader(dtype=torch.float64)
    )
    assert (insides.observed_steps_of(callback), insides.skipped_steps_of(callback)) == (5, 1)
    assert all(v.isfinite().all() for v in callback.variance.values())
    healthy = GradCovFreezeCallback(t0=6, k=0.5)
    fit(healthy, max_epochs=1)
    assert insides.observed_steps_of(healthy) == 6
    assert not np.allclose(flat(healthy.variance), flat(callback.variance))


def test_run_without_any_observed_step_raises_at_t0():
    """The error counts the steps left out; an order of zeros would freeze anything."""

    class Broken(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(RuntimeError, match=r"No step could be observed among the first `t0=3`: 3 were left out"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=0.5)]).fit(Broken(cases.mlp()), cases.loader())


def test_frozen_elements_without_any_gradient_are_warned_of():
    """With three constant inputs of five, 24 of the 28 frozen weights never had one."""

    class Blind(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return super().training_step((x * torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]), y), batch_idx)

    callback = GradCovFreezeCallback(t0=4, k=28)
    with pytest.warns(UserWarning, match=r"2[4-8] of the 28 frozen elements never had a gradient in the 4 observed"):
        cases.trainer(callbacks=[callback], max_epochs=1).fit(Blind(cases.mlp()), cases.loader())
    assert callback.frozen["network.0.weight"][:, 2:].all()


def test_replay_uses_running_statistics_of_batch_norm():
    """g_1 of a BatchNorm network is that of the network with BatchNorm in eval mode and dropout off at p = 0."""
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)).double()
    reference = copy.deepcopy(network)
    callback = GradCovFreezeCallback(t0=1, k=0.5, gradients="replay")
    cases.trainer(callbacks=[callback], max_steps=1).fit(cases.Regression(network), cases.loader(dtype=torch.float64))
    x, y = next(iter(cases.loader(dtype=torch.float64)))
    parameters = list(reference.parameters())
    g_batch = torch.autograd.grad(mse(reference.train(), (x, y)), parameters)  # also moves the running statistics
    g_one = torch.autograd.grad(mse(reference.eval(), (x[:1], y[:1])), parameters)
    expected = [(a - b) ** 2 for a, b in zip(g_one, g_batch, strict=True)]
    assert_close(list(callback.variance.values()), expected, rtol=1e-10, atol=1e-12)


class SometimesNone(cases.Regression):
    """Returns no loss on one batch of the epoch."""

    without_loss = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == self.without_loss else loss


def test_step_without_a_loss_is_skipped():
    """One whose last micro-batch has no loss is counted as skipped; the next step has a first sample of its own."""
    seen: list[tuple[int, int]] = []
    callback = GradCovFreezeCallback(t0=4, k=0.5)

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            source = insides.sample_gradients_of(callback)
            gradients = source.gradients

            def spy(*args: Any) -> Any:
                assert source._window is not None
                seen.append((source._window.batch_idx, source.batch_size or 0))
                return gradients(*args)

            source.gradients = spy

    with pytest.warns(UserWarning, match="returned `None`"):
        cases.trainer(callbacks=[callback, Watch()], accumulate_grad_batches=2, max_epochs=1).fit(
            SometimesNone(cases.mlp()), cases.loader()
        )
    assert seen == [(2, 16), (4, 16), (6, 16)]
    assert (insides.observed_steps_of(callback), insides.skipped_steps_of(callback)) == (3, 1)


def test_first_observed_batch_of_one_sample_is_skipped():
    """Where it is an epoch's last batch, it is counted as skipped."""
    callback = GradCovFreezeCallback(t0=12, k=0.5, every=4)  # epochs of 4 steps and of 25 samples: 8 + 8 + 8 + 1
    with pytest.raises(RuntimeError, match="No step could be observed among the first `t0=12`: 3 were left out"):
        cases.trainer(callbacks=[callback], max_epochs=3).fit(cases.Regression(cases.mlp()), cases.loader(8, 25))
    callback = GradCovFreezeCallback(t0=6, k=0.5, every=2)  # observed: the 2nd, 4th (one sample) and 6th
    cases.trainer(callbacks=[callback], max_epochs=2).fit(cases.Regression(cases.mlp()), cases.loader(8, 25))
    assert (insides.observed_steps_of(callback), insides.skipped_steps_of(callback)) == (2, 1)


# Orders that do not read the variance -------------------------------------------------------------------------------


class CountsCalls(cases.Regression):
    """How often `training_step` ran, and on how many samples; BatchNorm without statistics takes no single sample."""

    def __init__(self) -> None:
        network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 1))
        super().__init__(network.double())
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(len(batch[0]))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("order", ["progress", "momentum", "second_moment", "magnitude", "displacement", "random"])
def test_order_without_the_variance_computes_no_per_sample_gradients(order):
    """Nothing runs but the batches, no layer is watched, and `variance` is empty; the masks are the same."""
    callback = GradCovFreezeCallback(t0=5, k=0.5, order=order, seed=1)
    module = CountsCalls()
    hooks: list[int] = []

    class Hooks(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            hooks.append(sum(len(layer._forward_hooks) for layer in pl_module.modules()))

    cases.trainer(callbacks=[callback, Hooks()], max_epochs=1).fit(module, cases.loader(dtype=torch.float64))
    assert module.seen == [8] * 8
    assert max(hooks) == 0
    assert (callback.variance, callback.covariance, callback.phase) == ({}, None, "frozen")
    assert callback.ranks["network.0.weight"].shape == (8, 5)

    module = cases.Regression(cases.mlp(torch.float64))
    cases.trainer(callbacks=[auto := GradCovFreezeCallback(t0=5, k=0.5, order=order, seed=1)]).fit(
        module, cases.loader(dtype=torch.float64)
    )
    first = GradCovFreezeCallback(t0=5, k=0.5, order=order, seed=1, samples="first")
    module = cases.Regression(cases.mlp(torch.float64))
    cases.trainer(callbacks=[first]).fit(module, cases.loader(dtype=torch.float64))
    assert len(first.variance) == 4
    cases.assert_identical(auto.frozen, first.frozen)
    cases.assert_identical(auto.ranks, first.ranks)


@pytest.mark.parametrize("order", ["variance", "reverse", "snr", lambda e: e.variance])
def test_order_that_reads_the_variance_gets_it_by_default(order):
    """C of the first samples, as in the paper; a callable order is taken to read it."""
    auto, first = (GradCovFreezeCallback(t0=3, k=0.5, order=order, **kw) for kw in ({}, {"samples": "first"}))
    for callback in (auto, first):
        fit(callback, samples=32, max_epochs=1)
    assert first.variance["network.0.weight"].min() > 0
    cases.assert_identical(auto.variance, first.variance)


def test_callable_order_may_declare_that_it_reads_no_variance():
    @orderings.needs("second_moment", variance=False)
    def largest_first(evidence: Evidence) -> dict[str, Tensor]:
        assert evidence.variance == {}
        return {name: -m for name, m in evidence.second_moment.items()}

    callback = GradCovFreezeCallback(t0=3, k=0.5, order=largest_first)
    fit(callback, samples=32, max_epochs=1)
    assert (callback.variance, callback.phase) == ({}, "frozen")
    assert insides.computes_noise(GradCovFreezeCallback(t0=3, k=0.5, order=largest_first, covariance="full"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_progress_of_batches_of_one_sample_is_that_of_the_loop_by_hand(accumulate):
    """m² / sqrt(E g²) over single samples, to rounding; `variance` raises an error that says why."""
    callback = GradCovFreezeCallback(t0=8, k=0.5, order="second_moment")
    module = cases.Regression(cases.mlp(torch.float64))
    trainer = cases.trainer(callbacks=[callback], max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, cases.loader(1, 24, torch.float64))
    network = cases.mlp(torch.float64)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    squares = [torch.zeros_like(p) for p in network.parameters()]
    batches = [*cases.loader(1, 24, torch.float64)]
    for step in range(8):
        optimizer.zero_grad()
        for x, y in batches[step * accumulate : (step + 1) * accumulate]:
            (nn.functional.mse_loss(network(x), y) / accumulate).backward()
        for total, p in zip(squares, network.parameters(), strict=True):
            total += p.grad.square()
        optimizer.step()
    order = np.argsort(np.concatenate([s.numpy().ravel() for s in squares]), kind="stable")
    expected = np.zeros(57, dtype=bool)
    expected[order[:28]] = True
    assert flat(callback.frozen).tolist() == expected.tolist()
    with pytest.raises(MisconfigurationException, match=r"The batch holds one sample.*order='progress'"):
        fit(GradCovFreezeCallback(t0=3, k=0.5), batch_size=1)


def test_optimizer_that_steps_within_the_backward_pass_is_refused():
    """It leaves no gradients to observe: an error, not an order of zeros."""

    class StepsInBackward(cases.Regression):
        def configure_optimizers(self) -> Any:
            for p in self.parameters():
                p.register_post_accumulate_grad_hook(self.step)
            return torch.optim.SGD(self.parameters(), lr=0.01)

        def step(self, p: Tensor) -> None:
            p.data.sub_(p.grad, alpha=0.01)
            p.grad = None

    trainer = cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=0.5, order="progress")])
    with pytest.raises(MisconfigurationException, match="No eligible parameter has a gradient after the backward pass"):
        trainer.fit(StepsInBackward(cases.mlp()), cases.loader())

"""After step t0 frozen elements are constant to the bit, whatever the Trainer does around the optimizer."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_gcfreeze import Evidence, GradCovFreezeCallback
from tests import cases, insides
from tests.cases import OPTIMIZERS
from tests.witnesses import Witness


def train(callback: GradCovFreezeCallback, module: pl.LightningModule, **kwargs: Any) -> pl.Trainer:
    witness = Witness(callback)
    trainer = cases.trainer(callbacks=[witness, callback], **kwargs)
    trainer.fit(module, cases.loader())
    witness.check()
    return trainer


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_frozen_elements_are_constant_to_the_bit(optimizer):
    """Under every optimizer, with warm state; live elements move."""
    train(GradCovFreezeCallback(t0=6, k=0.5), cases.Regression(cases.mlp(), optimizer))


def test_frozen_elements_are_constant_under_muon():
    """It steps matrices only, and mixes their elements."""
    module = cases.Regression(cases.mlp())
    module.configure_optimizers = lambda: torch.optim.Muon(  # type: ignore[method-assign]
        [p for p in module.parameters() if p.dim() == 2], 0.02
    )
    train(GradCovFreezeCallback(t0=6, k=0.5), module)


def test_frozen_elements_with_sparse_gradients_are_constant():
    """SparseAdam on an embedding with sparse gradients."""

    class Words(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.embedding = nn.Embedding(7, 3, sparse=True)

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return ((self.embedding((x * 10).long().remainder(7)).sum((1, 2)) - y[:, 0]) ** 2).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SparseAdam(self.parameters(), 0.05)

    train(GradCovFreezeCallback(t0=6, k=0.5), Words())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "max_epochs": 5},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
    ],
    ids=str,
)
def test_frozen_elements_are_constant_with_options_of_the_trainer(options):
    """Clipping, accumulation and every precision of the CPU."""
    module = cases.Regression(cases.mlp(), lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5))
    train(GradCovFreezeCallback(t0=6, k=0.5), module, **options)


def scaled_run(init_scale: float) -> tuple[GradCovFreezeCallback, torch.amp.GradScaler]:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=1000)
    callback = GradCovFreezeCallback(t0=4, k=0.5)
    module = cases.Regression(cases.mlp(), lambda p: torch.optim.SGD(p, 0.02, momentum=0.9))
    train(callback, module, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_epochs=8)
    return callback, scaler


def test_steps_skipped_by_a_loss_scaler_are_neither_counted_nor_observed():
    """Under 16-mixed, where scaled gradients overflow."""
    callback, scaler = scaled_run(2.0**40)
    skipped = 40 - int(torch.tensor(scaler.get_scale()).log2())
    assert skipped > 0
    assert callback.state_dict()["steps"] == 64 - skipped
    assert (insides.observed_steps_of(callback), insides.skipped_steps_of(callback)) == (4, skipped)


def test_variance_with_a_loss_scaler_is_that_without():
    """g_S is unscaled before it is compared with g_1: C is that of the run in float32, to half precision."""
    callback, _ = scaled_run(2.0**10)
    plain = GradCovFreezeCallback(t0=4, k=0.5)
    train(plain, cases.Regression(cases.mlp(), lambda p: torch.optim.SGD(p, 0.02, momentum=0.9)))
    for name, v in plain.variance.items():
        assert_close(callback.variance[name], v, rtol=0.05, atol=0.01 * float(v.max()))


def test_frozen_elements_are_constant_with_parameter_groups_and_a_scheduler():
    """Groups with their own decay and rate, and a scheduler that changes them after each step."""

    class Scheduled(cases.Regression):
        def configure_optimizers(self) -> Any:
            first, _, last = self.network
            optimizer = torch.optim.AdamW(
                [{"params": first.parameters(), "weight_decay": 0.3}, {"params": last.parameters(), "lr": 0.02}], 0.01
            )
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.05], total_steps=16)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    train(GradCovFreezeCallback(t0=6, k=0.5), Scheduled(cases.mlp()))


def test_clipping_counts_live_elements_only():
    """The norm that clipping sees is that of the live elements; before the freeze it is that of all."""
    norms: list[tuple[float, float, float]] = []

    class Clipping(cases.Regression):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            flat = torch.cat([p.grad.flatten() for p in self.parameters()])
            frozen = callback.frozen
            live = (
                torch.cat([~frozen[n].flatten() for n, _ in self.named_parameters()])
                if frozen
                else torch.ones_like(flat) > 0
            )
            total = nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            norms.append((float(total), float(flat.norm()), float(flat[live].norm())))

    callback = GradCovFreezeCallback(t0=6, k=0.5, order="reverse", hold="restore", skip_frozen_gradients=False)
    module = Clipping(cases.mlp())
    unmasked: list[float] = []

    class Before(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
            unmasked.append(float(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).norm()))

    cases.trainer(callbacks=[Before(), callback]).fit(module, cases.loader())
    for step, ((total, masked, live), full) in enumerate(zip(norms, unmasked, strict=True), start=1):
        assert total == pytest.approx(live, rel=1e-6)
        assert total == pytest.approx(masked, rel=1e-6)
        assert (total < 0.9 * full) == (step > 6)  # the noisiest half holds most of the norm


def test_live_elements_train_as_if_the_frozen_ones_were_constants():
    """With SGD, live elements follow a loop by hand from the weights at t0 in which the frozen ones never move."""
    callback = GradCovFreezeCallback(t0=4, k=0.5)
    module = cases.Regression(cases.mlp(torch.float64), lambda p: torch.optim.SGD(p, 0.02))
    start: dict[str, Tensor] = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, *args: Any) -> None:
            if callback.phase == "frozen" and not start:
                start.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    cases.trainer(callbacks=[Keep(), callback], max_epochs=1).fit(module, cases.loader(dtype=torch.float64))
    network = cases.mlp(torch.float64)
    network.load_state_dict({n.removeprefix("network."): p for n, p in start.items()})
    for x, y in [*cases.loader(dtype=torch.float64)][4:]:
        grads = torch.autograd.grad(nn.functional.mse_loss(network(x), y), list(network.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(network.named_parameters(), grads, strict=True):
                p -= 0.02 * torch.where(callback.frozen[f"network.{name}"], 0.0, g)
    assert_close(module.network.state_dict(), network.state_dict(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("k", "count"), [(0, 0), (1, 1), (57, 57), (0.0, 0), (1.0, 57), (0.1, 6)])
def test_k_counts_or_is_a_fraction(k, count):
    """An int is a count and a float a fraction, also 1 and 1.0."""
    callback = GradCovFreezeCallback(t0=3, k=k)
    cases.trainer(callbacks=[callback]).fit(cases.Regression(cases.mlp()), cases.loader())
    assert sum(int(f.sum()) for f in callback.frozen.values()) == count
    assert callback.frozen_fraction == count / 57


def test_include_and_exclude_decide_what_is_eligible():
    """Patterns match parameter names; k is of what is left."""
    callback = GradCovFreezeCallback(t0=3, k=1.0, include="network.*", exclude=["*.bias"])
    module = cases.Regression(cases.mlp())
    trainer = cases.trainer(callbacks=[callback])
    trainer.fit(module, cases.loader())
    assert list(callback.frozen) == ["network.0.weight", "network.2.weight"]
    assert callback.frozen_fraction == 1.0


def test_parameter_without_requires_grad_is_not_eligible():
    """It is neither counted nor touched."""
    module = cases.Regression(cases.mlp(), lambda p: torch.optim.SGD([q for q in p if q.requires_grad], 0.02))
    module.network[0].weight.requires_grad_(False)
    callback = GradCovFreezeCallback(t0=3, k=0.5)
    cases.trainer(callbacks=[callback]).fit(module, cases.loader())
    assert "network.0.weight" not in callback.frozen
    assert sum(f.numel() for f in callback.frozen.values()) == 17


def test_reverse_freezes_the_noisiest_and_random_follows_its_seed():
    """Controls: reverse is the complement of variance at one half, random differs by seed and repeats by seed."""

    def frozen(**kwargs: Any) -> Tensor:
        callback = GradCovFreezeCallback(t0=4, k=28, **kwargs)
        cases.trainer(callbacks=[callback]).fit(cases.Regression(cases.mlp()), cases.loader())
        return torch.cat([f.flatten() for f in callback.frozen.values()])

    assert int((frozen() & frozen(order="reverse")).sum()) == 0
    assert torch.equal(frozen(order="random", seed=1), frozen(order="random", seed=1))
    assert not torch.equal(frozen(order="random", seed=1), frozen(order="random", seed=2))


def test_callable_order_decides_what_freezes():
    """It gets the evidence."""

    def biases_first(evidence: Evidence) -> dict[str, Tensor]:
        return {name: torch.full_like(w, float(name.endswith("weight"))) for name, w in evidence.weights.items()}

    callback = GradCovFreezeCallback(t0=4, k=9, order=biases_first)
    cases.trainer(callbacks=[callback]).fit(cases.Regression(cases.mlp()), cases.loader())
    assert [name for name, f in callback.frozen.items() if f.all()] == ["network.0.bias", "network.2.bias"]
    assert sum(int(f.sum()) for f in callback.frozen.values()) == 9


@pytest.mark.parametrize("hold", ["compact", "restore"])
def test_optimizer_state_of_frozen_elements_is_cleared_once(hold):
    """Per-element state of frozen elements is zero after the freeze; the step count is not."""
    callback = GradCovFreezeCallback(t0=6, k=0.5, hold=hold, skip_frozen_gradients=False)
    module = cases.Regression(cases.mlp(), lambda p: torch.optim.Adam(p, 0.01))
    trainer = train(callback, module)
    for name, p in module.named_parameters():
        state = trainer.optimizers[0].state[p]
        assert (state["exp_avg"][callback.frozen[name]] == 0).all()
        gone = hold == "compact" and callback.frozen[name].all()  # it has left the optimizer
        assert float(state["step"]) == (6 if gone else 16)
    assert any((trainer.optimizers[0].state[p]["exp_avg"] != 0).any() for p in module.parameters())

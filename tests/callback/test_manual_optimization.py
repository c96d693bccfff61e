"""Manual optimization: one callback for each optimizer, and what cannot be served without automatic optimization."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gcfreeze import GradCovFreezeCallback, Settled
from tests import cases
from tests.callback.players import TwoPlayers
from tests.witnesses import Spy

STEPS = 9


class HoldByHand:
    """The reference: a mask on gradients and values around each step of one optimizer, in hooks of torch alone."""

    def __init__(self, t0: int, frozen: dict[str, Tensor]) -> None:
        self.t0, self.frozen, self.steps = t0, frozen, 0
        self.values: dict[str, Tensor] = {}

    def attach(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = dict(module.named_parameters())

        def before(*_: Any) -> None:
            for name in self.values:
                gradient = parameters[name].grad
                if gradient is not None:
                    gradient.mul_(~self.frozen[name])

        @torch.no_grad()
        def after(*_: Any) -> None:
            for name, value in self.values.items():
                parameters[name].copy_(torch.where(self.frozen[name], value, parameters[name]))
            self.steps += 1
            if self.steps == self.t0:
                self.values = {name: parameters[name].detach().clone() for name in self.frozen}

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def fit(*callbacks: pl.Callback, ckpt: Any = None, epochs: int = 1, **kwargs: Any) -> TwoPlayers:
    module = TwoPlayers()
    trainer = cases.trainer(callbacks=[*callbacks], max_epochs=epochs, **kwargs)
    trainer.fit(module, cases.loader(samples=8 * STEPS), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


def pair(**options: Any) -> list[GradCovFreezeCallback]:
    return [
        GradCovFreezeCallback(t0=4, k=0.5, order="progress", optimizer=0, **options),
        GradCovFreezeCallback(t0=6, k=0.7, order="second_moment", optimizer=1, **options),
    ]


@pytest.mark.parametrize("hold", ["auto", "restore"])
def test_each_optimizers_callback_freezes_its_own_parameters_at_its_own_step(hold):
    """The critic steps twice a batch. Live elements end where a plain mask in torch's hooks ends, but for rounding."""
    callbacks = pair(hold=hold)
    module = fit(*callbacks)
    assert {name.split(".")[0] for name in callbacks[0].frozen} == {"generator"}
    assert {name.split(".")[0] for name in callbacks[1].frozen} == {"critic"}
    assert callbacks[0].frozen_fraction == pytest.approx(0.5, abs=0.02)
    assert callbacks[1].frozen_fraction == pytest.approx(0.7, abs=0.02)

    class ByHand(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for callback, t0, optimizer in zip(callbacks, (4, 6), trainer.optimizers, strict=True):
                HoldByHand(t0, callback.frozen).attach(pl_module, optimizer)

    expected, unfrozen = fit(ByHand()), fit()
    for (name, p), q, free in zip(module.named_parameters(), expected.parameters(), unfrozen.parameters(), strict=True):
        frozen = (callbacks[0].frozen | callbacks[1].frozen)[name]
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert torch.equal(p[frozen], q[frozen]) or name.startswith("critic")  # clipping rounds in another order
        assert not torch.equal(p, free)


def test_second_moment_observed_at_each_step_is_that_of_a_loop():
    """At the optimizer's own step ``p.grad`` is g_S: what another optimizer's backward pass leaves is not in it."""
    callback = GradCovFreezeCallback(t0=2 * STEPS, k=0.5, order=(spied := Spy()), optimizer=1)
    seen: list[dict[str, Tensor]] = []

    class Record(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if optimizer.param_groups[0]["weight_decay"] == 0.1:
                seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if n.startswith("critic")})

    fit(Record(), callback, max_steps=3 * STEPS)
    assert len(seen) == 2 * STEPS
    for name, found in spied.second_moment.items():
        torch.testing.assert_close(found, torch.stack([g[name].square() for g in seen]).mean(0))


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_run_resumed_in_another_epoch_has_the_bits_of_the_unbroken_run(tmp_path, stop):
    """Each callback's state lies under its own key."""
    unbroken, resumed = pair(), pair()

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.current_epoch + 1 == stop:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    epochs = 6
    module = TwoPlayers()
    loader = cases.loader(samples=16)
    cases.trainer(callbacks=[*unbroken, Save()], max_epochs=epochs).fit(module, loader)
    again = TwoPlayers()
    cases.trainer(callbacks=resumed, max_epochs=epochs).fit(
        again, loader, ckpt_path=tmp_path / "run.ckpt", weights_only=True
    )
    cases.assert_identical(again.state_dict(), module.state_dict())
    for one, other in zip(unbroken, resumed, strict=True):
        cases.assert_identical(one.frozen, other.frozen)
        assert one.phase == "frozen"


def test_second_callbacks_tags_name_its_optimizer(tmp_path):
    """Two callbacks would write to the same tags."""
    callbacks = pair()
    logger = pl.loggers.CSVLogger(tmp_path)
    module = TwoPlayers()
    trainer = cases.trainer(callbacks=callbacks, max_epochs=1, logger=logger, log_every_n_steps=1)
    trainer.fit(module, cases.loader(samples=8 * STEPS))
    metrics = trainer.callback_metrics
    assert float(metrics["gcfreeze/frozen_fraction"]) == pytest.approx(0.5, abs=0.02)
    assert float(metrics["gcfreeze/optimizer_1/frozen_fraction"]) == pytest.approx(0.7, abs=0.02)
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "gcfreeze/frozen_fraction" in header
    assert "gcfreeze/optimizer_1/frozen_fraction" in header


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t0": 3, "k": 0.5}, r"Freezer"),
        ({"t0": 3, "k": 0.5, "order": "progress", "samples": "first"}, r"Freezer"),
        ({"t0": "auto", "k": 0.5, "order": "progress"}, r"t0"),
        ({"t0": Settled(max_t0=4), "k": 0.5, "order": "progress"}, r"t0"),
        ({"t0": 3, "k": "auto", "order": "progress"}, r"k"),
        ({"t0": 3, "k": 0.5, "order": "progress", "optimizer": 2}, r"`optimizer=2` is the index of no optimizer"),
        ({"t0": 3, "k": 0.5, "order": "progress", "optimizer": None}, "The module has 2 optimizers. Pass the index"),
    ],
    ids=["variance", "samples", "t0 auto", "t0 settled", "k auto", "no such optimizer", "no optimizer chosen"],
)
def test_what_needs_one_loss_or_single_samples_is_refused_before_the_first_step(options, message):
    """The message names the way out."""
    with pytest.raises(MisconfigurationException, match=message):
        fit(GradCovFreezeCallback(**({"optimizer": 0} | options)))


def test_two_callbacks_on_one_optimizer_are_refused_when_the_trainer_is_made():
    """One optimizer serves one freeze."""
    with pytest.raises(MisconfigurationException, match="optimizer"):
        fit(*(GradCovFreezeCallback(t0=3, k=0.5, order="progress") for _ in range(2)))

"""`lr_after_freeze` in a Trainer: weights as with rates multiplied by hand, and schedules that know nothing of it."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_gcfreeze import FreezeSchedule, GradCovFreezeCallback, Growth
from tests import cases
from tests.interruptions import Interrupted, SaveAndStop
from tests.oracles.learning_rate import multiply_by_hand

T0, STEPS, FACTOR = 5, 18, 0.3  # three epochs of six
Make = Callable[[Any], Any]


def groups(network: nn.Module, first: Any = 0.02, others: Any = 0.005) -> list[dict[str, Any]]:
    parameters = list(network.parameters())
    return [{"params": parameters[:1], "lr": first}, {"params": parameters[1:], "lr": others}]


def tensor_rate() -> Tensor:
    return torch.tensor(0.015)  # which times 0.3 and by 0.3 is another number


OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda n: torch.optim.SGD(n.parameters(), 0.02, momentum=0.9, weight_decay=0.1),
    "AdamW, two groups": lambda n: torch.optim.AdamW(groups(n), weight_decay=0.3),
    "Adam, tensor": lambda n: torch.optim.Adam(n.parameters(), tensor_rate(), foreach=False),
    "AdamW, tensor, two groups": lambda n: torch.optim.AdamW(groups(n, tensor_rate(), tensor_rate()), foreach=False),
    "SGD, one tensor for two groups": lambda n: torch.optim.SGD(
        [{"params": g["params"]} for g in groups(n)], tensor_rate(), momentum=0.9, foreach=False
    ),
    "AdamW fused, tensor": lambda n: torch.optim.AdamW(n.parameters(), tensor_rate(), fused=True),
    "Adadelta, an int": lambda n: torch.optim.Adadelta(n.parameters(), 1),
    "Adafactor": lambda n: torch.optim.Adafactor(n.parameters(), 0.01),
    "ASGD": lambda n: torch.optim.ASGD(n.parameters(), 0.01, t0=0),
}
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.03, total_steps=STEPS + 1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.03, step_size_up=3, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=0.5),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


class Scheduled(cases.Regression):
    """A regression with a scheduler that steps with each optimizer step."""

    def __init__(self, optimizer: str = "SGD", scheduler: str | None = None) -> None:
        super().__init__(cases.mlp())
        self.optimizer_, self.scheduler_ = optimizer, scheduler

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer_](self.network)
        if self.scheduler_ is None:
            return optimizer
        scheduler = {"scheduler": SCHEDULERS[self.scheduler_](optimizer), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class Rates(pl.Callback):
    """Notes, before and after each step, the rates in the groups and those of the scheduler, and masks after it."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback, self.seen, self.momenta = callback, [], []
        self.masks: list[dict[str, Tensor]] = []

    def note(self, trainer: pl.Trainer, *args: Any) -> None:
        (optimizer,) = trainer.optimizers
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        saved = [float(group["lr"]) for group in optimizer.state_dict()["param_groups"]]
        last = [float(rate) for config in trainer.lr_scheduler_configs for rate in config.scheduler.get_last_lr()]
        self.seen.append((rates, saved, last))

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.note(trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self.note(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.note(trainer)
        self.masks.append(self.callback.frozen)


class ByHand(pl.Callback):
    def __init__(self, factor_of: Callable[[int], float]) -> None:
        self.factor_of = factor_of

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            multiply_by_hand(optimizer, self.factor_of)


def after_t0(t: int) -> float:
    return FACTOR if t > T0 else 1.0


def fit(
    module: pl.LightningModule, *more: pl.Callback, arguments: Any = None, ckpt: Path | None = None, **kwargs: Any
) -> tuple[dict[str, Tensor], Rates]:
    callback = GradCovFreezeCallback(**({"t0": T0, "k": 0.5} | (arguments or {})))
    rates = Rates(callback)
    trainer = cases.trainer(callbacks=[callback, *more, rates], **({"max_epochs": 3} | kwargs))
    trainer.fit(module, cases.ResumableLoader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return dict(module.state_dict()), rates


def check(
    make: Callable[[], pl.LightningModule], arguments: Any = None, factor_of: Any = after_t0, **kwargs: Any
) -> Any:
    """Compare a run with a factor with rates multiplied by hand, bit by bit, and with a run without one."""
    arguments = arguments or {}
    found, rates = fit(make(), arguments=arguments | {"lr_after_freeze": FACTOR}, **kwargs)
    expected, by_hand = fit(make(), ByHand(factor_of), arguments=arguments, **kwargs)
    cases.assert_identical(found, expected)
    cases.assert_identical(rates.masks, by_hand.masks)
    assert rates.seen == by_hand.seen
    plain, without = fit(make(), arguments=arguments, **kwargs)
    assert any(not torch.equal(found[name], plain[name]) for name in found)
    return rates, without


@pytest.mark.parametrize("hold", ["auto", "restore"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_those_of_rates_multiplied_by_hand_around_each_step(optimizer, hold):
    rates, without = check(lambda: Scheduled(optimizer), {"hold": hold})
    assert rates.seen == without.seen
    assert rates.callback.frozen_fraction == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW, two groups", "AdamW, tensor, two groups"])
def test_schedulers_rates_are_those_of_the_run_without_the_factor_at_every_step(optimizer, scheduler):
    """In the groups, in the optimizer's saved state, and in what the scheduler says; the rates do change."""
    rates, without = check(lambda: Scheduled(optimizer, scheduler))
    if scheduler != "ReduceLROnPlateau":  # whose rates depend on the losses
        assert rates.seen == without.seen
    assert len({tuple(first) for first, *_ in rates.seen}) > 2


class Looking(Scheduled):
    """May read gradients in a hook: live elements are handed over late, within the optimizer's step."""

    def on_after_backward(self) -> None: ...


@pytest.mark.parametrize("kind", [Scheduled, Looking])
@pytest.mark.parametrize("hold", ["compact", "restore"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.05}], ids=str)
def test_factor_goes_with_every_way_of_holding(kind, hold, options):
    factor_of = after_t0 if "accumulate_grad_batches" not in options else (lambda t: FACTOR if t > 3 else 1.0)
    arguments = {"hold": hold, "t0": 3 if "accumulate_grad_batches" in options else T0}
    check(lambda: kind("AdamW, two groups", "StepLR"), arguments, factor_of, **options)


def test_step_t0_itself_has_the_whole_rate_and_the_next_one_the_factor():
    """SGD without momentum: a step is the rate times the gradient."""

    class Steps(pl.Callback):
        def __init__(self) -> None:
            self.ratios: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.before = [(p.detach().clone(), p.grad.clone()) for p in pl_module.parameters() if p.grad is not None]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            moved, gradients = 0.0, 0.0
            for p, (was, gradient) in zip(pl_module.parameters(), self.before, strict=True):
                moved += float((was - p.detach()).abs().double().sum())
                gradients += float(gradient.abs().double().sum())
            self.ratios.append(moved / gradients)

    module, steps = cases.Regression(cases.mlp(), lambda p: torch.optim.SGD(p, 0.01)), Steps()
    fit(module, steps, arguments={"lr_after_freeze": FACTOR, "hold": "restore", "skip_frozen_gradients": False})
    assert steps.ratios[:T0] == pytest.approx([0.01] * T0, rel=1e-3)
    assert steps.ratios[T0:] == pytest.approx([0.01 * FACTOR] * (STEPS - T0), rel=1e-3)


# Code of users that sets rates --------------------------------------------------------------------------------------


class InTrainingStep(Scheduled):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.training and torch.is_grad_enabled():
            for group in self.optimizers().param_groups:
                group["lr"] = 0.02 / (1 + self.global_step)
        return super().training_step(batch, batch_idx)


class InTrainingStepRelatively(Scheduled):
    """A factor that compounds would be seen at once."""

    def on_train_batch_start(self, *args: Any) -> None:
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.9


class BeforeOptimizerStep(Scheduled):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + self.global_step)


class OverriddenOptimizerStep(Scheduled):
    """The warm-up of Lightning's documentation, and a decay after the step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, (self.trainer.global_step + 1) / 8) * 0.02
        optimizer.step(closure=optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] *= 0.99


class HooksOnTheOptimizer(Scheduled):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()

        def before(optimizer: Any, *args: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] *= 0.95

        def after(optimizer: Any, *args: Any) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (1 + self.trainer.global_step)

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer


class StepsItsSchedulerItself(Scheduled):
    """In `lr_scheduler_step`, and once more in the middle of the training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if torch.is_grad_enabled() and batch_idx == 3 and self.trainer.global_step > 0:
            self.lr_schedulers().step()
        return super().training_step(batch, batch_idx)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class AddsAGroup(Scheduled):
    """As BackboneFinetuning does, after the freeze."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.late = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.network(batch[0]) + self.late, batch[1])
        self.log("loss", loss)
        return loss

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            self.optimizers().add_param_group({"params": [self.late], "lr": 0.5})


@pytest.mark.filterwarnings("ignore:.*began to train late")
@pytest.mark.parametrize("order", ["variance", "progress"])
@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        (InTrainingStep, None), (InTrainingStepRelatively, "ExponentialLR"), (BeforeOptimizerStep, None),
        (OverriddenOptimizerStep, None), (HooksOnTheOptimizer, None), (StepsItsSchedulerItself, "StepLR"),
        (AddsAGroup, None),
    ],
)  # fmt: skip
def test_code_that_sets_rates_goes_on_working(kind, scheduler, order, monkeypatch):
    monkeypatch.setitem(SCHEDULERS, "ExponentialLR", lambda o: lr_scheduler.ExponentialLR(o, 0.95))
    rates, without = check(lambda: kind("SGD", scheduler), {"order": order})
    assert rates.seen == without.seen


class WithBackbone(Scheduled):
    def __init__(self) -> None:
        super().__init__("SGD")
        self.backbone = nn.Linear(5, 5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((self.backbone(batch[0]), batch[1]), batch_idx)


@pytest.mark.filterwarnings("ignore:.*began to train late", "ignore:.*other values than they froze with")
@pytest.mark.filterwarnings("ignore:.*[Aa]verage", "ignore:.*Swapping scheduler")
@pytest.mark.parametrize(
    "make",
    [
        lambda: BackboneFinetuning(2, lambda epoch: 1.5, verbose=False),
        lambda: StochasticWeightAveraging(0.003, swa_epoch_start=2, annealing_epochs=2),
    ],
    ids=["BackboneFinetuning", "StochasticWeightAveraging"],
)
def test_callbacks_of_lightning_that_set_rates_go_on_working(make):
    """The first adds a group after the freeze and computes its rate from the other's; the second anneals rates."""
    arguments = {"lr_after_freeze": FACTOR}
    found, rates = fit(WithBackbone(), make(), arguments=arguments, max_epochs=4)
    expected, by_hand = fit(WithBackbone(), make(), ByHand(after_t0), max_epochs=4)
    plain, without = fit(WithBackbone(), make(), max_epochs=4)
    cases.assert_identical(found, expected)
    assert rates.seen == by_hand.seen == without.seen
    assert len({tuple(first) for first, *_ in rates.seen}) > 1
    assert any(not torch.equal(found[name], plain[name]) for name in found)


# Stages -------------------------------------------------------------------------------------------------------------


def test_factor_does_not_compound_from_stage_to_stage():
    arguments = {"t0": None, "k": None, "schedule": FreezeSchedule([(T0, 0.3), (9, 0.5), (13, 0.8)])}
    check(lambda: Scheduled("AdamW, two groups", "StepLR"), arguments)


def test_rate_is_whole_again_once_everything_has_thawed():
    stages = [(T0, 0.5), (9, 0.0), (13, 0.3)]
    arguments = {"t0": None, "k": None, "schedule": FreezeSchedule(stages, monotone=False)}
    rates, _ = check(lambda: Scheduled("SGD", "StepLR"), arguments, lambda t: FACTOR if T0 < t <= 9 or t > 13 else 1.0)
    assert [bool(masks) and any(m.any() for m in masks.values()) for masks in rates.masks] == (
        [False] * 4 + [True] * 4 + [False] * 4 + [True] * 6
    )


def test_growth_that_thaws_its_first_stage_leaves_the_rate_whole():
    """The loss rises, so the only stage that there was thaws: nothing is frozen any more."""

    class Rising(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss - loss.detach() + float(self.global_step)

    arguments = {"k": Growth(every=4, stages=2, max_loss_increase=1e-4, forecast=False), "t0": 4}
    found, rates = fit(Rising("SGD"), arguments=arguments | {"lr_after_freeze": FACTOR})
    frozen = [bool(masks) and any(m.any() for m in masks.values()) for masks in rates.masks]
    assert frozen[4]
    assert not frozen[-1]
    expected, _ = fit(Rising("SGD"), ByHand(lambda t: FACTOR if t > 1 and frozen[t - 2] else 1.0), arguments=arguments)
    cases.assert_identical(found, expected)


def test_nothing_frozen_means_no_factor():
    """The same arguments with something to freeze do make a difference."""
    runs = {
        (k, factor): fit(Scheduled("SGD", "StepLR"), arguments={"k": k, "lr_after_freeze": factor})[0]
        for k, factor in itertools.product((0, 1), (None, FACTOR))
    }
    cases.assert_identical(runs[0, FACTOR], runs[0, None])
    assert any(not torch.equal(runs[1, FACTOR][name], runs[1, None][name]) for name in runs[1, None])


# Resuming, scalers, several optimizers -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["AdamW, two groups", "Adam, tensor"])
@pytest.mark.parametrize("scheduler", ["CosineAnnealingLR", "StepLR", "SequentialLR"])
@pytest.mark.parametrize("stop", [T0 - 1, T0, T0 + 1, 13])
def test_resumed_run_has_the_bits_of_the_unbroken_one(tmp_path, optimizer, scheduler, stop):
    arguments = {"lr_after_freeze": FACTOR}
    unbroken, rates = fit(Scheduled(optimizer, scheduler), arguments=arguments)
    with pytest.raises(Interrupted):
        fit(Scheduled(optimizer, scheduler), SaveAndStop(tmp_path / "run.ckpt", stop), arguments=arguments)
    resumed, others = fit(Scheduled(optimizer, scheduler), arguments=arguments, ckpt=tmp_path / "run.ckpt")
    cases.assert_identical(resumed, unbroken)
    assert others.seen == rates.seen[3 * stop :]


def test_resumed_run_may_have_another_factor(tmp_path):
    """It does not decide what freezes."""
    with pytest.raises(Interrupted):
        fit(Scheduled(), SaveAndStop(tmp_path / "run.ckpt", 9))
    found, _ = fit(Scheduled(), arguments={"lr_after_freeze": FACTOR}, ckpt=tmp_path / "run.ckpt")
    expected, _ = fit(Scheduled(), ByHand(lambda t: FACTOR if t > 9 else 1.0))
    cases.assert_identical(found, expected)


class Overflowing(Scheduled):
    """Some gradients overflow, so that a loss scaler leaves the step out."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.current_epoch * 6 + batch_idx in (2, T0, 9, 10) else loss


@pytest.mark.parametrize("optimizer", ["AdamW, two groups", "AdamW fused, tensor"])
@pytest.mark.parametrize("hold", ["auto", "restore"])
def test_steps_that_a_loss_scaler_leaves_out_leave_the_rate_as_it_was(optimizer, hold):
    """An ordinary optimizer is not called then; a fused one is, and its steps are counted by hand in `taken`."""

    def plugins() -> list[Any]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
        return [MixedPrecision("16-mixed", "cpu", scaler=scaler)]

    first = next(t for t in range(1, STEPS) if t - len([b for b in (2, T0, 9, 10) if b < t]) == T0)  # batches until t0
    calls = first if "fused" in optimizer else T0
    found, rates = fit(
        Overflowing(optimizer, "StepLR"), arguments={"lr_after_freeze": FACTOR, "hold": hold}, plugins=plugins()
    )
    expected, by_hand = fit(
        Overflowing(optimizer, "StepLR"),
        ByHand(lambda t: FACTOR if t > calls else 1.0),
        arguments={"hold": hold},
        plugins=plugins(),
    )
    cases.assert_identical(found, expected)
    assert rates.seen == by_hand.seen
    plain, _ = fit(Overflowing(optimizer, "StepLR"), arguments={"hold": hold}, plugins=plugins())
    assert any(not torch.equal(found[name], plain[name]) for name in found)


@pytest.mark.parametrize("factor", [None, FACTOR])
def test_steps_that_a_tuner_tries_have_the_factor_too(factor):
    """Under other callbacks, after the freeze; SGD moves by the rate times the gradient."""

    class Tries(pl.Callback):
        rate = 0.0

        def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
            if trainer.current_epoch == 2:
                callbacks, trainer.callbacks = trainer.callbacks, []
                weight, before = module.network[0].weight, module.network[0].weight.detach().clone()
                trainer.optimizers[0].zero_grad()
                nn.functional.mse_loss(module.network(cases.data().tensors[0]), cases.data().tensors[1]).backward()
                trainer.optimizers[0].step()
                live = weight != before
                self.rate = float(((before - weight).abs().sum() / weight.grad[live].abs().sum()).detach())
                trainer.callbacks = callbacks

    tries, module = Tries(), cases.Regression(cases.mlp(), lambda p: torch.optim.SGD(p, 0.01))
    fit(module, tries, arguments={"lr_after_freeze": factor})
    assert tries.rate == pytest.approx(0.01 * (factor or 1.0), rel=1e-3)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0.01


class TwoPlayers(pl.LightningModule):
    """Manual optimization with a scheduler for each optimizer; the second accumulates over two batches by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        one, other = self.optimizers()
        loss = nn.functional.mse_loss(self.second(self.first(batch[0])), batch[1])
        one.zero_grad()
        self.manual_backward(loss)
        one.step()
        if batch_idx % 2:
            other.step()
            other.zero_grad()
            for scheduler in self.lr_schedulers():
                scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.AdamW(self.first.parameters(), 0.02),
            torch.optim.SGD(self.second.parameters(), 0.02, momentum=0.9),
        ]
        return optimizers, [lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


def test_only_the_followed_optimizers_rates_are_multiplied():
    class Hand(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            multiply_by_hand(trainer.optimizers[0], after_t0)

    runs = []
    for factor, more in ((FACTOR, []), (None, [Hand()]), (None, [])):
        module = TwoPlayers()
        callback = GradCovFreezeCallback(T0, 0.5, order="progress", optimizer=0, lr_after_freeze=factor)
        cases.trainer(callbacks=[callback, *more], max_epochs=3).fit(module, cases.ResumableLoader())
        runs.append(dict(module.state_dict()))
    cases.assert_identical(runs[0], runs[1])
    assert not torch.equal(runs[0]["first.weight"], runs[2]["first.weight"])


# What is seen and what is refused ------------------------------------------------------------------------------------


def test_monitor_logs_the_schedules_rate_and_the_callback_the_factor(tmp_path):
    """At the freeze the factor is the next step's, as the masks are."""
    logger = CSVLogger(tmp_path)
    monitor = LearningRateMonitor("step")
    fit(
        Scheduled("SGD", "StepLR"), monitor,
        arguments={"lr_after_freeze": FACTOR}, logger=logger, log_every_n_steps=1,
    )  # fmt: skip
    rows = [line.split(",") for line in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()]

    def column(name: str) -> list[float]:
        return [float(row[rows[0].index(name)]) for row in rows[1:] if row[rows[0].index(name)]]

    assert column("lr-SGD") == pytest.approx([0.02 * 0.5 ** (t // 3) for t in range(STEPS)])
    assert column("gcfreeze/lr_factor") == [1.0] * (T0 - 1) + [FACTOR] * (STEPS - T0 + 1)


def test_factor_is_not_logged_where_none_was_given(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(Scheduled(), logger=logger, log_every_n_steps=1)
    assert "frozen_fraction" in (text := (Path(logger.log_dir) / "metrics.csv").read_text())
    assert "lr_factor" not in text


class RelativeStep(torch.optim.SGD):
    """Has no rate, as Adafactor with a relative step."""

    def __init__(self, network: nn.Module, **options: Any) -> None:
        super().__init__(groups(network), 0.1)
        self.param_groups[1] |= options


@pytest.mark.parametrize("rate", [None, "auto", True, torch.tensor(1), torch.ones(2)], ids=str)
def test_group_without_a_rate_is_refused_before_the_first_step(rate):
    """By name, with what it has; without a factor it is none of our business."""
    module = cases.Regression(cases.mlp())
    module.configure_optimizers = lambda: RelativeStep(module.network, lr=rate)
    before = {name: p.clone() for name, p in module.state_dict().items()}
    with pytest.raises(
        MisconfigurationException, match=r"RelativeStep has no number as `lr`, but .* in group 1: .* leave `lr_a"
    ):
        fit(module, arguments={"lr_after_freeze": FACTOR})
    cases.assert_identical(dict(module.state_dict()), before)


class SetsItsRate(torch.optim.SGD):
    """Steps with a rate of its own making, as optimizers with a line search or a distance estimate do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] * 0.9
        return loss


def test_optimizer_that_sets_its_rate_in_its_step_is_refused_at_the_first_step():
    """Long before the freeze, where the factor would have found its way into the rates."""
    module = cases.Regression(cases.mlp(), lambda p: SetsItsRate(p, 0.01))
    with pytest.raises(MisconfigurationException, match=r"but SetsItsRate sets them within its own step"):
        fit(module, arguments={"lr_after_freeze": FACTOR})
    fit(cases.Regression(cases.mlp(), lambda p: SetsItsRate(p, 0.01)))


class Noam(torch.optim.Adam):
    """Sets its rate before it calls its parent's step."""

    taken = 0

    def step(self, closure: Any = None) -> Any:
        self.taken += 1
        for group in self.param_groups:
            group["lr"] = 0.02 * min(self.taken**-0.5, self.taken * 6**-1.5)
        return super().step(closure)


class Temporarily(torch.optim.Adam):
    """Steps at half its rate, and puts the rate back."""

    def step(self, closure: Any = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= 0.5
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        return loss


class DecaysAfterwards(torch.optim.Adam):
    """Uses the rate once more after its parent's step."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                torch._foreach_mul_(group["params"], 1 - 0.5 * group["lr"])
        return loss


@pytest.mark.parametrize("kind", [Noam, Temporarily, DecaysAfterwards])
@pytest.mark.parametrize("nested", [False, True], ids=["hooks run once", "hooks run twice"])
def test_step_on_top_of_a_parents_step_has_the_factor_once(kind, nested, monkeypatch):
    """Once an Adam was made, torch runs the step hooks in the step of the parent, too."""
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    if not nested:
        monkeypatch.setattr(torch.optim.Adam, "step", torch.optim.Adam.step.__wrapped__)
    assert hasattr(torch.optim.Adam.step, "hooked") is nested
    monkeypatch.setitem(OPTIMIZERS, "kind", lambda n: kind(n.parameters(), 0.02))
    check(lambda: Scheduled("kind"))


class Fails(torch.optim.SGD):
    """Raises within its step number `at`, after it has moved something."""

    at = T0 + 2

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.at -= 1
        if self.at == 0:
            self.during = [float(group["lr"]) for group in self.param_groups]
            raise RuntimeError("out of memory")
        return loss


def test_checkpoint_of_a_step_that_raised_has_the_schedules_rate(tmp_path):
    """It was multiplied when the step raised."""
    module = cases.Regression(cases.mlp(), lambda p: Fails(p, 0.02))
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(
            module, ModelCheckpoint(tmp_path, "it", save_on_exception=True),
            arguments={"lr_after_freeze": FACTOR}, enable_checkpointing=True,
        )  # fmt: skip
    assert module.trainer.optimizers[0].during == [0.02 * FACTOR]
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.02


@pytest.mark.parametrize("rate", [0.02, tensor_rate()], ids=["float", "tensor"])
def test_step_that_raises_leaves_the_rate_as_it_was_when_the_fit_has_ended(rate):
    """It was multiplied when the step raised."""
    module = cases.Regression(cases.mlp(), lambda p: Fails(p, rate, foreach=False))
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, arguments={"lr_after_freeze": FACTOR})
    (optimizer,) = module.trainer.optimizers
    (group,) = optimizer.param_groups
    assert optimizer.during == [pytest.approx(float(rate) * FACTOR)]
    assert group["lr"] is rate
    assert rate == (tensor_rate() if isinstance(rate, Tensor) else 0.02)

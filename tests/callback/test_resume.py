"""A run that is interrupted and resumed equals the unbroken one, to the bit; and whatever else becomes of a state."""

import copy
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases, insides
from tests.format_5 import as_format_5
from tests.interruptions import ARGUMENTS, STEPS, T0, DropoutByStep, Interrupted, SaveAndStop, interrupted, module, run


@pytest.mark.parametrize("after", [2, T0 - 1, T0, T0 + 1, 12, 15])
def test_run_resumed_at_any_step_equals_the_unbroken_run(tmp_path, after):
    """Interrupted before, right before, at, right after and long after t0, in and at the end of an epoch."""
    unbroken = run(GradCovFreezeCallback(**ARGUMENTS), DropoutByStep())
    resumed = interrupted(tmp_path / "run.ckpt", after, ARGUMENTS)
    cases.assert_identical(resumed, unbroken)
    assert unbroken["callback"]["steps"] == STEPS


@pytest.mark.parametrize(
    "arguments",
    [
        {"order": "displacement"},
        {"order": "snr"},
        {"order": "second_moment", "gain": 0.3},
        {"order": "random"},
        {"order": "random", "seed": 4},
        {"covariance": "full", "every": 2},
        {"gradients": "auto"},
        {"gradients": "capture"},
        {"gradients": "replay"},
        {"samples": "all", "every": 2},
        {"samples": 3, "gain": 0.3},
        {"include": ["*weight"], "exclude": "network.2.*", "k": 10},
    ],
    ids=str,
)
def test_run_resumed_while_observing_equals_the_unbroken_run_for_every_order(tmp_path, arguments):
    """Start weights, moments, the matrix and the seed are in the checkpoint."""
    unbroken = run(GradCovFreezeCallback(**(ARGUMENTS | arguments)), DropoutByStep())
    resumed = interrupted(tmp_path / "run.ckpt", 4, ARGUMENTS | arguments)
    cases.assert_identical(resumed, unbroken)
    assert any(f.any() for f in unbroken["frozen"].values())


def test_run_resumed_under_accumulation_equals_the_unbroken_run(tmp_path):
    """Interrupted between optimizer steps of two micro-batches each."""
    unbroken = run(GradCovFreezeCallback(t0=4, k=0.5), DropoutByStep(), accumulate_grad_batches=2)
    for after in (4, 8, 10):
        resumed = interrupted(tmp_path / "run.ckpt", after, {"t0": 4, "k": 0.5}, accumulate_grad_batches=2)
        cases.assert_identical(resumed, unbroken)


def test_checkpoint_of_a_frozen_run_is_resumed_without_the_callback(tmp_path):
    """Weights and optimizer load in a plain Trainer, whose optimizer state is of full shape, and everything moves."""
    path = tmp_path / "run.ckpt"
    callback = GradCovFreezeCallback(**ARGUMENTS)
    with pytest.raises(Interrupted):
        run(callback, SaveAndStop(path, T0 + 3))
    saved = torch.load(path, weights_only=True)["state_dict"]
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        plain = run(None, ckpt=path)
    for i, (name, _) in enumerate(module().named_parameters()):
        assert plain["optimizer"][i]["exp_avg"].shape == saved[name].shape
    moved = [(plain["weights"][name] != saved[name])[mask] for name, mask in callback.frozen.items()]
    assert torch.cat(moved).float().mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0.6}, r"k=0.5 \(now 0.6\)"),
        ({"k": 1}, r"k=0.5 \(now 1\)"),
        ({"t0": 9}, r"t0=7 \(now 9\)"),
        ({"order": "magnitude"}, r"order='variance' \(now 'magnitude'\)"),
        ({"exclude": "*bias"}, r"exclude=None \(now \['\*bias'\]\)"),
        ({"covariance": "full"}, r"covariance='diagonal' \(now 'full'\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [T0 - 2, T0 + 2])
def test_resuming_with_other_arguments_is_refused(tmp_path, change, message, after):
    """The saved and the given value are named, in either phase."""
    path = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(**ARGUMENTS), SaveAndStop(path, after))
    with pytest.raises(MisconfigurationException, match=message):
        run(GradCovFreezeCallback(**(ARGUMENTS | change)), ckpt=path)


def test_log_every_n_steps_may_change_when_resuming(tmp_path):
    """The outcome is the same."""
    resumed = interrupted(tmp_path / "run.ckpt", 3, ARGUMENTS)
    path = tmp_path / "run.ckpt"
    other = run(GradCovFreezeCallback(**ARGUMENTS, log_every_n_steps=3), DropoutByStep(), ckpt=path)
    cases.assert_identical(other, resumed)


def test_second_fit_of_a_callback_equals_that_of_a_new_one():
    """The same object in a new run gives what a new object gives."""
    callback = GradCovFreezeCallback(**ARGUMENTS)
    first = run(callback, DropoutByStep())
    assert callback.phase == "frozen"
    again = run(callback, DropoutByStep())
    cases.assert_identical(again, first)


def test_validating_between_two_fits_changes_neither(tmp_path):
    """A checkpoint loaded for `validate` is not resumed by the next fit."""

    class Tested(cases.Regression):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    callback = GradCovFreezeCallback(t0=3, k=0.5)
    trainer = cases.trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(Tested(cases.mlp()), cases.loader(), cases.loader())
    frozen = callback.frozen
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer.validate(Tested(cases.mlp()), cases.loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    cases.assert_identical(callback.frozen, frozen)
    cases.trainer(callbacks=[callback], max_epochs=1).fit(Tested(cases.mlp()), cases.loader(), cases.loader())
    assert callback.state_dict()["steps"] == 8


def test_exception_removes_the_hooks_from_the_optimizer():
    """What was found stays."""
    callback = GradCovFreezeCallback(**ARGUMENTS)

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == T0 + 1:
                hooks.append(len(trainer.optimizers[0]._optimizer_step_post_hooks))
                optimizers.append(trainer.optimizers[0])
                raise Interrupted

    hooks: list[int] = []
    optimizers: list[torch.optim.Optimizer] = []
    with pytest.raises(Interrupted):
        run(callback, Stop())
    assert hooks == [1]
    assert len(optimizers[0]._optimizer_step_post_hooks) == 0
    assert callback.phase == "frozen"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_copies_and_pickles_share_nothing_and_can_train(clone):
    """Before a run, in the middle of one and after it."""
    copies = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step in (3, 10):
                copies.append(clone(callback))

    callback = GradCovFreezeCallback(**ARGUMENTS)
    fresh = clone(callback)
    expected = run(callback, DropoutByStep(), Copy())
    observing, frozen = copies
    assert observing.phase == "observing"
    cases.assert_identical(frozen.frozen, expected["frozen"])
    cases.assert_identical(clone(callback).ranks, expected["ranks"])
    for each in (fresh, observing, frozen):
        cases.assert_identical(run(each, DropoutByStep()), expected)


def test_checkpoint_of_another_module_is_refused_by_parameter_name(tmp_path):
    """A checkpoint whose masks do not fit the module says which parameters differ."""
    callback = GradCovFreezeCallback(t0=3, k=0.5)
    trainer = cases.trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(cases.Regression(cases.mlp()), cases.loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    fewer = cases.Regression(cases.mlp())
    fewer.network[2].requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"network\.2\.bias, network\.2\.weight differ"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=3, k=0.5)], max_epochs=2).fit(
            fewer, cases.loader(), ckpt_path=tmp_path / "run.ckpt"
        )


def test_state_of_an_unknown_format_is_refused():
    """A state of a later version is not guessed at."""
    state = GradCovFreezeCallback(**ARGUMENTS).state_dict() | {"format": 99}
    with pytest.raises(ValueError, match="has the format 99, and this version reads 5 and 6"):
        GradCovFreezeCallback(**ARGUMENTS).load_state_dict(state)


def test_load_state_dict_fills_the_attributes_without_a_run():
    """`load_state_dict` alone fills the attributes."""
    callback = GradCovFreezeCallback(**ARGUMENTS)
    run(callback)
    other = GradCovFreezeCallback(**ARGUMENTS)
    other.load_state_dict(callback.state_dict())
    assert other.phase == "frozen"
    for name in ("frozen", "variance", "ranks"):
        cases.assert_identical(getattr(other, name), getattr(callback, name))
    assert other.frozen_fraction == callback.frozen_fraction > 0


def test_resuming_k_1_with_k_1_0_is_refused(tmp_path):
    """The first is one element, the second all of them."""
    path = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(t0=T0, k=1), SaveAndStop(path, 3))
    with pytest.raises(MisconfigurationException, match=r"k=1 \(now 1\.0\)"):
        run(GradCovFreezeCallback(t0=T0, k=1.0), ckpt=path)


@pytest.mark.parametrize(
    "finder",
    [
        lambda: pl.callbacks.LearningRateFinder(num_training_steps=5),
        lambda: pl.callbacks.BatchSizeFinder(steps_per_trial=1, max_trials=1, init_val=8),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
@pytest.mark.filterwarnings("ignore")
def test_finders_before_the_run_leave_it_unchanged(finder, tmp_path, monkeypatch):
    """They save and restore a checkpoint before training begins, which is not resuming."""
    monkeypatch.chdir(tmp_path)

    class Tuned(cases.Regression):
        def __init__(self) -> None:
            super().__init__(cases.mlp(), lambda p: torch.optim.SGD(p, self.lr))
            self.lr, self.batch_size = 0.01, 8

        def train_dataloader(self) -> Any:
            return cases.loader(self.batch_size)

    callback = GradCovFreezeCallback(t0=5, k=0.5)
    cases.trainer(callbacks=[finder(), callback], max_epochs=2).fit(Tuned())
    assert callback.phase == "frozen"
    assert insides.observed_steps_of(callback) == 5


@pytest.mark.parametrize("order", ["variance", "progress"])
@pytest.mark.parametrize("after", [4, 12])
def test_checkpoint_of_0_1_is_resumed_to_the_bit_with_the_default_samples(tmp_path, order, after):
    """It was saved with samples="first", the default then, and lacks keys of today."""
    arguments = {"t0": T0, "k": 0.5, "order": order}
    unbroken = run(GradCovFreezeCallback(**arguments, samples="first"), DropoutByStep())
    path = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(**arguments, samples="first"), DropoutByStep(), SaveAndStop(path, after))
    checkpoint = torch.load(path, weights_only=True)
    saved = checkpoint["callbacks"]["GradCovFreezeCallback"]
    checkpoint["callbacks"]["GradCovFreezeCallback"] = as_format_5(saved, samples="first")
    torch.save(checkpoint, path)
    resumed = run(GradCovFreezeCallback(**arguments), DropoutByStep(), ckpt=path)
    for one in (resumed, unbroken):
        del (
            one["callback"]["arguments"]["samples"],
            one["callback"]["source"],
        )  # format 5 forgot it at the last decision
    cases.assert_identical(resumed, unbroken)
    assert resumed["callback"]["decision"]["observed"] == T0

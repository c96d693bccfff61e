"""`batch_norm="freeze"`: against `eval()` by hand before every batch, and against whoever calls `train()`."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_gcfreeze import Freezer, FreezeSchedule, GradCovFreezeCallback
from lightning_gcfreeze.freezing.still_norms import StillNorms
from lightning_gcfreeze.masks import layer
from tests import cases
from tests.witnesses import bits

FROZEN, LIVE = "network.1", "network.4"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)
    )


class Switching(cases.Regression):
    """It calls `train()` in the middle of a step, as after an evaluation of its own, and validates."""

    def __init__(self):
        super().__init__(network())

    def training_step(self, batch, batch_idx):
        self.eval()
        self.train()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.network(batch[0])


class ByHand(pl.Callback):
    """Evaluation mode of one layer, set by nobody else."""

    def on_train_batch_start(self, trainer, pl_module, *args):
        pl_module.get_submodule(FROZEN).eval()


def statistics(module, name):
    norm = module.get_submodule(name)
    return [getattr(norm, statistic).clone() for statistic in STATISTICS]


def fit(module, *callbacks, epochs=2, **arguments):
    trainer = cases.trainer(callbacks=[*callbacks], max_epochs=epochs, **arguments)
    trainer.fit(module, cases.loader(), cases.loader() if isinstance(module, Switching) else None)
    return trainer


def freezing(**arguments):
    return GradCovFreezeCallback(masks=layer(FROZEN), **arguments)


def moved(module, name):
    start = cases.Regression(network())
    return any(not torch.equal(a, b) for a, b in zip(statistics(module, name), statistics(start, name), strict=True))


@pytest.mark.parametrize("hold", ["compact", "restore"])
def test_norm_that_froze_as_a_whole_keeps_its_statistics_whoever_calls_train(hold):
    module = Switching()
    fit(module, freezing(batch_norm="freeze", hold=hold))
    assert not moved(module, FROZEN)
    assert moved(module, LIVE)
    norm = module.get_submodule(FROZEN)
    assert "train" not in vars(norm)
    assert norm.training is module.training


def test_statistics_are_used_as_evaluation_mode_uses_them():
    ours, by_hand = cases.Regression(network()), cases.Regression(network())
    fit(ours, freezing(batch_norm="freeze", skip_frozen_gradients=False))
    fit(by_hand, freezing(skip_frozen_gradients=False), ByHand())
    for name, value in by_hand.state_dict().items():
        assert_close(ours.state_dict()[name], value, rtol=0, atol=0)
    tracking = cases.Regression(network())
    fit(tracking, freezing(skip_frozen_gradients=False))
    assert moved(tracking, FROZEN)
    assert not torch.equal(tracking.network[0].weight, ours.network[0].weight)


def test_norm_with_a_live_element_goes_on_tracking():
    mask = torch.ones(6, dtype=torch.bool)
    mask[2] = False
    module = cases.Regression(network())
    fit(module, GradCovFreezeCallback(masks={f"{FROZEN}.weight": mask, f"{FROZEN}.bias": True}, batch_norm="freeze"))
    assert moved(module, FROZEN)


def test_resumed_run_keeps_the_statistics_of_the_unbroken_one(tmp_path):
    def recipe():
        return GradCovFreezeCallback(t0=4, k=1.0, include=f"{FROZEN}.*", order="movement", batch_norm="freeze")

    unbroken = cases.Regression(network(), cases.OPTIMIZERS["AdamW"])
    fit(unbroken, recipe(), epochs=4)
    trainer = fit(cases.Regression(network(), cases.OPTIMIZERS["AdamW"]), recipe())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    kept = statistics(trainer.lightning_module, FROZEN)
    resumed = cases.Regression(network(), cases.OPTIMIZERS["AdamW"])
    trainer = cases.trainer(callbacks=[recipe()], max_epochs=4)
    trainer.fit(resumed, cases.loader(), ckpt_path=tmp_path / "half.ckpt")
    for name, value in unbroken.state_dict().items():
        assert torch.equal(bits(resumed.state_dict()[name]), bits(value)), name
    for before, after in zip(kept, statistics(resumed, FROZEN), strict=True):
        assert torch.equal(before, after)
    assert moved(resumed, FROZEN)  # until t0


def test_compiled_norm_keeps_its_statistics_from_the_freeze_on():
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.Adam(model.parameters())
    freezer = Freezer(compiled, optimizer, t0=2, k=1.0, include="*1.*", order="movement", batch_norm="freeze")
    seen = []
    for _ in range(5):
        batch = torch.randn(8, 5)
        freezer.begin_batch(batch)
        freezer.backward(compiled(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        compiled.train()
        seen.append(model[1].running_mean.clone())
    freezer.close()
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[4])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_a_still_norm_do_not_switch_the_original(copied):
    model = network()
    still = StillNorms(model, dict(model[1].named_parameters("1")))
    other = copied(model)
    other.train()
    assert not model[1].training
    still.release()
    model.eval()
    other.train()
    assert not model[1].training
    assert model.train()[1].training


def test_release_while_the_model_evaluates_leaves_it_in_evaluation_mode():
    model = network()
    still = StillNorms(model, dict(model[1].named_parameters("1")))
    model.eval()
    still.release()
    assert not any(m.training for m in model.modules())


def test_norm_that_thaws_tracks_again():
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen[trainer.global_step] = pl_module.get_submodule(FROZEN).running_mean.clone()

    thawing = FreezeSchedule([(4, 1.0), (8, 0.0)], monotone=False)
    freeze = GradCovFreezeCallback(schedule=thawing, include=f"{FROZEN}.*", order="movement", batch_norm="freeze")
    fit(cases.Regression(network(), cases.OPTIMIZERS["AdamW"]), freeze, Look())
    still = [t for t in range(2, 12) if torch.equal(seen[t], seen[t - 1])]
    assert still == [5, 6, 7, 8]

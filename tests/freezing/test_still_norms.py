"""`batch_norm="freeze"`: against `eval()` by hand before every batch, and against whoever calls `train()`."""

import copy
import itertools
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

from lightning_gcfreeze import Freezer, FreezeSchedule, GradCovFreezeCallback, Growth
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


def still(model, *layers):
    """Keep these layers still, as if all their elements were frozen."""
    return StillNorms(model, {n: p for i in layers for n, p in model[i].named_parameters(str(i))})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_of_a_still_norm_follow_their_own_model(copied):
    """Averages of weights are such copies, and `update_bn` makes their statistics."""
    model = network()
    holder = still(model, 1)
    other = copied(copied(model))
    update_bn([torch.full((8, 5), 3.0)], other.train())
    assert other[1].training
    assert other[1].num_batches_tracked == 1
    assert not model.train()[1].training
    assert model[1].num_batches_tracked == 0
    holder.release()
    model.eval()
    other.train()
    assert not model[1].training
    assert model.train()[1].training


class Updates(pl.Callback):
    """Statistics of all layers from the training data, as after an average of weights."""

    def on_train_epoch_end(self, trainer, pl_module):
        update_bn([x for x, _ in cases.loader()], pl_module.network)


def test_update_bn_leaves_still_norms_alone():
    module = cases.Regression(network())
    module.network[1].running_mean.fill_(0.5)
    fit(module, freezing(batch_norm="freeze"), Updates())
    assert (module.network[1].running_mean == 0.5).all()
    assert module.network[4].num_batches_tracked == len(cases.loader())  # from 0, after the last epoch


def test_stochastic_weight_averaging_is_refused_where_norms_are_still():
    """Lightning's puts 0 and 1 in place of all statistics, and lets the layers track anew."""
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    with pytest.raises(MisconfigurationException, match=r"anew.* Use `batch_norm='track'`, or WeightAveraging"):
        fit(cases.Regression(network()), freezing(batch_norm="freeze"), swa)


def every_kind():
    """By what it is, a layer and whether it keeps still when its own parameters are frozen."""
    fixed = nn.BatchNorm1d(5)
    fixed.bias.requires_grad_(False)
    parametrized = nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(5), dim=0)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(5))
    return {
        "usual": (nn.BatchNorm1d(5), True),
        "mean of all batches": (nn.BatchNorm1d(5, momentum=None), True),
        "synchronized": (converted, True),
        "without a bias": (nn.BatchNorm1d(5, bias=False), True),
        "bias not trained": (fixed, True),
        "parametrized": (parametrized, True),
        "without a weight": (nn.BatchNorm1d(5, affine=False), False),
        "without statistics": (nn.BatchNorm1d(5, track_running_stats=False), False),
        "instance norm": (nn.InstanceNorm1d(5, affine=True, track_running_stats=True), False),
        "no norm": (nn.Linear(5, 5), False),
    }


@pytest.mark.parametrize("kind", every_kind())
def test_each_kind_of_layer_keeps_still_or_tracks(kind):
    """Its output is that of evaluation mode, by the formula, and it ends in the mode that it began in."""
    norm, keeps = every_kind()[kind]
    model, x, mean = nn.Sequential(norm), torch.randn(8, 5), torch.arange(5.0)
    holder = StillNorms(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    assert model.train()[0].training is not keeps
    if keeps:
        norm.running_mean.copy_(mean)
        expected = (x - mean) / (1.0 + norm.eps) ** 0.5 * norm.weight + (0.0 if norm.bias is None else norm.bias)
        assert_close(model(x), expected)
        assert torch.equal(norm.running_mean, mean)
        assert norm.num_batches_tracked == 0
    holder.release()
    assert norm.training
    assert not {"train", "reset_running_stats"} & vars(norm).keys()
    if keeps and kind != "synchronized":  # which tracks on a GPU only
        model(x)
        assert not torch.equal(norm.running_mean, mean)


def test_norms_that_share_a_weight_keep_still_together():
    """A shared parameter has the name of the first layer only."""
    model = network()
    model[4].weight, model[4].bias = model[1].weight, model[1].bias
    still(model, 1)
    assert [m.training for m in model.train() if isinstance(m, nn.BatchNorm1d)] == [False, False]


def test_norm_is_known_by_name_while_other_parameters_are_in_its_place():
    """As those that FSDP2 has gathered."""
    model = network()
    sharded = dict(model.named_parameters())
    model[1].weight, model[1].bias = (nn.Parameter(p.detach().clone()) for p in model[1].parameters())
    StillNorms(model, {n: sharded[n] for n in ("1.weight", "1.bias")})
    assert not model.train()[1].training


def test_norm_without_a_frozen_parameter_follows_the_model():
    """What a user's `requires_grad_(False)` fixes is the user's."""
    model = network().requires_grad_(False)
    still(model)
    assert model.train()[1].training


def test_each_fit_has_its_own_choice():
    """The first keeps still, the second tracks, the third keeps what the second has found."""
    module = Switching()
    found = [statistics(module, FROZEN)]
    for batch_norm in ("freeze", "track", "freeze"):
        fit(module, freezing(batch_norm=batch_norm))
        found.append(statistics(module, FROZEN))
        assert module.get_submodule(FROZEN).training
    assert [torch.equal(a[0], b[0]) for a, b in itertools.pairwise(found)] == [True, False, True]


@pytest.mark.parametrize("validates", [False, True])
def test_fit_that_an_error_ended_leaves_norms_in_the_mode_of_the_module(validates):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if not validates and trainer.global_step == 3:
                raise KeyError("of the user")

        def on_validation_end(self, trainer, *args):
            if trainer.global_step:
                raise KeyError("of the user")

    module = Switching()
    with pytest.raises(KeyError, match="of the user"):
        fit(module, freezing(batch_norm="freeze"), Fails())
    norm = module.get_submodule(FROZEN)
    assert norm.training is module.training is not validates
    assert norm.train().training


class Penalized(cases.Regression):
    """What keeps its layer still costs it dear."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 500.0 * (not self.get_submodule(FROZEN).training)


def test_norm_of_a_stage_that_is_undone_tracks_again():
    modes = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            modes.append((freeze.frozen_fraction, pl_module.train().get_submodule(FROZEN).training))

    growth = Growth(first=0.99, most=0.99, stages=1, every=4, forecast=False)
    freeze = GradCovFreezeCallback(
        t0=6, k=growth, include=f"{FROZEN}.*", granularity="tensor", order="movement", batch_norm="freeze"
    )
    module = Penalized(network(), cases.OPTIMIZERS["AdamW"])
    fit(module, freeze, Look(), epochs=6)
    assert set(modes) == {(0.0, True), (1.0, False)}
    assert [modes[0], modes[6], modes[-1]] == [(0.0, True), (1.0, False), (0.0, True)]


def test_release_while_the_model_evaluates_leaves_it_in_evaluation_mode():
    model = network()
    holder = still(model, 1)
    model.eval()
    holder.release()
    assert not any(m.training for m in model.modules())


def test_norm_that_thaws_tracks_again():
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen[trainer.global_step] = pl_module.get_submodule(FROZEN).running_mean.clone()

    thawing = FreezeSchedule([(4, 1.0), (8, 0.0)], monotone=False)
    freeze = GradCovFreezeCallback(schedule=thawing, include=f"{FROZEN}.*", order="movement", batch_norm="freeze")
    fit(cases.Regression(network(), cases.OPTIMIZERS["AdamW"]), freeze, Look())
    unmoved = [t for t in range(2, 12) if torch.equal(seen[t], seen[t - 1])]
    assert unmoved == [5, 6, 7, 8]

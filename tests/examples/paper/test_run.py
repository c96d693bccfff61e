"""A run against NumPy by hand, and its batched continuations against Trainers of their own, one for each."""

from dataclasses import replace
from itertools import chain

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import DataLoader, TensorDataset

from examples.paper.figures import STYLE
from examples.paper.related import RELATED, left_out
from examples.paper.run import (
    Members,
    SummedLosses,
    epochs,
    frozen_sets,
    go_on,
    noise_covariance,
    prepare,
    run,
    warm_up,
)
from examples.paper.tasks import TASKS, Settings, n_parameters
from lightning_gcfreeze import GradCovFreezeCallback, selection
from tests.oracles.experiment import linear_regression

ORDERS = tuple(STYLE)
SHORT = Settings(
    "boston", t0=9, steps=20, batch_size=32, lr=1e-2, orders=ORDERS, fractions=(0.0, 0.3, 0.8, 1.0), seed=3
)


def trained_by_hand(experiment):
    """The experiment's own model after all of its steps, without a Trainer."""
    model = experiment.model
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.settings.lr)
    for batch in experiment.batches:
        x, y = experiment.train[batch]
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()
    return model


def of(data, **changes):
    return replace(SHORT, data=data, **changes)


def in_float64(experiment):
    x, y = experiment.train.tensors
    train = TensorDataset(x.double(), y.double() if y.is_floating_point() else y)
    return replace(experiment, model=experiment.model.double(), train=train)


def trained_alone(experiment, order, fraction):
    """The plain way: one Trainer, the task's own module, the callback as a user adds it, from the first step on."""
    experiment.model.lr = experiment.settings.lr
    callback = GradCovFreezeCallback(experiment.settings.t0, k=fraction, order=order, seed=experiment.order_seed)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=len(experiment.batches),
        callbacks=callback,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(experiment.model, DataLoader(experiment.train, sampler=experiment.batches, batch_size=None))
    return callback


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def by_member(members):
    """All weights, (M, p)."""
    return torch.cat([p.detach().flatten(1) for p in members.parameters()], 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "orders"),
    [
        ("boston", ORDERS),  # a perceptron with a squared loss, as mnist's and synthetic1's
        ("synthetic2", ("variance", "displacement")),  # a linear model with a cross-entropy, as mnist's loss
    ],
)
@pytest.mark.filterwarnings("ignore:.* never had a gradient", "ignore:You defined a `validation_step`")
def test_member_ends_as_the_model_that_a_trainer_of_its_own_trains(data, orders, tmp_path):
    """In float64 to rounding: the frozen set, and every weight after 60 steps."""
    settings = of(data, t0=15, steps=60, orders=orders, fractions=(0.3, 0.8))
    experiment = in_float64(prepare(settings, index=2))
    evidence = warm_up(experiment, tmp_path / "before_t0.ckpt")
    frozen = np.concatenate(frozen_sets(experiment, evidence))
    members = go_on(experiment, tmp_path / "before_t0.ckpt", frozen)
    weights, losses = by_member(members), members.evaluate(experiment.train)
    pairs = [(order, fraction) for order in orders for fraction in settings.fractions]
    for member, (order, fraction) in enumerate(pairs):
        alone = in_float64(prepare(settings, index=2))
        before = flat(alone.model.parameters())
        callback = trained_alone(alone, order, fraction)
        assert torch.equal(flat(callback.frozen.values()), torch.as_tensor(frozen[member])), (order, fraction)
        torch.testing.assert_close(weights[member], flat(alone.model.parameters()), rtol=1e-8, atol=1e-10)
        x, y = alone.train.tensors
        assert losses[member] == pytest.approx(float(alone.model.loss(alone.model(x), y).detach()), rel=1e-8)
        assert (weights[member] - before).abs().max() > 0.01
    assert len({tuple(row) for row in frozen}) == len(pairs)  # they are different models


@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_run_equals_the_papers_equations_in_numpy(fraction):
    """Only weights, batches and data are taken from the code."""
    settings = of("synthetic3", t0=30, steps=70, fractions=(0.0, fraction, 1.0))
    found = run(settings, index=1)
    loss, frozen = by_hand(settings, fraction)
    np.testing.assert_array_equal(found.frozen[ORDERS.index("variance"), 1], frozen)
    assert found.train[ORDERS.index("variance"), 1] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("data", ["synthetic3", "synthetic2"])
def test_variance_of_the_sum_is_that_of_a_sample_around_the_gradient_of_the_sum(data):
    """By a loop of autograd; of the mean it is another one, and the second moment is near up to terms of 1/S."""
    settings = of(data, t0=40, steps=60, batch_size=48, orders=("variance_of_sum",), fractions=(0.5,))
    experiment = in_float64(prepare(settings, index=1))
    model = prepare(settings, index=1).model.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    of_sum, second = 0.0, 0.0
    for t, rows in enumerate(experiment.batches[: settings.t0], start=1):
        x, y = (tensor[rows] for tensor in experiment.train.tensors)
        (p,) = model.parameters()
        (first,) = torch.autograd.grad(model.loss(model(x[:1]), y[:1]), p)
        (mean,) = torch.autograd.grad(model.loss(model(x), y), p)
        of_sum = of_sum + ((first - len(rows) * mean) ** 2 - of_sum) / t
        second = second + (mean**2 - second) / t
        p.grad = mean
        optimizer.step()
    found = flat(warm_up(experiment, members=SummedLosses).variance.values())
    torch.testing.assert_close(found, of_sum.flatten(), rtol=1e-4, atol=0)
    assert not torch.allclose(found, flat(warm_up(experiment).variance.values()), rtol=0.5)
    expected = selection.lowest_k({"p": of_sum.flatten()}, 100)["p"].numpy()
    np.testing.assert_array_equal(frozen_sets(experiment, warm_up(experiment))[0, 0], expected)
    overlap = (expected & selection.lowest_k({"p": second.flatten()}, 100)["p"].numpy()).sum()
    assert overlap > 70


@pytest.mark.parametrize(("batch_size", "same"), [(48, True), (50, False)])
def test_training_on_sums_differs_by_the_short_batches_only(batch_size, same):
    """720 objects are 15 batches of 48, or 14 of 50 and one of 20, whose gradient Adam sees at two fifths."""
    settings = of("synthetic3", t0=40, steps=60, batch_size=batch_size, orders=("variance",))
    experiment = in_float64(prepare(settings, index=1))
    means, sums = (flat(warm_up(experiment, members=members).weights.values()) for members in (Members, SummedLosses))
    way = (means - flat(experiment.model.parameters())).norm()
    assert ((sums - means).norm() < 1e-5 * way) == same
    assert (sums - means).norm() < 0.1 * way


@pytest.mark.parametrize(
    "mistake",
    [
        {"score": lambda c: -c},
        {"gain": lambda t: 0.1 if t > 1 else 1.0},
        {"sample": lambda gradients: 0 * gradients[0]},
        {"sample": lambda gradients: gradients[-1]},
        {"held": False},
    ],
    ids=["descending", "constant gain", "no g_1", "last sample", "drift"],
)
def test_comparison_with_numpy_notices_a_mistake(mistake):
    """Each mistake changes the frozen set or the loss by more than the tolerance of the test above."""
    settings = of("synthetic3", t0=30, steps=70)
    right, wrong = by_hand(settings, 0.8), by_hand(settings, 0.8, **mistake)
    assert (right[1] != wrong[1]).any() or wrong[0] != pytest.approx(right[0], rel=1e-3)


def by_hand(settings, fraction, **method):
    """Training loss and frozen set of run number 1, in NumPy."""
    experiment = prepare(settings, index=1)
    x, y = (tensor.numpy().astype(np.float64) for tensor in experiment.train.tensors)
    start = flat(experiment.model.parameters()).numpy()
    k = round(fraction * 200)
    w, frozen = linear_regression(start, (x, y), experiment.batches, settings.t0, k, settings.lr, **method)
    return np.mean((x @ w - y) ** 2), frozen


def test_frozen_elements_keep_their_bits_and_the_others_move(tmp_path):
    experiment, checkpoint = prepare(SHORT, index=0), tmp_path / "before_t0.ckpt"
    frozen = np.concatenate(frozen_sets(experiment, warm_up(experiment, checkpoint)))
    at_t0 = by_member(go_on(replace(experiment, batches=experiment.batches[: SHORT.t0]), checkpoint, frozen))
    weights = by_member(go_on(experiment, checkpoint, frozen))
    same = (weights.view(torch.int32) == at_t0.view(torch.int32)).numpy()
    assert same[frozen].all()
    assert same[~frozen].mean() < 0.1  # weights of dead units may stay, too
    assert (flat(experiment.model.parameters()) != at_t0).float().mean() > 0.9  # the warm-up trained


def test_frozen_sets_begin_from_the_weights_of_the_warm_up(tmp_path):
    """Step t0, which each continuation takes once more, ends where the warm-up did; then nothing else is frozen."""
    experiment, checkpoint = prepare(SHORT, index=0), tmp_path / "before_t0.ckpt"
    evidence = warm_up(experiment, checkpoint)
    nothing = np.zeros((3, 301), dtype=bool)
    at_t0 = by_member(go_on(replace(experiment, batches=experiment.batches[: SHORT.t0]), checkpoint, nothing))
    torch.testing.assert_close(at_t0, flat(evidence.weights.values()).expand(3, -1), rtol=1e-6, atol=1e-7)


def test_curves_begin_at_no_freeze_and_end_at_the_state_of_t0(tmp_path):
    """All orders share both ends: the first is a run without the callback, the last is the model that froze."""
    found = run(SHORT, index=0)
    assert found.train.shape == found.test.shape == (7, 4)
    assert found.frozen.sum(-1).tolist() == [[0, 90, 241, 301]] * 7
    experiment = prepare(SHORT, index=0)
    evidence = warm_up(experiment, tmp_path / "before_t0.ckpt")
    at_t0 = Members(experiment.model, 1, SHORT.lr)
    at_t0.load_state_dict(dict(evidence.weights))
    np.testing.assert_allclose(found.train[:, -1], at_t0.evaluate(experiment.train)[0], rtol=1e-6)
    model = trained_by_hand(experiment)
    for curves, data in ((found.train, experiment.train), (found.test, experiment.test)):
        x, y = data.tensors
        np.testing.assert_allclose(curves[:, 0], float(model.loss(model(x), y).detach()), rtol=1e-4)
    assert found.train[0, -1] > 1.2 * found.train[0, 0]
    assert len(set(found.train[:, 2])) == 7


def test_run_is_determined_by_its_seed():
    once, again, other, shifted = run(SHORT, 0), run(SHORT, 0), run(SHORT, 1), run(replace(SHORT, seed=4), 0)
    for field in ("train", "test", "frozen"):
        assert np.array_equal(getattr(once, field), getattr(again, field))
        assert np.array_equal(getattr(other, field), getattr(shifted, field))  # run i has the seed `seed` + i
        assert not np.array_equal(getattr(once, field), getattr(other, field))


@pytest.mark.parametrize("same", [True, False])
def test_runs_share_w_and_share_objects_only_on_request(monkeypatch, same):
    """A synthetic parameter means the same in every run; weights and batches are new each time."""
    made, task = [], TASKS["synthetic3"]
    monkeypatch.setitem(TASKS, "synthetic3", replace(task, data=lambda *a: made.append(task.data(*a)) or made[-1]))
    one, other = (prepare(of("synthetic3", same_data=same), index) for index in (0, 1))
    assert np.array_equal(made[0].w, made[1].w)
    assert torch.equal(one.train.tensors[0], other.train.tensors[0]) == same
    assert not torch.equal(flat(one.model.parameters()), flat(other.model.parameters()))
    assert one.batches != other.batches


def test_random_order_has_a_random_stream_of_its_own():
    """Not the one that initial weights and batches are drawn from."""
    experiments = [prepare(SHORT, index) for index in (0, 1)]
    seeds = [seed for experiment in experiments for seed in (experiment.seed, experiment.order_seed)]
    streams = [torch.rand(9, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert len({tuple(stream.tolist()) for stream in streams}) == 4


def test_epoch_visits_every_object_once_and_ends_in_a_short_batch():
    batches = epochs(objects=10, batch_size=4, steps=7, seed=0)
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4]
    for first in (0, 3):
        assert sorted(chain(*batches[first : first + 3])) == list(range(10))
    assert batches[:3] != batches[3:6]
    assert batches == epochs(10, 4, 7, seed=0) != epochs(10, 4, 7, seed=1)


def test_ctrl_c_raises_instead_of_returning_a_run(monkeypatch):
    """Lightning ends a fit early on Ctrl-C: by exit or, before 2.5, without an exception."""

    def pressed(self, batch, batch_idx):
        raise KeyboardInterrupt

    def silent(self, *_, **__):
        self.state.status = TrainerStatus.INTERRUPTED

    for owner, name, interrupt in ((Members, "training_step", pressed), (pl.Trainer, "fit", silent)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(SHORT, 0)


def test_batch_size_above_the_number_of_objects_is_refused():
    with pytest.raises(ValueError, match="`batch_size=364` is more than the 363 training objects"):
        run(of("boston", batch_size=364), 0)


def test_related_orders_see_the_model_at_t0_and_the_training_objects(tmp_path):
    """By NumPy from the weights of the warm-up: brain damage on XᵀX, and the noise of the same t0 samples."""
    settings = of("synthetic3", orders=("variance", "obd", "belsley_noise"), fractions=(0.0, 0.3, 1.0))
    experiment = prepare(settings, index=0)
    evidence = warm_up(experiment, tmp_path / "before_t0.ckpt")
    found = frozen_sets(experiment, evidence)
    x = experiment.train.tensors[0].numpy().astype(np.float64)
    w = flat(evidence.weights.values()).double().numpy()
    damage = np.mean(x**2, axis=0) * w**2
    assert set(np.flatnonzero(found[1, 1])) == set(np.argsort(damage)[:60])
    assert found[:, 0].sum() == 0
    assert found[:, 2].all()
    assert len({tuple(row) for row in found[:, 1]}) == 3


def test_covariance_of_the_noise_has_the_variance_of_the_warm_up_on_its_diagonal(tmp_path):
    """The second passage takes the same steps as the first. 9 steps of one sample each: rank 9."""
    experiment = prepare(SHORT, index=1)
    variance = flat(warm_up(experiment, tmp_path / "before_t0.ckpt").variance.values())
    covariance = noise_covariance(experiment)
    torch.testing.assert_close(covariance.diagonal(), variance, rtol=1e-4, atol=1e-9)
    assert torch.linalg.matrix_rank(covariance.double(), rtol=1e-5) == SHORT.t0


@pytest.mark.slow
@pytest.mark.parametrize("data", TASKS)
def test_every_related_order_that_fits_a_task_ranks_its_parameters(data):
    """Each order in its own way, but for obd and obs where features are hardly correlated."""
    p = n_parameters(data)
    orders = tuple(order for order in RELATED if left_out(order, p) is None)
    if data == "synthetic1":
        orders = tuple(order for order in orders if order not in ("obs", "obs_freeze", "obd_freeze"))  # ten seconds
    found = run(of(data, orders=("variance", "random", *orders), fractions=(0.0, 0.5, 1.0)), index=0)
    assert found.frozen.sum(-1).tolist() == [[0, round(p / 2), p]] * (2 + len(orders))
    assert len({tuple(row) for row in found.frozen[:, 1]}) >= len(orders) + (0 if "synthetic" in data else 2)
    assert np.isfinite(found.train).all()


def test_pruning_sets_weights_of_the_trained_model_to_zero():
    """By a plain loop over all steps, without a callback; scores are those of the last step."""
    settings = of("boston", t0=20, orders=("variance", "random", "magnitude", "obd"), prune=True)
    found = run(settings, index=0)
    experiment = prepare(settings, index=0)
    model = trained_by_hand(experiment)
    w = flat(model.parameters()).clone()
    smallest = w.abs().argsort()
    for column, k in enumerate((0, 90, 241, 301)):
        assert set(np.flatnonzero(found.frozen[2, column])) == set(smallest[:k].tolist())
        for row in range(4):
            zeroed = w.masked_fill(torch.as_tensor(found.frozen[row, column]), 0.0)
            torch.nn.utils.vector_to_parameters(zeroed, model.parameters())
            for losses, data in ((found.train, experiment.train), (found.test, experiment.test)):
                x, y = data.tensors
                assert losses[row, column] == pytest.approx(float(model.loss(model(x), y).detach()), rel=1e-4)
    assert found.train[0, -1] > 1.2 * found.train[0, 0]
    assert len({tuple(row) for row in found.frozen[:, 1]}) == 4


def test_pruning_observes_the_variance_over_the_whole_run(tmp_path):
    settings = of("boston", t0=20, orders=("variance", "random"), fractions=(0.0, 0.3, 1.0), prune=True)
    variance = flat(warm_up(prepare(settings, 0), tmp_path / "ckpt").variance.values())
    early = flat(warm_up(prepare(replace(settings, t0=9), 0), tmp_path / "ckpt").variance.values())
    found = set(np.flatnonzero(run(settings, 0).frozen[0, 1]))
    assert found == set(variance.argsort()[:90].tolist()) != set(early.argsort()[:90].tolist())

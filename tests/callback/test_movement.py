"""`order="movement"`: the way of each element since halfway to t0, against weights recorded by hand."""

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import optim

from lightning_gcfreeze import Freezer, FreezeSchedule, GradCovFreezeCallback, Growth, Settled, orderings
from lightning_gcfreeze.freezing import ELEMENTWISE
from tests import cases
from tests.interruptions import DropoutByStep, interrupted
from tests.interruptions import run as run_to_the_end

BETA = 0.999


class Records(pl.Callback):
    """Weights after each optimizer step, from the start; and the gradients of each."""

    def __init__(self):
        self.weights, self.gradients = [], []

    def on_train_start(self, trainer, module):
        self.weights.append({n: p.detach().clone() for n, p in module.named_parameters()})

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients.append({n: p.grad.clone() for n, p in module.named_parameters()})

    def on_train_batch_end(self, trainer, module, *_):
        self.on_train_start(trainer, module)


OPTIMIZERS = {
    "Adam": (lambda p: optim.Adam(p, 0.01), lambda g: math.sqrt(mean_square(g)) + 1e-8),
    "Adam, no mean": (lambda p: optim.Adam(p, 0.01, betas=(0.0, BETA)), lambda g: math.sqrt(mean_square(g)) + 1e-8),
    "SGD": (lambda p: optim.SGD(p, 0.02), lambda g: 1.0),
    "SGD with momentum": (lambda p: optim.SGD(p, 0.02, momentum=0.9), lambda g: 0.1),
    "RMSprop": (lambda p: optim.RMSprop(p, 0.01), lambda g: math.sqrt(mean_square(g, 0.99, correct=False)) + 1e-8),
    "Adagrad": (lambda p: optim.Adagrad(p, 0.01), lambda g: math.sqrt(sum(x * x for x in g)) + 1e-10),
}  # fmt: skip


def mean_square(gradients, beta=BETA, correct=True):
    """The optimizer's mean of squares, by its weights; no recursion."""
    n = len(gradients)
    total = sum((1 - beta) * beta ** (n - 1 - i) * g * g for i, g in enumerate(gradients))
    return total / (1 - beta**n) if correct else total


def lowest(scores, k):
    """The k lowest of all elements, ties by place."""
    flat = np.concatenate([s.ravel() for s in scores.values()])
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[np.argsort(flat, kind="stable")[:k]] = True
    parts = np.split(chosen, np.cumsum([s.size for s in scores.values()])[:-1])
    return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def expected(records, since, t0, divisor_of, rate):
    """Scores by loops over elements."""
    found = {}
    for name, before in records.weights[since].items():
        way = ((records.weights[t0][name] - before) / rate).double().numpy()
        divisors = np.empty(way.shape)
        for index in np.ndindex(*way.shape):
            divisors[index] = divisor_of([float(g[name][index]) for g in records.gradients[:t0]])
        found[name] = way**2 * divisors
    return found


def fit(callback, make=OPTIMIZERS["Adam"][0], **options):
    records, module = Records(), cases.Regression(cases.mlp(), make)
    cases.trainer(callbacks=[callback, records], **options).fit(module, cases.loader())
    return records, module


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("t0", [1, 2, 7])
def test_masks_are_those_of_the_way_since_halfway_to_t0(name, t0):
    """With scores by hand; nothing of the gradients is gathered."""
    make, divisor_of = OPTIMIZERS[name]
    callback = GradCovFreezeCallback(t0, 28, order="movement")
    records, _ = fit(callback, make)
    scores = expected(records, t0 // 2, t0, divisor_of, make([torch.nn.Parameter(torch.ones(1))]).param_groups[0]["lr"])
    for parameter, mask in lowest(scores, 28).items():
        np.testing.assert_array_equal(callback.frozen[parameter].numpy(), mask)
    for parameter, score in scores.items():
        found = callback._state.decision.scores[parameter]
        np.testing.assert_allclose(found, score, rtol=2e-3, atol=1e-6 * score.max())
    assert callback.variance == {}
    other = expected(records, 0, t0, divisor_of, 1.0)
    if t0 == 7:  # a way from elsewhere would order otherwise
        assert any((m != callback.frozen[n].numpy()).any() for n, m in lowest(other, 28).items())


def test_rates_that_differ_from_group_to_group_do_not_order():
    """The way is in units of the group's learning rate: the mean of that halfway and that at t0."""

    class TwoRates(cases.Regression):
        def configure_optimizers(self):
            first, *others = self.parameters()
            optimizer = optim.SGD([{"params": [first], "lr": 0.02}, {"params": others, "lr": 0.0002}])
            return [optimizer], [
                {"scheduler": optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 16), "interval": "step"}
            ]

    callback, records = GradCovFreezeCallback(8, 28, order="movement"), Records()
    cases.trainer(callbacks=[callback, records]).fit(TwoRates(cases.mlp()), cases.loader())
    decay = ((1 - 4 / 16) + (1 - 8 / 16)) / 2
    scores = {}
    for i, (name, before) in enumerate(records.weights[4].items()):
        rate = (0.0002 if i else 0.02) * decay
        scores[name] = (((records.weights[8][name].double() - before.double()) / rate) ** 2).numpy()
    for name, mask in lowest(scores, 28).items():
        np.testing.assert_array_equal(callback.frozen[name].numpy(), mask)


def test_stages_count_the_way_since_halfway_from_the_stage_before():
    """Frozen elements stay frozen."""
    callback = GradCovFreezeCallback(schedule=FreezeSchedule([(4, 10), (10, 28)]), order="movement")
    records, _ = fit(callback, OPTIMIZERS["SGD"][0])
    first = lowest(expected(records, 2, 4, lambda g: 1.0, 0.02), 10)
    scores = expected(records, 7, 10, lambda g: 1.0, 0.02)
    for name, mask in lowest({n: np.where(first[n], -1.0, s) for n, s in scores.items()}, 28).items():
        np.testing.assert_array_equal(callback.frozen[name].numpy(), mask)


@pytest.mark.parametrize("after", [2, 4, 6, 12])
def test_resumed_run_equals_the_unbroken_one(tmp_path, after):
    """To the bit, from before halfway, after it, and after t0; with the factor on the learning rate."""
    arguments = {"t0": 8, "k": 0.5, "order": "movement", "lr_after_freeze": 0.5}
    unbroken = run_to_the_end(GradCovFreezeCallback(**arguments), DropoutByStep())
    cases.assert_identical(interrupted(tmp_path / "run.ckpt", after, arguments), unbroken)


def test_settled_t0_counts_the_way_since_the_last_check():
    """Two thirds of the way to the check, which is where the one before was; with k that grows."""
    callback = GradCovFreezeCallback(
        Settled(first=4, max_t0=9), Growth(first=0.5, every=2, forecast=False), order="movement"
    )
    records, _ = fit(callback, OPTIMIZERS["SGD"][0], max_epochs=4)
    t0 = callback._state.plan.t0
    since = {4: 2, 6: 4, 9: 6}[t0]
    scores = expected(records, since, t0, lambda g: 1.0, 0.02)
    first = lowest(scores, 28)
    for name, mask in callback.frozen.items():
        assert (mask.numpy() | ~first[name]).all()  # k grows along the order of t0


@pytest.mark.parametrize(("growth", "max_t0", "since"), [(1.1, 13, 11), (1.25, 13, 10), (2.0, 16, 10), (1.5, 10, 6)])
def test_settled_t0_at_another_growth_counts_no_way_of_long_ago(growth, max_t0, since):
    """Checks at 8, 9, 10, 11, 13; at 8, 10, 13; at 8, 16; at 4, 6, 9, 10, of which the last has no restart."""
    first = 4 if growth == 1.5 else 8
    settled = Settled(first=first, max_t0=max_t0, growth=growth, improvement=1e-9)
    callback = GradCovFreezeCallback(settled, 28, order="movement")
    records, _ = fit(callback, OPTIMIZERS["SGD"][0], max_epochs=4)
    assert callback._state.plan.t0 == max_t0
    for name, mask in lowest(expected(records, since, max_t0, lambda g: 1.0, 0.02), 28).items():
        np.testing.assert_array_equal(callback.frozen[name].numpy(), mask)


def test_elements_without_a_gradient_come_first_and_are_counted():
    """Also where weight decay moves them: Adam's second moment knows better."""

    class Dead(cases.Regression):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((x * torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), y), batch_idx)

    callback = GradCovFreezeCallback(4, 8, order="movement")
    module = Dead(cases.mlp(), lambda p: optim.AdamW(p, 0.01, weight_decay=0.5))
    with pytest.warns(UserWarning, match="8 of the 8 frozen elements never had a gradient"):
        cases.trainer(callbacks=[callback]).fit(module, cases.loader())
    assert callback.frozen["network.0.weight"][:, 1].all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: optim.Adadelta(p), "Adadelta does not divide"),
        (lambda p: optim.Adafactor(p, 0.01), "Adafactor is not known to treat"),
        (type("Own", (optim.Adam,), {}), "Own is not known to treat"),
    ],
)
def test_optimizers_of_unknown_steps_are_refused_before_the_first_one(make, text):
    """With the way out."""
    with pytest.raises(MisconfigurationException, match=rf"scale of the gradients.*{text}.*order='progress'"):
        fit(GradCovFreezeCallback(4, 8, order="movement"), make)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_added_subclass_of_sgd_is_served_with_or_without_a_state(momentum):
    """It divides by nothing, like its parent."""
    own = type("Own", (optim.SGD,), {})
    ELEMENTWISE.add(own)
    try:
        callback = GradCovFreezeCallback(4, 28, order="movement")
        fit(callback, lambda p: own(p, 0.02, momentum=momentum))
    finally:
        ELEMENTWISE.discard(own)
    of_parent = GradCovFreezeCallback(4, 28, order="movement")
    fit(of_parent, lambda p: optim.SGD(p, 0.02, momentum=momentum))
    cases.assert_identical(callback.frozen, of_parent.frozen)


def test_elements_that_stood_still_are_not_said_to_have_had_no_gradient():
    """Each had one in each step, at a learning rate of 0."""

    class Late(cases.Regression):
        def configure_optimizers(self):
            optimizer = optim.SGD(self.parameters(), lr=0.01)
            schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t < 2))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    with pytest.warns(UserWarning, match="or have not moved since halfway.*rate of 0.*because they did not move"):
        cases.trainer(callbacks=[GradCovFreezeCallback(6, 8, order="movement")]).fit(Late(cases.mlp()), cases.loader())


def test_freezer_freezes_the_same_and_copies_weights_twice_at_most():
    """The second front; what is kept before t0 is one copy of the weights, no matter how long."""
    callback = GradCovFreezeCallback(8, 28, order="movement")
    _, module = fit(callback)
    other = cases.Regression(cases.mlp(), OPTIMIZERS["Adam"][0])
    optimizer = other.configure_optimizers()
    freezer = Freezer(other, optimizer, 8, 28, order="movement")
    for _ in range(2):
        for x, y in cases.loader():
            freezer.begin_batch((x, y))
            optimizer.zero_grad()
            freezer.backward(torch.nn.functional.mse_loss(other.network(x), y))
            if freezer.phase == "observing":
                kept = freezer._state.observing
                assert not kept.reads_gradients
                assert kept.halfway.keys() == dict(other.named_parameters()).keys()
            optimizer.step()
    freezer.close()
    for name, mask in callback.frozen.items():
        assert torch.equal(freezer.frozen[name], mask)
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_own_orders_may_read_the_way():
    """What they get is in units of the learning rate."""
    seen = {}

    @orderings.needs("movement", variance=False)
    def own(evidence):
        seen.update(copy.deepcopy(evidence.movement))
        assert evidence.divisor is None
        return {name: d.abs() for name, d in evidence.movement.items()}

    class Rising(cases.Regression):
        def configure_optimizers(self):
            optimizer = optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [
                {"scheduler": optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 + t / 6), "interval": "step"}
            ]

    records = Records()
    trainer = cases.trainer(callbacks=[GradCovFreezeCallback(6, 0.5, order=own), records])
    trainer.fit(Rising(cases.mlp()), cases.loader())
    for name, d in seen.items():  # rates of 0.015 after 3 steps; in step 6, which the scheduler has not left yet, 11/6
        way = (records.weights[6][name] - records.weights[3][name]) / (0.01 * (1 + 2 / 6 + 1 + 5 / 6) / 2)
        torch.testing.assert_close(d, way, rtol=1e-5, atol=1e-6)

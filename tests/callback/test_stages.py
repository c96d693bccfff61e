"""Runs that decide more than once, or find out when and how much by themselves."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_gcfreeze import FreezeSchedule, GradCovFreezeCallback, Growth, Settled
from tests import cases, insides
from tests.interruptions import DropoutByStep, Interrupted, SaveAndStop, interrupted, run
from tests.oracles.recursion import covariance
from tests.witnesses import bits

# What is observed, or said at the end, is looked at here, so many runs end at t0.
pytestmark = pytest.mark.filterwarnings("ignore:.*optimizer steps planned")


class Diary(pl.Callback):
    """Notes after each batch: masks, weights, optimizer states. To come after the callback."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback = callback
        self.masks: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.masks.append(self.callback.frozen)
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})
        state = trainer.optimizers[0].state_dict()["state"]
        self.states.append({i: {k: torch.as_tensor(v).clone() for k, v in s.items()} for i, s in state.items()})

    def counts(self) -> list[int]:
        """How many elements were frozen after each step."""
        return [sum(int(m.sum()) for m in masks.values()) for masks in self.masks]

    def check_constancy(self) -> None:
        """What is frozen after one step and after the next has not moved in between; enough of the rest has."""
        moved = live = 0
        for (before, after), (masks, later) in zip(
            itertools.pairwise(self.weights), itertools.pairwise(self.masks), strict=True
        ):
            for n, mask in masks.items():
                held = mask & later[n]
                changed = bits(before[n]) != bits(after[n])
                assert not (changed & mask).any(), f"a frozen element of {n} moved"
                assert (held == mask).all() or insides.may_thaw(self.callback)
                moved, live = moved + int((changed & ~mask).sum()), live + int((~mask).sum())
        assert moved > 0.5 * live > 0


def train(callback: GradCovFreezeCallback, *more: pl.Callback, module: Any = None, **kwargs: Any) -> Diary:
    diary = Diary(callback)
    torch.manual_seed(3)
    module = module or cases.Regression(cases.mlp(), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    trainer = cases.trainer(callbacks=[callback, diary, *more], **({"max_epochs": 4} | kwargs))
    trainer.fit(module, cases.loader())
    diary.check_constancy()
    return diary


P = 57  # elements of cases.mlp
FOUR = Growth(first=0.5, most=0.95, stages=4, forecast=False)


# Schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["auto", "restore"])
def test_monotone_schedule_adds_to_the_frozen_elements(hold):
    """A fifth, a half, nine tenths; each set within the next."""
    schedule = FreezeSchedule([(6, 0.2), (12, 0.5), (20, 0.9)])
    callback = GradCovFreezeCallback(schedule=schedule, hold=hold)
    diary = train(callback)
    assert diary.counts() == [0] * 5 + [round(0.2 * P)] * 6 + [round(0.5 * P)] * 8 + [round(0.9 * P)] * 13
    for earlier, later in itertools.pairwise(diary.masks[5:]):
        assert all((later[n] | ~earlier[n]).all() for n in earlier)
    saved = callback.savings.after.state < 0.3 * callback.savings.before.state
    assert saved is (hold == "auto")  # compacted at the last stage


class Pairs(pl.Callback):
    """g_1 and g_S of every step, by autograd on the module's own weights."""

    def __init__(self) -> None:
        self.found: list[tuple[np.ndarray, np.ndarray]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        def flat(x: Tensor, y: Tensor) -> np.ndarray:
            grads = torch.autograd.grad(pl_module.training_step((x, y), 0), list(pl_module.parameters()))
            return np.concatenate([g.double().numpy().ravel() for g in grads])

        x, y = batch
        for p in (required := [p for p in pl_module.parameters() if not p.requires_grad]):
            p.requires_grad_(True)
        self.found.append((flat(x[:1], y[:1]), flat(x, y)))
        for p in required:
            p.requires_grad_(False)


def test_each_stage_observes_the_steps_since_the_stage_before():
    """The variance after the second stage is the recursion over steps 7 to 12 alone, of frozen elements too."""
    callback, pairs = GradCovFreezeCallback(schedule=FreezeSchedule([(6, 0.4), (12, 0.6)])), Pairs()
    diary = train(callback, pairs)
    expected = covariance(pairs.found[6:12], lambda t: 1 / t)
    found = np.concatenate([v.numpy().ravel() for v in callback.variance.values()])
    np.testing.assert_allclose(found, np.diag(expected), rtol=2e-4)
    from_the_start = np.diag(covariance(pairs.found[:12], lambda t: 1 / t))
    assert not np.allclose(found, from_the_start, rtol=0.05)
    first = np.concatenate([m.numpy().ravel() for m in diary.masks[6].values()])
    order = np.where(first, -np.inf, np.diag(expected)).argsort(kind="stable")
    frozen = np.concatenate([m.numpy().ravel() for m in callback.frozen.values()])
    assert set(order[: round(0.6 * P)]) == set(np.flatnonzero(frozen))


def test_monotone_schedule_keeps_what_the_order_would_thaw():
    """With an order that changes its sign: monotone, it adds from the other end; else it thaws the first elements."""

    def fickle(evidence: Any) -> dict[str, Tensor]:
        fickle.sign *= -1
        return {n: fickle.sign * w for n, w in evidence.weights.items()}

    for monotone, kept in ((True, 20), (False, 0)):
        fickle.sign = 1
        callback = GradCovFreezeCallback(schedule=FreezeSchedule([(6, 20), (12, 30)], monotone), order=fickle)
        first, second = (diary := train(callback)).masks[6], diary.masks[-1]
        assert diary.counts()[-1] == 30
        assert sum(int((first[n] & second[n]).sum()) for n in first) == kept


@pytest.mark.parametrize("order", ["movement", "momentum"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_stages_of_a_schedule_are_compact_where_the_order_reads_no_gradients(order, optimizer):
    """The same elements freeze, and the weights are the same, as where values are put back after each step."""
    stages = [(6, 0.3), (12, 0.6), (20, 0.9)]

    def optimizers(parameters: Any) -> Any:
        if optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
        return torch.optim.Adam(parameters, lr=0.01)

    found = {}
    for hold in ("auto", "restore"):
        sizes = Sizes()
        callback = GradCovFreezeCallback(schedule=stages, order=order, hold=hold)
        module = cases.Regression(cases.mlp(), optimizers)
        found[hold] = train(callback, sizes, module=module), sizes.live
    (compact, live), (restored, whole) = found["auto"], found["restore"]
    assert compact.counts() == restored.counts()
    assert live == [P] * 5 + [P - round(0.3 * P)] * 6 + [P - round(0.6 * P)] * 8 + [P - round(0.9 * P)] * 13
    assert set(whole) == {P}
    for a, b in zip(compact.masks, restored.masks, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for name, w in compact.weights[-1].items():
        torch.testing.assert_close(w, restored.weights[-1][name])


class Sizes(pl.Callback):
    """Of how many elements the optimizer has a state, after each of its steps."""

    def __init__(self) -> None:
        self.live: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        key = "exp_avg" if isinstance(trainer.optimizers[0], torch.optim.Adam) else "momentum_buffer"
        self.live.append(sum(state[key].numel() for state in trainer.optimizers[0].state.values() if key in state))


def test_movement_of_a_stage_counts_from_halfway_with_the_rates_of_its_groups():
    """Of two groups whose rates are far apart, one falls: by hand, from the weights before and after."""
    stages = [(6, 0.3), (14, 0.7)]
    weights = []

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    def optimizers(parameters: Any) -> Any:
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 1e-4}, {"params": others, "lr": 0.02}])

    callback = GradCovFreezeCallback(schedule=stages, order="movement")
    diary = train(callback, Weights(), module=cases.Regression(cases.mlp(), optimizers))
    before, half, now = (weights[i - 1] for i in (6, 10, 14))
    first = next(iter(now))
    rates = {name: 1e-4 if name == first else 0.02 for name in now}
    score = {n: ((now[n] - half[n]) / rates[n]).square().masked_fill(diary.masks[6][n], -1.0) for n in now}
    flat = torch.cat([s.flatten() for s in score.values()])
    expected = flat.argsort(stable=True)[: round(0.7 * P)]
    frozen = torch.cat([m.flatten() for m in callback.frozen.values()])
    assert set(expected.tolist()) == set(frozen.nonzero().flatten().tolist())
    assert any(not torch.equal(before[n], half[n]) for n in now)


def test_loss_of_a_stage_does_not_depend_on_accumulation():
    """Lightning divides them by the number of micro-batches."""
    callback = GradCovFreezeCallback(t0=6, k=Growth(every=5))
    trainer = cases.trainer(callbacks=callback, max_epochs=2, accumulate_grad_batches=2)
    trainer.fit(Plateau(lambda t: 7.0), cases.loader())
    growing = insides.plan_of(callback).growing
    assert growing is not None
    assert growing.reference[0] == pytest.approx(7.0)


@pytest.mark.parametrize("hold", ["auto", "restore"])
def test_thawed_elements_have_the_optimizer_state_of_their_freeze(hold):
    """Nine tenths freeze, then a third: what thaws has its moments, and takes no large step."""
    callback = GradCovFreezeCallback(
        schedule=FreezeSchedule([(8, 0.9), (20, 0.3), (26, 0.3)], monotone=False), hold=hold
    )
    optimizer = lambda p: torch.optim.Adam(p, lr=0.01)  # noqa: E731
    diary = train(callback, module=cases.Regression(cases.mlp(), optimizer))
    unfrozen = train(GradCovFreezeCallback(t0=8, k=0), module=cases.Regression(cases.mlp(), optimizer))
    assert diary.counts() == [0] * 7 + [round(0.9 * P)] * 12 + [round(0.3 * P)] * 13
    assert not insides.thaw_states_of(callback).state_dict()["masks"]  # nothing is kept after the last stage
    names = list(diary.weights[0])
    thawed = {n: diary.masks[18][n] & ~diary.masks[19][n] for n in names}
    assert sum(int(t.sum()) for t in thawed.values()) > 0.4 * P
    for i, n in enumerate(names):
        for key in ("exp_avg", "exp_avg_sq"):
            at_freeze, at_thaw = unfrozen.states[7][i][key], diary.states[19][i][key]
            assert torch.equal(at_thaw[thawed[n]], at_freeze[thawed[n]])
            assert at_freeze[thawed[n]].abs().sum() > 0
        steps = torch.stack([diary.weights[t + 1][n] - diary.weights[t][n] for t in range(19, 25)]).abs()
        live = ~diary.masks[19][n]
        assert (steps[:, live & thawed[n]] > 0).any()
        assert (steps[:, thawed[n] & live] < 0.03).all()  # from nothing, Adam would step by 0.03 at once, and 0.06 soon


def test_stages_that_are_not_reached_are_warned_of():
    callback = GradCovFreezeCallback(schedule=FreezeSchedule([(6, 0.2), (100, 0.5)]))
    with pytest.warns(UserWarning, match=r"Only stage 1 was reached: training ended after 32 optimizer steps, before"):
        train(callback)


# k from the data ---------------------------------------------------------------------------------------------------


class Minds(cases.Regression):
    """A module whose loss is three times what it was as soon as more than so much is frozen."""

    def __init__(self, limit: float) -> None:
        super().__init__(cases.mlp(), lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1))
        self.limit, self.frozen_fraction = limit, lambda: 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 2 * loss.detach() * (self.frozen_fraction() > self.limit)


def growing(limit: float, **arguments: Any) -> tuple[GradCovFreezeCallback, Minds, Diary]:
    growth = replace(FOUR, every=8, max_loss_increase=0.5)
    callback = GradCovFreezeCallback(t0=8, k=growth, **arguments)
    module = Minds(limit)
    module.frozen_fraction = lambda: callback.frozen_fraction
    return callback, module, train(callback, module=module, max_epochs=10)


@pytest.mark.parametrize("hold", ["compact", "restore"])
def test_k_grows_along_the_order_while_the_loss_does_not_rise(hold):
    callback, _, diary = growing(1.0, hold=hold)
    stages = [round(f * P) for f in FOUR.fractions()]
    assert diary.counts() == [0] * 7 + [n for n in stages[:3] for _ in range(8)] + [stages[3]] * 49
    order = torch.cat([r.flatten() for r in callback.ranks.values()])
    frozen = torch.cat([m.flatten() for m in callback.frozen.values()])
    assert torch.equal(frozen, order <= stages[3])
    assert not insides.thaw_states_of(callback).state_dict()["masks"]  # it is settled, nothing is kept any more


@pytest.mark.parametrize("hold", ["compact", "restore"])
def test_stage_that_raises_the_loss_thaws_and_stays_thawed(hold):
    """After two means of eight steps the third stage is the second again, with the states of the freeze."""
    _, _, diary = growing(0.8, hold=hold)
    stages = [round(f * P) for f in FOUR.fractions()]
    expected = [0] * 7 + [stages[0]] * 8 + [stages[1]] * 8 + [stages[2]] * 16 + [stages[1]] * 41
    assert diary.counts() == expected
    at_freeze, at_thaw = 7 + 16, 7 + 32
    stays = replace(FOUR, every=8, max_loss_increase=0.5, most=stages[1] / P, stages=2)  # the third never comes
    unfrozen = train(GradCovFreezeCallback(t0=8, k=stays, hold=hold), module=Minds(1.0), max_epochs=10)
    thawed = {n: mask & ~diary.masks[at_thaw][n] for n, mask in diary.masks[at_thaw - 1].items()}
    assert sum(int(t.sum()) for t in thawed.values()) == stages[2] - stages[1]
    for i, (n, mask) in enumerate(thawed.items()):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(diary.states[at_thaw][i][key][mask], unfrozen.states[at_freeze][i][key][mask])
        assert (diary.weights[-1][n] != diary.weights[at_thaw][n])[mask].all()


def test_everything_thaws_if_the_first_stage_raises_the_loss():
    callback, _, diary = growing(0.0)
    assert (diary.counts()[-1], max(diary.counts())) == (0, round(0.5 * P))
    assert (callback.frozen_fraction, callback.phase) == (0.0, "frozen")


class Validated(cases.Regression):
    """Logs a validation loss as it is told."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__(cases.mlp(), lambda p: torch.optim.Adam(p, lr=1e-3))
        self.losses = iter(losses)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.log("val/loss", next(self.losses))

    def val_dataloader(self) -> Any:
        return cases.loader(64)


def test_monitored_validation_loss_decides_about_growth():
    """One validation an epoch of 8 steps: 2.0 at t0, then 2.0 (grow), 3.0 twice (thaw)."""
    growth = replace(FOUR, monitor="val/loss", max_loss_increase=0.1)
    callback = GradCovFreezeCallback(t0=12, k=growth)
    diary = train(callback, module=Validated([2.0, 2.0, 3.0, 3.0, 9.0, 9.0]), max_epochs=6)
    a, b = (round(f * P) for f in growth.fractions()[:2])
    assert diary.counts() == [0] * 11 + [a] * 5 + [b] * 16 + [a] * 16  # a verdict takes effect with the next step


def test_monitor_that_is_not_logged_is_refused():
    callback = GradCovFreezeCallback(t0=8, k=Growth(monitor="loss/val"))
    with pytest.raises(MisconfigurationException, match=r"`monitor='loss/val'` was not logged.*val/loss was"):
        train(callback, module=Validated([1.0] * 9))


# t0 from the data --------------------------------------------------------------------------------------------------


class Plateau(cases.Regression):
    """A module whose loss is what it is told at each step; its gradients are its own."""

    def __init__(self, losses: Any) -> None:
        super().__init__(cases.mlp(), lambda p: torch.optim.Adam(p, lr=1e-3))
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss - loss.detach() + self.losses(self.global_step)


SETTLED = Settled(first=8, growth=1.5, overlap=0.1, improvement=0.05)  # looks at 8, 12, 18, 27, 41, 62, 93


@pytest.mark.parametrize(
    ("losses", "t0"),
    [
        (lambda t: 1.0, 12),  # flat from the start, and the order is clear
        (lambda t: 3.0 - t / 20 if t < 27 else 1.65, 62),  # flat from 27 on: 27 to 41 is the first look, 62 the next
        (lambda t: 2.0**-t, 80),  # never: half of 160 steps
    ],
    ids=["flat", "falling, then flat", "falling"],
)
def test_freeze_comes_when_order_and_loss_have_settled(losses, t0, tmp_path):
    """The log has what each check found."""
    callback, logger = GradCovFreezeCallback(t0=SETTLED, k=0.5), CSVLogger(tmp_path)
    diary = train(callback, module=Plateau(losses), max_epochs=20, logger=logger, log_every_n_steps=1)
    assert diary.counts().index(round(0.5 * P)) == t0 - 1
    rows = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    header, values = rows[0].split(","), [row.split(",") for row in rows[1:]]
    columns = {tag: [row[header.index(tag)] for row in values] for tag in header}
    looks = [s for s in (8, 12, 18, 27, 41, 62, 93) if s < t0] + [t0]
    seen = [i for i, v in enumerate(columns["gcfreeze/settling/settled"]) if v]
    assert [int(columns["step"][i]) + 1 for i in seen] == looks
    assert [float(v) for v in columns["gcfreeze/t0"] if v] == [t0]
    assert float(columns["gcfreeze/settling/overlap"][seen[-1]]) <= 1.0
    last = float(columns["gcfreeze/settling/settled"][seen[-1]])
    assert last == (t0 != 80)


def test_order_that_does_not_settle_freezes_at_max_t0():
    """Its scores are drawn anew at each check."""

    def restless(evidence: Any) -> Any:
        restless.seed += 1
        generator = torch.Generator().manual_seed(restless.seed)
        return {n: torch.rand(w.shape, generator=generator) for n, w in evidence.weights.items()}

    restless.seed = 0
    callback = GradCovFreezeCallback(t0=Settled(max_t0=50), k=0.5, order=restless)
    diary = train(callback, module=Plateau(lambda t: 1.0), max_epochs=20)
    assert diary.counts().index(round(0.5 * P)) == 49


def test_checks_before_the_first_observed_step_are_left_out():
    """Every ninth step is observed, and the first check comes after the fourth."""
    callback = GradCovFreezeCallback(t0=Settled(first=4, max_t0=20, overlap=0.9), k=0.5, every=9)
    assert train(callback).counts().index(round(0.5 * P)) == 19


def test_t0_auto_without_an_end_of_training_needs_max_t0():
    with pytest.raises(MisconfigurationException, match="this training has no end, or a loader without a length"):
        cases.trainer(max_epochs=-1, callbacks=GradCovFreezeCallback(t0="auto", k=0.5)).fit(
            cases.Regression(cases.mlp()), cases.loader()
        )


def test_training_that_ends_before_max_t0_is_warned_of():
    callback = GradCovFreezeCallback(t0=Settled(max_t0=100), k=0.5)
    with pytest.warns(
        UserWarning, match="Nothing was frozen: training ended after 32 optimizer steps, before `t0=100`"
    ):
        train_only(callback)


def train_only(callback: GradCovFreezeCallback) -> None:
    cases.trainer(callbacks=callback, max_epochs=4).fit(cases.Regression(cases.mlp()), cases.loader())


def test_t0_auto_and_k_auto_freeze_at_least_half():
    """With the defaults, on a task that converges."""
    callback = GradCovFreezeCallback(t0="auto", k="auto")
    diary = train(callback, max_epochs=120)
    counts = diary.counts()
    assert counts[31] == 0 < counts[-1]
    assert callback.frozen_fraction >= 0.5


# All of them -------------------------------------------------------------------------------------------------------

PLANS: dict[str, dict[str, Any]] = {
    "monotone": {"schedule": FreezeSchedule([(4, 0.3), (9, 0.6), (13, 0.8)])},
    "compact": {"schedule": [(4, 0.3), (9, 0.6), (13, 0.8)], "order": "movement"},
    "compact everywhere": {"schedule": [(4, 0.5), (9, 0.7), (13, 0.9)], "order": "movement", "include": "*.weight"},
    "thawing": {"schedule": FreezeSchedule([(4, 0.8), (9, 0.3), (13, 0.5)], monotone=False)},
    "settling": {"t0": Settled(first=2, growth=1.3, overlap=0.0, improvement=0.9), "k": 0.5},
    "growing": {"t0": 5, "k": Growth(every=3, max_loss_increase=0.5)},
    "too much": {"t0": 5, "k": Growth(every=2, max_loss_increase=1e-6)},
    "both": {"t0": Settled(first=2, growth=1.3, overlap=0.9, improvement=0.01), "k": Growth(every=2)},
}


@pytest.mark.parametrize("hold", ["auto", "restore"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_run_resumed_at_any_step_equals_the_unbroken_run(tmp_path, plan, hold):
    """To the bit: weights, optimizer, statistics, masks, and what was kept of the optimizer."""
    arguments = {**plan, "hold": hold}
    unbroken = run(GradCovFreezeCallback(**arguments), DropoutByStep())
    assert unbroken["callback"]["plan"]["t0"] is not None
    for after in (3, 6, 10, 14):
        cases.assert_identical(interrupted(tmp_path / "run.ckpt", after, arguments), unbroken)


def test_resuming_with_another_schedule_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(**PLANS["monotone"]), SaveAndStop(tmp_path / "run.ckpt", 6))
    other = GradCovFreezeCallback(schedule=FreezeSchedule([(4, 0.3), (9, 0.7)]))
    with pytest.raises(MisconfigurationException, match="saved with other arguments of the callback: schedule="):
        run(other, ckpt=tmp_path / "run.ckpt")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "Pass `t0` and `k`, a `schedule`, or `masks`; got t0=None and k=None"),
        ({"t0": 5}, ValueError, "Pass `t0` and `k`, a `schedule`, or `masks`; got t0=5 and k=None"),
        ({"t0": 5, "schedule": FreezeSchedule([(5, 1)])}, ValueError, "leave out `t0` and `k`, got t0=5"),
        (
            {"schedule": "auto"},
            TypeError,
            r"`schedule` must be a FreezeSchedule or a list of pairs \(t, k\), got 'auto'",
        ),
        ({"t0": 5, "k": 0.5, "max_t0": 9}, ValueError, "`max_t0=9` needs `t0='auto'`, got t0=5"),
        ({"t0": 5, "k": 0.5, "monitor": "loss"}, ValueError, "`monitor='loss'` needs `k='auto'`, got k=0.5"),
        ({"t0": 5, "k": "all"}, TypeError, "`k` must be an int, a float.*'auto', a Growth or a Budget, got 'all'"),
        ({"t0": "soon", "k": 0.5}, TypeError, "'auto' or a Settled, got 'soon'"),
        ({"t0": 1.5, "k": 0.5}, TypeError, r"got 1.5 \(float\): a float is a fraction of the planned optimizer steps"),
        ({"t0": math.nan, "k": 0.5}, TypeError, r"got nan \(float\): a float is a fraction"),
        ({"t0": Settled(max_t0=4), "k": 0.5, "every": 5}, ValueError, "`every=5` leaves no step to observe"),
        (
            {"schedule": FreezeSchedule([(5, 0.5), (7, 0.6)]), "every": 4},
            ValueError,
            "`every=4` leaves no step to observe among those from t=5 to t=7",
        ),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        GradCovFreezeCallback(**arguments)

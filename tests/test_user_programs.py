"""User code around a training step does what it would do without the callback: see `user_programs` for the cases.

The reference is a fit with `PlainFreeze` in place of the callback, with the same masks, drawn by NumPy.
"""

from functools import cache
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.testing import assert_close

from lightning_gcfreeze import Evidence, GradCovFreezeCallback
from tests import cases, user_programs
from tests.oracles.freezing import PlainFreeze
from tests.user_programs import CHANGES, HARMLESS, READS, T0, Case, Setup

Weights = dict[str, Tensor]
WHOLE = {"network.0.weight", "network.0.bias"}  # frozen as a whole under every granularity
LIVE = {"network.4.weight", "network.6.bias"}  # and live as a whole

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*validation_step.*",
    "ignore:.*does not have many workers",
    "ignore:.*other values of frozen elements",  # of code that writes to weights after the last step
)


def each_case(cases_by_name: dict[str, Case]) -> pytest.MarkDecorator:
    """Run a test with each case twice: by element, and by row or by tensor in turn.

    A granularity decides only which elements the masks hold. Under each of them some tensors freeze as a whole, and
    others not at all.
    """
    pairs = [(name, "element") for name in cases_by_name]
    pairs += [(name, ("row", "tensor")[i % 2]) for i, name in enumerate(cases_by_name)]
    return pytest.mark.parametrize(("name", "granularity"), pairs)


@cache
def masks(granularity: str) -> Weights:
    """Return drawn masks of single elements, rows or tensors."""
    rng, drawn = np.random.default_rng(3), {}
    for name, p in user_programs.Net().named_parameters():
        if name in WHOLE | LIVE:
            frozen = np.full(p.shape, name in WHOLE)
        elif granularity == "tensor":
            frozen = np.full(p.shape, name == "network.2.bias")
        elif granularity == "row":
            frozen = np.broadcast_to((rng.random(len(p)) < 0.6).reshape(-1, *[1] * (p.dim() - 1)), p.shape)
        else:
            frozen = rng.random(p.shape) < 0.6
        drawn[name] = torch.from_numpy(frozen.copy())
    return drawn


def ours(granularity: Any, hold: Literal["auto", "compact", "restore"]) -> GradCovFreezeCallback:
    """Return a callback that freezes what `masks` returns."""
    drawn = masks(granularity)

    def drawn_before(evidence: Evidence) -> Weights:
        return {name: (~drawn[name]).double() for name in evidence.weights}

    k = sum(int(mask.sum()) for mask in drawn.values())
    return GradCovFreezeCallback(t0=T0, k=k, order=drawn_before, granularity=granularity, hold=hold)


class TakeOut(pl.Callback):
    """Removes the user's code after `T0` steps, and may put something else in its place."""

    def __init__(self, setup: Setup, case: Case) -> None:
        self.setup_of_fit, self.case = setup, case

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == T0 and self.setup_of_fit.undo:
            for undo in self.setup_of_fit.undo:
                undo()
            self.setup_of_fit.undo = []
            if self.case.without:
                self.case.without(self.setup_of_fit)


class CountState(pl.Callback):
    """Counts the elements that the optimizer has a momentum of: fewer than the module has, when it is compact."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.count = sum(v.numel() for of_p in trainer.optimizers[0].state.values() for v in of_p.values())


def fit(freeze: pl.Callback, setup: Setup, case: Case, first: bool, *more: pl.Callback) -> Weights:
    """Return the weights after two epochs of six batches; the user's callbacks come before or after ours."""
    mine = setup.callbacks
    trainer = cases.trainer(
        callbacks=[*mine, freeze, *more] if first else [freeze, *mine, *more],
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        val_check_interval=3 if setup.validation else None,
        num_sanity_val_steps=0,
        **setup.options,
    )
    data = cases.loader(samples=48, dtype=torch.float64)
    trainer.fit(setup.module, data, data if setup.validation else None)
    return {name: p.detach().clone() for name, p in setup.module.named_parameters()}


def planted(case: Case) -> Setup:
    setup = Setup()
    case.plant(setup)
    return setup


@cache
def reference(kind: str, name: str, granularity: str, first: bool, until_t0: bool = False) -> Weights:
    """Return the weights of a fit that freezes the plain way; with the user's code until the end, or until t0."""
    case = {"changes": CHANGES, "reads": READS, "harmless": HARMLESS}[kind][name]
    setup = planted(case)
    more = [TakeOut(setup, case)] if until_t0 else []
    return fit(PlainFreeze(T0, masks(granularity)), setup, case, first, *more)


def assert_ends_alike(ended: Weights, expected: Weights, granularity: str) -> None:
    """Fail unless frozen elements are equal to the bit, and live ones to rounding."""
    for name, frozen in masks(granularity).items():
        assert torch.equal(ended[name][frozen], expected[name][frozen]), f"frozen elements of {name} differ"
        assert_close(ended[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def assert_ends_elsewhere(one: Weights, other: Weights, granularity: str) -> None:
    """Fail unless live elements differ by much more than rounding."""
    difference = max(
        float((one[n] - other[n])[~frozen].abs().max())
        for n, frozen in masks(granularity).items()
        if n not in WHOLE and not frozen.all()
    )
    assert difference > 1e-5, f"the code hardly matters: live elements differ by {difference}"


@pytest.mark.parametrize("hold", ["auto", "restore"])
@each_case(CHANGES)
def test_code_that_changes_training_ends_it_as_in_the_plain_reference(name, hold, granularity):
    """With the user's callbacks before and after ours. Without the code from t0 on, the fit ends elsewhere."""
    case = CHANGES[name]
    for first in (False, True) if planted(case).callbacks else (False,):
        expected = reference("changes", name, granularity, first)
        ended = fit(ours(granularity, hold), planted(case), case, first)
        assert_ends_alike(ended, expected, granularity)
        assert_ends_elsewhere(expected, reference("changes", name, granularity, first, until_t0=True), granularity)


@each_case(CHANGES)
def test_code_that_changes_training_works_or_is_refused_by_name_when_compact(name, granularity):
    """The error comes before the first step, and names the hook and its owner."""
    case, start = CHANGES[name], user_programs.Net().state_dict()
    for first in (False, True) if planted(case).callbacks else (False,):
        setup = planted(case)
        refusal = None
        try:
            ended = fit(ours(granularity, "compact"), setup, case, first)
        except MisconfigurationException as error:
            refusal = str(error)
        if refusal is None:
            assert_ends_alike(ended, reference("changes", name, granularity, first), granularity)
        else:
            assert [word for word in case.told if word not in refusal] == [], refusal
            cases.assert_identical(dict(setup.module.state_dict()), dict(start))


@each_case(READS)
def test_code_that_reads_gradients_reads_the_same_under_auto_and_restore(name, granularity):
    """To the bit, and there is something to read after t0."""
    case = READS[name]
    for first in (False, True) if planted(case).callbacks else (False,):
        seen = {}
        for hold in ("auto", "restore"):
            setup = planted(case)
            ended = fit(ours(granularity, hold), setup, case, first)
            assert_ends_alike(ended, reference("reads", name, granularity, first), granularity)
            seen[hold] = setup.seen
        cases.assert_identical(seen["auto"], seen["restore"])
        late = seen["restore"][len(seen["restore"]) // 2 :]
        assert any(grad is not None and grad.any() for reading in late for grad in reading)


@each_case(READS)
def test_code_that_reads_gradients_sees_those_of_live_elements(name, granularity):
    """Under "restore" it reads of live elements what it reads in the plain reference."""
    case, live = READS[name], [~frozen for frozen in masks(granularity).values()]
    ours_read, plain_read = planted(case), planted(case)
    fit(ours(granularity, "restore"), ours_read, case, True)
    fit(PlainFreeze(T0, masks(granularity)), plain_read, case, True)
    if name == "hooks-on-tensors":  # one gradient a reading, in the order in which they come
        pytest.skip("frozen tensors need not come")
    compared, late = 0, len(plain_read.seen) // 2  # while observing, a step may be run once more
    for mine, plain in zip(ours_read.seen[-late:], plain_read.seen[-late:], strict=True):
        for a, b, mask in zip(mine, plain, live, strict=True):
            if mask.any():
                assert (a is None) == (b is None)
                if a is not None:
                    assert_close(a[mask], b[mask], rtol=1e-9, atol=1e-11)
                    compared += 1
    assert compared


@each_case(HARMLESS)
def test_code_that_does_not_touch_gradients_leaves_the_hold_compact(name, granularity):
    """Under "auto" the optimizer's state is that of the live elements only, as under an explicit "compact"."""
    case = HARMLESS[name]
    expected = reference("harmless", name, granularity, False)
    live = sum(int((~frozen).sum()) for frozen in masks(granularity).values())
    for hold in ("auto", "compact"):
        count = CountState()
        ended = fit(ours(granularity, hold), planted(case), case, False, count)
        assert_ends_alike(ended, expected, granularity)
        assert count.count == live

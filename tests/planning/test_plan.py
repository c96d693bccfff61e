"""What a run decides, and what it listens to, without a run."""

import pytest
import torch

from lightning_gcfreeze import Growth, Settled
from lightning_gcfreeze.distributed import SINGLE_PROCESS
from lightning_gcfreeze.planning.plan import Plan

FLAT = Growth(first=0.5, most=0.9, stages=3)


def hear(plan: Plan, losses: dict[int, float]) -> None:
    """Training losses by step."""
    for step, loss in losses.items():
        if plan.listens(step):
            plan.hear(torch.tensor(loss))


def test_with_a_given_t0_the_reference_is_the_loss_of_the_last_tenth_before_it():
    """Twenty steps at least."""
    for t0, every in ((100, 20), (400, 40)):
        plan = Plan([(t0, FLAT)], "1/t")
        plan.begin(lambda: 1000)
        hear(plan, {step: 1.0 if step > t0 - every else 100.0 for step in range(1, t0 + 1)})
        plan.decided(t0, SINGLE_PROCESS)
        assert plan.growing is not None
        assert plan.growing.reference == (1.0, 0.0, every)
        assert plan.growing.every == every
        assert plan.news["gcfreeze/t0"] == t0


def test_with_settling_the_reference_is_the_loss_since_the_last_look():
    plan = Plan([(Settled(first=4, growth=2.0, max_t0=100), FLAT)], "1/t")
    plan.begin(lambda: 1000)
    hear(plan, dict.fromkeys(range(1, 5), 9.0))
    moved = torch.ones(50, dtype=torch.bool)
    plan.look(torch.rand(50), moved, 4, 0.5, SINGLE_PROCESS)
    hear(plan, dict.fromkeys(range(5, 9), 3.0))
    plan.look(torch.rand(50), moved, 8, 0.5, SINGLE_PROCESS)
    plan.decided(8, SINGLE_PROCESS)
    assert plan.growing is not None
    assert plan.growing.reference == (3.0, 0.0, 4)
    assert plan.news["gcfreeze/settling/improvement"] == pytest.approx(2.0)


def test_it_listens_to_what_matters_alone():
    """Nothing with both given; a monitored loss is not the training loss; nothing any more when all is settled."""
    given, monitored, growing = (
        Plan([(10, 0.5)], "1/t"),
        Plan([(10, Growth(monitor="x"))], "1/t"),
        Plan([(30, FLAT)], "1/t"),
    )
    assert [plan.listens(10) for plan in (given, monitored, growing)] == [False, False, False]
    assert growing.listens(11)
    growing.decided(30, SINGLE_PROCESS)
    heard = []
    for step in range(31, 200):
        heard += [step] * growing.listens(step)
        hear(growing, {step: 1.0})
        growing.judge(step, SINGLE_PROCESS)
    assert heard == list(range(31, 31 + 4 * 20))  # the first mean is the reference: none came before
    assert not growing.unfinished


def test_decisions_are_due_at_their_steps_alone():
    plan = Plan([(3, 5), (7, 9)], "1/t")
    due = []
    for step in range(1, 12):
        if plan.may_decide_after(step):
            due.append((step, plan.latest))
            plan.decided(step, SINGLE_PROCESS)
    assert due == [(3, 3), (7, 7)]
    assert (plan.t0, plan.k, plan.observes) == (3, 9, False)


def test_half_of_the_planned_steps_is_the_latest():
    plan = Plan([(Settled(), 0.5)], "1/t")
    assert "has no end" in (plan.begin(lambda: float("inf")) or "")
    assert plan.begin(lambda: 301) is None
    assert plan.latest == 150


def test_the_planned_steps_are_asked_for_only_if_they_matter():
    """Lightning cannot tell them where accumulation changes from epoch to epoch."""

    def unknown() -> float:
        raise AssertionError

    for t0 in (10, Settled(max_t0=20)):
        assert Plan([(t0, 0.5)], "1/t").begin(unknown) is None


def test_a_monitored_loss_that_is_nan_is_none_before_the_freeze_and_too_much_after_it():
    """And two in a row thaw."""
    plan = Plan([(10, Growth(first=0.5, monitor="x"))], "1/t")
    plan.hear_of_validation(2.0)
    plan.hear_of_validation(float("nan"))
    plan.decided(10, SINGLE_PROCESS)
    assert plan.growing is not None
    assert plan.growing.reference == (2.0, 0.0, 1)
    verdicts = []
    for step in (11, 12):
        plan.hear_of_validation(float("nan"))
        verdicts.append(plan.judge(step, SINGLE_PROCESS))
    assert verdicts == ["wait", "thaw"]


def test_a_trainer_that_says_minus_one_has_no_end():
    """Lightning's estimate with a loader of unknown length."""
    assert "has no end" in (Plan([(Settled(), 0.5)], "1/t").begin(lambda: -1) or "")

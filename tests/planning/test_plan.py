"""When a plan decides, and which losses it reads, without a run."""

import math

import pytest
import torch

from lightning_gcfreeze import FreezeSchedule, Growth, Settled
from lightning_gcfreeze.distributed import SINGLE_PROCESS
from lightning_gcfreeze.planning.arguments import check_every, decisions_from_arguments
from lightning_gcfreeze.planning.plan import Plan

FLAT = Growth(first=0.5, most=0.9, stages=3, forecast=False)


def record(plan: Plan, losses: dict[int, float]) -> None:
    """Record training losses by step, where the plan needs them."""
    for step, loss in losses.items():
        if plan.needs_loss(step):
            plan.record_loss(torch.tensor(loss), step)
        plan.end_step(step, SINGLE_PROCESS)


def test_reference_with_a_given_t0_is_the_loss_of_the_last_tenth_before_it():
    """Of twenty steps at least."""
    for t0, every in ((100, 20), (400, 40)):
        plan = Plan([(t0, FLAT)], "1/t")
        plan.start(lambda: 1000)
        record(plan, {step: 1.0 if step > t0 - every else 100.0 for step in range(1, t0 + 1)})
        plan.record_decision(t0, SINGLE_PROCESS)
        assert plan.growing is not None
        assert plan.growing.reference == (1.0, 0.0, every)
        assert plan.growing.every == every
        assert plan.metrics["gcfreeze/t0"] == t0


def test_reference_with_settling_is_the_loss_since_the_last_check():
    plan = Plan([(Settled(first=4, growth=2.0, max_t0=100), FLAT)], "1/t")
    plan.start(lambda: 1000)
    record(plan, dict.fromkeys(range(1, 5), 9.0))
    moved = torch.ones(50, dtype=torch.bool)
    plan.check_settled(torch.rand(50), moved, 4, 0.5, SINGLE_PROCESS)
    record(plan, dict.fromkeys(range(5, 9), 3.0))
    plan.check_settled(torch.rand(50), moved, 8, 0.5, SINGLE_PROCESS)
    plan.record_decision(8, SINGLE_PROCESS)
    assert plan.growing is not None
    assert plan.growing.reference == (3.0, 0.0, 4)
    assert plan.metrics["gcfreeze/settling/improvement"] == pytest.approx(2.0)


def test_training_loss_is_needed_only_while_a_decision_depends_on_it():
    """Not if t0 and k are given, and not any more once k has stopped growing."""
    given, monitored, growing = (
        Plan([(10, 0.5)], "1/t"),
        Plan([(10, Growth(monitor="x"))], "1/t"),
        Plan([(30, FLAT)], "1/t"),
    )
    assert [plan.needs_loss(10) for plan in (given, monitored, growing)] == [False, True, True]
    growing.record_decision(30, SINGLE_PROCESS)
    needed = []
    for step in range(31, 200):
        needed += [step] if growing.needs_loss(step) else []
        record(growing, {step: 1.0})
        growing.judge_stage(step, SINGLE_PROCESS)
    assert needed == list(range(31, 31 + 4 * 20))  # the first mean is the reference: none came before
    assert not growing.masks_may_change


def test_decisions_of_a_schedule_are_due_at_their_steps_only():
    plan = Plan([(3, 5), (7, 9)], "1/t")
    due = []
    for step in range(1, 12):
        if plan.is_decision_step(step):
            due.append((step, plan.next_deadline))
            plan.record_decision(step, SINGLE_PROCESS)
    assert due == [(3, 3), (7, 7)]
    assert (plan.t0, plan.k, plan.has_next_decision, plan.n_decisions) == (3, 9, False, 2)


@pytest.mark.parametrize("unknown", [float("inf"), float("nan"), -1])
def test_plan_without_planned_steps_does_not_start_without_max_t0(unknown):
    """Lightning estimates -1 with a loader of unknown length."""
    plan = Plan([(Settled(), 0.5)], "1/t")
    assert "has no end" in (plan.start(lambda: unknown) or "")
    assert plan.start(lambda: 301) is None
    assert plan.next_deadline == 150  # half of them


def test_planned_steps_are_not_asked_for_if_they_do_not_matter():
    """Lightning cannot estimate them if accumulation changes from epoch to epoch."""

    def unknown() -> float:
        raise AssertionError

    for t0 in (10, Settled(max_t0=20)):
        assert Plan([(t0, 0.5)], "1/t").start(unknown) is None


def test_monitored_loss_that_is_nan_is_ignored_before_the_freeze_and_too_high_after_it():
    """Two in a row thaw the stage."""
    plan = Plan([(10, Growth(first=0.5, monitor="x", forecast=False))], "1/t")
    plan.record_validation_loss(2.0, 5)
    plan.record_validation_loss(float("nan"), 10)
    plan.record_decision(10, SINGLE_PROCESS)
    assert plan.growing is not None
    assert plan.growing.reference == (2.0, 0.0, 1)
    verdicts = []
    for step in (11, 12):
        plan.record_validation_loss(float("nan"), step)
        verdicts.append(plan.judge_stage(step, SINGLE_PROCESS))
    assert verdicts == ["wait", "thaw"]


@pytest.mark.parametrize("decision", [(Settled(first=3, growth=1.4, max_t0=40), Growth(every=4)), (20, FLAT)], ids=str)
def test_plan_resumed_from_a_state_dict_goes_on_as_the_unbroken_one(decision):
    """Settling, decision and stages, broken off at every tenth step."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 50, generator=generator).cumsum(0)
    losses = 1 + 0.01 * torch.rand(60, generator=generator)

    def go_on(plan: Plan, steps: range) -> list[object]:
        found: list[object] = []
        for step in steps:
            if plan.needs_loss(step):
                plan.record_loss(losses[step], step)
            plan.end_step(step, SINGLE_PROCESS)
            if plan.is_decision_step(step):
                settled = True
                if plan.settling:
                    moved = torch.ones(50, dtype=torch.bool)
                    settled = plan.check_settled(scores[step], moved, step, 0.5, SINGLE_PROCESS).settled
                if settled or step >= plan.next_deadline:
                    plan.record_decision(step, SINGLE_PROCESS)
            else:
                found.append(plan.judge_stage(step, SINGLE_PROCESS))
            found.append((plan.k, plan.t0, plan.n_decisions, plan.masks_may_change))
        return found

    whole = Plan([decision], "1/t")
    whole.start(lambda: 60)
    expected = go_on(whole, range(60))
    assert whole.n_decisions == 1
    for cut in range(0, 60, 10):
        broken, resumed = Plan([decision], "1/t"), Plan([decision], "1/t")
        broken.start(lambda: 60)
        first = go_on(broken, range(cut))
        resumed.load_state_dict(broken.state_dict())
        resumed.start(lambda: 60)
        assert first + go_on(resumed, range(cut, 60)) == expected


def test_arguments_become_decisions():
    """With "auto" for a `Settled` or a `Growth` with its defaults; a list of pairs is a monotone schedule."""
    assert decisions_from_arguments("auto", "auto", None) == (((Settled(), Growth()),), True)
    assert decisions_from_arguments(5, 0.5, None) == (((5, 0.5),), True)
    assert decisions_from_arguments(None, None, [[5, 0.5], (9, 0.7)]) == (((5, 0.5), (9, 0.7)), True)
    thawing = FreezeSchedule([(5, 7), (9, 3)], monotone=False)
    assert decisions_from_arguments(None, None, thawing) == (((5, 7), (9, 3)), False)


@pytest.mark.parametrize(
    ("t0", "k", "schedule", "error", "message"),
    [
        (None, None, None, ValueError, "Pass `t0` and `k`, a `schedule`, or `masks`; got t0=None and k=None"),
        (5, None, None, ValueError, "Pass `t0` and `k`, a `schedule`, or `masks`; got t0=5 and k=None"),
        (5, None, [(5, 1)], ValueError, "leave out `t0` and `k`, got t0=5"),
        (None, None, "auto", TypeError, r"`schedule` must be a FreezeSchedule or a list of pairs \(t, k\), got 'auto'"),
        (None, None, 5, TypeError, r"must be a FreezeSchedule or a list of pairs \(t, k\), got 5"),
        (None, None, [5], TypeError, r"`stages\[0\]` must be a pair \(t, k\), got 5"),
        (5, "all", None, TypeError, "`k` must be an int, a float.*'auto', a Growth or a Budget, got 'all'"),
        ("soon", 0.5, None, TypeError, "'auto' or a Settled, got 'soon'"),
        (0, 0.5, None, ValueError, "`t0` must be at least 1, got 0"),
        (5, 1.5, None, ValueError, r"`k` as a float is a fraction and must lie in \[0, 1\], got 1.5"),
    ],
)
def test_arguments_that_are_no_decisions_are_refused(t0, k, schedule, error, message):
    with pytest.raises(error, match=message):
        decisions_from_arguments(t0, k, schedule)


def test_every_that_leaves_no_step_to_observe_before_a_decision_is_refused():
    check_every(5, [(5, 0.5), (10, 0.6)])
    check_every(100, [(Settled(), 0.5)])  # not known yet
    with pytest.raises(ValueError, match="`every=5` leaves no step to observe among the first `t0=4`"):
        check_every(5, [(Settled(max_t0=4), 0.5)])
    with pytest.raises(ValueError, match="`every=4` leaves no step to observe among those from t=5 to t=7"):
        check_every(4, [(5, 0.5), (7, 0.6)])


# Forecasts ---------------------------------------------------------------------------------------------------------


def grown(losses: list[float], growth: Growth, t0: int, planned: float) -> list[tuple[int, float]]:
    """The steps at which k changes, with the fraction, in a run with these losses."""
    plan, changes = Plan([(t0, growth)], "1/t"), list[tuple[int, float]]()
    plan.start(lambda: planned)
    for step, loss in enumerate(losses, start=1):
        record(plan, {step: loss})
        before = plan.growing.fraction if plan.growing else 0.0
        if step == t0:
            plan.record_decision(step, SINGLE_PROCESS)
        else:
            plan.judge_stage(step, SINGLE_PROCESS)
        if plan.growing and plan.growing.fraction != before:
            changes.append((step, round(plan.growing.fraction, 3)))
    return changes


def straight(steps: int, slope: float) -> list[float]:
    return [10 - slope * math.log(t) for t in range(1, steps + 1)]


def test_stages_come_once_what_they_forgo_of_a_falling_loss_is_allowed():
    """A loss that is straight in log t falls by slope · log(T/t); the oracle is that formula."""
    growth, slope, planned = Growth(first=0.5, most=0.9, stages=2, every=2, max_loss_increase=0.01), 1.0, 1000
    changes = grown(straight(planned, slope), growth, 200, planned)
    assert [fraction for _, fraction in changes] == [0.5, 0.9]

    def forgone(step: int, share: float, left: float = 1.0) -> float:
        return share * slope * math.log(planned / step) / left / (10 - slope * math.log(planned))

    first, second = (step for step, _ in changes)
    half, most = 0.5**1.5, 0.9**1.5
    own = 0.01 * half / most  # the first stage's part
    assert forgone(first, half) <= own * 1.03
    assert forgone(first - 2, half) > own * 0.97  # not a judgement earlier
    spent = forgone(first, half)
    assert spent + forgone(second, most - half, 1 - half) <= 0.01 * 1.03
    assert spent + forgone(second - 2, most - half, 1 - half) > 0.01 * 0.97


def test_flat_loss_freezes_at_t0_and_grows_at_once():
    growth = Growth(first=0.5, most=0.9, stages=3, every=10)
    assert grown([5.0] * 300, growth, 100, 1000) == [(100, 0.5), (110, 0.776), (120, 0.9)]


def test_falling_loss_freezes_nothing_long_before_the_end_and_without_a_forecast_it_does():
    losses = straight(300, 1.0)
    assert grown(losses, Growth(every=10), 100, 1000) == []
    assert grown(losses, Growth(every=10, forecast=False), 100, 1000)[0] == (100, 0.6)


def test_larger_increase_that_is_allowed_freezes_earlier():
    losses = straight(1000, 1.0)
    firsts = [grown(losses, Growth(allowed, every=10), 100, 1000)[0][0] for allowed in (0.3, 0.03, 0.01)]
    assert firsts == sorted(set(firsts))


def test_end_that_is_not_known_is_taken_for_as_many_steps_again():
    """With 1,000 steps planned the loss has time left at step 400, with 420 it has not."""
    losses = straight(410, 1.0)
    assert grown(losses, Growth(0.03, every=10), 400, math.inf) == grown(losses, Growth(0.03, every=10), 400, 800) == []
    assert grown(losses, Growth(0.03, every=10), 400, 412) == [(400, 0.6), (410, 0.8)]


def test_training_loss_far_below_the_first_counts_as_3_percent_of_it():
    """It falls from 10 to 0.001, and on to a half of that: 2 % of 0.3 is more. Monitored, it counts as it is."""
    losses = [10.0] * 10 + [1e-3 * (100 / t) for t in range(11, 301)]
    assert grown(losses, Growth(every=10), 150, 300)[0] == (150, 0.6)
    plan = Plan([(150, Growth(monitor="x"))], "1/t")
    plan.start(lambda: 300)
    for step in range(10, 151, 10):
        plan.record_validation_loss(losses[step - 1], step)
    plan.record_decision(150, SINGLE_PROCESS)
    assert plan.k == 0.0


@pytest.mark.parametrize("training", ["flat", "falling"])
def test_monitored_loss_is_forecast_from_the_third_validation_on(training):
    """Before, the training loss tells; without either nothing freezes."""
    losses = [5.0] * 100 if training == "flat" else straight(100, 1.0)
    for validations, k in ((2, 0.6 if training == "flat" else 0.0), (3, 0.0), (0, None)):
        plan = Plan([(100, Growth(monitor="x"))], "1/t")
        plan.start(lambda: 1000)
        for i in range(validations):
            plan.record_validation_loss(5.0 - i, 70 + 10 * i)
        record(plan, {step: losses[step - 1] for step in range(1, 101)} if k is not None else {})
        plan.record_decision(100, SINGLE_PROCESS)
        assert plan.k == (k or 0.0)


def test_loss_while_waiting_does_not_raise_the_reference():
    """It is the lowest since t0, however the loss rises, and what is not finite is left out."""
    plan = Plan([(100, Growth(monitor="x"))], "1/t")
    plan.start(lambda: 10**6)
    record(plan, {step: loss for step, loss in enumerate(straight(140, 1.0), start=1) if step <= 100})
    plan.record_decision(100, SINGLE_PROCESS)
    for step, loss in ((110, 4.0), (120, 9.0), (130, math.inf), (140, math.nan)):
        record(plan, {step: straight(140, 1.0)[step - 1]})
        plan.record_validation_loss(loss, step)
        assert plan.judge_stage(step, SINGLE_PROCESS) == "wait"
    assert plan.growing is not None
    assert plan.growing.reference.value == 4.0

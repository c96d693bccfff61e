"""Stages that grow as long as the loss does not mind: each verdict of a scripted run of means."""

import math
from dataclasses import replace

import pytest

from lightning_gcfreeze import Growth
from lightning_gcfreeze.planning.growing import GrowthState
from lightning_gcfreeze.planning.losses import LossMean

FOUR = Growth(first=0.5, most=0.95, stages=4)


def mean(value, error=0.001, of=10):
    return LossMean(value, error, of)


def verdicts(growing, *losses):
    return [growing.take(loss if isinstance(loss, LossMean) else mean(loss)) for loss in losses]


def test_fractions_are_spaced_geometrically_or_linearly():
    """By the live fraction: 0.5, 0.25, 0.125 in equal ratios."""
    assert Growth(first=0.5, most=0.875, stages=3).fractions() == pytest.approx([0.5, 0.75, 0.875])
    linear = Growth(first=0.2, most=0.8, stages=4, spacing="linear")
    assert linear.fractions() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert Growth(first=0.3, most=0.9, stages=1).fractions() == pytest.approx([0.3])


def test_a_loss_that_does_not_mind_lets_it_grow_to_the_last_stage():
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, 1.0, 0.995, 1.001, 1.0) == ["grow", "grow", "grow", "stay"]
    assert growing.done
    assert growing.fraction == pytest.approx(0.95)


def test_a_stage_that_costs_too_much_thaws_but_not_at_the_first_sign():
    """Once is noise; twice in a row is not. What froze before stays frozen."""
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, 1.0, 1.1) == ["grow", "wait"]
    assert growing.fraction == pytest.approx(FOUR.fractions()[1])
    assert verdicts(growing, 1.1) == ["thaw"]
    assert growing.done
    assert growing.fraction == pytest.approx(0.5)


def test_a_single_outlier_is_forgiven():
    growing = GrowthState(replace(FOUR, max_loss_increase=0.1), 20, mean(1.0))
    assert verdicts(growing, 1.12, 0.9) == ["wait", "grow"]


def test_the_first_stage_may_thaw_too():
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, 2.0, 2.0) == ["wait", "thaw"]
    assert growing.fraction == 0.0


def test_noise_decides_for_nothing_but_to_stay_or_by_the_mean_of_all():
    """A standard error of 5 % against 1 % allowed: three means, and then what their mean says."""
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, *[mean(1.02, 0.05)] * 3) == ["wait", "wait", "stay"]
    assert growing.done
    assert growing.fraction == pytest.approx(0.5)
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, *[mean(1.005, 0.05)] * 3) == ["wait", "wait", "grow"]
    assert growing.increase == pytest.approx(0.005)
    assert growing.noise == pytest.approx(math.hypot(0.05 / math.sqrt(3), 0.001))


def test_patience_does_not_overrule_a_cost_that_shows():
    """Above at the third mean for the first time: a fourth decides."""
    growing = GrowthState(replace(FOUR, max_loss_increase=0.1), 20, mean(1.0, 0.02))
    found = verdicts(growing, mean(1.09, 0.02), mean(1.115, 0.02), mean(1.6, 0.02), mean(1.6, 0.02))
    assert found == ["wait", "wait", "wait", "thaw"]


def test_the_reference_follows_a_loss_that_falls_and_none_that_rises():
    """Creeping up by 0.6 % a stage is found out; falling first makes the same loss too much later."""
    growing = GrowthState(FOUR, 20, mean(1.0, 0.0))
    assert verdicts(growing, mean(1.006, 0.0), mean(1.012, 0.0), mean(1.012, 0.0)) == ["grow", "wait", "thaw"]
    growing = GrowthState(FOUR, 20, mean(1.0, 0.0))
    assert verdicts(growing, mean(0.9, 0.0), mean(0.95, 0.0), mean(0.95, 0.0)) == ["grow", "wait", "thaw"]


def test_without_a_reference_the_first_mean_is_it_and_means_of_nothing_are_nothing():
    growing = GrowthState(FOUR, 20, LossMean())
    assert verdicts(growing, LossMean(), 5.0, 5.0, LossMean()) == ["wait", "wait", "grow", "wait"]


def test_a_negative_loss_increases_towards_zero():
    growing = GrowthState(FOUR, 20, mean(-2.0))
    assert verdicts(growing, -2.5, -2.0, -2.0) == ["grow", "wait", "thaw"]


def test_a_state_goes_on():
    losses = [1.0, 1.1, mean(1.005, 0.05), mean(1.005, 0.05), mean(1.005, 0.05), 1.0, 1.0]
    whole = GrowthState(FOUR, 20, mean(1.0))
    expected = verdicts(whole, *losses)
    for cut in range(len(losses)):
        broken = GrowthState(FOUR, 20, mean(1.0))
        first = verdicts(broken, *losses[:cut])
        resumed = GrowthState.from_state_dict(FOUR, broken.state_dict())
        assert first + verdicts(resumed, *losses[cut:]) == expected
        assert (resumed.fraction, resumed.done) == (whole.fraction, whole.done)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_loss_increase": 0.0}, ValueError, "`max_loss_increase` must be above 0, got 0.0"),
        ({"monitor": 3}, TypeError, "`monitor` must be the name of a logged loss, or None, got 3"),
        ({"first": 1.0}, ValueError, "`first` must be above 0 and below 1, got 1.0"),
        ({"first": 0.6, "most": 0.5}, ValueError, "`most` must be below 1 and at least 0.6, got 0.5"),
        ({"stages": 0}, ValueError, "`stages` must be at least 1"),
        ({"spacing": "cubic"}, ValueError, "`spacing` must be one of 'geometric', 'linear', got 'cubic'"),
        ({"every": 0}, ValueError, "`every` must be at least 1"),
        ({"patience": 1}, ValueError, "`patience` must be at least 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Growth(**arguments)

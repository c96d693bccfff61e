"""Stages that grow as long as the loss does not rise: each verdict of a scripted run of means."""

import math
from dataclasses import replace

import pytest

from lightning_gcfreeze import Growth
from lightning_gcfreeze.planning.growing import GrowthState
from lightning_gcfreeze.planning.losses import LossMean

FOUR = Growth(0.01, first=0.5, most=0.95, stages=4, forecast=False)


def mean(value, error=0.001, n=10):
    return LossMean(value, error, n)


def verdicts(growing, *losses):
    return [growing.judge(loss if isinstance(loss, LossMean) else mean(loss)) for loss in losses]


def test_fractions_of_stages_are_spaced_geometrically_or_linearly():
    """Geometrically by the live fraction: 0.5, 0.25, 0.125 have equal ratios."""
    assert Growth(first=0.5, most=0.875, stages=3).fractions() == pytest.approx([0.5, 0.75, 0.875])
    linear = Growth(first=0.2, most=0.8, stages=4, spacing="linear")
    assert linear.fractions() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert Growth(first=0.3, most=0.9, stages=1).fractions() == pytest.approx([0.3])


def test_loss_that_does_not_rise_lets_k_grow_to_the_last_stage():
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, 1.0, 0.995, 1.001, 1.0) == ["grow", "grow", "grow", "stay"]
    assert growing.done
    assert growing.fraction == pytest.approx(0.95)


def test_stage_whose_loss_is_too_high_twice_in_a_row_thaws():
    """Not after the first time; what the stages before froze stays frozen."""
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, 1.0, 1.1) == ["grow", "wait"]
    assert growing.fraction == pytest.approx(FOUR.fractions()[1])
    assert verdicts(growing, 1.1) == ["thaw"]
    assert growing.done
    assert growing.fraction == pytest.approx(0.5)


def test_single_loss_that_is_too_high_does_not_thaw():
    growing = GrowthState(replace(FOUR, max_loss_increase=0.1), 20, mean(1.0))
    assert verdicts(growing, 1.12, 0.9) == ["wait", "grow"]


def test_first_stage_that_costs_too_much_thaws_all():
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, 2.0, 2.0) == ["wait", "thaw"]
    assert growing.fraction == 0.0


def test_stage_hidden_by_noise_is_decided_by_the_mean_of_all_after_patience():
    """A standard error of 5 % against 1 % allowed: after three means it stays, or grows if their mean is low enough."""
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, *[mean(1.02, 0.05)] * 3) == ["wait", "wait", "stay"]
    assert growing.done
    assert growing.fraction == pytest.approx(0.5)
    growing = GrowthState(FOUR, 20, mean(1.0))
    assert verdicts(growing, *[mean(1.005, 0.05)] * 3) == ["wait", "wait", "grow"]
    assert growing.increase == pytest.approx(0.005)
    assert growing.noise == pytest.approx(math.hypot(0.05 / math.sqrt(3), 0.001))


def test_stage_whose_loss_was_just_too_high_is_judged_beyond_patience():
    """Too high for the first time at the third mean: a fourth decides."""
    growing = GrowthState(replace(FOUR, max_loss_increase=0.1), 20, mean(1.0, 0.02))
    found = verdicts(growing, mean(1.09, 0.02), mean(1.115, 0.02), mean(1.6, 0.02), mean(1.6, 0.02))
    assert found == ["wait", "wait", "wait", "thaw"]


def test_reference_is_the_lowest_loss_so_far():
    """A rise of 0.6 % per stage adds up and is found; after a fall, a loss below the first one is too high."""
    growing = GrowthState(FOUR, 20, mean(1.0, 0.0))
    assert verdicts(growing, mean(1.006, 0.0), mean(1.012, 0.0), mean(1.012, 0.0)) == ["grow", "wait", "thaw"]
    growing = GrowthState(FOUR, 20, mean(1.0, 0.0))
    assert verdicts(growing, mean(0.9, 0.0), mean(0.95, 0.0), mean(0.95, 0.0)) == ["grow", "wait", "thaw"]


def test_first_loss_is_the_reference_if_there_is_none_and_means_of_no_losses_are_ignored():
    growing = GrowthState(FOUR, 20, LossMean())
    assert verdicts(growing, LossMean(), 5.0, 5.0, LossMean()) == ["wait", "wait", "grow", "wait"]


def test_negative_loss_increases_towards_zero():
    growing = GrowthState(FOUR, 20, mean(-2.0))
    assert verdicts(growing, -2.5, -2.0, -2.0) == ["grow", "wait", "thaw"]


def test_stages_resumed_from_a_state_dict_go_on_as_unbroken():
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
def test_growth_with_bad_arguments_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Growth(**arguments)

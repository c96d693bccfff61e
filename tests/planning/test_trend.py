"""Where a loss is heading, beside NumPy's least squares on losses of a known law."""

import math

import numpy as np
import pytest
import torch

from lightning_gcfreeze.distributed import SINGLE_PROCESS
from lightning_gcfreeze.planning.trend import FIRST, Trend


def followed(losses: np.ndarray) -> Trend:
    """A trend that has seen losses of the steps 1, 2, …"""
    trend = Trend()
    for step, loss in enumerate(losses, start=1):
        trend.add(torch.tensor(float(loss)))
        trend.end_step(step, SINGLE_PROCESS)
    return trend


@pytest.mark.parametrize("step", [16, 100, 257, 1024])
@pytest.mark.parametrize("times", [1.25, 2.0, 10.0])
def test_loss_that_is_straight_in_log_t_is_followed_to_the_end(step, times):
    """To what the mean over a bin of steps differs from its middle; beyond a doubling, too."""
    losses = 5 - 0.3 * np.log(np.arange(1, step + 1))
    fall = followed(losses).fall(step, times * step)
    assert fall.value == pytest.approx(0.3 * math.log(times), rel=0.02)
    assert fall.end == pytest.approx(5 - 0.3 * math.log(times * step), rel=1e-3)
    assert fall.error < 0.01 * fall.value


def test_flat_loss_does_not_fall_and_a_rising_one_falls_below_zero():
    assert followed(np.full(200, 3.0)).fall(200, 400).value == pytest.approx(0.0)
    assert followed(np.linspace(1, 2, 200)).fall(200, 400).value < -0.2


@pytest.mark.parametrize("law", [lambda t: t**-0.5, lambda t: np.exp(-t / 20), lambda t: 1 + 2 / t], ids="abc")
def test_forecast_of_a_loss_that_levels_off_is_never_too_small(law):
    """Exponential ones, from two time constants on."""
    for step in (50, 100, 200):
        for end in (1.5 * step, 3 * step):
            assert followed(law(np.arange(1, step + 1))).fall(step, end).value > law(step) - law(end)


def test_forecast_of_noisy_losses_is_not_too_small_with_its_error():
    """Of 300 draws of noise: on the mean, and in most; and the error is about what the forecasts scatter by."""
    draw, step = np.random.default_rng(0), 300
    law = 5 - 0.3 * np.log(np.arange(1, step + 1))
    falls = [followed(law + draw.normal(0, 0.2, step)).fall(step, 600) for _ in range(300)]
    values, errors = np.array([f.value for f in falls]), np.array([f.error for f in falls])
    fall = 0.3 * math.log(2)
    assert fall < (values + errors).mean() < 1.5 * fall
    assert np.mean(values + errors > fall) > 0.6
    assert 1 / 3 < np.median(errors) / values.std() < 3


def test_slope_is_that_of_single_steps():
    """NumPy's line through all steps of the last octave, where noise is small."""
    draw, step = np.random.default_rng(1), 512
    losses = 2 / np.arange(1, step + 1) ** 0.3 + draw.normal(0, 1e-3, step)
    steps = np.arange(step // 2 + 1, step + 1)
    slope, _ = np.polyfit(np.log(steps), losses[steps - 1], 1)
    assert followed(losses).fall(step, 2 * step).value == pytest.approx(-slope * math.log(2), rel=0.05)


def test_end_that_is_not_known_is_twice_as_far():
    trend = followed(5 - np.log(np.arange(1, 101)))
    for unknown in (math.inf, 50.0, math.nan):
        assert trend.fall(100, unknown) == trend.fall(100, 200)
    assert trend.fall(100, 100).value == 0.0


def test_few_losses_say_nothing_and_those_that_are_not_finite_are_left_out():
    assert math.isnan(followed(np.ones(2)).fall(2, 10).value)
    losses = 5 - np.log(np.arange(1.0, 101))
    whole, holes = followed(losses), losses.copy()
    holes[[70, 80]] = math.nan, math.inf
    assert followed(holes).fall(100, 200).value == pytest.approx(whole.fall(100, 200).value, rel=0.05)
    assert math.isnan(followed(np.full(50, math.nan)).fall(50, 100).value)


def test_first_loss_is_the_mean_of_the_first_steps():
    assert math.isnan(Trend().first)
    assert followed(np.arange(1.0, 4)).first == pytest.approx(2.0)
    assert followed(np.r_[np.full(FIRST, 7.0), np.zeros(500)]).first == pytest.approx(7.0)


def test_validations_count_one_by_one():
    trend = Trend()
    for step in (0, 50, 60, 70, 80, 90, 100):
        trend.add_validation(step, 4 - math.log(step) if step else 99.0)
    trend.add_validation(101, math.nan)
    assert trend.fall(100, 200).value == pytest.approx(math.log(2))


def test_validations_after_the_same_step_are_one_point():
    """As of several validation sets, or while no optimizer step is taken."""
    trend, single = Trend(), Trend()
    for step in (60, 70, 80, 100):
        single.add_validation(step, 4 - math.log(step))
        for shift in (-0.5, 0.2, 0.3):
            trend.add_validation(step, 4 - math.log(step) + shift)
    assert trend.fall(100, 200).value == pytest.approx(single.fall(100, 200).value)
    same = Trend()
    for loss in (1.0, 2.0, 3.0):
        same.add_validation(50, loss)
    assert math.isnan(same.fall(50, 100).value)


def test_loss_that_has_levelled_off_is_found_by_the_second_half_of_the_octave():
    """It falls until 70 of 100 steps; the line through all of the octave would go on falling."""
    losses = np.r_[np.linspace(10, 1, 70), np.ones(30)]
    assert followed(losses).fall(100, 200).value == pytest.approx(0.0, abs=0.05)
    slope, _ = np.polyfit(np.log(np.arange(51, 101)), losses[50:], 1)
    assert -slope * math.log(2) > 1


def test_means_do_not_depend_on_micro_batches():
    """Two halves of a batch, one after the other, are as one."""
    halves, losses = Trend(), 5 - np.log(np.arange(1, 65))
    for step, loss in enumerate(losses, start=1):
        halves.add(torch.tensor(loss + 0.5))
        halves.add(torch.tensor(loss - 0.5))
        halves.end_step(step)
    assert halves.fall(64, 128).value == pytest.approx(followed(losses).fall(64, 128).value)


def test_trend_resumed_from_a_state_dict_goes_on_as_unbroken():
    losses = np.random.default_rng(2).random(90)
    for cut in (0, 1, 7, 40, 77):
        resumed = Trend()
        resumed.load_state_dict(followed(losses[:cut]).state_dict())
        for step in range(cut + 1, 91):
            resumed.add(torch.tensor(float(losses[step - 1])))
            resumed.end_step(step)
        assert resumed.fall(90, 200) == followed(losses).fall(90, 200)
        assert resumed.first == followed(losses).first

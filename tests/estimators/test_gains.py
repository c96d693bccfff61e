"""κ_t: the weights that a gain gives to the observed terms, and what is no gain."""

import math

import pytest

from lightning_gcfreeze.estimators import gains
from tests.conformance import weights_of_terms


def test_one_over_t_weights_all_terms_equally():
    """κ_t = 1/t is the plain mean, and κ_1 = 1 forgets C_0 altogether."""
    of_terms, left = weights_of_terms("1/t", 50)
    assert of_terms == pytest.approx([1 / 50] * 50, rel=1e-12)
    assert left == 0.0


def test_constant_gain_forgets_geometrically():
    """A term t steps back counts κ (1 - κ)^t."""
    of_terms, left = weights_of_terms(0.1, 20)
    assert of_terms[::-1] == pytest.approx([0.1 * 0.9**t for t in range(20)], rel=1e-12)
    assert left == pytest.approx(0.9**20, rel=1e-12)


@pytest.mark.parametrize("every", [1, 3])
def test_gain_of_a_momentum_gives_the_weights_of_a_mean_with_corrected_bias(every):
    """Between each n-th step and the next, the terms of n steps count as one."""
    of_terms, left = weights_of_terms(lambda t: gains.of_momentum(t, every), 12)
    steps = [0.9 ** (12 * every - i) for i in range(1, 12 * every + 1)]
    blocks = [sum(steps[i : i + every]) / sum(steps) for i in range(0, 12 * every, every)]
    assert of_terms == pytest.approx(blocks, rel=1e-9)
    assert left == 0.0


def test_callable_gain_gets_the_one_based_step():
    """The t that it gets counts observed steps, the first is 1."""
    asked = []
    assert [gains.at(lambda t: asked.append(t) or 1 / t**0.5, t) for t in (1, 4)] == [1.0, 0.5]
    assert asked == [1, 4]


@pytest.mark.parametrize("gain", ["1/t", 1, 1.0, 0.25, 1e-12, math.erfc], ids=repr)
def test_valid_gain_is_returned(gain):
    """Everything in (0, 1] passes, and means what it meant."""
    assert gains.check(gain) == gain


@pytest.mark.parametrize("gain", [0.0, -0.1, 1.5, 2, float("nan"), float("inf")])
def test_number_outside_the_range_is_an_error(gain):
    """0 would never learn, more than 1 would overshoot; NaN is caught too."""
    with pytest.raises(ValueError, match=r"`gain` \(κ\) must lie in \(0, 1\], got"):
        gains.check(gain)


@pytest.mark.parametrize(
    ("gain", "error"),
    [
        ("1/n", ValueError),
        ("", ValueError),
        (True, TypeError),
        (None, TypeError),
        ([0.1], TypeError),
    ],
    ids=repr,
)
def test_invalid_gain_is_an_error(gain, error):
    """The error lists the three forms a gain can have, and shows what came."""
    with pytest.raises(error, match=r"`gain` must be '1/t', a number in \(0, 1\] or a callable t -> κ, got"):
        gains.check(gain)


@pytest.mark.parametrize("kappa", [0.0, 1.0001, float("nan")])
def test_callable_that_leaves_the_range_is_an_error_at_that_step(kappa):
    """It cannot be checked beforehand; the error names the step."""
    gain = gains.check(lambda t: 1.0 if t < 3 else kappa)
    assert gains.at(gain, 2) == 1.0
    with pytest.raises(ValueError, match=r"`gain\(3\)` \(κ_t\) must lie in \(0, 1\], got"):
        gains.at(gain, 3)

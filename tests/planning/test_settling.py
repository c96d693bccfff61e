"""When a run has settled: what noise alone looks like, by simulation and by SciPy; and the sequence of checks."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from lightning_gcfreeze import Settled
from lightning_gcfreeze.estimators import gains
from lightning_gcfreeze.planning.losses import LossMean
from lightning_gcfreeze.planning.settling import SettlingState, overlap_of_noise
from tests.conformance import weights_of_terms


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9, 0.999])
def test_overlap_of_noise_is_that_of_two_correlated_normals(fraction, correlation):
    """Against SciPy's bivariate normal distribution."""
    z = norm.ppf(fraction)
    both = multivariate_normal.cdf([z, z], cov=[[1, correlation], [correlation, 1]])
    assert overlap_of_noise(correlation, fraction) == pytest.approx(both / (2 * fraction - both), abs=2e-5)


def test_overlap_of_noise_is_that_of_running_means_of_noise():
    """A hundred thousand elements of the same variance: the orders by their estimates over 80 and 100 steps."""
    random = np.random.default_rng(0)
    noise = random.normal(size=(100, 100_000)) ** 2
    sets = [set(np.argsort(noise[:steps].mean(0))[:40_000]) for steps in (80, 100)]
    overlap = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    assert overlap == pytest.approx(overlap_of_noise(math.sqrt(80 / 100), 0.4), abs=0.01)
    assert overlap > 0.6  # far above the 0.25 of two independent sets


@pytest.mark.parametrize("gain", ["1/t", 0.1, 1.0, lambda t: 1 / (1 + t) ** 0.7], ids=str)
def test_correlation_of_running_values_is_that_of_the_weights_of_their_terms(gain):
    """Independent terms of equal variance: the product of their weights, divided by their norms."""
    for earlier, later in ((1, 2), (7, 11), (30, 30)):
        a, _ = weights_of_terms(gain, earlier)
        b, _ = weights_of_terms(gain, later)
        a = a + [0.0] * (later - earlier)
        expected = np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
        _, before = gains.decayed(gain, 0.0, 0, earlier)
        kept, after = gains.decayed(gain, before, earlier, later)
        assert kept * math.sqrt(before / after) == pytest.approx(expected, rel=1e-12)


def run(settling, scores, losses, moved=None):
    """Check once for each of the scores, and return steps and results."""
    found = []
    for score, loss in zip(scores, losses, strict=False):
        step = settling.next_check
        seen = torch.ones(len(score), dtype=torch.bool) if moved is None else moved
        found.append((step, settling.check(torch.as_tensor(score), seen, step, 0.5, loss)))
    return found


def running_means(spread, steps, elements=4000, seed=0):
    """Running means of squared noise whose scale differs by element: log-normal with that spread."""
    random = np.random.default_rng(seed)
    scales = np.exp(spread * random.normal(size=elements))
    terms = scales * random.normal(size=(steps[-1], elements)) ** 2
    return [terms[:step].mean(0) for step in steps]


STEPS = [32, 40, 50, 63, 79, 99, 124, 155, 194, 243]
OFTEN = Settled(first=32, growth=1.25, improvement=0.05)
FLAT = [LossMean(1.0, 0.001, 30)] * len(STEPS)


def test_steps_of_checks_grow_geometrically_up_to_max_t0():
    """With a check at `max_t0`; however slow the growth, each check is later than the one before."""
    settling = SettlingState(OFTEN, 200, "1/t")
    steps = [step for step, _ in run(settling, running_means(0, STEPS[:9]), FLAT)]
    assert steps == [*STEPS[:9]]
    assert settling.next_check == 200
    slow = SettlingState(Settled(first=3, growth=1.01), 6, "1/t")
    assert [step for step, _ in run(slow, running_means(0, [3, 4, 5, 6]), FLAT)] == [3, 4, 5, 6]
    assert SettlingState(Settled(first=32), 10, "1/t").next_check == 10


def test_order_that_is_noise_never_settles_and_a_true_order_does():
    """The same checks and losses; only the spread of the true variances differs."""
    for spread, settles in ((0.0, False), (2.0, True)):
        found = run(SettlingState(OFTEN, 1000, "1/t"), running_means(spread, STEPS), FLAT)
        assert any(check.order_has_settled for _, check in found) is settles
        assert all(check.loss_has_settled for _, check in found[1:])
        assert math.isnan(found[0][1].overlap)
        assert not found[0][1].settled
    noise = run(SettlingState(OFTEN, 1000, "1/t"), running_means(0.0, STEPS), FLAT)
    assert all(abs(check.overlap - check.overlap_of_noise) < 0.06 for _, check in noise[1:])


def test_elements_that_never_moved_do_not_count_for_the_overlap():
    """Three quarters never moved, and the order of the others is noise: all together would look settled."""
    scores = [np.concatenate([np.zeros(12_000), score]) for score in running_means(0.0, STEPS)]
    moved = torch.arange(16_000) >= 12_000
    settling, blind = SettlingState(OFTEN, 1000, "1/t"), SettlingState(OFTEN, 1000, "1/t")
    for score, loss, step in zip(scores, FLAT, STEPS, strict=True):
        honest = settling.check(torch.as_tensor(score), moved, step, 0.85, loss)
        naive = blind.check(torch.as_tensor(score), torch.ones_like(moved), step, 0.85, loss)
    assert (honest.order_has_settled, naive.order_has_settled) == (False, True)


def test_loss_settles_only_if_it_neither_falls_nor_hides_a_fall_in_noise():
    """Falling by 5 % from check to check; flat, but known to 5 % only; flat and known; rising; none."""
    falling = [LossMean(0.95**i, 0.0005, 30) for i in range(len(STEPS))]
    noisy = [LossMean(1.0, 0.05, 30)] * len(STEPS)
    rising = [LossMean(1.0 + i, 0.001, 30) for i in range(len(STEPS))]
    for losses, settles in ((falling, False), (noisy, False), (FLAT, True), (rising, True), ([LossMean()] * 10, False)):
        found = run(SettlingState(OFTEN, 1000, "1/t"), running_means(2.0, STEPS), losses)
        assert any(check.settled for _, check in found) is settles
    (_, first), (_, second), *_ = run(SettlingState(OFTEN, 1000, "1/t"), running_means(2.0, STEPS), falling)
    assert math.isnan(first.improvement)
    assert second.improvement == pytest.approx(1 / 0.95 - 1)
    assert second.improvement_noise == pytest.approx(0.0005 * math.sqrt(2) / 0.95)


def test_order_does_not_settle_without_newly_observed_steps():
    """The sets are equal because the evidence is the same."""
    settling = SettlingState(OFTEN, 1000, "1/t")
    scores = torch.rand(100)
    for _ in range(4):
        check = settling.check(scores, torch.ones(100, dtype=torch.bool), 5, 0.5, FLAT[0])
    assert math.isnan(check.overlap)
    assert not check.order_has_settled


def test_settling_resumed_from_a_state_dict_goes_on_as_unbroken():
    whole, broken = SettlingState(OFTEN, 400, "1/t"), SettlingState(OFTEN, 400, "1/t")
    scores = running_means(1.0, STEPS)
    expected = run(whole, scores, FLAT)
    run(broken, scores[:4], FLAT)
    resumed = SettlingState(OFTEN, 99, "1/t")
    resumed.load_state_dict(broken.state_dict())
    assert run(resumed, scores[4:], FLAT) == expected[4:]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_t0": 0}, ValueError, "`max_t0` must be at least 1"),
        ({"first": 2.5}, TypeError, "`first` must be an int"),
        ({"growth": 1.0}, ValueError, "`growth` must be above 1, got 1.0"),
        ({"overlap": 1.0}, ValueError, "`overlap` must be below 1 and at least 0, got 1.0"),
        ({"overlap": math.nan}, ValueError, "`overlap` must be below 1 and at least 0, got nan"),
        ({"improvement": 0}, ValueError, "`improvement` must be above 0, got 0"),
        ({"improvement": "little"}, TypeError, "`improvement` must be a number, got 'little'"),
    ],
)
def test_settled_with_bad_arguments_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Settled(**arguments)


def test_overlap_of_noise_rises_from_that_of_independent_sets_to_one():
    """With the correlation; the empty set and the set of all elements are always the same."""
    values = [overlap_of_noise(r, 0.3) for r in (0.0, 0.5, 0.9, 1.0)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[0] == pytest.approx(0.3**2 / (0.6 - 0.3**2))
    assert values[-1] == pytest.approx(1.0, abs=1e-6)
    assert overlap_of_noise(0.5, 0.0) == overlap_of_noise(0.5, 1.0) == 1.0

"""Statistics against SciPy, enumeration of all subsets, and all permutations of a perceptron's hidden units."""

from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import stats

from examples.paper.run import Run
from examples.paper.summary import chance, curve, growth, growth_over_curve, middle, paired, stability, summarise
from examples.paper.tasks import Settings

RNG = np.random.default_rng(0)
LOSSES = RNG.normal(2.0, 0.5, size=(6, 3))
OTHERS = LOSSES + RNG.normal(0.3, 0.1, size=(6, 3))
PERCEPTRON = {"w1": (4, 3), "b1": (4,), "w2": (2, 4), "b2": (2,)}  # 3-4-2


def subset(p, k):
    mask = np.zeros(p, dtype=bool)
    mask[RNG.choice(p, k, replace=False)] = True
    return mask


def test_curves_have_the_mean_and_deviation_of_a_sample():
    found = curve(LOSSES)
    for j in range(3):
        column = [row[j] for row in LOSSES]
        assert found["mean"][j] == pytest.approx(sum(column) / 6)
        assert found["std"][j] == pytest.approx(stats.tstd(column))
    assert found["runs"] == LOSSES.tolist()


def test_paired_interval_is_that_of_the_paired_t_test():
    found = paired(LOSSES, OTHERS)
    for j in range(3):
        test = stats.ttest_rel(LOSSES[:, j], OTHERS[:, j])
        interval = test.confidence_interval(0.95)
        assert found["mean"][j] == pytest.approx((LOSSES - OTHERS)[:, j].mean())
        assert found["interval"][j] == pytest.approx([interval.low, interval.high])


def test_one_run_has_no_spread_and_says_so():
    assert curve(LOSSES[:1])["std"] == [None] * 3
    assert paired(LOSSES[:1], OTHERS[:1])["interval"] == [[None, None]] * 3


def test_growth_is_the_cost_in_units_of_the_baselines():
    order = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 8.0]])
    random = np.array([[1.0, 5.0, 5.0], [1.0, 5.0, 5.0]])
    found = growth(order, random)
    assert found["mean"] == [None, 0.25, 1.25]
    assert found["interval"][:2] == [[None, None], [0.25, 0.25]]  # nothing frozen; all runs agree
    assert found["interval"][2] == pytest.approx([c / 4 for c in paired(order, order[:, :1])["interval"][2]])


def test_growth_interval_holds_the_ratios_that_a_t_test_does_not_reject():
    """Fieller: cost - ratio * baseline's cost has the mean 0 at the true ratio."""
    none = np.ones(9)
    random, order = (1 + cost + RNG.normal(0, 0.4, 9) for cost in (2.0, 1.0))
    found = growth(np.column_stack([none, order]), np.column_stack([none, random]))
    for ratio in found["interval"][1]:
        assert stats.ttest_1samp((order - 1) - ratio * (random - 1), 0).pvalue == pytest.approx(0.05)
    assert found["interval"][1][0] < found["mean"][1] < found["interval"][1][1]


def test_growth_over_a_curve_is_that_of_the_rises_between_its_ends_added_up():
    """By loops; the interval's ends are the ratios that a t-test just does not reject. Both ends of curves may vary."""
    none = RNG.normal(1, 0.5, (9, 1))
    random, order = (none + np.hstack([0 * none, unit + RNG.normal(0, 0.3, (9, 4))]) for unit in (2.0, 1.0))
    random[:, -1] = order[:, -1] = 50.0
    cost, unit = ([sum(row[j] - row[0] for j in (1, 2, 3)) for row in one] for one in (order, random))
    found = growth_over_curve(order, random)
    assert found["mean"] == pytest.approx(sum(cost) / sum(unit))
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    for ratio in found["interval"]:
        assert stats.ttest_1samp(np.array(cost) - ratio * np.array(unit), 0).pvalue == pytest.approx(0.05)
    assert growth_over_curve(order, 2 * none - random) == {"mean": None, "interval": [None, None]}


@pytest.mark.parametrize("cost", [-2.0, 0.0])
def test_growth_is_undefined_where_freezing_at_random_costs_nothing(cost):
    """A share of a gain would turn the order round: what is worse would look better."""
    random = np.column_stack([np.ones(9), 1 + cost + RNG.normal(0, 0.1, 9)])
    assert growth(random + 0.3, random) == {"mean": [None, None], "interval": [[None, None]] * 2}


def test_overlap_by_chance_is_the_mean_over_all_pairs_of_sets():
    p, k = 6, 2
    sets = [set(subset) for subset in combinations(range(p), k)]
    expected = np.mean([len(a & b) / len(a | b) for a in sets for b in sets])
    assert chance(np.array([subset(p, k)] * 3))["jaccard"] == pytest.approx(expected)


def test_alpha_by_chance_is_how_often_independent_runs_freeze_a_parameter():
    """With R = 2, k = 1 of 4: a quarter each time. (3/4)², 2·3/16, (1/4)², times four parameters."""
    assert chance(np.array([subset(4, 1)] * 2))["alpha"] == pytest.approx([2.25, 1.5, 0.25])


def test_overlap_and_alpha_of_runs_are_counted_pair_by_pair():
    masks = np.array([subset(26, 10) for _ in range(5)])
    found = stability(masks, PERCEPTRON)
    sets = [set(np.flatnonzero(mask)) for mask in masks]
    assert found["jaccard"] == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in combinations(sets, 2)]))
    often = [sum(i in one for one in sets) for i in range(26)]
    assert found["alpha"] == [often.count(times) for times in range(6)]


def permuted(mask, units):
    """The frozen set of the same perceptron with its hidden units in another order."""
    w1, b1, w2, b2 = np.split(mask, [12, 16, 24])
    return np.concatenate([w1.reshape(4, 3)[units].ravel(), b1[units], w2.reshape(2, 4)[:, units].ravel(), b2])


def test_aligned_overlap_is_the_best_over_all_permutations_of_hidden_units():
    masks = np.array([subset(26, 10) for _ in range(3)])

    def overlap(a, b):
        return (a & b).sum() / (a | b).sum()

    best = [max(overlap(a, permuted(b, list(u))) for u in permutations(range(4))) for a, b in combinations(masks, 2)]
    found = stability(masks, PERCEPTRON)
    assert found["aligned"] == pytest.approx(np.mean(best))
    assert found["aligned"] > found["jaccard"]


def test_the_same_network_with_its_units_permuted_is_recognised():
    mask = subset(26, 10)
    masks = np.array([mask, permuted(mask, [2, 0, 3, 1])])
    assert stability(masks, PERCEPTRON)["aligned"] == 1.0
    assert stability(masks, PERCEPTRON)["jaccard"] < 1.0


def test_a_linear_model_has_no_units_to_permute_and_no_set_no_overlap():
    assert stability(np.array([subset(5, 2)] * 2), {"w": (1, 5)})["aligned"] is None
    nothing = stability(np.zeros((3, 26), dtype=bool), PERCEPTRON)
    assert (nothing["jaccard"], nothing["aligned"]) == (None, None)
    assert nothing["alpha"] == [26, 0, 0, 0]


def test_a_summary_has_every_curve_by_name_and_can_be_read_again(tmp_path):
    settings = Settings("boston", 1, 2, 32, 0.1, ("variance", "random"), (0.0, 0.5, 1.0), seed=0)
    runs = [
        Run(RNG.random((2, 3)), RNG.random((2, 3)), np.stack([[subset(301, k) for k in (0, 150, 301)]] * 2))
        for _ in range(4)
    ]
    found = summarise(settings, runs)
    assert {"data", "p", "runs", "t0", "steps", "batch_size", "lr", "fractions", "orders", "paired", "alpha"} <= set(
        found
    )
    assert (found["p"], found["runs"], found["data"]) == (301, 4, "boston")
    for i, order in enumerate(settings.orders):
        for stage in ("train", "test"):
            assert found["orders"][order][stage]["runs"] == [getattr(run, stage)[i].tolist() for run in runs]
        alpha = np.mean([run.frozen[i] for run in runs], axis=0)
        assert list(found["alpha"][order]) == ["0.0", "0.5", "1.0"]
        np.testing.assert_allclose(list(found["alpha"][order].values()), alpha)
    assert list(found["paired"]) == list(found["growth"]) == ["variance"]
    difference = np.mean([run.test[0] - run.test[1] for run in runs], axis=0)
    np.testing.assert_allclose(found["paired"]["variance"]["test"]["mean"], difference)


@pytest.mark.parametrize(("fractions", "index"), [((0, 0.25, 0.5, 1), 2), ((0, 0.4, 0.9, 1), 1)])
def test_the_middle_is_the_fraction_nearest_to_a_half(fractions, index):
    assert middle(fractions) == index

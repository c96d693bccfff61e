"""Paths against scikit-learn's solvers at single penalties, and proximal steps against their definition."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, LogisticRegression, enet_path, lasso_path

from examples.paper.related import paths
from tests.examples.paper.related.cases import snapshot

RANDOM = np.random.default_rng(0)
GRID = np.geomspace(100, 1e-3, 2000)  # of α; a ratio of 0.6 %


def test_l1_entry_of_a_linear_regression_is_where_the_lasso_begins_to_use_a_feature():
    """A little above its score coordinate descent leaves a feature at zero, a little below it does not."""
    at = snapshot("linear")
    x, y = at.x.numpy(), at.y.numpy()
    scores = paths.l1_path(at).numpy()
    for i, score in enumerate(scores):
        for factor, used in ((1.001, False), (0.999, True)):
            lasso = Lasso(alpha=score * factor, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y)
            assert (abs(lasso.coef_[i]) > 1e-9) == used
    assert len(set(scores)) == 6


def test_l1_order_is_that_of_scikit_learns_lasso_path():
    at = snapshot("linear", objects=200)
    penalties, weights, _ = lasso_path(at.x.numpy(), at.y.numpy(), alphas=GRID, tol=1e-10)
    entered = penalties[(weights != 0).argmax(1)]
    scores = paths.l1_path(at).numpy()
    np.testing.assert_allclose(entered, scores, rtol=0.01)  # the grid's ratio
    assert (entered <= scores).all()


def test_elastic_net_entry_is_where_the_elastic_net_of_that_ridge_begins_to_use_a_feature():
    """Its λ₁ and λ₂ are αρ and α(1 - ρ) of scikit-learn's."""
    at = snapshot("linear")
    x, y = at.x.numpy(), at.y.numpy()
    scores, ridge = paths.elastic_net_path(at).numpy(), np.mean(x**2)
    for i, score in enumerate(scores):
        for factor, used in ((1.001, False), (0.999, True)):
            l1 = score * factor
            net = ElasticNet(l1 + ridge, l1_ratio=l1 / (l1 + ridge), fit_intercept=False, tol=1e-12, max_iter=10**5)
            assert (abs(net.fit(x, y).coef_[i]) > 1e-9) == used
    assert not np.allclose(scores, paths.l1_path(at))


def test_elastic_net_without_a_ridge_is_the_lasso(monkeypatch):
    monkeypatch.setattr(paths, "RIDGE", 0.0)
    at = snapshot("linear")
    torch.testing.assert_close(paths.elastic_net_path(at), paths.l1_path(at), rtol=1e-9, atol=0)
    penalties, weights, _ = enet_path(at.x.numpy(), at.y.numpy(), l1_ratio=1.0, alphas=GRID, tol=1e-10)
    np.testing.assert_allclose(penalties[(weights != 0).argmax(1)], paths.elastic_net_path(at), rtol=0.01)


def test_a_feature_that_never_enters_scores_below_all_that_do():
    x, y = RANDOM.normal(size=(50, 5)), RANDOM.normal(size=50)
    x[:, 2] = 0.0
    scores = paths.lasso_entries(x, y)
    assert scores[2] == 0 < np.delete(scores, 2).min()
    scores = paths.logistic_entries(x, (y > 0).astype(int), 0.0)
    assert scores[2] == scores.min() < 0.5


def logistic(x, y, l1, ridge):
    """Scikit-learn's weights for λ₁ and λ₂ of the mean cross-entropy, by another algorithm than ours."""
    total = l1 + ridge
    arguments = {"penalty": "elasticnet", "C": 1 / (total * len(x)), "l1_ratio": l1 / total, "solver": "saga"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # `penalty` goes in scikit-learn 1.10, and was needed before 1.8
        return LogisticRegression(**arguments, fit_intercept=False, tol=1e-9, max_iter=100_000).fit(x, y).coef_[0]


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_entry_of_a_logistic_regression_is_a_point_of_the_grid_where_scikit_learn_begins_to_use_it(ridge, monkeypatch):
    """The integer part of a score counts the points from the entry on."""
    monkeypatch.setattr(paths, "GRID", 40)
    at = snapshot("logistic", objects=80)
    x, y = at.x.numpy(), at.y.numpy()
    scores = paths.logistic_entries(x, y, ridge)
    highest = np.abs(x.T @ (0.5 - y)).max() / len(x)
    grid = np.geomspace(highest, highest / 100, 40)
    places = [40 - int(score) for score in scores if score > 1]
    assert len(set(places)) >= 4
    for i in np.flatnonzero(scores > 1):
        place = 40 - int(scores[i])
        assert abs(logistic(x, y, grid[place], ridge)[i]) > 1e-5
        assert abs(logistic(x, y, grid[place - 1], ridge)[i]) < 1e-5
    for i in np.flatnonzero(scores < 1):
        assert abs(logistic(x, y, grid[-1], ridge)[i]) < 1e-5


def test_orders_of_a_logistic_regression_take_its_own_path_and_ridge():
    at = snapshot("logistic")
    x, y = at.x.numpy(), at.y.numpy()
    np.testing.assert_array_equal(paths.l1_path(at), paths.logistic_entries(x, y, 0.0))
    np.testing.assert_array_equal(paths.elastic_net_path(at), paths.logistic_entries(x, y, np.mean(x**2)))


@pytest.mark.parametrize("l2", [0.0, 0.7])
def test_proximal_steps_of_a_linear_model_end_where_scikit_learns_elastic_net_does(l2):
    """Half of the mean squared error has half of the penalties."""
    at = snapshot("linear")
    w, score = paths.proximal_steps(at, 2.0, l2, steps=3000)
    total = (2.0 + l2) / 2
    net = ElasticNet(total, l1_ratio=1.0 / total, fit_intercept=False, tol=1e-12, max_iter=100_000)
    np.testing.assert_allclose(
        w, net.fit(at.x.numpy(), at.y.numpy()).coef_, rtol=1e-4, atol=1e-9
    )  # as far as it gets in the steps
    torch.testing.assert_close(score.clamp_min(0), w.abs(), rtol=0, atol=0)
    assert 0 < (w == 0).sum() < 5


@pytest.mark.parametrize("ridge", [False, True])
@pytest.mark.parametrize("kind", ["regressor", "classifier"])
def test_shrinking_a_network_takes_the_steps_of_its_docstring(kind, ridge, monkeypatch):
    """Three of them, written out; the penalties together weigh a fifth of the loss."""
    monkeypatch.setattr(paths, "NETWORK_STEPS", 3)
    monkeypatch.setattr(paths, "NETWORK_PENALTY", 0.2)
    at = snapshot(kind)
    w, s, half = at.weights, 1.0, 0.1 if ridge else 0.2
    first = float(at.loss(w))
    l1, l2 = half * first / float(w.abs().sum()), half * first / float(w @ w) * 2 if ridge else 0.0
    for _ in range(3):
        s = min(1.0, 2 * s)
        g, before = torch.func.grad_and_value(at.loss)(w)
        while True:
            u = w - s * g
            new = torch.sign(u) * torch.relu(u.abs() - s * l1) / (1 + s * l2)
            if at.loss(new) <= before + g @ (new - w) + (new - w).square().sum() / (2 * s):
                break
            s /= 2
        w = new
    score = paths.elastic_net_path(at) if ridge else paths.l1_path(at)
    torch.testing.assert_close(score.clamp_min(0), w.abs(), rtol=1e-9, atol=1e-12)
    assert (w == 0).any()
    assert ridge or len(score[w == 0].unique()) > 1  # those at zero are ordered, too


def test_steps_never_raise_the_penalised_loss_of_a_network():
    at = snapshot("regressor")

    def penalised(w):
        return float(at.loss(w) + 0.3 * w.abs().sum() + 0.1 * w @ w)

    values = [penalised(paths.proximal_steps(at, 0.3, 0.2, steps)[0]) for steps in range(12)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 2 * values[-1]


def test_weights_at_zero_are_told_apart_by_their_gradient_and_tie_without_one(monkeypatch):
    """Of a feature that is 0 for every object, a dark pixel, comes no gradient."""
    monkeypatch.setattr(paths, "NETWORK_PENALTY", 0.5)
    monkeypatch.setattr(paths, "NETWORK_STEPS", 10)  # after more whole units have no gradient
    at = snapshot("classifier")
    at = replace(at, x=at.x * (torch.arange(6) != 2))
    score = paths.l1_path(at)
    dark, others = score[2:30:6], torch.cat([score[:2], score[3:8], score[9:14]])
    assert (dark < 0).all()
    assert len(dark.unique()) == 1
    others = others[others < 0]
    assert len(others.unique()) == len(others) > 3

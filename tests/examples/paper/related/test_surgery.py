"""Brain damage, brain surgeon and their likes for freezing against losses of refitted models."""

import numpy as np
import pytest
import torch

from examples.paper.related import surgery
from tests.examples.paper.related.cases import MODELS, gauss_newton, snapshot


def least_squares(x, y, held):
    """The mean squared error at the best weights, those in `held` {index: value} being fixed."""
    free = [i for i in range(x.shape[1]) if i not in held]
    target = y - sum(x[:, i] * value for i, value in held.items())
    best = np.linalg.lstsq(x[:, free], target, rcond=None)[0]
    return np.mean((target - x[:, free] @ best) ** 2)


@pytest.fixture
def at_the_minimum():
    """Of a linear regression, where g = 0 as the two papers on pruning assume."""
    at = snapshot("linear")
    best = np.linalg.lstsq(at.x.numpy(), at.y.numpy(), rcond=None)[0]
    return snapshot("linear", weights=torch.as_tensor(best))


def test_obd_is_what_zeroing_one_weight_costs_at_the_minimum(at_the_minimum):
    at = at_the_minimum
    costs = []
    for i in range(6):
        w = at.weights.clone()
        w[i] = 0
        costs.append(float(at.loss(w) - at.loss(at.weights)))
    np.testing.assert_allclose(surgery.obd(at), costs, rtol=1e-9)


def test_obs_is_what_zeroing_costs_once_the_others_are_refitted(at_the_minimum):
    at = at_the_minimum
    x, y = at.x.numpy(), at.y.numpy()
    costs = [least_squares(x, y, {i: 0.0}) - least_squares(x, y, {}) for i in range(6)]
    np.testing.assert_allclose(surgery.obs(at), costs, rtol=1e-8)
    assert np.argsort(costs).tolist() != surgery.obd(at).argsort().tolist()  # features are correlated


def test_obs_freeze_is_what_freezing_one_weight_costs_a_linear_regression():
    """Before the minimum: the least loss with w_i held where it is, above the least of all."""
    at = snapshot("linear")
    x, y = at.x.numpy(), at.y.numpy()
    costs = [least_squares(x, y, {i: float(at.weights[i])}) - least_squares(x, y, {}) for i in range(6)]
    np.testing.assert_allclose(surgery.obs_freeze(at), costs, rtol=1e-8)


def test_obd_freeze_is_what_staying_costs_when_all_others_have_arrived():
    at = snapshot("linear")
    best = torch.as_tensor(np.linalg.lstsq(at.x.numpy(), at.y.numpy(), rcond=None)[0])
    costs = []
    for i in range(6):
        w = best.clone()
        w[i] = at.weights[i]
        costs.append(float(at.loss(w) - at.loss(best)))
    np.testing.assert_allclose(surgery.obd_freeze(at), costs, rtol=1e-8)


def test_obd_freeze_diagonal_is_what_the_best_step_along_one_weight_saves():
    at = snapshot("linear")
    x, residual = at.x.numpy(), (at.y - at.x @ at.weights).numpy()
    savings = [np.mean(residual**2) - least_squares(x[:, [i]], residual, {}) for i in range(6)]
    np.testing.assert_allclose(surgery.obd_freeze_diagonal(at), savings, rtol=1e-9)


def test_weights_that_no_output_depends_on_have_no_score_and_no_nan():
    """A unit whose bias keeps it off for every object."""
    at = snapshot("regressor")
    w = at.weights.clone()
    w[30] = -1e3  # the first of five biases, after 5 x 6 weights
    dead = snapshot("regressor", weights=w)
    unit = [*range(6), 30, 35]
    for order in (surgery.obd, surgery.obd_freeze, surgery.obd_freeze_diagonal):
        assert order(dead)[unit].count_nonzero() == 0
        assert order(dead).count_nonzero() > 10
    for order in (surgery.obs, surgery.obs_freeze):
        assert not order(dead).isnan().any()


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_the_formulas_element_by_element(kind):
    at = snapshot(kind)
    h, w, g = gauss_newton(at), at.weights.numpy(), at.gradient.numpy()
    values = np.linalg.eigvalsh(h)
    damped = h + max(0.0, 1e-4 * values[-1] - values[0]) * np.eye(len(h))
    inverse, step = np.linalg.inv(damped), np.linalg.solve(damped, -g)
    for i in range(len(w)):
        assert float(surgery.obd(at)[i]) == pytest.approx(h[i, i] * w[i] ** 2 / 2, abs=1e-12)
        assert float(surgery.obs(at)[i]) == pytest.approx(w[i] ** 2 / (2 * inverse[i, i]), rel=1e-6)
        assert float(surgery.obd_freeze(at)[i]) == pytest.approx(h[i, i] * step[i] ** 2 / 2, rel=1e-6, abs=1e-12)
        assert float(surgery.obs_freeze(at)[i]) == pytest.approx(step[i] ** 2 / (2 * inverse[i, i]), rel=1e-6)

"""Curvature against a loop over objects, autograd's Hessian and closed forms."""

import numpy as np
import pytest
import torch

from examples.paper import related
from examples.paper.related.relevance import posterior
from tests.examples.paper.related.cases import MODELS, gauss_newton, snapshot


@pytest.mark.parametrize("kind", MODELS)
def test_gradient_is_the_difference_of_the_loss(kind):
    at = snapshot(kind)
    h = 1e-5
    steps = h * torch.eye(len(at.weights), dtype=torch.float64)
    losses = torch.stack([at.loss(at.weights + s) - at.loss(at.weights - s) for s in steps]) / (2 * h)
    torch.testing.assert_close(at.gradient, losses, rtol=1e-5, atol=1e-7)  # the error of differences


@pytest.mark.parametrize("kind", MODELS)
def test_gauss_newton_matrix_is_the_sum_over_objects(kind):
    """More of them than in a chunk."""
    at = snapshot(kind, objects=150)
    np.testing.assert_allclose(at.gauss_newton, gauss_newton(at), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_gauss_newton_matrix_of_a_linear_model_is_its_hessian(kind):
    at = snapshot(kind, objects=150)
    hessian = torch.autograd.functional.hessian(at.loss, at.weights)
    torch.testing.assert_close(at.gauss_newton, hessian, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", ["regressor", "classifier"])
def test_gauss_newton_matrix_of_a_network_has_no_negative_eigenvalue_where_its_hessian_has(kind):
    at = snapshot(kind, objects=150, scale=2.0)
    hessian = torch.autograd.functional.hessian(at.loss, at.weights)
    ours, exact = (np.linalg.eigvalsh(h.numpy()) for h in (at.gauss_newton, hessian))
    assert ours[0] > -1e-12 * ours[-1]
    assert exact[0] < -1e-3 * exact[-1]


@pytest.mark.parametrize("kind", MODELS)
def test_diagonal_is_that_of_the_hessian(kind):
    """A network's Hessian differs from the Gauss-Newton matrix, but not there."""
    at = snapshot(kind, objects=150)
    hessian = torch.autograd.functional.hessian(at.loss, at.weights)
    torch.testing.assert_close(at.hessian_diagonal, hessian.diagonal(), rtol=1e-10, atol=1e-13)
    assert at.hessian_diagonal.max() > 0.01


def test_linear_regression_has_the_curvature_2_xtx_over_n_undamped():
    at = snapshot("linear")
    x, y, w = (tensor.numpy() for tensor in (at.x, at.y, at.weights))
    closed = 2 * x.T @ x / len(x)
    np.testing.assert_allclose(at.gauss_newton, closed, rtol=1e-10)
    np.testing.assert_allclose(at.gradient, 2 * x.T @ (x @ w - y) / len(x), rtol=1e-10)
    torch.testing.assert_close(at.damped_gauss_newton, at.gauss_newton, rtol=0, atol=0)
    np.testing.assert_allclose(at.inverse_gauss_newton, np.linalg.inv(closed), rtol=1e-8)


@pytest.mark.parametrize(("kind", "objects"), [("regressor", 20), ("linear", 4)])
def test_singular_curvature_is_damped_by_the_least_shift_to_its_limit(kind, objects):
    """Fewer objects than weights."""
    at = snapshot(kind, objects)
    before, after = (np.linalg.eigvalsh(h.numpy()) for h in (at.gauss_newton, at.damped_gauss_newton))
    assert abs(before[0]) < 1e-12 * before[-1]
    np.testing.assert_allclose(after - before, 1e-4 * before[-1], rtol=1e-9)
    np.testing.assert_allclose(at.inverse_gauss_newton, np.linalg.inv(at.damped_gauss_newton), rtol=1e-7, atol=1e-9)


def test_snapshot_is_a_copy_in_float64_with_the_weights_given():
    """The model that is still to train keeps its weights and its dtype."""
    model = MODELS["regressor"]()
    before = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    other = torch.arange(41.0)
    at = related.take(model, other, (torch.ones(3, 6), torch.ones(3)), 0, None)
    assert at.weights.dtype == at.x.dtype == at.y.dtype == torch.float64
    assert at.weights.tolist() == other.tolist()
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.equal(after.view(torch.int32), before.view(torch.int32))
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(other, model.parameters())
        assert float(at.loss(at.weights)) == pytest.approx(float(model.loss(model(torch.ones(3, 6)), torch.ones(3))))


def test_orders_leave_the_snapshot_as_it_is():
    at = snapshot("regressor", observe=lambda: torch.eye(41))
    before = at.weights.clone()
    for name, order in related.RELATED.items():
        if name == "relevance":
            posterior(at, steps=2)  # as many as it takes to notice a change in place
        else:
            order(at)
    assert torch.equal(at.weights, before)
    assert torch.equal(torch.nn.utils.parameters_to_vector(at.model.parameters()), before)


@pytest.mark.parametrize(
    ("order", "least"), [("obs", 5001), ("obs_freeze", 5001), ("belsley_noise", 1001), ("obd", None)]
)
def test_orders_are_left_out_from_their_number_of_parameters_on(order, least):
    if least is None:
        assert related.left_out(order, 10**9) is None
    else:
        assert related.left_out(order, least - 1) is None
        assert f"{least:,} x {least:,}" in related.left_out(order, least)

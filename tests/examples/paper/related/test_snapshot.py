"""Curvature against second differences and closed forms."""

import numpy as np
import pytest
import torch

from tests.examples.paper.related.cases import MODELS, snapshot


@pytest.mark.parametrize("kind", MODELS)
def test_hessian_and_gradient_are_the_differences_of_the_loss(kind):
    at = snapshot(kind)
    p, h = len(at.weights), 1e-5
    steps = h * torch.eye(p, dtype=torch.float64)
    gradients = []
    for w in (*(at.weights + steps), *(at.weights - steps)):
        w = w.clone().requires_grad_()
        gradients.append(torch.autograd.grad(at.loss(w), w)[0])
    found = (torch.stack(gradients[:p]) - torch.stack(gradients[p:])) / (2 * h)
    torch.testing.assert_close(at.hessian, found, rtol=1e-5, atol=1e-6)  # the error of differences
    losses = torch.stack([at.loss(at.weights + s) - at.loss(at.weights - s) for s in steps]) / (2 * h)
    torch.testing.assert_close(at.gradient, losses, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_diagonal_by_jacobians_is_the_diagonal_of_the_hessian(kind):
    """More objects than in a chunk; a network's Hessian has other elements that no Jacobian gives."""
    at = snapshot(kind, objects=150)
    torch.testing.assert_close(at.hessian_diagonal, at.hessian.diagonal(), rtol=1e-10, atol=1e-13)
    assert at.hessian_diagonal.max() > 0.01


def test_linear_regression_has_the_hessian_2_xtx_over_n_undamped():
    at = snapshot("linear")
    x, y, w = (tensor.numpy() for tensor in (at.x, at.y, at.weights))
    closed = 2 * x.T @ x / len(x)
    np.testing.assert_allclose(at.hessian, closed, rtol=1e-10)
    np.testing.assert_allclose(at.gradient, 2 * x.T @ (x @ w - y) / len(x), rtol=1e-10)
    torch.testing.assert_close(at.damped_hessian, at.hessian, rtol=0, atol=0)
    np.testing.assert_allclose(at.inverse_hessian, np.linalg.inv(closed), rtol=1e-8)


def test_hessian_of_a_network_is_damped_by_the_least_shift_to_its_limit():
    at = snapshot("regressor", scale=2.0)
    before, after = (np.linalg.eigvalsh(h.numpy()) for h in (at.hessian, at.damped_hessian))
    assert before[0] < -1e-3
    np.testing.assert_allclose(after - before, 1e-4 * before[-1] - before[0], rtol=1e-9)
    assert after[0] == pytest.approx(1e-4 * before[-1])


def test_snapshot_is_a_copy_in_float64():
    """The model that is still to train keeps its weights and its dtype."""
    at, model = snapshot("linear"), MODELS["linear"]()
    assert at.weights.dtype == at.x.dtype == at.y.dtype == torch.float64
    assert at.weights.shape == (6,)
    assert next(model.parameters()).dtype == torch.float32

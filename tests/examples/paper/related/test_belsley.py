"""Belsley's proportions by the singular values of X, and elimination by an explicit loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.paper.related import belsley
from tests.examples.paper.related.cases import gauss_newton, snapshot


def proportions_of(x):
    """(J, p) and condition indices (J,), as in the book: from X itself, in NumPy."""
    x = x / np.linalg.norm(x, axis=0)
    _, mu, vt = np.linalg.svd(x, full_matrices=False)
    phi = (vt / mu[:, None]) ** 2
    return phi / phi.sum(0), mu.max() / mu


def test_proportions_of_the_laplace_approximation_are_belsleys_of_x():
    at = snapshot("linear")
    pi, indices = proportions_of(at.x.numpy())
    found = belsley.laplace_proportions(at.damped_gauss_newton)
    np.testing.assert_allclose(found, pi[indices.argmax()], rtol=1e-8)
    np.testing.assert_allclose(pi.sum(0), 1)


def test_proportions_of_a_covariance_are_those_of_a_design_with_that_covariance_unscaled():
    """With Σ = (XᵀX)⁻¹, and no scaling of columns."""
    x = snapshot("linear").x.numpy()
    _, mu, vt = np.linalg.svd(x, full_matrices=False)
    phi = (vt / mu[:, None]) ** 2
    found = belsley.noise_proportions(torch.as_tensor(np.linalg.inv(x.T @ x)))
    np.testing.assert_allclose(found, (phi / phi.sum(0))[mu.argmin()], rtol=1e-8)


def test_laplace_order_removes_columns_of_x_one_by_one():
    at = snapshot("linear")
    x = at.x.numpy()
    left, removed = list(range(6)), []
    while left:
        pi, indices = proportions_of(x[:, left])
        removed.append(left.pop(int(pi[indices.argmax()].round(9).argmax())))  # the last two are equal
    assert belsley.belsley_laplace(at).argsort().tolist() == removed
    once = proportions_of(x)
    assert removed != list(np.argsort(-once[0][once[1].argmax()]))  # looking again after each makes a difference


def test_laplace_order_of_a_network_begins_with_the_largest_proportion_on_the_scaled_gauss_newton_matrix():
    at = snapshot("regressor", scale=2.0)
    g = gauss_newton(at)
    values = np.linalg.eigvalsh(g)
    g += max(0.0, 1e-4 * values[-1] - values[0]) * np.eye(len(g))
    scaled = g / np.sqrt(np.outer(g.diagonal(), g.diagonal()))
    squares, vectors = np.linalg.eigh(scaled)
    pi = vectors[:, 0] ** 2 / squares[0] / np.linalg.inv(scaled).diagonal()
    assert int(belsley.belsley_laplace(at).argmin()) == pi.argmax()


def test_the_collinear_pair_is_named_first_and_then_left_in_peace():
    """x₀ and x₁ nearly equal: one of them goes first; the other is collinear with nothing any more."""
    random = np.random.default_rng(1)
    at = snapshot("linear", objects=400)
    x = torch.as_tensor(random.normal(size=(400, 6)))
    x[:, 1] = x[:, 0] + 0.01 * x[:, 1]
    at = replace(at, x=x)
    pi = belsley.laplace_proportions(at.damped_gauss_newton)
    assert pi[:2].min() > 0.99 > 0.1 > pi[2:].max()
    first, second = belsley.belsley_laplace(at).argsort().tolist()[:2]
    assert first in (0, 1)
    assert second not in (0, 1)


def test_noise_order_takes_the_covariance_that_was_observed():
    """By an explicit loop over Eq. π_1k = v_k² λ / C_kk; a parameter without noise comes last."""
    random = np.random.default_rng(2)
    noise = random.normal(size=(4, 6)) * [1.0, 0.2, 3.0, 1.0, 0.0, 0.5]  # rank 4 of 6
    c = noise.T @ noise / 4
    left, removed = list(range(6)), []
    while left:
        part = c[np.ix_(left, left)]
        values, vectors = np.linalg.eigh(part)
        shares = [values[-1] * vectors[k, -1] ** 2 / part[k, k] if part[k, k] > 0 else 0.0 for k in range(len(left))]
        removed.append(left.pop(int(np.argmax(shares))))
    at = snapshot("linear", observe=lambda: torch.as_tensor(c, dtype=torch.float32))
    assert belsley.belsley_noise(at).argsort().tolist() == removed
    assert removed[-1] == 4


@pytest.mark.parametrize("order", [belsley.belsley_noise, belsley.belsley_laplace])
def test_scores_are_the_places_from_0_to_p(order):
    at = snapshot("regressor", observe=lambda: torch.eye(41))
    assert sorted(order(at).tolist()) == list(range(41))

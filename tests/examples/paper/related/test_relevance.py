"""The trained posterior against the fixed point of its equations, which a linear regression has in closed form."""

import numpy as np
import pytest
import torch

from examples.paper.related import relevance
from tests.examples.paper.related.cases import snapshot


def fixed_point(x, y):
    """Of E_q[log likelihood] with s² at its best, and the Kullback-Leibler distance with α at its best; NumPy.

    Given s² and α, both are quadratic: μ is a ridge regression, 1/σ_i² = Σx_i²/s² + 1/α_i.
    """
    noise, alpha = 1.0, np.ones(x.shape[1])
    for _ in range(1000):
        mean = np.linalg.solve(x.T @ x / noise + np.diag(1 / alpha), x.T @ y / noise)
        variance = 1 / ((x**2).sum(0) / noise + 1 / alpha)
        noise = np.mean((y - x @ mean) ** 2) + variance @ (x**2).mean(0)
        alpha = mean**2 + variance
    return mean, np.sqrt(variance)


def test_posterior_of_a_linear_regression_is_the_fixed_point_of_its_equations():
    """With all objects in each step only ε is random: a few per cent of σ after 4,000 steps.

    Of weights that are of no use both μ and σ tend to zero, for ever.
    """
    at = snapshot("linear", objects=60)
    mean, deviation = relevance.posterior(at, steps=4000, batch_size=60)
    expected_mean, expected_deviation = fixed_point(at.x.numpy(), at.y.numpy())
    useful = np.abs(expected_mean) > expected_deviation
    assert 2 <= useful.sum() < 6
    np.testing.assert_allclose(deviation[useful], expected_deviation[useful], rtol=0.05)
    assert (deviation.numpy() < 0.2 * expected_deviation.max())[~useful].all()
    assert (np.abs(mean.numpy() - expected_mean) < 0.3 * expected_deviation)[useful].all()
    assert (np.abs(mean.numpy()) < 2 * deviation.numpy())[~useful].all()


def test_relevance_is_the_squared_ratio_and_puts_useless_features_first():
    at = snapshot("linear", objects=400)
    score = relevance.relevance(at)
    mean, deviation = relevance.posterior(at)
    torch.testing.assert_close(score, mean**2 / deviation**2)
    expected_mean, expected_deviation = fixed_point(at.x.numpy(), at.y.numpy())
    assert score.argsort()[-2:].tolist() == np.argsort((expected_mean / expected_deviation) ** 2)[-2:].tolist()


@pytest.mark.parametrize("kind", ["logistic", "regressor", "classifier"])
def test_posterior_begins_at_the_weights_and_lowers_its_objective(kind):
    at = snapshot(kind, objects=150)
    near, first = relevance.posterior(at, steps=1)
    torch.testing.assert_close(near, at.weights, rtol=0, atol=1.01 * relevance.RATE)
    mean, deviation = relevance.posterior(at, steps=500)
    assert objective(at, mean, deviation) < objective(at, near, first) - 5
    assert deviation.std() > 0.1 * deviation.mean()  # every weight has found its own


def objective(at, mean, deviation):
    """-log likelihood + KL in nats, by 200 draws, s² and α at their best."""
    torch.manual_seed(0)
    draws = mean + deviation * torch.randn(200, len(mean), dtype=mean.dtype)
    loss = torch.stack([at.loss(w) for w in draws]).mean()
    n = len(at.x)
    fit = n / 2 * loss.log() if at.y.is_floating_point() else n * loss
    alpha = mean**2 + deviation**2
    return float(fit - torch.log(deviation**2 / alpha).sum() / 2)  # of KL the other terms cancel at this α


def test_posterior_is_determined_by_the_seed():
    one, again, other = (relevance.posterior(snapshot("logistic", seed=s), steps=5)[1] for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)

"""Every estimator against the recursion in NumPy, and the factor between batches of different sizes."""

from itertools import product

import numpy as np
import pytest
import torch

from lightning_gcfreeze.estimators import (
    BatchMean,
    BatchSecondMoment,
    DiagonalCovariance,
    FullCovariance,
    RecentBatchMean,
    base,
    full,
)
from lightning_gcfreeze.estimators.per_sample import Summed
from tests import conformance
from tests.conformance import advance, pairs


class TestDiagonalCovariance(conformance.EstimatorSuite):
    estimator = DiagonalCovariance

    @staticmethod
    def project(full_covariance):
        return np.diagonal(full_covariance)


class TestFullCovariance(conformance.EstimatorSuite):
    estimator = FullCovariance

    @staticmethod
    def project(full_covariance):
        return full_covariance.flatten()


class TestBatchMean(conformance.EstimatorSuite):
    estimator = BatchMean

    def expected(self, observed, gain, correction):
        """A mean of g_S alone: the factor on the noise has no part in it."""
        m = np.zeros_like(observed[0][1])
        for t, (_, g_batch) in enumerate(observed, start=1):
            m = (1 - gain(t)) * m + gain(t) * g_batch
        return m


class TestBatchSecondMoment(conformance.EstimatorSuite):
    estimator = BatchSecondMoment

    def expected(self, observed, gain, correction):
        """A mean of g_S² alone: the factor on the noise has no part in it."""
        s = np.zeros_like(observed[0][1])
        for t, (_, g_batch) in enumerate(observed, start=1):
            s = (1 - gain(t)) * s + gain(t) * g_batch**2
        return s


class TestRecentBatchMean(conformance.EstimatorSuite):
    estimator = RecentBatchMean

    def expected(self, observed, gain, correction):
        """A mean of g_S alone, whose gain is never below 5 / (t + 4)."""
        r = np.zeros_like(observed[0][1])
        for t, (_, g_batch) in enumerate(observed, start=1):
            late = max(gain(t), 5 / (t + 4))
            r = (1 - late) * r + late * g_batch
        return r


def test_recent_mean_with_one_over_t_has_weights_of_the_fourth_power():
    """As i (i + 1) (i + 2) (i + 3): NumPy's weighted average, no recursion at all."""
    observed = pairs(steps=40)
    recent = RecentBatchMean(observed[0][0])
    for t, (g_one, g_batch) in enumerate(observed, start=1):
        advance(recent, g_one, g_batch, 1 / t)
    weights = [i * (i + 1) * (i + 2) * (i + 3) for i in range(1, 41)]
    for name, tensor in recent.tensors.items():
        expected = np.average([g_batch[name].numpy() for _, g_batch in observed], axis=0, weights=weights)
        np.testing.assert_allclose(recent.scale * tensor.numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize(
    ("estimator", "numpy"),
    [(BatchMean, lambda g: g.mean(axis=0)), (BatchSecondMoment, lambda g: (g**2).mean(axis=0))],
    ids=["mean", "second moment"],
)
def test_moments_with_one_over_t_are_plain_means(estimator, numpy):
    """With κ_t = 1/t they are NumPy's means over the steps: no recursion at all."""
    observed = pairs(steps=30)
    moment = estimator(observed[0][0])
    for t, (g_one, g_batch) in enumerate(observed, start=1):
        advance(moment, g_one, g_batch, 1 / t)
    for name, tensor in moment.tensors.items():
        expected = numpy(np.stack([g_batch[name].numpy() for _, g_batch in observed]))
        np.testing.assert_allclose(moment.scale * tensor.numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_visiting_each_sample_once_gives_the_population_variance(batch_size, shape):
    """With κ_t = 1/t and every sample as g_1 in turn, v is NumPy's two-pass variance: no recursion, no torch."""
    per_sample = np.random.default_rng(0).normal(loc=5.0, size=(batch_size, *shape))  # off zero: E[g²] would be caught
    estimator = DiagonalCovariance({"w": torch.zeros(shape, dtype=torch.float64)})
    g_batch = {"w": torch.as_tensor(per_sample.mean(axis=0))}
    for t, g_one in enumerate(torch.as_tensor(per_sample), start=1):
        advance(estimator, {"w": g_one}, g_batch, 1 / t)
    np.testing.assert_allclose(
        estimator.scale * estimator.variance["w"].numpy(), per_sample.var(axis=0), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_diagonal_covariance_equals_the_diagonal_of_the_full_matrix(gain):
    """The same variances, parameter-shaped and in the order of the names; the matrix is symmetric, to rounding."""
    diagonal, whole = DiagonalCovariance(pairs()[0][0]), FullCovariance(pairs()[0][0])
    for g_one, g_batch in pairs():
        advance(diagonal, g_one, g_batch, gain, 0.9)
        advance(whole, g_one, g_batch, gain, 0.9)
    assert diagonal.matrix is None
    torch.testing.assert_close(whole.matrix, whole.matrix.t(), rtol=1e-14, atol=1e-14)
    assert list(diagonal.variance) == list(whole.variance) == ["w0", "w1", "w2"]
    for name, v in diagonal.variance.items():
        assert v.shape == pairs()[0][0][name].shape
        assert (v > 0).all()
        torch.testing.assert_close(whole.variance[name], v, rtol=1e-14, atol=0)


def test_variance_of_the_full_matrix_is_a_view():
    """It is a view: what a later step adds shows, also after `tensors` have been replaced, as averaging does."""
    estimator = FullCovariance(pairs()[0][0])
    advance(estimator, *pairs()[0], 1.0)
    once = estimator.variance["w2"].clone()
    estimator.tensors = {name: 2 * tensor for name, tensor in estimator.tensors.items()}
    assert torch.equal(estimator.variance["w2"], 2 * once)


def test_matrix_has_the_widest_dtype_of_all_parameters():
    """float32 and float64 parameters share one matrix; in float32 the wide ones would lose digits."""
    estimator = FullCovariance({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float64)})
    assert estimator.matrix.dtype == torch.float64
    assert estimator.matrix.shape == (5, 5)


@pytest.mark.parametrize(
    ("elements", "dtype", "size"), [(40_000, torch.float32, "6.0"), (32_768, torch.float64, "8.0")], ids=str
)
def test_matrix_that_is_too_large_is_an_error(elements, dtype, size):
    """The error says how large, how many parameters, what is allowed, and that the diagonal orders the same."""
    parameters = {"w": torch.empty(elements - 1, dtype=dtype, device="meta"), "b": torch.empty((), device="meta")}
    text = rf"{elements:,} x {elements:,} matrix, {size} GiB for p = {elements:,} .* at most 4 GiB .*'diagonal'"
    with pytest.raises(ValueError, match=text):
        FullCovariance(parameters)


def test_largest_allowed_matrix_is_created():
    """A p of 32,768 in float32 is 4 GiB to the byte (on the meta device: nothing is allocated here)."""
    estimator = FullCovariance({"w": torch.empty(32_768, device="meta")})
    assert estimator.matrix.nbytes == full.MAX_BYTES


def noise_power(gradients, batch_size):
    """E (g_1 - g_S)² over all batches that can be drawn from a population, and every choice of g_1: all enumerated."""
    draws = [np.array(batch) for batch in product(gradients, repeat=batch_size)]
    return np.mean([(g_one - batch.mean()) ** 2 for batch in draws for g_one in batch])


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("reference", [2, 3, 5])
def test_correction_puts_batches_of_any_size_on_one_scale(size, reference):
    """Times the correction, the noise of batches of S has the power of that of batches of `reference`, exactly."""
    population = np.array([1.0, 2.0, 7.0])
    assert noise_power(population, size) == pytest.approx((1 - 1 / size) * population.var(), rel=1e-12)
    corrected = noise_power(population, size) * base.finite_batch_correction(size, reference)
    assert corrected == pytest.approx(noise_power(population, reference), rel=1e-12)


@pytest.mark.parametrize(("size", "reference"), [(8, 8), (1, 1), (None, 8), (8, None), (None, None)])
def test_correction_is_one_if_sizes_agree_or_are_unknown(size, reference):
    """The factor is 1 to the bit, so that a run with full batches alone is the paper's recursion."""
    assert base.finite_batch_correction(size, reference) == 1.0


def test_full_covariance_of_summed_noise_is_an_error():
    """The sum of squares has no products of different elements."""
    estimator = FullCovariance({"w": torch.zeros(2)})
    step = base.Step({"w": Summed(torch.ones(2), 3, in_batch=True)}, {"w": torch.ones(2)}, 1.0, 1.0, 1)
    with pytest.raises(TypeError, match="A full covariance needs the gradient of each sample, but Summed did not keep"):
        estimator.add(step)

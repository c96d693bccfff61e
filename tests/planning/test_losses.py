"""The mean of a loss and its standard error, against NumPy."""

import math

import numpy as np
import pytest
import torch

from lightning_gcfreeze.planning.losses import Losses, LossMean


def gathered(values):
    losses = Losses()
    for value in values:
        losses.add(torch.tensor(value))
    return losses


class Processes:
    """Stands for several of them: this one's numbers, and the others'."""

    count = 3

    def __init__(self, *others):
        self.others = others

    def gathered(self, own):
        return torch.stack([own, *self.others])


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000])
def test_it_is_numpys_mean_with_its_standard_error(count):
    """Also beyond what waits for the device at once, and far from zero."""
    values = np.random.default_rng(count).normal(1e4, 1.0, count).astype(np.float32)
    mean = gathered(values.tolist()).read()
    exact = values.astype(np.float64)
    assert mean.of == count
    assert mean.value == pytest.approx(exact.mean(), rel=1e-12)
    expected = exact.std(ddof=1) / math.sqrt(count) if count > 1 else math.inf  # of one, nothing is known
    assert mean.error == pytest.approx(expected, rel=1e-9)


def test_a_loss_may_have_an_axis():
    losses = Losses()
    losses.add(torch.tensor([2.0]))
    losses.add(torch.tensor(4.0))
    assert losses.read().value == 3.0


def test_what_is_not_finite_is_left_out_and_a_reading_begins_afresh():
    losses = gathered([1.0, math.inf, 3.0, math.nan])
    assert losses.read() == LossMean(2.0, 1.0, 2)
    assert losses.read().of == 0
    assert math.isnan(losses.read().value)
    losses.add(torch.tensor(7.0))
    assert losses.read() == LossMean(7.0, math.inf, 1)


def test_processes_are_pooled():
    """As if one process had seen all of them."""
    values = np.random.default_rng(0).normal(size=30)
    others = [
        torch.tensor(gathered(part).state_dict()[0], dtype=torch.float64) for part in (values[10:12], values[12:])
    ]
    pooled = gathered(values[:10]).read(Processes(*others))
    everything = pytest.approx((values.mean(), values.std(ddof=1) / math.sqrt(30), 30), rel=1e-5)
    assert pooled == everything
    shared = gathered(values[:10])
    shared.share(Processes(*others))
    resumed = Losses()
    resumed.load_state_dict(shared.state_dict())
    nothing = [torch.zeros(3, dtype=torch.float64)] * 2
    assert shared.read(Processes(*nothing)) == resumed.read(Processes(*nothing)) == everything  # each counts once


def test_a_state_goes_on():
    values = list(np.random.default_rng(1).normal(size=300))
    resumed = Losses()
    resumed.load_state_dict(gathered(values[:270]).state_dict())
    for value in values[270:]:
        resumed.add(torch.tensor(value))
    assert resumed.read() == gathered(values).read()


def test_above_is_relative_to_the_size_of_the_other():
    """Also of a negative loss, where higher is still worse."""
    assert LossMean(-2.0, 0.3, 5).above(LossMean(-4.0, 0.4, 5)) == pytest.approx((0.5, 0.125))
    assert math.isnan(LossMean().above(LossMean(1.0, 0.0, 1))[0])

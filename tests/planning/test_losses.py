"""The mean of a loss and its standard error, against NumPy."""

import math

import numpy as np
import pytest
import torch

from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.planning.losses import Losses, LossMean


def losses_of(values):
    losses = Losses()
    for value in values:
        losses.add(torch.tensor(value))
    return losses


class WorldOfGivenSums(World):
    """Three processes: this one, and two whose sums the test gives."""

    def __init__(self, *others):
        super().__init__(3)
        self.others = others

    def all_gather(self, tensor):
        return torch.stack([tensor, *self.others])


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 1000])
def test_mean_and_standard_error_are_those_of_numpy(n):
    """Also with more losses than stay on the device, and with values far from zero."""
    values = np.random.default_rng(n).normal(1e4, 1.0, n).astype(np.float32)
    mean = losses_of(values.tolist()).read()
    exact = values.astype(np.float64)
    assert mean.n == n
    assert mean.value == pytest.approx(exact.mean(), rel=1e-12)
    expected = exact.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf  # one value says nothing about its error
    assert mean.error == pytest.approx(expected, rel=1e-9)


def test_loss_of_shape_1_is_added_like_a_scalar():
    losses = Losses()
    losses.add(torch.tensor([2.0]))
    losses.add(torch.tensor(4.0))
    assert losses.read().value == 3.0


def test_losses_that_are_not_finite_are_left_out_and_reading_starts_anew():
    losses = losses_of([1.0, math.inf, 3.0, math.nan])
    assert losses.read() == LossMean(2.0, 1.0, 2)
    assert losses.read().n == 0
    assert math.isnan(losses.read().value)
    losses.add(torch.tensor(7.0))
    assert losses.read() == LossMean(7.0, math.inf, 1)


def test_losses_of_several_processes_give_the_mean_over_all():
    """As if one process had added all of them; after `synchronize` each loss still counts once."""
    values = np.random.default_rng(0).normal(size=30)
    others = [
        torch.tensor(losses_of(part).state_dict()[0], dtype=torch.float64) for part in (values[10:12], values[12:])
    ]
    mean = losses_of(values[:10]).read(WorldOfGivenSums(*others))
    expected = pytest.approx((values.mean(), values.std(ddof=1) / math.sqrt(30), 30), rel=1e-5)
    assert mean == expected
    synchronized = losses_of(values[:10])
    synchronized.synchronize(WorldOfGivenSums(*others))
    resumed = Losses()
    resumed.load_state_dict(synchronized.state_dict())
    nothing = [torch.zeros(3, dtype=torch.float64)] * 2
    world = WorldOfGivenSums(*nothing)
    assert synchronized.read(world) == resumed.read(world) == expected


def test_losses_resumed_from_a_state_dict_give_the_same_mean():
    values = list(np.random.default_rng(1).normal(size=300))
    resumed = Losses()
    resumed.load_state_dict(losses_of(values[:270]).state_dict())
    for value in values[270:]:
        resumed.add(torch.tensor(value))
    assert resumed.read() == losses_of(values).read()


def test_increase_is_relative_to_the_absolute_value_of_the_other_mean():
    """Also for a negative loss, where higher is still worse."""
    assert LossMean(-2.0, 0.3, 5).increase_over(LossMean(-4.0, 0.4, 5)) == pytest.approx((0.5, 0.125))
    assert math.isnan(LossMean().increase_over(LossMean(1.0, 0.0, 1))[0])

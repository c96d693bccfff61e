"""`Observing`: the recursion on bare tensors, steps that are left out, and checkpoints."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gcfreeze import observing as observing_module
from lightning_gcfreeze.distributed import UNSHARDED, Shards, World
from lightning_gcfreeze.observing import Observing
from tests import cases
from tests.conformance import pairs, samples, vector
from tests.observed import KINDS, observed, through_a_file, weights
from tests.oracles import recursion


def tensors_of(statistics):
    """Return everything that was gathered, by name."""
    found = {f"covariance/{n}": t * statistics._scale for n, t in statistics.covariance.tensors.items()}
    found |= {
        f"{m}/{n}": t * statistics._scale
        for m, estimator in statistics.moments.items()
        for n, t in estimator.tensors.items()
    }
    return found | {f"start/{n}": t for n, t in (statistics.start or {}).items()}


def assert_same_bits(one, other):
    """Assert that two statistics are the same to the bit."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    counts = [(p.observed, p.skipped, p.batch_size, p.shapes, p._scale) for p in (one, other)]
    assert counts[0] == counts[1]


class Other(World):
    """One of two processes, the other of which is played by the test."""

    def __init__(self, mean_):
        super().__init__(2)
        self.all_reduce_mean_ = mean_

    def broadcast_object(self, value):
        """Rank 0 has skipped no step."""
        return (0, *value[1:])

    def all_reduce_min(self, tensor):
        """The other has observed four steps."""
        return torch.minimum(tensor, torch.tensor(4))


def test_covariance_variance_and_count_are_those_of_the_recursion():
    """C_t, its diagonal and its count are those of NumPy; before the first pair there is no variance."""
    flat = [(vector(g_one), vector(g_batch)) for g_one, g_batch in pairs()]
    expected = recursion.covariance(flat, lambda t: 1 / t)
    observing = Observing(weights(), full=True)
    assert observing.variance == {}
    for step, (g_one, g_batch) in enumerate(pairs(), start=1):
        observing.observe(step, samples(g_one), g_batch, "1/t")
    np.testing.assert_allclose(observing.matrix.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(vector(observing.variance), np.diagonal(expected), rtol=1e-12)
    assert (observing.observed, observing.skipped) == (len(pairs()), 0)
    assert {name: tuple(v.shape) for name, v in observing.variance.items()} == {"w0": (), "w1": (3,), "w2": (2, 2)}


def test_noise_of_a_short_batch_is_put_on_the_scale_of_the_first():
    """The noise of a batch of 3 among batches of 8 counts (1 - 1/8) / (1 - 1/3) times; unknown sizes count once."""
    sizes = [8, 8, 3, None]
    factors = [1.0, 1.0, (7 / 8) / (2 / 3), 1.0]
    noise = [vector(g_one) - vector(g_batch) for g_one, g_batch in pairs(4)]
    expected = np.mean([factor * n**2 for factor, n in zip(factors, noise, strict=True)], axis=0)
    np.testing.assert_allclose(vector(observed(pairs(4), sizes=sizes).variance), expected, rtol=1e-12)


def test_moments_are_gathered_only_if_they_are_needed():
    """The plain means of g_S and g_S² over the steps; without a need there are none."""
    observing = observed(pairs(), needs=frozenset({"mean", "second_moment"}))
    g_batch = np.stack([vector(g) for _, g in pairs()])
    np.testing.assert_allclose(
        observing._scale * vector(observing.moments["mean"].tensors), g_batch.mean(0), rtol=1e-12
    )
    np.testing.assert_allclose(
        observing._scale * vector(observing.moments["second_moment"].tensors), (g_batch**2).mean(0), rtol=1e-12
    )
    assert observing.start is None
    assert observed(pairs()).moments == {}


def test_start_is_a_copy_that_does_not_move():
    """The parameters as they were when observing began, whatever becomes of them."""
    parameter = nn.Parameter(torch.zeros(3))
    observing = Observing({"w": parameter}, needs=frozenset({"start"}))
    parameter.data.add_(1.0)
    assert torch.equal(observing.start["w"], torch.zeros(3))
    assert not observing.start["w"].requires_grad


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["g_1", "g_S"])
def test_pair_that_is_not_finite_only_counts_as_left_out(full, needs, bad, which):
    """One bad element of either gradient: nothing gathered changes, nor does t; a good pair afterwards goes in."""
    observing = Observing(weights(), full, needs)
    spoilt = pairs(3)[2]
    spoilt[which]["w1"][1] = bad
    observing.observe(1, samples(spoilt[0]), spoilt[1], "1/t", 5)
    assert observing.variance == {}
    assert observing.wants(1)
    for i, pair in enumerate(pairs(2)):
        observing.observe(i + 1, samples(pair[0]), pair[1], "1/t", 8)
        assert not observing.wants(i + 1)
        observing.observe(i + 2, samples(spoilt[0]), spoilt[1], "1/t", 5)
        assert observing.wants(i + 2)
        assert observing.skipped == i + 2
    unspoilt = observed(pairs(2), full, needs, sizes=[8, 8])
    unspoilt.skipped = observing.skipped
    assert_same_bits(observing, unspoilt)
    assert vector(observing.variance).all()


@KINDS
@pytest.mark.parametrize("gain", ["1/t", 1.0, 0.3, 0.9999999, lambda t: t**-0.6], ids=str)
@pytest.mark.parametrize("bad", [[], [0], [0, 1, 5], [3, 4], [11], list(range(12))], ids=str)
def test_outcome_is_the_same_where_the_device_is_asked_a_step_later(full, needs, gain, bad, monkeypatch):
    """Statistics, counts and what is saved, whichever steps are not finite."""
    found = []
    for at_once in (True, False):
        monkeypatch.setattr(observing_module, "_is_free_to_read", lambda value, at_once=at_once: at_once)
        observing = Observing(weights(), full, needs)
        for t, (g_one, g_batch) in enumerate(pairs()):
            if t in bad:
                g_one["w1"][1] = torch.nan
            observing.observe(t + 1, samples(g_one), g_batch, gain, 8 if t % 3 else 5)
            if t == 6:
                observing = Observing.from_state_dict(through_a_file(observing.state_dict()))
        found.append(observing)
    one, other = found
    assert (one.observed, one.skipped) == (other.observed, other.skipped) == (12 - len(bad), len(bad))
    assert one.batch_size == other.batch_size
    for name, tensor in tensors_of(one).items():
        torch.testing.assert_close(tensors_of(other)[name], tensor, rtol=1e-11, atol=1e-13)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_saved_and_loaded_go_on_to_the_same_bits(full, needs, dtype):
    """Through a file of plain types: the rest of the pairs leads to the same state as without a break."""
    seen, sizes = pairs(dtype=dtype), [8, 8, 3] * 4
    unbroken = observed(seen, full, needs, sizes, dtype)
    resumed = Observing.from_state_dict(through_a_file(observed(seen[:5], full, needs, sizes[:5], dtype).state_dict()))
    assert_same_bits(resumed, observed(seen[:5], full, needs, sizes[:5], dtype))
    for step, ((g_one, g_batch), size) in enumerate(zip(seen[5:], sizes[5:], strict=True), start=6):
        resumed.observe(step, samples(g_one), g_batch, "1/t", size)
    assert_same_bits(resumed, unbroken)


@pytest.mark.parametrize("full", [False, True])
def test_every_parameter_name_survives_saving(full):
    """Also "covariance", the name of the full matrix in the state."""
    observing = Observing({"covariance": torch.zeros(3)}, full)
    observing.observe(1, samples({"covariance": torch.arange(3.0)}), {"covariance": torch.ones(3)}, "1/t")
    resumed = Observing.from_state_dict(through_a_file(observing.state_dict()))
    assert type(resumed.covariance) is type(observing.covariance)
    assert torch.equal(resumed.variance["covariance"], torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("full", [False, True])
def test_synchronized_statistics_are_the_mean_over_processes(full):
    """Every statistic becomes the mean over both, numbers the first one's; the start, the same on all, stays."""
    needs = frozenset({"mean", "second_moment", "start"})
    here, there = observed(pairs(6), full, needs), observed(pairs(12)[6:], full, needs)
    expected = {n: (t + tensors_of(there)[n]) / 2 for n, t in tensors_of(here).items() if "start" not in n}
    there.skipped = 3
    sent = []
    there.shards = Shards(world=Other(sent.append))
    there.synchronize()
    here.shards = Shards(world=Other(lambda tensor: tensor.add_(sent.pop(0)).div_(2)))
    here.synchronize()
    assert sent == []
    assert here.skipped == there.skipped == 0
    for name, tensor in expected.items():
        assert torch.equal(tensors_of(here)[name], tensor)
        assert not torch.equal(tensor, tensors_of(there)[name])
    assert torch.equal(here.start["w1"], weights()["w1"])
    assert here.observed == there.observed == 4  # the least
    whole = recursion.covariance([(vector(a), vector(b)) for a, b in pairs(12)], lambda t: 1 / t)
    np.testing.assert_allclose(vector(here.variance), np.diagonal(whole), rtol=1e-12)


@KINDS
def test_loaded_statistics_move_to_the_device_of_the_parameters(full, needs):
    """A checkpoint comes on the CPU; everything gathered follows the parameters (here to the meta device)."""
    observing = observed(pairs(2), full, needs)
    assert {t.device.type for t in tensors_of(observing).values()} == {"cpu"}
    observing.to({name: w.to("meta") for name, w in weights().items()}, UNSHARDED)
    assert {t.device.type for t in tensors_of(observing).values()} == {"meta"}


def test_local_parts_are_not_cut_again(monkeypatch):
    """A run attaches to its state again after a tuner's trial; the state has local parts by then."""
    shards = Shards()
    monkeypatch.setattr(shards, "parts", lambda named: {name: t.reshape(-1)[:1] for name, t in named.items()})
    observing = observed(pairs(2))
    before = tensors_of(observing)
    observing.to(weights(), shards)
    once = tensors_of(observing)
    assert any(tensor.shape != before[name].shape for name, tensor in once.items())
    monkeypatch.setattr(shards, "parts", lambda named: {name: t[:0] for name, t in named.items()})
    observing.to(weights(), shards)
    cases.assert_identical(tensors_of(observing), once)


def test_step_without_any_try_counts_as_left_out_once():
    """An optimizer step without a loss; one that was observed, or left out already, is not counted again."""
    observing = observed(pairs(2))
    observing.close_step(2)
    assert observing.skipped == 0
    observing.close_step(3)
    observing.close_step(3)
    observing.leave_out(4)
    observing.close_step(4)
    assert (observing.observed, observing.skipped) == (2, 2)


def test_movement_without_a_start_in_the_loaded_state_is_refused():
    """Of an order that reads it now, and did not when the checkpoint was saved; with a start there is a way."""
    weights = {"w": torch.tensor([1.0, 3.0])}
    observing = Observing.from_state_dict(Observing(weights).state_dict())
    with pytest.raises(RuntimeError, match="checkpoint was saved by one that did not"):
        observing.movement(weights, {"w": 0.5})
    observing.begin_movement(weights, {"w": 0.3})
    found = observing.movement({"w": torch.tensor([1.0, 4.0])}, {"w": 0.1})
    assert found["w"].tolist() == pytest.approx([0.0, 5.0])

"""The two phases: what is observed, how it becomes a decision, and that both survive being saved."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gcfreeze import orderings, phases
from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.phases import Frozen, Observing
from tests.conformance import pairs, samples, vector
from tests.oracles import recursion

KINDS = pytest.mark.parametrize(
    ("full", "needs"),
    [
        (False, frozenset()),
        (True, frozenset()),
        (False, frozenset({"mean", "recent_mean", "second_moment", "start"})),
        (True, frozenset({"mean", "recent_mean", "second_moment", "start"})),
    ],
    ids=["diagonal", "full", "diagonal and more", "full and more"],
)


def weights(dtype=torch.float64):
    """Parameters of the shapes of `conformance.pairs`."""
    return {name: torch.full_like(g, -2.0) for name, g in pairs(1, dtype=dtype)[0][0].items()}


def after(observed, full=False, needs=frozenset(), sizes=None, dtype=torch.float64):
    """A phase that has seen the pairs."""
    phase = Observing(weights(dtype), full, needs)
    for (g_one, g_batch), size in zip(observed, sizes or [None] * len(observed), strict=True):
        phase.observe(samples(g_one), g_batch, "1/t", size)
    return phase


def loaded(state):
    """The state as a checkpoint gives it back: through a file, with nothing but plain types allowed in it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def tensors_of(phase):
    """Everything that a phase has gathered."""
    found = {f"covariance/{n}": t * phase._scale for n, t in phase.covariance.tensors.items()}
    found |= {
        f"{m}/{n}": t * phase._scale for m, estimator in phase.moments.items() for n, t in estimator.tensors.items()
    }
    return found | {f"start/{n}": t for n, t in (phase.start or {}).items()}


def assert_same_bits(one, other):
    """Two phases have gathered the same."""
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
        self.mean_ = mean_

    def broadcast_object(self, value):
        """Rank 0 has skipped no step."""
        return (0, *value[1:])

    def all_reduce_min(self, tensor):
        """The other has observed four steps."""
        return torch.minimum(tensor, torch.tensor(4))


class TestObserving:
    """The warm-up."""

    def test_follows_the_recursion(self):
        """C_t, its diagonal and its count are those of NumPy; before the first pair there is no variance."""
        flat = [(vector(g_one), vector(g_batch)) for g_one, g_batch in pairs()]
        expected = recursion.covariance(flat, lambda t: 1 / t)
        phase = Observing(weights(), full=True)
        assert phase.variance == {}
        for g_one, g_batch in pairs():
            assert phase.observe(samples(g_one), g_batch, "1/t")
        np.testing.assert_allclose(phase.matrix.numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(vector(phase.variance), np.diagonal(expected), rtol=1e-12)
        assert (phase.observed, phase.skipped) == (len(pairs()), 0)
        assert {name: tuple(v.shape) for name, v in phase.variance.items()} == {"w0": (), "w1": (3,), "w2": (2, 2)}

    def test_a_short_batch_is_put_on_the_scale_of_the_first(self):
        """The noise of a batch of 3 among batches of 8 counts (1 - 1/8) / (1 - 1/3) times; unknown sizes count once."""
        sizes = [8, 8, 3, None]
        factors = [1.0, 1.0, (7 / 8) / (2 / 3), 1.0]
        noise = [vector(g_one) - vector(g_batch) for g_one, g_batch in pairs(4)]
        expected = np.mean([factor * n**2 for factor, n in zip(factors, noise, strict=True)], axis=0)
        np.testing.assert_allclose(vector(after(pairs(4), sizes=sizes).variance), expected, rtol=1e-12)

    def test_moments_are_gathered_if_they_are_needed(self):
        """The plain means of g_S and g_S² over the steps; without a need there are none."""
        phase = after(pairs(), needs=frozenset({"mean", "second_moment"}))
        g_batch = np.stack([vector(g) for _, g in pairs()])
        np.testing.assert_allclose(phase._scale * vector(phase.moments["mean"].tensors), g_batch.mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            phase._scale * vector(phase.moments["second_moment"].tensors), (g_batch**2).mean(0), rtol=1e-12
        )
        assert phase.start is None
        assert after(pairs()).moments == {}

    def test_the_start_is_a_copy(self):
        """The parameters as they were when observing began, whatever becomes of them."""
        parameter = nn.Parameter(torch.zeros(3))
        phase = Observing({"w": parameter}, needs=frozenset({"start"}))
        parameter.data.add_(1.0)
        assert torch.equal(phase.start["w"], torch.zeros(3))
        assert not phase.start["w"].requires_grad

    @KINDS
    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("which", [0, 1], ids=["g_1", "g_S"])
    def test_a_pair_that_is_not_finite_only_counts(self, full, needs, bad, which):
        """One bad element of either gradient: nothing gathered changes, nor does t; a good pair afterwards goes in."""
        phase = Observing(weights(), full, needs)
        spoilt = pairs(3)[2]
        spoilt[which]["w1"][1] = bad
        assert not phase.observe(samples(spoilt[0]), spoilt[1], "1/t", 5)
        assert phase.variance == {}
        for i, pair in enumerate(pairs(2)):
            assert phase.observe(samples(pair[0]), pair[1], "1/t", 8)
            assert not phase.observe(samples(spoilt[0]), spoilt[1], "1/t", 5)
            assert phase.skipped == i + 2
        unspoilt = after(pairs(2), full, needs, sizes=[8, 8])
        unspoilt.skipped = phase.skipped
        assert_same_bits(phase, unspoilt)
        assert vector(phase.variance).all()

    @KINDS
    @pytest.mark.parametrize("gain", ["1/t", 1.0, 0.3, 0.9999999, lambda t: t**-0.6], ids=str)
    @pytest.mark.parametrize("bad", [[], [0], [0, 1, 5], [3, 4], [11], list(range(12))], ids=str)
    def test_where_the_device_is_asked_a_step_later_the_outcome_is_the_same(self, full, needs, gain, bad, monkeypatch):
        """Whatever steps are not finite: statistics, counts and what is saved, in any step."""
        phases_found = []
        for at_once in (True, False):
            monkeypatch.setattr(phases, "_costs_nothing_to_ask", lambda value, at_once=at_once: at_once)
            phase = Observing(weights(), full, needs)
            for t, (g_one, g_batch) in enumerate(pairs()):
                if t in bad:
                    g_one["w1"][1] = torch.nan
                phase.observe(samples(g_one), g_batch, gain, 8 if t % 3 else 5)
                if t == 6:
                    phase = Observing.from_state_dict(loaded(phase.state_dict()))
            phases_found.append(phase)
        one, other = phases_found
        assert (one.observed, one.skipped) == (other.observed, other.skipped) == (12 - len(bad), len(bad))
        assert one.batch_size == other.batch_size
        for name, tensor in tensors_of(one).items():
            torch.testing.assert_close(tensors_of(other)[name], tensor, rtol=1e-11, atol=1e-13)

    @KINDS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_saved_and_loaded_it_goes_on_to_the_same_bits(self, full, needs, dtype):
        """Through a file of plain types: the rest of the pairs leads to the same state as without a break."""
        observed, sizes = pairs(dtype=dtype), [8, 8, 3] * 4
        unbroken = after(observed, full, needs, sizes, dtype)
        resumed = Observing.from_state_dict(loaded(after(observed[:5], full, needs, sizes[:5], dtype).state_dict()))
        assert_same_bits(resumed, after(observed[:5], full, needs, sizes[:5], dtype))
        for (g_one, g_batch), size in zip(observed[5:], sizes[5:], strict=True):
            resumed.observe(samples(g_one), g_batch, "1/t", size)
        assert_same_bits(resumed, unbroken)

    def test_saved_before_a_run_it_is_empty(self):
        """A callback can be saved before it has seen a module."""
        phase = Observing.from_state_dict(loaded(Observing({}).state_dict()))
        assert_same_bits(phase, Observing({}))
        assert phase.variance == {}

    @pytest.mark.parametrize("full", [False, True])
    def test_any_parameter_name_survives_saving(self, full):
        """Also "covariance", the name of the full matrix in the state."""
        phase = Observing({"covariance": torch.zeros(3)}, full)
        phase.observe(samples({"covariance": torch.arange(3.0)}), {"covariance": torch.ones(3)}, "1/t")
        resumed = Observing.from_state_dict(loaded(phase.state_dict()))
        assert type(resumed.covariance) is type(phase.covariance)
        assert torch.equal(resumed.variance["covariance"], torch.tensor([1.0, 0.0, 1.0]))

    @pytest.mark.parametrize("full", [False, True])
    def test_two_processes_share_what_they_saw(self, full):
        """Every statistic becomes the mean over both, numbers the first one's; the start, the same on all, stays."""
        needs = frozenset({"mean", "second_moment", "start"})
        here, there = after(pairs(6), full, needs), after(pairs(12)[6:], full, needs)
        expected = {n: (t + tensors_of(there)[n]) / 2 for n, t in tensors_of(here).items() if "start" not in n}
        there.skipped = 3
        sent = []
        there.share(Other(sent.append))
        here.share(Other(lambda tensor: tensor.add_(sent.pop(0)).div_(2)))
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
    def test_it_moves_to_the_device_of_its_parameters(self, full, needs):
        """A checkpoint comes on the CPU; everything gathered follows the parameters (here to the meta device)."""
        phase = after(pairs(2), full, needs)
        assert {t.device.type for t in tensors_of(phase).values()} == {"cpu"}
        phase.to({name: w.to("meta") for name, w in weights().items()})
        assert {t.device.type for t in tensors_of(phase).values()} == {"meta"}


class TestDecision:
    """From evidence to masks."""

    @pytest.mark.parametrize("full", [False, True])
    @pytest.mark.parametrize("k", [0, 1, 3, 8])
    def test_the_k_lowest_variances_freeze(self, k, full):
        """By the diagonal that NumPy finds, over all parameters together; what it was based on is kept with it."""
        phase = after(pairs(), full)
        v = np.diagonal(recursion.covariance([(vector(a), vector(b)) for a, b in pairs()], lambda t: 1 / t))
        frozen = phase.freeze(orderings.variance, weights(), seed=0, k=k)
        assert vector(frozen.frozen).tolist() == [float(i in np.argsort(v)[:k]) for i in range(8)]
        assert frozen.fraction == k / 8
        np.testing.assert_allclose(vector(frozen.variance), v, rtol=1e-12)
        assert (frozen.matrix is not None) == full
        assert (frozen.observed, frozen.skipped) == (phase.observed, phase.skipped)
        assert frozen.shapes == phase.shapes

    @pytest.mark.parametrize(
        ("order", "score"),
        [
            (orderings.magnitude, lambda e: 2.0 + 0 * e["mean"]),
            (orderings.second_moment, lambda e: e["second_moment"]),
            (orderings.snr, lambda e: np.abs(e["mean"]) / np.sqrt(e["variance"])),
            (orderings.displacement, lambda e: np.full(8, 3.0)),
        ],
        ids=["magnitude", "second_moment", "snr", "displacement"],
    )
    def test_an_ordering_gets_the_evidence_that_it_needs(self, order, score):
        """Scores are those of NumPy on NumPy's own moments; the weights have moved by 3 since the start."""
        phase = after(pairs(), needs=frozenset(orderings.needed_by(order)))
        now = {name: w + 3.0 if order is orderings.displacement else w for name, w in weights().items()}
        g_batch = np.stack([vector(g) for _, g in pairs()])
        noise = np.stack([vector(g) for g, _ in pairs()]) - g_batch
        evidence = {
            "mean": g_batch.mean(0),
            "second_moment": (g_batch**2).mean(0),
            "variance": (noise**2).mean(0),
        }
        np.testing.assert_allclose(vector(phase.scores(order, now, seed=0)), score(evidence), rtol=1e-12)

    def test_ties_go_by_the_order_of_the_parameters_not_of_the_scores(self):
        """An ordering may return its dict in any order: the first parameter's elements freeze first."""
        phase = after(pairs(2))
        frozen = phase.freeze(
            lambda e: {n: torch.zeros_like(e.weights[n]) for n in ("w2", "w1", "w0")}, weights(), 0, 3
        )
        assert list(frozen.frozen) == ["w0", "w1", "w2"]
        assert vector(frozen.frozen).tolist() == [1, 1, 1, 0, 0, 0, 0, 0]

    @pytest.mark.parametrize(
        ("order", "text"),
        [
            (lambda e: {"w0": e.weights["w0"]}, r"\['w1', 'w2'\] missing"),
            (lambda e: {n: w * float("nan") for n, w in e.weights.items()}, "NaN for 1 elements of 'w0'"),
            (lambda e: {n: w.flatten() for n, w in e.weights.items()}, r"'w0' has the shape \(\), its scores \(1,\)"),
        ],
        ids=["missing", "nan", "shape"],
    )
    def test_scores_that_do_not_order_are_refused(self, order, text):
        """Nothing freezes by them."""
        with pytest.raises(ValueError, match=text):
            after(pairs(2)).freeze(order, weights(), 0, 1)

    def test_the_seed_reaches_the_random_order(self):
        """The same seed freezes the same elements, another one others."""
        first, again, other = (
            vector(after(pairs(2)).freeze(orderings.random, weights(), seed, 4).frozen).tolist() for seed in (1, 1, 2)
        )
        assert first == again
        assert first != other

    @pytest.mark.parametrize(
        "order",
        [orderings.variance, orderings.magnitude, lambda e: e.weights],
        ids=["variance", "magnitude", "weights"],
    )
    def test_scores_are_of_the_time_of_the_decision(self, order):
        """Live weights move on, the scores, from which the ranks are read later, do not move with them."""
        phase, now = after(pairs(2)), weights()
        frozen = phase.freeze(order, now, 0, 4)
        before = vector(frozen.scores)
        for w in now.values():
            w.add_(10.0)
        assert vector(frozen.scores).tolist() == before.tolist()

    def test_scores_carry_no_graph(self):
        """An ordering that computes with parameters does not keep their graph alive, or break saving."""
        now = {name: w.requires_grad_() for name, w in weights().items()}
        scores = after(pairs(2)).scores(lambda e: {n: w.square() for n, w in e.weights.items()}, now, 0)
        assert not any(score.requires_grad for score in scores.values())


class TestFrozen:
    """The decision, and what it can tell."""

    @KINDS
    def test_saved_and_loaded_it_is_the_same(self, full, needs):
        """Through a file of plain types: masks, scores, variances and counts to the bit."""
        frozen = after(pairs(), full, needs).freeze(orderings.variance, weights(), 0, 3)
        again = Frozen.from_state_dict(loaded(frozen.state_dict()))
        for field in ("frozen", "scores", "variance"):
            ours, theirs = getattr(again, field), getattr(frozen, field)
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
        assert (again.matrix is None) == (not full)
        assert again.matrix is None or torch.equal(again.matrix, frozen.matrix)
        assert (again.observed, again.skipped, again.shapes) == (frozen.observed, frozen.skipped, frozen.shapes)
        assert again.fraction == 3 / 8

    @staticmethod
    def decided(variance, k, scores=None):
        """A decision over one tensor of the given variances, by them or by other scores."""
        v = {"w": torch.tensor(variance)}
        phase = Observing(v)
        phase.covariance.tensors = v
        return phase.freeze(lambda e: v if scores is None else {"w": torch.tensor(scores)}, v, 0, k)

    @pytest.mark.parametrize(
        ("variance", "scores", "k", "dead"),
        [
            ([0.0, 0.0, 1.0, 2.0], None, 3, 2),
            ([0.0, 0.0, 0.0, 2.0], None, 2, 2),
            ([1.0, 2.0], None, 1, 0),
            ([0.0, 0.0, 1.0], [5.0, 0.0, 1.0], 3, 1),
            ([0.0, 0.0, 1.0], [0.0, 0.0, -1.0], 3, 0),
            ([0.0, 1.0], None, 0, 0),
        ],
        ids=["fewer than k", "more than k", "none", "not first by score", "noisiest first", "nothing frozen"],
    )
    def test_elements_that_never_moved_are_counted(self, variance, scores, k, dead):
        """Frozen, without noise, and first in the order: an element that ranks higher was chosen for another reason."""
        assert self.decided(variance, k, scores).never_moved == dead

    def test_an_empty_parameter_is_no_obstacle(self):
        """A parameter without elements has no lowest score and no share; the others are counted as without it."""
        empty = torch.zeros(0, 3)
        v = {"e": empty, "w": torch.tensor([0.0, 1.0])}
        frozen = Observing(v).freeze(lambda e: v, v, 0, 1)
        assert frozen.fraction == 0.5
        assert frozen.never_moved == 1

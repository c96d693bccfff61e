"""`Decision`: from evidence to masks on bare tensors, and what a decision can tell."""

import copy

import numpy as np
import pytest
import torch

from lightning_gcfreeze import _computed, decision, orderings
from lightning_gcfreeze._computed import Computed
from lightning_gcfreeze.decision import Decision, decide, scores_now
from lightning_gcfreeze.observing import Observing
from tests.conformance import pairs, vector
from tests.observed import KINDS, observed, through_a_file, weights
from tests.oracles import recursion


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3, 8])
def test_the_k_lowest_variances_freeze(k, full):
    """By the diagonal that NumPy finds, over all parameters together; what it was based on is kept with it."""
    observing = observed(pairs(), full)
    v = np.diagonal(recursion.covariance([(vector(a), vector(b)) for a, b in pairs()], lambda t: 1 / t))
    frozen = decide(observing, orderings.variance, weights(), seed=0, k=k)
    assert vector(frozen.frozen).tolist() == [float(i in np.argsort(v)[:k]) for i in range(8)]
    assert frozen.fraction == k / 8
    np.testing.assert_allclose(vector(frozen.variance), v, rtol=1e-12)
    assert (frozen.matrix is not None) == full
    assert (frozen.observed, frozen.skipped) == (observing.observed, observing.skipped)
    assert frozen.shapes == observing.shapes


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
def test_ordering_gets_the_evidence_that_it_needs(order, score):
    """Scores are those of NumPy on NumPy's own moments; the weights have moved by 3 since the start."""
    observing = observed(pairs(), needs=frozenset(orderings.needed_by(order)))
    now = {name: w + 3.0 if order is orderings.displacement else w for name, w in weights().items()}
    g_batch = np.stack([vector(g) for _, g in pairs()])
    noise = np.stack([vector(g) for g, _ in pairs()]) - g_batch
    evidence = {
        "mean": g_batch.mean(0),
        "second_moment": (g_batch**2).mean(0),
        "variance": (noise**2).mean(0),
    }
    np.testing.assert_allclose(vector(scores_now(observing, order, now, 0, "element")), score(evidence), rtol=1e-12)


def test_ties_go_by_the_order_of_the_parameters():
    """An ordering may return its dict in any order: the first parameter's elements freeze first."""
    observing = observed(pairs(2))
    frozen = decide(
        observing, lambda e: {n: torch.zeros_like(e.weights[n]) for n in ("w2", "w1", "w0")}, weights(), 0, 3
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
def test_scores_that_do_not_order_the_elements_are_refused(order, text):
    """Nothing freezes by them."""
    with pytest.raises(ValueError, match=text):
        decide(observed(pairs(2)), order, weights(), 0, 1)


def test_random_order_depends_on_the_seed():
    """The same seed freezes the same elements, another one others."""
    first, again, other = (
        vector(decide(observed(pairs(2)), orderings.random, weights(), seed, 4).frozen).tolist() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "order",
    [orderings.variance, orderings.magnitude, lambda e: e.weights],
    ids=["variance", "magnitude", "weights"],
)
def test_scores_stay_when_live_weights_move_on(order):
    """Live weights move on, the scores, from which the ranks are read later, do not move with them."""
    observing, now = observed(pairs(2)), weights()
    frozen = decide(observing, order, now, 0, 4)
    before = vector(frozen.scores)
    for w in now.values():
        w.add_(10.0)
    assert vector(frozen.scores).tolist() == before.tolist()


def test_scores_carry_no_graph():
    """An ordering that computes with parameters does not keep their graph alive, or break saving."""
    now = {name: w.requires_grad_() for name, w in weights().items()}
    scores = scores_now(observed(pairs(2)), lambda e: {n: w.square() for n, w in e.weights.items()}, now, 0, "element")
    assert not any(score.requires_grad for score in scores.values())


@KINDS
def test_decision_saved_and_loaded_is_the_same(full, needs):
    """Through a file of plain types: masks, scores, variances and counts to the bit."""
    frozen = decide(observed(pairs(), full, needs), orderings.variance, weights(), 0, 3)
    again = Decision.from_state_dict(through_a_file(frozen.state_dict()))
    for field in ("frozen", "scores", "variance"):
        ours, theirs = getattr(again, field), getattr(frozen, field)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert (again.matrix is None) == (not full)
    assert again.matrix is None or torch.equal(again.matrix, frozen.matrix)
    assert (again.observed, again.skipped, again.shapes) == (frozen.observed, frozen.skipped, frozen.shapes)
    assert again.fraction == 3 / 8


def decided(variance, k, scores=None):
    """A decision over one tensor of the given variances, by them or by other scores."""
    v = {"w": torch.tensor(variance)}
    observing = Observing(v)
    observing.covariance.tensors = v
    return decide(observing, lambda e: v if scores is None else {"w": torch.tensor(scores)}, v, 0, k)


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
def test_elements_that_never_had_a_gradient_are_counted(variance, scores, k, dead):
    """Frozen, without noise, and first in the order: an element that ranks higher was chosen for another reason."""
    assert decided(variance, k, scores).n_without_gradient == dead


def test_ordering_gets_the_moments_that_were_not_observed():
    """They are passed on as they are; the scores are computed with them alone."""
    moments = {"momentum": {"w": torch.tensor([2.0, -3.0, 0.0])}, "update": {"w": torch.tensor([1.0, -0.5, 0.0])}}
    w = {"w": torch.zeros(3)}
    observing = Observing(w, needs=frozenset(moments), reads_samples=False)
    assert scores_now(observing, orderings.momentum, w, 0, "element", moments)["w"].tolist() == [2.0, 1.5, 0.0]
    frozen = decide(observing, orderings.momentum, w, 0, 2, moments=moments)
    assert frozen.frozen["w"].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("held", "dead"), [(None, 2), ([True, False, False, False], 1), ([False, False, True, False], 2)], ids=str
)
def test_moments_tell_which_elements_never_had_a_gradient_unless_they_were_frozen(held, dead):
    """Those of a frozen element are 0 in any case. A small or negative moment is that of a gradient."""
    moments = {"update": {"w": torch.tensor([0.0, 0.0, -1e-30, 2.0])}}
    w = {"w": torch.zeros(4)}
    observing = Observing(w, reads_samples=False)
    held = None if held is None else {"w": torch.tensor(held)}
    frozen = decide(observing, lambda e: {"w": e.update["w"].abs()}, w, 0, 3, moments=moments, held=held)
    assert frozen.n_without_gradient == dead


def test_statistics_tell_it_where_there_are_some():
    """A gradient that was observed counts, whatever the optimizer made of it."""
    observing = observed(pairs(2), needs=frozenset({"second_moment"}))
    zeros = {name: torch.zeros_like(w) for name, w in weights().items()}
    frozen = decide(observing, orderings.momentum, weights(), 0, 8, moments={"momentum": zeros, "update": zeros})
    assert frozen.n_without_gradient == 0


def test_parameter_without_elements_changes_nothing_for_the_others():
    """A parameter without elements has no lowest score and no share; the others are counted as without it."""
    empty = torch.zeros(0, 3)
    v = {"e": empty, "w": torch.tensor([0.0, 1.0])}
    frozen = decide(Observing(v), lambda e: v, v, 0, 1)
    assert frozen.fraction == 0.5
    assert frozen.n_without_gradient == 1


def test_scores_that_are_the_weights_stay_as_they_were_when_the_weights_move():
    """An ordering may return what it was given."""
    w = {"w": torch.tensor([3.0, 1.0, 2.0])}
    address = w["w"].data_ptr()
    frozen = decide(Observing(w, reads_samples=False), lambda e: e.weights, w, 0, 2)
    w["w"].mul_(-10)
    assert w["w"].data_ptr() == address  # they are where they were, too: somebody may have a view of that memory
    assert frozen.scores["w"].tolist() == [3.0, 1.0, 2.0]
    assert frozen.frozen["w"].tolist() == [False, True, True]
    assert w["w"].tolist() == [-30.0, -10.0, -20.0]


def test_ordering_that_writes_to_its_evidence_changes_neither_weights_nor_statistics():
    """It must not, but training must not suffer from it."""
    observing, w = observed(pairs(2)), weights()

    def order(evidence):
        return {name: evidence.weights[name].zero_() + evidence.variance[name].zero_() for name in w}

    before = vector(observing.variance).copy()
    decide(observing, order, w, 0, 3)
    assert vector(w).tolist() == [-2.0] * 8
    assert vector(observing.variance).tolist() == before.tolist()
    assert before.any()


def test_evidence_that_was_kept_is_an_error_and_a_copy_is_not():
    """Later its weights would be those of a later step."""
    kept = []

    def order(evidence):
        kept.extend([evidence, copy.deepcopy(evidence)])
        return evidence.variance

    scores = scores_now(observed(pairs(2)), order, weights(), 0, "element")
    with pytest.raises(RuntimeError, match=r"evidence of 'w0' is read after its ordering has returned"):
        kept[0].weights["w0"]
    assert vector(kept[1].variance).tolist() == vector(scores).tolist()


@pytest.mark.parametrize(
    "order", sorted(orderings.BY_ELEMENT, key=lambda order: order.__name__), ids=lambda o: o.__name__
)
def test_scores_in_pieces_are_those_of_the_whole(order, monkeypatch):
    """A piece is two rows; NumPy joins what the ordering says of evidence that is plain tensors."""
    generator = torch.Generator().manual_seed(0)

    def drawn():
        return {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in {"a": (9, 4), "b": (7,)}.items()}

    fields = ("variance", "weights", "mean", "recent_mean", "second_moment", "start", "momentum", "update", "divisor")
    plain = {field: drawn() for field in (*fields, "movement")}
    expected = order(orderings.Evidence(seed=0, **plain))
    evidence = orderings.Evidence(
        seed=0,
        **{f: Computed(named, lambda name, cut, named=named: cut(named[name])) for f, named in plain.items()},
    )
    monkeypatch.setattr(_computed, "PIECE_NUMEL", 8)
    found = decision.scored(order, evidence, plain["weights"])
    for name, score in expected.items():
        np.testing.assert_array_equal(found[name].numpy(), score.numpy())

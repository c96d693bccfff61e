"""Exactly the k elements with the lowest scores, ties by position; and which parameters are eligible."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gcfreeze import selection
from tests.selection.scores import INF, named_scores


def flat(named):
    """Return all elements in the order that decides ties, as Python numbers."""
    return [element for tensor in named.values() for element in tensor.flatten().tolist()]


def lowest_by_hand(scores, k):
    """Sort the positions by (score, position), and take k: the oracle."""
    elements = flat(scores)
    chosen = set(sorted(range(len(elements)), key=lambda i: (elements[i], i))[:k])
    return [i in chosen for i in range(len(elements))]


@settings(max_examples=150, deadline=None)
@given(named_scores())
@example(({"w": torch.tensor([0.0, -0.0, 0.0, -0.0])}, 2))
@example(({"w": torch.tensor([INF, -INF, INF])}, 2))
def test_lowest_k_marks_exactly_the_k_lowest(case):
    """As a sort in pure Python does, for any ties, shapes, dtypes, infinities and signs of zero."""
    scores, k = case
    masks = selection.lowest_k(scores, k)
    assert [(name, mask.shape, mask.dtype) for name, mask in masks.items()] == [
        (name, score.shape, torch.bool) for name, score in scores.items()
    ]
    assert flat(masks) == lowest_by_hand(scores, k)
    assert sum(flat(masks)) == k


@settings(max_examples=100, deadline=None)
@given(named_scores())
@example(({"w": torch.tensor([0.0, -0.0, 0.0, -0.0])}, 2))
def test_masks_are_the_elements_with_rank_up_to_k(case):
    """The ranks are a permutation of 1, …, p."""
    scores, k = case
    ranks = selection.ranks(scores)
    assert sorted(flat(ranks)) == list(range(1, len(flat(scores)) + 1))
    masks = selection.lowest_k(scores, k)
    for name, score in scores.items():
        assert ranks[name].shape == score.shape
        assert ranks[name].dtype == torch.int64
        assert torch.equal(masks[name], ranks[name] <= k)


@settings(max_examples=25, deadline=None)
@given(named_scores(values=[0.0, 1.0, -1.0]))
def test_mask_for_k_is_contained_in_the_mask_for_k_plus_1(case):
    """From k = 0 to k = p each mask adds exactly one element to the one before."""
    scores, _ = case
    chosen = [
        {i for i, mark in enumerate(flat(selection.lowest_k(scores, k))) if mark} for k in range(len(flat(scores)) + 1)
    ]
    assert chosen[0] == set()
    assert len(chosen[-1]) == len(flat(scores))
    assert all(smaller < larger for smaller, larger in pairwise(chosen))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_ties_among_thousands_of_elements_go_by_position(dtype):
    """Sorting routines have a stable shortcut for small inputs; those that are unstable fail here."""
    scores = {f"w{i}": torch.randint(0, 3, (40, 50)).to(dtype) for i in range(3)}
    ranks = flat(selection.ranks(scores))
    for k in (1, 1000, 2500, 5999):
        assert flat(selection.lowest_k(scores, k)) == lowest_by_hand(scores, k)
        assert [rank <= k for rank in ranks] == lowest_by_hand(scores, k)


def test_ties_of_scores_that_are_not_contiguous_go_row_by_row():
    """A transposed tensor has other strides, but the same elements in the same order."""
    scores = torch.randint(0, 2, (7, 5)).float()
    transposed = scores.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert torch.equal(selection.lowest_k({"w": transposed}, 9)["w"], selection.lowest_k({"w": scores}, 9)["w"])
    assert torch.equal(selection.ranks({"w": transposed})["w"], selection.ranks({"w": scores})["w"])


def test_ranks_of_the_example_in_the_paper():
    """diag(0.3, 0.2, 0.25) has the ranks [3, 1, 2], a rank for every element; argsort gives [2, 3, 1]."""
    scores = {"w": torch.tensor([0.3, 0.2, 0.25])}
    assert selection.ranks(scores)["w"].tolist() == [3, 1, 2]
    assert selection.lowest_k(scores, 2)["w"].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("k", "eligible", "count"),
    [
        (0, 10, 0),
        (10, 10, 10),
        (1, 10, 1),
        (1.0, 10, 10),
        (0.0, 10, 0),
        (0.25, 57, 14),
        (0.75, 57, 43),
        (0.5, 301, 150),
        (1e-9, 10, 0),
    ],
)
def test_k_is_resolved_to_a_count(k, eligible, count):
    """An int is a count, so 1 is one element; a float is a fraction, so 1.0 is all, rounded to the nearest count."""
    assert selection.resolve_count(k, eligible) == count


def test_count_above_the_eligible_elements_is_refused():
    """The error names both numbers and three ways out."""
    with pytest.raises(
        ValueError, match=r"`k=11` is more than the 10 eligible elements\. Lower it, pass a float.*widen"
    ):
        selection.resolve_count(11, 10)


class TestCheckScores:
    """Scores that do not order the parameters are refused before anything freezes."""

    parameters = {"a": torch.zeros(2, 3), "b": torch.zeros(())}  # noqa: RUF012

    @pytest.mark.parametrize("value", [0.0, INF, -INF])
    def test_one_number_per_element_passes(self, value):
        """Infinities can be ordered; the order of the names does not matter here."""
        scores = {"b": torch.tensor(value), "a": torch.full((2, 3), value)}
        selection.check_scores(scores, self.parameters)
        assert flat(selection.lowest_k(scores, 3)) == [True, True, True, False, False, False, False]

    @pytest.mark.parametrize(
        ("scores", "text"),
        [
            ({"a": torch.zeros(2, 3)}, r"must score every eligible parameter: \['b'\] missing, \[\] unknown"),
            (parameters | {"c": torch.zeros(1)}, r"\[\] missing, \['c'\] unknown"),
            ({}, r"\['a', 'b'\] missing"),
            (parameters | {"a": torch.zeros(3, 2)}, r"'a' has the shape \(2, 3\), its scores \(3, 2\)"),
            (parameters | {"b": torch.zeros(1)}, r"'b' has the shape \(\), its scores \(1,\)"),
            (parameters | {"a": torch.tensor([[0, 1, math.nan], [2, math.nan, 3]])}, r"NaN for 2 elements of 'a'"),
        ],
        ids=["missing", "unknown", "empty", "transposed", "one too many axes", "nan"],
    )
    def test_anything_else_is_refused(self, scores, text):
        """The error names the parameters, shapes or counts that are wrong."""
        with pytest.raises(ValueError, match=text):
            selection.check_scores(scores, self.parameters)


class TestEligible:
    """Parameters that require a gradient, that the optimizer has, and whose names match."""

    @pytest.fixture
    def module(self):
        return nn.ModuleDict({"body": nn.Linear(2, 3), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 1, bias=False)})

    ALL = ("body.weight", "body.bias", "norm.weight", "norm.bias", "head.weight")

    @pytest.mark.parametrize(
        ("include", "exclude", "names"),
        [
            (None, None, ALL),
            (["*.weight"], None, ("body.weight", "norm.weight", "head.weight")),
            (["head.*", "body.bias"], None, ("body.bias", "head.weight")),
            (None, ["norm.*", "*.bias"], ("body.weight", "head.weight")),
            (["*.weight"], ["body.*"], ("norm.weight", "head.weight")),
            (["*"], [], ALL),
            (["[bn]*.bias"], None, ("body.bias", "norm.bias")),
        ],
    )
    def test_names_that_match_the_patterns_are_eligible(self, module, include, exclude, names):
        """One of `include`, none of `exclude`; the result is in the order of the module, not of the patterns."""
        chosen = selection.eligible(module, torch.optim.SGD(module.parameters()), include, exclude)
        assert tuple(chosen) == names
        assert all(chosen[name] is p for name, p in module.named_parameters() if name in names)

    def test_patterns_are_case_sensitive(self):
        """`fnmatch` ignores the case on Windows, but names in a module may differ by it."""
        module = nn.ModuleDict({"A": nn.Linear(1, 1, bias=False), "a": nn.Linear(1, 1, bias=False)})
        assert list(selection.eligible(module, torch.optim.SGD(module.parameters()), ["a.*"], None)) == ["a.weight"]

    def test_parameters_that_are_not_trained_are_left_out(self, module):
        """Neither parameters without `requires_grad` nor those that the optimizer does not have."""
        module["norm"].requires_grad_(False)
        groups = [{"params": module["body"].parameters()}, {"params": module["norm"].parameters(), "lr": 1.0}]
        chosen = selection.eligible(module, torch.optim.SGD(groups), None, None)
        assert tuple(chosen) == ("body.weight", "body.bias")

    def test_tied_parameter_is_eligible_once(self, module):
        """Under its first name, as in ``named_parameters()``."""
        module["copy"] = nn.Linear(2, 3)
        module["copy"].weight = module["body"].weight
        chosen = selection.eligible(module, torch.optim.SGD(module.parameters()), ["*.weight"], None)
        assert tuple(chosen) == ("body.weight", "norm.weight", "head.weight")

    def test_no_eligible_parameter_is_refused_with_the_trained_names(self, module):
        """The error repeats the patterns and lists what the optimizer trains."""
        optimizer = torch.optim.SGD(module["body"].parameters())
        with pytest.raises(ValueError, match=r"`include=\['head\.\*'\]`.*trains body\.weight, body\.bias\."):
            selection.eligible(module, optimizer, ["head.*"], None)

    def test_optimizer_of_other_parameters_is_refused(self, module):
        """An optimizer of other parameters has nothing to freeze; the error says what it would need."""
        with pytest.raises(ValueError, match="trains none that belongs to the module and requires a gradient"):
            selection.eligible(module, torch.optim.SGD([torch.zeros(1, requires_grad=True)]), None, None)


def by_hand(scores, k, granularity):
    """Take units in the order of their means while they fit, in plain Python."""
    units = []
    for name, score in scores.items():
        rows = score.reshape(len(score), -1).tolist() if granularity == "row" else [score.flatten().tolist()]
        units += [(sum(row) / len(row), len(units) + i, name, i, len(row)) for i, row in enumerate(rows) if row]
    chosen = {name: set() for name in scores}
    for _, _, name, i, size in sorted(units):
        if size > k:
            break
        k -= size
        chosen[name].add(i)
    return chosen


class TestRowsAndTensors:
    """Whole rows and tensors, as many as fit into k elements."""

    @given(
        st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4),
        st.integers(0, 2**31),
        st.floats(0, 1),
        st.sampled_from(["row", "tensor"]),
        st.booleans(),
    )
    def test_units_are_taken_in_the_order_of_their_means_while_they_fit(
        self, shapes, seed, fraction, granularity, ties
    ):
        """Against a loop over units, with and without ties."""
        rng = np.random.default_rng(seed)
        draw = (lambda shape: rng.integers(0, 2, shape) * 1.0) if ties else rng.random
        scores = {f"w{i}": torch.as_tensor(draw(shape)) for i, shape in enumerate(shapes)}
        k = int(fraction * sum(score.numel() for score in scores.values()))
        pooled = selection.pooled(scores, granularity)
        masks = selection.lowest_k(pooled, k, granularity)
        chosen = by_hand(scores, k, granularity)
        for name, mask in masks.items():
            assert mask.shape == scores[name].shape
            units = mask.reshape(len(mask), -1) if granularity == "row" else mask.reshape(1, -1)
            assert {i for i, unit in enumerate(units.tolist()) if all(unit)} == chosen[name]
            assert {i for i, unit in enumerate(units.tolist()) if any(unit)} == chosen[name]
        count = sum(int(mask.sum()) for mask in masks.values())
        places = selection.ranks(pooled)
        assert all(torch.equal(places[name] <= count, mask) for name, mask in masks.items())

    def test_unit_that_does_not_fit_ends_the_selection(self):
        """A later unit is noisier, even if it would fit: masks stay nested in k."""
        scores = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0, 2.0, 2.0]), "c": torch.tensor([3.0])}
        masks = [selection.lowest_k(selection.pooled(scores, "tensor"), k, "tensor") for k in range(6)]
        frozen = [[name for name, mask in of_k.items() if mask.all()] for of_k in masks]
        assert frozen == [[], ["a"], ["a"], ["a"], ["a", "b"], ["a", "b", "c"]]

    def test_scalar_is_one_row_and_empty_tensor_has_no_units(self):
        """Both are accepted, with either granularity."""
        scores = {"s": torch.tensor(1.0), "e": torch.empty(0, 3), "f": torch.empty(2, 0), "m": torch.ones(2, 2)}
        for granularity in ("row", "tensor"):
            pooled = selection.pooled(scores, granularity)
            assert {name: score.shape for name, score in pooled.items()} == {n: s.shape for n, s in scores.items()}
            masks = selection.lowest_k(pooled, 1, granularity)
            assert [int(mask.sum()) for mask in masks.values()] == [1, 0, 0, 0]

    def test_means_of_half_precision_scores_are_computed_in_float64(self):
        """The mean of a thousand bfloat16 scores differs from that of another row by one score in its last bit."""
        scores = {"a": torch.full((1, 1000), 1.0, dtype=torch.bfloat16), "b": torch.full((1, 1000), 1.0).bfloat16()}
        scores["a"][0, 0] = 1.0078125
        masks = selection.lowest_k(selection.pooled(scores, "row"), 1000, "row")
        assert [bool(mask.all()) for mask in masks.values()] == [False, True]

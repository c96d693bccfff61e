"""`Computed` computes what is asked for, and cuts cover a tensor once."""

import copy
import pickle

import numpy as np
import pytest
import torch

from lightning_gcfreeze import _computed
from lightning_gcfreeze._computed import Computed, cuts, part

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0)}


def doubled(asked):
    def compute(name, cut):
        asked.append(name)
        return cut(TENSORS[name]) * 2

    return Computed(TENSORS, compute)


def test_tensors_are_computed_when_they_are_asked_for_and_not_kept():
    asked = []
    named = doubled(asked)
    assert (list(named), len(named), "a" in named, "c" in named, asked) == (["a", "b"], 2, True, False, [])
    assert named["a"].tolist() == [[0, 2, 4], [6, 8, 10]]
    assert named["a"] is not named["a"]
    assert asked == ["a"] * 3
    with pytest.raises(KeyError):
        named["c"]


def test_parts_are_computed_alone():
    named = doubled([])
    assert named.part("a", lambda t: t[1:]).tolist() == part(dict(named), "a", lambda t: t[1:]).tolist() == [[6, 8, 10]]
    only = named.only("a", lambda t: t[:, 1:])
    assert list(only) == ["a"]
    assert only["a"].tolist() == [[2, 4], [8, 10]]
    assert only.part("a", lambda t: t[1:]).tolist() == [[8, 10]]
    assert list(named.only("c", lambda t: t)) == []


def test_copies_and_pickles_are_dicts():
    for copied in (copy.deepcopy(doubled([])), pickle.loads(pickle.dumps(Computed(TENSORS, of_tensors)))):
        assert type(copied) is dict
        assert set(copied) == {"a", "b"}


def of_tensors(name, cut):
    return cut(TENSORS[name])


def test_closed_one_is_an_error_that_says_what_to_do():
    named = doubled([])
    named.close()
    with pytest.raises(RuntimeError, match=r"evidence of 'a' is read after.*copy\.deepcopy\(evidence\)"):
        named["a"]


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (1000,), (129, 7), (7, 129), (3, 500), (1, 2000), (70, 3, 2, 2)], ids=str
)
def test_cuts_cover_every_element_once(shape, monkeypatch):
    """By NumPy, in two memory formats; no piece is much larger than asked for, but for a row that is."""
    monkeypatch.setattr(_computed, "PIECE_NUMEL", 100)
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    formats = [torch.as_tensor(numbers)]
    if len(shape) > 1:
        formats.append(torch.as_tensor(np.ascontiguousarray(np.moveaxis(numbers, 0, -1))).movedim(-1, 0))
    for tensor in formats:
        pieces = [cut(tensor) for cut in cuts(tensor)]
        np.testing.assert_array_equal(np.concatenate([piece.numpy().reshape(-1) for piece in pieces]), numbers.ravel())
        row = numbers.size // max(len(numbers), 1) if shape else 1
        assert all(piece.numel() <= max(100, row) for piece in pieces)
        assert (len(pieces) > 1) == (numbers.size > 100 and shape[0] > 1)

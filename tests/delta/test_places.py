"""The code of places: decoded bit by bit by the oracle, and near their entropy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gcfreeze.delta import CorruptFileError, places
from tests.oracles import delta_file


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), unique=True).map(sorted))
def test_any_places_there_and_back(found):
    """By our decoder and by the oracle's."""
    code, low_bits = places.encode(np.array(found, dtype=np.int64))
    assert places.decode(code, len(found), low_bits).tolist() == found
    assert delta_file.places(code, len(found), low_bits) == found


@pytest.mark.parametrize("found", [[2**45], [0, 2**45], [2**33, 2**33 + 1, 2**34]])
def test_places_of_huge_tensors_do_not_overflow(found):
    code, low_bits = places.encode(np.array(found, dtype=np.int64))
    assert places.decode(code, len(found), low_bits).tolist() == found


@pytest.mark.parametrize(("live", "above"), [(0.5, 1.01), (0.3, 1.02), (0.1, 1.03), (0.01, 1.01), (0.001, 1.03)])
def test_random_places_take_little_more_than_their_entropy(live, above):
    """In bits a place; at one half the code is a bitmap."""
    found = np.flatnonzero(np.random.default_rng(0).random(1_000_000) < live)
    entropy = -(live * np.log2(live) + (1 - live) * np.log2(1 - live)) / live
    code, low_bits = places.encode(found)
    assert entropy * 0.98 < 8 * len(code) / len(found) < entropy * above
    assert (low_bits == 0) == (live >= 0.5)


@pytest.mark.parametrize(
    ("code", "count", "low_bits", "text"),
    [
        (b"", 1, 0, "0 bytes cannot hold 1 places"),
        (b"\xff", 9, 0, "1 bytes cannot hold 9 places"),
        (b"\xff", 10**12, 0, "cannot hold 1000000000000"),
        (b"\xff", -1, 0, "cannot hold -1"),
        (b"\xff\xff", 2, 29, "with 29 low bits"),
        (b"\xff", 7, 0, "announces 7 places of a tensor and has 8"),
        (b"\xff\x00", 3, 2, "announces 3 places of a tensor and has 0"),
    ],
)
def test_what_is_no_code_is_refused(code, count, low_bits, text):
    with pytest.raises(CorruptFileError, match=text):
        places.decode(code, count, low_bits)

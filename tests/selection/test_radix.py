"""The k-th of many numbers against NumPy's sort."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gcfreeze.selection import radix

FLOATS = [0.0, -0.0, 1e-42, -1e-42, 0.5, -0.5, 3.0, -3.0, float("inf"), -float("inf")]


def of_kind(kind: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Spread over all magnitudes, few values many times, or special ones."""
    generator = np.random.default_rng(seed)
    if not dtype.is_floating_point:
        high = torch.iinfo(dtype).max if kind == "spread" else 3
        return torch.from_numpy(np.asarray(generator.integers(-high - 1, high, shape, endpoint=True))).to(dtype)
    if kind == "spread":
        values = generator.normal(size=shape) * 10.0 ** generator.integers(-30, 30, shape)
    else:
        values = generator.choice(FLOATS if kind == "special" else [-1.0, 2.0, 2.5], shape)
    return torch.from_numpy(np.asarray(values)).to(dtype)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    st.sampled_from(["spread", "few", "special"]),
    st.sampled_from([torch.float32, torch.float64, torch.int32, torch.int64]),
    st.lists(st.sampled_from([(), (0,), (1,), (7,), (5, 11), (300,)]), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.booleans(),
    st.floats(0, 1),
)
def test_it_is_that_of_a_sort(kind, dtype, shapes, seed, many, fraction):
    """With its ties, and how many are lower; by digits of either width, whatever the pieces."""
    tensors = [of_kind(kind, dtype, shape, seed + i) for i, shape in enumerate([*shapes, (3,)])]
    together = np.sort(np.concatenate([t.numpy().ravel() for t in tensors]))
    k = min(1 + int(fraction * len(together)), len(together))
    with patch.object(radix, "MANY", 1 if many else 10**9), patch.object(radix, "AT_LEAST", 4 if many else 10**6):
        numbers = lambda: (some for t in tensors for _, some in radix.pieces(t, dtype, len(together)))  # noqa: E731
        value, lower, equal = radix.kth_smallest(numbers, k, dtype, len(together), lambda counts: counts)
    expected = together[k - 1]
    assert value == expected
    assert lower == (together < expected).sum()
    assert equal == (together == expected).sum()


def test_counts_of_other_processes_are_added():
    """Here another one has the same numbers: the third of all is the second of each."""
    numbers = torch.tensor([3.0, -1.0, 2.0])
    found = radix.kth_smallest(lambda: iter([numbers]), 3, torch.float32, 6, lambda counts: 2 * counts)
    assert found == (2.0, 2, 2)


def test_numbers_stay_as_they_are():
    """Digits are made of copies, also of integers."""
    for numbers in (torch.tensor([-0.0, 1.5]), torch.tensor([4, -7])):
        before = numbers.clone()
        radix.kth_smallest(lambda numbers=numbers: iter([numbers]), 1, numbers.dtype, 2, lambda counts: counts)
        assert torch.equal(numbers, before)
        assert not numbers.is_floating_point() or numbers.signbit()[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_pieces_cover_a_tensor_in_the_dtype_asked_for(dtype):
    """Row by row, also of one that lies otherwise in memory."""
    tensor = torch.randn(40, 1000).to(dtype).T
    found = list(radix.pieces(tensor, torch.float64, 10))
    assert torch.equal(torch.cat([some for _, some in found]), tensor.reshape(-1).double())
    assert [start for start, _ in found] == [*range(0, 40_000, radix.AT_LEAST)]

"""The k-th smallest of many numbers against NumPy's sort."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gcfreeze.selection import radix

FLOATS = [0.0, -0.0, 1e-42, -1e-42, 0.5, -0.5, 3.0, -3.0, float("inf"), -float("inf")]


def of_kind(kind: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draw numbers: "spread" over all magnitudes, "few" different ones, or "special" ones."""
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
def test_kth_smallest_is_that_of_a_sort(kind, dtype, shapes, seed, wide, fraction):
    """With the amounts of equal and of lower numbers; for both widths of digits, and chunks of any size."""
    tensors = [of_kind(kind, dtype, shape, seed + i) for i, shape in enumerate([*shapes, (3,)])]
    together = np.sort(np.concatenate([t.numpy().ravel() for t in tensors]))
    k = min(1 + int(fraction * len(together)), len(together))
    from_n, chunk = (1, 4) if wide else (10**9, 10**6)
    with patch.object(radix, "WIDE_DIGIT_FROM", from_n), patch.object(radix, "MIN_CHUNK", chunk):
        numbers = lambda: (chunk for t in tensors for _, chunk in radix.chunks(t, dtype, len(together)))  # noqa: E731
        value, n_lower, n_equal = radix.kth_smallest(numbers, k, dtype, len(together), lambda counts: counts)
    expected = together[k - 1]
    assert value == expected
    assert n_lower == (together < expected).sum()
    assert n_equal == (together == expected).sum()


def test_kth_smallest_is_that_of_the_numbers_of_all_processes():
    """Another process has the same numbers: the third smallest of all is the second of each."""
    numbers = torch.tensor([3.0, -1.0, 2.0])
    found = radix.kth_smallest(lambda: iter([numbers]), 3, torch.float32, 6, lambda counts: 2 * counts)
    assert found == (2.0, 2, 2)


def test_numbers_are_not_modified():
    """Neither floats nor integers, whose bits need no conversion."""
    for numbers in (torch.tensor([-0.0, 1.5]), torch.tensor([4, -7])):
        before = numbers.clone()
        radix.kth_smallest(lambda numbers=numbers: iter([numbers]), 1, numbers.dtype, 2, lambda counts: counts)
        assert torch.equal(numbers, before)
        assert not numbers.is_floating_point() or numbers.signbit()[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_chunks_cover_a_tensor_in_the_dtype_asked_for(dtype):
    """Row by row, also if it is not contiguous."""
    tensor = torch.randn(40, 1000).to(dtype).T
    found = list(radix.chunks(tensor, torch.float64, 10))
    assert torch.equal(torch.cat([chunk for _, chunk in found]), tensor.reshape(-1).double())
    assert [start for start, _ in found] == [*range(0, 40_000, radix.MIN_CHUNK)]

"""Live elements are taken out in the order of the rows and put back, whatever the shape, dtype and memory format."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gcfreeze.freezing import base
from lightning_gcfreeze.freezing.base import Live

SHAPES = [(7,), (1, 6), (5, 4), (4, 3, 2), (2, 3, 3, 3)]


def mask_of(shape, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    if kind == "rows":
        rows = torch.rand(shape[0], generator=generator) < 0.5
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
    return torch.rand(shape, generator=generator) < {"few": 0.1, "half": 0.5, "most": 0.9}[kind]


@given(
    st.sampled_from(SHAPES),
    st.integers(0, 2**31),
    st.sampled_from(["rows", "few", "half", "most"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_takes_and_puts_as_numpy_does(shape, seed, kind, dtype, as_it_lies):
    """NumPy's boolean indexing is the oracle; what is frozen is not written, what is live is."""
    frozen = mask_of(shape, seed, kind)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if not as_it_lies:
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)  # columns first
    before = tensor.double().numpy().copy()
    live = Live(frozen)
    expected = before[~frozen.numpy()]
    assert len(live) == len(expected)
    np.testing.assert_array_equal(live.take(tensor).double().numpy(), expected)
    out = torch.full((len(live) + 2,), 9.0, dtype=dtype)
    live.take(tensor, out[1:-1])
    np.testing.assert_array_equal(out.double().numpy(), [9.0, *expected, 9.0])
    live.put_(tensor, out[1:-1] + 100)
    after = tensor.double().numpy()
    np.testing.assert_array_equal(after[frozen.numpy()], before[frozen.numpy()])
    assert (after[~frozen.numpy()] > 50).all()


def test_whole_rows_need_an_index_each_and_elements_four_bytes():
    """What knowing the live elements costs."""
    rows = Live(torch.tensor([[True] * 100, [False] * 100]))
    assert rows.index.tolist() == [1]
    frozen = torch.ones(2, 100, dtype=torch.bool)
    frozen[0, 3] = frozen[1, 5] = False
    elements = Live(frozen)
    assert elements.index.tolist() == [3, 105]
    assert elements.index.nbytes == (8 if base._scatters_int32("cpu") else 16)


def test_where_torch_wants_long_indices_it_gets_them(monkeypatch):
    """As older versions do."""
    monkeypatch.setattr(base, "_scatters_int32", lambda device: False)
    tensor = torch.zeros(3, 2)
    live = Live(torch.tensor([[True, False], [False, True], [True, True]]))
    assert live.index.dtype == torch.int64
    live.put_(tensor, torch.tensor([1.0, 2.0]))
    assert tensor.tolist() == [[0, 1], [2, 0], [0, 0]]


@pytest.mark.parametrize("device", ["cpu"])
def test_asking_for_short_indices_does_not_raise(device):
    """The answer depends on the version of torch alone."""
    assert base._scatters_int32(device) in (True, False)

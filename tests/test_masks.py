"""`MaskIndex` gathers and scatters in row-major order, whatever the shape, dtype and memory format."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gcfreeze import _masks
from lightning_gcfreeze._masks import MaskIndex

SHAPES = [(7,), (), (0, 2), (1, 6), (5, 4), (3, 16), (4, 3, 2), (2, 3, 3, 3)]


def mask_of(shape, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    if kind == "rows" and shape:
        rows = torch.rand(shape[0], generator=generator) < 0.5
        return rows.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
    return torch.rand(shape, generator=generator) < {"few": 0.1, "half": 0.5, "rows": 0.5, "most": 0.9}[kind]


@given(
    st.sampled_from(SHAPES),
    st.integers(0, 2**31),
    st.sampled_from(["rows", "few", "half", "most"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 4),
)
def test_gathers_scatters_and_fills_as_numpy_does(shape, seed, kind, dtype, as_it_lies, offset):
    """NumPy's boolean indexing is the oracle; what is not marked is not written, what is marked is."""
    mask = mask_of(shape, seed, kind)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if not as_it_lies:
        tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)  # columns first
    before = tensor.double().numpy().copy()
    places = MaskIndex(mask)
    marked = mask.numpy()
    expected = before[marked]
    assert len(places) == len(expected)
    np.testing.assert_array_equal(places.take(tensor).double().numpy(), expected)
    out = torch.full((len(places) + offset + 1,), 9.0, dtype=dtype)
    values = out[offset:-1]
    places.take(tensor, values)
    np.testing.assert_array_equal(out.double().numpy(), [*[9.0] * offset, *expected, 9.0])
    places.put_(tensor, values + 100 if offset else (values + 100).clone())
    after = tensor.double().numpy().copy()
    np.testing.assert_array_equal(after[~marked], before[~marked])
    np.testing.assert_array_equal(after[marked], (out[offset:-1] + 100).double().numpy())
    places.fill_(tensor, -7.0)
    np.testing.assert_array_equal(tensor.double().numpy(), np.where(marked, -7.0, before))


def test_scattered_rows_keep_every_bit():
    """The sign of a zero, infinities, the smallest numbers, the payload of a NaN; rows that are 16-byte aligned or not."""
    integers = torch.tensor([0, 1, -1, 5, -(2**31), 2**31 - 1, 0x7F800001, 0x7FC00123], dtype=torch.int64).int()
    tensor = torch.zeros(3, 8)
    places = MaskIndex(torch.tensor([[False] * 8, [True] * 8, [False] * 8]))
    for offset in (0, 1):  # aligned and not
        values = torch.zeros(9)[offset : offset + 8]
        values.view(torch.int32).copy_(integers)
        places.put_(tensor.zero_(), values)
        assert torch.equal(tensor[1].view(torch.int32), integers)
        assert not tensor[[0, 2]].any()


def test_index_has_one_entry_per_whole_row_or_per_element():
    """An entry per element takes four bytes where torch scatters by them."""
    rows = MaskIndex(torch.tensor([[False] * 100, [True] * 100]))
    assert rows.index.tolist() == [1]
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[0, 3] = mask[1, 5] = True
    elements = MaskIndex(mask)
    assert elements.index.tolist() == [3, 105]
    try:
        torch.zeros(3).scatter_(0, torch.tensor([1, 2], dtype=torch.int32), torch.ones(2))
    except RuntimeError:  # in older versions of torch
        assert elements.index.nbytes == 16
    else:
        assert elements.index.nbytes == 8


def test_index_is_int64_where_torch_does_not_scatter_by_int32(monkeypatch):
    """Older versions of torch do not."""
    monkeypatch.setattr(_masks, "_scatters_int32", lambda device: False)
    tensor = torch.zeros(3, 2)
    places = MaskIndex(torch.tensor([[False, True], [True, False], [False, False]]))
    assert places.index.dtype == torch.int64
    places.put_(tensor, torch.tensor([1.0, 2.0]))
    assert tensor.tolist() == [[0, 1], [2, 0], [0, 0]]

"""`MaskIndex` gathers and scatters in row-major order, in any memory format; `PackedMasks` take a bit an element."""

import copy
import pickle

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gcfreeze import _masks
from lightning_gcfreeze._masks import MaskIndex, PackedMasks

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
    index = MaskIndex(mask)
    marked = mask.numpy()
    expected = before[marked]
    assert len(index) == len(expected)
    np.testing.assert_array_equal(index.gather(tensor).double().numpy(), expected)
    out = torch.full((len(index) + offset + 1,), 9.0, dtype=dtype)
    values = out[offset:-1]
    index.gather(tensor, values)
    np.testing.assert_array_equal(out.double().numpy(), [*[9.0] * offset, *expected, 9.0])
    index.scatter_(tensor, values + 100 if offset else (values + 100).clone())
    after = tensor.double().numpy().copy()
    np.testing.assert_array_equal(after[~marked], before[~marked])
    np.testing.assert_array_equal(after[marked], (out[offset:-1] + 100).double().numpy())
    index.fill_(tensor, -7.0)
    np.testing.assert_array_equal(tensor.double().numpy(), np.where(marked, -7.0, before))


def test_scattered_rows_keep_every_bit():
    """The sign of a zero, infinities, the smallest numbers, the payload of a NaN; rows aligned to 16 bytes or not."""
    integers = torch.tensor([0, 1, -1, 5, -(2**31), 2**31 - 1, 0x7F800001, 0x7FC00123], dtype=torch.int64).int()
    tensor = torch.zeros(3, 8)
    index = MaskIndex(torch.tensor([[False] * 8, [True] * 8, [False] * 8]))
    for offset in (0, 1):  # aligned and not
        values = torch.zeros(9)[offset : offset + 8]
        values.view(torch.int32).copy_(integers)
        index.scatter_(tensor.zero_(), values)
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
    index = MaskIndex(torch.tensor([[False, True], [True, False], [False, False]]))
    assert index.index.dtype == torch.int64
    index.scatter_(tensor, torch.tensor([1.0, 2.0]))
    assert tensor.tolist() == [[0, 1], [2, 0], [0, 0]]


@given(st.sampled_from([*SHAPES, (9,), (17, 5)]), st.integers(0, 2**31), st.sampled_from(["rows", "few", "half"]))
def test_packed_masks_come_back_from_the_bytes_of_numpy(shape, seed, kind):
    """Eight elements are one byte, the first in the lowest bit, as `numpy.packbits` has them in its little order."""
    mask = mask_of(shape, seed, kind)
    packed = PackedMasks([("a", mask), ("b", ~mask)])
    assert packed["a"].dtype == torch.bool
    assert torch.equal(packed["a"], mask)
    assert torch.equal(packed["b"], ~mask)
    assert packed["a"].is_contiguous()
    assert (list(packed), len(packed), "a" in packed, "c" in packed) == (["a", "b"], 2, True, False)
    bits = np.packbits(mask.numpy().reshape(-1), bitorder="little")
    np.testing.assert_array_equal(packed._masks["a"].numpy(), bits)
    assert packed.nbytes == 2 * len(bits)
    packed["a"].zero_()
    assert torch.equal(packed["a"], mask)


def test_packed_masks_keep_masks_of_rows_as_they_are_and_copy_as_they_are():
    rows = torch.tensor([True, False, True])[:, None].expand(3, 100)
    packed = PackedMasks([("w", rows), ("v", torch.ones(80, dtype=torch.bool))])
    assert packed["w"] is rows
    assert packed.nbytes == 3 + 10
    for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(copied["w"], rows)
        assert copied["v"].tolist() == [True] * 80

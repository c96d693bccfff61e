"""A fingerprint changes with any bit of a frozen element, and with no other."""

import pytest
import torch

from lightning_gcfreeze.freezing import fingerprints as module
from lightning_gcfreeze.freezing.fingerprints import fingerprints

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_fingerprint_changes_with_every_bit_of_every_frozen_element(dtype, monkeypatch):
    """And with no bit of a live element; also where elements are read in several chunks.

    The first element and the sign of a float64 would be lost if an element's weight in the sum were even, or 0.
    """
    monkeypatch.setattr(module, "_CHUNK_NUMEL", 4)
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2, 5, generator=generator).to(dtype)
    frozen = {"p": torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])}
    before = fingerprints({"p": p}, frozen)
    bits = p.view(BITS[dtype]).flatten()
    n_bits = 8 * p.element_size()
    for i, is_frozen in enumerate(frozen["p"].flatten().tolist()):
        for bit in range(n_bits):
            changed = bits.clone()
            changed[i] ^= 1 << bit if bit < n_bits - 1 else -(1 << bit)
            found = fingerprints({"p": changed.view(dtype).view_as(p)}, frozen)
            assert (found != before) is is_frozen, (i, bit)


def test_swapped_frozen_elements_change_the_fingerprint():
    p = torch.tensor([1.0, 2.0, 3.0])
    frozen = {"p": torch.tensor([True, True, False])}
    assert fingerprints({"p": p}, frozen) != fingerprints({"p": p[[1, 0, 2]]}, frozen)


def test_fingerprint_does_not_depend_on_the_memory_format():
    p, mask = torch.randn(3, 4), torch.rand(3, 4) < 0.5
    transposed = p.t().contiguous().t()
    assert fingerprints({"p": p}, {"p": mask}) == fingerprints({"p": transposed}, {"p": mask})

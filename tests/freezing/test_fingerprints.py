"""A fingerprint changes with any bit of a frozen element, and with no other."""

import pytest
import torch

from lightning_gcfreeze.freezing import fingerprints as module
from lightning_gcfreeze.freezing.fingerprints import fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_fingerprint_changes_with_each_frozen_element_only(dtype, monkeypatch):
    """By the lowest bit; also where elements are read in several chunks."""
    monkeypatch.setattr(module, "_CHUNK_NUMEL", 4)
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(3, 5, generator=generator).to(dtype)
    frozen = {"p": torch.rand(3, 5, generator=generator) < 0.5}
    before = fingerprints({"p": p}, frozen)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
    for i, is_frozen in enumerate(frozen["p"].flatten().tolist()):
        changed = p.clone()
        changed.view(-1)[i : i + 1].view(integer).bitwise_xor_(1)
        assert (fingerprints({"p": changed}, frozen) != before) is is_frozen


def test_swapped_frozen_elements_change_the_fingerprint():
    p = torch.tensor([1.0, 2.0, 3.0])
    frozen = {"p": torch.tensor([True, True, False])}
    assert fingerprints({"p": p}, frozen) != fingerprints({"p": p[[1, 0, 2]]}, frozen)


def test_fingerprint_does_not_depend_on_the_memory_format():
    p, mask = torch.randn(3, 4), torch.rand(3, 4) < 0.5
    transposed = p.t().contiguous().t()
    assert fingerprints({"p": p}, {"p": mask}) == fingerprints({"p": transposed}, {"p": mask})

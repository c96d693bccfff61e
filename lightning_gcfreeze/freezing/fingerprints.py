"""Fingerprints of the bits of frozen elements, which tell whether other code wrote to them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import local

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_NUMEL = 2**16


@torch.no_grad()
def fingerprints(parameters: Mapping[str, Tensor], frozen: Named) -> dict[str, int]:
    """Return for each parameter a number that changes with any bit of one of its frozen elements.

    Args:
        parameters: by name; of sharded ones only the local part counts.
        frozen: ``{name: bool (*local part's shape)}``, True = counts.
    """
    found = {}
    for name, mask in frozen.items():
        p = local(parameters[name]).contiguous()
        bits, marks = p.view(_BITS[p.element_size()]).flatten(), mask.to(p.device).flatten()
        total = torch.zeros((), dtype=torch.int64, device=p.device)  # read once: each read makes the CPU wait for a GPU
        for start in range(0, len(bits), _CHUNK_NUMEL):
            chunk = bits[start : start + _CHUNK_NUMEL].to(torch.int64, copy=True)
            odd = torch.arange(start, start + len(chunk), device=p.device).mul_(2).add_(1)
            total += chunk.mul_(odd).mul_(marks[start : start + len(chunk)]).sum()
        found[name] = int(total) % 2**64
    return found

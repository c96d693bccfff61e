"""Statistics that have seen given pairs of gradients, for the tests of `Observing` and of `Decision`."""

import io

import pytest
import torch

from lightning_gcfreeze.observing import Observing
from tests.conformance import pairs, samples

KINDS = pytest.mark.parametrize(
    ("full", "needs"),
    [
        (False, frozenset()),
        (True, frozenset()),
        (False, frozenset({"mean", "recent_mean", "second_moment", "start"})),
        (True, frozenset({"mean", "recent_mean", "second_moment", "start"})),
    ],
    ids=["diagonal", "full", "diagonal and more", "full and more"],
)


def weights(dtype=torch.float64):
    """Return parameters of the shapes of `conformance.pairs`."""
    return {name: torch.full_like(g, -2.0) for name, g in pairs(1, dtype=dtype)[0][0].items()}


def observed(seen, full=False, needs=frozenset(), sizes=None, dtype=torch.float64):
    """Return statistics that have seen the pairs, in optimizer steps 1, 2, …"""
    observing = Observing(weights(dtype), full, needs)
    for step, ((g_one, g_batch), size) in enumerate(zip(seen, sizes or [None] * len(seen), strict=True), start=1):
        observing.observe(step, samples(g_one), g_batch, "1/t", size)
    return observing


def through_a_file(state):
    """Return a state as a checkpoint gives it back, with nothing but plain types allowed in it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

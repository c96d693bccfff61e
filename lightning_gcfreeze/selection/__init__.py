"""Which elements are eligible, and which of them freeze: scores and k -> masks."""

from lightning_gcfreeze.selection.eligible import eligible, resolve_count, trained
from lightning_gcfreeze.selection.lowest import (
    check_score,
    check_scores,
    lowest_k,
    marks,
    means,
    pooled,
    ranks,
    unit_sums,
)
from lightning_gcfreeze.selection.mixed import in_blocks
from lightning_gcfreeze.selection.units import has_units

__all__ = [
    "check_score",
    "check_scores",
    "eligible",
    "has_units",
    "in_blocks",
    "lowest_k",
    "marks",
    "means",
    "pooled",
    "ranks",
    "resolve_count",
    "trained",
    "unit_sums",
]

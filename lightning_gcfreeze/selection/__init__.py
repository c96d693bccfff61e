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

__all__ = [
    "check_score",
    "check_scores",
    "eligible",
    "lowest_k",
    "marks",
    "means",
    "pooled",
    "ranks",
    "resolve_count",
    "trained",
    "unit_sums",
]

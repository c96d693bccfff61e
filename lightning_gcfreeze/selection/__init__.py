"""Which elements are eligible, and which of them freeze: scores and k -> masks."""

from lightning_gcfreeze.selection.eligible import eligible, resolve_count, trained
from lightning_gcfreeze.selection.lowest import check_scores, lowest_k, pooled, ranks

__all__ = ["check_scores", "eligible", "lowest_k", "pooled", "ranks", "resolve_count", "trained"]

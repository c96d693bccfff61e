"""Orders by the methods that the paper names as related, its [3] to [8]."""

from examples.paper.related.orders import RELATED, left_out
from examples.paper.related.snapshot import Snapshot, take

__all__ = ["RELATED", "Snapshot", "left_out", "take"]

"""Freeze, to the bit, the parameters whose gradients are quietest: one callback for any Lightning Trainer."""

from lightning_gcfreeze.callback import GradCovFreezeCallback
from lightning_gcfreeze.delta import apply_delta
from lightning_gcfreeze.orderings import Evidence, Ordering

__all__ = ["Evidence", "GradCovFreezeCallback", "Ordering", "apply_delta"]
__version__ = "0.1.0"

"""Freeze, to the bit, the parameters whose gradients are quietest: one callback for any Lightning Trainer."""

from lightning_gcfreeze.callback import GradCovFreezeCallback
from lightning_gcfreeze.delta import apply_delta
from lightning_gcfreeze.orderings import Evidence, Ordering
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.planning.schedule import FreezeSchedule
from lightning_gcfreeze.planning.settling import Settled

__all__ = ["Evidence", "FreezeSchedule", "GradCovFreezeCallback", "Growth", "Ordering", "Settled", "apply_delta"]
__version__ = "0.1.0"

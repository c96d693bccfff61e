"""Freeze, to the bit, the parameters whose gradients are quietest: for Lightning and for loops of your own."""

from lightning_gcfreeze.callback import GradCovFreezeCallback
from lightning_gcfreeze.delta import apply_delta
from lightning_gcfreeze.freezer import Freezer
from lightning_gcfreeze.freezing.savings import Savings
from lightning_gcfreeze.gradients.slicing import first_sample
from lightning_gcfreeze.options import PRESETS
from lightning_gcfreeze.orderings import Evidence, Ordering
from lightning_gcfreeze.planning.budget import Budget
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.planning.schedule import FreezeSchedule
from lightning_gcfreeze.planning.settling import Settled
from lightning_gcfreeze.probe import Probe
from lightning_gcfreeze.probe_callback import ProbeCallback

__all__ = [
    "PRESETS",
    "Budget",
    "Evidence",
    "FreezeSchedule",
    "Freezer",
    "GradCovFreezeCallback",
    "Growth",
    "Ordering",
    "Probe",
    "ProbeCallback",
    "Savings",
    "Settled",
    "apply_delta",
    "first_sample",
]
__version__ = "0.1.0"

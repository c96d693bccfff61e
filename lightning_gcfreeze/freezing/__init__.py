"""Hold frozen elements constant to the bit while the optimizer moves the others, and save what that allows."""

from lightning_gcfreeze.freezing.blocks import WeightUses, blocks_worth_it, worth_cutting
from lightning_gcfreeze.freezing.compact import Compact
from lightning_gcfreeze.freezing.holder import Holder, HoldMode, HoldPlan
from lightning_gcfreeze.freezing.learning_rate import LearningRates, groups_without_rate
from lightning_gcfreeze.freezing.optimizer_state import ELEMENTWISE
from lightning_gcfreeze.freezing.restore import Restore
from lightning_gcfreeze.freezing.savings import Footprint, ParameterSavings, Savings, room_for
from lightning_gcfreeze.freezing.skipping import GradientSkipper
from lightning_gcfreeze.freezing.thawing import ThawStates

__all__ = [
    "ELEMENTWISE",
    "Compact",
    "Footprint",
    "GradientSkipper",
    "HoldMode",
    "HoldPlan",
    "Holder",
    "LearningRates",
    "ParameterSavings",
    "Restore",
    "Savings",
    "ThawStates",
    "WeightUses",
    "blocks_worth_it",
    "groups_without_rate",
    "room_for",
    "worth_cutting",
]

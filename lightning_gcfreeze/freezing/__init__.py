"""Holding elements constant to the bit while an optimizer moves their neighbours, and saving what that allows."""

from lightning_gcfreeze._masks import ELEMENTWISE
from lightning_gcfreeze.freezing.compact import Compact
from lightning_gcfreeze.freezing.restore import Restore
from lightning_gcfreeze.freezing.skipping import GradientSkipper, WeightUses, blocks_worth_it
from lightning_gcfreeze.freezing.thawing import ThawStates

__all__ = ["ELEMENTWISE", "Compact", "GradientSkipper", "Restore", "ThawStates", "WeightUses", "blocks_worth_it"]

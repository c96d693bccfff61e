"""Holding elements constant to the bit while an optimizer moves their neighbours, and saving what that allows."""

from lightning_gcfreeze.freezing.aside import Aside
from lightning_gcfreeze.freezing.base import ELEMENTWISE
from lightning_gcfreeze.freezing.compact import Compact
from lightning_gcfreeze.freezing.promotion import Positions, Promotion, blocks_worth_it
from lightning_gcfreeze.freezing.restore import Restore

__all__ = ["ELEMENTWISE", "Aside", "Compact", "Positions", "Promotion", "Restore", "blocks_worth_it"]

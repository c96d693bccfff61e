"""Holding elements constant to the bit while an optimizer moves their neighbours."""

from lightning_gcfreeze.freezing.restore import Restore

__all__ = ["Restore"]

"""Several processes: one decision on all of them, whatever part of the parameters each has."""

from lightning_gcfreeze.distributed.base import ALONE, Ranks
from lightning_gcfreeze.distributed.shards import EVERYTHING, Shards, local, part, whole

__all__ = ["ALONE", "EVERYTHING", "Ranks", "Shards", "local", "part", "whole"]

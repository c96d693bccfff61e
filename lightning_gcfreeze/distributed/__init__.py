"""Several processes: collectives, and which elements of each parameter a process holds."""

from lightning_gcfreeze.distributed.collectives import SINGLE_PROCESS, World
from lightning_gcfreeze.distributed.shards import UNSHARDED, Shards, local, part, whole

__all__ = ["SINGLE_PROCESS", "UNSHARDED", "Shards", "World", "local", "part", "whole"]

"""Several processes: collectives, and which elements of each parameter a process holds."""

from lightning_gcfreeze.distributed.collectives import SINGLE_PROCESS, World
from lightning_gcfreeze.distributed.shards import (
    UNSHARDED,
    Shards,
    flat_like,
    in_layout_of,
    is_sharded,
    layout_of,
    local,
    part,
    sharded_parameters,
    whole,
)

__all__ = [
    "SINGLE_PROCESS",
    "UNSHARDED",
    "Shards",
    "World",
    "flat_like",
    "in_layout_of",
    "is_sharded",
    "layout_of",
    "local",
    "part",
    "sharded_parameters",
    "whole",
]

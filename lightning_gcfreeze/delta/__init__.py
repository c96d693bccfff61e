"""What a freeze changed, alone: saved, applied, taken back, swapped, compared, served and streamed.

Frozen elements keep their bits from step t0 on, so the weights of that step and the live elements are the trained
model. A delta is a flat dict of CPU tensors. For a parameter or buffer ``name``:

    name:elements, name:values, name:shape, name:frozen     some elements are live
    name:rows,     name:values, name:shape, name:frozen     every row, an index along the first axis, is wholly frozen
                                                            or wholly live
    name:shape,    name:frozen                              nothing is live
    name:whole                                              everything is live, or storing all takes no more memory

``elements`` and ``rows`` ascend, int32 or, from 2³¹ on, int64; elements count row by row, whatever the memory format.
``values`` are the new values, not differences, so applying a delta is exact to the bit. ``shape`` is the tensor's.
``frozen`` is a fingerprint of the elements that a delta leaves unchanged, which identifies the weights of t0.
``format`` is the version of all this; ``base``, which may be missing, the `fingerprint` of the whole base. What a file
looks like is in `lightning_gcfreeze.delta.files`.
"""

from lightning_gcfreeze.delta.applying import apply, apply_delta, revert, swap
from lightning_gcfreeze.delta.comparing import Overlap, Patch, diff, merge, overlap, patches, state_dict
from lightning_gcfreeze.delta.entries import fingerprint, of
from lightning_gcfreeze.delta.errors import (
    ChainError,
    ConflictError,
    CorruptFileError,
    DeltaError,
    MismatchError,
    WrongBaseError,
)
from lightning_gcfreeze.delta.files import load, pack, save
from lightning_gcfreeze.delta.follower import Follower
from lightning_gcfreeze.delta.inspecting import Summary, inspect
from lightning_gcfreeze.delta.stream import Stream
from lightning_gcfreeze.delta.tenants import TenantInfo, Tenants

__all__ = [
    "ChainError",
    "ConflictError",
    "CorruptFileError",
    "DeltaError",
    "Follower",
    "MismatchError",
    "Overlap",
    "Patch",
    "Stream",
    "Summary",
    "TenantInfo",
    "Tenants",
    "WrongBaseError",
    "apply",
    "apply_delta",
    "diff",
    "fingerprint",
    "inspect",
    "load",
    "merge",
    "of",
    "overlap",
    "pack",
    "patches",
    "revert",
    "save",
    "state_dict",
    "swap",
]

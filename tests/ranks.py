"""This process as one of several, without the others: for what a process does alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def as_rank(rank: int, processes: int) -> Iterator[None]:
    """Let this process be one of several that do not communicate."""
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_mesh(*shape: int) -> DeviceMesh:
    """Return a mesh whose dimensions are named after the rank.

    Meshes of two ranks would be equal otherwise, and what torch caches of DTensors' operations would have the first
    one's.
    """
    names = [f"{i} of rank {dist.get_rank()}" for i in range(len(shape))]
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(names))

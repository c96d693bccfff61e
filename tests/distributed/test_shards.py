"""Where the elements of a sharded parameter lie, as every process of a mesh sees it, one after the other."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_gcfreeze.distributed import UNSHARDED, Shards, World, local, part, whole


@contextmanager
def as_rank(rank: int, processes: int) -> Iterator[None]:
    """This process is one of many, of whom it hears nothing."""
    dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Every element is its place, row by row."""
    return torch.arange(math.prod(shape)).view(shape)


LAYOUTS = [
    ((4,), [Shard(0)]),
    ((4,), [Shard(1)]),
    ((4,), [Replicate()]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [Shard(0), Replicate()]),
    ((2, 2), [Replicate(), Shard(1)]),
    ((2, 3), [Shard(0), Shard(0)]),
]


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (3, 9), (1, 4), (5, 2, 3)], ids=str)
@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS, ids=str)
def test_every_element_is_counted_once_and_knows_its_place(shape, mesh_shape, placements):
    """Also where shards are uneven, or empty, and where several processes have the same."""
    processes, row = math.prod(mesh_shape), math.prod(shape[1:])
    counted = []
    for rank in range(processes):
        with as_rank(rank, processes):
            mesh = init_device_mesh("cpu", mesh_shape)
            p = distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)
            shards = Shards({"w": p})
            own = local(p)
            assert shards
            assert shards.shape("w", own) == torch.Size(shape)
            assert torch.equal(shards.flat_index("w", torch.arange(own.numel()), own), own.flatten())
            assert torch.equal(shards.parts({"w": numbered(shape)})["w"], own)
            assert torch.equal(part(p, numbered(shape)), own)
            if own.numel():
                assert torch.equal(shards.rows("w", own), own.flatten(1)[:, 0] // row)
            counted += own.flatten().tolist() if shards.counts("w") else []
    assert sorted(counted) == list(range(math.prod(shape)))


def test_plain_parameters_among_shards_are_rank_0s():
    """All have them; they are counted there."""
    for rank in range(2):
        with as_rank(rank, 2):
            mesh = init_device_mesh("cpu", (2,))
            shards = Shards({"a": distribute_tensor(torch.zeros(4), mesh, [Shard(0)]), "b": torch.zeros(3)})
            assert shards.counts("a")
            assert shards.counts("b") is (rank == 0)
            assert shards.shape("b", torch.zeros(3)) == (3,)
            assert shards.rows("b", torch.zeros(3)).tolist() == [0, 1, 2]
            wrapped = shards.wrapped({"a": torch.zeros(2), "b": torch.zeros(3)})
            assert isinstance(wrapped["a"], DTensor)
            assert wrapped["a"].shape == (4,)
            assert type(wrapped["b"]) is Tensor


def test_a_sum_that_was_not_taken_yet_is_taken():
    """A gradient may come as a partial sum; of one process alone that is the sum."""
    with as_rank(0, 1):
        mesh = init_device_mesh("cpu", (1,))
        p = distribute_tensor(torch.zeros(4), mesh, [Shard(0)])
        gradient = DTensor.from_local(torch.arange(4.0), mesh, [Partial()])
        assert torch.equal(part(p, gradient), torch.arange(4.0))


def test_without_shards_everything_is_as_it_is():
    """Also in a process that knows of no others."""
    w = torch.randn(3, 2)
    assert not UNSHARDED
    assert UNSHARDED.counts("w")
    assert UNSHARDED.flat_index("w", torch.tensor([4, 1]), w).tolist() == [4, 1]
    assert UNSHARDED.rows("w", w).tolist() == [0, 1, 2]
    assert UNSHARDED.rows("w", torch.tensor(1.0)).tolist() == [0]
    assert UNSHARDED.count({"w": w > 0}, World()) == {"w": int((w > 0).sum())}
    for same in (local(w), part(w, w), whole(w)):
        assert same is w
    UNSHARDED.check_agreement({"w": w > 0}, World())

"""The indices of the elements of a sharded parameter, as each process of a mesh sees them, one after the other."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_gcfreeze.distributed import (
    SINGLE_PROCESS,
    UNSHARDED,
    Shards,
    World,
    flat_like,
    in_layout_of,
    local,
    part,
    whole,
)
from tests.ranks import as_rank, own_mesh


def numbered(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor whose elements are their flat indices."""
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
def test_every_element_of_a_sharded_parameter_is_counted_once_and_has_its_index(shape, mesh_shape, placements):
    """Also if shards are uneven or empty, and if several processes hold the same elements."""
    processes, row = math.prod(mesh_shape), math.prod(shape[1:])
    counted = []
    for rank in range(processes):
        with as_rank(rank, processes):
            mesh = init_device_mesh("cpu", mesh_shape)
            p = distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)
            shards = Shards({"w": p}, World(processes))
            own = local(p)
            assert shards.is_sharded
            assert shards.element_world is shards.world
            assert shards.shape("w", own) == torch.Size(shape)
            assert torch.equal(shards.flat_index("w", torch.arange(own.numel()), own), own.flatten())
            assert torch.equal(shards.parts({"w": numbered(shape)})["w"], own)
            assert torch.equal(part(p, numbered(shape)), own)
            if own.numel():
                assert torch.equal(shards.rows("w", own), own.flatten(1)[:, 0] // row)
            counted += own.flatten().tolist() if shards.is_counted_here("w") else []
    assert sorted(counted) == list(range(math.prod(shape)))


def test_plain_parameters_among_sharded_ones_are_counted_on_rank_0():
    """All processes hold all of their elements."""
    for rank in range(2):
        with as_rank(rank, 2):
            mesh = init_device_mesh("cpu", (2,))
            shards = Shards({"a": distribute_tensor(torch.zeros(4), mesh, [Shard(0)]), "b": torch.zeros(3)})
            assert shards.is_counted_here("a")
            assert shards.is_counted_here("b") is (rank == 0)
            assert shards.shape("b", torch.zeros(3)) == (3,)
            assert shards.rows("b", torch.zeros(3)).tolist() == [0, 1, 2]
            wrapped = shards.wrapped({"a": torch.zeros(2), "b": torch.zeros(3)})
            assert isinstance(wrapped["a"], DTensor)
            assert wrapped["a"].shape == (4,)
            assert type(wrapped["b"]) is Tensor


def test_part_of_a_partial_sum_is_reduced():
    """A gradient may be a partial sum; with one process, that is the sum."""
    with as_rank(0, 1):
        mesh = init_device_mesh("cpu", (1,))
        p = distribute_tensor(torch.zeros(4), mesh, [Shard(0)])
        gradient = DTensor.from_local(torch.arange(4.0), mesh, [Partial()])
        assert torch.equal(part(p, gradient), torch.arange(4.0))


def test_unsharded_parameters_are_local_and_counted_here():
    """Also without a process group."""
    w = torch.randn(3, 2)
    assert not UNSHARDED.is_sharded
    assert UNSHARDED.is_counted_here("w")
    assert UNSHARDED.flat_index("w", torch.tensor([4, 1]), w).tolist() == [4, 1]
    assert UNSHARDED.rows("w", w).tolist() == [0, 1, 2]
    assert UNSHARDED.rows("w", torch.tensor(1.0)).tolist() == [0]
    assert UNSHARDED.n_marked({"w": w > 0}) == {"w": int((w > 0).sum())}
    for same in (local(w), part(w, w), whole(w)):
        assert same is w
    UNSHARDED.check_agreement({"w": w > 0})
    assert Shards({"w": w}, World(2)).element_world is SINGLE_PROCESS  # all processes hold all elements


@pytest.mark.parametrize(("mesh_shape", "placements"), LAYOUTS, ids=str)
def test_flat_values_lie_on_the_processes_of_a_parameter_whatever_their_number(mesh_shape, placements):
    """Norms are over the mesh dimensions along which the parameter is sharded, and no value is moved."""
    for rank in range(math.prod(mesh_shape)):
        with as_rank(rank, math.prod(mesh_shape)):
            p = distribute_tensor(numbered((8, 6)), own_mesh(*mesh_shape), placements, src_data_rank=None)
            values = torch.arange(rank % 3, dtype=torch.float32)
            flat = flat_like(p, values, 7)
            assert flat.shape == (7,)
            assert flat.device_mesh == p.device_mesh
            assert [q.is_replicate() for q in flat.placements] == [q.is_replicate() for q in placements]
            assert local(flat).data_ptr() == values.data_ptr()
            assert torch.equal(local(flat * 2), values * 2)
    assert flat_like(values, values, 7) is values


def test_tensor_in_another_layout_is_laid_out_as_the_parameter_is():
    """A gradient may be a sum that is still to be reduced; one that lies as the parameter does is not copied."""
    with as_rank(1, 2):
        mesh = own_mesh(2)
        p = distribute_tensor(numbered((4, 2)), mesh, [Shard(0)], src_data_rank=None)
        replicated = distribute_tensor(numbered((4, 2)), mesh, [Replicate()], src_data_rank=None)
        again = in_layout_of(p, replicated)
        assert again.placements == p.placements
        assert torch.equal(local(again), local(p))
        assert in_layout_of(p, again) is again
        assert in_layout_of(local(p), local(p)).data_ptr() == local(p).data_ptr()

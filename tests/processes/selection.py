"""Collectives, shards and selection on four gloo processes, against NumPy on the whole tensors. torchrun starts it."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_gcfreeze import orderings, selection
from lightning_gcfreeze.distributed import Shards, World, local, part, whole
from lightning_gcfreeze.planning.settling import sampled


def collectives(world: World, rank: int) -> None:
    """Each against the result by hand."""
    assert world.rank == rank
    assert world.all_reduce_sum(torch.tensor([rank, 1])).tolist() == [6, 4]
    assert world.all_reduce_max(torch.tensor([rank, -rank])).tolist() == [3, 0]
    assert world.all_reduce_min(torch.tensor([rank, -rank])).tolist() == [0, -3]
    assert world.any(rank == 2)
    assert not world.any(rank == 4)
    assert world.all_gather(torch.tensor(rank)).tolist() == [0, 1, 2, 3]
    assert world.broadcast_object({"rank": rank}) == {"rank": 0}
    assert world.all_gather_object({"rank": rank}) == [{"rank": r} for r in range(4)]
    world.all_reduce_mean_(mean := torch.tensor([float(rank)]))
    assert mean.item() == 1.5


def numbered(shape: torch.Size) -> Tensor:
    """Return a tensor whose elements are their flat indices."""
    return torch.arange(float(math.prod(shape))).view(shape)


def fsdp2_over_tensor_parallelism(world: World, mesh: DeviceMesh) -> None:
    """FSDP2 shards an axis that is sharded already in another order; some meshes lack some ranks."""
    module = nn.Sequential(nn.Linear(5, 10), nn.Linear(10, 3), nn.LayerNorm(3))
    for p in module.parameters():
        p.data = numbered(p.shape)
    parallelize_module(module, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    of_tensor_parallelism = {name: p.detach().clone() for name, p in module.named_parameters()}
    fully_shard(module, mesh=mesh["data"])
    parameters = dict(module.named_parameters())
    shards = Shards(parameters, world)
    for name, p in parameters.items():
        own = local(p.detach())
        assert torch.equal(shards.flat_index(name, torch.arange(own.numel()), own).float(), own.flatten()), name
        assert torch.equal(part(p, numbered(p.shape)), own), name
        assert torch.equal(part(p, of_tensor_parallelism[name]), own), name  # as FSDP2 hands gradients out
        counts = torch.zeros(p.numel(), dtype=torch.int64)
        counts[own.flatten().long()] = int(shards.is_counted_here(name))
        assert world.all_reduce_sum(counts).tolist() == [1] * p.numel(), name


def by_numpy(scores: dict[str, np.ndarray], k: int, granularity: str) -> np.ndarray:
    """Sort all elements, or the means of rows or tensors, up to the first that does not fit; True = frozen."""
    if granularity == "element":
        frozen = np.zeros(sum(s.size for s in scores.values()), dtype=bool)
        frozen[np.argsort(np.concatenate([s.ravel() for s in scores.values()]), kind="stable")[:k]] = True
        return frozen
    units = [row for s in scores.values() for row in (s if granularity == "row" else [s])]
    order = np.argsort([np.asarray(unit, dtype=np.float64).mean() for unit in units], kind="stable")
    fits = np.cumsum([np.size(units[i]) for i in order]) <= k
    chosen = np.zeros(len(units), dtype=bool)
    chosen[order] = fits
    return np.concatenate([np.full(np.size(unit), c) for unit, c in zip(units, chosen, strict=True)])


def select(world: World, mesh: DeviceMesh) -> None:
    """Exactly k elements, the same ones in any sharding; scores with many ties, signs and infinities."""
    layouts = [
        {"a": (mesh, [Shard(0), Shard(0)]), "b": (mesh, [Shard(1), Replicate()]), "c": None},
        {"a": (mesh, [Replicate(), Shard(1)]), "b": (mesh["data"], [Shard(0)]), "c": (mesh, [Shard(0), Shard(1)])},
    ]
    shapes = {"a": (7, 12), "b": (5, 9), "c": (3, 4)}
    generator = np.random.default_rng(0)
    kinds = {
        "continuous": lambda shape: generator.normal(size=shape),
        "ties": lambda shape: generator.integers(-2, 3, size=shape) / 2,
        "equal": np.zeros,
        "infinite": lambda shape: generator.choice([-np.inf, -0.0, 0.0, 1e-40, 1.0, np.inf], size=shape),
    }
    for layout in layouts:
        for kind, draw in kinds.items():
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                full = {name: torch.tensor(draw(shape)).to(dtype) for name, shape in shapes.items()}
                laid: dict[str, Tensor] = {}
                for name, tensor in full.items():
                    how = layout[name]
                    laid[name] = tensor if how is None else distribute_tensor(tensor, *how)
                shards, parts = Shards(laid, world), {name: local(tensor) for name, tensor in laid.items()}
                in_units = dtype == torch.float32 and kind != "infinite"
                for granularity in ("element", "row", "tensor") if in_units else ("element",):
                    for k in (0, 75, 141):
                        pooled = selection.pooled(parts, granularity, shards)
                        marks = selection.lowest_k(pooled, k, granularity, shards)
                        frozen = np.concatenate([whole(m).numpy().ravel() for m in shards.wrapped(marks).values()])
                        arrays = {name: tensor.double().numpy() for name, tensor in full.items()}
                        expected = by_numpy(arrays, k, granularity)
                        assert np.array_equal(frozen, expected), (kind, dtype, granularity, k)
                        assert sum(shards.n_marked(marks).values()) == expected.sum()
                        assert granularity != "element" or expected.sum() == k
                        shards.check_agreement(marks)


def sample(world: World, mesh: DeviceMesh, rank: int) -> None:
    """Evenly spaced elements of the whole tensors; of elements that several processes hold, the mean."""
    whole_tensors = {"a": numbered((7, 12)), "b": 1000 + numbered((5, 9)), "c": 2000 + numbered((3, 4))}
    layouts = ([Shard(0), Shard(0)], [Shard(1), Replicate()], [Replicate(), Shard(1)], [Shard(0), Shard(1)])
    everything = torch.cat([tensor.flatten() for tensor in whole_tensors.values()]).double()
    for n in (1, 10, 140, 141, 1000):
        count = min(n, 141)
        expected = everything[[i * 141 // count for i in range(count)]]
        for layout in layouts:
            laid = {name: distribute_tensor(tensor, mesh, layout) for name, tensor in whole_tensors.items()}
            laid["b"] = whole_tensors["b"]
            found = sampled({name: local(tensor) for name, tensor in laid.items()}, n, Shards(laid, world))
            assert torch.equal(found, expected), (n, layout)
        own = {name: tensor + rank for name, tensor in whole_tensors.items()}
        assert torch.equal(sampled(own, n, Shards(world=world)), expected + 1.5)


def draw(world: World, mesh: DeviceMesh) -> None:
    """The random order is the same as on one process."""
    w = torch.zeros(6, 5)
    laid = distribute_tensor(w, mesh, [Shard(0), Shard(1)])
    shards = Shards({"w": laid}, world)
    for granularity in ("element", "row", "tensor"):
        alone = orderings.random(orderings.Evidence({"w": w}, {"w": w}, 3, granularity=granularity))
        evidence = {"w": local(laid)}
        cut = orderings.random(orderings.Evidence(evidence, evidence, 3, granularity=granularity, shards=shards))
        assert torch.equal(whole(shards.wrapped(cut)["w"]), alone["w"])
    assert world.size == 4


def disagree(world: World, mesh: DeviceMesh, rank: int) -> None:
    """A mask that differs is found on all processes, and its rank is named."""
    laid = {"plain": torch.zeros(4), "cut": distribute_tensor(torch.zeros(8), mesh, [Shard(0), Replicate()])}
    shards = Shards(laid, world)
    masks = {name: local(tensor) > 0 for name, tensor in laid.items()}
    shards.check_agreement(masks)
    for name, other in (("plain", 2), ("cut", 3)):
        wrong = {n: mask ^ (n == name and rank == other) for n, mask in masks.items()}
        with pytest.raises(RuntimeError, match=rf"{name} \(ranks {other}\)"):
            shards.check_agreement(wrong)


def main() -> None:
    all_ranks, own = World(4, "cpu"), dist.get_rank()
    two_by_two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    collectives(all_ranks, own)
    fsdp2_over_tensor_parallelism(all_ranks, two_by_two)
    select(all_ranks, two_by_two)
    sample(all_ranks, two_by_two, own)
    draw(all_ranks, two_by_two)
    disagree(all_ranks, two_by_two, own)

"""Which elements of each parameter this process has: all of them, or those of its shard of a DTensor.

Everything that is kept by element (statistics, scores, masks) is kept for the local elements alone, in plain tensors
of the local shape. An element's place in its whole parameter is known, so that what is decided and what is saved does
not depend on how the parameters are sharded.
"""

import functools
import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed.collectives import World


def local(tensor: Tensor) -> Tensor:
    """The elements that this process has, in the tensor's own memory; of a plain tensor all."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All elements of a DTensor, gathered: to be called by all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Of a tensor like `parameter`, whole or sharded in any way, what is like the local part of `parameter`.

    Traffic only where `tensor` is a DTensor that is a sum yet to be taken.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    return _Spec.of(parameter).part(tensor)


class _Spec(NamedTuple):
    """How a DTensor lies on the processes."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> "_Spec":
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())

    def places(self, axis: int) -> Tensor:
        """The indices along an axis of the whole that this process has, ascending, (length of the local axis,)."""
        return _places(self, axis, torch.distributed.get_rank())

    def is_cut(self, axis: int) -> bool:
        return any(_cuts(placement, axis) for placement in self.placements)

    def part(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return self._cut(tensor, None)
        theirs = _Spec.of(tensor)
        if any(placement.is_partial() for placement in theirs.placements):
            settled = [Replicate() if placement.is_partial() else placement for placement in theirs.placements]
            tensor = tensor.redistribute(placements=self.placements if theirs.mesh == self.mesh else settled)
            theirs = _Spec.of(tensor)
        if (theirs.mesh, theirs.placements) == (self.mesh, self.placements):
            return tensor.to_local()
        return self._cut(tensor.to_local(), theirs)

    def _cut(self, tensor: Tensor, has: "_Spec | None") -> Tensor:
        """Of what another layout has, or of everything, the part of this one."""
        for axis in range(len(self.shape)):
            if not self.is_cut(axis):
                continue
            places = self.places(axis).to(tensor.device)
            if has is not None and has.is_cut(axis):
                places = torch.searchsorted(has.places(axis).to(tensor.device), places)
            if len(places) and int(places[-1] - places[0]) == len(places) - 1:
                tensor = tensor.narrow(axis, int(places[0]), len(places))
            else:
                tensor = tensor.index_select(axis, places)
        return tensor


@functools.lru_cache(maxsize=4096)
def _places(spec: _Spec, axis: int, rank: int) -> Tensor:
    """Of one rank; laying a tensor out takes a millisecond."""
    along = [_along_first(placement) if _cuts(placement, axis) else Replicate() for placement in spec.placements]
    indices = torch.arange(spec.shape[axis], device=spec.mesh.device_type)
    return distribute_tensor(indices, spec.mesh, along, src_data_rank=None).to_local()


class Shards:
    """The layout of parameters by name; see the module. It does not change.

    Args:
        parameters: plain tensors, of which every process has all elements, and DTensors.
    """

    def __init__(self, parameters: Named | None = None) -> None:
        self._specs = {name: _Spec.of(p) for name, p in (parameters or {}).items() if isinstance(p, DTensor)}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._specs)

    @property
    def meshes(self) -> list[DeviceMesh]:
        """The meshes that parameters are sharded over."""
        return list(dict.fromkeys(spec.mesh for spec in self._specs.values()))

    def shape(self, name: str, tensor: Tensor) -> torch.Size:
        """Of the whole parameter, of which `tensor` is the local part."""
        return self._specs[name].shape if name in self._specs else tensor.shape

    def counts(self, name: str) -> bool:
        """Whether this process is the one, of those that have the same elements, that they are counted for."""
        if not self._specs:
            return True
        if name not in self._specs:
            return torch.distributed.get_rank() == 0
        mesh, placements = self._specs[name].mesh, self._specs[name].placements
        coordinate = mesh.get_coordinate()
        assert coordinate is not None  # the process has a part
        first = all(c == 0 for c, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
        return first and bool((mesh.mesh == 0).any())

    def flat_index(self, name: str, where: Tensor, tensor: Tensor) -> Tensor:
        """Places in the whole parameter, row by row, of places in its local part.

        Args:
            where: int64, flat places in `tensor`, the local part.
        """
        if name not in self._specs:
            return where
        shape, found = self._specs[name].shape, torch.zeros_like(where)
        for axis, index in enumerate(torch.unravel_index(where, tensor.shape)):
            found = found * shape[axis] + self._specs[name].places(axis).to(where.device)[index]
        return found

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """The rows of the whole parameter, indices along its first axis, that the rows of its local part are."""
        if name not in self._specs or not tensor.dim():
            return torch.arange(len(tensor) if tensor.dim() else 1, device=tensor.device)
        return self._specs[name].places(0).to(tensor.device)

    def mean_over_replicas_(self, named: Named, world: World) -> None:
        """Replace what several processes have of a parameter by its mean over them."""
        for name, tensor in named.items():
            if name not in self._specs:
                world.all_reduce_mean_(tensor)
            else:
                mesh, placements = self._specs[name].mesh, self._specs[name].placements
                for axis, placement in enumerate(placements):
                    if placement.is_replicate():
                        world.all_reduce_mean_(tensor, mesh.get_group(axis))

    def wrapped(self, named: Named) -> dict[str, Tensor]:
        """DTensors in place of the local parts of such, laid out as the parameters are."""
        return {name: self._wrap(name, tensor) for name, tensor in named.items()}

    def parts(self, named: Named) -> dict[str, Tensor]:
        """The local parts of whole tensors."""
        return {n: self._specs[n].part(t) if n in self._specs else t for n, t in named.items()}

    def whole(self, named: Named, world: World) -> dict[str, Tensor]:
        """Whole tensors. If there are shards, on the CPU of rank 0 and nowhere else, gathered one after the other."""
        if not self:
            return dict(named)
        found = {}
        for name, tensor in named.items():
            full = whole(self._wrap(name, tensor))
            if world.rank == 0:
                found[name] = full.cpu()
        return found

    def count(self, masks: Named, world: World) -> dict[str, int]:
        """By name, how many elements are marked, on all processes."""
        counts = torch.tensor([int(mask.sum()) if self.counts(name) else 0 for name, mask in masks.items()])
        return dict(zip(masks, world.all_reduce_sum(counts).tolist(), strict=True))

    def check_agreement(self, masks: Named, world: World) -> None:
        """Make sure that processes with the same elements have the same masks.

        Raises:
            RuntimeError: they have not; on all processes.
        """
        if world.size == 1:
            return
        own = [(self._fingerprint_of_places(name), _fingerprint(mask)) for name, mask in masks.items()]
        of_all = world.all_gather(torch.tensor(own)).tolist()
        apart: dict[str, list[int]] = {}
        for i, name in enumerate(masks):
            first: dict[int, int] = {}  # places -> the mask of the first process that has them
            for rank, of_rank in enumerate(of_all):
                places, mask = of_rank[i]
                if first.setdefault(places, mask) != mask:
                    apart.setdefault(name, []).append(rank)
        if apart:
            listing = ", ".join(f"{name} (ranks {', '.join(map(str, r))})" for name, r in list(apart.items())[:5])
            raise RuntimeError(
                f"The processes would freeze different elements. Of {len(apart)} parameters some ranks have other masks"
                f" than the first that has the same elements: {listing}. Weights or gradients may differ that ought to"
                " be the same; an `order` of your own must give the same scores everywhere: draw random numbers from"
                " `evidence.seed`, and use nothing that only one rank has."
            )

    def _fingerprint_of_places(self, name: str) -> int:
        if name not in self._specs:
            return 0
        spec = self._specs[name]
        return _fingerprint(torch.cat([spec.places(axis) for axis in range(len(spec.shape))] or [torch.empty(0)]))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shards":
        return self

    def _wrap(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._specs:
            return tensor
        mesh, placements, shape, stride = self._specs[name]
        return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=stride)


def _cuts(placement: Any, axis: int) -> bool:
    """Whether it is a kind of shard along an axis; FSDP2 over tensor parallelism has its own, that is no `Shard`."""
    return not placement.is_replicate() and not placement.is_partial() and placement.dim == axis


def _along_first(placement: Any) -> Placement:
    """The same way of cutting, along the first axis."""
    factor = getattr(placement, "split_factor", None)
    return Shard(0) if factor is None else type(placement)(0, split_factor=factor)


def _fingerprint(tensor: Tensor) -> int:
    digest = hashlib.blake2b(tensor.contiguous().cpu().numpy().data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


UNSHARDED = Shards()
"""Of parameters that are not sharded."""

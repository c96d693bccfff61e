"""Which elements of each parameter this process holds: all of them, or those of its shard of a DTensor.

Everything that is kept by element (statistics, scores, masks) is kept for the local elements only, in plain tensors of
the local shape. The index of each local element in the whole parameter is known, so decisions and checkpoints do not
depend on how the parameters are sharded.
"""

import functools
import hashlib
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.nn import Parameter

from lightning_gcfreeze._torch import StridedShard
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed.collectives import SINGLE_PROCESS, World


def local(tensor: Tensor) -> Tensor:
    """Return the local elements of a DTensor, in its own memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all elements of a DTensor, gathered; a plain tensor as it is. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_parameters(module: nn.Module, remove_duplicate: bool = True) -> dict[str, Parameter]:
    """Return a module's parameters by name, after the shards are back in place of those that FSDP2 has gathered.

    After a pass without gradients, such as a validation, FSDP2 leaves the outermost module's gathered parameters in
    place until the next backward pass.

    Args:
        module: any module.
        remove_duplicate: of ``named_parameters()``.
    """
    for m in module.modules():
        if isinstance(m, FSDPModule):
            m.reshard()
    return dict(module.named_parameters(remove_duplicate=remove_duplicate))


def part(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return those elements of `tensor` that correspond to the local elements of `parameter`.

    Communicates only if `tensor` is a DTensor with a partial placement, a sum that is still to be reduced.

    Args:
        parameter: a plain tensor, for which `tensor` is returned as it is, or a DTensor.
        tensor: a tensor of the shape of the whole parameter, plain or sharded in any way.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    return _Layout.of(parameter).select_local(tensor)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this is a DTensor, of which a process may hold a part only."""
    return isinstance(parameter, DTensor)


def layout_of(parameter: Tensor) -> tuple[DeviceMesh, tuple[Placement, ...]] | None:
    """Return the mesh and the placements of a DTensor; None for a plain tensor."""
    return (parameter.device_mesh, tuple(parameter.placements)) if isinstance(parameter, DTensor) else None


def in_layout_of(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor of the parameter's shape laid out as the parameter is; as it is if both are, or are plain.

    Communicates only if it is laid out in another way: gradients may be sums that are still to be reduced, and so may
    momenta that began as such a gradient.
    """
    if layout_of(parameter) in (None, layout_of(tensor)):
        return tensor
    return _Layout.of(cast("DTensor", parameter)).wrap(part(parameter, tensor))


def flat_like(parameter: Tensor, values: Tensor, numel: int) -> Tensor:
    """Return flat values as part of a vector that lies on the same processes as a parameter.

    Args:
        parameter: a plain tensor, for which `values` is returned as it is, or a DTensor.
        values: those of this process, ``(n,)``. Processes may have different n, also none at all: nothing may
            redistribute the vector. Operations by element and norms do not.
        numel: of the vector, on all processes.
    """
    if not isinstance(parameter, DTensor):
        return values
    placements = [p if p.is_replicate() else Shard(0) for p in parameter.placements]
    return DTensor.from_local(
        values, parameter.device_mesh, placements, run_check=False, shape=torch.Size([numel]), stride=(1,)
    )


class _Layout(NamedTuple):
    """How a DTensor is laid out over the processes."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> "_Layout":
        return cls(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())

    def global_indices(self, axis: int) -> Tensor:
        """Return the local indices along an axis of the whole tensor, ascending, ``(length of the local axis,)``."""
        return _global_indices(self, axis, torch.distributed.get_rank())

    def is_sharded_along(self, axis: int) -> bool:
        return any(_shards_axis(placement, axis) for placement in self.placements)

    def select_local(self, tensor: Tensor) -> Tensor:
        """Return the elements of a tensor, which is whole or in another layout, that are local in this layout."""
        if not isinstance(tensor, DTensor):
            return self._select(tensor, None)
        given = _Layout.of(tensor)
        if any(placement.is_partial() for placement in given.placements):
            reduced = [Replicate() if placement.is_partial() else placement for placement in given.placements]
            tensor = tensor.redistribute(placements=self.placements if given.mesh == self.mesh else reduced)
            given = _Layout.of(tensor)
        if (given.mesh, given.placements) == (self.mesh, self.placements):
            return tensor.to_local()
        return self._select(tensor.to_local(), given)

    def _select(self, tensor: Tensor, given: "_Layout | None") -> Tensor:
        """Select from the local elements of the layout `given`, or from a whole tensor if it is None."""
        for axis in range(len(self.shape)):
            if not self.is_sharded_along(axis):
                continue
            indices = self.global_indices(axis).to(tensor.device)
            if given is not None and given.is_sharded_along(axis):
                indices = torch.searchsorted(given.global_indices(axis).to(tensor.device), indices)
            if len(indices) and int(indices[-1] - indices[0]) == len(indices) - 1:
                tensor = tensor.narrow(axis, int(indices[0]), len(indices))
            else:
                tensor = tensor.index_select(axis, indices)
        return tensor

    def fingerprint(self) -> int:
        """Return a hash of the indices of the local elements."""
        indices = [self.global_indices(axis) for axis in range(len(self.shape))]
        return _fingerprint(torch.cat(indices or [torch.empty(0)]))

    def wrap(self, tensor: Tensor) -> DTensor:
        """Return the DTensor in this layout whose local elements these are."""
        return DTensor.from_local(
            tensor, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


@functools.lru_cache(maxsize=4096)
def _global_indices(layout: _Layout, axis: int, rank: int) -> Tensor:
    """Compute `_Layout.global_indices` of one rank; cached, because `distribute_tensor` takes a millisecond."""
    placements = [_along_axis_0(p) if _shards_axis(p, axis) else Replicate() for p in layout.placements]
    indices = torch.arange(layout.shape[axis], device=layout.mesh.device_type)
    return distribute_tensor(indices, layout.mesh, placements, src_data_rank=None).to_local()


class Shards:
    """The layout of parameters, by name, and the processes that they are laid out over. It does not change.

    Tensors that methods take as ``{name: tensor}`` hold the local elements, unless said otherwise.

    Args:
        parameters: plain tensors, of which every process holds all elements, and DTensors.
        world: all processes of the run.
    """

    def __init__(self, parameters: Named | None = None, world: World = SINGLE_PROCESS) -> None:
        self.world = world
        self._layouts = {name: _Layout.of(p) for name, p in (parameters or {}).items() if isinstance(p, DTensor)}

    @property
    def is_sharded(self) -> bool:
        """Whether any parameter is a DTensor."""
        return bool(self._layouts)

    @property
    def element_world(self) -> World:
        """The processes that elements are spread over: the world if any parameter is sharded, else this process only.

        A sum over it counts each element once, of those for which `is_counted_here` holds.
        """
        return self.world if self.is_sharded else SINGLE_PROCESS

    @property
    def meshes(self) -> list[DeviceMesh]:
        """The meshes that parameters are sharded over, each once."""
        return list(dict.fromkeys(layout.mesh for layout in self._layouts.values()))

    def shape(self, name: str, tensor: Tensor) -> torch.Size:
        """Return the shape of a whole parameter, of which `tensor` holds the local elements."""
        return self._layouts[name].shape if name in self._layouts else tensor.shape

    def is_counted_here(self, name: str) -> bool:
        """Return whether this process is the first of those that hold the same elements of a parameter."""
        if not self.is_sharded:
            return True
        if name not in self._layouts:
            return torch.distributed.get_rank() == 0
        mesh, placements = self._layouts[name].mesh, self._layouts[name].placements
        coordinate = mesh.get_coordinate()
        assert coordinate is not None  # the process holds a shard
        first = all(c == 0 for c, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
        return first and bool((mesh.mesh == 0).any())

    def flat_index(self, name: str, index: Tensor, tensor: Tensor) -> Tensor:
        """Return flat indices into the whole parameter for flat indices into its local elements, both row by row.

        Args:
            name: of the parameter.
            index: int64, of any shape.
            tensor: the local elements, for their shape.
        """
        if name not in self._layouts:
            return index
        layout, found = self._layouts[name], torch.zeros_like(index)
        for axis, along_axis in enumerate(torch.unravel_index(index, tensor.shape)):
            found = found * layout.shape[axis] + layout.global_indices(axis).to(index.device)[along_axis]
        return found

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """Return the row of the whole parameter, an index along its first axis, of each local row, ``(rows,)``."""
        if name not in self._layouts or not tensor.dim():
            return torch.arange(len(tensor) if tensor.dim() else 1, device=tensor.device)
        return self._layouts[name].global_indices(0).to(tensor.device)

    def mean_over_replicas_(self, named: Named) -> None:
        """Replace each tensor by its mean over the processes that hold the same elements."""
        for name, tensor in named.items():
            if name not in self._layouts:
                self.world.all_reduce_mean_(tensor)
                continue
            layout = self._layouts[name]
            for mesh_axis, placement in enumerate(layout.placements):
                if placement.is_replicate():
                    self.world.all_reduce_mean_(tensor, layout.mesh.get_group(mesh_axis))

    def wrapped(self, named: Named) -> dict[str, Tensor]:
        """Return DTensors laid out as the parameters are; for plain parameters the tensors as they are."""
        return {name: self._layouts[name].wrap(t) if name in self._layouts else t for name, t in named.items()}

    def parts(self, named: Named) -> dict[str, Tensor]:
        """Return the local elements of whole tensors."""
        return {name: self._layouts[name].select_local(t) if name in self._layouts else t for name, t in named.items()}

    def whole(self, named: Named) -> dict[str, Tensor]:
        """Return the whole tensors.

        If any parameter is sharded, all processes must call it: tensors are gathered one after the other, and returned
        on the CPU of rank 0 only; on the other ranks the dict is empty.
        """
        if not self.is_sharded:
            return dict(named)
        found = {}
        for name, tensor in self.wrapped(named).items():
            full = whole(tensor)
            if self.world.rank == 0:
                found[name] = full.cpu()
        return found

    def n_marked(self, masks: Named) -> dict[str, int]:
        """Return the number of True elements of each whole mask."""
        counts = [int(mask.count_nonzero()) if self.is_counted_here(name) else 0 for name, mask in masks.items()]
        return dict(zip(masks, self.element_world.all_reduce_sum(torch.tensor(counts)).tolist(), strict=True))

    def check_agreement(self, masks: Named) -> None:
        """Check that processes that hold the same elements have the same masks.

        Raises:
            RuntimeError: they differ. It is raised on all processes and names the parameters and ranks.
        """
        if self.world.size == 1:
            return
        local_fingerprints = [
            (self._layouts[name].fingerprint() if name in self._layouts else 0, _fingerprint(mask))
            for name, mask in masks.items()
        ]
        by_rank = self.world.all_gather(torch.tensor(local_fingerprints)).tolist()
        differing: dict[str, list[int]] = {}
        for i, name in enumerate(masks):
            expected: dict[int, int] = {}  # elements -> the mask of the first rank that holds them
            for rank, fingerprints in enumerate(by_rank):
                elements, mask = fingerprints[i]
                if expected.setdefault(elements, mask) != mask:
                    differing.setdefault(name, []).append(rank)
        if differing:
            listing = [f"{name} (ranks {', '.join(map(str, ranks))})" for name, ranks in differing.items()]
            raise RuntimeError(
                f"The processes would freeze different elements. For {len(differing)} parameters, the masks of some"
                " ranks differ from that of the first rank with the same elements:"
                f" {', '.join(listing[:5])}. Weights or gradients may differ that should be equal on all ranks. A"
                " custom `order` must return the same scores on all ranks: draw random numbers from `evidence.seed`,"
                " and use nothing that only one rank has."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shards":
        """Return this object: process groups and meshes cannot be copied."""
        return self


def _shards_axis(placement: Any, axis: int) -> bool:
    """Return whether a placement, `Shard` or `StridedShard`, shards along an axis."""
    return not placement.is_replicate() and not placement.is_partial() and placement.dim == axis


def _along_axis_0(placement: Placement) -> Placement:
    """Return the placement that shards in the same way along the first axis."""
    if isinstance(placement, StridedShard):
        return StridedShard(0, split_factor=placement.split_factor)
    return Shard(0)


def _fingerprint(tensor: Tensor) -> int:
    digest = hashlib.blake2b(tensor.contiguous().cpu().numpy().data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


UNSHARDED = Shards()
"""The layout of parameters that are not sharded, in a run with one process."""

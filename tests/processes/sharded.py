"""Runs over shards with `hold="compact"`, and what they have to agree on with the loop in one process."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.distributed import local, whole
from lightning_gcfreeze.freezing import compact
from tests import cases
from tests.processes.by_hand import ENTRIES, OPTIMIZERS, Masks, samples
from tests.processes.checkpoints import RANK, RANKS, SAMPLES, STEPS, network
from tests.witnesses import flat_bits

T0 = 4
HIDDEN = "grad"  # what looks at gradients by this name is not found by reading code: nothing changes for its sake

# The run -------------------------------------------------------------------------------------------------------------


class Module(cases.Regression):
    """Sharded by FSDP2, over tensor parallelism if there is any."""

    rates: Any = None
    policy = MixedPrecisionPolicy()

    def configure_model(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        if (tensor := mesh["tensor_parallel"]).size() > 1:
            plan = {"0": ColwiseParallel(), "2.0": RowwiseParallel()}
            parallelize_module(self.network, tensor, plan)  # type: ignore[arg-type]
        for part in (self.network[2], self.network[4], self.network):
            fully_shard(part, mesh=mesh["data_parallel"], mp_policy=self.policy)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.network.parameters())
        return ([optimizer], [{"scheduler": self.rates(optimizer), "interval": "step"}]) if self.rates else optimizer


class Hybrid(Module):
    """Two copies, each over two ranks."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
        for part in (self.network[2], self.network[4], self.network):
            fully_shard(part, mesh=mesh)


class InPart(Module):
    """By tensor parallelism alone; what has no plan stays a plain parameter."""

    def configure_model(self) -> None:
        plan = {"0": ColwiseParallel(), "2.0": RowwiseParallel()}
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)  # type: ignore[index,arg-type]


class Sequences(Module):
    """By tensor parallelism alone; gradients of the norm's weights are sums that are still to be reduced."""

    def configure_model(self) -> None:
        plan = {
            "0": ColwiseParallel(),
            "2.0": RowwiseParallel(output_layouts=Shard(0)),
            "2.1": SequenceParallel(sequence_dim=0, use_local_output=False),
            "4": RowwiseParallel(input_layouts=Shard(0)),
        }
        parallelize_module(self.network, self.device_mesh["tensor_parallel"], plan)  # type: ignore[index,arg-type]


class Both(Sequences):
    """FSDP2 over tensor parallelism of all layers."""

    def configure_model(self) -> None:
        super().configure_model()
        assert self.device_mesh is not None
        for part in (self.network[2], self.network[4], self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Batches:
    """Those of this rank's replica: eight samples a step over all."""

    def __init__(self, rank: int, ranks: int, rise: float = 0.0) -> None:
        self.rank, self.ranks, self.rise = rank, ranks, rise

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[list[Tensor]]:
        x, y = samples(self.rise)
        own = SAMPLES // self.ranks
        for step in range(STEPS):
            start = SAMPLES * step + own * self.rank
            yield [x[start : start + own], y[start : start + own]]


class Look(pl.Callback):
    """Keeps what was frozen in each step, and what each rank has to keep; it looks at gradients and nobody knows."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback, self.masks, self.at_freeze = callback, list[Masks](), dict[str, Tensor]()
        self.kept, self.state_bytes, self.live_bytes = set[str](), list[int](), list[int]()
        self.without, self.before = set[str](), Masks()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        named = {name.removeprefix("network."): p for name, p in pl_module.named_parameters()}
        steps = trainer.global_step
        has_stepped = steps > len(self.masks)
        if has_stepped:
            self.masks += [self.before]
            self.before = named_whole(self.callback.frozen)
        if self.callback.phase != "frozen":
            return
        if not self.at_freeze:
            self.at_freeze = {name: whole(p.detach()).clone() for name, p in named.items()}
            return
        parts = {name.removeprefix("network."): local(mask) for name, mask in self.callback.frozen.items()}
        # Bundled ones are gathered together after a step's last pass.
        if has_stepped or compact.MAX_BUNDLED_NUMEL == 0:
            self.kept = {
                name for name, p in named.items() if getattr(Tensor, HIDDEN).__get__(p) is not None
            }  # past the watch
        self.without = {name for name, p in named.items() if not p.requires_grad}
        state = [v for entry in trainer.optimizers[0].state.values() for v in entry.values() if isinstance(v, Tensor)]
        self.state_bytes.append(sum(local(v).nbytes for v in state if v.dim()))
        self.live_bytes.append(sum(int((~mask).sum()) * 8 for mask in parts.values()))


def named_whole(named: Mapping[str, Tensor]) -> Masks:
    return {name.removeprefix("network."): whole(tensor.detach()).clone() for name, tensor in named.items()}


def fit(
    make: str = "AdamW",
    layout: tuple[int, int] = (RANKS, 1),
    kind: type[Module] = Module,
    rates: Any = None,
    trainer: Mapping[str, Any] | None = None,
    callbacks: tuple[Any, ...] = (),
    rise: float = 0.0,
    **arguments: Any,
) -> tuple[GradCovFreezeCallback, Module, Look]:
    """Train under a strategy; gradients kept between the steps and states are counted on each rank."""
    data, tensor = layout
    callback = GradCovFreezeCallback(**({"t0": T0, "seed": 3} | arguments))
    look, module = Look(callback), kind(network(), OPTIMIZERS[make])
    module.rates = rates
    strategy = ModelParallelStrategy(data, tensor, process_group_backend="gloo")
    lightning = cases.trainer(
        callbacks=[callback, look, *callbacks], devices=RANKS, strategy=strategy, use_distributed_sampler=False,
        max_epochs=1, **(trainer or {}),
    )  # fmt: skip
    replica = RANK if kind is Hybrid else RANK // tensor
    batches = Batches(replica, RANKS if kind is Hybrid else data, rise)
    lightning.fit(module, batches)
    return callback, module, look


def assert_is(module: nn.Module, expected: nn.Module, masks: Masks, start: Masks, tolerance: float = 1e-9) -> None:
    """Live elements are those of the loop by hand and have moved; frozen ones have the bits that they had."""
    moved = live = 0
    for name, p in expected.named_parameters():
        ours, mask = whole(module.get_parameter(name).detach()), masks.get(name, torch.zeros_like(p, dtype=torch.bool))
        torch.testing.assert_close(ours, whole(p.detach()), rtol=tolerance, atol=tolerance, msg=name)
        same = flat_bits(ours) == flat_bits(start[name])
        assert same[mask.flatten()].all(), name
        moved, live = moved + int((~same).sum()), live + int((~mask).sum())
    assert 0 < moved == live


def assert_saves(look: Look, masks: Masks, make: str) -> None:
    """On this rank states are those of its live elements, and partly or wholly frozen parameters keep no gradient."""
    assert look.state_bytes[-1] == ENTRIES[make] * look.live_bytes[-1], (look.state_bytes, look.live_bytes)
    touched = {name for name, mask in masks.items() if mask.any()}
    assert not look.kept & touched, look.kept
    assert look.without == {name for name, mask in masks.items() if mask.all()}


@contextlib.contextmanager
def bundled(numel: int) -> Iterator[None]:
    """Set up to which size parameters travel together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "MAX_BUNDLED_NUMEL", numel)
        yield


def norm(parameters: Any) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 0.05)


def value(parameters: Any) -> None:
    torch.nn.utils.clip_grad_value_(parameters, 0.01)


def halving(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


NORM = {"gradient_clip_val": 0.05}
VALUE = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}


def differ(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(not torch.allclose(whole(p.detach()), whole(q.detach()), rtol=1e-6) for p, q in pairs)

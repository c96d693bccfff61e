"""`batch_norm="freeze"` under DDP, FSDP2 and tensor parallelism on two ranks, against a loop in one process."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.distributed import whole
from lightning_gcfreeze.masks import layer
from tests import cases
from tests.processes.checkpoints import RANK, STEPS, Batches

NORMS = ("network.1", "network.4")  # of the second, rank 1 has no element under FSDP2
T0 = 4


def network() -> nn.Sequential:
    """Layers that know other statistics than those of their first batches, as pretrained ones do."""
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1), nn.BatchNorm1d(1), nn.Linear(1, 1)
    ).double()
    for norm in (layers[1], layers[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return layers


class Module(cases.Regression):
    """The norms are sharded together with the other layers: after a pass without gradients they stay gathered."""

    own_groups = False

    def __init__(self) -> None:
        super().__init__(network(), lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1))

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        if (tensor := self.device_mesh["tensor_parallel"]).size() > 1:
            plan = {
                "0": ColwiseParallel(output_layouts=Replicate()),
                "3": RowwiseParallel(input_layouts=Replicate()),
            }
            parallelize_module(self.network, tensor, plan)  # type: ignore[arg-type]
            return
        parts = [self.network[1], self.network[4]] if self.own_groups else []
        for part in (*parts, self.network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.network(batch[0])


class OwnGroups(Module):
    """Each norm is sharded alone."""

    own_groups = True


STRATEGIES: dict[str, tuple[Callable[[], Any], type[Module]]] = {
    "ddp": (DDPStrategy, Module),
    "ddp, own buffers": (lambda: DDPStrategy(broadcast_buffers=False), Module),
    "fsdp2": (lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"), Module),
    "fsdp2, own groups": (lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"), OwnGroups),
    "tensor": (lambda: ModelParallelStrategy(1, 2, process_group_backend="gloo"), Module),
}


class Look(pl.Callback):
    """The layers' statistics after each step, and whether they followed the module into training mode."""

    def __init__(self) -> None:
        self.statistics: list[dict[str, Tensor]] = []
        self.modes: list[dict[str, bool]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        pl_module.train()
        self.modes.append({name: pl_module.get_submodule(name).training for name in NORMS})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.statistics.append({n: b.clone() for n, b in pl_module.named_buffers()})


def fit(name: str, *more: pl.Callback, ckpt_path: Any = None, **arguments: Any) -> Any:
    """Train with the option; the Trainer validates before the first step and in the middle."""
    make, kind = STRATEGIES[name]
    callback, look, module = GradCovFreezeCallback(batch_norm="freeze", **arguments), Look(), kind()
    trainer = cases.trainer(
        callbacks=[callback, look, *more], devices=2, strategy=make(), use_distributed_sampler=False, max_epochs=1,
        num_sanity_val_steps=1, val_check_interval=5,
    )  # fmt: skip
    rank, ranks = (0, 1) if name == "tensor" else (RANK, 2)
    validated = [*Batches(rank, ranks)][:2]
    trainer.fit(
        module,
        Batches(rank, ranks),
        DataLoader(validated, batch_size=None),  # type: ignore[arg-type]
        ckpt_path=ckpt_path,
        weights_only=True if ckpt_path else None,
    )
    return module, look


def on_both(value: Any) -> list[Any]:
    found: list[Any] = [None, None]
    dist.all_gather_object(found, value)
    return found


def by_hand() -> nn.Module:
    """AdamW in one process; the norms are in evaluation mode, and not the optimizer's."""
    model = network()
    for norm in (model[1], model[4]):
        norm.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02, weight_decay=0.1)
    for x, y in Batches(0, 1):
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_ends_as(module: Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        ours = whole(module.network.state_dict()[name])
        torch.testing.assert_close(ours, value, rtol=1e-8, atol=1e-10, msg=name)
    start = network().state_dict()
    assert all(torch.equal(value, start[name]) == (name[0] in "14") for name, value in expected.state_dict().items())


def masks_from_the_first_step_give_the_loop_of_one_process() -> None:
    expected = by_hand()
    given = layer(NORMS[0]) | layer(NORMS[1])
    for name, hold in itertools.product(STRATEGIES, ("auto", "restore")):
        module, look = fit(name, masks=given, hold=hold)
        assert len(look.modes) == STEPS
        assert not any(mode for modes in look.modes for mode in modes.values()), (name, hold)
        assert_ends_as(module, expected)
        assert all(module.get_submodule(norm).training for norm in NORMS)


def statistics_stay_those_of_the_freeze_on_all_ranks() -> None:
    """DDP sends rank 0's before each pass, unless it is told not to; elsewhere each rank keeps its own."""
    for name in STRATEGIES:
        _, look = fit(name, t0=T0, k=1.0, include="network.[14].*", order="movement")
        assert look.modes == [dict.fromkeys(NORMS, step < T0) for step in range(STEPS)], (name, look.modes)
        tracked, *still = look.statistics[T0 - 2], *look.statistics[T0 - 1 :]
        for norm in NORMS:
            for n in (f"{norm}.running_mean", f"{norm}.running_var", f"{norm}.num_batches_tracked"):
                assert not torch.equal(still[0][n], tracked[n]), (name, n)
                kept = on_both(still[0][n])[0 if name == "ddp" else RANK]
                assert all(torch.equal(later[n], kept) for later in still[1:]), (name, n)


def norm_that_is_live_on_one_rank_tracks_on_both() -> None:
    """Rank 1 has the last three elements of the first norm, all frozen, and none of the second."""
    last = torch.tensor([False, False, False, True, True, True])
    given = {"network.1.weight": last, "network.1.bias": True, "network.4.weight": True}
    for name in STRATEGIES:
        _, look = fit(name, masks=given)
        assert look.modes == [dict.fromkeys(NORMS, True)] * STEPS, (name, look.modes)


class Save(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == T0 + 2:
            trainer.save_checkpoint(self.path)


def resumed_runs_end_as_unbroken_ones(folder: Path) -> None:
    """The layers keep still from the first resumed step on; a checkpoint has the buffers of rank 0."""
    for name in ("ddp", "fsdp2", "fsdp2, own groups"):
        recipe: dict[str, Any] = {"t0": T0, "k": 1.0, "include": "network.[14].*", "order": "movement"}
        unbroken, _ = fit(name, Save(folder / f"{name}.ckpt"), **recipe)
        resumed, look = fit(name, ckpt_path=folder / f"{name}.ckpt", **recipe)
        assert look.modes == [dict.fromkeys(NORMS, False)] * (STEPS - T0 - 2), (name, look.modes)
        if name == "ddp":
            for n, value in unbroken.state_dict().items():
                assert torch.equal(value, resumed.state_dict()[n]), n


def main(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks_from_the_first_step_give_the_loop_of_one_process()
        statistics_stay_those_of_the_freeze_on_all_ranks()
        norm_that_is_live_on_one_rank_tracks_on_both()
        resumed_runs_end_as_unbroken_ones(folder)

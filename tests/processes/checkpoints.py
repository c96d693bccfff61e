"""Runs that save checkpoints, and runs that resume from them on another number of ranks.

A single rank needs no torchrun.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_gcfreeze import FreezeSchedule, GradCovFreezeCallback
from lightning_gcfreeze.distributed import local, whole
from tests import cases, insides

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
T0, BEFORE, AFTER, STEPS, SAMPLES = 5, 3, 7, 10, 8


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), nn.Tanh(), nn.Linear(4, 1)
    ).double()


class Module(cases.Regression):
    def __init__(self) -> None:
        super().__init__(network(), lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1))

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        if (tensor := self.device_mesh["tensor_parallel"]).size() > 1:
            parallelize_module(self.network, tensor, {"0": ColwiseParallel(), "2.0": RowwiseParallel()})
        data = self.device_mesh["data_parallel"]
        fully_shard(self.network[2], mesh=data)
        fully_shard(self.network, mesh=data)


class Batches:
    """Eight samples a step, whatever the number of ranks that share them; it goes on where it stopped."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.served = rank, ranks, 0

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[list[Tensor]]:
        x, y = cases.data(SAMPLES * STEPS, torch.float64).tensors
        own = SAMPLES // self.ranks
        while self.served < STEPS:
            start = SAMPLES * self.served + own * self.rank
            self.served += 1
            yield [x[start : start + own], y[start : start + own]]

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"]


class Save(pl.Callback):
    """Before the freeze, and after."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step in (BEFORE, AFTER):
            trainer.save_checkpoint(self.directory / f"{trainer.global_step}.ckpt")


OPTIONS: dict[str, dict[str, Any]] = {
    # Checkpoints after the freeze have the optimizer's state of what thaws.
    "thaws": {"schedule": FreezeSchedule([(T0, 0.6), (9, 0.3)], monotone=False), "order": "random"},
}
"""Of the callback, by name of the strategy."""


class Start(pl.Callback):
    """The weights with which elements froze, or a frozen run went on."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback, self.weights = callback, dict[str, Tensor]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.callback.phase == "frozen" and not self.weights:
            self.weights = {n: whole(p.detach()).clone() for n, p in pl_module.named_parameters()}


def strategies() -> dict[str, tuple[Any, int, int]]:
    """By name, with the rank and the number of those that share the samples."""

    def sharded(data: int, tensor: int, **kwargs: Any) -> tuple[Any, int, int]:
        strategy = ModelParallelStrategy(data, tensor, process_group_backend="gloo", **kwargs)
        return strategy, RANK // tensor, data

    found = {
        "ddp": (DDPStrategy() if RANKS > 1 else SingleDeviceStrategy("cpu"), RANK, RANKS),
        "fsdp2 in parts": sharded(RANKS, 1),
        "thaws": (SingleDeviceStrategy("cpu"), 0, 1),
    }
    if RANKS > 1:  # FSDP2 and tensor parallelism on four
        found["thaws"] = sharded(2, RANKS // 2, save_distributed_checkpoint=False)
    if RANKS == 2:
        found["fsdp2"] = sharded(2, 1, save_distributed_checkpoint=False)
        found["tensor"] = sharded(1, 2, save_distributed_checkpoint=False)
    return found


def saved_by(name: str) -> str:
    """Whose checkpoints a strategy goes on from: tensor parallelism from those of others, who shard in another way."""
    return "fsdp2" if name == "tensor" else name


def run(name: str, directory: Path, resume: int | None = None) -> dict[str, Any]:
    """Train to the end; what came out, whole."""
    strategy, rank, ranks = strategies()[name]
    folder = directory / (saved_by(name) if resume else name)
    callback = GradCovFreezeCallback(**OPTIONS.get(name, {"t0": T0, "k": 0.6}), seed=3)
    count = round((0.3 if name == "thaws" else 0.6) * 97)
    start, module = Start(callback), Module()
    trainer = cases.trainer(
        callbacks=[callback, start, *([] if resume else [Save(folder)])], devices=RANKS,
        strategy=strategy, use_distributed_sampler=False, max_epochs=1,
    )  # fmt: skip
    path = folder / f"{resume}.ckpt" if resume else None
    trainer.fit(module, Batches(rank, ranks), ckpt_path=path, weights_only=True if path else None)
    frozen = {n: whole(mask) for n, mask in callback.frozen.items()}
    end = {n: whole(p.detach()).clone() for n, p in module.named_parameters()}
    live = sum(int((~mask).sum()) for mask in frozen.values())
    assert live == sum(mask.numel() for mask in frozen.values()) - count, live
    assert callback.savings is not None
    # Each rank's optimizer has two moments of its own live elements, and eight counts of steps.
    own = sum(int((~local(mask)).sum()) for mask in callback.frozen.values())
    assert 2 * 8 * own <= callback.savings.after.state <= 2 * 8 * own + 64 < callback.savings.before.state
    for n, mask in frozen.items():
        assert torch.equal(end[n][mask], start.weights[n][mask])
    assert sum(int((end[n] != start.weights[n]).sum()) for n in end) == live
    assert name == "thaws" or insides.observed_steps_of(callback) == T0
    variance = {n: whole(v) for n, v in callback.variance.items()}
    return {"frozen": frozen, "weights": end, "variance": variance, "ranks": RANKS}


def compare(found: dict[str, Any], expected: dict[str, Any], exact: bool, same_freeze: bool) -> None:
    """With the unbroken run of two ranks."""
    for what in ("frozen", "weights", "variance") if same_freeze else ():
        for name, tensor in expected[what].items():
            if exact or what == "frozen":
                assert torch.equal(found[what][name], tensor), (what, name)
            else:
                torch.testing.assert_close(found[what][name], tensor, rtol=1e-9, atol=1e-11, msg=f"{what} {name}")


def save(folder: Path) -> None:
    """Train under every strategy; leave checkpoints and what came out."""
    for name in strategies():
        outcome = run(name, folder)
        if RANK == 0:
            torch.save(outcome, folder / name / "outcome.pt")


def resume(folder: Path) -> None:
    """Resume from every checkpoint that `save` left, before and after the freeze; end as the unbroken run."""
    for name in strategies():
        if not (outcome := folder / saved_by(name) / "outcome.pt").exists():  # a single rank saves no whole "fsdp2"
            continue
        unbroken = torch.load(outcome)
        same = unbroken["ranks"] == RANKS and name != "tensor"
        for step in (BEFORE, AFTER):
            # Other numbers of ranks have other first samples: before t0 that makes another freeze.
            compare(run(name, folder, step), unbroken, exact=same, same_freeze=same or step > T0)


def resume_from_one(folder: Path) -> None:
    """Resume from what a single rank saved."""
    resume(folder / "one")

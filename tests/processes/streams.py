"""A stream of two ranks under DDP, FSDP2 and tensor parallel: one process that follows comes to the same bits."""

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gcfreeze import GradCovFreezeCallback, delta
from lightning_gcfreeze.distributed import whole
from tests import cases
from tests.processes.checkpoints import RANK, Batches, Module, network
from tests.processes.masks import STRATEGIES, drawn


class Keep(pl.Callback):
    """All tensors after each step, whole."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        self.states[trainer.global_step] = {n: whole(t).clone() for n, t in pl_module.state_dict().items()}


def fit(name: str, folder: Path, keep: Keep, **arguments: object) -> GradCovFreezeCallback:
    freeze = GradCovFreezeCallback(**arguments, stream=delta.Stream(folder, every=3))
    trainer = cases.trainer(
        callbacks=[freeze, keep], devices=2, strategy=STRATEGIES[name](), use_distributed_sampler=False, max_epochs=1
    )
    rank, ranks = (0, 1) if name == "tensor" else (RANK, 2)
    trainer.fit(Module(), Batches(rank, ranks))
    dist.barrier()
    return freeze


def followed(folder: Path, base: dict[str, Tensor], states: dict[int, dict[str, Tensor]]) -> list[int]:
    """The steps of the updates, each of which gave the training's tensors to the bit."""
    serving = cases.Regression(network())
    serving.load_state_dict(base)
    updates, steps = delta.stream.Folder(folder), []
    (first, kind), *later = updates.updates().items()
    assert kind == "whole"
    tenants = delta.Tenants(serving)
    tenants.add("stream", updates.read(first, kind))
    for number, kind in later:
        found = updates.read(number, kind)
        tenants.update("stream", found)
        steps.append(delta.inspect(found).step)
        with tenants.use("stream") as model:
            for n, tensor in model.state_dict().items():
                assert torch.equal(tensor, states[steps[-1]][n]), (number, n)
    assert tenants.verify() == tenants.base
    return steps


def main(folder: Path) -> None:
    for name in ("ddp", "fsdp2", "tensor"):
        keep, masks = Keep(), drawn("element")
        fit(name, folder / f"{name} masks", keep, masks=masks)
        start = {f"network.{n}": tensor for n, tensor in network().state_dict().items()}
        steps = followed(folder / f"{name} masks", start, keep.states)
        assert steps[:2] == [3, 6], steps
        assert steps[-1] == max(keep.states)
        again = Keep()
        fit(name, folder / f"{name} masks", again, masks=masks)  # a new run goes on with the numbers
        updates = delta.stream.Folder(folder / f"{name} masks").updates()
        assert list(updates.values()) == ["whole"] + ["values"] * (2 * len(steps) + 1), updates
        keep = Keep()
        fit(name, folder / f"{name} t0", keep, t0=4, k=0.6, order="magnitude")
        assert followed(folder / f"{name} t0", keep.states[4], keep.states)[0] == 6

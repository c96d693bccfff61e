"""What docs/pains.md says of several processes: DDP's error after a freeze by hand, and rows of an embedding."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.distributed import whole
from lightning_gcfreeze.masks import everything, rows
from tests import cases
from tests.processes.checkpoints import RANK

NEW_TOKENS = [90, 91]
STEPS = 8


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


class Tagger(pl.LightningModule):
    """It decays weights, so that rows move whose gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class FreezeByHand(pl.Callback):
    """The usual recipe, after three steps."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            pl_module.network[1].requires_grad_(False)


def fit(strategy: Any, callback: pl.Callback) -> Tagger:
    tokens = torch.arange(80 + RANK, 96, 2).repeat(STEPS // 2)  # on rank 0 even ones, on rank 1 odd ones
    module = Tagger()
    trainer = cases.trainer(
        callbacks=[callback], devices=2, strategy=strategy, use_distributed_sampler=False, max_steps=STEPS, max_epochs=1
    )
    trainer.fit(module, DataLoader(TensorDataset(tokens, tokens % 4), batch_size=4))
    return module


def new_tokens_alone_train(strategy: Any) -> None:
    """Every other bit stays, on both ranks, whichever of them has seen the tokens."""
    module = fit(strategy, GradCovFreezeCallback(masks=everything() - rows("network.0.weight", NEW_TOKENS)))
    start = {f"network.{name}": p for name, p in network().named_parameters()}
    for name, p in module.named_parameters():
        moved = (whole(p.detach()) != start[name].detach()).flatten(1 if p.dim() > 1 else 0)
        if name == "network.0.weight":
            assert moved.any(1).nonzero().flatten().tolist() == NEW_TOKENS
        else:
            assert not moved.any(), name


def main() -> None:
    with pytest.raises(RuntimeError, match="not used in producing the loss"):
        fit(DDPStrategy(), FreezeByHand())
    freeze = GradCovFreezeCallback(t0=3, k=0.95, order="movement", granularity="tensor")
    fit(DDPStrategy(), freeze)
    assert freeze.savings is not None
    assert freeze.savings.without_backward
    new_tokens_alone_train(DDPStrategy())
    new_tokens_alone_train(ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))

"""PyTorch Geometric: batches of graphs."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool

from tests.libraries.watch import QUIET, STEPS


class Graphs(pl.LightningModule):
    """Two convolutions and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GCNConv(3, 8), GCNConv(8, 8)
        self.head = torch.nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.first(batch.x, batch.edge_index).tanh()
        x = self.second(x, batch.edge_index).tanh()
        return torch.nn.functional.mse_loss(self.head(global_mean_pool(x, batch.batch)), batch.y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def graph(nodes: int) -> Data:
    """A ring of nodes; the target is the mean of their features."""
    x, here = torch.randn(nodes, 3), torch.arange(nodes)
    return Data(x=x, edge_index=torch.stack([here, here.roll(1)]), y=x.mean().view(1, 1))


def fit(folder: Path, callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """Rings of 3 to 7 nodes."""
    torch.manual_seed(0)
    graphs = [graph(3 + i % 5) for i in range(32)]
    module = Graphs()
    trainer = pl.Trainer(accelerator="cpu", max_steps=STEPS, callbacks=callbacks, default_root_dir=folder, **QUIET)
    trainer.fit(module, DataLoader(graphs, batch_size=4, shuffle=True))
    return callbacks

"""Freeze in a loop of Lightning Fabric: `uv run python -m examples.fabric --devices 2`, also on several processes."""

import argparse
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gcfreeze import Freezer


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean loss of a batch; the freezer calls it again on single samples."""
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def main() -> None:
    """Train on random data, freeze 90 % after step 20."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    given = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=given.devices, precision=given.precision)
    fabric.launch()
    torch.manual_seed(0)
    x = torch.randn(2048, 16)
    data = TensorDataset(x, (x.norm(dim=1) > 3.93).long())
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=32, shuffle=True))
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=1e-2))
    freezer = Freezer(model, optimizer, t0=20, k=0.9, loss=loss_of)
    for epoch in range(2):
        for batch in loader:
            freezer.begin_batch(batch)
            loss = loss_of(model, batch)
            freezer.backward(loss, backward=fabric.backward)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        fabric.print(f"epoch {epoch}: loss {loss.item():.3f}, {freezer.frozen_fraction:.0%} frozen")
    freezer.close()
    fabric.print("Frozen by tensor:", {name: f"{mask.float().mean():.0%}" for name, mask in freezer.frozen.items()})


if __name__ == "__main__":
    main()

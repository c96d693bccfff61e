"""A GAN with manual optimization, and a freeze for each of its optimizers: `uv run python -m examples.gan`.

The generator learns points on a circle. Each optimizer has a callback of its own, with its own t0 and k. Orders that do
not read the variance need no gradients of single samples, so they work where `training_step` moves the weights itself.
"""

from typing import cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, Dataset

from lightning_gcfreeze import GradCovFreezeCallback


class CircleGAN(pl.LightningModule):
    """Two small networks with the non-saturating loss, and a penalty on the critic's slope at real points."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(4, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 2)
        )
        self.critic = nn.Sequential(
            nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)
        )

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        """Step the critic, then the generator."""
        for_generator, for_critic = cast("list[LightningOptimizer]", self.optimizers())
        fake = self.generator(torch.randn(len(real), 4))
        real = real.requires_grad_()
        scores = self.critic(real)
        (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
        loss = softplus(-scores).mean() + softplus(self.critic(fake.detach())).mean() + slope.square().sum(1).mean()
        for_critic.zero_grad()
        self.manual_backward(loss)
        for_critic.step()
        for_generator.zero_grad()
        self.manual_backward(softplus(-self.critic(fake)).mean())
        for_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer for each network, the generator's first."""
        return [torch.optim.Adam(network.parameters(), 2e-3, (0.0, 0.99)) for network in (self.generator, self.critic)]


def main(steps: int = 2000) -> CircleGAN:
    """Train, freeze half of the critic and 80 % of the generator, and say how far the points lie from the circle."""
    pl.seed_everything(0)
    angles = torch.rand(128 * steps) * 2 * torch.pi
    points = cast("Dataset[Tensor]", torch.stack([angles.cos(), angles.sin()], dim=1))
    loader = DataLoader(points, batch_size=128)
    freezes = [
        GradCovFreezeCallback(t0=steps // 2, k=0.8, order="progress", optimizer=0),
        GradCovFreezeCallback(t0=steps // 4, k=0.5, order="progress", optimizer=1),
    ]
    gan = CircleGAN()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[*freezes], logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(gan, loader)
    with torch.no_grad():
        radius = gan.generator(torch.randn(4096, 4)).norm(dim=1)
    print(f"The generator's points lie {float((radius - 1).abs().mean()):.3f} from the circle, on average.")
    for name, callback in zip(("generator", "critic"), freezes, strict=True):
        print(f"{name}: {callback.frozen_fraction:.0%} frozen")
    return gan


if __name__ == "__main__":
    main()

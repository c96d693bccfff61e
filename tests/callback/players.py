"""Two networks with an optimizer each."""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class TwoPlayers(pl.LightningModule):
    """A generator that steps once a batch and a critic that steps twice, both with weight decay and momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(1)
        self.generator = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.critic = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, _ = batch
        for_generator, for_critic = self.optimizers()
        for _ in range(2):
            for_critic.zero_grad()
            self.manual_backward(self.critic(x).square().mean() - self.critic(self.generator(x).detach()).mean())
            self.clip_gradients(for_critic, gradient_clip_val=0.5)
            for_critic.step()
        for_generator.zero_grad()
        self.manual_backward(self.critic(self.generator(x)).mean())
        for_generator.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.AdamW(self.generator.parameters(), lr=0.02, weight_decay=0.3),
            torch.optim.SGD(self.critic.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1),
        ]

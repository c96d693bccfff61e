"""Freezing the plain way, in a callback of its own: zero the gradients, and write the values back after each step.

What the package does in whatever way has to end where this ends: frozen elements to the bit, live ones to rounding.
"""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class PlainFreeze(pl.Callback):
    """After `t0` optimizer steps, hold the elements that the masks mark at the values that they have then.

    Args:
        t0: optimizer steps before the freeze; 0: from the first step on.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; names of ``named_parameters()``.
    """

    def __init__(self, t0: int, frozen: Mapping[str, Tensor]) -> None:
        self.t0, self.frozen = t0, frozen
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.t0 == 0:
            parameters = dict(pl_module.named_parameters())
            self.values = {name: parameters[name].clone() for name in self.frozen}

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        for name, p in pl_module.named_parameters() if self.values else ():
            if name not in self.frozen or p.grad is None:
                continue
            if p.grad.is_sparse:
                gradient = p.grad.coalesce()
                live = ~self.frozen[name][gradient.indices()[0]]
                p.grad = torch.sparse_coo_tensor(gradient.indices(), gradient.values() * live, gradient.shape)
            else:
                p.grad.masked_fill_(self.frozen[name], 0.0)  # in place, so that it can be differentiated once more

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        for name, value in self.values.items():
            parameters[name].copy_(torch.where(self.frozen[name], value, parameters[name]))
        if not self.values and trainer.global_step == self.t0:
            self.values = {name: parameters[name].clone() for name in self.frozen}

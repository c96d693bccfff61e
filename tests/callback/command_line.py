"""What a LightningCLI runs, and the cases of the other package called Lightning."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from tests import cases


class CliModule(cases.Regression):
    """What LightningCLI can build without arguments."""

    def __init__(self) -> None:
        super().__init__(cases.mlp())


class CliData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return cases.loader()


YAML = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_gcfreeze.GradCovFreezeCallback
      init_args: {init_args}
"""


def standalone_cases() -> tuple[Any, Any]:
    """The module and data of `pytorch_lightning`, whose classes know nothing of `lightning.pytorch`'s."""
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = cases.mlp()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.log("loss", loss := torch.nn.functional.mse_loss(self.network(batch[0]), batch[1]))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class Data(pytorch_lightning.LightningDataModule):
        def train_dataloader(self) -> Any:
            return cases.loader()

    return Module, Data

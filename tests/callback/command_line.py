"""What a LightningCLI runs, and the cases of the other package called Lightning."""

import importlib
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor

from lightning_gcfreeze import GradCovFreezeCallback
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


def run(
    package: str, folder: Path, init_args: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, GradCovFreezeCallback]:
    """Fit by `YAML` with these arguments, with the LightningCLI of a package; return the CLI and its callback."""
    config = folder / "config.yaml"
    config.write_text(YAML.replace("{init_args}", init_args))
    if package == "pytorch_lightning":
        module, data = standalone_cases()
        cli_class = importlib.import_module("pytorch_lightning.cli").LightningCLI
    else:
        module, data, cli_class = CliModule, CliData, LightningCLI
    monkeypatch.setattr(sys, "argv", ["prog"])
    cli = cli_class(
        module, data, args=["fit", "--config", str(config)], save_config_callback=None, seed_everything_default=0
    )
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, GradCovFreezeCallback)]
    return cli, callback


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

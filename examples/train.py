"""Train one of the paper's models with the callback; everything is in the YAML file, and any of it can be overridden.

python -m examples.train fit --config examples/configs/boston.yaml --trainer.max_epochs 50
python -m examples.train test --config examples/configs/boston.yaml --ckpt_path CHECKPOINT
"""

import warnings

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI


def main() -> LightningCLI:
    """Do what the command line says; return the CLI with its trainer, model and data."""
    ignore_known_warnings()
    return LightningCLI(pl.LightningModule, pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True)


def ignore_known_warnings() -> None:
    """Silence two warnings that nobody here can act on."""
    # All data are in memory: worker processes would only add the cost of copying batches between processes.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning's use of torch's pytrees.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")


if __name__ == "__main__":
    main()

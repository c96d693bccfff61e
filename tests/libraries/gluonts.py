"""GluonTS: an estimator that makes its own Trainer."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from gluonts.dataset.common import ListDataset
from gluonts.torch.model.simple_feedforward import SimpleFeedForwardEstimator

from tests.libraries.watch import STEPS


def fit(folder: Path, callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """A perceptron on windows that the library draws at random."""
    torch.manual_seed(0)
    np.random.seed(0)
    rng, days = np.random.default_rng(0), np.arange(60)
    series = [{"start": "2026-01-01", "target": np.sin(days / (2 + i)) + rng.standard_normal(60)} for i in range(4)]
    estimator = SimpleFeedForwardEstimator(
        prediction_length=3, context_length=6, hidden_dimensions=[8, 8], batch_size=4, num_batches_per_epoch=STEPS // 2,
        trainer_kwargs={
            "max_epochs": 2, "callbacks": callbacks, "accelerator": "cpu", "default_root_dir": folder, "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False,
        },
    )  # fmt: skip
    estimator.train(ListDataset(series, freq="D"))
    return callbacks

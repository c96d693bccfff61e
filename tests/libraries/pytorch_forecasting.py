"""PyTorch Forecasting: series of varying length, with the function of docs/libraries.md."""

import re
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

from tests.libraries.watch import QUIET, STEPS

PAGE = Path(__file__).parent.parent.parent / "docs" / "libraries.md"


def fit(folder: Path, callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """A small TFT on windows of 4 to 8 days."""
    torch.manual_seed(0)
    rng, days = np.random.default_rng(0), np.arange(30)
    frame = pd.concat(
        pd.DataFrame({"series": f"{i}", "day": days, "y": np.sin(days / (2 + i)) + 0.1 * rng.standard_normal(30)})
        for i in range(4)
    )
    dataset = TimeSeriesDataSet(
        frame.reset_index(drop=True), time_idx="day", target="y", group_ids=["series"], min_encoder_length=4,
        max_encoder_length=8, min_prediction_length=1, max_prediction_length=3, time_varying_unknown_reals=["y"],
        time_varying_known_reals=["day"], static_categoricals=["series"], randomize_length=None,
    )  # fmt: skip
    model = TemporalFusionTransformer.from_dataset(
        dataset, learning_rate=0.01, hidden_size=8, attention_head_size=1, hidden_continuous_size=4, dropout=0.1,
        log_interval=-1,
    )  # fmt: skip
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(block, {"model": model})
    trainer = pl.Trainer(accelerator="cpu", max_steps=STEPS, callbacks=callbacks, default_root_dir=folder, **QUIET)
    trainer.fit(model, dataset.to_dataloader(train=True, batch_size=8, num_workers=0))
    return callbacks

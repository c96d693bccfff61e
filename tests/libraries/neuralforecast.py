"""NeuralForecast: a sample is a series."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

from tests.libraries.watch import QUIET, STEPS


def frame(series: int) -> pd.DataFrame:
    """Noisy sines of 40 days."""
    rng, days = np.random.default_rng(0), np.arange(40)
    values = np.concatenate([np.sin(days / (2 + i)) + 0.1 * rng.standard_normal(40) for i in range(series)])
    return pd.DataFrame(
        {
            "unique_id": np.repeat([f"series {i}" for i in range(series)], 40),
            "ds": np.tile(pd.date_range("2026-01-01", periods=40), series),
            "y": values,
        }
    )


def fit(folder: Path, callbacks: list[pl.Callback], series: int = 6) -> list[pl.Callback]:
    """The library copies the callbacks; return the copies."""
    model = NHITS(
        h=4, input_size=8, max_steps=STEPS, batch_size=4, mlp_units=3 * [[8, 8]], random_seed=1, callbacks=callbacks,
        accelerator="cpu", devices=1, default_root_dir=folder, **QUIET,
    )  # fmt: skip
    forecast = NeuralForecast([model], freq="D")
    forecast.fit(frame(series))
    return forecast.models[0].trainer_kwargs["callbacks"]

"""PyTorch Tabular: a classifier of rows of a table."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

from tests.libraries.watch import STEPS


def fit(folder: Path, callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """Two classes, a category and two numbers."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"a": rng.standard_normal(64), "b": rng.standard_normal(64), "c": rng.choice([*"xyz"], 64)})
    table["class"] = (table["a"] + (table["c"] == "x") > 0).astype(int)
    model = TabularModel(
        data_config=DataConfig(target=["class"], continuous_cols=["a", "b"], categorical_cols=["c"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="8-8"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=8, max_epochs=STEPS // 8, accelerator="cpu", early_stopping=None, checkpoints=None,
            load_best=False, progress_bar="none", trainer_kwargs={"default_root_dir": folder},
        ),
        verbose=False, suppress_lightning_logger=True,
    )  # fmt: skip
    model.fit(train=table, validation=table, callbacks=callbacks, seed=0)
    return callbacks

"""scvi-tools: counts of genes in cells."""

from pathlib import Path

import anndata
import lightning.pytorch as pl
import numpy as np
import scvi

from tests.libraries.watch import STEPS


def fit(folder: Path, callbacks: list[pl.Callback]) -> list[pl.Callback]:
    """A variational autoencoder; its training plan is the module."""
    scvi.settings.seed = 0
    counts = np.random.default_rng(0).poisson(2.0, (64, 20)).astype(np.float32)
    cells = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(cells)
    model = scvi.model.SCVI(cells, n_hidden=16, n_latent=4)
    model.train(
        max_epochs=STEPS // 4, accelerator="cpu", devices=1, batch_size=16, train_size=1.0, callbacks=callbacks,
        default_root_dir=folder, logger=False, enable_progress_bar=False,
    )  # fmt: skip
    return callbacks

"""Chemprop: message passing on molecules."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from chemprop import data, featurizers, models, nn

from tests.libraries.watch import QUIET, STEPS

SMILES = ["C", "CC", "CCO", "CCN", "c1ccccc1", "CC(=O)O", "C1CCCCC1", "CCCl", "CCOC", "c1ccncc1", "CC#N", "CCBr"]


def fit(folder: Path, callbacks: list[pl.Callback], missing: int = 0) -> list[pl.Callback]:
    """Of the molecules, in their order, the first `missing` have no target."""
    torch.manual_seed(0)
    y = np.random.default_rng(0).standard_normal(len(SMILES))
    y[:missing] = np.nan
    points = [data.MoleculeDatapoint.from_smi(smiles, [target]) for smiles, target in zip(SMILES, y, strict=True)]
    dataset = data.MoleculeDataset(points, featurizers.SimpleMoleculeMolGraphFeaturizer())
    loader = data.build_dataloader(dataset, batch_size=4, num_workers=0, shuffle=False)
    module = models.MPNN(
        nn.BondMessagePassing(d_h=16, depth=2), nn.MeanAggregation(), nn.RegressionFFN(input_dim=16, hidden_dim=8)
    )
    trainer = pl.Trainer(accelerator="cpu", max_steps=STEPS, callbacks=callbacks, default_root_dir=folder, **QUIET)
    trainer.fit(module, loader)
    return callbacks

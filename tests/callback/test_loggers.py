"""What loggers get of a large model."""

from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases


class Encoder(nn.Module):
    """Twelve layers of twelve tensors, between two linear layers: 147 tensors with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.embedding = nn.Linear(1, 4, bias=False)
        layer = nn.TransformerEncoderLayer(4, 1, dim_feedforward=4, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.encoder(self.embedding(x[..., None]))).mean(1)


class Logs(cases.Regression):
    """Logs what modules log."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss


def test_encoder_of_twelve_layers_writes_fewer_than_forty_tags(tmp_path):
    """With the variance's histograms; a scalar for each layer, its mean over elements."""
    callback = GradCovFreezeCallback(t0=2, k=0.5)
    logger = TensorBoardLogger(tmp_path)
    trainer = cases.trainer(callbacks=[callback], logger=logger, max_steps=4, max_epochs=-1, log_every_n_steps=2)
    module = Logs(Encoder())
    trainer.fit(module, cases.loader())
    assert len(callback.frozen) == 147
    kinds = EventAccumulator(trainer.log_dir).Reload().Tags()
    scalars, drawn = kinds["scalars"], kinds["histograms"] + kinds["images"]
    assert len(scalars) + len(drawn) + len(kinds["tensors"]) < 40
    assert len([tag for tag in drawn if tag.startswith("gcfreeze/log10_variance/")]) > 1
    events = EventAccumulator(trainer.log_dir).Reload()
    for i in range(12):
        layer = f"network.encoder.layers.{i}"
        mask = torch.cat([m.flatten() for name, m in callback.frozen.items() if name.startswith(f"{layer}.")])
        assert events.Scalars(f"gcfreeze/frozen_fraction/{layer}")[-1].value == pytest.approx(
            float(mask.float().mean())
        )
    first = sorted([tag for tag in scalars + drawn if tag.startswith("gcfreeze/")])[:9]  # TensorBoard's order
    assert first[0] == "gcfreeze/frozen"
    assert len(set(first) & set(scalars)) <= 5
    assert "gcfreeze/frozen_fraction" in first


def test_loggers_change_nothing_in_training(tmp_path):
    """Weights and state are those of a run without a logger."""

    def run(**kwargs: Any) -> Any:
        module, callback = cases.Regression(cases.mlp()), GradCovFreezeCallback(t0=6, k=0.5)
        cases.trainer(callbacks=[callback], **kwargs).fit(module, cases.loader())
        return dict(module.state_dict()), callback.state_dict()

    logged = run(logger=[TensorBoardLogger(tmp_path), CSVLogger(tmp_path)], log_every_n_steps=1)
    cases.assert_identical(logged, run())

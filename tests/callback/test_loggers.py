"""What loggers get of a large model, and the callback's arguments as hyperparameters."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor, nn

from lightning_gcfreeze import FreezeSchedule, GradCovFreezeCallback, Growth, Settled, masks
from lightning_gcfreeze.options import Options
from tests import cases
from tests.callback.hyperparameters import OURS


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


class MLFlowLogger(CSVLogger):
    """Remembers all tags; by its name it is MLflow's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tags: set[str] = set()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.tags |= metrics.keys()


def test_no_scalar_in_mlflow_is_a_folder_of_another(tmp_path):
    """Its file store, the default of MLFlowLogger, makes tags files. Other loggers get the usual tags."""
    logger, plain = MLFlowLogger(tmp_path), CSVLogger(tmp_path / "plain")
    callback = GradCovFreezeCallback(t0=Settled(max_t0=6, first=2), k=Growth(first=0.5), lr_after_freeze=0.5)
    cases.trainer(callbacks=[callback], logger=[logger, plain], log_every_n_steps=2).fit(
        Logs(cases.mlp()), cases.loader()
    )
    assert {"gcfreeze/frozen_fraction", "gcfreeze/frozen_fraction_of/network.0.weight"} < logger.tags
    folders = {str(folder) for tag in logger.tags for folder in Path(tag).parents}
    assert not folders & logger.tags
    columns = (Path(plain.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    usual = {tag.replace("_of/", "/") for tag in logger.tags if "_of/" in tag}
    assert len(usual) == 4
    assert usual < set(columns)


# Hyperparameters -----------------------------------------------------------------------------------------------------


class WithOwn(cases.Regression):
    """Has hyperparameters of its own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(cases.mlp())
        self.save_hyperparameters()


class Data(pl.LightningDataModule):
    """Has one, too."""

    def __init__(self, batch: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return cases.loader(self.hparams.batch)


def shown_by_tensorboard(folder: Any) -> dict[str, Any]:
    """What its HPARAMS page reads: the first summary of a run."""
    content = (
        EventAccumulator(str(folder)).Reload().summary_metadata["_hparams_/session_start_info"].plugin_data.content
    )
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in hparams.items()}


@pytest.mark.parametrize(
    ("module", "data", "own"),
    [
        (lambda: cases.Regression(cases.mlp()), cases.loader, {}),
        (WithOwn, cases.loader, {"width": 3}),
        (lambda: cases.Regression(cases.mlp()), Data, {"batch": 8}),
        (WithOwn, Data, {"width": 3, "batch": 8}),
    ],
    ids=["nobody", "module", "data", "both"],
)
def test_arguments_are_hyperparameters_next_to_those_of_module_and_data(module, data, own, tmp_path):
    """In TensorBoard's table and both files; the placeholder metric is written once; the module has its own alone."""
    board, table = TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")
    trainer = cases.trainer(
        callbacks=[GradCovFreezeCallback(t0=6, k=0.5)], logger=[board, table], max_epochs=1, log_every_n_steps=8
    )
    trained = module()
    before, initial = dict(trained.hparams), dict(trained.hparams_initial)
    trainer.fit(trained, data())
    assert shown_by_tensorboard(board.log_dir) == OURS | own
    for logger in (board, table):
        assert yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text()) == OURS | own
    assert len(EventAccumulator(board.log_dir).Reload().Scalars("hp_metric")) == 1
    assert (dict(trained.hparams), dict(trained.hparams_initial)) == (before, initial)


class Fails(WithOwn):
    def on_fit_start(self) -> None:
        raise KeyboardInterrupt


def test_hyperparameters_of_a_module_are_its_own_after_a_fit_that_failed(tmp_path):
    """Before training began."""
    trained = Fails()
    with pytest.raises(SystemExit):
        cases.trainer(
            callbacks=[GradCovFreezeCallback(t0=6, k=0.5)], logger=CSVLogger(tmp_path), log_every_n_steps=8
        ).fit(trained, cases.loader())
    assert dict(trained.hparams_initial) == {"width": 3}


class Custom(Logger):
    """A logger with the least that Lightning asks for."""

    name, version = "custom", 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None:
        self.calls.append(dict(params))


@pytest.mark.parametrize("module", [WithOwn, lambda: cases.Regression(cases.mlp())], ids=["own", "none"])
def test_logger_of_ones_own_gets_arguments_in_one_call(module):
    """Whose signature is the least that Lightning calls."""
    logger = Custom()
    trained = module()
    trainer = cases.trainer(
        callbacks=[GradCovFreezeCallback(t0=6, k=0.5)], logger=logger, max_epochs=1, log_every_n_steps=8
    )
    trainer.fit(trained, cases.loader())
    assert logger.calls == [OURS | dict(trained.hparams)]


def test_trainer_that_logs_no_hyperparameters_logs_no_arguments():
    logger = Custom()
    trainer = cases.trainer(
        callbacks=[GradCovFreezeCallback(t0=6, k=0.5)],
        logger=logger,
        max_epochs=1,
        log_every_n_steps=8,
        enable_autolog_hparams=False,
    )
    trainer.fit(WithOwn(), cases.loader())
    assert logger.calls == []


def some_order(evidence: Any) -> dict[str, Tensor]:
    """An order by a function."""
    return dict(evidence.weights)


@pytest.mark.parametrize(
    ("arguments", "differing"),
    [
        ({"t0": "auto", "k": Growth(first=0.5)}, {"t0": "auto", "k": repr(Growth(first=0.5))}),
        ({"t0": Settled(max_t0=9), "k": 3}, {"t0": repr(Settled(max_t0=9)), "k": 3}),
        (
            {"schedule": [(3, 0.1), (9, 0.3)]},
            {"t0": None, "k": None, "schedule": repr(FreezeSchedule([(3, 0.1), (9, 0.3)]))},
        ),
        (
            {"order": some_order, "seed": 0, "exclude": ["*.bias"]},
            {"order": f"{__name__}.some_order", "seed": 0, "exclude": "('*.bias',)"},
        ),
        (
            {"t0": None, "k": None, "masks": masks.pattern("*.bias"), "lr_after_freeze": 0.5},
            {"masks": "given", "lr_after_freeze": 0.5}
            | dict.fromkeys(("t0", "k", "order", "granularity", "every", "samples")),
        ),
    ],
    ids=["growth", "settled", "schedule", "order", "masks"],
)
def test_hyperparameters_are_numbers_and_text(arguments, differing):
    """Those that were given, and those that say most; with masks nothing is ordered."""
    given = {"t0": 6, "k": 0.5} | arguments if "schedule" not in arguments else arguments
    found = Options(**given).hyperparameters()
    expected = OURS | {f"gcfreeze/{name}": value for name, value in differing.items()}
    assert found == {name: value for name, value in expected.items() if value is not None}
    assert {type(value) for value in found.values()} <= {int, float, str}

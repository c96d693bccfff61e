"""What MLflow and W&B keep of a run: arguments as parameters, and scalars. Nothing is sent over a network.

Run with `uv run --isolated --no-default-groups --group libraries pytest tests/libraries`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from torch import Tensor

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases
from tests.callback.hyperparameters import OURS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Module(cases.Regression):
    """Has a hyperparameter of its own, and logs its loss."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(cases.mlp())
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def fit(logger: Logger, k: float = 0.5, epochs: int = 2, ckpt_path: str | None = None) -> pl.Trainer:
    """Two epochs of eight steps; the freeze is after the sixth."""
    callback = GradCovFreezeCallback(t0=6, k=k)
    trainer = cases.trainer(callbacks=[callback], logger=logger, log_every_n_steps=4, max_epochs=epochs)
    trainer.fit(Module(), cases.loader(), ckpt_path=ckpt_path)
    return trainer


def fractions(trainer: pl.Trainer, of: str = "gcfreeze/frozen_fraction") -> dict[str, float]:
    """The last frozen fractions, by tag; `of` is what the tags of parameters begin with."""
    (callback,) = (c for c in trainer.callbacks if isinstance(c, GradCovFreezeCallback))
    masks = {f"{of}/{name}": float(m.float().mean()) for name, m in callback.frozen.items()}
    return masks | {"gcfreeze/frozen_fraction": callback.frozen_fraction}


# MLflow ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite:///{}/runs.db", "file:{}/runs"], ids=["database", "files"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return where runs are kept. `MLFlowLogger()` keeps files; MLflow 3 wants to be asked twice for them."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    pytest.importorskip("mlflow", exc_type=ModuleNotFoundError)
    return request.param.format(tmp_path)


def kept(logger: MLFlowLogger) -> tuple[dict[str, str], dict[str, list[int]]]:
    """The parameters of a run, and the steps of its metrics."""
    found = logger.experiment.get_run(logger.run_id).data
    histories = {tag: logger.experiment.get_metric_history(logger.run_id, tag) for tag in found.metrics}
    return found.params, {tag: [point.step for point in history] for tag, history in histories.items()}


def test_mlflow_keeps_arguments_as_parameters_and_scalars_as_metrics(uri, tmp_path):
    """A run that is resumed under its id goes on."""
    logger = MLFlowLogger(tracking_uri=uri)
    trainer = fit(logger)
    parameters, steps = kept(logger)
    assert parameters == {name: str(value) for name, value in ({"width": 3} | OURS).items()}
    last = logger.experiment.get_run(logger.run_id).data.metrics
    expected = fractions(trainer, of="gcfreeze/frozen_fraction_of")
    assert {tag: last[tag] for tag in expected} == pytest.approx(expected)
    assert steps["gcfreeze/frozen_fraction"] == [3, 5, 7, 11, 15]
    assert steps["loss"] == [3, 7, 11, 15]
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    again = MLFlowLogger(tracking_uri=uri, run_id=logger.run_id)
    fit(again, epochs=3, ckpt_path=str(tmp_path / "some.ckpt"))
    assert kept(again)[0] == parameters
    assert kept(again)[1]["gcfreeze/frozen_fraction"] == [3, 5, 7, 11, 15, 19, 23]


def test_mlflow_run_takes_a_second_fit_with_the_same_arguments_only(uri):
    """MLflow lets nobody change a parameter."""
    from mlflow.exceptions import MlflowException

    logger = MLFlowLogger(tracking_uri=uri)
    fit(logger)
    fit(logger)
    assert kept(logger)[1]["gcfreeze/frozen_fraction"] == 2 * [3, 5, 7, 11, 15]
    with pytest.raises(MlflowException, match="gcfreeze/k"):
        fit(logger, k=0.25)
    fit(MLFlowLogger(tracking_uri=uri), k=0.25)


# W&B ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Return the package, offline."""
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    package = pytest.importorskip("wandb", exc_type=ModuleNotFoundError)
    yield package
    package.finish()


def test_wandb_keeps_arguments_in_its_config_and_scalars(wandb, tmp_path):
    """So it does in a second fit with other arguments, and in one that is resumed."""
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    trainer = fit(logger)
    assert dict(logger.experiment.config) == {"width": 3} | OURS
    summary = dict(logger.experiment.summary)
    assert {tag: summary[tag] for tag in fractions(trainer)} == pytest.approx(fractions(trainer))
    assert summary["trainer/global_step"] == 15
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    fit(logger, k=0.25)
    assert dict(logger.experiment.config) == {"width": 3} | OURS | {"gcfreeze/k": 0.25}
    fit(logger, epochs=3, ckpt_path=str(tmp_path / "some.ckpt"))
    assert dict(logger.experiment.config) == {"width": 3} | OURS
    assert dict(logger.experiment.summary)["trainer/global_step"] == 23


def test_wandb_watching_a_module_changes_nothing(wandb, tmp_path):
    """Its histograms of weights and gradients come from hooks."""
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    callback, module = GradCovFreezeCallback(t0=6, k=0.5), Module()
    logger.watch(module, log="all", log_freq=1)
    cases.trainer(callbacks=[callback], logger=logger, log_every_n_steps=4).fit(module, cases.loader())
    assert any(tag.startswith("gradients/") for tag in dict(logger.experiment.summary))
    expected, plain = GradCovFreezeCallback(t0=6, k=0.5), Module()
    cases.trainer(callbacks=[expected]).fit(plain, cases.loader())
    cases.assert_identical(dict(module.state_dict()), dict(plain.state_dict()))
    cases.assert_identical(callback.frozen, expected.frozen)

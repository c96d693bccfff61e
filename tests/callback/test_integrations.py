"""The callback with loggers, LightningCLI and `pytorch_lightning`."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_gcfreeze import Evidence, FreezeSchedule, GradCovFreezeCallback, Growth, Settled
from tests import cases
from tests.callback import command_line


def test_tensorboard_gets_scalars_histograms_and_images(tmp_path):
    """Scalars at each n-th step and at the freeze; histograms of log10 variance and images of masks, once."""
    callback = GradCovFreezeCallback(t0=6, k=0.5)
    trainer = cases.trainer(callbacks=[callback], logger=TensorBoardLogger(tmp_path), log_every_n_steps=4)
    trainer.fit(cases.Regression(cases.mlp()), cases.loader())
    events = EventAccumulator(trainer.log_dir, size_guidance={"histograms": 0, "images": 0}).Reload()
    fraction = [(e.step, round(e.value, 4)) for e in events.Scalars("gcfreeze/frozen_fraction")]
    assert fraction == [(3, 0.0), (5, 0.4912), (7, 0.4912), (11, 0.4912), (15, 0.4912)]
    assert [e.value for e in events.Scalars("gcfreeze/observed_steps")] == [4, 6, 6, 6, 6]
    for name, mask in callback.frozen.items():
        of_parameter = events.Scalars(f"gcfreeze/frozen_fraction/{name}")
        assert of_parameter[-1].value == pytest.approx(float(mask.float().mean()))
        (histogram,) = events.Histograms(f"gcfreeze/log10_variance/{name}")
        logs = callback.variance[name].log10()
        assert (histogram.histogram_value.min, histogram.histogram_value.max) == pytest.approx(
            (float(logs.min()), float(logs.max()))
        )
    tags = events.Tags()
    assert sorted(tags["histograms"]) == sorted(f"gcfreeze/log10_variance/{name}" for name in callback.frozen)
    assert sorted(tags["images"]) == ["gcfreeze/frozen", *(f"gcfreeze/frozen/network.{i}.weight" for i in (0, 2))]
    (image,) = events.Images("gcfreeze/frozen/network.0.weight")
    red = np.asarray(PIL.Image.open(io.BytesIO(image.encoded_image_string)))[:, :, 0]
    assert image.step == 5
    assert (red == np.where(callback.frozen["network.0.weight"], 8, 247)).all()
    assert [e.step for e in events.Images("gcfreeze/frozen")] == [5, 7, 11, 15]
    image = events.Images("gcfreeze/frozen")[-1]
    red = np.asarray(PIL.Image.open(io.BytesIO(image.encoded_image_string)))[:, :, 0].astype(float)
    red = red[:-14, -256:]  # without labels
    height, width = red.shape
    for row, name in enumerate(callback.frozen):  # 0.weight, 0.bias, 2.weight, 2.bias
        fraction = (247 - red[round((row + 0.5) * height / 4)]) / (247 - 8)
        mean = float(callback.frozen[name].float().mean())
        np.testing.assert_allclose(fraction[[0, 4 * width // 15]], 0.0)
        np.testing.assert_allclose(fraction[[6 * width // 15, -1]], mean, atol=0.003)


def test_tensorboard_gets_no_variance_histograms_if_the_order_reads_no_variance(tmp_path):
    """It gets images."""
    trainer = cases.trainer(
        callbacks=[GradCovFreezeCallback(t0=6, k=0.5, order="progress")],
        logger=TensorBoardLogger(tmp_path),
        log_every_n_steps=4,
    )
    trainer.fit(cases.Regression(cases.mlp()), cases.loader())
    tags = EventAccumulator(trainer.log_dir).Reload().Tags()
    assert tags["histograms"] == []
    assert "gcfreeze/frozen" in tags["images"]


def test_csv_logger_gets_scalars_on_the_step_axis_of_the_module(tmp_path):
    """As often as `log_every_n_steps` says."""

    class Logs(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    callback = GradCovFreezeCallback(t0=6, k=0.5, log_every_n_steps=2)
    trainer = cases.trainer(callbacks=[callback], logger=CSVLogger(tmp_path), log_every_n_steps=1, max_epochs=1)
    trainer.fit(Logs(cases.mlp()), cases.loader())
    assert trainer.log_dir is not None
    header, *rows = (line.split(",") for line in (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines())
    column = {name: i for i, name in enumerate(header)}
    steps = {
        tag: [int(row[column["step"]]) for row in rows if row[column[tag]]]
        for tag in ("loss", "gcfreeze/frozen_fraction")
    }
    assert steps == {"loss": [*range(8)], "gcfreeze/frozen_fraction": [1, 3, 5, 7]}


def lowest_weights(evidence: Evidence) -> dict[str, Tensor]:
    """An order that a YAML file can name."""
    return {name: w.clone() for name, w in evidence.weights.items()}


@pytest.mark.parametrize(
    ("init_args", "frozen", "attributes"),
    [
        ("{t0: 5, k: 20}", 20, {"order": "variance", "gain": "1/t"}),
        ("{t0: 5, k: 0.5, order: magnitude, gain: 0.2, exclude: ['*.bias'], seed: 3}", 24, {"gain": 0.2}),
        ("{t0: 5, k: 1, order: tests.callback.test_integrations.lowest_weights}", 1, {"order": lowest_weights}),
        ("{t0: 0.25, k: 20, log_parameters: 3}", 20, {"t0": 0.25, "log_parameters": 3}),
        ("{t0: auto, k: 20}", 20, {"t0": "auto"}),
        (
            "{t0: {class_path: lightning_gcfreeze.Settled, init_args: {max_t0: 4}}, k: 7}",
            7,
            {"t0": Settled(max_t0=4)},
        ),
        ("{t0: 5, k: auto}", 0, {"k": "auto"}),  # the loss has not come down yet
        (
            "{t0: 5, k: {class_path: lightning_gcfreeze.Growth, init_args: {first: 0.5, most: 0.6, forecast: false}}}",
            28,
            {"k": Growth(first=0.5, most=0.6, forecast=False)},
        ),
        ("{schedule: [[3, 10], [9, 30]]}", 30, {}),
        (
            "{schedule: {class_path: lightning_gcfreeze.FreezeSchedule, init_args: {stages: [[3, 10], [9, 30]]}}}",
            30,
            {"schedule": FreezeSchedule([(3, 10), (9, 30)])},
        ),
        (
            "{schedule: {class_path: lightning_gcfreeze.FreezeSchedule,"
            " init_args: {stages: [[3, 0.9], [9, 0.3]], monotone: false}}}",
            17,
            {"schedule": FreezeSchedule([(3, 0.9), (9, 0.3)], monotone=False)},
        ),
    ],
    ids=[
        "plain",
        "options",
        "callable",
        "fraction",
        "t0 auto",
        "settled",
        "k auto",
        "growth",
        "pairs",
        "schedule",
        "thawing",
    ],
)
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.filterwarnings("ignore:.*_jit_is_scripting")
def test_lightning_cli_builds_the_callback_from_yaml(tmp_path, init_args, frozen, attributes, package, monkeypatch):
    """With counts as ints and fractions as floats, in either package."""
    _, callback = command_line.run(package, tmp_path, init_args, monkeypatch)
    assert callback.phase == "frozen"
    assert sum(int(mask.sum()) for mask in callback.frozen.values()) == frozen
    for name, value in attributes.items():
        assert getattr(callback, name) == value


@pytest.mark.parametrize("name", ["GradCovFreezeCallback", "ProbeCallback"])
def test_help_of_lightning_cli_describes_arguments_and_lists_no_tensors(capsys, monkeypatch, name):
    """Of a callable that returns tensors jsonargparse would list all classes of tensors."""
    arguments = ["fit", f"--trainer.callbacks.help=lightning_gcfreeze.{name}"]
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(SystemExit):
        LightningCLI(command_line.CliModule, command_line.CliData, args=arguments)
    text = " ".join(capsys.readouterr().out.split())
    assert "what freezes together: " in text
    assert "Callable[[Evidence], Any]" in text
    assert "torch." not in text.replace("torch's", "")


@pytest.mark.parametrize("alone", [True, False], ids=["callbacks=callback", "callbacks=[callback]"])
def test_trainer_of_pytorch_lightning_gives_the_same_bits(alone):
    """Weights, variance and masks are those of `lightning.pytorch`."""
    import pytorch_lightning

    ours = GradCovFreezeCallback(t0=6, k=0.5)
    reference = cases.Regression(cases.mlp())
    cases.trainer(callbacks=ours if alone else [ours]).fit(reference, cases.loader())
    theirs = GradCovFreezeCallback(t0=6, k=0.5)
    module = command_line.standalone_cases()[0]()
    pytorch_lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=theirs if alone else [theirs],
    ).fit(module, cases.loader())
    cases.assert_identical(dict(module.state_dict()), dict(reference.state_dict()))
    cases.assert_identical(theirs.state_dict(), ours.state_dict())
    assert theirs.phase == "frozen"

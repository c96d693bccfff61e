"""Every YAML file through LightningCLI, for a few steps, and a checkpoint tested in a second call."""

from pathlib import Path

import pytest

from examples.train import main
from lightning_gcfreeze import GradCovFreezeCallback

pytestmark = [
    # LightningCLI 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    # After two steps the dark pixels' weights, and more, are all that the callback can freeze of MNIST's network.
    pytest.mark.filterwarnings("ignore:.* never had a gradient"),
]

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
PARAMETERS = {"boston": 301, "mnist": 7960, "synthetic1": 4041, "synthetic2": 200, "synthetic3": 200}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A command of examples.train on the YAML file of a name, three steps at most, freezing after the second."""

    def run(command, name, *options):
        monkeypatch.setattr(
            "sys.argv",
            [
                "train.py",
                command,
                f"--config={CONFIGS / name}.yaml",
                f"--trainer.logger.init_args.save_dir={tmp_path}",
                "--trainer.callbacks.init_args.t0=2",
                "--trainer.max_steps=3",
                "--trainer.limit_val_batches=1",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                *options,
            ],
        )
        return main()

    return run


def test_every_data_set_has_a_config_file():
    assert {path.stem for path in CONFIGS.iterdir()} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_config_file_trains_the_papers_model_and_freezes_half_of_it(name, run, tmp_path):
    cli = run("fit", name)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, GradCovFreezeCallback))
    assert cli.trainer.global_step == 3
    assert sum(p.numel() for p in cli.model.parameters()) == PARAMETERS[name]
    assert sum(int(mask.sum()) for mask in callback.frozen.values()) == PARAMETERS[name] // 2
    assert list((tmp_path / name / "version_0").glob("events.out.tfevents.*"))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # ModelCheckpoint's: the second command has its own log
def test_checkpoint_of_a_frozen_run_is_tested_by_a_second_command(run):
    fitted = run("fit", "boston")
    checkpoint = fitted.trainer.checkpoint_callback.best_model_path
    tested = run("test", "boston", f"--ckpt_path={checkpoint}")
    expected = fitted.trainer.test(fitted.model, fitted.datamodule, verbose=False)[0]
    assert {name: float(value) for name, value in tested.trainer.callback_metrics.items()} == expected

"""Ray Train: two workers, against two processes of plain DDP. docs/cluster.md has the code.

Run with `uv run --isolated --no-default-groups --group libraries pytest tests/libraries`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gcfreeze import refusals
from tests import cases
from tests.libraries import ray_train
from tests.libraries.watch import bits
from tests.processes.launch import ROOT, launch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Return the package, with a cluster of this machine, as small as it gets."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv(
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0"
        )  # or each worker would install an environment of its own
        package = pytest.importorskip("ray", exc_type=ModuleNotFoundError)
        pytest.importorskip("ray.train.lightning", exc_type=ModuleNotFoundError)
        package.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        )  # fmt: skip
        yield package
        package.shutdown()


@pytest.fixture(scope="module")
def plain(ray: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return what two processes of plain DDP saw, by preset."""
    folder = tmp_path_factory.mktemp("plain")
    done = launch(Path(ray_train.__file__), folder, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {preset: seen_by_ranks(folder / preset) for preset in ray_train.T0}


def seen_by_ranks(folder: Path) -> list[dict[str, Any]]:
    """Return what both ranks wrote."""
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def run(folder: Path, presets: list[str], *, fails: bool) -> None:
    """Train with two workers, which get copies of the callbacks, and write what they saw, a folder for each preset."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    for preset in presets:
        (folder / preset).mkdir()
    trainer = TorchTrainer(
        ray_train.worker,
        train_loop_config={
            "callbacks": {str(folder / preset): ray_train.freeze(preset) for preset in presets},
            "fails": fails,
        },
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(
            storage_path=str(folder), name="run", failure_config=FailureConfig(max_failures=1 if fails else 0)
        ),
    )
    result = trainer.fit()
    assert result.error is None
    assert result.metrics["gcfreeze/frozen_fraction"] == pytest.approx(0.7, abs=0.01)


def assert_as_plain(seen: list[dict[str, Any]], plain: list[dict[str, Any]], t0: int, epochs: int) -> None:
    """Both workers have the bits of plain DDP in the last epochs, what is frozen stays, and others move."""
    n_steps = ray_train.STEPS_PER_EPOCH * epochs
    for ours, theirs in zip(seen, plain, strict=True):
        assert (ours["strategy"], ours["world_size"]) == ("RayDDPStrategy", 2)
        assert (theirs["strategy"], theirs["world_size"]) == ("DDPStrategy", 2)
        assert len(theirs["of_steps"]) == ray_train.STEPS_PER_EPOCH * ray_train.EPOCHS
        assert len(ours["of_steps"]) == n_steps
        cases.assert_identical(ours["of_steps"], theirs["of_steps"][-n_steps:])
        assert ours["sent"] == theirs["sent"][-n_steps:]
        live = sum(int((~mask).sum()) for mask in ours["frozen"].values())
        assert ours["sent"][-1] == 4 * live
        for name in ("frozen", "variance"):
            cases.assert_identical(ours[name], theirs[name])
        for name in ("of_steps", "frozen", "variance"):
            cases.assert_identical(ours[name], seen[0][name])
        at_t0, last = theirs["of_steps"][t0 - 1], ours["of_steps"][-1]
        for name, mask in ours["frozen"].items():
            assert torch.equal(bits(last[name])[mask], bits(at_t0[name])[mask])
        assert any((last[name] != at_t0[name]).any() for name in ours["frozen"])


def test_two_workers_train_what_two_processes_of_plain_ddp_do(plain, tmp_path):
    """With either preset."""
    run(tmp_path, [*ray_train.T0], fails=False)
    for preset, t0 in ray_train.T0.items():
        seen = seen_by_ranks(tmp_path / preset)
        assert bool(seen[0]["variance"]) == (preset == "paper")
        assert_as_plain(seen, plain[preset], t0, ray_train.EPOCHS)


@pytest.mark.parametrize("preset", [*ray_train.T0])
def test_workers_that_ray_starts_again_go_on_from_its_last_checkpoint(plain, tmp_path, preset):
    """One fails in the second epoch, before or after the freeze; both go on from the end of the first one."""
    run(tmp_path, [preset], fails=True)
    assert_as_plain(seen_by_ranks(tmp_path / preset), plain[preset], ray_train.T0[preset], ray_train.EPOCHS - 1)


def test_strategies_that_shard_are_refused_and_ddp_is_not(ray):
    """Ray's classes inherit from Lightning's, DeepSpeed's from DDP's as well."""
    from ray.train import lightning

    for name, supported in [("RayDDPStrategy", True), ("RayFSDPStrategy", False), ("RayDeepSpeedStrategy", False)]:
        reason = refusals.unsupported_strategy(object.__new__(getattr(lightning, name)))
        assert (reason is None) == supported
        assert supported or reason.startswith(f"{name} is not supported")

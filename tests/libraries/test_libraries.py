"""The callback in the Trainers of other libraries: docs/libraries.md.

Run with `uv run --isolated --no-default-groups --group libraries pytest tests/libraries`.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_gcfreeze import GradCovFreezeCallback
from tests.libraries.watch import STEPS, Watch, bits

# The libraries' own, and those of the callback on tiny data.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

T0, K = 8, 0.8
LIBRARIES = [
    "neuralforecast", "chemprop", "pytorch_forecasting", "gluonts", "scvi", "pytorch_tabular", "torch_geometric",
]  # fmt: skip


@pytest.fixture(params=LIBRARIES)
def fit(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function of callbacks that makes and trains a model, always the same, and returns those that it used."""
    return fit_of(request.param, tmp_path, monkeypatch)


def fit_of(library: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Skip where a library is missing."""
    pytest.importorskip(library, exc_type=ModuleNotFoundError)
    monkeypatch.chdir(folder)  # some write what they were not asked for
    module = import_module(f"tests.libraries.{library}")

    def fit(*callbacks: pl.Callback, **arguments: Any) -> tuple[Any, ...]:
        return tuple(module.fit(folder, [*callbacks], **arguments)[: len(callbacks)])  # some libraries add their own

    return fit


@pytest.mark.parametrize("order", ["variance", "movement"])
def test_frozen_elements_stay_and_others_move(fit, order):
    """From step t0 to the last."""
    callback, watch = fit(GradCovFreezeCallback(t0=T0, k=K, order=order), Watch())
    assert callback.phase == "frozen"
    assert callback.frozen_fraction == pytest.approx(K, abs=0.01)
    assert len(watch.of_steps) == STEPS
    at_t0, *later = watch.of_steps[T0 - 1 :]
    for name, mask in callback.frozen.items():
        for weights in later:
            assert torch.equal(bits(weights[name])[mask], bits(at_t0[name])[mask]), name
    assert any((bits(later[-1][name]) != bits(at_t0[name])).any() for name in callback.frozen)
    (free,) = fit(Watch())  # without the callback what froze would have moved
    assert any((free.of_steps[-1][name] != at_t0[name])[mask].any() for name, mask in callback.frozen.items())


@pytest.mark.parametrize("order", ["variance", "movement"])
def test_observing_changes_no_bit(fit, order):
    """Against the run without the callback, at every step."""
    callback, watch = fit(GradCovFreezeCallback(t0=10 * STEPS, k=K, order=order), Watch())
    assert callback.phase == "observing"
    assert bool(callback.variance) == (order == "variance")
    (expected,) = fit(Watch())
    assert len(watch.of_steps) == len(expected.of_steps) == STEPS
    for ours, theirs in zip(watch.of_steps, expected.of_steps, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(bits(ours[name]), bits(theirs[name])) for name in theirs)
    first, *_, last = expected.of_steps
    assert any((first[name] != last[name]).any() for name in first)


# What docs/libraries.md says of single libraries --------------------------------------------------------------------


def test_neuralforecast_single_series_needs_an_order_that_reads_no_variance(tmp_path, monkeypatch):
    """A sample is a series, and one series is a batch of one."""
    fit = fit_of("neuralforecast", tmp_path, monkeypatch)
    with pytest.raises(MisconfigurationException, match="a batch of one"):
        fit(GradCovFreezeCallback(t0=T0, k=K), series=1)
    (callback,) = fit(GradCovFreezeCallback(t0=T0, k=K, order="progress"), series=1)
    assert callback.phase == "frozen"


def test_chemprop_molecule_without_target_leaves_its_step_out(tmp_path, monkeypatch):
    """The first molecule, which is the first sample of every third batch: in steps 1, 4 and 7."""
    fit = fit_of("chemprop", tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match=f"in the {T0 - 3} observed steps"):
        (callback,) = fit(GradCovFreezeCallback(t0=T0, k=K), missing=1)
    assert all(v.isfinite().all() for v in callback.variance.values())


def test_pytorch_tabular_classifier_replays_two_copies(tmp_path, monkeypatch):
    """It cannot take a batch of one."""
    fit = fit_of("pytorch_tabular", tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="two copies of the sample"):
        fit(GradCovFreezeCallback(t0=T0, k=K))

"""Tags and values for loggers, compared with NumPy."""

import math
from typing import Any

import numpy as np
import torch

from lightning_gcfreeze import reporting

FROZEN = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor(False)}
VARIANCE = {"a": torch.tensor([[0.0, 100.0], [0.01, 1.0]]), "b": torch.tensor(10.0)}


def test_scalars_of_a_step_without_a_decision():
    """The fraction in all and of every parameter as they are given, and the steps, as plain floats."""
    tags = reporting.scalars({"a": 0.75, "b": 0.0}, fraction=0.6, observed=7)
    assert tags == {
        "gcfreeze/frozen_fraction": 0.6,
        "gcfreeze/observed_steps": 7.0,
        "gcfreeze/frozen_fraction/a": 0.75,
        "gcfreeze/frozen_fraction/b": 0.0,
    }
    assert {type(value) for value in tags.values()} == {float}


def test_scalars_after_a_decision_have_savings_traffic_and_finite_findings():
    """A value that is not finite is left out: loggers cannot draw it."""
    planning = {"gcfreeze/t0": 5.0, "gcfreeze/settling/overlap": math.nan}
    tags = reporting.scalars({}, 0.5, 3, {"gcfreeze/gradient_bytes": 8.0}, 12, planning, lr_factor=0.25)
    assert tags == {
        "gcfreeze/frozen_fraction": 0.5,
        "gcfreeze/observed_steps": 3.0,
        "gcfreeze/gradient_bytes": 8.0,
        "gcfreeze/gradient_bytes_sent": 12.0,
        "gcfreeze/t0": 5.0,
        "gcfreeze/lr_factor": 0.25,
    }


class Logger:
    """A logger that keeps what it is given."""

    def __init__(self, experiment: Any = None) -> None:
        self.experiment, self.metrics = experiment, []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((step, metrics))


class Experiment:
    """Takes histograms, as TensorBoard's writer does."""

    def __init__(self) -> None:
        self.histograms: list[tuple[str, Any, int]] = []

    def add_histogram(self, tag: str, values: Any, step: int) -> None:
        self.histograms.append((tag, values, step))


def test_log_gives_histograms_to_loggers_that_have_them_and_numbers_to_all():
    plain, tensorboard = Logger(), Logger(Experiment())
    reporting.log([plain, tensorboard], 4, {"x": 1.0})
    assert tensorboard.experiment.histograms == []
    reporting.log([plain, tensorboard], 5, {"x": 2.0}, [("h", FROZEN["a"])])
    assert plain.metrics == tensorboard.metrics == [(4, {"x": 1.0}), (5, {"x": 2.0})]
    assert tensorboard.experiment.histograms == [("h", FROZEN["a"], 5)]


def test_histograms_are_of_masks_and_of_log10_of_variances():
    """Masks as 0 and 1; log10 of the variances that have one, for each parameter."""
    values = dict(reporting.histograms(FROZEN, VARIANCE))
    assert set(values) == {f"gcfreeze/{kind}/{name}" for kind in ("frozen", "log10_variance") for name in "ab"}
    assert values["gcfreeze/frozen/a"].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert values["gcfreeze/frozen/b"].tolist() == 0.0
    for name in "ab":
        array = VARIANCE[name].numpy().flatten()
        np.testing.assert_allclose(
            values[f"gcfreeze/log10_variance/{name}"].numpy().flatten(), np.log10(array[array > 0]), rtol=1e-6
        )


def test_parameter_without_variance_has_no_histogram_of_variance():
    """log10 of 0 is no number, and an empty histogram is an error for TensorBoard."""
    values = dict(reporting.histograms({"a": FROZEN["a"]}, {"a": torch.zeros(2, 2)}))
    assert set(values) == {"gcfreeze/frozen/a"}


def test_histograms_do_not_share_memory_with_masks_and_variances():
    """Masks and variances are read only."""
    before = [{n: t.clone() for n, t in named.items()} for named in (FROZEN, VARIANCE)]
    for _, tensor in reporting.histograms(FROZEN, VARIANCE):
        tensor.add_(1.0)
    for named, was in zip((FROZEN, VARIANCE), before, strict=True):
        assert all(torch.equal(named[n], was[n]) for n in named)

"""Tags and numbers against NumPy."""

import numpy as np
import torch

from lightning_gcfreeze import reporting

FROZEN = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor(False)}
VARIANCE = {"a": torch.tensor([[0.0, 100.0], [0.01, 1.0]]), "b": torch.tensor(10.0)}


def test_scalars():
    """The fraction in all and of every parameter as they are given, and the steps, as plain floats."""
    tags = reporting.scalars({"a": 0.75, "b": 0.0}, fraction=0.6, observed=7)
    assert tags == {
        "gcfreeze/frozen_fraction": 0.6,
        "gcfreeze/observed_steps": 7.0,
        "gcfreeze/frozen_fraction/a": 0.75,
        "gcfreeze/frozen_fraction/b": 0.0,
    }
    assert {type(value) for value in tags.values()} == {float}


def test_histograms():
    """Masks as 0 and 1; log10 of the variances that have one, for each parameter."""
    values = reporting.histograms(FROZEN, VARIANCE)
    assert set(values) == {f"gcfreeze/{kind}/{name}" for kind in ("frozen", "log10_variance") for name in "ab"}
    assert values["gcfreeze/frozen/a"].tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert values["gcfreeze/frozen/b"].tolist() == 0.0
    for name in "ab":
        array = VARIANCE[name].numpy().flatten()
        np.testing.assert_allclose(
            values[f"gcfreeze/log10_variance/{name}"].numpy().flatten(), np.log10(array[array > 0]), rtol=1e-6
        )


def test_without_any_noise_there_is_no_histogram_of_it():
    """log10 of 0 is no number, and an empty histogram is an error for TensorBoard."""
    values = reporting.histograms({"a": FROZEN["a"]}, {"a": torch.zeros(2, 2)})
    assert set(values) == {"gcfreeze/frozen/a"}


def test_reporting_changes_nothing():
    """Masks and variances are read only."""
    before = [{n: t.clone() for n, t in named.items()} for named in (FROZEN, VARIANCE)]
    for tensor in reporting.histograms(FROZEN, VARIANCE).values():
        tensor.add_(1.0)
    for named, was in zip((FROZEN, VARIANCE), before, strict=True):
        assert all(torch.equal(named[n], was[n]) for n in named)

"""Tags and numbers against NumPy."""

import numpy as np
import pytest
import torch

from lightning_gcfreeze import reporting

FROZEN = {"a": torch.tensor([[True, False], [True, True]]), "b": torch.tensor(False)}
VARIANCE = {"a": torch.tensor([[0.0, 100.0], [0.01, 1.0]]), "b": torch.tensor(10.0)}


def test_scalars():
    """The fraction in all as it is given, that of every parameter asked for, and the steps, as plain floats."""
    tags = reporting.scalars(["a", "b"], FROZEN, fraction=0.6, observed=7)
    assert tags == {
        "gcfreeze/frozen_fraction": 0.6,
        "gcfreeze/observed_steps": 7.0,
        "gcfreeze/frozen_fraction/a": 0.75,
        "gcfreeze/frozen_fraction/b": 0.0,
    }
    assert {type(value) for value in tags.values()} == {float}


def test_while_observing_every_fraction_is_zero():
    """The same tags from the first step on, so that a logger with fixed columns has them all."""
    tags = reporting.scalars(["a", "b"], {}, fraction=0.0, observed=3)
    assert tags.keys() == reporting.scalars(["a", "b"], FROZEN, 0.6, 7).keys()
    assert [value for tag, value in tags.items() if "fraction" in tag] == [0.0] * 3


def test_a_fraction_of_many_elements_keeps_its_digits():
    """Of twenty million, more than float32 counts one by one, two thirds."""
    mask = torch.arange(21_000_000) % 3 > 0
    share = reporting.scalars(["w"], {"w": mask}, 0.0, 0)["gcfreeze/frozen_fraction/w"]
    assert share == pytest.approx(2 / 3, rel=1e-6)


def test_a_parameter_without_elements_has_no_frozen_ones():
    """Its fraction is a number: NaN would spoil a logger's plot or a sum over parameters."""
    tags = reporting.scalars(["e"], {"e": torch.zeros(0, 3, dtype=torch.bool)}, 0.0, 0)
    assert tags["gcfreeze/frozen_fraction/e"] == 0.0


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

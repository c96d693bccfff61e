"""`GradCovFreezeCallback.preset` and `PRESETS`."""

import pytest
import torch

from lightning_gcfreeze import PRESETS, Freezer, GradCovFreezeCallback
from tests import cases


def fit(callback):
    cases.trainer(callbacks=[callback]).fit(cases.Regression(cases.mlp()), cases.loader())
    return callback


def test_paper_freezes_the_lowest_variances_by_the_first_sample():
    named = fit(GradCovFreezeCallback.preset("paper", t0=5, k=28))
    of_all = fit(GradCovFreezeCallback(5, 28, samples="all"))
    limit = torch.cat([v.flatten() for v in named.variance.values()]).sort().values[27]
    for name, v in named.variance.items():
        assert torch.equal(named.frozen[name], v <= limit)
        assert not torch.equal(v, of_all.variance[name])


def test_recommended_observes_nothing_and_freezes_by_its_order():
    named = fit(GradCovFreezeCallback.preset("recommended", t0=5, k=28))
    spelled = fit(GradCovFreezeCallback(5, 28, order=PRESETS["recommended"]["order"]))
    paper = fit(GradCovFreezeCallback(5, 28))
    cases.assert_identical(named.frozen, spelled.frozen)
    assert named.variance == {}
    assert any(not torch.equal(named.frozen[name], mask) for name, mask in paper.frozen.items())


@pytest.mark.parametrize("name", PRESETS)
def test_arguments_given_win_over_those_of_a_preset(name):
    found = GradCovFreezeCallback.preset(name, schedule=[(3, 5), (6, 9)], order="magnitude", lr_after_freeze=2)
    assert (found.order, found.lr_after_freeze, found.schedule.stages) == ("magnitude", 2.0, ((3, 5), (6, 9)))
    assert PRESETS[name].get("order") != "magnitude"


def test_presets_are_of_the_class_that_they_are_asked_of_and_serve_all_fronts():
    class Own(GradCovFreezeCallback):
        pass

    assert type(Own.preset("paper", t0=1, k=1)) is Own
    module = cases.mlp()
    freezer = Freezer(module, torch.optim.Adam(module.parameters()), 5, 28, **PRESETS["recommended"])
    assert PRESETS["recommended"]["order"] in repr(freezer)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("recomended", {"t0": 1, "k": 1}, "`name` must be one of 'paper', 'recommended'.*Did you mean 'recommended'"),
        ("paper", {"t0": 1}, "Pass `t0` and `k`"),
    ],
)
def test_unknown_presets_and_missing_arguments_are_refused(name, options, text):
    with pytest.raises(ValueError, match=text):
        GradCovFreezeCallback.preset(name, **options)

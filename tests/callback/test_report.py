"""What a run tells of itself: `report`, `trainable_parameters` and plots, before, while, after, resumed and copied."""

import copy
import math
import re
import warnings
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
import matplotlib as mpl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from lightning_gcfreeze import Freezer, GradCovFreezeCallback
from tests import cases
from tests.interruptions import Interrupted, SaveAndStop, module, run


def counted(report: Any) -> list[int]:
    """Elements of each layer that are frozen, by the report's own rows."""
    return [round(elements * fraction) for _, elements, fraction in report.layers]


def test_report_says_what_froze_and_when():
    """Of two stages; the numbers are those of the masks."""
    callback = GradCovFreezeCallback(schedule=[(4, 0.3), (9, 0.6)])
    before = str(callback.report())
    assert "No run has begun; nothing is frozen yet, freezing begins after step t0=4." in before
    (sentence,) = GradCovFreezeCallback(t0=0.25, k=0.5).report().sentences
    assert sentence.endswith("freezing begins after 0.25 of the planned steps (`t0=0.25`).")
    (sentence,) = GradCovFreezeCallback(t0="auto", k=0.5).report().sentences
    assert sentence.endswith("freezing begins after the order has settled (`t0='auto'`).")
    assert callback.trainable_parameters() == (0, 0)
    run(callback)
    report = callback.report()
    masks = callback.frozen
    assert [layer for layer, _, _ in report.layers] == list(masks)
    assert counted(report) == [int(mask.sum()) for mask in masks.values()]
    n, n_frozen = sum(mask.numel() for mask in masks.values()), sum(counted(report))
    text = " ".join(str(report).split())
    first, second = round(0.3 * n) / n, round(0.6 * n) / n
    assert f"{n_frozen} of {n} eligible elements are frozen to the bit: {first:.1%} since step 4, {second:.1%}" in text
    assert f"{n - n_frozen} of {n} parameters still train" in text
    assert callback.savings.verdict in text
    assert callback.trainable_parameters() == (n - n_frozen, n)


def test_report_while_observing_says_until_when():
    callback = GradCovFreezeCallback(t0=100, k=0.5)
    with pytest.warns(UserWarning, match="t0=100"):
        run(callback)
    assert re.search(r"Optimizer steps: 18; nothing is frozen yet, .* t0=100\.", str(callback.report()))
    n = sum(p.numel() for p in cases.convnet().parameters())
    assert callback.trainable_parameters() == (n, n)
    with pytest.raises(RuntimeError, match="There is no plot before step t0=100"):
        callback.plot_frozen()


def test_parameters_that_do_not_train_or_are_not_eligible_count_in_all():
    """One layer has no gradient, one is excluded: the first does not train, the second does."""
    network = cases.deep_mlp(6)
    network[0].requires_grad_(False)
    partly = cases.Regression(network, lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.05))
    callback = GradCovFreezeCallback(t0=3, k=1.0, exclude="network.4.*")
    cases.trainer(callbacks=[callback], max_epochs=1).fit(partly, cases.loader())
    n = {i: sum(p.numel() for p in network[i].parameters()) for i in (0, 2, 4)}
    assert callback.trainable_parameters() == (n[4], sum(n.values()))
    given = n[2] + n[4]
    sentence = callback.report().sentences[1]
    assert sentence.startswith(f"{n[4]} of {given} parameters still train")
    assert sentence.endswith(f"that the optimizer was given; the module has {sum(n.values())}.")


class Unfreezing(pl.Callback):
    """Lets a layer train from the second epoch on, as BaseFinetuning does."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            layer = pl_module.network[0].requires_grad_()
            trainer.optimizers[0].add_param_group({"params": list(layer.parameters())})


@pytest.mark.parametrize("t0", [3, 11])
def test_parameters_that_begin_to_train_later_count(t0):
    """After the freeze or before it."""
    network = cases.deep_mlp(6)
    network[0].requires_grad_(False)
    partly = cases.Regression(network, lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.05))
    callback = GradCovFreezeCallback(t0=t0, k=0.5, order="magnitude")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*began to train after observing had begun")
        cases.trainer(callbacks=[callback, Unfreezing()], max_epochs=2).fit(partly, cases.loader())
    n = sum(p.numel() for p in network.parameters())
    n_frozen = sum(int(mask.sum()) for mask in callback.frozen.values())
    assert n_frozen > 0
    assert callback.trainable_parameters() == (n - n_frozen, n)


def test_state_of_an_older_version_has_a_report():
    """It has no history but the last decision, and does not know how many parameters there are."""
    whole, loaded = (GradCovFreezeCallback(schedule=[(4, 0.3), (9, 0.6)]) for _ in range(2))
    run(whole)
    state = whole.state_dict()
    del state["history"], state["n_parameters"]
    loaded.load_state_dict(state)
    assert loaded.trainable_parameters() == (0, 0)
    (sentence,) = loaded.report().sentences
    n_frozen = sum(int(mask.sum()) for mask in whole.frozen.values())
    assert sentence.startswith(f"Optimizer steps: 18. {n_frozen} of 45 eligible elements are frozen to the bit: ")
    assert sentence.endswith("60.0% since step 9.")


def test_report_of_many_stages_names_the_first_and_the_last():
    callback = GradCovFreezeCallback(schedule=[(t, 0.05 * t) for t in range(3, 13)], order="random")
    run(callback)
    text = callback.report().sentences[0]
    assert re.findall(r"since step (\d+)", text) == ["3", "4", "11", "12"]
    assert "… 6 more stages …" in text


@pytest.mark.parametrize("after", [6, 11])
def test_resumed_run_reports_the_steps_of_both_parts(tmp_path, after):
    """A run that is resumed after its first stage, or its second, knows when these were."""
    arguments = {"schedule": [(4, 0.3), (9, 0.6)]}
    whole, stopped, resumed = (GradCovFreezeCallback(**arguments) for _ in range(3))
    run(whole)
    with pytest.raises(Interrupted):
        run(stopped, SaveAndStop(tmp_path / "run.ckpt", after))
    run(resumed, ckpt=tmp_path / "run.ckpt")
    assert str(resumed.report()) == str(whole.report())
    assert str(copy.deepcopy(whole).report()) == str(whole.report())
    assert "since step 4, " in resumed.report().sentences[0]


def test_plots_are_of_the_run():
    """Rows are layers, cells the fractions of the masks; a mask is drawn as it is."""
    mpl.use("Agg")
    callback = GradCovFreezeCallback(t0=4, k=0.5)
    run(callback)
    (mesh,) = callback.plot_frozen().collections
    fractions = [float(mask.float().mean()) for mask in callback.frozen.values()]
    np.testing.assert_allclose(mesh.get_array(), [[0.0, fraction] for fraction in fractions])
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :2, 0], [0, 4])
    name = max(callback.frozen, key=lambda name: callback.frozen[name].dim())
    (image,) = callback.plot_mask(name).images
    np.testing.assert_array_equal(image.get_array(), callback.frozen[name].flatten(1))
    with pytest.raises(ValueError, match=rf"No eligible parameter is called '{name}h' \(closest: '{name}'"):
        callback.plot_mask(f"{name}h")
    mpl.pyplot.close("all")


def test_freezer_reports_as_the_callback_does():
    """With masks from the first step on, before the first step and after."""
    mpl.use("Agg")
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = Freezer(model, optimizer, masks={"weight": torch.eye(2, 4) > 0})
    assert freezer.trainable_parameters() == (10, 10)
    freezer.begin_batch(None)
    assert freezer.trainable_parameters() == (8, 10)
    freezer.backward(model(torch.ones(3, 4)).sum())
    optimizer.step()
    text = str(freezer.report())
    assert "Optimizer steps: 1. 2 of 10 eligible elements are frozen to the bit: 20.0% since step 0." in text
    np.testing.assert_array_equal(freezer.plot_mask("weight").images[0].get_array(), np.eye(2, 4))
    np.testing.assert_array_equal(freezer.plot_frozen().collections[0].get_array(), [[0.25], [0.0]])
    freezer.close()
    mpl.pyplot.close("all")


# t0 as a fraction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "step"), [(0.25, 4), (0.5, 9), (0.99, 17), (0.001, 1)])
def test_fraction_is_of_the_planned_steps(fraction, step):
    """Of 18 steps, rounded down, at least one; the run is that with the number."""
    one, other = GradCovFreezeCallback(t0=fraction, k=0.5), GradCovFreezeCallback(t0=step, k=0.5)
    for callback in (one, other):
        run(callback)
    assert callback.frozen_fraction > 0
    cases.assert_identical(one.frozen, other.frozen)
    assert one.report().sentences == other.report().sentences


def test_fraction_is_that_of_the_first_run_where_a_resumed_one_is_longer(tmp_path):
    """The step of the freeze does not move."""
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(t0=0.5, k=0.5), SaveAndStop(tmp_path / "run.ckpt", 6))
    resumed = GradCovFreezeCallback(t0=0.5, k=0.5)
    trainer = cases.trainer(callbacks=[resumed], max_epochs=6)
    trainer.fit(module(), cases.ResumableLoader(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.global_step == 36
    assert "since step 9." in resumed.report().sentences[0]


@pytest.mark.parametrize(("factors", "max_steps", "steps"), [({0: 4}, -1, 6), ({0: 2, 1: 4}, -1, 8), ({0: 4}, 5, 5)])
def test_fraction_is_of_the_steps_of_an_accumulation_that_changes(factors, max_steps, steps):
    """Three epochs of eight batches; the last batch of an epoch always ends a step."""
    callback = GradCovFreezeCallback(t0=0.5, k=0.5, order="magnitude")
    accumulation = GradientAccumulationScheduler(dict(factors))
    trainer = cases.trainer(callbacks=[callback, accumulation], max_epochs=3, max_steps=max_steps)
    trainer.fit(cases.Regression(cases.mlp()), cases.loader())
    assert trainer.global_step == steps
    assert f"since step {steps // 2}." in callback.report().sentences[0]


@pytest.mark.parametrize("kind", [np.float64, np.float32, Fraction])
def test_fraction_may_be_of_another_kind_of_number(kind, tmp_path):
    """A checkpoint has plain numbers."""
    callback = GradCovFreezeCallback(t0=kind(1) / 2, k=np.float64(0.5))
    run(callback)
    assert "since step 9." in callback.report().sentences[0]
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True)["arguments"]["t0"] == 0.5


@pytest.mark.parametrize("steps", ["4", True, 0, -1, math.nan])
def test_freezer_refuses_planned_steps_that_are_no_number_of_steps(steps):
    model = nn.Linear(4, 2)
    with pytest.raises((TypeError, ValueError), match="`planned_steps` must be"):
        Freezer(model, torch.optim.SGD(model.parameters()), 0.5, 0.5, order="magnitude", planned_steps=steps)


def test_fraction_of_an_endless_run_is_refused():
    model = nn.Linear(4, 2)
    freezer = Freezer(model, torch.optim.SGD(model.parameters(), lr=0.1), t0=0.5, k=0.5, order="magnitude")
    with pytest.raises(RuntimeError, match=r"`t0=0.5` is a fraction of the planned .*planned_steps"):
        freezer.begin_batch(torch.ones(3, 4))


def test_fraction_before_the_first_observed_step_is_refused():
    with pytest.raises(ValueError, match="`every=10` leaves no step to observe among the first `t0=4`"):
        run(GradCovFreezeCallback(t0=0.25, k=0.5, every=10))

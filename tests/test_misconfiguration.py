"""Warnings of probable mistakes: before the first step, in one short sentence, and none without a mistake."""

import re
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn

from lightning_gcfreeze import FreezeSchedule, GradCovFreezeCallback, misconfiguration
from lightning_gcfreeze._names import shortened
from tests import cases

NAMES = [f"encoder.layer.{i}.{part}.{kind}" for i in range(75) for part in ("query",) for kind in ("weight", "bias")]


def warned(*callbacks: pl.Callback, module: pl.LightningModule | None = None, **kwargs: Any) -> dict[str, int]:
    """What a run warns of -> after how many optimizer steps."""
    steps: dict[str, int] = {}

    class Clock(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            for warning in caught:
                steps.setdefault(str(warning.message), trainer.global_step)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = cases.trainer(callbacks=[*callbacks, Clock()], **kwargs)
        trainer.fit(module or cases.Regression(cases.mlp()), cases.loader())
    return {text: step for text, step in steps.items() if "GradCovFreezeCallback" in text}


def wide() -> pl.LightningModule:
    """46,581 parameters."""
    layers = [nn.Linear(5, 180), nn.Tanh(), nn.Linear(180, 250), nn.Tanh(), nn.Linear(250, 1)]
    return cases.Regression(nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ({"t0": 1000}, {}, "`t0=1000` is not below the 16 optimizer steps planned"),
        ({"t0": 16}, {}, "`t0=16` is not below the 16 optimizer steps planned"),
        ({"t0": 5}, {"fast_dev_run": True}, "`t0=5` is not below the 1 optimizer steps planned"),
        ({"t0": 8}, {"accumulate_grad_batches": 2}, "`t0=8` is not below the 8 optimizer steps planned"),
        ({"t0": 12}, {"max_steps": 12}, "`t0=12` is not below the 12 optimizer steps planned"),
        ({"exclude": ["*.bais"]}, {}, "`exclude` has patterns that match no parameter: '*.bais' (closest: '*.bias')"),
        (
            {"include": ["network.0.*", "network"]}, {},
            "`include` has patterns that match no parameter: 'network' (a prefix is written 'network.*')",
        ),
    ],
    ids=["t0", "t0 at the end", "fast_dev_run", "accumulation", "max_steps", "exclude", "include"],
)  # fmt: skip
def test_a_likely_mistake_is_warned_of_before_the_first_step(arguments, options, text):
    said = warned(GradCovFreezeCallback(**({"t0": 4, "k": 0.5} | arguments)), **options)
    assert [step for warning, step in said.items() if text in warning] == [0], said


def test_a_stage_that_is_too_late_is_named():
    said = warned(GradCovFreezeCallback(schedule=FreezeSchedule([(3, 0.2), (100, 0.5)])))
    assert [step for text, step in said.items() if "the stage of t=100" in text] == [0]


def test_a_run_without_mistakes_warns_of_nothing():
    """The control of all the others: patterns that match, a k that is no percentage, a t0 within the plan."""
    assert warned(GradCovFreezeCallback(t0=15, k=30, include="network.*", exclude=["*.2.bias"])) == {}
    assert warned(GradCovFreezeCallback(t0=4, k=0.5), max_epochs=-1, max_steps=9) == {}


def test_a_percentage_given_as_a_count_is_warned_of():
    """80 of 46,581; a count of one per cent is none, and neither are 0 or a fraction."""
    (text,) = warned(GradCovFreezeCallback(t0=4, k=80), module=wide())
    assert "`k=80` is a count: 80 of 46,581 eligible elements freeze; a fraction is 0.8." in text
    for k in (469, 0.001, 0):
        assert warned(GradCovFreezeCallback(t0=4, k=k), module=wide()) == {}
    assert "as in `k=0.8`" in str(misconfiguration.small_count(2000, 10**6))


def test_parameters_that_begin_to_train_late_are_named_at_the_decision():
    """BaseFinetuning adds a layer to the optimizer after an epoch: its elements are not ranked, and it is said."""

    class Unfreezes(BaseFinetuning):
        def freeze_before_training(self, module: pl.LightningModule) -> None:
            self.freeze(module.network[0])

        def finetune_function(self, module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.network[0], optimizer)

    class TrainsWhatMay(cases.Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    for t0, late in ((12, True), (6, False)):
        callback = GradCovFreezeCallback(t0=t0, k=0.5)
        said = warned(Unfreezes(), callback, module=TrainsWhatMay(cases.mlp()), max_epochs=3)
        assert callback.phase == "frozen"
        assert any("network.0.weight, network.0.bias began to train after" in text for text in said) is late


@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(1e-3, 1)]
)
def test_averaged_weights_are_warned_of_and_have_no_delta(averaging):
    """They replace frozen values by averages with those of before the freeze."""
    callback = GradCovFreezeCallback(t0=4, k=0.5)
    module = cases.Regression(cases.mlp())
    (text,) = warned(callback, averaging(), module=module, max_epochs=3)
    assert "replaces the weights by averages over steps before the freeze" in text
    with pytest.raises(RuntimeError, match=r"network\.0\.weight.*frozen elements have other values"):
        callback.delta()


def test_a_frozen_value_that_somebody_wrote_is_noticed_and_a_live_one_is_not():
    """By a single bit of a single element."""
    callback = GradCovFreezeCallback(t0=4, k=0.5)
    module = cases.Regression(cases.mlp())
    cases.trainer(callbacks=[callback]).fit(module, cases.loader())
    weight, mask = module.network[0].weight.detach(), callback.frozen["network.0.weight"]
    with torch.no_grad():
        weight[~mask] += 1.0
    callback.delta()
    row, column = mask.nonzero()[-1].tolist()
    weight[row, column].view(torch.int32).bitwise_xor_(1)
    with pytest.raises(RuntimeError, match=r"network\.0\.weight: frozen elements"):
        callback.delta()


def test_parameters_that_moved_after_the_last_step_are_named():
    assert misconfiguration.moved_at_the_end([]) is None
    text = str(misconfiguration.moved_at_the_end(NAMES))
    assert text.startswith("the fit ends with other values of frozen elements in encoder.layer.0.query.weight, ")
    assert "and 145 more than they froze with" in text


def test_messages_stay_short_with_many_parameters():
    text = misconfiguration.useless_patterns("include", ["encoder.layers.*", "tpyo"], NAMES)
    assert text is not None
    assert len(text) < 400
    assert "and 145 more" in shortened(NAMES)
    module = cases.Regression(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 1)))
    trainer = cases.trainer(callbacks=[GradCovFreezeCallback(t0=1, k=0.5, include="netwrk.*")])
    with pytest.raises(ValueError, match=r"No parameter is eligible .* and 1 more\. Closest: ") as error:
        trainer.fit(module, cases.loader())
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ({"order": "progres"}, "progress"),
        ({"granularity": "rows"}, "row"),
        ({"hold": "compcat"}, "compact"),
        ({"samples": "frist"}, "first"),
        ({"gradients": "relpay"}, "replay"),
    ],
    ids=lambda value: str(value),
)
def test_an_error_asks_what_was_meant(arguments, meant):
    with pytest.raises(ValueError, match=re.escape(f"Did you mean '{meant}'?")):
        GradCovFreezeCallback(t0=1, k=0.5, **arguments)


@pytest.mark.parametrize("order", [lambda: 1, lambda a, b: 1], ids=["no argument", "two"])
def test_an_order_that_does_not_take_the_evidence_is_refused(order):
    with pytest.raises(TypeError, match=r"`order` is called with one argument, an `Evidence`.*does not take it"):
        GradCovFreezeCallback(t0=1, k=0.5, order=order)


def test_the_frozen_fraction_is_among_the_callback_metrics(tmp_path):
    """EarlyStopping stops by it, and ModelCheckpoint has it in its file names."""
    callback = GradCovFreezeCallback(t0=12, k=28)
    stop = EarlyStopping("gcfreeze/frozen_fraction", mode="max", patience=2, check_on_train_epoch_end=True)
    save = ModelCheckpoint(
        tmp_path, "{epoch}-{gcfreeze/frozen_fraction:.2f}", save_top_k=-1, auto_insert_metric_name=False
    )
    seen: list[float] = []

    class Bar(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append(float(trainer.callback_metrics["gcfreeze/frozen_fraction"]))

    trainer = cases.trainer(callbacks=[callback, stop, save, Bar()], max_epochs=9, enable_checkpointing=True)
    trainer.fit(cases.Regression(cases.mlp()), cases.loader())
    assert seen[:12] == [0.0] * 11 + [pytest.approx(28 / 57)]
    assert trainer.current_epoch == 4  # epochs 0 and 1 improve, 2 and 3 do not
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}-{f}.ckpt" for n, f in enumerate(
        ["0.00", "0.49", "0.49", "0.49"]
    )]  # fmt: skip


def test_repr_says_the_arguments_and_the_state_in_one_line():
    callback = GradCovFreezeCallback(t0=4, k=0.5, order="progress", exclude="*.bias")
    assert repr(callback) == (
        "GradCovFreezeCallback(t0=4, k=0.5, order='progress', exclude=('*.bias',)): observing, 0 optimizer steps"
    )
    cases.trainer(callbacks=[callback]).fit(cases.Regression(cases.mlp()), cases.loader())
    assert repr(callback).endswith(": frozen 24 of 48")

"""`granularity="mixed"` in a run: blocks save work, and what is live trains as under a mask by hand."""

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_gcfreeze import Freezer, FreezeSchedule, GradCovFreezeCallback, Growth, Probe
from lightning_gcfreeze.huggingface import GradCovFreezeTrainerCallback
from tests import cases, insides
from tests.witnesses import bits

T0, STEPS, SAMPLES, WIDTH = 4, 9, 64, 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let blocks of small layers pay."""
    insides.skip_blocks_of_any_size(monkeypatch)


def network():
    return cases.deep_mlp(WIDTH)


def adam(parameters):
    return torch.optim.Adam(parameters, 0.01)


class StopAfter(pl.Callback):
    """As a user who interrupts."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop |= trainer.global_step == self.steps


def fit(steps=STEPS, ckpt=None, **arguments):
    callback = GradCovFreezeCallback(**({"t0": T0, "k": 0.8, "order": "movement", "granularity": "mixed"} | arguments))
    module = cases.Regression(network(), adam)
    trainer = cases.trainer(callbacks=[callback, StopAfter(steps)], max_epochs=STEPS // 3)
    trainer.fit(module, batches(), ckpt_path=ckpt)
    assert trainer.global_step == steps
    return callback, module, trainer


def batches():
    """Three a round."""
    return torch.utils.data.DataLoader(cases.data(SAMPLES * 3), batch_size=SAMPLES)


def by_hand(masks_of_step):
    """Train with masks, ``masks_of_step(t)``, as Adam on all and the old values put back."""
    model = network()
    optimizer = adam(model.parameters())
    for t, (x, y) in enumerate([*batches()] * 3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        masks = masks_of_step(t)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if f"network.{name}" in masks:
                    p.copy_(torch.where(masks[f"network.{name}"], before[name], p))
    return model


def area(mask):
    live = ~mask.flatten(1)
    return int(live.any(1).sum()) * int(live.any(0).sum()) / mask.numel()


def test_blocks_are_small_and_what_is_live_trains_as_under_masks_by_hand():
    callback, module, _ = fit()
    elements, _, _ = fit(granularity="element")
    name = "network.2.weight"
    assert area(callback.frozen[name]) < 0.75 * area(elements.frozen[name])
    assert sum(int(m.sum()) for m in callback.frozen.values()) == sum(int(m.sum()) for m in elements.frozen.values())
    assert callback.savings.parameters[name].flops_skipped > 0.2 * callback.savings.parameters[name].flops
    expected = by_hand(lambda t: callback.frozen if t >= T0 else {})
    start = dict(fit(steps=T0)[1].network.named_parameters())
    for name, p in expected.named_parameters():
        ours, mask = module.network.get_parameter(name).detach(), callback.frozen[f"network.{name}"]
        torch.testing.assert_close(ours, p.detach(), rtol=1e-4, atol=1e-6)
        assert torch.equal(bits(ours)[mask], bits(start[name].detach())[mask])
        assert not (ours == start[name]).logical_and(~mask).any()


def test_blocks_without_skipping_are_refused():
    with pytest.raises(ValueError, match=r"'mixed'.*skip_frozen_gradients=True"):
        GradCovFreezeCallback(T0, 0.5, granularity="mixed", skip_frozen_gradients=False)


@pytest.mark.filterwarnings("ignore:Nothing was frozen")
def test_resumed_run_has_the_bits_of_the_unbroken_one(tmp_path):
    _, whole, trainer = fit()
    for stop in (3, 6):
        _, _, trainer = fit(steps=stop)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        _, resumed, _ = fit(ckpt=tmp_path / "last.ckpt")
        for name, p in whole.named_parameters():
            assert torch.equal(bits(p.detach()), bits(resumed.get_parameter(name).detach())), (stop, name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"t0": None, "k": None, "schedule": FreezeSchedule([(3, 0.5), (5, 0.8), (7, 0.9)])},
        {"k": Growth(first=0.5, most=0.9, stages=3, every=1, max_loss_increase=0.9, forecast=False)},
    ],
)
def test_elements_stay_frozen_from_stage_to_stage(arguments):
    """Each stage freezes exactly what it should, and all of the one before."""
    seen = []

    class Look(GradCovFreezeCallback):
        def on_train_batch_end(self, *args, **kwargs):
            super().on_train_batch_end(*args, **kwargs)
            seen.append({name: mask.clone() for name, mask in self.frozen.items()})

    callback = Look(**({"t0": T0, "order": "movement", "granularity": "mixed"} | arguments))
    trainer = cases.trainer(callbacks=[callback], max_epochs=STEPS // 3)
    trainer.fit(cases.Regression(network(), adam), batches())
    n = sum(p.numel() for p in network().parameters())
    counts = [sum(int(mask.sum()) for mask in masks.values()) for masks in seen]
    stages = sorted({count for count in counts if count})
    assert stages[0] == round(0.5 * n)
    assert len(stages) > 1
    for earlier, later in pairwise(masks for masks in seen if masks):
        assert all((later[name] | ~mask).all() for name, mask in earlier.items())


def test_probe_and_loop_choose_blocks_too():
    model = network()
    with Probe(model, order="progress") as probe:
        for x, y in batches():
            probe.backward(nn.functional.mse_loss(model(x), y))
    masks, elements = probe.masks(0.8, "mixed"), probe.masks(0.8)
    assert area(masks["2.weight"]) < 0.75 * area(elements["2.weight"])
    assert sum(int(mask.sum()) for mask in masks.values()) == sum(int(mask.sum()) for mask in elements.values())

    model.zero_grad()
    optimizer = adam(model.parameters())
    freezer = Freezer(model, optimizer, t0=T0, k=0.8, order="movement", granularity="mixed", skip_frozen_gradients=True)
    for batch in [*batches()] * 3:
        freezer.begin_batch(batch)
        freezer.backward(nn.functional.mse_loss(model(batch[0]), batch[1]))
        optimizer.step()
        optimizer.zero_grad()
    callback, _, _ = fit()
    assert all(torch.equal(mask, callback.frozen[f"network.{name}"]) for name, mask in freezer.frozen.items())
    freezer.close()


def test_orders_of_negative_scores_are_refused():
    """By name at once, of one's own at the freeze."""
    with pytest.raises(ValueError, match=r"mixed.*order='reverse'"):
        GradCovFreezeCallback(T0, 0.5, order="reverse", granularity="mixed")
    with pytest.raises(ValueError, match=r"mixed.*must not be negative"):
        fit(order=lambda evidence: {name: -w.abs() for name, w in evidence.weights.items()})


def test_the_trainer_of_hugging_face_computes_all_gradients():
    with pytest.raises(ValueError, match=r"'mixed'.*'element' or 'row'"):
        GradCovFreezeTrainerCallback(T0, 0.5, granularity="mixed")

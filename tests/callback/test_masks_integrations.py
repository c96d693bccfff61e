"""Given masks with what surrounds a run: loggers, LightningCLI, finders, and code that reads gradients."""

import copy
import pickle
from operator import attrgetter
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_gcfreeze import GradCovFreezeCallback, masks
from tests import cases, insides
from tests.callback import command_line
from tests.callback.finders import FindsBatchSize, FindsRate, Tuned
from tests.callback.masked import assert_trained_as_plainly, drawn, fit, module, network, weights
from tests.interruptions import Interrupted, SaveAndStop
from tests.oracles.freezing import PlainFreeze

GIVEN = drawn(make=cases.mlp)
"""Of the small network: three of its four parameters."""


def test_tensorboard_gets_the_fractions_and_images_of_the_masks(tmp_path):
    """From the first step on; there is no variance to show."""
    callback = GradCovFreezeCallback(masks=GIVEN)
    trainer = cases.trainer(callbacks=[callback], logger=TensorBoardLogger(tmp_path), log_every_n_steps=4)
    trainer.fit(module(make=cases.mlp), cases.loader())
    events = EventAccumulator(trainer.log_dir, size_guidance={"images": 0}).Reload()
    count = sum(int(mask.sum()) for mask in GIVEN.values())
    fraction = [(e.step, round(e.value, 4)) for e in events.Scalars("gcfreeze/frozen_fraction")]
    assert fraction == [(step, round(count / 57, 4)) for step in (3, 7, 11, 15)]
    assert [e.value for e in events.Scalars("gcfreeze/observed_steps")] == [0] * 4
    assert [e.value for e in events.Scalars("gcfreeze/optimizer_state_bytes")][-1] < 8 * 57
    for name, mask in callback.frozen.items():
        logged = events.Scalars(f"gcfreeze/frozen_fraction/{name}")[0].value
        assert logged == pytest.approx(float(mask.float().mean()))
    assert events.Tags()["histograms"] == []
    for tag, steps in {"frozen": [3, 7, 11, 15], "frozen/network.0.weight": [3]}.items():
        assert [image.step for image in events.Images(f"gcfreeze/{tag}")] == steps


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize(
    "init_args", ["{masks: masks.pt}", "{masks: {network.0.weight: true, network.2.weight: true}}"]
)
@pytest.mark.filterwarnings("ignore:.*_jit_is_scripting")
def test_lightning_cli_takes_masks_from_yaml(tmp_path, init_args, package, monkeypatch):
    """A file's name, or True by parameter."""
    monkeypatch.chdir(tmp_path)
    given = {"network.0.weight": torch.ones(8, 5) > 0, "network.2.weight": torch.ones(1, 8) > 0}
    masks.save(given, "masks.pt")
    cli, callback = command_line.run(package, tmp_path, init_args, monkeypatch)
    assert {name for name, mask in callback.frozen.items() if mask.any()} == set(given)
    for name, mask in given.items():
        assert torch.equal(callback.frozen[name], mask)
        assert torch.equal(cli.model.get_parameter(name), cases.Regression(cases.mlp()).get_parameter(name))


def test_trainer_of_pytorch_lightning_gives_the_same_bits():
    """Weights and state are those of `lightning.pytorch`."""
    import pytorch_lightning

    ours, reference = GradCovFreezeCallback(masks=GIVEN), cases.Regression(cases.mlp())
    cases.trainer(callbacks=[ours]).fit(reference, cases.loader())
    theirs, trained = GradCovFreezeCallback(masks=GIVEN), command_line.standalone_cases()[0]()
    pytorch_lightning.Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[theirs],
    ).fit(trained, cases.loader())  # fmt: skip
    cases.assert_identical(dict(trained.state_dict()), dict(reference.state_dict()))
    cases.assert_identical(theirs.state_dict(), ours.state_dict())
    assert not torch.equal(trained.network[2].bias, cases.mlp()[2].bias)


def finders(middle: bool) -> list[Any]:
    if middle:
        rate, size = FindsRate(num_training_steps=4), FindsBatchSize(steps_per_trial=1, max_trials=1, init_val=8)
        rate.epoch = size.epoch = 1
        return [rate, size]
    return [LearningRateFinder(num_training_steps=4), BatchSizeFinder(steps_per_trial=1, max_trials=1, init_val=8)]


@pytest.mark.parametrize("hold", ["auto", "restore"])
@pytest.mark.parametrize("middle", [False, True], ids=["at the start", "in the middle"])
@pytest.mark.parametrize("which", [0, 1], ids=["LearningRateFinder", "BatchSizeFinder"])
@pytest.mark.filterwarnings("ignore")
def test_finders_leave_no_trace(which, middle, hold, tmp_path, monkeypatch):
    """Frozen elements have the bits of the start; steps of a trial do not count."""
    monkeypatch.chdir(tmp_path)
    callback, trained, start = GradCovFreezeCallback(masks=GIVEN, hold=hold), Tuned(), weights(Tuned())
    trainer = cases.trainer(callbacks=[finders(middle)[which], callback], max_epochs=3)
    trainer.fit(trained)
    steps = callback.state_dict()["steps"]
    for name, mask in GIVEN.items():
        now = trained.get_parameter(name).detach()
        assert torch.equal(now[mask], start[name][mask])
        assert mask.all() or (now != start[name])[~mask].any()
        assert torch.equal(callback.frozen[name], mask)
    assert steps == trainer.global_step > 12


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
@pytest.mark.parametrize("given", [GIVEN, masks.rows("network.0.weight", [1, 4]) | masks.pattern("*.bias"), "masks.pt"])
def test_callback_with_masks_can_be_copied_pickled_and_shown(clone, given, tmp_path, monkeypatch):
    """Before a run and after it, and the copy trains alike; tensors are not printed."""
    monkeypatch.chdir(tmp_path)
    masks.save(GIVEN, "masks.pt")
    callback = GradCovFreezeCallback(masks=given)
    fresh = clone(callback)
    trained, again = module(make=cases.mlp), module(make=cases.mlp)
    fit(trained, callback)
    fit(again, fresh)
    cases.assert_identical(weights(again), weights(trained))
    cases.assert_identical(clone(callback).frozen, callback.frozen)
    assert "tensor" not in repr(callback)
    assert len(repr(callback)) < 200
    assert "masks=" in repr(callback)
    assert f"frozen {sum(int(m.sum()) for m in callback.frozen.values())} of 57" in repr(callback)


# Gradients of gradients, and code that reads gradients --------------------------------------------------------------


DIFFERENTIATE = getattr(torch.autograd, "gr" + "ad")
"""By a name that does not tell: in code that mentions gradients no row would be skipped."""


class Penalized(cases.Regression):
    """The squared norm of the loss's gradient with respect to the input is part of the loss: in each n-th batch."""

    every = 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        x = x.clone().requires_grad_()
        loss = nn.functional.mse_loss(self.network(x), y)
        if batch_idx % self.every == 0:
            (slope,) = DIFFERENTIATE(loss, x, create_graph=True)
            loss = loss + 10.0 * slope.square().sum()
        return loss


@pytest.mark.parametrize("hold", ["compact", "restore"])
def test_gradients_of_gradients_in_the_first_step_leave_rows_unskipped(hold, monkeypatch):
    """The module trains right, and all work is done."""
    insides.skip_blocks_of_any_size(monkeypatch)
    given, start = drawn("row"), weights(module())
    callback, trained, plain = GradCovFreezeCallback(masks=given, hold=hold), Penalized(network()), Penalized(network())
    fit(trained, callback)
    fit(plain, PlainFreeze(0, given))
    assert_trained_as_plainly(trained, plain, start, given)
    without = module("SGD momentum")
    fit(without, PlainFreeze(0, given))
    assert not torch.allclose(without.network[2].weight, plain.network[2].weight, rtol=1e-3)


def test_run_with_gradients_of_gradients_in_its_first_step_is_resumed_to_the_bit(tmp_path, monkeypatch):
    """What the first step told holds for the whole run: rows are not skipped after a resume either."""
    insides.skip_blocks_of_any_size(monkeypatch)

    class Once(Penalized):
        every = 10**6

    def run(*more: Any, ckpt: Any = None) -> Any:
        trained, callback = Once(network(), cases.OPTIMIZERS["AdamW"]), GradCovFreezeCallback(masks=drawn("row"))
        trainer = cases.trainer(callbacks=[callback, *more], max_epochs=1)
        trainer.fit(trained, cases.ResumableLoader(batches=6), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return weights(trained), callback.savings.weight_gradient_flops_skipped

    unbroken = run()
    with pytest.raises(Interrupted):
        run(SaveAndStop(tmp_path / "run.ckpt", 3))
    cases.assert_identical(run(ckpt=tmp_path / "run.ckpt"), unbroken)


def test_gradients_of_gradients_that_begin_later_are_refused_with_the_way_out(monkeypatch):
    """A penalty in each fourth step would be wrong if a block's gradient were a constant."""
    insides.skip_blocks_of_any_size(monkeypatch)

    class Later(Penalized):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx + 1)

    Later.every = 4
    with pytest.raises(
        RuntimeError, match=r"the first step took no gradients of gradients.*skip_frozen_gradients=False"
    ):
        fit(Later(network()), GradCovFreezeCallback(masks=drawn("row")))
    given, start = drawn("row"), weights(module())
    trained, plain = Later(network()), Later(network())
    fit(trained, GradCovFreezeCallback(masks=given, skip_frozen_gradients=False))
    fit(plain, PlainFreeze(0, given))
    assert_trained_as_plainly(trained, plain, start, given)


READINGS: list[list[Tensor | None]] = []
READS = [attrgetter("gr" + "ad")]


class Hidden(cases.Regression):
    """Looks at gradients in a way that reading its code does not find."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        READINGS.append([READS[0](p) for p in self.parameters()])


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_code_that_is_seen_to_read_gradients_finds_them_from_the_next_step_on(granularity, monkeypatch):
    """There is a warning that names it. Training goes on as it would have."""
    insides.skip_blocks_of_any_size(monkeypatch)
    READINGS.clear()
    given, start = drawn(granularity), weights(module())
    trained, plain = Hidden(network()), Hidden(network())
    with pytest.warns(
        UserWarning,
        match=r"(on_train_batch_end|<listcomp>) \(test_masks_integrations.py:\d+\) looked at gradients, and found",
    ):
        fit(trained, GradCovFreezeCallback(masks=given))
    ours = READINGS[:]
    READINGS.clear()
    fit(plain, PlainFreeze(0, given))
    assert_trained_as_plainly(trained, plain, start, given)
    assert any(g is None for g in ours[0])
    for mine, theirs in zip(ours[1:], READINGS[1:], strict=True):
        assert all(a is not None and a.shape == b.shape for a, b in zip(mine, theirs, strict=True))
    assert len(ours) == 16


def test_code_that_is_found_to_read_gradients_finds_them_from_the_first_step_on():
    """All of them, of frozen elements as well; the optimizer has no state for these all the same."""
    seen: list[int] = []

    class Norms(cases.Regression):
        def on_after_backward(self) -> None:
            seen.append(sum(int(p.grad.count_nonzero()) for p in self.parameters()))

    trained = Norms(network(), cases.OPTIMIZERS["AdamW"])
    given = drawn()
    trainer = fit(trained, GradCovFreezeCallback(masks=given))
    n, live = sum(p.numel() for p in trained.parameters()), sum(int((~mask).sum()) for mask in given.values()) + 1
    assert min(seen) > 0.9 * n
    states = trainer.optimizers[0].state_dict()["state"].values()
    assert 0.9 * live < sum(int(s["exp_avg"].count_nonzero()) for s in states) <= live

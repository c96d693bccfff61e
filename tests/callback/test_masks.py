"""Training with given masks: frozen from the first step, nothing observed, and no state for what is frozen.

The reference is `PlainFreeze` with the same masks, which NumPy draws.
"""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_gcfreeze import FreezeSchedule, GradCovFreezeCallback, Growth, apply_delta, masks
from tests import cases, insides
from tests.callback.masked import assert_trained_as_plainly, drawn, fit, module, network, weights
from tests.interruptions import DropoutByStep, Interrupted, SaveAndStop, run
from tests.oracles.freezing import PlainFreeze
from tests.oracles.learning_rate import multiply_by_hand
from tests.witnesses import bits

# Training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("hold", ["auto", "compact", "restore"])
@pytest.mark.parametrize("optimizer", ["SGD momentum", "AdamW", "Adam fused", "Adagrad", "NAdam"])
def test_run_with_masks_trains_as_the_plain_way_of_freezing(optimizer, hold, granularity, monkeypatch):
    """From the first step on, also where rows are skipped from the second step on."""
    insides.skip_blocks_of_any_size(monkeypatch)
    given, start = drawn(granularity), weights(module())
    callback, trained, plain = GradCovFreezeCallback(masks=given, hold=hold), module(optimizer), module(optimizer)
    fit(trained, callback)
    fit(plain, PlainFreeze(0, given))
    assert_trained_as_plainly(trained, plain, start, given)
    assert callback.savings.weight_gradient_flops_skipped > (0.4 if granularity == "row" else 0.0)
    assert callback.phase == "frozen"
    count, n = sum(int(mask.sum()) for mask in given.values()), sum(p.numel() for p in trained.parameters())
    assert callback.frozen_fraction == count / n
    last = [name for name, _ in trained.named_parameters()][-1]
    cases.assert_identical(callback.frozen, {**given, last: torch.zeros_like(start[last], dtype=torch.bool)})


@pytest.mark.parametrize("optimizer", ["Adafactor", "Muon"])
def test_optimizers_that_mix_elements_train_as_the_plain_way_of_freezing(optimizer):
    """Frozen values are put back after each step."""

    def make(parameters: Any) -> Any:
        if optimizer == "Muon":
            return torch.optim.Muon([p for p in parameters if p.dim() == 2], 0.02)
        return cases.OPTIMIZERS["Adafactor"](parameters)

    matrices = [name for name, p in module().named_parameters() if p.dim() == 2]
    given = {n: mask for n, mask in drawn().items() if optimizer != "Muon" or n in matrices}
    trained, plain, start = module(make), module(make), weights(module())
    callback = GradCovFreezeCallback(masks=given)
    fit(trained, callback)
    fit(plain, PlainFreeze(0, given))
    for name, now in weights(trained).items():
        mask = given.get(name, torch.zeros(now.shape, dtype=torch.bool))
        assert torch.equal(bits(now)[mask], bits(start[name])[mask]), name
        assert_close(now, weights(plain)[name], rtol=1e-4, atol=1e-6)
        assert name not in matrices or mask.all() or (now != start[name])[~mask].all()


class Scheduled(cases.Regression):
    """Two groups with rates of their own, which change after each step."""

    def configure_optimizers(self) -> Any:
        first, *others = self.network.parameters()
        optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others, "lr": 0.02, "weight_decay": 0.3}], 0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.02, 0.05], total_steps=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Checkpointed(cases.Regression):
    """Runs its layers once more in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(checkpoint(self.network, x, use_reentrant=False), y)


def scaled() -> Any:
    """16-mixed with a loss scaler, whose first steps overflow."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=99))


@pytest.mark.parametrize(
    ("options", "arguments", "tolerance"),
    [
        ({"accumulate_grad_batches": 3}, {}, {}),
        ({"gradient_clip_val": 0.05}, {}, {}),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}, {}),
        ({}, {"skip_frozen_gradients": False}, {}),
        ({}, {"lr_after_freeze": 0.3}, {}),
        ({"precision": "64-true"}, {}, {}),
        ({"precision": "bf16-mixed"}, {}, {"rtol": 2e-2, "atol": 5e-3}),
        ({"precision": "16-mixed"}, {"hold": "restore", "skip_frozen_gradients": False}, {"rtol": 2e-2, "atol": 5e-3}),
        ({"precision": "16-mixed"}, {"hold": "compact"}, {"rtol": 2e-2, "atol": 5e-3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_options_of_trainer_and_callback_work_with_masks(options, arguments, tolerance, granularity, monkeypatch):
    """Accumulation, clipping, precisions; the factor on learning rates holds from the first step on."""
    insides.skip_blocks_of_any_size(monkeypatch)
    given, start = drawn(granularity), weights(module())
    trained, plain = module(), module()

    class Factor(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            multiply_by_hand(trainer.optimizers[0], lambda step: arguments.get("lr_after_freeze", 1.0))

    def own() -> dict[str, Any]:
        return {"plugins": [scaled()]} if options.get("precision") == "16-mixed" else options

    if options.get("precision") == "64-true":
        for one in (trained, plain):
            one.double()
        start = weights(trained)
        cases_loader = cases.loader(dtype=torch.float64)
        assert cases_loader
    fit(trained, GradCovFreezeCallback(masks=given, **arguments), **own())
    fit(plain, Factor(), PlainFreeze(0, given), **own())
    assert_trained_as_plainly(trained, plain, start, given, **tolerance)


@pytest.mark.parametrize("make", [Scheduled, Checkpointed])
@pytest.mark.parametrize("hold", ["compact", "restore"])
def test_schedulers_groups_and_gradient_checkpointing_work_with_masks(make, hold, monkeypatch):
    """As without the callback; checkpointing runs the forward pass of a step twice."""
    insides.skip_blocks_of_any_size(monkeypatch)
    given, start = drawn("row"), weights(module())
    trained, plain = make(network()), make(network())
    fit(trained, GradCovFreezeCallback(masks=given, hold=hold))
    fit(plain, PlainFreeze(0, given))
    assert_trained_as_plainly(trained, plain, start, given)


def test_masks_by_file_by_name_and_by_selection_give_the_same_bits(tmp_path):
    """So do arrays of NumPy, True for all of a parameter, and what a selection says."""
    given = {"network.0.weight": torch.ones(128, 5, dtype=torch.bool), "network.4.weight": drawn()["network.4.weight"]}
    given["network.6.weight"] = torch.zeros(1, 130, dtype=torch.bool).index_fill_(1, torch.arange(50), True)
    row_mask = torch.zeros(130, 128, dtype=torch.bool).index_fill_(0, torch.tensor([3, 77]), True)
    given["network.2.weight"] = row_mask
    masks.save(given, tmp_path / "masks.pt")
    masks.save_order({n: (~m).float() for n, m in given.items()}, tmp_path / "order.pt")
    k = sum(int(mask.sum()) for mask in given.values())
    outcomes = []
    for form in (
        given,
        {name: mask.numpy() for name, mask in given.items()},
        {**given, "network.0.weight": True, "network.6.bias": False},
        {**given, "network.0.weight": np.True_, "network.2.weight": row_mask.tolist()},
        tmp_path / "masks.pt",
        str(tmp_path / "masks.pt"),
        masks.lowest({n: (~given.get(n, torch.zeros_like(p) > 0)).float() for n, p in module().named_parameters()}, k),
    ):
        trained, callback = module(), GradCovFreezeCallback(masks=form)
        fit(trained, callback)
        outcomes.append({"weights": weights(trained), "frozen": callback.frozen})
    for outcome in outcomes[1:]:
        cases.assert_identical(outcome, outcomes[0])
    assert not torch.equal(outcomes[0]["weights"]["network.2.weight"], module().network[2].weight)
    selection = masks.layer("network.0") | masks.rows("network.2.weight", [3, 77]) - masks.pattern("*.bias")
    by_selection = GradCovFreezeCallback(masks=selection)
    fit(module(), by_selection)
    assert by_selection.frozen["network.0.bias"].all()
    assert torch.equal(by_selection.frozen["network.2.weight"], row_mask)


def test_masks_are_copied_when_training_begins():
    """The user may change them afterwards, also one of rows, which is one value a row in memory."""
    given = {name: mask.clone() for name, mask in drawn().items()}
    rows = torch.arange(len(given["network.0.weight"])) % 2 == 0
    given["network.0.weight"] = rows[:, None].expand(given["network.0.weight"].shape)
    expected = {name: mask.clone() for name, mask in given.items()}

    class Change(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            for name, mask in given.items():
                (rows if name == "network.0.weight" else mask).logical_not_()

    callback = GradCovFreezeCallback(masks=given)
    fit(module(), callback, Change(), max_epochs=1)
    for name, mask in expected.items():
        assert torch.equal(callback.frozen[name], mask)
    callback.frozen["network.2.weight"].zero_()
    assert callback.frozen["network.2.weight"].any()


def test_nothing_is_observed(monkeypatch):
    """One training step a batch, no gradients but those of the step, no statistics; with t0 there would be more."""
    calls = []

    class Counted(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            calls.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append("grad") or grad(*args, **kwargs))
    callback = GradCovFreezeCallback(masks=drawn())
    fit(Counted(network()), callback)
    assert calls == [8] * 16
    assert insides.observed_steps_of(callback) == 0
    assert (callback.variance, callback.covariance, callback.ranks) == ({}, None, {})
    fit(Counted(network()), GradCovFreezeCallback(t0=3, k=0.5, gradients="replay"), max_epochs=1)
    assert len(calls) > 16 + 8


# The optimizer's state ---------------------------------------------------------------------------------------------


class QuietWitness(pl.Callback):
    """Around every batch: how many elements the optimizer keeps state of. It overrides no hook that sees gradients."""

    def __init__(self) -> None:
        self.counts: set[int] = set()
        self.largest = 0

    def look(self, optimizer: Any) -> None:
        held = [v for of_p in optimizer.state.values() for v in of_p.values() if isinstance(v, Tensor) and v.dim()]
        self.counts.add(sum(v.numel() for v in held))
        self.largest = max(self.largest, sum(v.untyped_storage().nbytes() for v in held))

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.look(trainer.optimizers[0])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.look(trainer.optimizers[0])


class StateWitness(QuietWitness):
    """At every hook of a fit, and in those of the optimizer's step."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda optimizer, *_: self.look(optimizer))
            optimizer.register_step_pre_hook(lambda optimizer, *_: self.look(optimizer))

    on_before_zero_grad = on_before_backward = on_after_backward = QuietWitness.on_train_batch_end
    on_before_optimizer_step = on_train_epoch_end = QuietWitness.on_train_batch_end


@pytest.mark.parametrize("make_witness", [QuietWitness, StateWitness])
@pytest.mark.parametrize(
    ("optimizer", "per_element", "at_once"), [("AdamW", 2, False), ("SGD momentum", 1, False), ("Adagrad", 1, True)]
)
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_optimizer_never_holds_state_for_frozen_elements(optimizer, per_element, at_once, granularity, make_witness):
    """In no hook of any step, the first one included, whether gradients stay or not; Adagrad begins with a state."""
    given, witness = drawn(granularity), make_witness()
    trained = module(optimizer)
    live = sum(p.numel() for p in trained.parameters()) - sum(int(mask.sum()) for mask in given.values())
    callback = GradCovFreezeCallback(masks=given, hold="compact")
    fit(trained, callback, witness)
    assert bool(callback.savings.without_backward) == (make_witness is QuietWitness)
    assert witness.counts == ({live * per_element} if at_once else {0, live * per_element})
    assert witness.largest == 4 * live * per_element
    plain = make_witness()
    fit(module(optimizer), PlainFreeze(0, given), plain)
    assert plain.largest > 2 * witness.largest


@pytest.mark.parametrize("hold", ["compact", "restore"])
def test_savings_are_bytes_counted_by_hand(hold, monkeypatch):
    """Adam keeps 2 x 4 bytes an element, and 4 of each vector or parameter; FLOPs are those of the first step."""
    insides.skip_blocks_of_any_size(monkeypatch)
    given, told = drawn("row"), []

    class Ask(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            told.append(callback.savings)

    callback, trained = GradCovFreezeCallback(masks=given, hold=hold), module()
    trainer = fit(trained, callback, Ask())
    savings, n = callback.savings, sum(p.numel() for p in trained.parameters())
    live = n - sum(int(mask.sum()) for mask in given.values())
    steps = 4 * len([*trained.parameters()])
    assert 8 * n <= savings.before.state <= 8 * n + steps
    if hold == "compact":
        assert 8 * live <= savings.after.state <= 8 * live + steps
        assert 4 * live <= savings.after.gradients <= 4 * live + 16
    else:
        in_place = n - sum(mask.numel() for mask in given.values() if mask.all())
        assert 8 * in_place <= savings.after.state <= 8 * n + steps
    assert [s is savings for s in told] == [True] * len(told)
    name = "network.4.weight"
    flops = 2 * 8 * 130 * 130  # of a batch of eight
    assert savings.parameters[name].flops == flops
    frozen_rows = int(given[name][:, 0].sum())
    assert savings.parameters[name].flops_skipped == flops * frozen_rows // 130
    assert savings.without_backward == tuple(n for n, mask in given.items() if mask.all())
    assert trainer.global_step == 16


def test_no_gradient_of_a_frozen_weight_is_computed_in_the_first_step():
    """Nor kept in any later one: it may not fit into memory."""
    kept: list[bool] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
            kept.append(any(p.requires_grad for p in pl_module.network[2].parameters()))

    callback = GradCovFreezeCallback(masks=masks.layer("network.0", "network.2"))
    trained = module()
    fit(trained, callback, Look(), max_epochs=1)
    assert kept == [False] * 8
    assert all(p.requires_grad for p in trained.parameters())


# From run to run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["element", "row", "tensor"])
def test_saved_masks_and_saved_orders_give_a_run_the_masks_of_the_earlier_one(tmp_path, granularity):
    """The masks as they are, and the lowest of the order; another k freezes a part of them."""
    first = GradCovFreezeCallback(t0=5, k=0.6, granularity=granularity)
    fit(module(), first)
    first.save_masks(tmp_path / "masks.pt")
    first.save_order(str(tmp_path / "order.pt"))
    lowest = masks.lowest(tmp_path / "order.pt", 0.6, granularity)
    for given in (tmp_path / "masks.pt", lowest, first.frozen):
        later = GradCovFreezeCallback(masks=given)
        fit(module(), later, max_epochs=1)
        cases.assert_identical(later.frozen, first.frozen)
    fewer = GradCovFreezeCallback(masks=masks.lowest(tmp_path / "order.pt", 0.3, granularity))
    fit(module(), fewer, max_epochs=1)
    assert 0 < fewer.frozen_fraction < 0.31 < first.frozen_fraction
    assert all((mask <= first.frozen[name]).all() for name, mask in fewer.frozen.items())
    fewer.save_masks(tmp_path / "again.pt")
    cases.assert_identical(masks.load(tmp_path / "again.pt"), fewer.frozen)
    with pytest.raises(RuntimeError, match=r"There is no order: the masks were given\. Save them with `save_masks`"):
        fewer.save_order(tmp_path / "no.pt")


def test_nothing_can_be_saved_before_a_run(tmp_path):
    """With the step at which there will be something."""
    with pytest.raises(RuntimeError, match="There is no masks before step t0=5: nothing is frozen yet"):
        GradCovFreezeCallback(t0=5, k=0.6).save_masks(tmp_path / "masks.pt")
    with pytest.raises(RuntimeError, match="There is no order before step t0=5"):
        GradCovFreezeCallback(t0=5, k=0.6).save_order(tmp_path / "order.pt")
    with pytest.raises(RuntimeError, match="before training begins"):
        GradCovFreezeCallback(masks=masks.everything()).save_masks(tmp_path / "masks.pt")
    assert not [*tmp_path.iterdir()]


CONVNET = drawn(make=cases.convnet)


@pytest.mark.parametrize("form", ["element", "row"])
@pytest.mark.parametrize("after", [1, 2, 7, 12, 15])
def test_run_resumed_at_any_step_equals_the_unbroken_run(tmp_path, after, form, monkeypatch):
    """To the bit, with dropout and BatchNorm, right before and after rows begin to be skipped."""
    insides.skip_blocks_of_any_size(monkeypatch)
    given = drawn(form, make=cases.convnet)
    unbroken = run(GradCovFreezeCallback(masks=given), DropoutByStep())
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(masks=given), DropoutByStep(), SaveAndStop(tmp_path / "run.ckpt", after))
    resumed = run(GradCovFreezeCallback(masks=given), DropoutByStep(), ckpt=tmp_path / "run.ckpt")
    cases.assert_identical(resumed, unbroken)
    assert unbroken["callback"]["steps"] == 18


@pytest.mark.parametrize("saves", [1, 2**40], ids=["rows are skipped", "rows are not worth it"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adam fused", "SGD momentum"])
def test_resuming_depends_on_no_place_in_the_optimizers_vectors(tmp_path, optimizer, saves, monkeypatch):
    """Layers of odd sizes: whether their rows are skipped is known to a resumed run before its first step."""
    from lightning_gcfreeze.freezing import blocks

    monkeypatch.setattr(blocks, "MIN_SAVED_MACS", saves)

    def make() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 1)
        )

    def once(*callbacks: pl.Callback, ckpt: Any = None) -> Any:
        trained = module(optimizer, make)
        trainer = cases.trainer(callbacks=[*callbacks], max_epochs=3)
        trainer.fit(trained, cases.ResumableLoader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return {"weights": dict(trained.state_dict()), "optimizer": trainer.optimizers[0].state_dict()["state"]}

    given = drawn("row", make=make)
    unbroken = once(GradCovFreezeCallback(masks=given))
    for after in (1, 5):
        with pytest.raises(Interrupted):
            once(GradCovFreezeCallback(masks=given), SaveAndStop(tmp_path / "run.ckpt", after))
        resumed = once(GradCovFreezeCallback(masks=given), ckpt=tmp_path / "run.ckpt")
        cases.assert_identical(resumed, unbroken)


def test_resuming_with_other_masks_is_refused_by_name(tmp_path):
    """The same ones in another form are taken."""
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(masks=CONVNET), SaveAndStop(tmp_path / "run.ckpt", 4))
    name = "network.6.weight"
    other = {**CONVNET, name: CONVNET[name].clone().logical_not_()}
    with pytest.raises(MisconfigurationException, match=rf"`masks` are not those .* with: {name} differ\. Resume"):
        run(GradCovFreezeCallback(masks=other), ckpt=tmp_path / "run.ckpt")
    masks.save(CONVNET, tmp_path / "masks.pt")
    run(GradCovFreezeCallback(masks=tmp_path / "masks.pt"), ckpt=tmp_path / "run.ckpt")


def test_runs_with_masks_and_runs_that_observe_do_not_go_on_from_each_other(tmp_path):
    """Named by the arguments that differ."""
    for saved, resumed, message in (
        ({"masks": CONVNET}, {"t0": 3, "k": 0.5}, r"masks='given' \(now None\)"),
        ({"t0": 3, "k": 0.5}, {"masks": CONVNET}, r"masks=None \(now 'given'\)"),
    ):
        with pytest.raises(Interrupted):
            run(GradCovFreezeCallback(**saved), SaveAndStop(tmp_path / "run.ckpt", 5))
        with pytest.raises(MisconfigurationException, match=message):
            run(GradCovFreezeCallback(**resumed), ckpt=tmp_path / "run.ckpt")


def test_checkpoint_of_a_run_with_masks_is_resumed_without_the_callback(tmp_path):
    """The optimizer's state is of full shape, zero where frozen, and everything moves on."""
    with pytest.raises(Interrupted):
        run(GradCovFreezeCallback(masks=CONVNET), SaveAndStop(tmp_path / "run.ckpt", 5))
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    states, checked = saved["optimizer_states"][0]["state"], 0
    for i, (name, p) in enumerate(cases.Regression(cases.convnet()).named_parameters()):
        if name in CONVNET and i in states:  # what is frozen whole has none
            assert states[i]["exp_avg"].shape == p.shape
            assert not states[i]["exp_avg"][CONVNET[name]].any()
            assert states[i]["exp_avg"][~CONVNET[name]].any()
            checked += 1
    assert checked == sum(not mask.all() for mask in CONVNET.values()) == 3
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        plain = run(None, ckpt=tmp_path / "run.ckpt")
    moved = [(plain["weights"][n] != saved["state_dict"][n])[mask] for n, mask in CONVNET.items()]
    assert torch.cat(moved).float().mean() > 0.9


def test_checkpoint_of_a_plain_run_goes_on_with_masks(tmp_path):
    """A pretrained checkpoint with its optimizer; frozen are the loaded values."""
    with pytest.raises(Interrupted):
        run(None, SaveAndStop(tmp_path / "run.ckpt", 5))
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
    callback = GradCovFreezeCallback(masks=CONVNET)
    outcome = run(callback, ckpt=tmp_path / "run.ckpt")
    for name, mask in CONVNET.items():
        assert torch.equal(outcome["weights"][name][mask], saved[name][mask])
        assert not (outcome["weights"][name] == saved[name])[~mask].any()


def test_second_fit_of_a_callback_with_masks_equals_that_of_a_new_one():
    """Nothing is left of the first."""
    callback = GradCovFreezeCallback(masks=CONVNET)
    first = run(callback, DropoutByStep())
    cases.assert_identical(run(callback, DropoutByStep()), first)


def test_live_elements_and_the_weights_of_the_start_give_the_trained_module(tmp_path):
    """`delta` is of a module before training, wherever the masks came from."""
    trained, fresh, given = module(), module(), drawn()
    callback = GradCovFreezeCallback(masks=given)
    fit(trained, callback)
    callback.delta(tmp_path / "live.safetensors")
    assert not torch.equal(fresh.network[2].weight, trained.network[2].weight)
    apply_delta(fresh, tmp_path / "live.safetensors")
    cases.assert_identical(weights(fresh), weights(trained))


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "others",
    [
        {"t0": 3}, {"k": 0.5}, {"t0": 3, "k": 0.5}, {"t0": "auto", "k": "auto"}, {"k": Growth()},
        {"schedule": FreezeSchedule([(3, 0.5)])}, {"order": "progress"}, {"samples": "all"}, {"samples": "first"},
        {"every": 2}, {"covariance": "full"}, {"gain": 0.5}, {"gradients": "replay"}, {"granularity": "row"},
        {"seed": 1}, {"order": "magnitude", "seed": 1},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_observing_are_refused_with_masks(others):
    """By name: nothing would come of them."""
    named = ", ".join(f"`{name}`" for name in others)
    with pytest.raises(ValueError, match=f"nothing is observed: leave out {named}"):
        GradCovFreezeCallback(masks={"w": True}, **others)
    with pytest.raises(ValueError, match="leave out `order`"):
        GradCovFreezeCallback.preset("recommended", masks={"w": True})
    assert GradCovFreezeCallback(masks={"w": True}, hold="restore", include="*", lr_after_freeze=0.5).masks


@pytest.mark.parametrize("given", [3, True, [torch.ones(3) > 0], torch.ones(3) > 0, b"masks.pt", 0.5], ids=str)
def test_masks_of_another_kind_are_refused_at_once(given):
    """With what they may be."""
    with pytest.raises(TypeError, match="`masks` must be a file that `save_masks` wrote, a mapping"):
        GradCovFreezeCallback(masks=given)


def with_mask(mask: Any, name: str = "network.2.weight") -> dict[str, Any]:
    return {"network.0.weight": True, name: mask}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (with_mask(torch.ones(130, 128)), TypeError, r"'network.2.weight' must be bool, .* got torch.float32"),
        (with_mask(torch.ones(130, 128, dtype=torch.uint8)), TypeError, "must be bool, .* got torch.uint8"),
        (with_mask(np.ones((130, 128), dtype=int)), TypeError, "must be bool, .* got torch.int64"),
        (with_mask([1, 0]), TypeError, "must be bool"),
        (with_mask(1), TypeError, "must be bool"),
        (with_mask(0.0), TypeError, "must be bool"),
        (with_mask(None), TypeError, "must be a bool tensor, or True or False, got None"),
        (with_mask("all"), TypeError, "must be a bool tensor, or True or False, got 'all'"),
        (with_mask({3: True}), TypeError, "must be a bool tensor"),
        (with_mask(torch.ones(128, 130) > 0), ValueError, r"shape, \(130, 128\), got \(128, 130\)"),
        (with_mask(torch.ones(130) > 0), ValueError, r"shape, \(130, 128\), got \(130,\)"),
        (with_mask(torch.ones(130, 1) > 0), ValueError, r"shape, \(130, 128\), got \(130, 1\)"),
        (with_mask(torch.tensor(True)), ValueError, r"shape, \(130, 128\), got \(\)"),
        (with_mask([True, False]), ValueError, r"shape, \(130, 128\), got \(2,\)"),
        (with_mask(True, "2.weight"), ValueError, r"'2.weight', no parameter of the module.*'network.2.weight'"),
        (with_mask(True, "model.network.2.weight"), ValueError, r"no parameter of the module: .*network.2.weight"),
        (with_mask(True, "network.2.wieght"), ValueError, r"closest: 'network.2.weight'"),
        (with_mask(True, "network"), ValueError, "no parameter of the module"),
        ({0: True}, ValueError, "`masks` have 0, no parameter of the module"),
        ({}, ValueError, "`masks` mark nothing"),
        ({"network.0.weight": False}, ValueError, "`masks` mark nothing: no element would be frozen"),
        (masks.everything() - masks.everything(), ValueError, "`masks` mark nothing"),
        (masks.rows("embed.weight", [1]), ValueError, "no eligible parameter is named 'embed.weight'"),
        ("nowhere.pt", FileNotFoundError, "nowhere.pt"),
    ],
    ids=str,
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused_before_the_first_step(given, error, message):
    """With the name, what came and what fits; nothing has moved, and the module is left as it was."""
    trained, start = module(), weights(module())
    with pytest.raises(error, match=message):
        fit(trained, GradCovFreezeCallback(masks=given))
    cases.assert_identical(weights(trained), start)
    assert all(p.requires_grad for p in trained.parameters())


def test_masks_of_what_does_not_train_are_refused():
    """It requires no gradient, is not in the optimizer, or is left out; without its mask the rest trains."""

    def sgd_of_what_trains(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in parameters if p.requires_grad], 0.02)

    def sgd_of_two(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([*parameters][:2], 0.02)

    for make, arguments in (
        (lambda m: m.network[2].requires_grad_(False), {}),
        (lambda m: setattr(m, "make_optimizer", sgd_of_two), {}),
        (lambda m: None, {"exclude": "network.2.*"}),
        (lambda m: None, {"include": ["network.0.*"]}),
    ):
        trained = module("SGD")
        make(trained)
        if not all(p.requires_grad for p in trained.parameters()):
            trained.make_optimizer = sgd_of_what_trains
        with pytest.raises(ValueError, match=r"'network.2.weight', which is not eligible: it requires no gradient"):
            fit(trained, GradCovFreezeCallback(masks=with_mask(True), **arguments))
        callback = GradCovFreezeCallback(masks={"network.0.weight": True}, **arguments)
        fit(trained, callback, max_epochs=1)
        assert callback.frozen["network.0.weight"].all()
        assert not callback.frozen["network.0.bias"].any()


def test_exclude_makes_everything_mean_what_is_left():
    """A selection is of the eligible parameters."""
    callback, trained, start = GradCovFreezeCallback(masks=masks.everything(), exclude="*.bias"), module(), module()
    fit(trained, callback, max_epochs=1)
    assert callback.frozen_fraction == 1.0
    for (name, now), before in zip(trained.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(now, before) == name.endswith("weight")


def test_files_of_other_models_and_damaged_files_are_refused(tmp_path):
    """Of other names, of other shapes, with a byte that is wrong, cut short, and of another kind."""
    other = GradCovFreezeCallback(masks=masks.pattern("*.weight"))
    fit(module(make=cases.mlp), other, max_epochs=1)
    other.save_masks(tmp_path / "shape.pt")
    masks.save({"encoder.weight": torch.ones(3) > 0}, tmp_path / "names.pt")
    masks.save(drawn(), tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-100])
    at = data.index(np.packbits(drawn()["network.4.weight"].numpy(), bitorder="little").tobytes())
    (tmp_path / "bit.pt").write_bytes(data[: at + 9] + bytes([data[at + 9] ^ 4]) + data[at + 10 :])
    torch.save(module().state_dict(), tmp_path / "weights.pt")
    for name, message in (
        ("shape.pt", r"'network.0.weight' must have its parameter's shape, \(128, 5\), got \(8, 5\). Is it of another"),
        ("names.pt", r"'encoder.weight', no parameter of the module: .* Are they of another model\?"),
        ("cut.pt", "cut.pt' cannot be read as a file of masks. Write one with `save_masks`"),
        ("bit.pt", "bit.pt' (cannot be read as a file of masks|is damaged)"),
        ("weights.pt", "weights.pt' is no file of masks"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(module(), GradCovFreezeCallback(masks=tmp_path / name))
    fit(module(), GradCovFreezeCallback(masks=tmp_path / "good.pt"), max_epochs=1)


@pytest.mark.parametrize("hold", ["compact", "restore"])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD momentum"])
def test_everything_may_be_frozen(optimizer, hold):
    """Nothing moves, and training comes to its end."""
    trained, start, callback = module(optimizer), module(), GradCovFreezeCallback(masks=masks.everything(), hold=hold)
    trainer = fit(trained, callback)
    cases.assert_identical(weights(trained), weights(start))
    assert (callback.frozen_fraction, trainer.global_step) == (1.0, 16)
    fit(trained, GradCovFreezeCallback(masks={"network.0.weight": True}), max_epochs=1)
    assert not torch.equal(trained.network[2].weight, start.network[2].weight)

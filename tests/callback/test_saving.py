"""After the freeze in a Trainer: every way to hold, every granularity, and what that saves."""

import copy
import itertools
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gcfreeze import GradCovFreezeCallback, apply_delta, delta
from lightning_gcfreeze.freezing.savings import Footprint
from tests import cases, insides
from tests.cases import OPTIMIZERS
from tests.interruptions import Interrupted, SaveAndStop
from tests.witnesses import Witness, bits

HOLDS = ["compact", "restore"]
GRANULARITIES = ["element", "row", "tensor"]


@pytest.fixture(autouse=True)
def _every_block_is_worth_it(monkeypatch):
    insides.skip_blocks_of_any_size(monkeypatch)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Convolution, BatchNorm, in-place ReLU, linear; every parameter has a gradient beyond rounding."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 6, 3, padding=1, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(30, 6), nn.Tanh(), nn.Linear(6, 1),
    ).to(dtype)  # fmt: skip


def fit(
    optimizer: Any, *callbacks: pl.Callback, ckpt_path: Path | None = None, look: Any = None, **kwargs: Any
) -> tuple[pl.LightningModule, pl.Trainer]:
    """18 batches."""
    module = cases.Regression(network(), optimizer)
    trainer = cases.trainer(**({"max_epochs": 3} | kwargs), callbacks=list(callbacks))
    loader = look or cases.ResumableLoader()
    loader.trainer = trainer
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module, trainer


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01, weight_decay=0.3)


ARGUMENTS = st.fixed_dictionaries(
    {
        "hold": st.sampled_from(["auto", *HOLDS]),
        "granularity": st.sampled_from(GRANULARITIES),
        "k": st.sampled_from([0.2, 0.5, 0.9, 120]),
        "order": st.sampled_from(["variance", "random", "reverse"]),
        "skip_frozen_gradients": st.booleans(),
    }
)
TRAINER = st.fixed_dictionaries(
    {
        "precision": st.sampled_from(["32-true", "bf16-mixed", "bf16-true", "64-true", "16-mixed"]),
        "accumulate_grad_batches": st.sampled_from([1, 1, 2]),
        "gradient_clip_val": st.sampled_from([None, 0.5]),
    }
)


@pytest.mark.slow
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # to shrink a run of a Trainer takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.sampled_from(sorted(OPTIMIZERS)), ARGUMENTS, TRAINER, st.integers(2, 8))
def test_random_combinations_hold_frozen_bits_and_resume_to_the_bit(tmp_path, optimizer, arguments, trainer, after):
    """Frozen bits stay, live ones move, and an interrupted and resumed run ends with the unbroken one's bits."""
    if optimizer == "Adafactor":
        arguments = arguments | {"hold": "auto"}  # the others are refused
    if optimizer in ("ASGD", "NAdam") and trainer["precision"].endswith("-true"):
        trainer = trainer | {"precision": "32-true"}  # torch loads their scalars in the dtype of the parameters
    if "fused" in optimizer and "mixed" in trainer["precision"]:
        trainer = trainer | {"gradient_clip_val": None}  # Lightning refuses both

    def run(*more: pl.Callback, **kwargs: Any) -> tuple[GradCovFreezeCallback, Any, Any]:
        options = dict(trainer)
        if options["precision"] == "16-mixed":  # on a CPU it has to be asked for in this way
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            options |= {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
        callback = GradCovFreezeCallback(t0=3, seed=1, **arguments)
        witness = Witness(callback)
        module, done = fit(OPTIMIZERS[optimizer], witness, callback, *more, **options, **kwargs)
        if witness.steps >= 8 and 0 < callback.frozen_fraction < 1:  # a tensor may be too large for k
            witness.check()
        return callback, dict(module.state_dict()), done.optimizers[0].state_dict()

    callback, weights, state = run()
    assert callback.phase == "frozen"
    if trainer["precision"] == "64-true":  # Lightning loads the weights in float32, whatever the callbacks
        return
    path = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        run(SaveAndStop(path, 2 * after))
    again, other_weights, other_state = run(ckpt_path=path)
    cases.assert_identical(other_weights, weights)
    cases.assert_identical(other_state, state)
    cases.assert_identical(again.state_dict(), callback.state_dict())


@pytest.mark.parametrize(
    ("optimizer", "granularity"),
    [
        *((name, "element") for name in OPTIMIZERS if name != "Adafactor"),
        *itertools.product(["SGD momentum", "AdamW", "Adagrad"], ["row", "tensor"]),
    ],
)
def test_compact_and_restore_train_alike(optimizer, granularity):
    """To rounding, in float64. A granularity changes the masks only, so three optimizers try the others."""
    ends = []
    for hold, skips in (("compact", True), ("restore", False)):
        callback = GradCovFreezeCallback(t0=4, k=0.6, granularity=granularity, hold=hold, skip_frozen_gradients=skips)
        module, _ = fit(OPTIMIZERS[optimizer], callback, precision="64-true")
        assert callback.frozen_fraction > (0.03 if granularity == "tensor" else 0.5)
        ends.append(dict(module.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-9, atol=1e-11)


SIZE = sum(p.numel() for p in network().parameters())


class Look(cases.ResumableLoader):
    """Looks at the optimizer in the middle of training, ten steps after the freeze.

    From the loader: a callback that reads gradients would keep them where they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Any = None
        self.seen: dict[str, Any] = {}

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for batch in super().__iter__():
            if self.trainer is not None and self.trainer.global_step == 14:
                module, (optimizer,) = self.trainer.lightning_module, self.trainer.optimizers
                self.seen = {
                    "footprint": Footprint.of(optimizer),
                    "elements": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
                    "gradients": sum(p.grad.numel() for p in module.parameters() if p.grad is not None),
                    "saved": copy.deepcopy(optimizer.state_dict()),
                    "requires_grad": [name for name, p in module.named_parameters() if p.requires_grad],
                }
            yield batch


@pytest.mark.parametrize("hold", ["compact", "auto"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compact_optimizer_has_state_and_gradients_of_live_elements_only(hold, granularity):
    """A checkpoint has the state in full shape."""
    callback = GradCovFreezeCallback(t0=4, k=0.9, granularity=granularity, hold=hold)
    look = Look()
    module, trainer = fit(adamw, callback, look=look)
    live = sum(int((~mask).sum()) for mask in callback.frozen.values())
    assert 0 < live < 0.4 * SIZE
    assert look.seen["elements"] == live
    assert look.seen["footprint"].gradients == 4 * live
    assert look.seen["footprint"].state == pytest.approx(2 * 4 * live, abs=4 * 10)  # and the counts of steps
    assert look.seen["gradients"] <= live  # of what stayed in the optimizer as it is
    shapes = [p.shape for p in module.parameters()]
    assert [look.seen["saved"]["state"][i]["exp_avg"].shape for i in range(len(shapes))] == shapes
    assert trainer.optimizers[0].param_groups[0]["params"] == list(module.parameters())  # let go of at the end
    assert all(p.requires_grad for p in module.parameters())


def test_restore_reports_no_saving_of_state():
    """The control of the test above."""
    callback = GradCovFreezeCallback(t0=4, k=0.9, hold="restore", skip_frozen_gradients=False)
    look = Look()
    fit(adamw, callback, look=look)
    assert look.seen["elements"] == SIZE
    assert callback.savings.before == callback.savings.after
    assert callback.savings.weight_gradient_flops_skipped == 0


def test_savings_equal_counts_by_hand():
    """State, gradients and FLOPs, for whole rows; the index costs bytes, and activations are not saved."""
    callback = GradCovFreezeCallback(t0=4, k=0.6, granularity="row")
    look = Look()
    fit(adamw, callback, look=look)
    savings, frozen = callback.savings, callback.frozen
    live = {name: int((~mask).sum()) for name, mask in frozen.items()}
    assert savings.before == Footprint(2 * 4 * SIZE + 4 * len(frozen), 4 * SIZE)
    assert savings.after == look.seen["footprint"]
    flops = {"network.1.weight": 8 * 5, "network.5.weight": 8, "network.7.weight": 8}
    for name, positions in flops.items():
        of_name = savings.parameters[name]
        assert (of_name.elements, of_name.frozen) == (frozen[name].numel(), frozen[name].numel() - live[name])
        assert of_name.flops == 2 * positions * frozen[name].numel()
        rows = int(frozen[name].flatten(1).all(1).sum())
        assert of_name.flops_skipped == 2 * positions * rows * frozen[name][0].numel()
    assert savings.parameters["network.2.weight"].flops is None
    total = sum(2 * p * frozen[n].numel() for n, p in flops.items())
    assert savings.weight_gradient_flops_skipped == pytest.approx(
        sum(savings.parameters[n].flops_skipped for n in flops) / total
    )
    assert 0 < savings.index_bytes <= 8 * len(frozen) * 6
    assert "activations" in savings.not_saved
    table = savings.table()
    for said in ("network.5.weight", "Optimizer state  1.8 KiB -> ", "Not saved"):
        assert said in table


def test_table_of_savings_is_printed_once_and_its_numbers_are_logged(caplog):
    """At the freeze, on the console; as scalars at every logged step."""

    class Logger(pl.loggers.CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append(metrics)

    logged: list[dict[str, float]] = []
    callback = GradCovFreezeCallback(t0=4, k=0.9, log_every_n_steps=1)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(adamw, callback, logger=Logger("unused"), log_every_n_steps=1)
    assert caplog.text.count("Optimizer state") == 1
    tags = {"gcfreeze/optimizer_state_bytes", "gcfreeze/gradient_bytes", "gcfreeze/weight_gradient_flops_skipped"}
    with_tags = [metrics for metrics in logged if tags <= metrics.keys()]
    assert len(with_tags) == 18 - 4 + 1
    assert with_tags[-1]["gcfreeze/gradient_bytes"] == callback.savings.after.gradients


def test_savings_are_equal_after_resuming(tmp_path):
    """Also those that only the step before the freeze could count."""
    first = GradCovFreezeCallback(t0=4, k=0.6, granularity="row")
    with pytest.raises(Interrupted):
        fit(adamw, first, SaveAndStop(tmp_path / "run.ckpt", 9))
    assert first.savings is not None
    again = GradCovFreezeCallback(t0=4, k=0.6, granularity="row")
    assert again.savings is None
    fit(adamw, again, ckpt_path=tmp_path / "run.ckpt")
    assert again.savings == first.savings


def test_hold_may_change_when_resuming(tmp_path):
    """The decision is the same, and both kinds load the saved state of the optimizer."""
    with pytest.raises(Interrupted):
        fit(adamw, GradCovFreezeCallback(t0=4, k=0.6, hold="compact"), SaveAndStop(tmp_path / "run.ckpt", 9))
    ends = []
    for hold in HOLDS:
        module, _ = fit(adamw, GradCovFreezeCallback(t0=4, k=0.6, hold=hold), ckpt_path=tmp_path / "run.ckpt")
        ends.append(dict(module.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-5, atol=1e-6)


def test_optimizer_that_mixes_elements_is_refused_by_compact_and_restored_by_auto():
    """The error names it."""
    callback = GradCovFreezeCallback(t0=4, k=0.5, hold="compact")
    with pytest.raises(MisconfigurationException, match=r"Adafactor is not known to treat.*hold='restore'"):
        fit(OPTIMIZERS["Adafactor"], callback)
    callback = GradCovFreezeCallback(t0=4, k=0.5, hold="auto")
    look = Look()
    fit(OPTIMIZERS["Adafactor"], callback, look=look)
    assert look.seen["elements"] == SIZE


def test_first_tensor_larger_than_k_freezes_nothing_and_warns():
    """The first tensor in the order is larger than k: a warning, no silent nothing."""
    callback = GradCovFreezeCallback(t0=4, k=3, granularity="tensor", order="reverse", exclude="*bias")
    with pytest.warns(UserWarning, match="the first tensor in the order has more than"):
        fit(adamw, callback)
    assert callback.frozen_fraction == 0


@pytest.mark.parametrize("hold", HOLDS)
def test_norm_for_clipping_is_that_of_live_gradients(hold):
    """As computed over the optimizer's parameter groups."""
    norms: list[float] = []

    class Clipping(cases.Regression):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            if callback.phase == "frozen":
                live = [p for group in optimizer.param_groups for p in group["params"]]
                norms.append(float(nn.utils.clip_grad_norm_(live, 1e9)))
                grads = torch.autograd.grad(self.training_step(*batches[-1]), list(self.parameters()))
                masks = callback.frozen.values()
                expected.append(float(torch.cat([g[~m] for g, m in zip(grads, masks, strict=True)]).norm()))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            batches.append((batch, batch_idx))

    batches: list[Any] = []
    expected: list[float] = []
    callback = GradCovFreezeCallback(t0=4, k=0.5, order="reverse", skip_frozen_gradients=False, hold=hold)
    cases.trainer(callbacks=[callback]).fit(Clipping(cases.mlp(), adamw), cases.loader())
    assert len(norms) == 12
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


@pytest.mark.parametrize("k", [1.0, 0.0])
@pytest.mark.parametrize("scaled", [True, False])
def test_all_elements_freeze_with_k_1_and_none_with_k_0(k, scaled):
    """With everything frozen no weight moves, with nothing frozen all do; also with a loss scaler."""
    kwargs: dict[str, Any] = {}
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        kwargs["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    callback = GradCovFreezeCallback(t0=4, k=k)
    weights: list[Any] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: pl.LightningModule, *args: Any) -> None:
            weights.append({n: bits(p) for n, p in module.named_parameters()})

    fit(adamw, Keep(), callback, **kwargs)
    for before, after in itertools.pairwise(weights[3:]):
        assert all(torch.equal(before[n], after[n]) == (k == 1.0) for n in ("network.5.weight", "network.7.weight"))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("whole", [True, False], ids=["LightningModule", "network"])
def test_compiled_module_trains_on_with_frozen_tensors_skipped(granularity, whole):
    """Layers get no hooks, which would make the compiler trace them again."""
    torch.compiler.reset()
    callback = GradCovFreezeCallback(t0=4, k=0.9, granularity=granularity)
    compiled = partial(torch.compile, backend="aot_eager")
    module = cases.Regression(network() if whole else compiled(network()), adamw)
    witness = Witness(callback)
    trainer = cases.trainer(callbacks=[witness, callback], max_epochs=3)
    trainer.fit(compiled(module) if whole else module, cases.ResumableLoader())
    witness.check()
    assert callback.savings.without_backward
    assert callback.savings.weight_gradient_flops_skipped == 0  # none was counted
    torch.compiler.reset()


def test_parameter_frozen_by_the_user_keeps_requires_grad_false():
    """It is not eligible."""
    module = cases.Regression(network(), lambda p: adamw([q for q in p if q.requires_grad]))
    module.network[1].requires_grad_(False)
    callback = GradCovFreezeCallback(t0=4, k=0.9, granularity="tensor")
    cases.trainer(callbacks=[callback], max_epochs=3).fit(module, cases.ResumableLoader())
    assert "network.1.weight" not in callback.frozen
    assert callback.savings.without_backward
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["network.1.weight"]


def test_checkpoint_of_a_compact_run_trains_on_without_the_callback(tmp_path):
    """Saved after the freeze, loaded in a Trainer without the callback: everything trains again."""
    with pytest.raises(Interrupted):
        fit(adamw, GradCovFreezeCallback(t0=4, k=0.9, granularity="row"), SaveAndStop(tmp_path / "run.ckpt", 9))
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        module, _ = fit(adamw, ckpt_path=tmp_path / "run.ckpt")
    assert all((p != saved["state_dict"][n]).any() for n, p in module.named_parameters())
    for group in saved["optimizer_states"][0]["param_groups"]:
        assert len(group["params"]) == len(list(module.parameters()))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows_and_tensors_freeze_whole_while_they_fit_into_k(granularity):
    """Ranks up to their count are the frozen ones."""
    callback = GradCovFreezeCallback(t0=4, k=100, granularity=granularity)
    fit(adamw, callback)
    count = sum(int(mask.sum()) for mask in callback.frozen.values())
    assert count == 100 if granularity == "element" else 0 < count <= 100
    for name, mask in callback.frozen.items():
        assert torch.equal(callback.ranks[name] <= count, mask)
        units = mask.flatten(1) if granularity == "row" and mask.dim() > 1 else mask.reshape(1, -1)
        if granularity == "tensor" or (mask.dim() > 1 and granularity == "row"):
            assert (units.all(1) == units.any(1)).all()


def test_default_hold_is_auto_by_element_with_gradients_skipped():
    """What a user gets who says nothing."""
    callback = GradCovFreezeCallback(t0=4, k=0.5)
    assert (callback.hold, callback.granularity, callback.skip_frozen_gradients) == ("auto", "element", True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_delta_turns_the_weights_of_t0_into_those_at_the_end(tmp_path, granularity):
    """Everything that moved is in it, BatchNorm's statistics too; before t0 and without the module an error says so."""
    callback = GradCovFreezeCallback(t0=4, k=0.6, granularity=granularity)
    with pytest.raises(RuntimeError, match="no delta before step t0=4"):
        callback.delta()
    base = cases.Regression(network())

    class AtFreeze(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: pl.LightningModule, *args: Any) -> None:
            if callback.phase == "frozen" and trainer.global_step == 4:
                base.load_state_dict(module.state_dict())

    module, _ = fit(adamw, AtFreeze(), callback)
    found = callback.delta(tmp_path / "delta.safetensors")
    read = delta.load(tmp_path / "delta.safetensors")
    cases.assert_identical({key: tensor for key, tensor in read.items() if key != "digest"}, found)
    cases.assert_identical(delta.load(load_file(tmp_path / "delta.safetensors")), read)
    assert any((p != q).any() for p, q in zip(base.parameters(), module.parameters(), strict=True))
    apply_delta(base, tmp_path / "delta.safetensors")
    cases.assert_identical(dict(base.state_dict()), dict(module.state_dict()))
    with pytest.raises(RuntimeError, match="The module of the last run is not known here"):
        copy.deepcopy(callback).delta()


@pytest.mark.parametrize("without", [{0}, {1}, {0, 1}], ids=str)
def test_micro_batches_without_a_loss_train_alike_under_both_holds(without):
    """The first, the last or both of a step give no loss: the others count, and nothing is left over."""

    class Some(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            skipped = batch_idx % 2 in without and batch_idx % 4 >= 2 and callback.phase == "frozen"
            return None if skipped else super().training_step(batch, batch_idx)

    ends = []
    for hold in HOLDS:
        callback = GradCovFreezeCallback(t0=2, k=0.5, hold=hold, skip_frozen_gradients=False)
        module = Some(network(), OPTIMIZERS["SGD momentum"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*returned `None`")
            cases.trainer(callbacks=[callback], max_epochs=1, accumulate_grad_batches=2).fit(module, cases.loader(4))
        ends.append(dict(module.state_dict()))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-5, atol=1e-6)


def test_flops_of_a_step_that_is_retried_are_counted_once():
    """A loss scaler skips the first attempts at step t0."""
    callback = GradCovFreezeCallback(t0=1, k=0.5, granularity="row")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    fit(adamw, callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_epochs=8)
    assert scaler.get_scale() < 2.0**39
    assert callback.savings.parameters["network.5.weight"].flops == 2 * 8 * 180


class Leaky(cases.Regression):
    """Asks for gradients of its own inside of a training step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (super().training_step(batch, batch_idx) * 100).backward()
        return super().training_step(batch, batch_idx)


class Clamped(cases.Regression):
    """Keeps its weights small by writing them."""

    def on_train_batch_end(self, *args: Any) -> None:
        for p in self.parameters():
            p.data.clamp_(-0.3, 0.3)


@pytest.mark.filterwarnings("ignore:.*other values of frozen elements")  # clamped after the last step
@pytest.mark.parametrize("kind", [Leaky, Clamped])
def test_modules_that_write_gradients_or_weights_train_alike_under_both_holds(kind):
    """One calls backward within its training step, the other clamps its weights."""
    ends = []
    for hold in HOLDS:
        callback = GradCovFreezeCallback(
            t0=4, k=0.5, hold=hold, skip_frozen_gradients=hold == "compact", gradients="capture"
        )
        module = kind(cases.mlp(torch.float64), OPTIMIZERS["SGD"])
        trainer = cases.trainer(callbacks=[callback], max_epochs=2)
        trainer.fit(module, cases.loader(dtype=torch.float64))
        ends.append((module.state_dict(), callback.frozen))
    for name, value in ends[0][0].items():
        live = ~ends[0][1][name]
        torch.testing.assert_close(value[live], ends[1][0][name][live], rtol=1e-9, atol=1e-11)


class Watching(cases.Regression):
    """Looks at every parameter's gradient, where Lightning invites to."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norm = torch.cat([p.grad.flatten() for p in self.parameters()]).norm()


@pytest.mark.parametrize("hold", ["auto", "compact"])
def test_gradients_are_kept_for_code_that_may_read_them(hold, caplog):
    """The log says what that costs: gradients are not saved, the optimizer's state is."""
    norms = []
    for how in (hold, "restore"):
        callback = GradCovFreezeCallback(t0=4, k=0.9, granularity="tensor", hold=how)
        module = Watching(network(), adamw)
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            cases.trainer(callbacks=[callback]).fit(module, cases.ResumableLoader())
        norms.append(module.norm)
        if how == hold:
            assert "Watching.on_before_optimizer_step may look at gradients" in caplog.text
            assert callback.savings.before.gradients == callback.savings.after.gradients
            assert callback.savings.after.state < 0.2 * callback.savings.before.state
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0.0)


def test_embedding_with_max_norm_is_restored_by_auto_and_refused_by_compact():
    """It writes frozen rows in each forward pass."""

    class Words(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.words = nn.Embedding(7, 3, max_norm=0.5)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.words((batch[0] * 10).long().remainder(7)).sum((1, 2)) - batch[1][:, 0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    callback = GradCovFreezeCallback(t0=6, k=0.5)
    witness = Witness(callback)
    cases.trainer(callbacks=[witness, callback]).fit(Words(), cases.loader())
    witness.check()
    with pytest.raises(MisconfigurationException, match="words: an embedding with `max_norm`"):
        cases.trainer(callbacks=[GradCovFreezeCallback(t0=6, k=0.5, hold="compact")]).fit(Words(), cases.loader())


def test_step_without_any_live_parameter_changes_nothing():
    """Two heads take turns, and one of them is frozen with all layers before it."""

    class Heads(cases.Regression):
        def __init__(self) -> None:
            super().__init__(nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 1), nn.Linear(4, 1)]), OPTIMIZERS["SGD"])

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            trunk, *heads = self.network
            return nn.functional.mse_loss(heads[batch_idx % 2](torch.tanh(trunk(batch[0]))), batch[1])

    def second_head_last(evidence: Any) -> Any:
        return {n: torch.full_like(w, float("network.2" in n)) for n, w in evidence.weights.items()}

    callback = GradCovFreezeCallback(t0=2, k=29, order=second_head_last)
    witness = Witness(callback)
    cases.trainer(callbacks=[witness, callback]).fit(Heads(), cases.loader())
    witness.check()
    assert len(callback.savings.without_backward) == 4


def test_parameters_hidden_from_autograd_are_refused_also_when_captured():
    """Behind a frozen layer, reentrant checkpoints would have no gradient at all."""

    class Hidden(cases.Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = batch[0].clone().requires_grad_()
            return nn.functional.mse_loss(checkpoint(self.network, x, use_reentrant=True), batch[1])

    callback = GradCovFreezeCallback(t0=3, k=0.5, gradients="capture")
    with pytest.raises(MisconfigurationException, match="use_reentrant"):
        cases.trainer(callbacks=[callback]).fit(Hidden(cases.mlp(), adamw), cases.loader())


class ClipsInBackward(cases.Regression):
    """Clips all gradients together where they come from."""

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(loss, *args, **kwargs)
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)


@pytest.mark.parametrize("after", [3, 7, 12])
@pytest.mark.parametrize("hold", ["auto", *HOLDS])
def test_run_whose_code_reads_gradients_resumes_to_the_bit(hold, after, tmp_path):
    """Before and after the freeze; a checkpoint has the optimizer's state in full shape."""

    def run(*more: pl.Callback, path: Path | None = None) -> dict[str, Any]:
        callback = GradCovFreezeCallback(t0=5, k=0.6, hold=hold)
        trainer = cases.trainer(callbacks=[callback, *more], max_epochs=3)
        module = ClipsInBackward(network(), adamw)
        trainer.fit(module, cases.ResumableLoader(), ckpt_path=path, weights_only=True if path else None)
        return {"weights": dict(module.state_dict()), "optimizer": trainer.optimizers[0].state_dict()}

    unbroken = run()
    path = tmp_path / "run.ckpt"
    with pytest.raises(Interrupted):
        run(SaveAndStop(path, after))
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    assert [state["exp_avg"].shape for state in saved.values()] == [p.shape for p in network().parameters()]
    cases.assert_identical(run(path=path), unbroken)


@pytest.mark.filterwarnings("ignore:.*deprecated")  # both, by torch 2.15
def test_module_can_be_traced_during_training_and_scripting_is_refused():
    """After the freeze; the trace gives what the module gives."""
    said = []

    class Traces(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
            if trainer.global_step != 12:
                return
            x = torch.randn(3, 5)
            torch.testing.assert_close(torch.jit.trace(module.network, x)(x), module.network(x))
            with pytest.raises(RuntimeError, match="cannot be scripted during training") as error:
                torch.jit.script(module.network)
            said.append(str(error.value))

    callback = GradCovFreezeCallback(t0=4, k=0.8, granularity="row")
    module = cases.Regression(cases.mlp())
    cases.trainer(callbacks=[callback, Traces()]).fit(module, cases.loader())
    assert callback.savings.weight_gradient_flops_skipped > 0
    assert len(said) == 1
    torch.jit.script(module.network)  # after the fit


def test_two_callbacks_in_one_trainer_are_refused():
    """Also two classes, whose states Lightning could tell apart: one optimizer serves one callback."""

    class Mine(GradCovFreezeCallback):
        """Another key in checkpoints."""

    for second in (Mine, GradCovFreezeCallback):
        callbacks = [GradCovFreezeCallback(t0=4, k=0.5, include="*.weight"), second(t0=4, k=0.5, include="*.bias")]
        with pytest.raises(MisconfigurationException, match=r"serves one only.*FreezeSchedule"):
            fit(adamw, *callbacks)

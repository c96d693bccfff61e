"""Whole runs of `transformers.Trainer` with the callback: against `Freezer` in a loop by hand, resumed, evaluated."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, get_scheduler

from lightning_gcfreeze import Freezer, FreezeSchedule, Growth, apply_delta
from lightning_gcfreeze.huggingface import GradCovFreezeTrainerCallback
from tests import cases
from tests.huggingface.tiny import HARD, Collator, Weights, arguments, bert, gpt2, llama, samples, texts, train
from tests.oracles.learning_rate import multiply_by_hand
from tests.witnesses import Spy

# Sequences of a few tokens do not show all of the vocabulary.
pytestmark = pytest.mark.filterwarnings("ignore:.* never had a gradient")

OPTIONS: dict[str, dict[str, Any]] = {
    "variance": {"t0": 3, "k": 0.5},
    "progress": {"t0": 3, "k": 0.5, "order": "progress"},
    "momentum": {"t0": 3, "k": 0.5, "order": "momentum"},
    "movement": {"t0": 3, "k": 0.5, "order": "movement"},
}


def results(model: nn.Module, optimizer: Any, freezer: Freezer) -> dict[str, Any]:
    return {
        "weights": dict(model.state_dict()),
        "optimizer": optimizer.state_dict()["state"],
        "frozen": freezer.frozen,
        "variance": freezer.variance,
    }


def of(trainer: Trainer) -> dict[str, Any]:
    return results(trainer.model, trainer.optimizer, trainer.freezing.freezer)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_callback_gives_the_bits_of_a_freezer_in_a_loop_by_hand(tmp_path, name, accumulate):
    """AdamW with weight decay, a linear schedule, clipping and dropout; the last step of an epoch is short."""
    model = bert()
    model.accepts_loss_kwargs = False  # so the Trainer divides each loss by the micro-batches of its step
    trainer = train(
        tmp_path, OPTIONS[name], Weights(), model=model, gradient_accumulation_steps=accumulate, **HARD
    )  # fmt: skip

    model, batches = bert(), trainer.data_collator.batches
    optimizer = Trainer(model, arguments(tmp_path, **HARD)).create_optimizer()  # two groups, one without weight decay
    n_steps = 2 * -(-7 // accumulate)
    schedule = get_scheduler("linear", optimizer, 0, n_steps)
    freezer = Freezer(model, optimizer, loss=loss_of, planned_steps=n_steps, **OPTIONS[name])
    model.train()
    windows = [epoch[i : i + accumulate] for epoch in (batches[:7], batches[7:]) for i in range(0, 7, accumulate)]
    for step, window in enumerate(windows):
        torch.manual_seed(1000 + step)
        for i, batch in enumerate(window):
            freezer.begin_batch(batch)
            loss = loss_of(model, batch)
            freezer.before_backward(loss, 1 / len(window))
            (loss / len(window)).backward()
            freezer.after_backward(is_last=i == len(window) - 1)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        model.zero_grad()
    freezer.close()
    cases.assert_identical(of(trainer), results(model, optimizer, freezer))
    assert freezer.steps == trainer.state.global_step == n_steps
    assert freezer.frozen_fraction == pytest.approx(0.5, abs=1e-3)


def test_frozen_elements_keep_their_bits_while_live_ones_move_and_the_delta_rebuilds_the_model(tmp_path):
    """Weight decay would move every element of a matrix."""
    weights = Weights()
    trainer = train(tmp_path, OPTIONS["variance"], weights, **HARD)
    start = bert()
    start.load_state_dict(weights.before[3], strict=False)
    for name, mask in trainer.freezing.freezer.frozen.items():
        p, before = trainer.model.get_parameter(name), weights.before[3][name]
        assert torch.equal(p[mask].view(torch.int32), before[mask].view(torch.int32))
        if p.dim() == 2 and not name.endswith("LayerNorm.weight"):
            assert (p[~mask] != before[~mask]).all()
    apply_delta(start, trainer.freezing.freezer.delta())
    cases.assert_identical(dict(start.state_dict()), dict(trainer.model.state_dict()))


@pytest.mark.parametrize(("make", "data", "accumulate"), [(bert, samples, 1), (lambda: gpt2(0.1), texts, 2)])
def test_resumed_at_any_checkpoint_has_the_bits_of_the_unbroken_run(tmp_path, make, data, accumulate):
    """Before and after the freeze, in the middle and at the end of an epoch; dropout draws random numbers."""
    options = {
        "save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": accumulate, "max_steps": 6, **HARD
    }  # fmt: skip
    unbroken = train(tmp_path, OPTIONS["variance"], model=make(), data=data(), **options)
    for stop in range(1, 6):
        options["save_strategy"] = "no"
        checkpoint = str(tmp_path / f"checkpoint-{stop}")
        resumed = train(tmp_path, OPTIONS["variance"], model=make(), data=data(), ckpt=checkpoint, **options)
        cases.assert_identical(of(resumed), of(unbroken))
        assert resumed.freezing.freezer.steps == 6
    saved = torch.load(tmp_path / "checkpoint-2" / "gcfreeze.pt", weights_only=True)
    assert saved["steps"] == 2


@pytest.mark.parametrize(("make", "data"), [(gpt2, texts), (llama, texts), (lambda: bert(0.0), samples)])
def test_second_moment_is_that_of_the_mean_gradients_of_all_targets_of_each_step(tmp_path, make, data):
    """Three micro-batches a step, with varying numbers of labels, against one batch of all in NumPy's float64."""
    weights, spy = Weights(), Spy()
    options = {"t0": 5, "k": 0.5, "order": spy}
    trainer = train(
        tmp_path, options, weights, model=make(), data=data(), gradient_accumulation_steps=3, num_train_epochs=2,
        max_grad_norm=1e-3,
    )  # fmt: skip
    batches, model = trainer.data_collator.batches, make()
    windows = [batches[:3], batches[3:6], batches[6:7], batches[7:10], batches[10:13]]
    squares: dict[str, list[Any]] = {name: [] for name in spy.second_moment}
    for before, window in zip(weights.before, windows, strict=False):
        model.load_state_dict(before, strict=False)
        model.zero_grad()
        parts = [(loss_of(model, batch), int((batch["labels"] != -100).sum())) for batch in window]
        if data is texts:  # a sequence's first label is not predicted
            parts = [(loss, n - len(batch["labels"])) for (loss, n), batch in zip(parts, window, strict=True)]
        (sum(loss * n for loss, n in parts) / sum(n for _, n in parts)).backward()
        for name, p in model.named_parameters():
            squares[name].append(p.grad.double().numpy() ** 2)
    for name, found in spy.second_moment.items():
        expected = torch.as_tensor(sum(squares[name]) / 5)
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-14)


class Disturbing(TrainerCallback):
    """Copies the model, and runs it and its copy, between steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        batch = Collator()(samples(2))
        copied = copy.deepcopy(model)
        copied(**batch).loss.backward()
        with torch.no_grad():
            model(**batch)


def test_evaluation_saving_and_passes_of_others_leave_no_trace(tmp_path):
    """Dropout is seeded by the step, so that only the callback could make a difference."""
    plain = train(tmp_path, OPTIONS["variance"], Weights(), **HARD)
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    logs = {"logging_strategy": "steps", "logging_steps": 1}
    busy = train(tmp_path, OPTIONS["variance"], Disturbing(), Weights(), **HARD, **often, **logs)
    cases.assert_identical(of(busy), of(plain))
    assert not busy.model._forward_hooks
    assert not busy.model._forward_pre_hooks


def test_callback_that_freezes_nothing_yet_leaves_training_as_it_is(tmp_path):
    """The same bits as without the callback, up to t0."""
    with pytest.warns(UserWarning, match="Nothing was frozen"), pytest.warns(UserWarning, match="No step will train"):
        watched = train(tmp_path, {"t0": 99, "k": 0.5}, gradient_accumulation_steps=3, **HARD)
    free = Trainer(bert(), arguments(tmp_path, gradient_accumulation_steps=3, **HARD), train_dataset=samples())
    free.train()
    cases.assert_identical(dict(watched.model.state_dict()), dict(free.model.state_dict()))


@pytest.mark.parametrize("best", [2, 6], ids=["before the freeze", "after the freeze"])
def test_best_weights_are_in_the_model_after_the_end(tmp_path, best):
    """The Trainer loads them after the last step: the frozen elements must not be put back over them."""

    class Metric:
        calls = 0

        def __call__(self, _: Any) -> dict[str, float]:
            self.calls += 1
            return {"distance": float(abs(self.calls * 2 - best))}

    freezing, weights = GradCovFreezeTrainerCallback(**OPTIONS["variance"]), Weights()
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "distance", "greater_is_better": False,
    }  # fmt: skip
    trainer = Trainer(
        bert(), arguments(tmp_path, **options, **HARD), train_dataset=samples(), eval_dataset=samples(4),
        compute_metrics=Metric(), callbacks=[freezing, weights, EarlyStoppingCallback(3)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == best
    assert trainer.state.global_step == best + 6  # stopped early
    cases.assert_identical({n: p.detach() for n, p in trainer.model.named_parameters()}, weights.before[best])


def test_monitored_loss_of_each_evaluation_decides_whether_more_freezes(tmp_path):
    """A metric that never rises lets every stage freeze."""
    growth = Growth(monitor="eval_loss", max_loss_increase=10.0, every=2, stages=3, most=0.9, forecast=False)
    options = {"t0": 2, "k": growth, "order": "progress"}
    trainer = train(tmp_path, options, eval_strategy="steps", eval_steps=1, num_train_epochs=2)
    assert trainer.freezing.freezer.frozen_fraction == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize("hold", ["compact", "restore"])
def test_stages_that_thaw_are_held_in_either_way(tmp_path, hold):
    """The fraction falls and rises again."""
    options = {"schedule": FreezeSchedule([(2, 0.6), (4, 0.3), (6, 0.5)], monotone=False), "order": "progress"}
    trainer = train(tmp_path, options | {"hold": hold, "granularity": "tensor"}, num_train_epochs=2)
    assert trainer.freezing.freezer.frozen_fraction == pytest.approx(0.5, abs=0.05)


def test_optimizer_and_schedule_of_the_user_are_followed(tmp_path):
    """Accelerate wraps both."""
    model = bert()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = train(
        tmp_path, OPTIONS["variance"], model=model, optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd))
    )
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    assert trainer.freezing.freezer.steps == 7
    assert trainer.freezing.freezer.frozen_fraction == pytest.approx(0.5, abs=1e-3)


def test_train_called_again_freezes_anew(tmp_path):
    """The first freezer has let go of the optimizer, which the second run goes on with."""
    trainer = train(tmp_path, OPTIONS["variance"])
    first = trainer.freezing.freezer
    kept = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    second = trainer.freezing.freezer
    assert second is not first
    assert first.steps == second.steps == 7
    assert any((p[first.frozen[n]] != kept[n][first.frozen[n]]).any() for n, p in trainer.model.named_parameters())


def test_user_callback_that_reads_gradients_sees_zeros_where_elements_are_frozen(tmp_path):
    """Right before the optimizer's step, where the Trainer logs norms."""
    seen: list[dict[str, Tensor]] = []

    class Reads(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append({name: p.grad.clone() for name, p in model.named_parameters()})

    frozen = train(tmp_path, OPTIONS["variance"], Reads()).freezing.freezer.frozen
    assert all(any(gradients[name][mask].any() for name, mask in frozen.items()) for gradients in seen[:3])
    assert not any(gradients[name][mask].any() for gradients in seen[3:] for name, mask in frozen.items())
    assert all(any(g[name][~mask].any() for name, mask in frozen.items()) for g in seen)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by transformers, read by PEFT
def test_adapters_of_peft_freeze_and_resume(tmp_path):
    """The Trainer saves and loads the adapters only."""
    peft = pytest.importorskip("peft")

    def adapted() -> nn.Module:
        return peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2))

    options = {"save_strategy": "steps", "save_steps": 5, **HARD}
    unbroken = train(tmp_path, OPTIONS["variance"], model=adapted(), **options)
    checkpoint = str(tmp_path / "checkpoint-5")
    resumed = train(tmp_path, OPTIONS["variance"], model=adapted(), ckpt=checkpoint, **options)
    cases.assert_identical(of(resumed), of(unbroken))
    assert all("lora" in name or "classifier" in name for name in unbroken.freezing.freezer.frozen)


def test_factor_after_the_freeze_is_that_of_rates_multiplied_by_hand_and_not_in_the_logged_rate(tmp_path):
    """AdamW with two groups, a linear schedule with warm-up, and clipping."""

    class Hand(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            multiply_by_hand(getattr(optimizer, "optimizer", optimizer), lambda t: 0.25 if t > 3 else 1.0)

    options = {**HARD, "warmup_steps": 5, "logging_strategy": "steps", "logging_steps": 1}
    runs = {}
    for name, factor, more in (("found", 0.25, []), ("by hand", None, [Hand()]), ("without", None, [])):
        runs[name] = train(tmp_path, OPTIONS["variance"] | {"lr_after_freeze": factor}, Weights(), *more, **options)
    cases.assert_identical(of(runs["found"]), of(runs["by hand"]))
    logged = {
        name: [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
        for name, run in runs.items()
    }
    assert logged["found"] == logged["without"]
    assert len(set(logged["found"])) > 5
    weights = [dict(runs[name].model.state_dict()) for name in ("found", "without")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert runs["found"].freezing.freezer.metrics()["gcfreeze/lr_factor"] == 0.25

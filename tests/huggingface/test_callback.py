"""What the callback tells a `Freezer`, in whose place a recorder writes events down; and what the callback refuses."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from lightning_gcfreeze.huggingface import GradCovFreezeTrainerCallback, callback
from tests.huggingface.tiny import arguments, bert, gpt2, llama, samples, texts

STEP = ["on_pre_optimizer_step", "pre_step", "step", "on_optimizer_step"]


class Recorder:
    """Takes the place of `Freezer`: writes events down, and the losses and weights that come with them."""

    made: list["Recorder"]
    on_last: Callable[["Recorder"], None] = staticmethod(lambda recorder: None)
    """Called at the end of the last backward pass of a step."""

    def __init__(self, module: nn.Module, optimizer: Any, *, loss: Any, **options: Any) -> None:
        self.module, self.optimizer, self.loss, self.options = module, optimizer, loss, options
        self.events: list[str] = []
        self.batches: list[dict[str, Tensor]] = []
        self.losses: list[float] = []
        self.weights: list[float] = []
        self.n_states_at_start = len(optimizer.state)
        self.steps = 0
        self.hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.events.append("pre_step")),
            optimizer.register_step_post_hook(self.after_step),
        ]
        self.made.append(self)

    def after_step(self, *_: Any) -> None:
        self.steps += 1
        self.events.append("step")

    def begin_batch(self, batch: dict[str, Tensor]) -> None:
        self.events.append("begin_batch")
        self.batches.append(batch)

    def before_backward(self, loss: Tensor, weight: Tensor) -> None:
        self.events.append("before_backward")
        assert loss.dim() == 0
        assert loss.requires_grad
        self.losses.append(float(loss.detach()))
        self.weights.append(float(weight))

    def after_backward(self, is_last: bool, share: Tensor | None) -> None:
        assert share is None  # with one process
        self.events.append(f"after_backward:{is_last}")
        if is_last:
            type(self).on_last(self)

    def state_dict(self) -> dict[str, Any]:
        self.events.append("state_dict")
        return {"steps": self.steps, "tensor": torch.arange(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.events.append("load_state_dict")
        self.steps = state["steps"]

    def close(self) -> None:
        self.events.append("close")
        for hook in self.hooks:
            hook.remove()


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "made", [], raising=False)
    monkeypatch.setattr(callback, "Freezer", Recorder)
    return Recorder


class Witness(TrainerCallback):
    """Writes each event of the Trainer's among the Freezer's."""

    def __init__(self, freezing: GradCovFreezeTrainerCallback) -> None:
        self.freezing = freezing
        for name in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
            setattr(self, name, lambda *_, name=name, **__: self.note(name))

    def note(self, name: str) -> None:
        if self.freezing.freezer is not None:
            self.freezing.freezer.events.append(name)


def made(
    folder: Path, model: Any = None, data: Any = None, cls: Any = Trainer, loss: Any = None, **options: Any
) -> Any:
    """Return a Trainer with the callback as `.freezing`; `options` are of the Trainer or of its arguments."""
    own = {n: options.pop(n) for n in ("optimizers", "compute_loss_func", "model_init") if n in options}
    freezing = GradCovFreezeTrainerCallback(2, 0.5, loss=loss)
    trainer = cls(
        None if "model_init" in own else model or bert(), arguments(folder, **options),
        train_dataset=data or samples(), eval_dataset=samples(4), callbacks=[freezing, Witness(freezing)], **own,
    )  # fmt: skip
    trainer.freezing = freezing
    return trainer


def trained(*args: Any, **kwargs: Any) -> Any:
    trainer = made(*args, **kwargs)
    trainer.train()
    return trainer


def test_events_without_accumulation_come_in_the_order_of_a_step(tmp_path):
    """The freezer gets torch's optimizer, the number of steps and no loss scaler; "fp16" means nothing on a CPU."""
    trainer = trained(tmp_path, fp16=True)
    step = ["on_step_begin", "begin_batch", "before_backward", "after_backward:True", *STEP, "on_step_end"]
    end = ["on_epoch_end", "on_log", "close", "on_train_end"]
    freezer = trainer.freezing.freezer
    assert freezer.events == ["on_train_begin", "on_epoch_begin", *step * 7, *end]
    assert type(freezer.optimizer) is torch.optim.AdamW
    expected = {"scaler": None, "data_parallel": False, "planned_steps": 7, "t0": 2, "k": 0.5}
    assert freezer.options == expected


def test_events_with_accumulation_evaluation_saving_and_logging_come_in_the_order_of_a_step(tmp_path):
    """Of seven batches, three a step, the last step has one."""
    every_two = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trained(tmp_path, gradient_accumulation_steps=3, logging_strategy="steps", logging_steps=1, **every_two)
    micro = ["begin_batch", "before_backward", "after_backward:False", "on_substep_end"]
    last = ["begin_batch", "before_backward", "after_backward:True", *STEP, "on_step_end", "on_log"]
    evaluated = ["on_prediction_step", "on_log", "on_evaluate", "state_dict", "on_save"]
    assert trainer.freezing.freezer.events == [
        "on_train_begin", "on_epoch_begin",
        "on_step_begin", *micro * 2, *last,
        "on_step_begin", *micro * 2, *last, *evaluated,
        "on_step_begin", *last, *evaluated,
        "on_epoch_end", "on_log", "close", "on_train_end",
    ]  # fmt: skip


def test_end_of_backward_pass_runs_on_the_main_thread_and_records_gradients(tmp_path, recorder, monkeypatch):
    """The engine calls on threads of its own on some devices, and without recording."""
    seen = []
    record = lambda _: seen.append((threading.current_thread(), torch.is_grad_enabled()))  # noqa: E731
    monkeypatch.setattr(recorder, "on_last", staticmethod(record))
    trained(tmp_path)
    assert set(seen) == {(threading.main_thread(), True)}


def error_of_weights(freezer: Recorder, window: range) -> float:
    """The relative distance of ``p.grad`` from the weighted sum of the mean losses' gradients, by replay."""
    parameters = [p for p in freezer.module.parameters() if p.grad is not None]
    total = [torch.zeros_like(p) for p in parameters]
    for i in window:
        mean = freezer.loss(freezer.module, freezer.batches[i])
        assert float(mean.detach()) == pytest.approx(freezer.losses[i], rel=1e-4)
        for t, gradient in zip(total, torch.autograd.grad(mean, parameters), strict=True):
            t += freezer.weights[i] * gradient
    return max(float((t - p.grad).norm() / (p.grad.norm() + 1e-3)) for t, p in zip(total, parameters, strict=True))


@pytest.fixture
def errors(recorder, monkeypatch):
    """The errors of all steps."""
    found, begins = [], [0]

    def compare(freezer: Recorder) -> None:
        found.append(error_of_weights(freezer, range(begins[0], len(freezer.batches))))
        begins[0] = len(freezer.batches)

    monkeypatch.setattr(recorder, "on_last", staticmethod(compare))
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("make", "data"), [(lambda: bert(0.0), samples), (llama, texts), (gpt2, texts)])
def test_gradient_is_the_weighted_sum_of_the_mean_losses_gradients(tmp_path, errors, make, data, accumulate):
    """Before it is clipped. Replays are not observed, and do not get the number of items in the step."""
    trainer = trained(tmp_path, make(), data(), gradient_accumulation_steps=accumulate, max_grad_norm=1e-3)
    freezer = trainer.freezing.freezer
    assert len(errors) == -(-7 // accumulate)
    assert max(errors) < 1e-4
    assert freezer.events.count("begin_batch") == 7
    assert all("num_items_in_batch" not in batch for batch in freezer.batches)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, in a pass without gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_do_not_add_batches(tmp_path, reentrant, recorder, request):
    """Their forward passes run again within the backward pass; replays cannot run where that is reentrant."""
    errors = [] if reentrant else request.getfixturevalue("errors")
    model = bert(0.0)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    trainer = trained(tmp_path, model, gradient_accumulation_steps=2)
    events = [e for e in trainer.freezing.freezer.events if "backward" in e or e == "begin_batch"]
    first = ["begin_batch", "before_backward", "after_backward:False"]
    last = ["begin_batch", "before_backward", "after_backward:True"]
    assert events == (first + last) * 3 + last
    assert max(errors, default=0.0) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what Python deprecates
def test_compiled_model_is_observed(tmp_path, errors):
    """The hooks are not traced."""
    trainer = trained(tmp_path, bert(0.0), samples(6), torch_compile=True, torch_compile_backend="eager")
    assert len(errors) == trainer.freezing.freezer.events.count("begin_batch") == 3
    assert max(errors) < 1e-4


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"])


class TwoPasses(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss + model(**inputs).loss


class ByPosition(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["input_ids"], labels=inputs["labels"]).loss


def loss_by_hand(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs["logits"], labels)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"label_smoothing_factor": 0.1}, ValueError, "returned no loss .*label_smoothing_factor=0.1"),
        ({"compute_loss_func": loss_by_hand}, ValueError, "returned no loss .*`compute_loss_func`"),
        ({"cls": OwnLoss}, RuntimeError, "no backward pass went through the loss .*`compute_loss`"),
        ({"cls": TwoPasses}, RuntimeError, "One forward pass of the model is expected"),
        ({"cls": ByPosition}, ValueError, "called with 1 positional inputs"),
    ],
    ids=["label smoothing", "compute_loss_func", "compute_loss", "two passes", "positional inputs"],
)
def test_loss_that_the_model_did_not_compute_from_named_inputs_is_refused(tmp_path, options, error, match):
    """`close` takes the hooks off again."""
    trainer = made(tmp_path, **options)
    with pytest.raises(error, match=match):
        trainer.train()
    trainer.freezing.close()
    assert trainer.freezing.freezer.events[-1] == "close"
    assert not trainer.model._forward_hooks
    assert not trainer.model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "TPU"])
def test_strategy_that_keeps_gradients_elsewhere_is_refused(tmp_path, kind, monkeypatch):
    """By Accelerate's name of it; also a strategy that is not known."""

    class State:
        distributed_type = type("Kind", (), {"name": kind})

    trainer = made(tmp_path)
    monkeypatch.setattr(callback, "AcceleratorState", State)
    with pytest.raises(ValueError, match=f"{kind} is not supported: .*Supported are one device"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"t0": 3, "k": 0.5, "skip_frozen_gradients": True}, ValueError, r"clips `model.parameters\(\)`"),
        ({"t0": 3, "k": 1.5}, ValueError, "k"),
        ({"t0": 3, "k": 0.5, "oder": "progress"}, TypeError, "oder"),
    ],
)
def test_wrong_arguments_are_refused_when_the_callback_is_made(options, error, match):
    """Before a model is loaded."""
    with pytest.raises(error, match=match):
        GradCovFreezeTrainerCallback(**options)


class FailsOnce(TrainerCallback):
    failed = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")


def test_run_that_starts_again_with_smaller_batches_has_a_new_freezer(tmp_path, recorder):
    """`auto_find_batch_size` calls training again, without `on_train_end`."""
    trainer = made(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4)
    trainer.add_callback(FailsOnce())
    trainer.train()
    first, second = recorder.made
    assert first.events[-1] == second.events[-2] == "close"
    assert first.steps == 2
    assert not trainer.model._forward_hooks


@pytest.mark.parametrize("anew", [False, True])
def test_train_called_twice_makes_a_freezer_each_time(tmp_path, recorder, anew):
    """With `model_init` also a new model and optimizer."""
    trainer = trained(tmp_path, **({"model_init": lambda: bert()} if anew else {}))
    trainer.train()
    first, second = recorder.made
    assert first.steps == second.steps == 7
    assert (first.module is second.module) != anew
    assert (first.optimizer is second.optimizer) != anew
    assert first.events.count("begin_batch") == 7


def test_checkpoint_in_another_folder_needs_the_argument(tmp_path, recorder):
    """Callbacks do not learn what `train` resumes from; a checkpoint of the same step of another run is not taken."""
    options = {"save_strategy": "steps", "save_steps": 3, "logging_strategy": "steps", "logging_steps": 1}
    trained(tmp_path / "a", **options)
    other = str(tmp_path / "a" / "checkpoint-3")
    with pytest.raises(ValueError, match=r"There is no .*checkpoint-3.*resume_from_checkpoint="):
        made(tmp_path / "b", **options).train(resume_from_checkpoint=other)
    trained(tmp_path / "b", learning_rate=1e-2, **options)
    with pytest.raises(ValueError, match=r"belongs to another run .*resume_from_checkpoint="):
        made(tmp_path / "b", **options).train(resume_from_checkpoint=other)
    made(tmp_path / "b", resume_from_checkpoint=other, **options).train(resume_from_checkpoint=other)
    resumed = recorder.made[-1]
    assert resumed.events[0] == "load_state_dict"
    assert resumed.n_states_at_start > 0
    assert resumed.steps == 7


def test_restored_states_of_callbacks_leave_this_one_in_place(tmp_path, recorder):
    """`restore_callback_states_from_checkpoint` makes new callbacks of those that export a state."""
    options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    trained(tmp_path, **options)
    again = made(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.freezing in again.callback_handler.callbacks
    assert again.freezing.freezer is recorder.made[-1]


def test_graphs_of_past_steps_are_let_go(tmp_path):
    """A hook on the loss that held the loss would keep all activations until Python looks for circles."""
    alive = []

    class Tracked: ...

    def track(module: nn.Module, args: Any, output: Any) -> None:
        if output.loss.requires_grad:
            tracked = Tracked()
            output.loss.grad_fn.metadata["tracked"] = tracked  # as long as the graph is
            alive.append(weakref.ref(tracked))

    trainer = made(tmp_path)
    trainer.model.register_forward_hook(track)
    gc.disable()
    try:
        trainer.train()
        assert len(alive) == 7
        assert not any(reference() for reference in alive[:-1])
    finally:
        gc.enable()


def test_optimizer_that_was_prepared_is_unwrapped_twice(tmp_path):
    """The Trainer wraps the wrapper again."""
    from accelerate import Accelerator

    model = bert()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trained(tmp_path, model, optimizers=(Accelerator(cpu=True).prepare(sgd), None))
    assert trainer.freezing.freezer.optimizer is sgd


def test_loss_of_the_user_is_replayed_in_place_of_the_models(tmp_path, recorder, monkeypatch):
    """The model's own loss is weighed all the same."""
    seen = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(sorted(batch))
        return 7 * model(**batch).loss

    monkeypatch.setattr(recorder, "on_last", staticmethod(lambda f: f.loss(f.module, f.batches[-1])))
    trainer = trained(tmp_path, llama(), texts(), loss=loss, gradient_accumulation_steps=3)
    assert seen == [["attention_mask", "input_ids", "labels"]] * 3
    assert trainer.freezing.freezer.events.count("begin_batch") == 7

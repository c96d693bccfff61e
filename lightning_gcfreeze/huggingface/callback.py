"""A callback for `transformers.Trainer` that tells a `Freezer` what the Trainer does.

A `TrainerCallback` is told of steps, not of forward and backward passes, and gets no Trainer. So hooks on the model see
batches and losses, and a hook on the loss sees the backward pass.
"""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lightning_gcfreeze import _torch
from lightning_gcfreeze.freezer import Freezer
from lightning_gcfreeze.huggingface.loss_shares import Batch, Loss, Shares, plain
from lightning_gcfreeze.options import Options

FILE = "gcfreeze.pt"
"""Beside the Trainer's own files in a checkpoint's folder."""
_SUPPORTED = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA")
_WHY_NOT = {
    "DEEPSPEED": "DeepSpeed keeps gradients and optimizer states in buffers of its own, and steps them itself",
    "FSDP": "FSDP splits the parameters between the processes",
    "MEGATRON_LM": "Megatron-LM runs the backward pass and the optimizer itself",
    "XLA": "XLA runs the backward pass later than Python asks for it",
}


class GradCovFreezeTrainerCallback(TrainerCallback):
    """Freeze the quietest parameters of the model that a `transformers.Trainer` trains.

    The same as `GradCovFreezeCallback`, to the bit. Each call of `Trainer.train` makes a new `Freezer`. Each checkpoint
    of the Trainer has a file ``gcfreeze.pt``, from which `Trainer.train` resumes with its ``resume_from_checkpoint``.

    Args:
        t0: see `GradCovFreezeCallback`, as for all options that are not listed here.
        k: likewise.
        loss: (model, inputs) -> the mean loss of these inputs; None: the loss that the model returns.
        options: see `GradCovFreezeCallback`. Gradients of frozen elements are zero, but not skipped: the Trainer clips
            the gradients of all parameters of the model.

    Raises:
        TypeError: when the callback is made, an argument is of the wrong kind.
        ValueError: when the callback is made, an argument is outside its range; at the start of training, the Trainer
            trains in a way that cannot be served.
    """

    def __init__(self, t0: Any = None, k: Any = None, *, loss: Loss | None = None, **options: Any) -> None:
        Options(t0=t0, k=k, **options)  # refuses wrong ones before a model is loaded
        self._options, self._loss = {"t0": t0, "k": k, **options}, loss or _loss_of_model
        self.freezer: Freezer | None = None
        """The freezer of the last call of `train`, also after its end: `frozen`, `savings`, `delta` and so on."""
        self._model: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        self._smoothing = 0.0
        self._replaying = False
        self._passes = 0  # forward passes in training
        self._open: tuple[int, Tensor, Tensor | float] | None = None  # the last pass, its mean loss, its share
        self._total: Tensor | None = None  # of the shares of a step, where it is known
        self._seen = False  # whether the backward pass of the step to come was

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradCovFreezeTrainerCallback":
        """Return the callback itself: a copy of the model takes the hooks along, and they ignore it."""
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach a new Freezer. By now the model, the optimizer and its checkpoint are in place."""
        self.close()  # a run that an exception ended has no `on_train_end`
        if why := _refusal(args):
            raise ValueError(why)
        model, optimizer, scaler = kwargs["model"], kwargs["optimizer"], None
        while hasattr(optimizer, "gradient_state"):  # accelerate's wrapper, around torch's optimizer
            optimizer, scaler = optimizer.optimizer, scaler or optimizer.scaler
        self._smoothing = args.label_smoothing_factor
        self._passes, self._open, self._seen, self._n_processes = 0, None, False, args.world_size
        self._shares = Shares(model, partial(self._unwatched, _loss_of_model))
        self.freezer = Freezer(
            model,
            optimizer,
            loss=partial(self._unwatched, self._loss),
            scaler=scaler,
            data_parallel=args.world_size > 1,
            planned_steps=state.max_steps,
            **self._options,
        )
        self._model = model
        if state.global_step > 0:
            self.freezer.load_state_dict(torch.load(_saved(args, state), map_location="cpu", weights_only=True))
        # A compiled model would trace into the hooks, which have effects outside of it.
        before, after = map(torch.compiler.disable, (self._before_forward, self._after_forward))
        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a step whose gradients did not come from the model's own loss."""
        if not self._seen:
            raise RuntimeError(
                "The optimizer steps, but no backward pass went through the loss that the model returned. The Trainer's"
                " `compute_loss_func` or an overridden `compute_loss` makes the loss itself. Compute it in the model's"
                " `forward`, and return it as `loss`."
            )
        self._seen = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the Freezer's state into the checkpoint's folder. Runs on all processes, since the state is shared."""
        if self.freezer is None:
            return
        saved = self.freezer.state_dict()
        if args.should_save and not state.is_hyper_param_search:  # a trial's folder is known to the Trainer alone
            torch.save(saved, os.path.join(_folder(args, state), FILE))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of model and optimizer. With `load_best_model_at_end` the model has its best weights by now."""
        self.close()

    def close(self) -> None:
        """Let go of model and optimizer. To be called after an exception, since the Trainer does not tell of it."""
        for handle in self._handles:
            handle.remove()
        if self._model is not None and self.freezer is not None:
            self.freezer.close()
        self._handles, self._model, self._open = [], None, None

    def _watches(self, module: nn.Module) -> bool:
        """Whether a forward pass is one of training: not of evaluation, a replay, or a copy of the model."""
        return module is self._model and module.training and torch.is_grad_enabled() and not self._replaying

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._watches(module):
            return
        if args:
            raise ValueError(
                f"{type(module).__name__} was called with {len(args)} positional inputs. Only inputs by name can be cut"
                " into samples, as the Trainer gives them. Call it as `model(**inputs)`."
            )
        assert self.freezer is not None
        self.freezer.begin_batch(plain(kwargs))
        self._shares.begin(kwargs)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._watches(module):
            return
        if (loss := _loss_in(output)) is None:
            raise ValueError(
                f"{type(module).__name__} returned no loss for the inputs {', '.join(kwargs)}, so a single sample has"
                f" none. The Trainer keeps the labels to itself with `label_smoothing_factor={self._smoothing}`, where"
                " that is not 0, and with `compute_loss_func`. Compute the loss in the model's `forward`, and return it"
                " as `loss`."
            )
        share = self._shares.of(loss, kwargs)
        self._passes += 1
        # Not in the hook's closure: the graph would hold itself. Made now: the Trainer multiplies the loss in place.
        self._open = (self._passes, loss / share, share)
        if loss.requires_grad:
            loss.register_hook(partial(self._at_backward, self._passes))

    def _at_backward(self, number: int, gradient: Tensor) -> None:
        """The backward pass has come to the loss; `gradient` is what it was multiplied by since."""
        last, self._open = self._open, None
        if last is None or last[0] != number:
            raise RuntimeError(
                f"The loss of forward pass {number} is used in a backward pass, but pass {self._passes} is the last or"
                " was used before. One forward pass of the model is expected for each backward pass. Compute the loss"
                " in one call of the model."
            )
        assert self.freezer is not None
        _, mean, share = last
        with torch.enable_grad():  # it is off in hooks
            self.freezer.before_backward(mean, gradient * share)
        # Where losses are divided by the targets of all processes, the shares of a step add up to 1 over all of them.
        self._total = gradient / self._n_processes if self._shares.are_of_all_targets else None
        # DDP averages gradients in a callback that it queues itself during the pass. One that is queued by a callback
        # runs after all of these.
        _torch.queue_after_backward(lambda: _torch.queue_after_backward(self._after_backward))

    def _after_backward(self) -> None:
        assert self.freezer is not None
        # The Trainer tells accelerate so before each micro-batch. A count would miss the short last window of an epoch.
        last = GradientState().sync_gradients
        self._seen = self._seen or last
        with torch.enable_grad():  # it is off here, and replays need it
            self.freezer.after_backward(last, self._total)

    def _unwatched(self, loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
        """A loss of some samples, in forward passes that the hooks leave alone."""
        self._replaying, before = True, self._replaying
        try:
            return loss(model, batch)
        finally:
            self._replaying = before


def _loss_of_model(model: nn.Module, batch: Batch) -> Tensor:
    loss = _loss_in(model(**batch))
    assert loss is not None  # it was there in training
    return loss


def _loss_in(output: Any) -> Tensor | None:
    """As the Trainer finds it, if it is one."""
    loss = output.get("loss") if isinstance(output, Mapping) else output[0]
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None


def _refusal(args: TrainingArguments) -> str | None:
    kind = AcceleratorState().distributed_type.name
    if kind not in _SUPPORTED:
        why = _WHY_NOT.get(kind, "it is not known to keep gradients in `p.grad` until the optimizer steps")
        return f"{kind} is not supported: {why}. Supported are one device and DistributedDataParallel."
    if args.n_gpu > 1:
        return (
            f"{args.n_gpu} GPUs in one process are not supported: nn.DataParallel trains copies of the model. Start one"
            " process for each with `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
        )
    return None


def _folder(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _saved(args: TrainingArguments, state: TrainerState) -> str:
    """The file of the checkpoint that is resumed. Callbacks are not told where that is.

    Raises:
        ValueError: it is not to be found.
    """
    folder = args.resume_from_checkpoint if os.path.isdir(args.resume_from_checkpoint or "") else _folder(args, state)
    file, trainer_state = os.path.join(str(folder), FILE), os.path.join(str(folder), "trainer_state.json")
    way_out = "Give the folder that `train` resumes from to `TrainingArguments(resume_from_checkpoint=...)`, too."
    if not os.path.isfile(file):
        raise ValueError(
            f"There is no {file}, from which freezing goes on at step {state.global_step}. {way_out} If that run had no"
            " such callback, begin a new one from its weights."
        )
    if os.path.isfile(trainer_state) and TrainerState.load_from_json(trainer_state).log_history != state.log_history:
        raise ValueError(f"{folder} is of another run than the one that is resumed: its log differs. {way_out}")
    return file

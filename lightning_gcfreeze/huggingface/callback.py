"""A callback for `transformers.Trainer` that tells a `Freezer` what the Trainer does.

The Trainer tells a callback of optimizer steps, not of forward and backward passes. So hooks on the model see batches
and losses, and a hook on the loss sees the backward pass.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightning_gcfreeze import _torch
from lightning_gcfreeze._wrappers import unwrapped_optimizer
from lightning_gcfreeze.freezer import Freezer
from lightning_gcfreeze.huggingface import checkpoints
from lightning_gcfreeze.huggingface.loss_shares import Batch, Loss, Shares, without_count
from lightning_gcfreeze.options import Options
from lightning_gcfreeze.planning.growing import Growth

_SUPPORTED = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA")
_WHY_NOT = {
    "DEEPSPEED": "DeepSpeed keeps gradients and optimizer states in buffers of its own, and steps them itself",
    "FSDP": "FSDP splits the parameters between the processes",
    "MEGATRON_LM": "Megatron-LM runs the backward pass and the optimizer itself",
    "XLA": "XLA runs the backward pass later than Python asks for it",
}


class GradCovFreezeTrainerCallback(TrainerCallback):
    """Freeze the quietest parameters of the model that a `transformers.Trainer` trains.

    The freeze is that of `GradCovFreezeCallback`, to the bit:

        freezing = GradCovFreezeTrainerCallback(t0=100, k=0.9)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[freezing])
        trainer.train()
        freezing.freezer.delta("live.safetensors")

    The model has to compute the loss: to return it as ``loss`` when it is given labels. Each call of `Trainer.train`
    makes a new `Freezer`. Each checkpoint of the Trainer has a file ``gcfreeze.pt``, from which training resumes with
    ``resume_from_checkpoint``. With ``k=Growth(monitor="eval_loss")`` the metrics of each evaluation are read.

    Args:
        t0: see `GradCovFreezeCallback`, as for all options that are not listed here.
        k: see `GradCovFreezeCallback`.
        loss: (model, inputs) -> the mean loss of these inputs; None: the loss that the model returns. Pass a function
            if an overridden `compute_loss` adds terms to that loss.
        options: see `GradCovFreezeCallback`, except `skip_frozen_gradients`: gradients of frozen elements are zero, but
            they are computed, because the Trainer clips the gradients of all parameters of the model.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside its range. At the start of training: DeepSpeed, FSDP or `nn.DataParallel`
            trains the model, or a checkpoint has no ``gcfreeze.pt``. In training: the model returns no loss.
        RuntimeError: in training, gradients come from something else than one loss of one forward pass.
    """

    def __init__(self, t0: Any = None, k: Any = None, *, loss: Loss | None = None, **options: Any) -> None:
        checked = Options(t0=t0, k=k, **options)
        if options.get("skip_frozen_gradients"):
            raise ValueError(
                "`skip_frozen_gradients=True` is not possible with the Trainer: it clips `model.parameters()`, and logs"
                " their norm, so all gradients have to be there. Leave the argument out."
            )
        if checked.granularity == "mixed":
            raise ValueError(
                "`granularity='mixed'` chooses rows and columns whose gradients are skipped, and with the Trainer all"
                " gradients are computed. Use 'element' or 'row'."
            )
        monitors = [k.monitor for _, k in checked.decisions if isinstance(k, Growth)]
        self._monitor = monitors[0] if monitors else None
        self._options, self._loss = {"t0": t0, "k": k, **options}, loss or _loss_of_model
        self.freezer: Freezer | None = None
        """The freezer of the last call of `train`, kept after its end for `frozen`, `savings`, `delta` and so on."""
        self._model: nn.Module | None = None
        self._handles: list[RemovableHandle] = []
        self._smoothing = 0.0
        self._replaying = False
        self._n_passes = 0  # forward passes in training
        self._open: tuple[int, Tensor, Tensor | float] | None = None  # the last pass, its mean loss, its share
        self._weights: list[Tensor] = []  # of the mean losses since the last step
        self._is_step_seen = False  # whether the last backward pass before the step was

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradCovFreezeTrainerCallback":
        """Return the callback itself. A copy of the model has the hooks, too, which ignore all modules but one."""
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make a freezer. The Trainer has made the optimizer, and loaded the checkpoint, before it calls this."""
        self.close()  # the freezer of a run that an exception ended, before `on_train_end`
        if why := _refusal(args):
            raise ValueError(why)
        model = kwargs["model"]
        optimizer, scaler = unwrapped_optimizer(kwargs["optimizer"])  # the weights of losses include the scale
        self._smoothing = args.label_smoothing_factor
        self._n_passes, self._open, self._is_step_seen, self._weights = 0, None, False, []
        self._n_processes = args.world_size
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
            self.freezer.load_state_dict(checkpoints.load(args, state))
        # `torch.compile` must not trace the hooks: they do more than compute tensors.
        before, after = map(torch.compiler.disable, (self._before_forward, self._after_forward))
        self._handles = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse a step whose gradients did not come from the model's own loss."""
        if not self._is_step_seen:
            raise RuntimeError(
                "The optimizer steps, but no backward pass went through the loss that the model returned. The Trainer's"
                " `compute_loss_func` or an overridden `compute_loss` makes the loss itself. Compute it in the model's"
                " `forward`, and return it as `loss`."
            )
        self._is_step_seen = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the freezer's state into the checkpoint's folder. Runs on all processes: they synchronize the state."""
        if self.freezer is None:
            return
        saved = self.freezer.state_dict()
        if args.should_save and not state.is_hyper_param_search:  # callbacks do not learn a trial's folder
            checkpoints.save(saved, args, state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pass on the metric that ``Growth(monitor=...)`` names."""
        loss = kwargs.get("metrics", {}).get(self._monitor)
        if loss is not None and self._model is not None and self.freezer is not None:
            self.freezer.record_validation_loss(loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the freezer. With ``load_best_model_at_end`` the Trainer has loaded the best weights before."""
        self.close()

    def close(self) -> None:
        """Remove all hooks from the model and the optimizer. Call this if `Trainer.train` raised an exception."""
        for handle in self._handles:
            handle.remove()
        if self._model is not None and self.freezer is not None:
            self.freezer.close()
        self._handles, self._model, self._open = [], None, None

    def _watches(self, module: nn.Module) -> bool:
        """Return whether a forward pass belongs to training, not to evaluation, a replay or a copy of the model."""
        return module is self._model and module.training and torch.is_grad_enabled() and not self._replaying

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._watches(module):
            return
        if args:
            raise ValueError(
                f"{type(module).__name__} was called with {len(args)} positional inputs, but only inputs by name can be"
                " replayed. Call it as `model(**inputs)`, as the Trainer does."
            )
        assert self.freezer is not None
        self.freezer.begin_batch(without_count(kwargs))
        self._shares.begin(kwargs)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._watches(module):
            return
        if (loss := _loss_in(output)) is None:
            raise ValueError(
                f"{type(module).__name__} returned no loss for the inputs {', '.join(kwargs)}. The Trainer computes the"
                f" loss itself with `label_smoothing_factor={self._smoothing}`, unless that is 0, and with"
                " `compute_loss_func`. Compute the loss in the model's `forward`, and return it as `loss`."
            )
        share = self._shares.of(loss, kwargs)
        self._n_passes += 1
        # The hook must not hold the mean loss: the graph would hold itself, and stay in memory. The mean loss is made
        # here, because the Trainer may change the loss in place.
        self._open = (self._n_passes, loss / share, share)
        if loss.requires_grad:
            loss.register_hook(partial(self._at_backward, self._n_passes))

    def _at_backward(self, number: int, gradient: Tensor) -> None:
        """Run when a backward pass reaches the loss; `gradient` is what the Trainer multiplied the loss by."""
        last, self._open = self._open, None
        if last is None or last[0] != number:
            raise RuntimeError(
                f"A backward pass uses the loss of forward pass {number}, but {self._n_passes} is the last one, or its"
                " loss was used before. One forward pass of the model is expected for each backward pass. Compute the"
                " loss in one call of the model."
            )
        assert self.freezer is not None
        _, mean, share = last
        self._weights.append(gradient * share)
        with torch.enable_grad():  # gradients are not recorded in hooks
            self.freezer.before_backward(mean, self._weights[-1])
        # DDP averages gradients in a callback that it queues during the backward pass. A callback that is queued by
        # another callback runs after all of these.
        _torch.queue_after_backward(lambda: _torch.queue_after_backward(self._after_backward))

    def _after_backward(self) -> None:
        assert self.freezer is not None
        # The Trainer sets this before each micro-batch. Counting would miss the short last step of an epoch.
        is_last = GradientState().sync_gradients
        total = None
        if is_last:
            self._is_step_seen = True
            if self._n_processes > 1:  # which have different numbers of targets
                total = torch.stack(self._weights).sum()
                dist.all_reduce(total)
                total /= self._n_processes
            self._weights = []
        with torch.enable_grad():  # gradients are not recorded in callbacks, and replays need them
            self.freezer.after_backward(is_last, total)

    def _unwatched(self, loss: Loss, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of some samples, in a forward pass that the hooks ignore."""
        self._replaying, before = True, self._replaying
        try:
            return loss(model, batch)
        finally:
            self._replaying = before


def _loss_of_model(model: nn.Module, batch: Batch) -> Tensor:
    loss = _loss_in(model(**batch))
    assert loss is not None  # the model returned one in training
    return loss


def _loss_in(output: Any) -> Tensor | None:
    """Return the loss where the Trainer looks for it, or None if that is no 0-dim tensor."""
    loss = output.get("loss") if isinstance(output, Mapping) else output[0]
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None


def _refusal(args: TrainingArguments) -> str | None:
    kind = AcceleratorState().distributed_type.name
    if kind not in _SUPPORTED:
        why = _WHY_NOT.get(kind, "gradients may not be in `p.grad` when the optimizer steps")
        return f"{kind} is not supported: {why}. Supported are one device and DistributedDataParallel."
    if args.n_gpu > 1:
        return (
            f"{args.n_gpu} GPUs in one process are not supported: `nn.DataParallel` trains copies of the model. Start"
            " one process per GPU with `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    return None

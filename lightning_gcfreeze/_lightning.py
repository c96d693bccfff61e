"""What is asked of Lightning beyond its hooks. All private names of Lightning stand here.

`tests/test_private_api.py` lists what is assumed of them.
"""

import functools
import inspect
import math
import multiprocessing
import pickle
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_module, rank_zero_warn

from lightning_gcfreeze import refusals
from lightning_gcfreeze._names import class_names
from lightning_gcfreeze.distributed import World
from lightning_gcfreeze.distributed.comm_hook import LiveAllReduce
from lightning_gcfreeze.options import Options
from lightning_gcfreeze.state import State
from lightning_gcfreeze.surroundings import Surroundings
from lightning_gcfreeze.user_code.reached import Owners

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    # Lightning is published under two names whose classes know nothing of each other. The Trainer of either takes any
    # callback in a list, but a single `callbacks=callback` and the LightningCLI ask for their own class.
    rank_zero_log = rank_zero_module.log
    try:
        from pytorch_lightning import Callback as StandaloneCallback

        rank_zero_module.log = rank_zero_log  # the import turns the Trainer's messages over to another logger

        class Callback(pl.Callback, StandaloneCallback):
            """A callback of both packages."""

    except ImportError:
        Callback = pl.Callback

__all__ = ["Callback", "Mailbox"]


def surroundings(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    index: int,
    name: str,
    tag: str,
    all_reduce: LiveAllReduce | None,
) -> Surroundings:
    """Return what a run needs to know of a Trainer.

    Args:
        trainer: in a fit; its optimizers exist.
        module: what it trains.
        index: of the optimizer that is followed.
        name: of the callback, in front of what it says.
        tag: under which other callbacks read the frozen fraction: EarlyStopping, ModelCheckpoint.
        all_reduce: DDP's communication hook, if there is one.
    """
    strategy: Any = trainer.strategy
    data = getattr(strategy, "distributed_sampler_kwargs", None) or {}
    known: Sequence[Any] = [*trainer.callbacks]  # type: ignore[attr-defined]
    # BaseFinetuning names what is in the optimizer's groups by the module's parameters, each time that it adds a group.
    readers = [type(c).__name__ for c in known if "BaseFinetuning" in class_names(c)]
    if not module.automatic_optimization:
        readers.append("manual optimization")

    def in_trial() -> bool:
        """Lightning's tuners swap the Trainer's callbacks while they try."""
        return not any(callback is one for callback in trainer.callbacks for one in known)  # type: ignore[attr-defined]

    def publish(fraction: float) -> None:
        trainer.callback_metrics[tag] = torch.tensor(fraction)

    return Surroundings(
        module=module,
        optimizer=trainer.optimizers[index],
        training_step=training_step(module) if module.automatic_optimization else None,
        context=lambda: muted(trainer),
        wrapper=strategy.model,
        world=World(trainer.world_size, strategy.root_device),
        n_replicas=data.get("num_replicas", 1),
        all_reduce=all_reduce,
        readers=readers,
        owners=lambda: owners(trainer),
        loss_scale=lambda: loss_scale(trainer),
        publish=publish,
        planned_steps=lambda: planned_steps(trainer) if module.automatic_optimization else math.nan,
        is_last_batch=lambda: bool(trainer.is_last_batch),
        in_trial=in_trial,
        inform=lambda sentence: rank_zero_info(f"{name}: {sentence}"),
        warn=lambda sentence: rank_zero_warn(f"{name}: {sentence}"),
        error=MisconfigurationException,
    )


def training_step(module: pl.LightningModule) -> Callable[[Any, int], Any]:
    """Return `training_step` of (batch, batch_idx), also where it takes the batch only."""
    step = module.training_step
    kinds = [p.kind for p in inspect.signature(step).parameters.values()]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_more = sum(kind in positional for kind in kinds) >= 2 or inspect.Parameter.VAR_POSITIONAL in kinds
    if takes_more:
        return step

    @functools.wraps(step)  # a refusal looks at the names of its arguments
    def of_batch_only(batch: Any, batch_idx: int) -> Any:
        return step(batch)

    return of_batch_only


@contextmanager
def muted(trainer: pl.Trainer) -> Iterator[None]:
    """Give the surroundings of a training step, with mute loggers: a `training_step` may talk to `self.logger`."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        with trainer.precision_plugin.train_step_context():
            yield
    finally:
        trainer.loggers = loggers


def owners(trainer: pl.Trainer) -> Owners:
    """Return everything in a fit that may have code of the user's."""
    schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    lambdas = [function for scheduler in schedulers for function in getattr(scheduler, "lr_lambdas", ())]
    others: list[Any] = [trainer.strategy, trainer.precision_plugin, trainer, *trainer.loggers, *schedulers, *lambdas]
    others += [] if (data := getattr(trainer, "datamodule", None)) is None else [data]
    return Owners(trainer.lightning_module, [*trainer.callbacks, *others])  # type: ignore[attr-defined]


def planned_steps(trainer: pl.Trainer) -> float:
    """Return the optimizer steps that the Trainer will take in all; NaN where it cannot tell."""
    try:
        steps = float(trainer.estimated_stepping_batches)
    except MisconfigurationException:  # in Lightning 2.4, accumulation that changes from epoch to epoch
        return math.nan
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = [c for c in callbacks if "GradientAccumulationScheduler" in class_names(c)]
    if not schedulers or not 0 < steps < math.inf:
        return steps
    if trainer.max_epochs in (None, -1):
        return math.nan if trainer.max_steps == -1 else float(trainer.max_steps)
    factors = map(schedulers[0].get_accumulate_grad_batches, range(trainer.max_epochs))
    found = float(sum(math.ceil(trainer.num_training_batches / factor) for factor in factors))
    return found if trainer.max_steps == -1 else min(found, float(trainer.max_steps))


def is_last_micro_batch(trainer: pl.Trainer) -> bool:
    """Return whether the optimizer steps after this batch.

    Lightning's own answer: the index that hooks are given is off by one where a step takes the ``dataloader_iter``.
    """
    return not trainer.fit_loop._should_accumulate()


def loss_scale(trainer: pl.Trainer) -> float:
    """Return what 16-mixed precision multiplies losses by now; 1 without a loss scaler."""
    scaler = _scaler(trainer)
    return float(scaler.get_scale()) if scaler else 1.0


def _scaler(trainer: pl.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def may_skip_steps(trainer: pl.Trainer) -> bool:
    """Return whether the optimizer's step may be left out after its gradients were made ready."""
    own = type(trainer.precision_plugin).optimizer_step.__module__.split(".")[0]
    return _scaler(trainer) is not None or own not in ("lightning", "pytorch_lightning")


def is_optimizer(optimizer: Any, trainer: pl.Trainer, index: int) -> bool:
    """Return whether a hook of Lightning's was given the optimizer of that index, wrapped or not."""
    return trainer.optimizers[index] in (optimizer, getattr(optimizer, "optimizer", None))


def log_step(trainer: pl.Trainer) -> int:
    """Return the step on the axis of whatever `self.log` writes."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def log_hyperparameters(trainer: pl.Trainer, module: pl.LightningModule, arguments: Mapping[str, Any]) -> None:
    """Let loggers have arguments, in the one call of `log_hyperparams` that a fit makes, right after `on_fit_start`.

    Of several calls TensorBoard would show the first alone, and get the placeholder `hp_metric` as often. So arguments
    are added to what Lightning is about to log of module or data, until `forget_hyperparameters`.
    """
    if not getattr(trainer, "enable_autolog_hparams", True):  # Lightning 2.4 and 2.5 have no such switch
        return
    values = dict(arguments)
    owners: tuple[Any, ...] = (module, getattr(trainer, "datamodule", None))
    for owner in owners:
        if owner is not None and owner._log_hyperparams:
            if isinstance(initial := owner._hparams_initial, dict):
                initial.update(arguments)
                return
            values = {**initial, **values}  # of an OmegaConf container, which may be read-only
    for logger in trainer.loggers if trainer.is_global_zero else ():
        logger.log_hyperparams(values)


def forget_hyperparameters(trainer: pl.Trainer, arguments: Mapping[str, Any]) -> None:
    """Leave the hyperparameters of module and data as they were before `log_hyperparameters`."""
    for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        initial: Any = getattr(owner, "_hparams_initial", None)
        for name in arguments if isinstance(initial, dict) else ():
            initial.pop(name, None)


def take_comm_hook(strategy: Any) -> LiveAllReduce | None:
    """Take the communication hook from a DDPStrategy before it sets DDP up; None for other strategies."""
    if not hasattr(strategy, "_ddp_comm_hook"):
        return None
    all_reduce = LiveAllReduce(strategy._ddp_comm_hook, strategy._ddp_comm_state, strategy._ddp_comm_wrapper)
    strategy._ddp_comm_hook = None  # DDP takes one
    return all_reduce


def give_back_comm_hook(strategy: Any, all_reduce: LiveAllReduce | None) -> None:
    """Leave a strategy as it was before `take_comm_hook`, which returned `all_reduce`."""
    if all_reduce:
        strategy._ddp_comm_hook = all_reduce.user_hook


def say(warning: str | None, remark: str | None = None) -> None:
    """Warn, and log a remark, on rank 0, if there is something to say."""
    if warning:
        rank_zero_warn(warning)
    if remark:
        rank_zero_info(remark)


def refuse(reason: str | None) -> None:
    """Raise Lightning's error for a Trainer and a callback that do not go together, if there is a reason."""
    if reason:
        raise MisconfigurationException(reason)


def refuse_unsupported(trainer: pl.Trainer, module: pl.LightningModule, index: int | None, options: Options) -> None:
    """Refuse an index that no optimizer has, what manual optimization does not tell, and what resets still layers."""
    refuse(refusals.unsupported_optimizer_index(index, trainer.optimizers))
    if options.batch_norm == "freeze":
        refuse(refusals.unsupported_averaging(trainer.callbacks, module))  # type: ignore[attr-defined]
    if not module.automatic_optimization:
        by_fraction = any(isinstance(t, float) for t, _ in options.decisions)
        refuse(refusals.unsupported_manual_optimization(options.reads_samples, options.reads_losses, by_fraction))


def followed(callbacks: Sequence[Any], kind: type[Any]) -> list[int]:
    """Return the indices of the optimizers that the callbacks of a kind follow."""
    return [callback.optimizer or 0 for callback in callbacks if isinstance(callback, kind)]


def no_module() -> None:
    """Stand in for a dead weak reference to a module."""


def callbacks_being_validated() -> Sequence[Any]:
    """Return a Trainer's callbacks where the caller's caller compares their state keys; else nothing."""
    frame = sys._getframe(2)
    return frame.f_locals.get("callbacks", ()) if frame.f_code.co_name == "_validate_callbacks_list" else ()


def in_signal_handler() -> bool:
    """Return whether this runs inside SLURM's signal handler, which may come between any two lines."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_slurm_sigusr_handler_fn":
        frame = frame.f_back
    return frame is not None


class Mailbox:
    """A file by which a process that was launched for a fit (ddp_spawn, ddp_fork) sends its state to the launcher."""

    def __init__(self) -> None:
        self._path = Path(tempfile.gettempdir()) / f"lightning_gcfreeze-{uuid.uuid4().hex}.pickle"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Mailbox":
        """Return another box: what the processes of a copy find out is not the original's."""
        return Mailbox()

    def send(self, state: State, trainer: pl.Trainer) -> None:
        """Leave a state for the launcher, if this is rank 0 of a fit that was launched in processes of its own."""
        is_launched = type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher"
        if is_launched and trainer.is_global_zero and multiprocessing.parent_process() is not None:
            self._path.touch(mode=0o600)
            with self._path.open("wb") as file:
                pickle.dump((state.state_dict(), state.savings, state.held_bits), file)

    def receive(self, state: State) -> None:
        """Give a state what was sent to this process since the last call, if anything was."""
        if self._path.exists() and multiprocessing.parent_process() is None:
            with self._path.open("rb") as file:
                saved, state.savings, state.held_bits = pickle.load(file)
            self._path.unlink()
            state.load_state_dict(saved)

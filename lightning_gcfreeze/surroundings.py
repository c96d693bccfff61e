"""`Surroundings`: all that a run needs to know of the loop around it, in plain values and functions."""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gcfreeze.distributed import SINGLE_PROCESS, World
from lightning_gcfreeze.distributed.comm_hook import LiveAllReduce
from lightning_gcfreeze.user_code.reached import Owners


def _nothing(sentence: str) -> None: ...


@dataclass
class Surroundings:
    """The loop that drives a run: Lightning's, a plain one, or that of another trainer."""

    module: nn.Module
    """What is trained; its names are the parameters' names."""
    optimizer: Optimizer
    """The one that is followed."""
    training_step: Callable[[Any, int], Tensor | Mapping[str, Any] | None] | None = None
    """(batch, batch_idx) -> the loss, or a mapping with it; None: single samples cannot be replayed."""
    context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    """What a replay of `training_step` has to run in."""
    wrapper: nn.Module | None = None
    """What the loop calls in place of the module, such as a DistributedDataParallel."""
    world: World = SINGLE_PROCESS
    n_replicas: int = 1
    """Processes whose batches differ."""
    all_reduce: LiveAllReduce | None = None
    """The communication hook of DistributedDataParallel."""
    readers: list[str] = field(default_factory=list)
    """Parts of the loop that may look at gradients, by names that their author knows."""
    watches_gradients: bool = True
    """Whether to note who asks for ``p.grad`` in a few steps. In a loop of the user's own, that is the loop itself."""
    owners: Callable[[], Owners] | None = None
    """All whose code may look at gradients or weights now; None: the module only."""
    loss_scale: Callable[[], float] = lambda: 1.0
    """What losses are multiplied by now, by a loss scaler. Asked only where it matters: a GPU has to be waited for."""
    publish: Callable[[float], None] = lambda fraction: None
    """Takes the frozen fraction whenever it changes."""
    planned_steps: Callable[[], float] = lambda: math.inf
    """Optimizer steps in all; infinite, negative or NaN if it is not known."""
    is_last_batch: Callable[[], bool] = lambda: False
    """Whether the batch at hand is the last one of its epoch."""
    in_trial: Callable[[], bool] = lambda: False
    """Whether the step at hand is one that a tuner tries and takes back."""
    inform: Callable[[str], None] = _nothing
    warn: Callable[[str], None] = _nothing
    error: type[Exception] = RuntimeError
    """What is raised where the loop and the options do not go together."""

    def warn_of(self, sentences: Iterable[str | None]) -> None:
        """Pass on what there is to warn of."""
        for sentence in filter(None, sentences):
            self.warn(sentence)

    def refuse(self, reason: str | None) -> None:
        """Raise the loop's kind of error, if there is a reason."""
        if reason:
            raise self.error(reason)

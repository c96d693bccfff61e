"""Single samples' gradients by replay: the training step once more, on one sample of what an optimizer step sees.

That is all micro-batches since the last step; the first sample is that of the first of them. What computing it must not
leave behind is `gradients.of_sample`'s business; here it is which sample, and what to do if it cannot be had alone.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from lightning_gcfreeze import _modules
from lightning_gcfreeze.gradients import isolation, slicing


@dataclass
class Window:
    """The micro-batches of one optimizer step."""

    sample: Any
    """The first; None if it was not asked for."""
    batch: Any
    """A copy of the first micro-batch, if it was asked for and can be copied."""
    batch_idx: int
    first_size: int | None
    """S of the first; None if it cannot be told for certain."""
    batch_size: int | None
    """Of all together; None if it cannot be told."""
    micro_batches: int = 1


class Replay:
    """Keeps the first sample of each optimizer step, and computes its gradient on demand.

    Args:
        module: whose state must not change.
        parameters: by name, those whose gradient is wanted.
        step: (batch, batch_idx) -> what `training_step` returns.
        context: what the step has to run in.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, Parameter],
        step: Callable[[Any, int], Tensor | Mapping[str, Any] | None],
        context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._module, self._parameters, self._step, self._context = module, parameters, step, context
        self._cut_by_module: Callable[[Any], Any] | None = getattr(module, "gcfreeze_first_sample", None)
        self._copies = 1
        self._looked_through = False  # the graph of a loss
        self._batch: Window | None = None  # the batch at hand
        self._window: Window | None = None  # all since the last optimizer step

    def keep(self, batch: Any, batch_idx: int, sample: bool = True, whole: bool = False) -> None:
        """Copy what will be needed of a batch, before the training step can change it in place.

        Args:
            batch: the batch to come.
            batch_idx: its number.
            sample: whether the first sample is needed.
            whole: whether the whole batch is.

        Raises:
            slicing.UnclearBatchError: it cannot be cut, and the module has no `gcfreeze_first_sample`.
        """
        kept = _copied(batch) if whole else None
        if self._cut_by_module is None:
            first, size = slicing.first_sample(batch) if sample else (None, slicing.batch_size(batch))
            self._batch = Window(first, kept, batch_idx, size, size)
        else:  # then the first axis need not be that of the samples
            self._batch = Window(self._cut_by_module(batch), kept, batch_idx, None, slicing.batch_size_or_none(batch))

    def join(self) -> bool:
        """After a batch's backward: it has become part of the optimizer step. Tell whether one was kept."""
        batch, self._batch = self._batch, None
        if batch is None:
            return False
        if self._window is None:
            self._window = batch
            return True
        self._window.micro_batches += 1
        if self._window.batch_size is None or batch.batch_size is None:
            self._window.batch_size = None
        else:
            self._window.batch_size += batch.batch_size
        return True

    def forget(self) -> None:
        """What was kept is not part of the next optimizer step."""
        self._batch = self._window = None

    def take(self) -> Window:
        """End the optimizer step: its window, to be given to `gradient`."""
        window, self._window = self._window, None
        assert window is not None  # `join` came first
        return window

    @property
    def size_at_hand(self) -> int | None:
        """S of the batch kept last; None if it cannot be told for certain."""
        return None if self._batch is None else self._batch.first_size

    @property
    def between_steps(self) -> bool:
        """Whether the next batch kept is the first of an optimizer step."""
        return self._window is None

    def gradient(
        self,
        window: Window,
        names: Collection[str] | None = None,
        before: Callable[[], None] | None = None,
        index: int = 0,
    ) -> dict[str, Tensor] | None:
        """g_1, from the first sample alone; from two copies of it if the training step cannot take a batch of one.

        Args:
            window: the optimizer step.
            names: of the parameters; None: all.
            before: called right before the training step; what it does to the module is undone.
            index: of another sample of the first micro-batch, if the whole of it was kept.

        Returns:
            ``{name: (*p.shape)}``, or None if the training step returned no loss.

        Raises:
            RuntimeError: the training step fails either way.
        """
        try:
            return self._gradient(window, names, before, index)
        except Exception as error:
            failure = error
        explanation = f"`training_step` fails on a sample of a batch alone: {failure!r}."
        try:
            if self._copies == 2 or self._cut_by_module is not None:
                raise failure
            self._copies = 2
            g_one = self._gradient(window, names, before, index)
        except Exception:
            raise RuntimeError(f"{explanation} If the sample was cut wrongly: {slicing.WAY_OUT}") from failure
        warnings.warn(
            f"{explanation} Its gradient is taken from two copies of it instead: the same, if the loss is a mean over"
            f" samples that do not interact. To decide yourself: {slicing.WAY_OUT}",
            stacklevel=2,
        )
        return g_one

    def _gradient(
        self, window: Window, names: Collection[str] | None, before: Callable[[], None] | None, index: int
    ) -> dict[str, Tensor] | None:
        if index:
            if window.batch is None:
                raise RuntimeError(
                    "the batch cannot be copied, so only its first sample is at hand; use `samples='first'`"
                )
            sample = slicing.sample(window.batch, index, self._copies)
        elif self._copies != 1:
            sample, _ = slicing.first_sample(window.sample, self._copies)
        else:
            sample = window.sample
        return self.of_batch(sample, window.batch_idx, names, before)

    def of_batch(
        self,
        batch: Any,
        batch_idx: int,
        names: Collection[str] | None = None,
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
    ) -> dict[str, Tensor] | None:
        """The gradient of the training step's loss on any batch, without a trace; arguments as for `gradient`."""
        parameters = {name: p for name, p in self._parameters.items() if names is None or name in names}

        def loss() -> Tensor | None:
            if before is not None:
                before()
            value = self._loss(batch, batch_idx)
            if after is not None:
                after()
            return value

        with self._context():
            return isolation.of_sample(self._module, loss, parameters)

    def _loss(self, sample: Any, batch_idx: int) -> Tensor | None:
        output = self._step(sample, batch_idx)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if not self._looked_through and loss is not None:
            if _modules.has_reentrant_checkpoint(loss):
                raise RuntimeError(
                    "activation checkpointing with `use_reentrant=True` hides parameters from `torch.autograd.grad`;"
                    " set `use_reentrant=False`"
                )
            self._looked_through = True
        return loss


def _copied(batch: Any) -> Any:
    """None if it cannot be."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        return None

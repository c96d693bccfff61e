"""The batches of one optimizer step: what is kept of them until the gradients are there."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_gcfreeze.gradients import slicing
from lightning_gcfreeze.gradients.slicing import Sample


@dataclass
class StepWindow:
    """The micro-batches of one optimizer step. Samples are those of the first one."""

    sample: Any
    """The first sample, a batch of one; None if it was not asked for."""
    batch: Any
    """A copy of the first micro-batch; None if it was not asked for or cannot be copied."""
    batch_idx: int
    """Of the first micro-batch."""
    first_size: int | None
    """Number of samples in the first micro-batch; None if it is not certain."""
    batch_size: int | None
    """Number of samples in all micro-batches; None if it is unknown."""
    is_cut_by_module: bool = False
    """Whether the module cut the sample, by its method `gcfreeze_first_sample`."""
    micro_batches: int = 1

    @classmethod
    def of_batch(
        cls, batch: Any, batch_idx: int, keep_sample: bool, keep_batch: bool, cut_first: Callable[[Any], Any] | None
    ) -> "StepWindow":
        """Copy what will be needed of a batch, before the training step can change it in place.

        Args:
            batch: the batch to come.
            batch_idx: its number.
            keep_sample: whether the first sample is needed.
            keep_batch: whether the whole batch is.
            cut_first: the module's method `gcfreeze_first_sample`, if there is one.

        Raises:
            slicing.UnclearBatchError: the batch cannot be cut, and there is no `cut_first`.
        """
        kept = _copied(batch) if keep_batch else None
        if cut_first is None:
            first, size = slicing.first_sample(batch) if keep_sample else (None, slicing.batch_size(batch))
            return cls(first, kept, batch_idx, size, size)
        # The first axis of the tensors need not be that of the samples.
        return cls(cut_first(batch), kept, batch_idx, None, slicing.batch_size_or_none(batch), is_cut_by_module=True)

    def extend(self, other: "StepWindow") -> None:
        """Add a later micro-batch of the same optimizer step."""
        self.micro_batches += other.micro_batches
        if self.batch_size is None or other.batch_size is None:
            self.batch_size = None
        else:
            self.batch_size += other.batch_size

    def cut(self, sample: Sample) -> Any:
        """Return a batch with some copies of one sample.

        Raises:
            RuntimeError: the sample is not the first, and the batch was not kept.
        """
        if sample.number:
            if self.batch is None:
                raise RuntimeError(
                    "the batch cannot be copied, so only its first sample is at hand; use `samples='first'`"
                )
            return slicing.cut(self.batch, sample)
        return self.sample if sample.copies == 1 else slicing.cut(self.sample, sample)


def _copied(batch: Any) -> Any:
    """Return a deep copy, or None if there cannot be one."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        return None

"""Private parts of the package that tests look at or set: the one file to change when one of them gets another name."""

from typing import Any

import pytest

from lightning_gcfreeze import GradCovFreezeCallback
from lightning_gcfreeze.freezing import blocks
from lightning_gcfreeze.gradients import capture


def plan_of(callback: GradCovFreezeCallback) -> Any:
    """Return what knows when and how much to freeze (`Plan`)."""
    return callback._state.plan


def thaw_states_of(callback: GradCovFreezeCallback) -> Any:
    """Return the optimizer's states of frozen elements that may thaw (`ThawStates`)."""
    return callback._state.thaw_states


def may_thaw(callback: GradCovFreezeCallback) -> bool:
    """Return whether a later decision may thaw elements."""
    return callback._options.may_thaw


def observed_steps_of(callback: GradCovFreezeCallback) -> int:
    """Return the number of optimizer steps that entered the statistics."""
    known = callback._state.decision or callback._state.observing
    assert known is not None
    return known.observed


def skipped_steps_of(callback: GradCovFreezeCallback) -> int:
    """Return the number of optimizer steps that could not be observed."""
    known = callback._state.decision or callback._state.observing
    assert known is not None
    return known.skipped


def computes_noise(callback: GradCovFreezeCallback) -> bool:
    """Return whether per-sample gradients are computed."""
    return callback._options.reads_samples


def sample_gradients_of(callback: GradCovFreezeCallback) -> Any:
    """Return the source of per-sample gradients; only while a Trainer trains."""
    return callback._running.source


def bytes_sent_of(callback: GradCovFreezeCallback) -> int | None:
    """Return the bytes of gradients that DDP sent for the last step, or None if that is unknown."""
    assert callback._all_reduce is not None
    return callback._all_reduce.bytes_sent


def skip_blocks_of_any_size(patch: pytest.MonkeyPatch) -> None:
    """Skip the gradients of frozen rows and columns also in layers so small that it does not pay."""
    patch.setattr(blocks, "MIN_SAVED_MACS", 1)
    patch.setattr(blocks, "MAX_BLOCK_FRACTION", 1.0)


def sum_in_backward_from(patch: pytest.MonkeyPatch, numel: int) -> None:
    """Sum squared per-sample gradients within the backward pass for layers with more kept elements than `numel`."""
    patch.setattr(capture, "MAX_KEPT_NUMEL", numel)

"""Modules, losses and batches that gradients cannot be observed of."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import UninitializedParameter

from lightning_gcfreeze import _modules
from lightning_gcfreeze._names import shortened


def unsupported_module(module: nn.Module, training_step: Any, replays: bool = True) -> str | None:
    """Modules without all parameters or, if it has to be replayed, whose loss cannot be replayed on a single sample."""
    if lazy := [name for name, p in module.named_parameters() if isinstance(p, UninitializedParameter)]:
        return (
            f"{shortened(lazy)}: parameters of lazy modules have no shape before the first forward pass. Run the module"
            " on one batch before `fit`."
        )
    if not replays:
        return None
    if "dataloader_iter" in inspect.signature(training_step).parameters:
        return (
            "A `training_step(self, dataloader_iter)` fetches its batch itself, so it cannot be replayed on one sample."
            " Take a `batch` instead."
        )
    if scripted := [name for name, layer in module.named_modules() if isinstance(layer, torch.jit.ScriptModule)]:
        return (
            f"{shortened(scripted)}: the state of TorchScript modules cannot be restored after a replay. Use the module"
            " that was scripted, or `torch.compile`."
        )
    if layers := _modules.batch_norms_without_statistics(module):
        return (
            f"{shortened(layers)}: BatchNorm with `track_running_stats=False` cannot take a single sample. Let it track"
            " running statistics, or use GroupNorm or LayerNorm."
        )
    return None


def unsupported_graph(loss: Tensor) -> str | None:
    """Graphs without some of their parameters: behind a wholly frozen layer these would have no gradient."""
    if not _modules.has_reentrant_checkpoint(loss):
        return None
    return (
        "Activation checkpointing with `use_reentrant=True` hides parameters from the graph. Set it to False, or pass"
        " `skip_frozen_gradients=False` with an order that does not read the variance."
    )


def unsupported_samples(module: nn.Module, n_samples: int | None) -> str | None:
    """More samples than the module extracts from a batch itself; None stands for all samples of a batch."""
    if n_samples == 1 or not hasattr(module, "gcfreeze_first_sample"):
        return None
    return (
        f"`gcfreeze_first_sample` of {type(module).__name__} gives the first sample of a batch and no other. Use"
        " `samples='first'`, or remove the method if batches can be sliced along the first axis of their tensors."
    )


def single_sample(batch_size: int | None) -> str | None:
    """Batches of one sample, where gradients of single samples are computed; None stands for an unknown size."""
    if batch_size != 1:
        return None
    return (
        "The batch holds one sample, and the gradient noise is undefined for a batch of one. Use batches of at least 2"
        " samples, accumulate gradients, or use an order that does not read the variance, such as `order='progress'`,"
        " with `samples='auto'` and `covariance='diagonal'`."
    )


def no_gradients(parameters: Mapping[str, Tensor]) -> str | None:
    """Parameters without gradients after the backward pass."""
    if any(p.grad is not None for p in parameters.values()):
        return None
    return (
        "No eligible parameter has a gradient after the backward pass: something uses the gradients up before they can"
        " be observed, as optimizers do that step in the backward pass. Leave the gradients in `p.grad`."
    )

"""What a run in any library is watched by."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

STEPS = 16
"""Optimizer steps of each run."""

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Watch(pl.Callback):
    """Keeps the parameters of every optimizer step."""

    def __init__(self) -> None:
        self.of_steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.of_steps.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})


def bits(values: Tensor) -> Tensor:
    """The bits of float32 values."""
    assert values.dtype == torch.float32
    return values.view(torch.int32)

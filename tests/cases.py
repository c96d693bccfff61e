"""Named modules, batches and optimizers, each built by a function, and a bare Trainer."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset


class Regression(pl.LightningModule):
    """Any network on (x, y) batches with a mean squared error."""

    def __init__(self, network: nn.Module, optimizer: Callable[[Any], Optimizer] | None = None) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.network(x), y)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.network.parameters())


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.02),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, weight_decay=0.1),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True, weight_decay=0.1),
    "Adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5, fused=True),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "Adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, 0.01, t0=0),
    "Rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}
"""Optimizers of torch by name, each with the options of a short run on `mlp`."""


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """5-8-1, smooth, so that no unit is dead: 57 parameters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def deep_mlp(width: int) -> nn.Sequential:
    """5-width-width-1: most parameters are in the layer in the middle."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def convnet() -> nn.Sequential:
    """Convolution, BatchNorm, dropout: everything that keeps state or draws random numbers."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(20, 1),
    )


def data(samples: int = 64, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """x: (samples, 5), y: (samples, 1), with a mean far from zero."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64) + 1.0
    y = x.sum(1, keepdim=True) + 3.0 + 0.1 * torch.randn(samples, 1, generator=generator, dtype=torch.float64)
    return TensorDataset(x.to(dtype), y.to(dtype))


def loader(batch_size: int = 8, samples: int = 64, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    """The samples in order, in the main process."""
    return DataLoader(data(samples, dtype), batch_size=batch_size)


def trainer(**kwargs: Any) -> pl.Trainer:
    """A Trainer on the CPU that writes nothing; `kwargs` override."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | kwargs))


class ResumableLoader:
    """Shuffled batches that differ from epoch to epoch, and go on in the middle of one after a restart."""

    def __init__(self, batch_size: int = 8, batches: int = 6) -> None:
        self.batch_size, self.batches = batch_size, batches
        self.epoch, self.served = 0, 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[Tensor]]:
        if self.served == self.batches:
            self.epoch, self.served = self.epoch + 1, 0
        x, y = data(self.batch_size * self.batches).tensors
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.epoch)).view(self.batches, -1)
        while self.served < self.batches:
            self.served += 1
            rows = order[self.served - 1]
            yield [x[rows], y[rows]]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.served = state["epoch"], state["served"]


def assert_identical(actual: Any, expected: Any, path: str = "") -> None:
    """Equal all the way down, tensors by their bits."""
    assert type(actual) is type(expected), path
    if isinstance(expected, Tensor):
        assert actual.dtype == expected.dtype, path
        assert torch.equal(actual, expected), path
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            assert_identical(actual[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), path
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_identical(a, e, f"{path}[{i}]")
    else:
        assert actual == expected or (actual != actual and expected != expected), path  # NaN is what it is

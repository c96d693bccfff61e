"""What `examples.continual` and `examples.federated` share: turned digits, and a base that knows upright ones.

The 5,000 digits of `examples.data.MNIST`. Half of the training digits are the base's, upright; all others are turned as
the tasks want them.
"""

import argparse
import copy
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from examples.data import MNIST
from lightning_gcfreeze import delta

Digits = tuple[Tensor, Tensor]  # x (n, 784) float32, y (n,) int64
Data = Mapping[str, Mapping[str, Digits]]  # by task, then by stage


class Perceptron(pl.LightningModule):
    """784-200-100, the body, and a linear head for each task; Adam trains the body and the head of `task`."""

    def __init__(self, tasks: Iterable[str]) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(100, 10) for task in tasks})
        self.task = next(iter(self.heads))
        self.lr = 1e-3

    @override
    def forward(self, x: Tensor) -> Tensor:
        """(S, 784) -> (S, 10), by the head of `task`."""
        return self.heads[self.task](self.body(x))  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: Digits, batch_idx: int = 0) -> Tensor:
        """The mean cross-entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, of what requires a gradient."""
        trained = [*self.body.parameters(), *self.heads[self.task].parameters()]
        return torch.optim.Adam([p for p in trained if p.requires_grad], self.lr)


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line into `seeds`, `factors` of rates, `stage` and `quick`, and be quiet."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on (%(default)s)")
    parser.add_argument("--tune", action="store_true", help="five rates each on validation data, seeds from 100 on")
    parser.add_argument("--quick", action="store_true", help="one seed and few steps: does it run?")
    args = parser.parse_args(argv)
    args.seeds = [100 * args.tune + i for i in range(1 if args.quick else args.seeds)]
    args.factors, args.stage = ([0.25, 0.5, 1, 2, 4], "val") if args.tune else ([1], "test")
    be_quiet()
    return args


def be_quiet() -> None:
    """Let Lightning say nothing, and torch use one thread: layers this small are done before a second has begun."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def digits(seed: int) -> dict[str, Digits]:
    """Return the upright digits: "base", "train", "val" and "test"; `seed` fixes who is where."""
    data = MNIST(seed=seed)
    data.setup()
    found: dict[str, Digits] = {stage: (d.tensors[0], d.tensors[1]) for stage, d in data.dataset.items()}
    x, y = found["train"]
    half = len(x) // 2
    return found | {"base": (x[:half], y[:half]), "train": (x[half:], y[half:])}


def turned(data: Digits, quarters: int) -> Digits:
    """Return the digits turned by quarters to the left."""
    x, y = data
    return x.view(-1, 28, 28).rot90(quarters, (1, 2)).flatten(1), y


def batches(data: Digits, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Return batches of 64, shuffled in the order that `seed` fixes."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*data), batch_size=64, shuffle=True, generator=generator)


def fit(network: Perceptron, data: Digits, epochs: int, seed: int, callback: pl.Callback | None = None) -> None:
    """Train in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec")
        pl.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=callback, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(network, batches(data, seed))  # fmt: skip
    network.zero_grad()
    network.trainer = None  # or copies of the network would have copies of it


def setup(turns: Mapping[str, int], seed: int, epochs: int) -> tuple[Perceptron, Data]:
    """Return a base that knows upright digits, and the data of tasks, given how many quarters they turn theirs.

    Each task's head begins as a copy of the one for upright digits.
    """
    upright = digits(seed)
    torch.manual_seed(seed)
    base = Perceptron(turns)
    fit(base, upright["base"], epochs, seed)
    for head in base.heads.values():
        head.load_state_dict(base.heads[base.task].state_dict())
    return base, {task: {stage: turned(d, n) for stage, d in upright.items()} for task, n in turns.items()}


def restored(base: Perceptron, source: Mapping[str, Tensor]) -> Perceptron:
    """Return a copy of the base with a delta applied."""
    network = copy.deepcopy(base)
    delta.apply(network, source)
    return network


@torch.no_grad()
def accuracy(network: Perceptron, data: Digits, task: str) -> float:
    """Return the share of digits that are named rightly."""
    x, y = data
    network.task = task
    return float((network(x).argmax(1) == y).float().mean())

"""One run: a network is tuned by one method at one learning rate, and judged.

Each is a fit of a Lightning Trainer in a process of its own, with Adam and a rate that falls linearly to zero. Methods
are compared at equal numbers of live elements, a fraction of the network's own; a new head trains in any case.
"""

import math
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.memory import Meter
from benchmarks.pretrained.tasks import TASKS_BY_NAME, Inputs, Split, Task
from benchmarks.quality import adapters
from lightning_gcfreeze import GradCovFreezeCallback, ProbeCallback, delta
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.masks import at_random, lowest

BEFORE = 5
"""One of so many steps comes before the freeze."""
JUDGED = 64  # inputs at once


class Tuned(pl.LightningModule):
    """A network, the loss of its task, and Adam, whose rate falls linearly to zero over so many steps."""

    def __init__(self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], lr: float, steps: int) -> None:
        super().__init__()
        self.net, self.loss, self.lr, self.steps = net, loss, lr, steps

    @override
    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss(self.net(x), y)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr, fused=True)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: max(0.0, 1 - t / self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


@dataclass(frozen=True)
class Fit:
    """A run that is about to begin."""

    task: Task
    fraction: float
    lr: float  # with frozen elements
    base: float  # the unfrozen run's own, for steps in which all train
    seed: int
    steps: int

    def module(self, lr: float) -> Tuned:
        """The network as it ships, with a new head where the task has one."""
        pl.seed_everything(self.seed, verbose=False)
        return Tuned(self.task.make(), self.task.loss, lr, self.steps)

    def train(self, module: Tuned, callbacks: list[pl.Callback], steps: slice = slice(None)) -> None:
        """Take these of the run's steps."""
        x, y = self.task.data().train
        batches = _batches(len(y), self.task.batch_size, self.steps, self.seed)[steps]
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_steps=len(batches), callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader: Any = [(picked(x, rows), y[rows]) for rows in batches]
            trainer.fit(module, DataLoader(loader, batch_size=None))

    @property
    def body(self) -> dict[str, Any]:
        """Which parameters may freeze."""
        return {"exclude": "net.head.*"} if self.task.new_head else {}


@dataclass(frozen=True)
class Trained:
    """What a method leaves."""

    module: Tuned
    live: int  # elements that trained to the end, without a new head
    shipped: int  # bytes that make the tuned network of the one that ships


def full(fit: Fit) -> Trained:
    """All parameters train."""
    module = fit.module(fit.lr)
    fit.train(module, [])
    return Trained(module, _count(module, fit.task), _bytes(module.net.state_dict()))


def recommended(fit: Fit) -> Trained:
    """The preset: the callback freezes after a fifth of the steps. What moved before is part of what is shipped."""
    module, factor = fit.module(fit.base), fit.lr / fit.base
    freeze = GradCovFreezeCallback.preset(
        "recommended", t0=fit.steps // BEFORE, k=fit.fraction, lr_after_freeze=factor, **fit.body
    )
    fit.train(module, [freeze])
    return _masked(module, freeze, shipped=_bytes(module.net.state_dict()))


def from_the_base(fit: Fit) -> Trained:
    """The masks of a fifth of the steps, then the others from the weights that ship, frozen from the first."""
    first = fit.steps // BEFORE
    find = GradCovFreezeCallback.preset("recommended", t0=first, k=fit.fraction, **fit.body)
    fit.train(fit.module(fit.base), [find], slice(0, first))
    with tempfile.TemporaryDirectory() as folder:
        find.save_masks(Path(folder) / "masks.pt")
        again = replace(fit, steps=fit.steps - first)
        return _with_masks(again, Path(folder) / "masks.pt")


def probed(fit: Fit) -> Trained:
    """The masks of a probe: the gradients of as many batches at the weights that ship, without a step."""
    first = fit.steps // BEFORE
    with tempfile.TemporaryDirectory() as folder:
        masks = Path(folder) / "masks.pt"
        fit.train(fit.module(fit.base), [ProbeCallback(masks, fit.fraction, **fit.body)], slice(0, first))
        return _with_masks(replace(fit, steps=fit.steps - first), masks)


def random(fit: Fit) -> Trained:
    """Random elements train."""
    return _with_masks(fit, at_random(fit.fraction, seed=fit.seed))


def random_rows(fit: Fit) -> Trained:
    """Random rows train: whole output neurons, filters, words."""
    return _with_masks(fit, at_random(fit.fraction, "row", seed=fit.seed))


def last_layers(fit: Fit) -> Trained:
    """What comes last trains."""
    named = fit.module(fit.lr).named_parameters()
    own = [(n, p) for n, p in named if p.requires_grad and not _in_head(n, fit.task)]
    places = {name: torch.full(p.shape, float(i)) for i, (name, p) in enumerate(own)}
    return _with_masks(fit, lowest(places, fit.fraction))


def lora(fit: Fit) -> Trained:
    """LoRA of the rank that comes nearest, on linear layers and convolutions; PEFT knows no LSTM."""
    return _adapted(fit, "lora")


def shira(fit: Fit) -> Trained:
    """SHiRA of the rank that comes nearest, on linear layers: a value and two int32 for each element."""
    return _adapted(fit, "shira")


METHODS: dict[str, Callable[[Fit], Trained]] = {
    method.__name__: method
    for method in (full, recommended, from_the_base, probed, random, random_rows, last_layers, lora, shira)
}


def run(name: str, method: str, fraction: float, lr: float, base: float, seed: int) -> dict[str, Any]:
    """Tune and judge; in a process that has done nothing yet."""
    torch.set_num_threads(1)
    task, meter = TASKS_BY_NAME[name], Meter("cpu")
    data = task.data()
    resting = meter.now()
    meter.restart()
    began = time.process_time()
    try:
        trained = METHODS[method](Fit(task, fraction, lr, base, seed, task.steps))
    except NotFitting as error:
        return {"left_out": str(error)}
    seconds, peak = time.process_time() - began, meter.peak() - resting
    net = trained.module.net.eval()
    found: dict[str, Any] = {"live": trained.live, "shipped": trained.shipped, "seconds": seconds, "peak": peak}
    for split, (x, y) in (("val", data.val), ("test", data.test)):
        outputs = over(net, x)
        found[split] = float(task.quality(outputs, y))
        found[f"{split}_loss"] = float(task.loss(outputs, y))
    pl.seed_everything(seed, verbose=False)
    before = over(task.make().eval(), data.source, features=True)
    found["kept"] = task.kept(over(net, data.source, features=True), before, data.source_y)
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


class NotFitting(ValueError):
    """A method has no setting with so many live elements."""


@torch.no_grad()
def over(net: Any, x: Inputs, features: bool = False) -> Tensor:
    """The outputs, or the features, of all inputs."""
    of = net.features if features else net
    return torch.cat([of(x[i : i + JUDGED]) for i in range(0, len(x), JUDGED)])


def picked(x: Inputs, rows: Tensor) -> Inputs:
    """Some inputs."""
    return x[rows] if isinstance(x, Tensor) else [x[i] for i in rows]


def _batches(n: int, size: int, steps: int, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    while len(found) < steps:
        found += list(torch.randperm(n, generator=draw).split(size))[: n // size]
    return found[:steps]


def _with_masks(fit: Fit, masks: Any) -> Trained:
    module = fit.module(fit.lr)
    freeze = GradCovFreezeCallback(masks=masks, **fit.body)
    fit.train(module, [freeze])
    return _masked(module, freeze, shipped=len(delta.pack(freeze.delta())))


def _masked(module: Tuned, freeze: GradCovFreezeCallback, shipped: int) -> Trained:
    return Trained(module, sum(int((~mask).sum()) for mask in freeze.frozen.values()), shipped)


def _adapted(fit: Fit, kind: str) -> Trained:
    module = fit.module(fit.lr)
    own = {n: p for n, p in module.named_parameters() if p.requires_grad}
    live = round((1 - fit.fraction) * sum(p.numel() for n, p in own.items() if not _in_head(n, fit.task)))
    head = {n for n in own if _in_head(n, fit.task)}
    leave = ("head",) if fit.task.new_head else ()
    if not adapters.add(module.net, kind, live, fit.seed, leave, convolutions=True):
        raise NotFitting(f"{kind} has no rank with about {live:,} parameters")
    for name, p in module.named_parameters():
        p.requires_grad_(p.requires_grad or name in head)
    fit.train(module, [])
    count = _count(module, fit.task)
    size = 4 if kind == "lora" else 12
    return Trained(module, count, count * size + _bytes({n: p for n, p in own.items() if n in head}))


def _in_head(name: str, task: Task) -> bool:
    return task.new_head and name.startswith("net.head.")


def _count(module: nn.Module, task: Task) -> int:
    return sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and not _in_head(n, task))


def _bytes(tensors: Named) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())

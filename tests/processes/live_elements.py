"""DDP on two ranks after the freeze: with every hold and option of the wrapper, against a loop by hand.

Whole frozen parameters and rows get no gradient, of which DDP's reducer has to be told: else it would wait for them.
"""

import os
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases, insides

T0, SAMPLES = 4, 96
WAYS = [
    ("element", "compact"), ("mixed", "compact"), ("row", "compact"), ("tensor", "compact"), ("row", "restore"),
    ("tensor", "restore"),
]  # fmt: skip
UNUSED, STATIC, VIEW = {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}
COMBINATIONS: list[tuple[str, Any, dict[str, bool], int]] = [
    *((granularity, hold, {}, 1) for granularity, hold in WAYS),
    # "element" and "tensor" with the first two options are in `callback.schedules_agree`.
    *(("row", "compact", option, 1) for option in (UNUSED, STATIC, VIEW)),
    *((granularity, "compact", VIEW, 1) for granularity in ("element", "tensor")),
    *(("tensor", "restore", option, 1) for option in (UNUSED, STATIC)),
    ("row", "restore", VIEW, 1),
    *((granularity, "compact", {}, 2) for granularity in ("row", "tensor")),
]
"""Granularity, hold, options of the wrapper, and micro-batches a step."""


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()


class AtFreeze(pl.Callback):
    """Keeps the weights at the freeze, and how many elements the optimizer steps from then on."""

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback, self.weights, self.stepped = callback, dict[str, Tensor](), 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.callback.phase == "frozen" and not self.weights:
            self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            (group,) = trainer.optimizers[0].param_groups
            parameters, *_ = group.values()  # not by its key: code that names it gets the ordinary parameters
            self.stepped = sum(p.numel() for p in parameters)


def by_hand(start: dict[str, Tensor], frozen: dict[str, Tensor], accumulate: int) -> nn.Module:
    """SGD from the weights at the freeze, in one process, on the live elements only."""
    model = network()
    model.load_state_dict({n.removeprefix("network."): p for n, p in start.items()})
    x, y = cases.data(SAMPLES, torch.float64).tensors
    size = 8 * accumulate  # of a step, over both ranks
    for step in range(T0, SAMPLES // size):
        rows = slice(size * step, size * (step + 1))
        gradients = torch.autograd.grad(nn.functional.mse_loss(model(x[rows]), y[rows]), list(model.parameters()))
        with torch.no_grad():
            for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
                p -= 0.02 * gradient * ~frozen[name]
    return model


def check(granularity: Any, hold: Any, wrapper: dict[str, bool], accumulate: int) -> None:
    """Live elements end where the loop by hand ends, and frozen ones where they were."""
    callback = GradCovFreezeCallback(t0=T0, k=0.7, granularity=granularity, hold=hold, order="random", seed=2)
    module, at_freeze = cases.Regression(network(), lambda p: torch.optim.SGD(p, 0.02)), AtFreeze(callback)
    trainer = cases.trainer(
        callbacks=[callback, at_freeze],
        strategy=DDPStrategy(**wrapper),
        use_distributed_sampler=False,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ["GROUP_WORLD_SIZE"]),
        accumulate_grad_batches=accumulate,
        max_epochs=1,
    )
    data = cases.data(SAMPLES, torch.float64)
    sampler = DistributedSampler(data, num_replicas=2, rank=trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=4, sampler=sampler))

    frozen = {n.removeprefix("network."): mask for n, mask in callback.frozen.items()}
    live = sum(int((~mask).sum()) for mask in frozen.values())
    assert callback.savings is not None
    assert callback.savings.without_backward or granularity != "tensor"
    assert at_freeze.stepped == (live if hold == "compact" else sum(m.numel() for m in frozen.values()))
    moved = 0
    for name, p in by_hand(at_freeze.weights, frozen, accumulate).named_parameters():
        ours, start = module.network.get_parameter(name).detach(), at_freeze.weights["network." + name]
        torch.testing.assert_close(ours, p.detach(), rtol=1e-10, atol=1e-12, msg=name)
        assert torch.equal(ours[frozen[name]], start[frozen[name]]), name
        moved += int((ours != start).sum())
    assert moved == live
    assert all(p.requires_grad for p in module.parameters())


def main() -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # before the freeze, find_unused_parameters=True finds none
        insides.skip_blocks_of_any_size(patch)
        for combination in COMBINATIONS:
            try:
                check(*combination)
            except AssertionError as error:
                raise AssertionError(f"{combination}: {error}") from error

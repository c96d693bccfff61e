"""A probe on two ranks, under DDP and FSDP2, ranks by what one process finds in the gradients of both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_gcfreeze import GradCovFreezeCallback, ProbeCallback
from lightning_gcfreeze.distributed import whole
from lightning_gcfreeze.masks import load, load_order
from tests import cases
from tests.processes.checkpoints import RANK, RANKS, STEPS, Batches, Module, network


def gradients(rank: int) -> NDArray[np.float64]:
    """Of a rank's batches, (batches, elements), at the weights of the beginning."""
    model, found = network(), []
    for x, y in Batches(rank, RANKS):
        found.append(torch.autograd.grad(mse_loss(model(x), y), list(model.parameters())))
    return np.stack([torch.cat([g.flatten() for g in of_batch]).numpy() for of_batch in found])


def flat(named: dict[str, Tensor]) -> NDArray[Any]:
    return torch.cat([tensor.flatten() for tensor in named.values()]).numpy()


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(RANKS, 1, process_group_backend="gloo")


def check(folder: Path, strategy: Callable[[], Any], order: str, expected: NDArray[np.float64]) -> None:
    file, module = folder / f"{strategy.__name__} {order}.pt", Module()
    callback = ProbeCallback(file, 0.6, order=order)
    trainer = cases.trainer(
        callbacks=[callback], devices=RANKS, strategy=strategy(), use_distributed_sampler=False, max_epochs=1
    )
    trainer.fit(module, Batches(RANK, RANKS))
    assert callback.probe.n_batches == STEPS
    assert not any(trainer.optimizers[0].state.values())
    for name, p in network().named_parameters():
        assert torch.equal(whole(module.network.get_parameter(name).detach()), p.detach()), name
    callback.probe.save_order(file.with_suffix(".order"))
    torch.distributed.barrier()
    np.testing.assert_allclose(flat(load_order(file.with_suffix(".order"))), expected, rtol=1e-9, atol=1e-15)
    marks, count = flat(load(file)), round(0.6 * len(expected))
    assert marks.sum() == count
    assert marks[np.argsort(expected, kind="stable")[:count]].all()

    freezing, module = GradCovFreezeCallback(masks=file), Module()
    before = {name: p.detach().clone() for name, p in network().named_parameters()}
    cases.trainer(
        callbacks=[freezing], devices=RANKS, strategy=strategy(), use_distributed_sampler=False, max_epochs=1
    ).fit(module, Batches(RANK, RANKS))
    masks = {name.removeprefix("network."): mask for name, mask in load(file).items()}
    for name, p in module.network.named_parameters():
        now = whole(p.detach())
        assert torch.equal(now[masks[name]], before[name][masks[name]]), name
        assert (now != before[name])[~masks[name]].all(), name
    torch.distributed.barrier()


def main(folder: Path) -> None:
    of_ranks = [gradients(rank) for rank in range(RANKS)]
    mean = sum(of_ranks) / RANKS
    # DDP: each rank has batches of its own. FSDP2 averages each gradient over ranks before anybody sees it.
    ddp_second = np.mean([(g**2).mean(0) for g in of_ranks], axis=0)
    ddp_variance = np.mean([g.var(0, ddof=1) for g in of_ranks], axis=0)
    check(folder, DDPStrategy, "progress", mean.mean(0) ** 2 / np.sqrt(ddp_second))
    check(folder, DDPStrategy, "variance", ddp_variance)
    check(folder, fsdp2, "progress", mean.mean(0) ** 2 / np.sqrt((mean**2).mean(0)))
    check(folder, fsdp2, "variance", mean.var(0, ddof=1))

"""C_t under DDP on two ranks is the mean of both ranks' own, and both freeze its lowest elements."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import all_gather
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, DistributedSampler

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases
from tests.oracles.recursion import covariance

T0, K = 4, 28


def flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in named.values()])


def variance_by_hand() -> NDArray[np.float64]:
    """One process: rank r sees the samples r, r + 2, …; each rank has a C_t of its own, g_S is the mean of both."""
    network = cases.mlp(torch.float64)
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, 0.02, momentum=0.9)
    x, y = cases.data(32, torch.float64).tensors

    def gradient(rows: slice) -> tuple[Tensor, ...]:
        return torch.autograd.grad(mse_loss(network(x[rows]), y[rows]), parameters)

    def vector(gradients: tuple[Tensor, ...]) -> NDArray[np.float64]:
        return torch.cat([g.flatten() for g in gradients]).numpy()

    pairs: list[list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = [[], []]
    for step in range(T0):
        of_ranks = [gradient(slice(rank + 8 * step, 8 * (step + 1), 2)) for rank in (0, 1)]
        mean = tuple((a + b) / 2 for a, b in zip(*of_ranks, strict=True))
        for rank in (0, 1):
            first = rank + 8 * step
            pairs[rank].append((vector(gradient(slice(first, first + 1))), vector(mean)))
        for p, g in zip(parameters, mean, strict=True):
            p.grad = g
        optimizer.step()
    return np.mean([np.diag(covariance(of_rank, lambda t: 1 / t)) for of_rank in pairs], axis=0)


def main() -> None:
    callback = GradCovFreezeCallback(t0=T0, k=0.5)
    module = cases.Regression(cases.mlp(torch.float64), lambda p: torch.optim.SGD(p, 0.02, momentum=0.9))
    trainer = cases.trainer(callbacks=[callback], devices=2, strategy="ddp", use_distributed_sampler=False)
    data = cases.data(32, torch.float64)  # Lightning's own sampler would shuffle
    sampler = DistributedSampler(data, num_replicas=2, rank=trainer.global_rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=4, sampler=sampler))

    expected = variance_by_hand()
    np.testing.assert_allclose(flat(callback.variance), expected, rtol=1e-10)
    frozen = flat(callback.frozen)
    assert frozen[np.argsort(expected, kind="stable")[:K]].all()
    assert frozen.sum() == K
    for own in (frozen.int(), flat(dict(module.state_dict()))):
        both = [torch.empty_like(own), torch.empty_like(own)]
        all_gather(both, own)
        assert torch.equal(*both)

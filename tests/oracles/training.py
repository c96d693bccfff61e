"""The warm-up by hand: a training loop, one autograd call a sample, the recursion in NumPy. Knows no Lightning."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.oracles.recursion import covariance

Loss = Callable[[nn.Module, Any], Tensor]


def observed_run(
    network: nn.Module,
    steps: Sequence[Sequence[Any]],
    loss: Loss,
    first: Callable[[Any], Any],
    optimizer: torch.optim.Optimizer,
    gain: Callable[[int], float] = lambda t: 1 / t,
    every: int = 1,
) -> np.ndarray:
    """Train, and return C after the last step.

    Args:
        steps: the micro-batches of each optimizer step; g_S is the mean of their gradients.
        loss: mean loss of the network on a batch.
        first: a batch -> the batch of its first sample.
    """
    parameters = list(network.parameters())

    def flat(grads: Sequence[Tensor]) -> np.ndarray:
        return np.concatenate([g.detach().double().numpy().ravel() for g in grads])

    pairs = []
    for t, batches in enumerate(steps, start=1):
        grads = [torch.autograd.grad(loss(network, batch), parameters) for batch in batches]
        mean = [sum(g) / len(batches) for g in zip(*grads, strict=True)]
        if t % every == 0:
            g_one = torch.autograd.grad(loss(network, first(batches[0])), parameters)
            pairs.append((flat(g_one), flat(mean)))
        for p, g in zip(parameters, mean, strict=True):
            p.grad = g
        optimizer.step()
    return covariance(pairs, gain)

"""Running covariance of the gradient noise, the full (p, p) matrix, for small models.

    C_t = (1 - κ_t) C_{t-1} + κ_t/m Σ_j (g_j - g_S)(g_j - g_S)ᵀ

Source: the paper, Eq. (2.6), with m = 1. Units: a squared gradient. Memory: p² floats.
"""

from functools import reduce

import torch
from torch import Tensor

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.estimators.base import Step
from lightning_gcfreeze.estimators.per_sample import SquaredNoise
from lightning_gcfreeze.estimators.scratch import gated

MAX_BYTES = 4 * 2**30
"""Size of the largest matrix that is accepted: 4 GiB, p = 32,768 in float32."""


class FullCovariance:
    """The covariance matrix of the gradient noise; see `Estimator` for the contract.

    Rows and columns follow the parameters in the given order, each flattened row by row. A step must bring gradients in
    the form of `PerSample`: a sum of squared noise has no products of different elements.

    Args:
        parameters: the eligible parameters, by name.

    Raises:
        ValueError: the matrix would take more than `MAX_BYTES`.
        TypeError: `add` got gradients that were not kept one by one.
    """

    def __init__(self, parameters: Named) -> None:
        self._shapes = {name: p.shape for name, p in parameters.items()}
        dtype = reduce(torch.promote_types, (p.dtype for p in parameters.values()), torch.float32)
        p = sum(shape.numel() for shape in self._shapes.values())
        if (size := p * p * dtype.itemsize) > MAX_BYTES:
            raise ValueError(
                f"`covariance='full'` needs a {p:,} x {p:,} matrix, {size / 2**30:.1f} GiB for p = {p:,} eligible"
                f" parameters; at most {MAX_BYTES / 2**30:g} GiB are allowed. Use `covariance='diagonal'`, which orders"
                " the same and takes one float per parameter, or narrow `include`/`exclude`."
            )
        device = next(iter(parameters.values())).device
        self.tensors = {"covariance": torch.zeros(p, p, dtype=dtype, device=device)}

    def add(self, step: Step) -> None:
        dtype = self.matrix.dtype
        noises = ((n, _dense(step.samples[n]).to(dtype) - step.g_batch[n].to(dtype)) for n in self._shapes)
        noise = torch.cat([rows.reshape(len(rows), self._shapes[n].numel()) for n, rows in noises], dim=1)
        noise = gated(noise, step.valid)
        self.matrix.addmm_(noise.T, noise, alpha=step.weight * step.correction / len(noise))

    @property
    def matrix(self) -> Tensor:
        """C_t / s_t, (p, p): the estimator's own tensor."""
        return self.tensors["covariance"]

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t / s_t, ``{name: (*p.shape)}``: views of it."""
        sizes = [shape.numel() for shape in self._shapes.values()]
        pieces = self.matrix.diagonal().split(sizes)
        return {name: d.reshape(shape) for (name, shape), d in zip(self._shapes.items(), pieces, strict=True)}


def _dense(g: SquaredNoise) -> Tensor:
    if not hasattr(g, "dense"):
        raise TypeError(
            f"A full covariance needs the gradient of each sample, but {type(g).__name__} did not keep them."
        )
    found: Tensor = g.dense()
    return found

"""Fits with given masks, and the plain training that they have to equal."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests import cases, user_programs
from tests.witnesses import bits

Named = dict[str, Tensor]


def network() -> nn.Sequential:
    """A weight above the size of which "compact" takes gradients early, and small parameters around it; float32."""
    return user_programs.case.network().float()


def module(optimizer: str | Callable[[Any], Any] = "AdamW", make: Callable[[], nn.Module] = network) -> Any:
    return cases.Regression(make(), cases.OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer)


def drawn(granularity: str = "element", make: Callable[[], nn.Module] = network, seed: int = 3) -> Named:
    """Masks of six tenths of the elements or rows; the first tensor is frozen whole, the last one has no mask."""
    rng, found = np.random.default_rng(seed), {}
    first, *names, _ = [name for name, _ in make().named_parameters()]
    parameters = dict(make().named_parameters())
    for name in names:
        shape = tuple(parameters[name].shape)
        axes = shape if granularity == "element" else shape[:1]
        marked = (rng.random(axes) < 0.6).reshape(axes + (1,) * (len(shape) - len(axes)))
        found[f"network.{name}"] = torch.from_numpy(np.broadcast_to(marked, shape).copy())
    return {f"network.{first}": torch.ones(parameters[first].shape, dtype=torch.bool), **found}


def weights(trained: nn.Module) -> Named:
    return {name: p.detach().clone() for name, p in trained.named_parameters()}


def fit(trained: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    trainer = cases.trainer(callbacks=[*callbacks], **options)
    dtype = next(trained.parameters()).dtype
    trainer.fit(trained, cases.loader(dtype=dtype))
    return trainer


def assert_trained_as_plainly(
    trained: nn.Module, plain: nn.Module, start: Named, given: Named, rtol: float = 1e-4, atol: float = 1e-6
) -> None:
    """Frozen elements have the bits of the start, live ones are the reference's to rounding; most of them moved."""
    moved, live = 0, 0
    expected = weights(plain)
    for name, now in weights(trained).items():
        mask = given.get(name, torch.zeros(now.shape, dtype=torch.bool))
        assert torch.equal(bits(now)[mask], bits(start[name])[mask]), f"frozen elements of {name} moved"
        assert_close(now, expected[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        moved, live = moved + int((now != start[name]).sum()), live + int((~mask).sum())
    assert moved > 0.9 * live

"""A loop in one process that freezes what masks mark, and the masks: what programs for shards are compared with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gcfreeze import Evidence
from lightning_gcfreeze.orderings import needs
from tests import cases
from tests.processes.checkpoints import SAMPLES, STEPS, network

Masks = dict[str, Tensor]


def adamw(p: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, 0.02, weight_decay=0.1, **more)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": adamw,
    "AdamW fused": lambda p: adamw(p, fused=True),
    "AdamW foreach": lambda p: adamw(p, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.02),
}
ENTRIES = {"AdamW": 2, "AdamW fused": 2, "AdamW foreach": 2, "SGD": 0, "SGD momentum": 1, "Adagrad": 1}
"""Numbers that the optimizer keeps for each element."""


# What freezes --------------------------------------------------------------------------------------------------------


def some() -> Masks:
    """Everything of which two ranks see different sides: half of the rows is what a rank of two has."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in network().named_parameters()}
    masks["0.weight"][:4] = True  # all that rank 0 has of it
    masks["0.weight"][4:, ::2] = True
    masks["2.0.weight"][2:] = True  # all that rank 1 has, and nothing of rank 0's
    masks["2.0.bias"][1:3] = True
    masks["2.1.weight"][:2] = True
    masks["4.weight"][:] = masks["4.bias"][:] = True  # a whole module
    return masks


def all_but_one() -> Masks:
    """One element is left, of the last rank: the others have nothing to step."""
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in network().named_parameters()}
    masks["0.weight"][7, 4] = False
    return masks


def everything_in_part() -> Masks:
    """No tensor is frozen or live as a whole."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in network().named_parameters() if p.numel() > 1}
    for mask in masks.values():
        mask.view(-1)[::3] = True
    return masks


def freezing(masks: Masks) -> dict[str, Any]:
    """Return arguments with which exactly this freezes."""

    @needs(variance=False)
    def order(evidence: Evidence) -> dict[str, Tensor]:
        given = dict[str, Tensor]()
        for name, weight in evidence.weights.items():
            nothing = torch.zeros(evidence.shards.shape(name, weight), dtype=torch.bool)
            given[name] = masks.get(name.removeprefix("network."), nothing)
        return {name: (~part).double() for name, part in evidence.shards.parts(given).items()}

    return {"order": order, "k": sum(int(mask.sum()) for mask in masks.values())}


# The loop in one process ---------------------------------------------------------------------------------------------


def samples(rise: float) -> tuple[Tensor, Tensor]:
    """Return those of all steps; targets, and with them losses, rise by this factor from step to step."""
    x, y = cases.data(SAMPLES * STEPS, torch.float64).tensors
    return x, y * (1 + rise) ** torch.arange(STEPS).repeat_interleave(SAMPLES).view(-1, *[1] * (y.dim() - 1))


def by_hand(
    masks: list[Masks],
    make: Callable[[Any], torch.optim.Optimizer],
    clip: Callable[[Any], Any] | None = None,
    schedule: Callable[[Any], Any] | None = None,
    accumulate: int = 1,
    rise: float = 0.0,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train on all samples; in each step an element that its masks mark keeps its value, and its optimizer's state."""
    model = network()
    optimizer = make(model.parameters())
    scheduler = schedule(optimizer) if schedule else None
    x, y = (part.split(SAMPLES) for part in samples(rise))
    for step, of_step in enumerate(masks):
        optimizer.zero_grad()
        for i in range(accumulate * step, accumulate * (step + 1)):
            (nn.functional.mse_loss(model(x[i]), y[i]) / accumulate).backward()
        kept = []
        for name, p in model.named_parameters():
            if (mask := of_step.get(name)) is None:
                continue
            p.grad = None if mask.all() else p.grad.masked_fill(mask, 0.0)
            entries = [
                v for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.shape == p.shape and v.dim()
            ]
            kept += [(tensor, mask, tensor.detach().clone()) for tensor in (p, *entries)]
        if clip:
            clip(model.parameters())
        optimizer.step()
        with torch.no_grad():
            for tensor, mask, before in kept:
                tensor.copy_(torch.where(mask, before, tensor))
        if scheduler:
            scheduler.step()
    return model, optimizer

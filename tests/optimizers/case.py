"""A row of the table: an optimizer, how to make it, what is to become of it, and why."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Outcome: TypeAlias = Literal["compact", "restore", "refused"]

BY_ELEMENT = "works by element, and is in `ELEMENTWISE`"
COULD_BE_COMPACT = "not in `ELEMENTWISE`; works by element with these options, so its class may be added"
UNKNOWN = "not known to work by element"
MIXES = "an element's update depends on other elements, or its state is not by element"
OWN_SLOW_WEIGHTS = "not known to work by element; writes slow weights of its own within its step"
SECOND_ORDER = "differentiates gradients once more, so the module overrides `backward`"
SPARSE = "takes sparse gradients only, and a flat vector of live elements has none"

TWO_WEIGHTS = "`train()` and `eval()` swap a second set of weights in, whose frozen elements move"
FORWARD_ELSEWHERE = "takes gradients at other weights than it leaves behind, whose frozen elements move"
TWO_STEPS = "moves all weights, frozen ones too, to take a second gradient there"
SLOW_WEIGHTS = "wraps another optimizer and pulls the weights towards slow ones every few steps"
SEVERAL_LOSSES = "evaluates the loss several times a step, along directions that mix frozen and live elements"


@dataclass(frozen=True)
class Case:
    """What the table says of an optimizer.

    Args:
        outcome: how `hold="auto"` holds frozen elements under it, or "refused".
        reason: why, in half a sentence.
        options: arguments besides the parameters, such that momentum and weight decay move a weight without a gradient.
        make: makes one from its class, a network and the options; None: from the network's parameters.
        matrices: whether it takes matrices only.
        dtype: of the network.
        rtol: what rounding may do to live elements, relative to 1.
    """

    outcome: Outcome
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[..., Optimizer] | None = None
    matrices: bool = False
    dtype: torch.dtype = torch.float64
    rtol: float = 1e-7

    def optimizer(self, path: str, network: nn.Module) -> Optimizer:
        """A new optimizer of the class at `path`, for a network."""
        cls = find(path)
        if self.make:
            return self.make(cls, network, **self.options)
        return cls([p for p in network.parameters() if self.takes(p)], **self.options)

    def takes(self, p: Tensor) -> bool:
        """Whether the optimizer is given such a parameter."""
        return p.dim() == 2 or not self.matrices


def find(path: str) -> type[Optimizer]:
    """The class at ``module.Class``."""
    module, _, name = path.rpartition(".")
    cls: type[Optimizer] = getattr(importlib.import_module(module), name)
    return cls


def with_use_muon(cls: Any, network: nn.Module, **options: Any) -> Optimizer:
    """Matrices go to Muon, the rest to its AdamW."""
    groups = [
        {"params": [p for p in network.parameters() if (p.dim() == 2) is use_muon], "use_muon": use_muon}
        for use_muon in (True, False)
    ]
    return cls(groups, **options)


def with_rank(cls: Any, network: nn.Module, **options: Any) -> Optimizer:
    """Gradients of matrices are projected to rank 2, the projection is renewed every four steps."""
    group = {"rank": 2, "update_proj_gap": 4, "scale": 1.0, "projection_type": "std", "scale_type": "channel"}
    return cls([{"params": list(network.parameters()), **group}], **options)


def of_module(cls: Any, network: nn.Module, **options: Any) -> Optimizer:
    """The optimizer takes the module itself."""
    return cls(network, **options)


def of_named_parameters(cls: Any, network: nn.Module, **options: Any) -> Optimizer:
    """The optimizer takes names, too."""
    return cls(network.named_parameters(), verbose=False, **options)


def around_adam(cls: Any, network: nn.Module, **options: Any) -> Optimizer:
    """The optimizer wraps another."""
    return cls(torch.optim.Adam(network.parameters(), 0.01), **options)


def around_sgd(cls: Any, network: nn.Module, **options: Any) -> Optimizer:
    """The optimizer makes the one that it wraps."""
    return cls(network.parameters(), torch.optim.SGD, lr=0.01, **options)


def around_sgd_of_module(cls: Any, network: nn.Module, **options: Any) -> Optimizer:
    """The same, and it takes the module, too."""
    return cls(network, network.parameters(), torch.optim.SGD, lr=0.01, **options)

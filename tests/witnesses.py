"""What shows that frozen elements are constant to the bit, and that the others are not."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_gcfreeze import GradCovFreezeCallback

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def bits(tensor: Tensor) -> Tensor:
    """Return a copy of the elements as integers of the same shape: -0.0 is not 0.0, and a NaN equals itself."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(INTEGERS[tensor.element_size()])


def flat_bits(tensor: Tensor) -> Tensor:
    """Return `bits` of the elements row by row, also of a scalar."""
    return tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()]).clone()


class Witness(pl.Callback):
    """Compares the bits of every parameter after each batch with those right after the freeze.

    Comes before the callback in a Trainer's list.
    """

    def __init__(self, callback: GradCovFreezeCallback) -> None:
        self.callback = callback
        self.at_freeze: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}
        self.steps = 0

    def on_train_batch_end(self, trainer: Any, pl_module: pl.LightningModule, *args: Any) -> None:
        now = {name: bits(p) for name, p in pl_module.named_parameters()}
        if self.callback.phase == "frozen" and not self.at_freeze:
            self.at_freeze, self.moved = now, {name: torch.zeros_like(b, dtype=torch.bool) for name, b in now.items()}
        elif self.at_freeze:
            self.steps += 1
            self.moved = {name: m | (now[name] != self.at_freeze[name]) for name, m in self.moved.items()}

    def check(self) -> None:
        """Fail if a frozen element moved in any of at least eight steps, or less than half of the live ones did."""
        assert self.steps >= 8
        for name, frozen in self.callback.frozen.items():
            assert not (self.moved[name] & frozen).any(), f"a frozen element of {name} moved"
        live = torch.cat([(self.moved[n] & ~f).flatten() for n, f in self.callback.frozen.items()])
        frozen = torch.cat([f.flatten() for f in self.callback.frozen.values()])
        assert 0 < frozen.sum() < len(frozen)
        assert live.sum() >= 0.5 * (~frozen).sum(), "hardly anything trained"


class Spy:
    """An order by E[g²] that keeps what it was given."""

    needs = ("second_moment",)
    reads_variance = False

    def __call__(self, evidence: Any) -> Any:
        self.second_moment = {name: tensor.clone() for name, tensor in evidence.second_moment.items()}
        return evidence.second_moment

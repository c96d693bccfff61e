"""What a freeze saves, counted: bytes of optimizer state and of gradients, and work for the weights' gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import local

_ROWS = 30  # of the table


@dataclass(frozen=True)
class Footprint:
    """What an optimizer holds, on this process."""

    state: int
    """Bytes of its state."""
    gradients: int
    """Bytes of the gradients that it steps by."""

    @classmethod
    def of(cls, optimizer: Optimizer) -> "Footprint":
        """As it is now."""
        entries = [
            v for entry in optimizer.state.values() for v in (entry.values() if isinstance(entry, dict) else [entry])
        ]
        state = [value for value in entries if isinstance(value, Tensor)]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        return cls(sum(map(_bytes, state)), sum(map(_bytes, parameters)))


@dataclass(frozen=True)
class ParameterSavings:
    """One parameter's share."""

    elements: int
    frozen: int
    flops: int | None
    """What the gradient of a weight takes in a step without promotion, adds and multiplies; None: not counted."""
    flops_skipped: int | None


@dataclass(frozen=True)
class Savings:
    """What the freeze saved, and what it did not: see `not_saved`."""

    parameters: dict[str, ParameterSavings]
    """By name, the eligible ones."""
    before: Footprint
    """All of the optimizer, before the freeze."""
    after: Footprint
    index_bytes: int
    """What knowing where the live elements lie takes, in exchange."""
    without_backward: tuple[str, ...]
    """Parameters that require no gradient any more; before the first other one there is no backward pass."""

    not_saved = "forward passes, activations, and gradients of activations behind the first live parameter"

    @property
    def weight_gradient_flops_skipped(self) -> float:
        """The skipped part of what the weights' gradients take, where that was counted; in [0, 1]."""
        counted = [p for p in self.parameters.values() if p.flops]
        return sum(p.flops_skipped or 0 for p in counted) / max(1, sum(p.flops or 0 for p in counted))

    def scalars(self) -> dict[str, float]:
        """The totals, as tags for a logger."""
        return {
            "gcfreeze/optimizer_state_bytes": float(self.after.state + self.index_bytes),
            "gcfreeze/gradient_bytes": float(self.after.gradients),
            "gcfreeze/weight_gradient_flops_skipped": self.weight_gradient_flops_skipped,
        }

    def table(self) -> str:
        """Totals, then the largest parameters, as text for people."""
        largest = sorted(self.parameters, key=lambda name: -self.parameters[name].elements)[:_ROWS]
        rows = [("parameter", "elements", "frozen", "its gradient's FLOPs a step", "skipped")]
        for name in (name for name in self.parameters if name in largest):
            p = self.parameters[name]
            flops = (
                ("not counted", "") if p.flops is None else (f"{p.flops:,}", f"{_ratio(p.flops_skipped, p.flops):.1%}")
            )
            rows.append((name, f"{p.elements:,}", f"{_ratio(p.frozen, p.elements):.1%}", *flops))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
            ).rstrip()
            for row in rows
        ]
        if (more := len(self.parameters) - len(largest)) > 0:
            lines.append(f"… and {more} smaller ones")
        return "\n".join(
            [
                f"Optimizer state  {_change(self.before.state, self.after.state)}, and {_size(self.index_bytes)} of"
                " indices",
                f"Gradients        {_change(self.before.gradients, self.after.gradients)}",
                f"Weight gradients {self.weight_gradient_flops_skipped:.1%} of the FLOPs skipped;"
                f" {len(self.without_backward)} parameters need no gradient at all",
                f"Not saved        {self.not_saved}",
                *lines,
            ]
        )


def of_freeze(
    frozen: Named,
    positions: Mapping[str, int],
    blocks: Mapping[str, Any],
    without_backward: Mapping[str, Any],
    before: Footprint,
    after: Footprint,
    index_bytes: int,
) -> Savings:
    """Put the counts together.

    Args:
        frozen: ``{name: bool (*p.shape)}``, True = held constant.
        positions: by name of a weight, at how many places of a step's batch it is applied.
        blocks: by name of a weight, the `Block` of its gradient that is computed.
        without_backward: by name, what requires no gradient.
    """
    parameters = {}
    for name, mask in frozen.items():
        flops = 2 * positions[name] * mask.numel() if name in positions else None
        skipped = None
        if flops is not None:
            computed = 0 if name in without_backward else blocks[name].numel if name in blocks else mask.numel()
            skipped = flops - 2 * positions[name] * computed
        parameters[name] = ParameterSavings(mask.numel(), int(mask.sum()), flops, skipped)
    return Savings(parameters, before, after, index_bytes, tuple(without_backward))


def _bytes(tensor: Tensor) -> int:
    tensor = local(tensor)
    return tensor._values().nbytes + tensor._indices().nbytes if tensor.is_sparse else tensor.nbytes


def _ratio(part: int | None, whole: int) -> float:
    return (part or 0) / max(1, whole)


def _change(before: int, after: int) -> str:
    return f"{_size(before)} -> {_size(after)} ({_ratio(after, before):.1%})"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

"""What a freeze saves: bytes of optimizer state and of gradients, and FLOPs of the weights' gradients."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from lightning_gcfreeze import _torch
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import local
from lightning_gcfreeze.freezing.blocks import Block
from lightning_gcfreeze.freezing.optimizer_state import is_by_element, state_by_element

_MAX_TABLE_ROWS = 30


@dataclass(frozen=True)
class Footprint:
    """Memory of an optimizer on this process."""

    state: int
    """Bytes of the optimizer's state."""
    gradients: int
    """Bytes of the gradients of the optimizer's parameters, if all of them that require a gradient have one."""

    @classmethod
    def of(cls, optimizer: Optimizer) -> "Footprint":
        """Measure an optimizer as it is now."""
        entries = [
            v for entry in optimizer.state.values() for v in (entry.values() if isinstance(entry, dict) else [entry])
        ]
        state = [value for value in entries if isinstance(value, Tensor)]
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        return cls(sum(map(_nbytes, state)), sum(map(_nbytes, parameters)))

    def if_live(self, optimizer: Optimizer, n_more: int) -> int:
        """Return how many bytes the state would have with so many more elements, each as costly as those it has."""
        known = {p: state for p, state in optimizer.state.items() if state}
        nbytes = sum(_nbytes(v) for p, state in known.items() for v in state.values() if is_by_element(v, p))
        return self.state + round(n_more * nbytes / max(1, sum(local(p).numel() for p in known)))


def room_for(
    memory: float, optimizer: Optimizer, parameters: Collection[Tensor], place_bytes: int, saves_gradients: bool
) -> float:
    """Return what fraction of parameters' elements may be live, so that an optimizer takes no more memory than allowed.

    Args:
        memory: bytes for its state, the gradients of its parameters, and the places of live elements.
        optimizer: with the state that it has without a freeze.
        parameters: those that may freeze; the others count in full.
        place_bytes: of the places of all elements, if they were live.
        saves_gradients: whether live elements alone keep their gradients.

    Returns:
        1 if nothing has to freeze; below 0 if the others alone take more.
    """
    total = Footprint.of(optimizer)
    if total.state + total.gradients <= memory:
        return 1.0
    freezable = sum(_nbytes(p) for p in parameters) if saves_gradients else 0
    freezable += sum(_nbytes(v) for p in parameters for v in state_by_element(optimizer, p).values())
    fixed = total.state + total.gradients - freezable
    return (memory - fixed) / max(1, freezable + place_bytes)


@dataclass(frozen=True)
class ParameterSavings:
    """What the freeze saves for one parameter."""

    elements: int
    """Number of its elements; of a sharded parameter, those on this process."""
    frozen: int
    """Number of its frozen elements."""
    flops: int | None
    """Additions and multiplications of its gradient in a step if nothing is skipped; None: not counted, because it is
    no weight of a linear layer or a plain convolution, or because the step before the freeze could not be counted."""
    flops_skipped: int | None
    """How many of them are skipped; None: not counted."""


@dataclass(frozen=True)
class Savings:
    """What the freeze saves, and what it does not save: see `not_saved`."""

    parameters: dict[str, ParameterSavings]
    """Savings of each eligible parameter, by name."""
    before: Footprint
    """Memory of the whole optimizer before the freeze."""
    after: Footprint
    """Memory of the whole optimizer after the freeze."""
    index_bytes: int
    """Bytes that were added: indices of the live or frozen elements, and copies of frozen values."""
    without_backward: tuple[str, ...]
    """Names of parameters that no longer require a gradient. There is no backward pass before the first other one."""

    not_saved = "forward passes, activations, and gradients of activations behind the first live parameter"

    @property
    def weight_gradient_flops_skipped(self) -> float:
        """Fraction of the counted FLOPs of the weights' gradients that is skipped, in [0, 1]."""
        counted = [p for p in self.parameters.values() if p.flops]
        return sum(p.flops_skipped or 0 for p in counted) / max(1, sum(p.flops or 0 for p in counted))

    @property
    def verdict(self) -> str:
        """What the freeze is worth, and what to change for more, in plain words.

        A weight's gradient is a third of the products of its layer in a step: the others are the forward pass and the
        gradient of the layer's input.
        """
        before = self.before.state + self.before.gradients
        memory = _ratio(self.after.state + self.after.gradients + self.index_bytes, before)
        work = self.weight_gradient_flops_skipped / 3
        said = f"The optimizer and its gradients take {memory:.0%} of the memory that they took."
        if memory >= 0.995:
            said = (
                "The optimizer and its gradients take as much memory as before; `hold='compact'` saves it or tells why."
            )
        if not any(p.flops for p in self.parameters.values()):
            return said
        more = "" if self.weight_gradient_flops_skipped >= 0.5 else "; `granularity='mixed'` or 'row' skips more"
        if work < 0.005:
            return f"{said} All weight gradients are computed, so a step takes about as long as before{more}."
        return f"{said} About {work:.0%} of the work of linear layers and convolutions is skipped in each step{more}."

    @property
    def totals(self) -> list[tuple[str, str]]:
        """What was saved, by what it is, in words."""
        state = _change(self.before.state, self.after.state)
        work = _skipped(self.weight_gradient_flops_skipped)
        return [
            ("Optimizer state", f"{state}, plus {_size(self.index_bytes)} of indices"),
            ("Gradients", _change(self.before.gradients, self.after.gradients)),
            ("Weight gradients", f"{work}; parameters without any gradient: {len(self.without_backward)}"),
            ("Not saved", self.not_saved),
        ]

    def scalars(self) -> dict[str, float]:
        """Return the totals by tag, for loggers."""
        return {
            "gcfreeze/optimizer_state_bytes": float(self.after.state + self.index_bytes),
            "gcfreeze/gradient_bytes": float(self.after.gradients),
            "gcfreeze/weight_gradient_flops_skipped": self.weight_gradient_flops_skipped,
        }

    def table(self) -> str:
        """Return the verdict, the totals and the largest parameters, in the order of the model, as text."""
        largest = sorted(self.parameters, key=lambda name: -self.parameters[name].elements)[:_MAX_TABLE_ROWS]
        shown = [name for name in self.parameters if name in largest]
        rows = [("parameter", "elements", "frozen", "gradient FLOPs per step", "skipped")]
        rows += [(name, *_cells(self.parameters[name])) for name in shown]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *cells in rows:
            right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
        if more := len(self.parameters) - len(shown):
            lines.append(f"… and {more} smaller ones")
        if any(self.parameters[name].flops is None for name in shown):
            lines.append("not counted: not a weight of a linear layer or plain convolution, or its uses are unknown")
        return "\n".join([self.verdict, *(f"{label:<16} {text}" for label, text in self.totals), *lines])


def count_savings(
    frozen: Named,
    uses_per_step: Mapping[str, int],
    blocks: Mapping[str, Block],
    without_backward: Collection[str],
    before: Footprint,
    after: Footprint,
    index_bytes: int,
) -> Savings:
    """Count what a freeze saves.

    Args:
        frozen: ``{name: bool (*p.shape)}``, True = held constant.
        uses_per_step: how often a step uses each weight, by name; see `WeightUses`.
        blocks: the block of the weight's gradient that is computed, by name of the weight.
        without_backward: names of parameters that no longer require a gradient.
        before: memory of the optimizer before the freeze.
        after: memory of the optimizer after the freeze.
        index_bytes: bytes of indices and copies that the freeze added.
    """
    parameters = {}
    for name, mask in frozen.items():
        flops = 2 * uses_per_step[name] * mask.numel() if uses_per_step.get(name) else None
        skipped = None
        if flops is not None:
            computed = 0 if name in without_backward else blocks[name].numel if name in blocks else mask.numel()
            skipped = flops - 2 * uses_per_step[name] * computed
        parameters[name] = ParameterSavings(mask.numel(), int(mask.count_nonzero()), flops, skipped)
    return Savings(parameters, before, after, index_bytes, tuple(without_backward))


def _cells(p: ParameterSavings) -> tuple[str, str, str, str]:
    """Return a parameter's row of the table, without its name."""
    counted = ("not counted", "") if p.flops is None else (f"{p.flops:,}", f"{_ratio(p.flops_skipped, p.flops):.1%}")
    return f"{p.elements:,}", f"{_ratio(p.frozen, p.elements):.1%}", *counted


def _skipped(fraction: float) -> str:
    return f"{fraction:.1%} of the FLOPs are skipped" if fraction else "all are computed"


def _nbytes(tensor: Tensor) -> int:
    tensor = local(tensor)
    return _torch.sparse_nbytes(tensor) if tensor.is_sparse else tensor.nbytes


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

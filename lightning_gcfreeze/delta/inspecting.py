"""What is in a delta, without a model."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lightning_gcfreeze.delta.files import Source, by_name, content, load, read, scalar, unit_of


class Line(NamedTuple):
    """One tensor of a delta."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    """None in a delta of format 1."""
    unit: str
    live: int
    """Elements that the delta writes."""


@dataclass(frozen=True)
class Summary:
    """What a delta or its file has. ``str()`` is a table."""

    format: int
    values_only: bool
    value_bytes: int
    mask: str | None
    """Hex; None in memory, and in format 1."""
    base: str | None
    """Hex; None where nobody said it."""
    number: int | None
    step: int | None
    lines: tuple[Line, ...]
    """Empty for values alone."""

    @property
    def live(self) -> int:
        return sum([line.live for line in self.lines])

    def __str__(self) -> str:
        kind = "values alone, for the places of this mask" if self.values_only else f"{len(self.lines)} tensors"
        rows = [f"format {self.format}, {kind}, {self.value_bytes:,} bytes of values"]
        about = {"mask": self.mask, "base": self.base, "number": self.number, "step": self.step}
        rows += [f"{key} {value}" for key, value in about.items() if value is not None]
        if self.values_only:
            return "\n".join(rows)
        shapes = [line.shape for line in self.lines if line.shape is not None]
        in_all = sum([math.prod(shape) for shape in shapes])
        is_known = len(shapes) == len(self.lines) and in_all > 0
        rows.append(
            f"{self.live:,} elements{f' of {in_all:,} ({self.live / in_all:.2%})' if is_known else ''} are written"
        )
        width = max((len(line.name) for line in self.lines), default=0)
        rows += [
            f"  {line.name:{width}}  {line.dtype:9} {'?' if line.shape is None else str(line.shape):18}"
            f" {line.unit:8} {line.live:,}"
            for line in self.lines
        ]
        return "\n".join(rows)


def inspect(source: Source) -> Summary:
    """Say what a delta has; of a file, after its digest was checked.

    Raises:
        DeltaError, TypeError, OSError, ImportError: as `lightning_gcfreeze.delta.load` does.
    """
    tensors = read(source)
    mask, base = (content(tensors[key]).hex() if key in tensors else None for key in ("mask", "base"))
    number, step = scalar(tensors, "number"), scalar(tensors, "step")
    version = scalar(tensors, "format")
    assert version is not None
    if values_only := "values" in tensors and "layout" not in tensors:
        return Summary(version, values_only, tensors["values"].numel(), mask, base, number, step, ())
    lines = []
    n_bytes = 0
    for name, parts in by_name(load(tensors)).items():
        unit = unit_of(parts)
        values = parts.get("whole", parts.get("values", torch.empty(0)))
        shape = tuple(values.shape) if unit == "whole" else tuple(parts["shape"].tolist()) if "shape" in parts else None
        dtype = "-" if unit == "frozen" else str(values.dtype).removeprefix("torch.")
        lines.append(Line(name, dtype, shape, unit, values.numel()))
        n_bytes += values.nbytes
    return Summary(version, values_only, n_bytes, mask, base, number, step, tuple(lines))

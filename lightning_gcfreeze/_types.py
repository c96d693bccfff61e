"""Shapes of things that pass between the modules."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import Tensor

Named: TypeAlias = Mapping[str, Tensor]
"""Tensors by parameter name, in the order of ``named_parameters()``; every tensor has its parameter's shape."""

Granularity: TypeAlias = Literal["element", "row", "tensor"]
"""What freezes together."""

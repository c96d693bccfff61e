"""Types that modules share."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import Tensor

Named: TypeAlias = Mapping[str, Tensor]
"""Tensors by parameter name, in the order of ``named_parameters()``, each of the shape of its parameter."""

Granularity: TypeAlias = Literal["element", "row", "tensor", "mixed"]
"""The units that freeze together: single elements, rows (elements with the same first index), or whole parameters;
"mixed": rows and columns where that saves work, else single elements."""

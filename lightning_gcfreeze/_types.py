"""Types that modules share."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import Tensor

Named: TypeAlias = Mapping[str, Tensor]
"""Tensors by parameter name, in the order of ``named_parameters()``, each of the shape of its parameter."""

Granularity: TypeAlias = Literal["element", "row", "tensor"]
"""The units that freeze together: single elements, rows (elements with the same first index), or whole parameters."""

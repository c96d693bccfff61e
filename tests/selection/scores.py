"""Generated scores, with many ties."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

INF = float("inf")
SHAPES = [(), (1,), (3,), (2, 2), (0,), (0, 3), (1, 1, 2), (5, 1)]
# Few values, so that most elements are tied; both zeros, which are equal; and neighbours in the last bit.
VALUES = [0.0, -0.0, 1.0, -1.0, INF, -INF, 1.0 + 2**-23, 5e-324]


@st.composite
def named_scores(draw: st.DrawFn, values: list[float] = VALUES) -> tuple[dict[str, Tensor], int]:
    """Draw up to 5 tensors of any of the shapes, in one dtype or several, and a number of elements to choose."""
    scores = {}
    for i, shape in enumerate(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5))):
        size = math.prod(shape)
        elements = draw(st.lists(st.sampled_from(values), min_size=size, max_size=size))
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        scores[f"w{i}"] = torch.tensor(elements, dtype=dtype).reshape(shape)
    return scores, draw(st.integers(0, sum(s.numel() for s in scores.values())))

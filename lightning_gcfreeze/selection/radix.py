"""The k-th lowest of numbers that lie in many tensors, on many processes, without a list of them all.

By counting digits: all numbers are looked at once for each digit of the answer, a group of their bits, from the highest
on. The counts add up over processes: what is sent does not grow with how many numbers there are.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

AT_LEAST, AT_MOST = 2**14, 2**18
"""So many numbers are looked at together, in between a 64th of all: each look costs some time and some memory."""

MANY = 2**23
"""From so many numbers on, digits have 16 bits, which saves a look at all; for fewer, 2**16 counters are much."""


class Kth(NamedTuple):
    """The k-th lowest of some numbers."""

    value: float | int
    lower: int
    """How many numbers are lower, on all processes."""
    equal: int
    """How many equal it, itself among them."""


def pieces(tensor: Tensor, dtype: torch.dtype, count: int) -> Iterator[tuple[int, Tensor]]:
    """A tensor in a dtype, some elements at a time, and the flat place of the first of them.

    Args:
        tensor: of any shape.
        dtype: what to compare as.
        count: how many numbers there are in all tensors.
    """
    flat, some = tensor.reshape(-1), min(max(count // 64, AT_LEAST), AT_MOST)
    for start in range(0, len(flat), some):
        yield start, flat[start : start + some].to(dtype)


def kth_smallest(
    numbers: Callable[[], Iterable[Tensor]],
    k: int,
    dtype: torch.dtype,
    count: int,
    total: Callable[[Tensor], Tensor],
) -> Kth:
    """Find the k-th lowest.

    Args:
        numbers: those of this process, flat, a few at a time; they are asked for several times.
        k: from 1 to how many there are.
        dtype: of the numbers: float32, float64, int32 or int64. No NaN.
        count: how many there are, on all processes, or about as many.
        total: adds up counts over processes.
    """
    found, left, equal = 0, k, 0  # the digits so far, and which one it is among the numbers that have them
    shift = dtype.itemsize * 8
    while shift:
        first, width = shift == dtype.itemsize * 8, min(11 if count < MANY else 16, shift)
        shift, values = shift - width, 2**width
        counts = torch.zeros(values + 2, dtype=torch.int64)
        for some in numbers():
            # What begins with other digits than those found falls into the first or the last bin. The first digit has
            # the sign: it counts from the middle.
            digits = _bits(some).bitwise_xor_(found).bitwise_right_shift_(shift)
            digits.add_(1 + (values // 2 if first else 0)).clamp_(0, values + 1)
            counts = counts.to(some.device).add_(torch.bincount(digits, minlength=values + 2))
        counts = total(counts)[1:-1]
        if first and dtype.is_floating_point:  # the bits of negative floats descend as these ascend
            counts[: values // 2] = counts[: values // 2].flip(0)
        up_to = counts.cumsum(0)
        at = int(torch.searchsorted(up_to, left))
        equal = int(counts[at])
        left -= int(up_to[at]) - equal
        if not first:
            found ^= at << shift
        elif dtype.is_floating_point and at < values // 2:
            # Undo the flip. With ones below, later digits count from above, in which order they ascend again.
            found = ((-1 - at) << shift) | (2**shift - 1)
        else:
            found = (at - values // 2) << shift
    integer = torch.int32 if dtype.itemsize == 4 else torch.int64
    return Kth(torch.tensor(found, dtype=integer).view(dtype).item(), k - left, equal)


def _bits(numbers: Tensor) -> Tensor:
    """As integers, in new memory; the two zeros are one."""
    if not numbers.is_floating_point():
        return numbers.clone()
    return (numbers + 0.0).view(torch.int32 if numbers.dtype == torch.float32 else torch.int64)

"""Radix select: the k-th smallest of numbers in many tensors, on many processes, without a list of them all.

A number is found by its digits, groups of its bits, from the highest on. For each digit, all numbers that share the
digits found so far are counted by their next one. Counts add up over processes, so the traffic does not grow with the
amount of numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MIN_CHUNK, MAX_CHUNK = 2**14, 2**18
"""Bounds of the size of a chunk, else 1/64 of all numbers. Each chunk costs some time, its size some memory."""

WIDE_DIGIT_FROM = 2**23
"""From this amount of numbers on, digits have 16 bits, which saves a pass; for fewer, 65,536 counters are too many."""


class Kth(NamedTuple):
    """The k-th smallest number, and its place among all numbers, over all processes."""

    value: float | int
    n_lower: int
    """Numbers that are lower."""
    n_equal: int
    """Numbers that are equal, this one included."""


def chunks(tensor: Tensor, dtype: torch.dtype, n_numbers: int) -> Iterator[tuple[int, Tensor]]:
    """Yield a tensor in chunks, row by row: the flat index of the first element, and the elements, ``(n,)``.

    Args:
        tensor: of any shape.
        dtype: of the chunks.
        n_numbers: the amount of numbers in all tensors.
    """
    flat, size = tensor.reshape(-1), min(max(n_numbers // 64, MIN_CHUNK), MAX_CHUNK)
    for start in range(0, len(flat), size):
        yield start, flat[start : start + size].to(dtype)


def kth_smallest(
    numbers: Callable[[], Iterable[Tensor]],
    k: int,
    dtype: torch.dtype,
    n_numbers: int,
    all_reduce_sum: Callable[[Tensor], Tensor],
) -> Kth:
    """Find the k-th smallest number.

    Args:
        numbers: returns the numbers of this process as flat tensors, see `chunks`; called once for each digit.
        k: from 1 to the amount of numbers.
        dtype: of the numbers: float32, float64, int32 or int64. NaN is not allowed.
        n_numbers: the amount of numbers on all processes, exactly or roughly.
        all_reduce_sum: adds up counts over the processes.
    """
    found, k_left, n_equal = 0, k, 0  # the digits so far, and the k among the numbers that have these digits
    shift = dtype.itemsize * 8
    while shift:
        first, width = shift == dtype.itemsize * 8, min(11 if n_numbers < WIDE_DIGIT_FROM else 16, shift)
        shift, values = shift - width, 2**width
        counts = torch.zeros(values + 2, dtype=torch.int64)
        for chunk in numbers():
            # Numbers with other digits than those found fall into the first or the last bin. The first digit has the
            # sign: it counts from the middle.
            digits = _bits(chunk).bitwise_xor_(found).bitwise_right_shift_(shift)
            digits.add_(1 + (values // 2 if first else 0)).clamp_(0, values + 1)
            counts = counts.to(chunk.device).add_(torch.bincount(digits, minlength=values + 2))
        counts = all_reduce_sum(counts)[1:-1]
        if first and dtype.is_floating_point:  # the bits of negative floats descend as the floats ascend
            counts[: values // 2] = counts[: values // 2].flip(0)
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, k_left))
        n_equal = int(counts[digit])
        k_left -= int(up_to[digit]) - n_equal
        if not first:
            found ^= digit << shift
        elif dtype.is_floating_point and digit < values // 2:
            # Undo the flip. With ones below, later digits count from above, in which order they ascend again.
            found = ((-1 - digit) << shift) | (2**shift - 1)
        else:
            found = (digit - values // 2) << shift
    integer = torch.int32 if dtype.itemsize == 4 else torch.int64
    return Kth(torch.tensor(found, dtype=integer).view(dtype).item(), k - k_left, n_equal)


def _bits(numbers: Tensor) -> Tensor:
    """Return the bits of numbers as integers, in new memory; those of -0.0 as those of 0.0."""
    if not numbers.is_floating_point():
        return numbers.clone()
    return (numbers + 0.0).view(torch.int32 if numbers.dtype == torch.float32 else torch.int64)

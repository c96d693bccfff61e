"""`Computed`: tensors by name that exist only while somebody looks at them, whole or in pieces."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

from torch import Tensor

from lightning_gcfreeze._types import Named

PIECE_NUMEL = 2**16
"""Elements that are computed at once where a tensor is computed in pieces, but for a longer row: a score takes a dozen
intermediate results of that size, which stay in a cache."""

Cut: TypeAlias = Callable[[Tensor], Tensor]
"""Returns a part of a tensor: the same elements of each tensor of a parameter's shape."""


class Computed(Mapping[str, Tensor]):
    """Tensors that are computed anew at each access, so that no two of them need be in memory at once.

    Args:
        names: of the tensors, in their order.
        compute: (name, cut) -> the elements of a tensor that `cut` selects; it cuts what it computes them from.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str, Cut], Tensor]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    @classmethod
    def of(cls, named: Named) -> "Computed":
        """Let tensors that are there, or are themselves computed, be read in pieces."""
        return cls(named, lambda name, cut: part(named, name, cut))

    def __getitem__(self, name: str) -> Tensor:
        return self.part(name, _all)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a name, without computing anything."""
        return name in self._names

    def part(self, name: str, cut: Cut) -> Tensor:
        """Compute the elements of a tensor that `cut` selects."""
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name, cut)

    def only(self, name: str, cut: Cut) -> "Computed":
        """Return this with one name, if it has it, and of that tensor the elements that `cut` selects."""
        names = [name] if name in self._names else []
        return Computed(names, lambda name, inner: inner(self.part(name, cut)))

    def close(self) -> None:
        """Compute nothing from now on: what it would be computed from changes."""
        self._compute = _closed

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a dict of the tensors."""
        return dict, (dict(self),)


def part(named: Named, name: str, cut: Cut) -> Tensor:
    """Return the elements of a tensor that `cut` selects, computing no more than these."""
    return named.part(name, cut) if isinstance(named, Computed) else cut(named[name])


def cuts(tensor: Tensor) -> Iterator[Cut]:
    """Yield cuts that select all elements of a tensor, some rows at a time: views, in any memory format."""
    if tensor.numel() <= PIECE_NUMEL:
        yield _all
        return
    height = max(1, PIECE_NUMEL * len(tensor) // tensor.numel())
    height = height // 64 * 64 or height  # vector instructions treat the end of a piece as they would within a tensor
    for start in range(0, len(tensor), height):
        yield lambda whole, start=start: whole[start : start + height]  # type: ignore[misc]


def _all(tensor: Tensor) -> Tensor:
    return tensor


def _closed(name: str, cut: Cut) -> NoReturn:
    raise RuntimeError(
        f"The evidence of {name!r} is read after its ordering has returned. It is computed when it is asked for, from"
        " weights and statistics that change: keep a copy, as in `copy.deepcopy(evidence)`."
    )

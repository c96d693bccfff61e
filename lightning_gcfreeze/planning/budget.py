"""k from what there is room for: as few frozen elements as a budget of memory or work allows."""

from dataclasses import dataclass

from lightning_gcfreeze import _checks


@dataclass(frozen=True)
class Budget:
    """Freeze about as few elements as fit a budget: ``k=Budget(memory=300e6)``, ``k=Budget(work=0.2)``, or both.

    If code that may look at gradients keeps them all in memory, or lets them all be computed, the budget can be missed:
    a warning says so. Indices are estimated from above, so that a fifth of a budget of memory may stay unused.

    Args:
        memory: bytes that the optimizer's state, its parameters' gradients and the indices of live elements may take
            on a process after the freeze.
        work: share of the products of large weights' gradients that may still be computed. These products are about a
            third of a step's work. Needs ``granularity="mixed"``.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its range, or none.
    """

    memory: float | None = None
    work: float | None = None

    def __post_init__(self) -> None:
        if self.memory is None and self.work is None:
            raise ValueError("`Budget` needs `memory`, a number of bytes, or `work`, a share in (0, 1), or both.")
        if self.memory is not None:
            _checks.number("memory", self.memory, above=0.0)
        if self.work is not None:
            _checks.number("work", self.work, above=0.0, below=1.0)

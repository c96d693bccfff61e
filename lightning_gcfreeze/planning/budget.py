"""k from what there is room for: as few frozen elements as a budget of memory or work allows."""

from dataclasses import dataclass

from lightning_gcfreeze import _checks


@dataclass(frozen=True)
class Budget:
    """Freeze as few elements as a budget allows: ``k=Budget(memory=300e6)``, ``k=Budget(work=0.2)``, or both.

    Args:
        memory: bytes that the optimizer's state, the gradients it keeps and the places of live elements may take on a
            process after the freeze, of all that the optimizer trains.
        work: share of the products of weights' gradients, of all large weights, that may still be computed: about a
            third of a step's work is these products. Needs ``granularity="mixed"``.

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

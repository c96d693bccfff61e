"""The orders that the paper names beside its own, by name, and which of them fit which model.

A related order is one function of a `Snapshot` and one line in `RELATED`. It is not an ordering of the callback, as
those see no training data; what it puts first is frozen by one that is given the elements.
"""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from examples.paper.related import belsley, paths, relevance, surgery
from examples.paper.related.snapshot import Snapshot

Related: TypeAlias = Callable[[Snapshot], Tensor]
"""`Snapshot` -> scores, (p,), free of NaN; the lowest freeze first."""

RELATED: dict[str, Related] = {
    order.__name__: order
    for order in (
        paths.l1_path,
        paths.elastic_net_path,
        surgery.obd,
        surgery.obs,
        surgery.obd_freeze,
        surgery.obs_freeze,
        surgery.obd_freeze_diagonal,
        relevance.relevance,
        belsley.belsley_noise,
        belsley.belsley_laplace,
    )
}
"""In the order of tables and legends."""

MAX_INVERTED = 5000  # p of a matrix that is inverted: 200 MB and ten seconds
MAX_ELIMINATED = 1000  # p of a matrix that is decomposed anew for each parameter
_INVERTING = ("obs", "obd_freeze", "obs_freeze")
_ELIMINATING = ("belsley_noise", "belsley_laplace")


def left_out(order: str, p: int) -> str | None:
    """Why an order is not computed for a model of p parameters; None if it is."""
    if order in _INVERTING and p > MAX_INVERTED:
        return f"it inverts a {p:,} x {p:,} matrix, and {MAX_INVERTED:,} is the most that is inverted"
    if order in _ELIMINATING and p > MAX_ELIMINATED:
        return (
            f"it decomposes a {p:,} x {p:,} matrix anew after each of its parameters, and {MAX_ELIMINATED:,} is the"
            " most for that"
        )
    return None

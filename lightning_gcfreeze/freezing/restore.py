"""Hold by restoring: works with any optimizer, saves no memory.

A zero gradient alone does not hold a weight: momentum drifts on, weight decay pulls for ever. So the values that
froze are kept aside and put back right after every optimizer step; gradients are zeroed as well, so that norms,
clipping and optimizers that look at whole tensors count live elements only. The increment is masked, Eq. (2.8).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze._masks import MaskIndex, state_by_element
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import local


class Restore:
    """Keeps the elements marked in `frozen` at the values they have now.

    Args:
        parameters: the parameters, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; the names are among those of `parameters`. Of a
            sharded one, for its local part.
    """

    def __init__(self, parameters: Mapping[str, Parameter], frozen: Named) -> None:
        self._held: list[tuple[Parameter, MaskIndex, Tensor]] = []
        for name, mask in frozen.items():
            p, places = parameters[name], MaskIndex(mask.to(parameters[name].device))
            if len(places):
                self._held.append((p, places, places.take(local(p.detach()))))

    @property
    def index_bytes(self) -> int:
        """What knowing the frozen elements and their values takes."""
        return sum(places.index.nbytes + values.nbytes for _, places, values in self._held)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the gradients of the frozen elements; a NaN among them becomes 0, too."""
        for p, places, _ in self._held:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                p.grad = _mask_sparse(p.grad, places)
            else:
                places.fill_(local(p.grad), 0.0)

    @torch.no_grad()
    def take_values(self) -> None:
        """Hold the elements from now on at the values that they have now."""
        for p, places, values in self._held:
            places.take(local(p), values)

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the frozen values back, bit by bit."""
        for p, places, values in self._held:
            places.put_(local(p), values)

    @torch.no_grad()
    def clear_state_(self, optimizer: Optimizer) -> None:
        """Zero what the optimizer remembers of the frozen elements, so that decaying momenta end as 0, not denormals.

        Only of an optimizer in `ELEMENTWISE`. Another one's state may have its parameter's shape and yet be a matrix to
        be inverted, or a second set of weights.
        """
        for p, places, _ in self._held:
            for key, value in state_by_element(optimizer, p).items():
                if value.is_sparse:
                    optimizer.state[p][key] = _mask_sparse(value, places)
                else:
                    places.fill_(local(value), 0)


def _mask_sparse(grad: Tensor, frozen: MaskIndex) -> Tensor:
    """A sparse gradient that is zero at the frozen places of its dense shape."""
    grad = grad.coalesce()
    live = torch.ones(grad.shape, dtype=torch.bool, device=grad.device)
    frozen.fill_(live, False)
    grad.values().masked_fill_(~live[tuple(grad.indices())], 0.0)  # the values are a view
    return grad

"""Hold by restoring: works with any optimizer, saves no memory.

A zero gradient alone does not hold a weight: momentum drifts on, weight decay keeps pulling. So the frozen values are
copied at the freeze and put back right after every optimizer step. Gradients of frozen elements are zeroed as well, so
that norms, clipping and optimizers that look at whole tensors count only live elements. The increment is masked,
Eq. (2.8).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_gcfreeze._masks import MaskIndex
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.distributed import in_layout_of, is_sharded, local
from lightning_gcfreeze.freezing.optimizer_state import state_by_element


class Restore:
    """Keeps the elements marked in `frozen` at the values they have now.

    Args:
        parameters: the parameters, by name.
        frozen: ``{name: bool (*p.shape)}``, True = held constant; the names are among those of `parameters`. For a
            sharded parameter, the mask of its local part.
    """

    def __init__(self, parameters: Mapping[str, Parameter], frozen: Named) -> None:
        self._held: list[tuple[Parameter, MaskIndex, Tensor]] = []
        for name, mask in frozen.items():
            p, index = parameters[name], MaskIndex(mask.to(parameters[name].device))
            if len(index) or is_sharded(p):
                self._held.append((p, index, index.gather(local(p.detach()))))

    @property
    def index_bytes(self) -> int:
        """Bytes of the indices of the frozen elements, and of their values."""
        return sum(index.index.nbytes + values.nbytes for _, index, values in self._held)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Zero the gradients of the frozen elements; a NaN among them becomes 0, too."""
        for p, index, _ in self._held:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                p.grad = _mask_sparse(p.grad, index)
            else:
                p.grad = in_layout_of(p, p.grad)
                index.fill_(local(p.grad), 0.0)

    @torch.no_grad()
    def take_values(self) -> None:
        """Hold the elements from now on at the values that they have now."""
        for p, index, values in self._held:
            index.gather(local(p), values)

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the frozen values back, bit by bit."""
        for p, index, values in self._held:
            index.scatter_(local(p), values)

    @torch.no_grad()
    def clear_state_(self, optimizer: Optimizer) -> None:
        """Zero the optimizer's state of the frozen elements, so that decaying momenta end as 0, not as denormals.

        Only for an optimizer in `ELEMENTWISE`. The state of another one may have its parameter's shape and yet be a
        matrix to be inverted, or a second set of weights.
        """
        for p, index, _ in self._held:
            for key, value in state_by_element(optimizer, p).items():
                if value.is_sparse:
                    optimizer.state[p][key] = _mask_sparse(value, index)
                else:
                    value = optimizer.state[p][key] = in_layout_of(p, value)
                    index.fill_(local(value), 0)


def _mask_sparse(tensor: Tensor, frozen: MaskIndex) -> Tensor:
    """Return a sparse tensor, coalesced, that is zero at the frozen indices of its dense shape."""
    tensor = tensor.coalesce()
    live = torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
    frozen.fill_(live, False)
    tensor.values().masked_fill_(~live[tuple(tensor.indices())], 0.0)  # the values are a view
    return tensor

"""Many continuations of one training at once, each with its own frozen elements and its own learning rate.

Every parameter has a first axis more, of the M members; the loss is the sum of theirs. torch's optimizer runs at the
rate 1 on differences that are zero before each step, so what it leaves in them is its step at that rate, which is then
added at the rate of each member, and not at all where an element is frozen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import Parameter
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quality.tasks import METRICS, Task
from examples.models import Batch, SupervisedModule
from lightning_gcfreeze._types import Named

Optimizers = Callable[[Sequence[Tensor]], torch.optim.Optimizer]
"""Parameters -> an optimizer with the learning rate 1, whose step does not depend on the parameters' values."""
Change = Callable[[int, Named, torch.optim.Optimizer], tuple[Named, Tensor] | None]
"""(steps taken, weights, optimizer, whose parameters are in the order of the weights) -> what is live from now on, as
in `Members`, and the factors of the rate; None: as before. May set weights."""


@dataclass(frozen=True)
class Members:
    """What M members share, and in what they differ."""

    model: SupervisedModule
    """Gives the forward pass, and the values of parameters that are not in `start`."""
    start: Named
    """The weights that all begin with, of the parameters that may train."""
    live: Named
    """{name: bool (M, *p.shape)}, or (1, ...) where all members have the same."""
    factors: Tensor
    """Of the learning rate, (M,)."""
    state: Mapping[str, Mapping[str, Tensor]]
    """The optimizer's state that all begin with, by parameter name; empty for a new optimizer. Not modified."""


def train(
    members: Members,
    optimizers: Optimizers,
    batches: Sequence[Batch],
    rates: Sequence[float],
    after_step: Callable[[int, Named], None] = lambda steps, weights: None,
    change: Change | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train on.

    Args:
        members: M of them.
        optimizers: makes the optimizer.
        batches: the steps to take.
        rates: the learning rate of each step, for a factor of 1.
        after_step: is given the number of steps taken, and the weights.
        change: what the members do between steps, if they do not only train.

    Returns:
        The weights, {name: (M, *p.shape)}, and the loss of each batch before its step, (steps, M).
    """
    m = len(members.factors)
    weights = {name: w.expand(m, *w.shape).clone().requires_grad_() for name, w in members.start.items()}
    deltas = [Parameter(torch.zeros_like(w)) for w in weights.values()]

    def scaled(live: Named, factors: Tensor) -> list[Tensor]:
        """The rates of all elements, 0 where they are frozen."""
        return [live[name] * factors.view(-1, *(1,) * (w.dim() - 1)) for name, w in weights.items()]

    scales = scaled(members.live, members.factors)
    optimizer = optimizers(deltas)
    for delta, (name, _) in zip(deltas, weights.items(), strict=True):
        if name in members.state:
            optimizer.state[delta] = {
                key: (value.expand(m, *value.shape) if value.dim() else value).clone()  # Adam's count is one for all
                for key, value in members.state[name].items()
            }
    skeleton, history = members.model, []

    def loss(w: Named, x: Tensor, y: Tensor) -> Tensor:
        return skeleton.loss(functional_call(skeleton, dict(w), (x,)), y)

    for (x, y), rate in zip(batches, rates, strict=True):
        losses = vmap(loss, in_dims=(0, None, None))(weights, x, y)
        history.append(losses.detach())
        for delta, g in zip(deltas, torch.autograd.grad(losses.sum(), list(weights.values())), strict=True):
            delta.grad = g.contiguous()  # the fused kernels read memory as it lies
        with torch.no_grad():
            torch._foreach_zero_(deltas)
            optimizer.step()
            torch._foreach_addcmul_(list(weights.values()), deltas, scales, value=rate)
            if change and (new := change(len(history), weights, optimizer)):
                scales = scaled(*new)
            after_step(len(history), weights)
    with torch.no_grad():
        if change:
            return {name: w.detach() for name, w in weights.items()}, torch.stack(history)
        for name, w in weights.items():
            held = w == members.start[name]
            moved = ~held & ~members.live[name].expand_as(w) & w.isfinite()
            assert not moved.any(), f"a frozen element of {name} has moved"
    return {name: w.detach() for name, w in weights.items()}, torch.stack(history)


@torch.no_grad()
def judge(task: Task, model: SupervisedModule, weights: Named, data: TensorDataset) -> tuple[Tensor, Tensor]:
    """Return the loss and the metric of every member on a data set, (M,) each; not finite where one diverged."""
    measure = METRICS[task.metric] or model.loss
    losses = metrics = torch.zeros((), dtype=torch.float64)
    for x, y in DataLoader(data, batch_size=250):
        outputs = vmap(lambda w, x=x: functional_call(model, w, (x,)))(dict(weights))
        losses = losses + vmap(model.loss, in_dims=(0, None))(outputs, y).double() * len(y)
        metrics = metrics + vmap(measure, in_dims=(0, None))(outputs, y).double() * len(y)
    return losses / len(data), metrics / len(data)


def with_biases_only(model: nn.Module) -> dict[str, Tensor]:
    """Return BitFit's live elements: the biases (Ben Zaken et al., arXiv 2106.10199)."""
    return {name: torch.full_like(p, name.endswith("bias"), dtype=torch.bool) for name, p in model.named_parameters()}

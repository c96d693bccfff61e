"""What `benchmarks.observe` is compared with: training steps that other packages, or torch itself, observe.

Each adds up over its steps, for every element, the mean over the observed samples of (g_j - g_S)², or of g_j² where the
peer gives no more and the name says "not centred". The packages are the dependency group `bench`.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = tuple[Tensor, Tensor]


class Peer:
    """A training step of a model of its own: forward, backward, what is observed, Adam."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch, self.size = deepcopy(model).train(), batch, len(batch[1])
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.parameters = dict(self.model.named_parameters())
        self.sums = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}

    def __call__(self) -> None:
        self.observed_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def observed_backward(self) -> None:
        """Leave g_S in ``p.grad``, and add to the sums."""
        raise NotImplementedError

    def backward(self) -> None:
        """Of the plain step."""
        x, y = self.batch
        F.cross_entropy(self.model(x), y).backward()

    def add_noise_of_one_(self, name: str, g_one: Tensor, scale: float = 1.0) -> None:
        """Add (scale · g_1 - g_S)²."""
        noise = torch.sub(_grad(self.parameters[name]), g_one, alpha=scale)
        self.sums[name].addcmul_(noise, noise)

    def add_noise_(self, name: str, g_each: Tensor) -> None:
        """Add the mean of (g_j - g_S)². Overwrites (S, *p.shape); on CPU a fifth of `torch.var`'s time or less."""
        squares = g_each.sub_(_grad(self.parameters[name])).square_().sum(0)
        self.sums[name].add_(squares, alpha=1 / self.size)


class FirstSample(Peer):
    """`torch.func.grad` on the first sample, BatchNorm with its running statistics, as a replay has it."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(model, batch)
        self.norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        self.gradient = torch.func.grad(self.loss)

    def loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(self.model, parameters, (x,)), y)

    def observed_backward(self) -> None:
        self.backward()
        x, y = self.batch
        for norm in self.norms:
            norm.training = False
        g_one = self.gradient(_detached(self.parameters), x[:1], y[:1])
        for norm in self.norms:
            norm.training = True
        for name, g in g_one.items():
            self.add_noise_of_one_(name, g)


class Vmap(Peer):
    """`torch.func`: vmap(grad) over all samples. Their mean is g_S, so that nothing else runs backward."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(model, batch)
        self.gradients = torch.func.vmap(torch.func.grad(self.loss), in_dims=(None, 0, 0))

    def loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(self.model, parameters, (x[None],)), y[None])

    def observed_backward(self) -> None:
        for name, g_each in self.gradients(_detached(self.parameters), *self.batch).items():
            self.parameters[name].grad = g_each.mean(0)
            self.add_noise_(name, g_each)


class ExpandedWeights(Peer):
    """torch's own `call_for_per_sample_grads`, which leaves no ``p.grad``."""

    def observed_backward(self) -> None:
        from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

        x, y = self.batch
        logits = call_for_per_sample_grads(self.model, batch_size=self.size, loss_reduction="mean")(x)
        F.cross_entropy(logits, y).backward()
        for name, p in self.parameters.items():
            g_each, p.grad_sample = p.grad_sample, None
            p.grad = g_each.mean(0)
            self.add_noise_(name, g_each)


class Opacus(Peer):
    """`GradSampleModule`, which leaves both ``p.grad`` and ``p.grad_sample``. Its hooks bear nothing in place."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        from opacus import GradSampleModule

        super().__init__(model, batch)
        self.model = GradSampleModule(_out_of_place(self.model))

    def observed_backward(self) -> None:
        self.backward()
        for name, p in self.parameters.items():
            g_each, p.grad_sample = p.grad_sample, None
            self.add_noise_(name, g_each)


class BackPACK(Peer):
    """A first-order extension of BackPACK. Its hooks bear nothing in place."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        import backpack

        super().__init__(model, batch)
        self.model = backpack.extend(_out_of_place(self.model))
        self.extended = backpack.backpack

    def extended_backward(self, extension: object) -> None:
        with self.extended(extension):
            self.backward()


class BackPACKFirstSample(BackPACK):
    """`BatchGrad(subsampling=[0])`, which is g_1 / S."""

    def observed_backward(self) -> None:
        from backpack.extensions import BatchGrad

        self.extended_backward(BatchGrad(subsampling=[0]))
        for name, p in self.parameters.items():
            self.add_noise_of_one_(name, p.grad_batch[0], self.size)
            del p.grad_batch


class BackPACKVariance(BackPACK):
    """`Variance`, which is of g_j / S."""

    def observed_backward(self) -> None:
        from backpack.extensions import Variance

        self.extended_backward(Variance())
        for name, p in self.parameters.items():
            self.sums[name].add_(p.variance, alpha=self.size**2)
            del p.variance


class BackPACKSumGradSquared(BackPACK):
    """`SumGradSquared`, which is of g_j / S, and not centred."""

    def observed_backward(self) -> None:
        from backpack.extensions import SumGradSquared

        self.extended_backward(SumGradSquared())
        for name, p in self.parameters.items():
            self.sums[name].add_(p.sum_grad_squared, alpha=self.size)
            del p.sum_grad_squared


class ASDL(Peer):
    """The diagonal of the empirical Fisher matrix, not centred; its loss is a sum over samples.

    Not exact where a weight acts at several places: for tokens, and in the convolutions where that takes less memory,
    it adds up the squares of a sample's terms, not the square of their sum.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        import asdl

        super().__init__(model, batch)
        config = asdl.FisherConfig(asdl.FISHER_EMP, [asdl.SHAPE_DIAG], data_size=self.size)
        self.maker = asdl.get_fisher_maker(self.model, config)

    def observed_backward(self) -> None:
        x, y = self.batch
        self.maker.setup_loss_call(_sum_over_samples, self.maker.setup_model_call(self.model, x), y)
        self.maker.forward_and_backward(calc_loss_grad=True)
        for name in self.parameters:
            module, _, kind = name.rpartition(".")
            self.sums[name].add_(getattr(self.model.get_submodule(module).fisher.diag, kind))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _detached(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in parameters.items()}


def _sum_over_samples(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    """Of their mean losses. ASDL asks for the argument by name, and gives "sum"."""
    return F.cross_entropy(logits, y, reduction=reduction) * (len(y) / y.numel())


def _out_of_place(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return model


PEERS: dict[str, Callable[[nn.Module, Batch], Callable[[], None]]] = {
    "first sample, BackPACK BatchGrad": BackPACKFirstSample,
    "first sample, torch.func.grad": FirstSample,
    "all samples, BackPACK SumGradSquared (not centred)": BackPACKSumGradSquared,
    "all samples, BackPACK Variance": BackPACKVariance,
    "all samples, Opacus GradSampleModule": Opacus,
    "all samples, torch ExpandedWeights": ExpandedWeights,
    "all samples, torch.func vmap(grad)": Vmap,
    "all samples, ASDL empirical Fisher (not centred)": ASDL,
}

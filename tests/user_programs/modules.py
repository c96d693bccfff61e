"""Hooks of the LightningModule that change gradients, weights or the optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.user_programs.case import T0, Net, Setup, changes, halve, norm


@changes()
class BackwardClips(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)


@changes()
class BackwardScalesItsLoss(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(0.3 * loss, *args, **kwargs)


@changes()
class BackwardByAutogradGrad(Net):
    """No `Tensor.backward` at all."""

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        parameters = list(self.parameters())
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = grad.sign() * 0.1


@changes()
class ClosureClips(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)
            return loss

        optimizer.step(closure=closure)


@changes()
class ClosureClipsLargeWeightsByValue(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            nn.utils.clip_grad_value_([p for p in self.parameters() if p.numel() > 16384], 1e-3)
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)


@changes()
class ClosureCentralizes(Net):
    """Gradient centralization."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            for p in self.parameters():
                if p.grad is not None and p.dim() > 1:
                    p.grad -= p.grad.mean(dim=1, keepdim=True)
            return loss

        optimizer.step(closure=closure)


@changes()
class StepRunsClosureFirst(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        halve(self.parameters())
        optimizer.step()


@changes()
class StepSetsLearningRateByNorm(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        def closure() -> Any:
            loss = optimizer_closure()
            optimizer.param_groups[0]["lr"] = 0.02 / (1.0 + norm(self.parameters()))
            return loss

        optimizer.step(closure=closure)


@changes()
class StepDecaysParamGroups(Net):
    """Decoupled weight decay by hand, before the step."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(1 - 0.5 * group["lr"])
        optimizer.step(closure=optimizer_closure)


@changes()
class StepDecaysParamGroupsAfterwards(Net):
    """The same after it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.mul_(1 - 0.5 * group["lr"])


@changes()
class StepAddsGradientOnceMore(Net):
    """A second, hand-made update after the optimizer's, once the weights have settled down a bit."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        with torch.no_grad():
            for p in self.parameters():
                if p.grad is not None and self.trainer.global_step > T0:
                    p.add_(p.grad, alpha=-0.05)


class ZeroGradDoesNothing(Net):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None: ...


def _never_zeroed(setup: Setup) -> None:
    setup.module.__class__ = ZeroGradDoesNothing


@changes(without=_never_zeroed)
class ZeroGradSetsNone(Net):
    """As PyTorch's tuning guide once said."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad = None


@changes(without=_never_zeroed)
class ZeroGradOfModule(Net):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.zero_grad()


@changes(without=_never_zeroed)
class ZeroGradToZeros(Net):
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)


@changes()
class ZeroGradKeepsHalf(Net):
    """A gradient with memory."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad *= 0.5


@changes()
class ModuleZeroGradKeepsHalf(Net):
    """`nn.Module.zero_grad`, overridden and used."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        halve(self.parameters())

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.zero_grad()


@changes()
class ConfigureClippingOfModule(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)


@changes()
class ConfigureClippingCallsLightning(Net):
    """With a bound that it chooses."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, 0.3, "norm")


@changes()
class ConfigureClippingTensorByTensor(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                nn.utils.clip_grad_norm_([p], 0.1)


@changes(clip=0.5)
class ClipGradientsHalves(Net):
    """The method that the default `configure_gradient_clipping` calls."""

    def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        halve(self.parameters())


@changes()
class BeforeZeroGradSetsLearningRate(Net):
    """By what the last step's gradients were."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        largest = max((float(p.grad.abs().max()) for p in self.parameters() if p.grad is not None), default=0.0)
        optimizer.param_groups[0]["lr"] = 0.02 / (1.0 + largest)


@changes(accumulate=2)
class BeforeBackwardHalves(Net):
    def on_before_backward(self, loss: Tensor) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(0.2)


@changes()
class AfterBackwardNormalizes(Net):
    def on_after_backward(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad /= 1e-3 + p.grad.norm()


@changes(accumulate=2)
class AfterBackwardNormalizesEachMicroBatch(Net):
    def on_after_backward(self) -> None:
        total = norm(self.parameters())
        for p in self.parameters():
            if p.grad is not None:
                p.grad /= 1.0 + total


@changes()
class BeforeStepScales(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for _, p in self.named_parameters():
            if p.grad is not None:
                p.grad = 0.4 * p.grad


@changes()
class BeforeStepClipsParamGroupsTensorByTensor(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                nn.utils.clip_grad_norm_(p, 0.1)


@changes(accumulate=2)
class BatchStartHalves(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        halve(self.parameters())


@changes(accumulate=2)
class BatchEndHalves(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        halve(self.parameters())


@changes(accumulate=2)
class ValidationStartHalves(Net):
    """Between two micro-batches of a step."""

    def on_validation_start(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(0.1)


@changes()
class BatchEndDecays(Net):
    """Over the groups of its optimizer; after the callbacks, so that frozen weights decay as well."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for group in self.optimizers().param_groups:
                for p in group["params"]:
                    p.mul_(0.99)

"""What users write around a training step: each hook that can see or change gradients, weights or the optimizer, once.

`CHANGES` lists code that changes where training ends, `READS` code that records gradients, and `HARMLESS` code that
overrides a hook and leaves gradients alone. A case plants its code into a `Setup`, and says how to take it out again.
"""

import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from tests import cases

T0 = 2  # optimizer steps before the freeze


def network() -> nn.Sequential:
    """Two weights above the size of which "compact" takes gradients early, and small parameters around them."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(5, 128), nn.Tanh(), nn.Linear(128, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 1)
    ).double()


class Net(cases.Regression):
    """The module that the cases override."""

    def __init__(self) -> None:
        super().__init__(network(), lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01))
        self.flown: list[Tensor] = []  # for the cases that keep something
        self.norms = [torch.ones((), dtype=torch.float64)]

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@dataclass
class Setup:
    """What a fit is made of, before its Trainer exists."""

    module: Net = field(default_factory=Net)
    callbacks: list[pl.Callback] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    undo: list[Callable[[], Any]] = field(default_factory=list)
    """Takes the user's code out again, in the middle of a fit."""
    seen: list[list[Tensor | None]] = field(default_factory=list)
    """What code that reads gradients has read."""
    validation: bool = False
    """Whether the fit validates, after three batches."""

    def plant(self, owner: Any, base: type) -> None:
        """Add an object whose class overrides hooks of `base`."""
        if isinstance(owner, pl.Callback):
            self.callbacks.append(owner)
        elif isinstance(owner, Precision):
            self.options["plugins"] = [owner]
        else:
            self.options["strategy"] = owner
        self.undo.append(lambda: setattr(owner, "__class__", base))

    def when_optimizer_is_made(self, then: Callable[[Optimizer], Any]) -> None:
        """Call `then` in `configure_optimizers`."""
        make = self.module.make_optimizer

        def make_and_tell(parameters: Any) -> Optimizer:
            optimizer = make(parameters)
            then(optimizer)
            return optimizer

        self.module.make_optimizer = make_and_tell


@dataclass(frozen=True)
class Case:
    """One piece of user code."""

    plant: Callable[[Setup], None]
    told: tuple[str, ...] = ()
    """Words that an error has to contain that refuses this code: the hook, and whose it is."""
    accumulate: int = 1
    clip: float | None = None
    without: Callable[[Setup], None] | None = None
    """Plants what the code is compared with from t0 on, to show that it matters; None: nothing."""


CHANGES: dict[str, Case] = {}
READS: dict[str, Case] = {}
HARMLESS: dict[str, Case] = {}
_BASES: tuple[type, ...] = (Net, pl.Callback, Precision, SingleDeviceStrategy)
T = TypeVar("T", bound=Callable[..., Any])


def _case_of(cls: type, **options: Any) -> Case:
    """A class that overrides hooks of a module, callback, plugin or strategy."""
    base = next(base for base in _BASES if issubclass(cls, base))
    *_, hook = (name for name, value in vars(cls).items() if callable(value) and not name.startswith("__"))

    def plant(setup: Setup) -> None:
        setup.validation = "validation" in hook
        if base is Net:
            setup.module.__class__ = cls
            setup.undo.append(lambda: setattr(setup.module, "__class__", Net))
        else:
            setup.plant(cls("cpu") if base is SingleDeviceStrategy else cls(), base)

    return Case(plant, (hook, cls.__name__), **options)


def changes(*told: str, **options: Any) -> Callable[[T], T]:
    """Add a class, or a function that plants, to `CHANGES`; `told` as in `Case`, for functions."""

    def add(planted: T) -> T:
        case = _case_of(planted, **options) if isinstance(planted, type) else Case(planted, told, **options)
        CHANGES[planted.__name__] = case
        return planted

    return add


def harmless(planted: T) -> T:
    """Add a class, or a function that plants, to `HARMLESS`."""
    HARMLESS[planted.__name__] = _case_of(planted) if isinstance(planted, type) else Case(planted)
    return planted


def halve(parameters: Iterable[Parameter]) -> None:
    """A helper whose callers do not mention gradients."""
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(0.5)


def norm(parameters: Iterable[Parameter]) -> float:
    return float(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None) ** 0.5)


# Hooks of the module -----------------------------------------------------------------------------------------------


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


# Weights written to, and gradients scaled, in ways that do not say so ------------------------------------------------


class Helper:
    """What a project keeps beside its module."""

    norm = 1.0

    def halve(self, module: Any) -> None:
        self._touch(module)

    def _touch(self, module: Any) -> None:
        for p in module.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)

    def measure(self, module: Any) -> None:
        self.norm = norm(module.parameters())

    @staticmethod
    def decay(module: Any) -> None:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(0.99)


HELPER = Helper()


def _changes_at_batch_end(name: str, change: Callable[[Net], Any], **options: Any) -> None:
    def on_train_batch_end(self: Net, outputs: Any, batch: Any, batch_idx: int) -> None:
        change(self)

    cls = type(name, (Net,), {"on_train_batch_end": on_train_batch_end, "__module__": __name__})
    changes(**options)(cls)


def _by_state_dict(module: Net) -> None:
    for value in module.state_dict().values():
        value *= 0.99


def _by_foreach(module: Net) -> None:
    torch._foreach_mul_([p.data for p in module.parameters()], 0.99)


def _by_slice(module: Net) -> None:
    module.network[2].weight.data[:] = module.network[2].weight.data * 0.99


def _by_item(module: Net) -> None:
    with torch.no_grad():
        module.network[2].weight[3] = module.network[2].weight[3] * 0.9


def _by_vector(module: Net) -> None:
    parameters = list(module.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters).detach() * 0.99, parameters)


def _by_array(module: Net) -> None:
    for p in module.parameters():
        array = p.detach().numpy()
        array *= 0.99


def _by_loading(module: Net) -> None:
    module.load_state_dict({name: value * 0.99 for name, value in module.state_dict().items()})


def _by_object(module: Net) -> None:
    HELPER.decay(module)


for _change in (_by_state_dict, _by_foreach, _by_slice, _by_item, _by_vector, _by_array, _by_loading, _by_object):
    _changes_at_batch_end(f"Writes{_change.__name__}", _change)


def _by_class(module: Net) -> None:
    Helper().halve(module)


def _by_import(module: Net) -> None:
    from tests.user_programs import halve as imported

    imported(module.parameters())


def _by_item_of_list(module: Net) -> None:
    ACTIONS["halve"][0](module)


ACTIONS: dict[str, list[Callable[[Any], None]]] = {"halve": [lambda module: halve(module.parameters())]}
for _change in (_by_class, _by_import, _by_item_of_list):
    _changes_at_batch_end(f"Scales{_change.__name__}", _change, accumulate=2)


@changes()
class ZeroGradMeasuresByAHelper(Net):
    """The rate of the next step follows the norm that an object measures."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        HELPER.measure(self)
        optimizer.param_groups[0]["lr"] = 0.02 / (1.0 + HELPER.norm)


@changes()
class StepWithoutSomeSmallParameters(Net):
    """Two losses in turn: in every other step some small parameters have no gradient."""

    def on_after_backward(self) -> None: ...

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.network[:4](batch[0])
        return hidden.square().mean() if batch_idx % 2 else nn.functional.mse_loss(self.network[4:](hidden), batch[1])


@changes()
class BatchEndResetsMomentum(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        if batch_idx % 3 == 2:
            for p in self.parameters():
                optimizer.state[p]["momentum_buffer"].zero_()


@changes()
class EpochStartClearsState(Net):
    def on_train_epoch_start(self) -> None:
        self.optimizers(use_pl_optimizer=False).state.clear()


@changes()
class SchedulerStepByNorm(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.optimizer.param_groups[0]["lr"] = 0.01 / (0.1 + norm(self.parameters()))


@changes()
class TrainingStepDifferentiates(Net):
    """A penalty on the norm of the gradient of all parameters."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        grads = torch.autograd.grad(loss, list(self.parameters()), create_graph=True)
        return loss + 0.05 * sum(grad.square().sum() for grad in grads)


@changes()
class TrainingStepDifferentiatesOneWeight(Net):
    """Of a tensor that freezes as a whole."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        (grad,) = torch.autograd.grad(loss, self.network[0].weight, create_graph=True)
        return loss + 0.2 * grad.square().sum()


@changes()
class TrainingStepHooksActivation(Net):
    """What flows back through the first layer's output, behind which all may be frozen."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        hidden = self.network[:2](x)
        if torch.is_grad_enabled():
            hidden.register_hook(lambda grad: self.flown.append(grad.norm()))
        loss = nn.functional.mse_loss(self.network[2:](hidden), y)
        return loss / (1.0 + self.flown[-1]) if self.flown else loss


@changes(accumulate=2)
class TrainingStepHalvesWhatHasCome(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.network[4].weight.grad is not None and torch.is_grad_enabled() and batch_idx % 2:
            self.network[4].weight.grad.mul_(0.1)
        return super().training_step(batch, batch_idx)


# Callbacks ---------------------------------------------------------------------------------------------------------


@changes()
class CallbackBeforeZeroGrad(pl.Callback):
    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.02 / (1.0 + norm(pl_module.parameters()))


@changes(accumulate=2)
class CallbackBeforeBackward(pl.Callback):
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        halve(pl_module.parameters())


@changes()
class CallbackAfterBackward(pl.Callback):
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 0.5)


@changes()
class CallbackBeforeStep(pl.Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.clamp_(-0.01, 0.01)


@changes(accumulate=2)
class CallbackBatchStart(pl.Callback):
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.mul_(0.1)


@changes(accumulate=2)
class CallbackBatchEnd(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for p in pl_module.parameters():
            if p.grad is not None:
                p.grad.mul_(0.1)


@changes()
class CallbackEpochStartResetsMomentum(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for p in pl_module.parameters():
            if p in trainer.optimizers[0].state:
                trainer.optimizers[0].state[p]["momentum_buffer"].fill_(0.0)


@changes()
class CallbackBatchStartRaisesMomentum(pl.Callback):
    """Of single parameters, by name."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for name, p in pl_module.named_parameters():
            if name.endswith("weight") and p in trainer.optimizers[0].state:
                trainer.optimizers[0].state[p]["momentum_buffer"].mul_(0.5)


@changes()
class CallbackSetsLearningRateByNorm(pl.Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] = 0.02 / (1.0 + norm(pl_module.parameters()))


# Precision plugins and strategies ----------------------------------------------------------------------------------


@changes()
class PrecisionBackward(Precision):
    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, model, optimizer, *args, **kwargs)
        for p in model.parameters():
            p.grad.mul_(0.3)


@changes(accumulate=2)
class PrecisionPreBackward(Precision):
    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:
        halve(module.parameters())
        return super().pre_backward(tensor, module)


@changes()
class PrecisionPostBackward(Precision):
    def post_backward(self, tensor: Tensor, module: Any) -> Tensor:
        closure_loss = super().post_backward(tensor, module)
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        return closure_loss


@changes()
class PrecisionStep(Precision):
    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:
        def scaled() -> Any:
            loss = closure()
            halve(model.parameters())
            return loss

        return super().optimizer_step(optimizer, model, scaled, **kwargs)


@changes(clip=0.5)
class PrecisionClips(Precision):
    """By the norm of each tensor that the optimizer has."""

    def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for p in self.main_params(optimizer):
            nn.utils.clip_grad_norm_([p], 0.1)


@changes(clip=0.5)
class PrecisionClipsByNorm(Precision):
    def clip_grad_by_norm(self, optimizer: Any, clip_val: Any) -> None:
        for p in self.main_params(optimizer):
            p.grad.mul_(min(1.0, 0.1 / float(p.grad.norm(1) + 1e-6)))


@changes()
class StrategyBackward(SingleDeviceStrategy):
    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        nn.utils.clip_grad_value_(self.lightning_module.parameters(), 0.01)
        return loss


@changes(accumulate=2)
class StrategyPreBackward(SingleDeviceStrategy):
    def pre_backward(self, closure_loss: Tensor) -> None:
        halve(self.lightning_module.parameters())


@changes()
class StrategyPostBackward(SingleDeviceStrategy):
    def post_backward(self, closure_loss: Tensor) -> None:
        halve(self.lightning_module.parameters())


@changes()
class StrategyStep(SingleDeviceStrategy):
    def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        def scaled() -> Any:
            loss = closure()
            for p in self.lightning_module.parameters():
                p.grad.mul_(0.3)
            return loss

        return super().optimizer_step(optimizer, scaled, model, **kwargs)


@changes(accumulate=2)
class StrategyBatchStart(SingleDeviceStrategy):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        halve(self.lightning_module.parameters())


@changes(accumulate=2)
class StrategyTrainingStep(SingleDeviceStrategy):
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        halve(self.lightning_module.parameters())
        return super().training_step(*args, **kwargs)


# Hooks on tensors, layers and optimizers, and methods put on instances ---------------------------------------------


@changes("network.2.weight")
def hook_on_large_weight(setup: Setup) -> None:
    setup.undo.append(setup.module.network[2].weight.register_hook(lambda grad: 0.1 * grad).remove)


@changes("network.0.weight")
def hooks_on_all_parameters(setup: Setup) -> None:
    setup.undo += [p.register_hook(lambda grad: grad / (0.1 + grad.norm())).remove for p in setup.module.parameters()]


@changes("network.0.weight")
def hooks_that_share_a_norm(setup: Setup) -> None:
    """The norm of one tensor's gradient, which may be frozen, decides about the others."""
    first, *others = setup.module.parameters()
    setup.undo.append(first.register_hook(lambda grad: setup.module.norms.append(grad.norm())).remove)
    setup.undo += [p.register_hook(lambda grad: grad / (1.0 + setup.module.norms[-1])).remove for p in others]


@changes("network.2.weight")
def hooks_after_accumulation(setup: Setup) -> None:
    def scale(p: Tensor) -> None:
        p.grad.mul_(0.2)

    setup.undo += [p.register_post_accumulate_grad_hook(scale).remove for p in setup.module.parameters()]


@changes("network.2.weight")
def hooks_on_gradient_accumulators(setup: Setup) -> None:
    """As libraries that overlap work with the backward pass register them."""
    for p in setup.module.parameters():
        accumulator = p.expand_as(p).grad_fn.next_functions[0][0]
        setup.module.__dict__.setdefault("accumulators", []).append(accumulator)  # else it would be made anew

        def scale(*args: Any, p: Parameter = p) -> None:
            p.grad.mul_(0.2)

        setup.undo.append(accumulator.register_hook(scale).remove)


@changes("network.4")
def backward_hook_on_layer(setup: Setup) -> None:
    hook = setup.module.network[4].register_full_backward_hook(lambda layer, given, got: (0.1 * given[0],))
    setup.undo.append(hook.remove)


@changes("network.4")
def backward_pre_hook_on_layer(setup: Setup) -> None:
    hook = setup.module.network[4].register_full_backward_pre_hook(lambda layer, got: (0.1 * got[0],))
    setup.undo.append(hook.remove)


@changes("network.1")
def backward_hook_on_layer_changes_gradients(setup: Setup) -> None:
    """When the gradient of the first layer's output has come, so have those of the layers behind it."""

    def clip(layer: nn.Module, given: Any, got: Any) -> None:
        nn.utils.clip_grad_value_(setup.module.network[2:].parameters(), 1e-3)

    setup.undo.append(setup.module.network[1].register_full_backward_hook(clip).remove)


@changes("pre_hook", accumulate=2)
def pre_hook_of_optimizer(setup: Setup) -> None:
    """Runs before the closure: what it sees are the micro-batches before the last."""

    def scale(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad /= 1e-3 + p.grad.norm()

    setup.when_optimizer_is_made(lambda optimizer: setup.undo.append(optimizer.register_step_pre_hook(scale).remove))


@changes("post_hook")
def post_hook_of_optimizer(setup: Setup) -> None:
    def again(optimizer: Any, args: Any, kwargs: Any) -> None:
        with torch.no_grad():
            for p in setup.module.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.02)

    setup.when_optimizer_is_made(lambda optimizer: setup.undo.append(optimizer.register_step_post_hook(again).remove))


@changes("step")
def step_of_optimizer_replaced(setup: Setup) -> None:
    """On the instance, as schedulers of others do it."""

    def replace(optimizer: Optimizer) -> None:
        step = optimizer.step

        @functools.wraps(step)
        def clipped(closure: Any = None) -> Any:
            def and_clip() -> Any:
                loss = closure()
                halve(setup.module.parameters())
                return loss

            return step(and_clip)

        optimizer.step = clipped  # type: ignore[method-assign]
        setup.undo.append(lambda: setattr(optimizer, "step", step))

    setup.when_optimizer_is_made(replace)


@changes("zero_grad")
def zero_grad_of_optimizer_replaced(setup: Setup) -> None:
    def replace(optimizer: Optimizer) -> None:
        zero_grad = optimizer.zero_grad
        optimizer.zero_grad = lambda set_to_none=True: halve(setup.module.parameters())  # type: ignore[method-assign]
        setup.undo.append(lambda: setattr(optimizer, "zero_grad", zero_grad))

    setup.when_optimizer_is_made(replace)


class ClippingSGD(SGD):
    """An optimizer that looks at whole gradients."""

    def step(self, closure: Any = None) -> Any:
        def and_clip() -> Any:
            loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    nn.utils.clip_grad_norm_([p], self.bound)
            return loss

        return super().step(and_clip)

    bound = 0.1


@changes("ClippingSGD")
def optimizer_of_a_class_of_its_own(setup: Setup) -> None:
    def make(parameters: Any) -> Optimizer:
        SGD([torch.zeros(1)], lr=0.1)  # torch wraps `SGD.step` now: hooks run in it, and in `ClippingSGD.step` again
        optimizer = ClippingSGD(parameters, lr=0.02, momentum=0.9)
        setup.undo.append(lambda: setattr(optimizer, "bound", 1e9))
        return optimizer

    setup.module.make_optimizer = make


def _clip_after(module: Any) -> None:
    nn.utils.clip_grad_norm_(module.parameters(), 0.5)


@changes("on_after_backward")
def method_on_instance(setup: Setup) -> None:
    setup.module.on_after_backward = types.MethodType(_clip_after, setup.module)  # type: ignore[method-assign]
    setup.undo.append(lambda: setup.module.__dict__.pop("on_after_backward"))


@changes("on_after_backward")
def partial_on_instance(setup: Setup) -> None:
    setup.module.on_after_backward = functools.partial(_clip_after, setup.module)  # type: ignore[method-assign]
    setup.undo.append(lambda: setup.module.__dict__.pop("on_after_backward"))


@changes("on_train_batch_end", accumulate=2)
def partial_on_callback(setup: Setup) -> None:
    def scale(factor: float, trainer: Any, module: Any, *args: Any) -> None:
        for p in module.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)

    callback = pl.Callback()
    callback.on_train_batch_end = functools.partial(scale, 0.1)  # type: ignore[method-assign]
    setup.callbacks.append(callback)
    setup.undo.append(lambda: callback.__dict__.pop("on_train_batch_end"))


@changes("on_after_backward")
def lambda_callback(setup: Setup) -> None:
    active = [True]

    def scale(trainer: Any, module: Any) -> None:
        if active:
            halve(module.parameters())

    setup.callbacks.append(pl.callbacks.LambdaCallback(on_after_backward=scale))
    setup.undo.append(active.clear)


@changes("backward")
def backward_of_strategy_replaced(setup: Setup) -> None:
    strategy = SingleDeviceStrategy("cpu")
    backward = strategy.backward

    def and_clip(*args: Any, **kwargs: Any) -> Any:
        loss = backward(*args, **kwargs)
        _clip_after(strategy.lightning_module)
        return loss

    strategy.backward = and_clip  # type: ignore[method-assign]
    setup.options["strategy"] = strategy
    setup.undo.append(lambda: strategy.__dict__.pop("backward"))


# What reads gradients ----------------------------------------------------------------------------------------------

READ_BY_MODULE = (
    "on_train_batch_start", "training_step", "on_before_zero_grad", "optimizer_zero_grad", "on_before_backward",
    "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step",
    "on_train_batch_end", "on_train_epoch_end", "on_validation_start",
)  # fmt: skip
READ_BY_CALLBACK = tuple(name for name in READ_BY_MODULE if name.startswith("on_"))


def _reader(base: type, hook: str, setup: Setup) -> type:
    """A class whose hook records all gradients, before and after it does what it ordinarily does."""

    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        setup.seen.append([None if p.grad is None else p.grad.clone() for p in setup.module.parameters()])
        outcome = getattr(super(cls, self), hook)(*args, **kwargs)
        setup.seen.append([None if p.grad is None else p.grad.clone() for p in setup.module.parameters()])
        return outcome

    functools.update_wrapper(read, getattr(base, hook))  # Lightning looks at the signatures of hooks
    read.__module__ = __name__
    cls = type(f"Reads_{hook}", (base,), {hook: read, "__module__": __name__})
    return cls


def _read_by(base: type, hook: str) -> Case:
    def plant(setup: Setup) -> None:
        setup.validation = "validation" in hook
        if base is Net:
            setup.module.__class__ = _reader(Net, hook, setup)
        else:
            setup.callbacks.append(_reader(base, hook, setup)())

    return Case(plant, (hook, f"Reads_{hook}"), accumulate=2)


READS |= {f"module-{hook}": _read_by(Net, hook) for hook in READ_BY_MODULE}
READS |= {f"callback-{hook}": _read_by(pl.Callback, hook) for hook in READ_BY_CALLBACK}


def _hooks_that_read(setup: Setup) -> None:
    """As loggers that watch a model register them."""
    for p in setup.module.parameters():
        p.register_hook(lambda grad: setup.seen.append([grad.clone()]))


READS["hooks-on-tensors"] = Case(_hooks_that_read, ("network.0.weight",), accumulate=2)


# What leaves gradients alone ---------------------------------------------------------------------------------------


@harmless
class StepWarmsUp(Net):
    """The warm-up of Lightning's documentation."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        if self.trainer.global_step < 8:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * min(1.0, (self.trainer.global_step + 1) / 8)


@harmless
class BatchEndLogs(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("loss", outputs["loss"])


@harmless
class BatchEndReadsWeights(Net):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("norm", sum(p.detach().square().sum() for p in self.parameters()))


@harmless
class EpochEndLogs(Net):
    def on_train_epoch_end(self) -> None:
        self.log("weight", self.network[0].weight.detach().norm())


@harmless
class SchedulesRates(Net):
    """A scheduler of torch's replaces `optimizer.step` by a counting one."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@harmless
class AveragesWeights(pl.Callback):
    """An exponential moving average, in a callback."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.averages = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        for name, p in pl_module.named_parameters():
            self.averages[name].lerp_(p.detach(), 0.1)


@harmless
class CountsBatches(pl.Callback):
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches = batch_idx + 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.batches == 6


@harmless
class StrategySavesItsWay(SingleDeviceStrategy):
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...


@harmless
def callbacks_of_lightning(setup: Setup) -> None:
    setup.callbacks += [
        pl.callbacks.EarlyStopping("loss", strict=False, check_on_train_epoch_end=False),
        pl.callbacks.Timer(),
        pl.callbacks.LambdaCallback(on_train_epoch_start=lambda trainer, module: None),
    ]


@harmless
def forward_hook_on_layer(setup: Setup) -> None:
    setup.module.network[2].register_forward_hook(lambda layer, x, y: None)

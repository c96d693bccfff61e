"""Precision plugins and strategies."""

from typing import Any

from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from tests.user_programs.case import changes, halve


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

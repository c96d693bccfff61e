"""Training steps, schedulers and momenta: gradients within the loss, losses in turn, state that is reset."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.user_programs.case import Net, changes, norm


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

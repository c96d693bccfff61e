"""Methods replaced on single objects: optimizers, modules, callbacks and strategies."""

import functools
import types
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.optim import SGD, Optimizer

from tests.user_programs.case import Setup, changes, halve


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

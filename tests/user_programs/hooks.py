"""Hooks on tensors, layers and optimizers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from tests.user_programs.case import Setup, changes


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

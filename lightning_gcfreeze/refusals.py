"""What cannot be served, and why: each function returns a sentence with the reason and the way out, or None.

By class names and attributes, so that both of Lightning's packages are understood without importing either.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_gcfreeze import gradients
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.freezing import ELEMENTWISE


def of_strategy(strategy: Any) -> str | None:
    """Strategies under which frozen elements could not be held, or a rank's would not be the others'."""
    classes = {cls.__name__ for cls in type(strategy).__mro__}
    known = classes & {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"}
    why_not = [reason for name, reason in _WHY_NOT.items() if name in classes]
    if not known or why_not:
        return (
            f"{type(strategy).__name__} is not supported: it {(*why_not, _UNKNOWN)[0]}. Supported are a single device,"
            " DDPStrategy, and ModelParallelStrategy for FSDP2 and tensor parallelism."
        )
    if type(getattr(strategy, "_ddp_comm_state", None)).__name__ == "PostLocalSGDState":
        return (
            "With post-local SGD the weights of the processes differ until they are averaged, and frozen ones would"
            " move then. Use DDPStrategy without it."
        )
    return None


_WHY_NOT = {
    "FSDPStrategy": "flattens parameters into shards, where an element has neither name nor place (FSDP2 does not)",
    "DeepSpeedStrategy": "keeps gradients and optimizer states in buffers of its own, and steps them itself",
}
_UNKNOWN = "is not known to keep parameters, gradients and optimizer states where they can be held"


def of_sharding(covariance: bool, hold: str, may_thaw: bool) -> str | None:
    """What needs whole tensors.

    Args:
        covariance: whether the whole matrix is wanted.
        hold: how constancy is kept.
        may_thaw: whether what is frozen may thaw.
    """
    if may_thaw:
        return (
            "The optimizer's state of what may thaw is kept whole, and these parameters are sharded. In place of"
            " `k='auto'` use a number, or a `FreezeSchedule` that is monotone."
        )
    if covariance:
        return "`covariance='full'` needs whole parameters, and these are sharded. Use `covariance='diagonal'`."
    if hold == "compact":
        return (
            "`hold='compact'` needs whole parameters, and these are sharded. Use `hold='restore'` or 'auto', which puts"
            " the frozen elements of each shard back."
        )
    return None


def of_module(module: nn.Module, training_step: Any, automatic_optimization: bool) -> str | None:
    """Modules whose loss cannot be replayed on a single sample."""
    if not automatic_optimization:
        return (
            "Manual optimization cannot be observed: its `training_step` moves the weights itself, so it cannot be"
            " replayed on one sample. Set `automatic_optimization = True`, with one optimizer."
        )
    if "dataloader_iter" in inspect.signature(training_step).parameters:
        return (
            "A `training_step(self, dataloader_iter)` fetches its batch itself, so it cannot be replayed on one sample."
            " Take a `batch` instead."
        )
    if scripted := [name for name, layer in module.named_modules() if isinstance(layer, torch.jit.ScriptModule)]:
        return (
            f"{', '.join(scripted)}: the state of TorchScript modules cannot be put back after a replay. Use the module"
            " that was scripted, or `torch.compile`."
        )
    if layers := gradients.batch_norms_without_statistics(module):
        return (
            f"{', '.join(layers)}: BatchNorm with `track_running_stats=False` cannot take a single sample. Let it track"
            " running statistics, or use GroupNorm or LayerNorm."
        )
    return None


def of_graph(loss: Tensor) -> str | None:
    """Parts of the graph without their parameters: behind a wholly frozen layer they would have no gradient."""
    if not gradients.has_reentrant_checkpoint(loss):
        return None
    return "Activation checkpointing with `use_reentrant=True` hides parameters from the graph; set it to False."


def of_samples(module: nn.Module, count: int | None) -> str | None:
    """More samples than the module can cut out itself."""
    if count == 1 or not hasattr(module, "gcfreeze_first_sample"):
        return None
    return (
        f"`gcfreeze_first_sample` of {type(module).__name__} gives the first sample of a batch and no other. Use"
        " `samples='first'`, or remove it if the batch can be cut along the first axis of its tensors."
    )


def of_optimizers(optimizers: Sequence[Any]) -> str | None:
    """Anything but one optimizer whose steps can be followed and whose frozen elements do not guide the live ones."""
    if len(optimizers) != 1:
        return f"{len(optimizers)} optimizers, but exactly one is needed. Return it from `configure_optimizers`."
    if isinstance(optimizers[0], LBFGS):
        return (
            "LBFGS evaluates the loss several times a step, along directions that mix frozen and live elements: holding"
            " some of them constant is not exact. Use a first-order optimizer."
        )
    if not isinstance(optimizers[0], Optimizer):
        return f"{type(optimizers[0]).__name__} is no torch.optim.Optimizer: no hook runs right after its steps."
    return None


def of_compact(optimizer: Optimizer, module: nn.Module) -> str | None:
    """Optimizers that cannot go without the frozen elements, and layers that write their weights themselves."""
    if type(optimizer) not in ELEMENTWISE:
        return (
            f"`hold='compact'` hands the live elements to the optimizer as flat vectors, but {type(optimizer).__name__}"
            f" is not known to treat every element by itself; {', '.join(sorted(c.__name__ for c in ELEMENTWISE))} are."
            " Use `hold='restore'` or 'auto', or, if it does, add its class to"
            " `lightning_gcfreeze.freezing.ELEMENTWISE`."
        )
    if writing := [name for name, layer in module.named_modules() if getattr(layer, "max_norm", None) is not None]:
        return (
            f"{', '.join(writing)}: an embedding with `max_norm` rescales its weights in each forward pass, frozen ones"
            " too. Use `hold='restore'` or 'auto', which puts them back."
        )
    return None


_WHERE_GRADIENTS_ARE_SEEN = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping")


def of_letting_go(module: Any, callbacks: Sequence[Any]) -> str | None:
    """Hooks of the user's own in which the gradients of frozen parameters may be looked at."""
    hooks = [
        f"{type(owner).__name__}.{name}"
        for owner in (module, *callbacks)
        for name in _WHERE_GRADIENTS_ARE_SEEN
        if (hook := getattr(owner, name, None))
        and hook.__module__.split(".")[0] not in ("lightning", "pytorch_lightning", __package__)
    ]
    if not hooks:
        return None
    return (
        f"{', '.join(hooks)} may look at gradients, so all are computed and kept, and frozen values are put back after"
        " each step: that saves nothing. If it does not read `p.grad` of frozen parameters, use `hold='compact'`."
    )


def of_resuming(
    saved: Mapping[str, Any], now: Mapping[str, Any], saved_shapes: Mapping[str, torch.Size], parameters: Named
) -> str | None:
    """A checkpoint of a run with other arguments or other eligible parameters."""
    if different := [name for name in now if (type(saved.get(name)), saved.get(name)) != (type(now[name]), now[name])]:
        listing = ", ".join(f"{name}={saved.get(name)!r} (now {now[name]!r})" for name in different)
        return (
            f"The checkpoint was saved with other arguments of the callback: {listing}. Resume with the saved ones; to"
            " begin a new observation from these weights, load them into the module and fit without `ckpt_path`."
        )
    shapes = {name: p.shape for name, p in parameters.items()}
    if differing := dict(saved_shapes.items() ^ shapes.items()):
        return (
            f"The checkpoint's state is for other eligible parameters: {', '.join(sorted(differing))} differ in name or"
            " shape. Resume with the module and optimizer that it was saved with."
        )
    return None

"""What cannot be served, and why: each function returns a sentence with the reason and the way out, or None.

By class names and attributes, so that both of Lightning's packages are understood without importing either.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parameter import UninitializedParameter
from torch.optim import LBFGS, Optimizer

from lightning_gcfreeze import _modules, misconfiguration
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


def of_mesh(strategy: Any, meshes: Iterable[DeviceMesh]) -> str | None:
    """Dimensions of a device mesh along which processes see other layers, or other parts of a sample.

    Args:
        strategy: what it keeps in attributes is looked through.
        meshes: those of the parameters.
    """
    own = [value for value in vars(strategy).values() if isinstance(value, DeviceMesh)]
    other = [
        f"{name} ({size})"
        for mesh in dict.fromkeys([*own, *meshes])
        for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=False)
        if size > 1 and set(name.lower().split("_")) & _OTHER_DIMENSIONS
    ]
    if not other:
        return None
    return (
        f"{type(strategy).__name__} has a mesh with {', '.join(dict.fromkeys(other))}: processes along"
        " pipeline, context and expert dimensions do not see the same samples through the same layers."
        " Supported are data and tensor parallelism; let the other dimensions have size 1."
    )


_OTHER_DIMENSIONS = {"pp", "pipe", "pipeline", "cp", "context", "ep", "expert", "experts", "sp", "sequence"}


def of_callbacks(callbacks: Sequence[Any]) -> str | None:
    """More than one callback of this package in a Trainer."""
    if len(callbacks) < 2:
        return None
    return (
        f"The Trainer has {len(callbacks)} {type(callbacks[0]).__name__}s, but an optimizer serves one only. For"
        " several stages use `schedule=FreezeSchedule([...])`; for other elements `include` and `exclude`."
    )


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


def of_module(module: nn.Module, training_step: Any, automatic_optimization: bool, replays: bool = True) -> str | None:
    """Modules that are not complete, or whose loss cannot be replayed on a single sample, if it has to be."""
    if lazy := [name for name, p in module.named_parameters() if isinstance(p, UninitializedParameter)]:
        return (
            f"{', '.join(lazy[:5])}: parameters of lazy modules have no shape before the first forward pass, so nothing"
            " can be said of their elements. Run the module on one batch before `fit`."
        )
    if not automatic_optimization:
        return (
            "Manual optimization cannot be observed: its `training_step` moves the weights itself, so it cannot be"
            " replayed on one sample. Set `automatic_optimization = True`, with one optimizer."
        )
    if not replays:
        return None
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
    if layers := _modules.batch_norms_without_statistics(module):
        return (
            f"{', '.join(layers)}: BatchNorm with `track_running_stats=False` cannot take a single sample. Let it track"
            " running statistics, or use GroupNorm or LayerNorm."
        )
    return None


def of_graph(loss: Tensor) -> str | None:
    """Parts of the graph without their parameters: behind a wholly frozen layer they would have no gradient."""
    if not _modules.has_reentrant_checkpoint(loss):
        return None
    return (
        "Activation checkpointing with `use_reentrant=True` hides parameters from the graph; set it to False, or pass"
        " `promote=False` with an order that does not read the variance."
    )


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
    optimizer = optimizers[0]
    if not isinstance(optimizer, Optimizer):
        return f"{type(optimizer).__name__} is no torch.optim.Optimizer: no hook runs right after its steps."
    signs = {cls.__name__ for cls in type(optimizer).__mro__}.union(*optimizer.param_groups)
    signs |= {name for name in dir(type(optimizer)) if callable(getattr(type(optimizer), name, None))}
    for known, why in _TWO_SETS.items():
        if known <= signs:
            by = ", ".join(f"`{sign}`" for sign in sorted(known))
            return (
                f"{type(optimizer).__name__} {why} ({by}): frozen elements would not be constant in both. Use an"
                " optimizer with one set of weights."
            )
    hooked = getattr(type(optimizer).step, "hooked", not hasattr(Optimizer, "_patch_step_function"))
    if not hooked or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return of_step_hooks(optimizer)
    return None


_TWO_SETS = {
    frozenset({"train", "eval"}): "trains with other weights than it is evaluated with",
    frozenset({"weight_sum", "weight_lr_power"}): "trains with other weights than it is evaluated with",
    frozenset({"first_step", "second_step"}): "takes its gradients at other weights than those that it steps",
    frozenset({"Lookahead"}): "keeps slow weights beside those that are trained",
    frozenset({"sync_lookahead"}): "keeps slow weights beside those that are trained",
    frozenset({"swap_swa_sgd"}): "keeps averaged weights beside those that are trained",
}
"""Classes, methods and keys of parameter groups by which optimizers with two sets of weights are known."""


def of_step_hooks(optimizer: Any) -> str:
    """An optimizer in whose steps no hooks run."""
    return (
        f"{type(optimizer).__name__} does not run hooks after its steps (`register_step_post_hook`), by which steps are"
        " counted and frozen values put back: its `__init__` does not call that of torch.optim.Optimizer, or it steps"
        " something else. Use the optimizer that it wraps."
    )


def of_evaluations(optimizer: Any) -> str:
    """An optimizer that evaluates the loss more than once a step."""
    return (
        f"{type(optimizer).__name__} evaluates the loss several times in one step, at weights that are not those of the"
        " step: elements cannot be held constant to the bit meanwhile. Use an optimizer that evaluates it once."
    )


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


def of_letting_go(onlookers: Sequence[str]) -> str:
    """Why no gradient is taken away."""
    return (
        f"{misconfiguration.some(onlookers)} may look at gradients, so all are computed and stay where they are until"
        " the optimizer steps. That saves the optimizer's state and work, but no gradients."
    )


def of_state_access(onlookers: Sequence[str]) -> str | None:
    """Code that looks for a parameter's state in the optimizer, where `hold="compact"` keeps that of live elements."""
    if not onlookers:
        return None
    return (
        f"{misconfiguration.some(onlookers)} looks for a parameter's entries in the optimizer's state, but with"
        " `hold='compact'` these are of the live elements alone, not of a parameter. Use `hold='restore'` or 'auto'."
    )


def of_resuming(
    saved: Mapping[str, Any], now: Mapping[str, Any], saved_shapes: Mapping[str, torch.Size], parameters: Named
) -> str | None:
    """A checkpoint of a run with other arguments or other eligible parameters."""
    if (saved.get("samples"), now.get("samples")) == ("first", "auto"):  # what was the default; the state says it
        saved = {**saved, "samples": "auto"}
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

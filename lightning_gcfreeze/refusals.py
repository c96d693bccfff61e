"""Unsupported configurations and their error messages.

Each function returns a sentence with the reason and the way out, or None if the configuration is supported.
Strategies and callbacks are recognized by class names and attributes, so both of Lightning's packages are covered and
neither is imported.
"""

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Parameter, UninitializedParameter
from torch.optim import LBFGS, SGD, Optimizer

from lightning_gcfreeze import _modules
from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.freezing import ELEMENTWISE, groups_without_rate
from lightning_gcfreeze.gradients import momentum

_UNSUPPORTED_STRATEGIES = {
    "FSDPStrategy": "flattens parameters into shards, where an element has neither name nor place (FSDP2 does not)",
    "DeepSpeedStrategy": "keeps gradients and optimizer states in its own buffers, and steps them itself",
}
_UNKNOWN_STRATEGY = "is not known to leave parameters, gradients and optimizer states where they can be held constant"
_UNSUPPORTED_DIMENSIONS = {"pp", "pipe", "pipeline", "cp", "context", "ep", "expert", "experts", "sp", "sequence"}
_TWO_SETS_OF_WEIGHTS = {
    frozenset({"train", "eval"}): "trains with other weights than it is evaluated with",
    frozenset({"weight_sum", "weight_lr_power"}): "trains with other weights than it is evaluated with",
    frozenset({"first_step", "second_step"}): "takes its gradients at other weights than those that it steps",
    frozenset({"Lookahead"}): "keeps slow weights next to those that are trained",
    frozenset({"sync_lookahead"}): "keeps slow weights next to those that are trained",
    frozenset({"swap_swa_sgd"}): "keeps averaged weights next to those that are trained",
}
"""Classes, methods and keys of parameter groups that identify optimizers with two sets of weights."""


def unsupported_strategy(strategy: Any) -> str | None:
    """Strategies under which elements cannot be held constant, or not on all ranks alike."""
    classes = {cls.__name__ for cls in type(strategy).__mro__}
    known = classes & {"SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy"}
    reasons = [reason for name, reason in _UNSUPPORTED_STRATEGIES.items() if name in classes]
    if not known or reasons:
        return (
            f"{type(strategy).__name__} is not supported: it {reasons[0] if reasons else _UNKNOWN_STRATEGY}. Supported"
            " are a single device, DDPStrategy, and ModelParallelStrategy for FSDP2 and tensor parallelism."
        )
    if type(getattr(strategy, "_ddp_comm_state", None)).__name__ == "PostLocalSGDState":
        return (
            "With post-local SGD the weights of the processes differ until they are averaged, and averaging would move"
            " frozen ones. Use DDPStrategy without it."
        )
    return None


def unsupported_mesh(strategy: Any, meshes: Iterable[DeviceMesh]) -> str | None:
    """Dimensions of a device mesh along which processes see other layers, or other parts of a sample.

    Args:
        strategy: the strategy; a mesh may be one of its attributes.
        meshes: the meshes of the parameters.
    """
    own = [value for value in vars(strategy).values() if isinstance(value, DeviceMesh)]
    other = [
        f"{name} ({size})"
        for mesh in dict.fromkeys([*own, *meshes])
        for name, size in zip(mesh.mesh_dim_names or (), mesh.shape, strict=False)
        if size > 1 and set(name.lower().split("_")) & _UNSUPPORTED_DIMENSIONS
    ]
    if not other:
        return None
    return (
        f"{type(strategy).__name__} has a mesh with {', '.join(dict.fromkeys(other))}: processes along"
        " pipeline, context and expert dimensions do not see the same samples through the same layers."
        " Supported are data and tensor parallelism; let the other dimensions have size 1."
    )


def unsupported_with_shards(covariance: bool, hold: str, may_thaw: bool) -> str | None:
    """Options that need whole tensors, for a run with sharded parameters.

    Args:
        covariance: whether the full covariance matrix is requested.
        hold: the argument `hold`.
        may_thaw: whether frozen elements may thaw again.
    """
    if may_thaw:
        return (
            "Thawing needs the optimizer's state of whole parameters, and these are sharded. Instead of `k='auto'` use"
            " a number, or a `FreezeSchedule` that is monotone."
        )
    if covariance:
        return "`covariance='full'` needs whole parameters, and these are sharded. Use `covariance='diagonal'`."
    if hold == "compact":
        return (
            "`hold='compact'` needs whole parameters, and these are sharded. Use `hold='restore'` or 'auto', which"
            " restores the frozen elements of each shard."
        )
    return None


def too_many_callbacks(indices: Sequence[int]) -> str | None:
    """Two callbacks of this package for the same optimizer.

    Args:
        indices: for each callback the index of its optimizer.
    """
    if len(set(indices)) == len(indices):
        return None
    index = next(index for index in indices if indices.count(index) > 1)
    return (
        f"The Trainer has {indices.count(index)} GradCovFreezeCallbacks for the optimizer with the index {index}, but"
        " an optimizer serves one only. For several stages use `schedule=FreezeSchedule([...])`; for other elements"
        " `include` and `exclude`; for another optimizer `optimizer`."
    )


def unsupported_manual_optimization(reads_samples: bool, needs_loss: bool) -> str | None:
    """Options that manual optimization does not allow.

    Args:
        reads_samples: whether gradients of single samples are computed, as for the variance.
        needs_loss: whether decisions depend on the training loss, as with ``t0="auto"``, and with ``k="auto"`` unless
            it has a `monitor`.
    """
    if reads_samples:
        return (
            "With manual optimization, `training_step` moves the weights itself, so it cannot be replayed on one sample"
            " and the variance cannot be observed. Use an order that does not read the variance, such as"
            " `order='progress'`, with `samples='auto'` and `covariance='diagonal'`; or `lightning_gcfreeze.Freezer`"
            " with `loss=`."
        )
    if needs_loss:
        return (
            "With manual optimization, the training loss of one optimizer is unknown to the callback, and `t0='auto'`"
            " and `k='auto'` depend on it. Use an int `t0` and a number `k`, or `k=Growth(monitor=...)`; or"
            " `lightning_gcfreeze.Freezer` with `loss=`."
        )
    return None


def unsupported_module(module: nn.Module, training_step: Any, replays: bool = True) -> str | None:
    """Modules without all parameters or, if it has to be replayed, whose loss cannot be replayed on a single sample."""
    if lazy := [name for name, p in module.named_parameters() if isinstance(p, UninitializedParameter)]:
        return (
            f"{shortened(lazy)}: parameters of lazy modules have no shape before the first forward pass. Run the module"
            " on one batch before `fit`."
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
            f"{shortened(scripted)}: the state of TorchScript modules cannot be restored after a replay. Use the module"
            " that was scripted, or `torch.compile`."
        )
    if layers := _modules.batch_norms_without_statistics(module):
        return (
            f"{shortened(layers)}: BatchNorm with `track_running_stats=False` cannot take a single sample. Let it track"
            " running statistics, or use GroupNorm or LayerNorm."
        )
    return None


def unsupported_graph(loss: Tensor) -> str | None:
    """Graphs without some of their parameters: behind a wholly frozen layer these would have no gradient."""
    if not _modules.has_reentrant_checkpoint(loss):
        return None
    return (
        "Activation checkpointing with `use_reentrant=True` hides parameters from the graph. Set it to False, or pass"
        " `skip_frozen_gradients=False` with an order that does not read the variance."
    )


def unsupported_samples(module: nn.Module, n_samples: int | None) -> str | None:
    """More samples than the module extracts from a batch itself; None stands for all samples of a batch."""
    if n_samples == 1 or not hasattr(module, "gcfreeze_first_sample"):
        return None
    return (
        f"`gcfreeze_first_sample` of {type(module).__name__} gives the first sample of a batch and no other. Use"
        " `samples='first'`, or remove the method if batches can be sliced along the first axis of their tensors."
    )


def other_trainer(is_this: bool) -> str | None:
    """Modules that another Trainer was used on in the middle of a fit."""
    if is_this:
        return None
    return (
        "Another Trainer was used on this module in the middle of the fit, and Lightning sends hooks to that Trainer"
        " from now on. Give it a copy of the module (`copy.deepcopy`)."
    )


def not_monitored(monitor: str, logged: Collection[str]) -> str | None:
    """Monitored losses that a validation did not log."""
    if monitor in logged:
        return None
    return (
        f"`monitor={monitor!r}` was not logged by this validation, but {', '.join(sorted(logged)) or 'nothing'} was."
        " Log it with `self.log`, or leave `monitor` out, to watch the training loss."
    )


def single_sample(batch_size: int | None) -> str | None:
    """Batches of one sample, where gradients of single samples are computed; None stands for an unknown size."""
    if batch_size != 1:
        return None
    return (
        "The batch holds one sample, and the gradient noise is undefined for a batch of one. Use batches of at least 2"
        " samples, accumulate gradients, or use an order that does not read the variance, such as `order='progress'`,"
        " with `samples='auto'` and `covariance='diagonal'`."
    )


def no_gradients(parameters: Mapping[str, Tensor]) -> str | None:
    """Parameters without gradients after the backward pass."""
    if any(p.grad is not None for p in parameters.values()):
        return None
    return (
        "No eligible parameter has a gradient after the backward pass: something uses the gradients up before they can"
        " be observed, as optimizers do that step in the backward pass. Leave the gradients in `p.grad`."
    )


def unsupported_optimizer_index(index: int | None, optimizers: Sequence[Any]) -> str | None:
    """Optimizers among which that of the callback cannot be told.

    Args:
        index: the argument `optimizer`; None if it was not given.
        optimizers: the optimizers of the run: one with automatic optimization, any number with manual optimization.
    """
    count = len(optimizers)
    if not count:
        return "The module has no optimizer. Return one from `configure_optimizers`."
    if index is None:
        return None if count == 1 else (
            f"The module has {count} optimizers. Pass the index of the one whose parameters freeze as `optimizer`, from"
            f" 0 to {count - 1}."
        )  # fmt: skip
    if not 0 <= index < count:
        plural = "optimizers" if count > 1 else "optimizer"
        return (
            f"`optimizer={index}` is the index of no optimizer: the module has {count} {plural}. Pass an index from"
            f" 0 to {count - 1}."
        )
    return None


def unsupported_optimizer(optimizer: Any) -> str | None:
    """Optimizers whose steps cannot be followed, or whose frozen elements affect the live ones."""
    if isinstance(optimizer, LBFGS):
        return (
            "LBFGS evaluates the loss several times a step, along directions that mix frozen and live elements: holding"
            " some of them constant is not exact. Use a first-order optimizer."
        )
    if not isinstance(optimizer, Optimizer):
        return (
            f"{type(optimizer).__name__} is no torch.optim.Optimizer, so no hook runs right after its steps. Use the"
            " optimizer that it wraps."
        )
    signs = {cls.__name__ for cls in type(optimizer).__mro__}.union(*optimizer.param_groups)
    signs |= {name for name in dir(type(optimizer)) if callable(getattr(type(optimizer), name, None))}
    for known, reason in _TWO_SETS_OF_WEIGHTS.items():
        if known <= signs:
            by = ", ".join(f"`{sign}`" for sign in sorted(known))
            return (
                f"{type(optimizer).__name__} {reason} ({by}): frozen elements would not be constant in both. Use an"
                " optimizer with one set of weights."
            )
    hooked = getattr(type(optimizer).step, "hooked", not hasattr(Optimizer, "_patch_step_function"))
    if not hooked or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return no_step_hooks(optimizer)
    return None


def already_followed(optimizer: Any, is_followed: bool) -> str | None:
    """Optimizers that another run follows."""
    if not is_followed:
        return None
    return (
        f"This {type(optimizer).__name__} is followed by another Freezer or callback, and an optimizer serves one only."
        " Close the other one first (`freezer.close()`)."
    )


def no_step_hooks(optimizer: Any) -> str:
    """Return the error for an optimizer in whose steps no hooks run."""
    return (
        f"{type(optimizer).__name__} does not run hooks after its steps (`register_step_post_hook`), which count steps"
        " and restore frozen values: its `__init__` does not call that of torch.optim.Optimizer, or it steps something"
        " else. Use the optimizer that it wraps."
    )


def several_evaluations(optimizer: Any) -> str:
    """Return the error for an optimizer that evaluates the loss more than once a step."""
    return (
        f"{type(optimizer).__name__} evaluates the loss several times in one step, at weights that are not those of the"
        " step: elements cannot be held constant to the bit meanwhile. Use an optimizer that evaluates it once; or, if"
        " the loop runs several backward passes before a step of a `Freezer`, pass their number as `accumulate`."
    )


def unreadable_momentum(optimizer: Any, named: Mapping[str, Parameter], has_stepped: bool, mean: bool) -> str | None:
    """Optimizers whose state does not tell the mean of each element's gradient, or without `mean` their divisor."""
    kind, why = type(optimizer), momentum.why_unreadable(optimizer, named, mean)
    if kind not in ELEMENTWISE:
        why = (
            "is not known to treat each element as torch's optimizers do (if it does, under the same names in its"
            " state, add its class to `lightning_gcfreeze.freezing.ELEMENTWISE`)"
        )
    elif has_stepped and not momentum.has_state(optimizer, named) and (mean or not isinstance(optimizer, SGD)):
        why = "has no state of any eligible parameter after its step"
    return why and (
        f"The order reads the {'running mean' if mean else 'scale'} of the gradients in the optimizer's state, but"
        f" {kind.__name__} {why}. Use `order='progress'`, which observes the gradients itself."
    )


def unsupported_rates(optimizer: Optimizer, sets_them: bool = False) -> str | None:
    """Optimizers whose learning rates `lr_after_freeze` cannot multiply, since they make them themselves."""
    missing = ", ".join(f"{rate!r} in group {i}" for i, rate in groups_without_rate(optimizer).items())
    if not (missing or sets_them):
        return None
    why = f"has no number as `lr`, but {missing}" if missing else "sets them within its own step"
    return (
        f"`lr_after_freeze` multiplies the learning rates of an optimizer, but {type(optimizer).__name__} {why}: the"
        " factor would be lost, or would be in the next step's rates as well. Let `lr` be a float in each group, and"
        " change it between steps only, as schedulers do; or leave `lr_after_freeze` out."
    )


def not_compactable(optimizer: Optimizer, module: nn.Module) -> str | None:
    """Optimizers that need the frozen elements, and layers that write to their weights themselves."""
    if type(optimizer) not in ELEMENTWISE:
        return (
            f"`hold='compact'` passes only the live elements to the optimizer, but {type(optimizer).__name__} is not"
            f" known to treat every element by itself; {', '.join(sorted(c.__name__ for c in ELEMENTWISE))} are. Use"
            " `hold='restore'` or 'auto', or, if it does, add its class to `lightning_gcfreeze.freezing.ELEMENTWISE`."
        )
    if writing := [name for name, layer in module.named_modules() if getattr(layer, "max_norm", None) is not None]:
        return (
            f"{shortened(writing)}: an embedding with `max_norm` rescales its weights in each forward pass, frozen ones"
            " too. Use `hold='restore'` or 'auto', which restores them."
        )
    return None


def gradients_are_kept(readers: Sequence[str]) -> str:
    """Return the reason why gradients stay in ``p.grad`` until the optimizer steps."""
    return (
        f"{shortened(readers)} may look at gradients, so all of them are computed and stay in `p.grad` until the"
        " optimizer steps. That saves optimizer state and work, but no gradients."
    )


def optimizer_state_is_read(readers: Sequence[str]) -> str | None:
    """Code that looks up a parameter's state in the optimizer, where `hold="compact"` keeps that of live elements."""
    if not readers:
        return None
    return (
        f"{shortened(readers)} looks up a parameter's entries in the optimizer's state, but with `hold='compact'` the"
        " state has entries for live elements only, not for parameters. Use `hold='restore'` or 'auto'."
    )


def not_resumable(
    saved: Mapping[str, Any], now: Mapping[str, Any], saved_shapes: Mapping[str, torch.Size], parameters: Named
) -> str | None:
    """A checkpoint of a run with other arguments or other eligible parameters.

    Args:
        saved: the arguments in the checkpoint.
        now: the present arguments.
        saved_shapes: the shapes of the eligible parameters in the checkpoint.
        parameters: the present eligible parameters.
    """
    if (saved.get("samples"), now.get("samples")) == ("first", "auto"):  # the default of 0.1; the state says it
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

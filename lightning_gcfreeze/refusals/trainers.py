"""Strategies, meshes, callbacks and trainers that a run does not go together with."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_gcfreeze import _modules
from lightning_gcfreeze._names import class_names

_UNSUPPORTED_STRATEGIES = {
    "FSDPStrategy": "flattens parameters into shards, where an element has neither name nor place (FSDP2 does not)",
    "DeepSpeedStrategy": "keeps gradients and optimizer states in its own buffers, and steps them itself",
}
_UNKNOWN_STRATEGY = "is not known to leave parameters, gradients and optimizer states where they can be held constant"
_UNSUPPORTED_DIMENSIONS = {"pp", "pipe", "pipeline", "cp", "context", "ep", "expert", "experts", "sp", "sequence"}


def unsupported_strategy(strategy: Any) -> str | None:
    """Strategies under which elements cannot be held constant, or not on all ranks alike."""
    classes = class_names(strategy)
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


def unsupported_with_shards(covariance: bool) -> str | None:
    """Options that need whole tensors, for a run with sharded parameters.

    Args:
        covariance: whether the full covariance matrix is requested.
    """
    if covariance:
        return "`covariance='full'` needs whole parameters, and these are sharded. Use `covariance='diagonal'`."
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


def unsupported_averaging(callbacks: Iterable[Any], module: nn.Module) -> str | None:
    """Callbacks that compute the statistics anew of BatchNorm layers which do not track them: 0 and 1 would remain.

    Args:
        callbacks: the Trainer's.
        module: the module that is trained, with `batch_norm="freeze"`.
    """
    has_norms = any(isinstance(layer, _modules.BatchNorm) for layer in module.modules())
    resets = any("StochasticWeightAveraging" in class_names(callback) for callback in callbacks)
    if not (has_norms and resets):
        return None
    return (
        "StochasticWeightAveraging computes the running statistics of all BatchNorm layers anew, and those that"
        " `batch_norm='freeze'` keeps still would be lost. Use `batch_norm='track'`, or WeightAveraging in its place."
    )


def unsupported_manual_optimization(reads_samples: bool, needs_loss: bool, by_fraction: bool = False) -> str | None:
    """Options that manual optimization does not allow.

    Args:
        reads_samples: whether gradients of single samples are computed, as for the variance.
        needs_loss: whether decisions depend on the training loss, as with ``t0="auto"``, and with ``k="auto"`` unless
            it has a `monitor`.
        by_fraction: whether `t0` is a fraction of the planned steps.
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
    if by_fraction:
        return (
            "With manual optimization, nobody knows how many steps an optimizer will take, and a `t0` below 1 is a"
            " fraction of them. Pass a number of steps."
        )
    return None


def unsupported_probe(automatic: bool, precision: str) -> str | None:
    """Fits whose gradients a probe cannot take in.

    Args:
        automatic: whether the module uses automatic optimization.
        precision: the Trainer's.
    """
    if not automatic:
        return (
            "With manual optimization, which backward passes belong to a batch is unknown to the callback. Use"
            " `lightning_gcfreeze.Probe` in a loop of your own."
        )
    if precision == "16-mixed":
        return (
            "`precision='16-mixed'` multiplies gradients by a loss scale that changes, and its scaler fails where no"
            " gradients are left to step with. Probe with 'bf16-mixed' or '32-true'; the masks fit any precision."
        )
    return None


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

"""`Freezer`: the front for plain PyTorch loops and for Lightning Fabric."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gcfreeze import _checks, reporting
from lightning_gcfreeze._wrappers import unwrapped_module, unwrapped_optimizer
from lightning_gcfreeze.distributed import SINGLE_PROCESS, Shards, World, sharded_parameters
from lightning_gcfreeze.distributed.comm_hook import LiveAllReduce
from lightning_gcfreeze.freezing.savings import Savings
from lightning_gcfreeze.options import Options
from lightning_gcfreeze.run import Run
from lightning_gcfreeze.state import State
from lightning_gcfreeze.surroundings import Surroundings

_log = logging.getLogger("lightning_gcfreeze")

Loss = Callable[[Any, Any], Tensor | Mapping[str, Any] | None]
"""(model, batch) -> the mean loss over the batch's samples, 0-dim, or a mapping with it under "loss"."""


class Freezer:
    """Freeze, after t0 optimizer steps, the k scalar parameters with the quietest gradients; without a Trainer.

    The same as `GradCovFreezeCallback`, to the bit, in a loop of your own:

        freezer = Freezer(model, optimizer, t0=100, k=0.9, loss=loss_of)
        for batch in loader:
            freezer.begin_batch(batch)
            loss = loss_of(model, batch)
            freezer.backward(loss)  # in place of loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        freezer.close()

    Steps are counted by hooks on the optimizer. One `Freezer` follows one optimizer: for a GAN, or an actor and its
    critic, make one for each, with a module that contains both networks.

    Args:
        module: what is trained; also one wrapped in DistributedDataParallel, `fully_shard` or ``fabric.setup``. Names
            of parameters are those of the module inside. It has to contain all modules that `loss` runs through, whose
            buffers a replay puts back; only parameters that the optimizer has can freeze.
        optimizer: a torch optimizer, or Fabric's or Accelerate's around one.
        t0: see `GradCovFreezeCallback`, as for all options that are not listed here.
        k: likewise.
        loss: (model, batch) -> the mean loss over the batch's samples, without a loss scale. It is called again on
            single samples, with the module inside of DistributedDataParallel. May be left out where `order` does not
            read the variance.
        accumulate: micro-batches of a step, by which the loop divides each loss.
        scaler: the `torch.amp.GradScaler` that the loop scales losses by; Fabric's and Accelerate's is found.
        skip_frozen_gradients: True: gradients of frozen elements need not be there between the backward pass and the
            step, so they are not computed and not kept. Only where the loop does not look at ``p.grad``: gradients are
            clipped as those of the parameters in ``optimizer.param_groups``.
        planned_steps: optimizer steps in all: ``t0=0.25`` is a quarter of them, ``t0="auto"`` freezes after half of
            them at the latest, and ``k="auto"`` forecasts until then; without, only as far again as training has come.
        n_replicas: processes whose batches differ; None: all. To be passed where a device mesh has several dimensions.
        data_parallel: whether all processes train one model; None: if it is wrapped or sharded.
        options: see `GradCovFreezeCallback`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside its range, or does not go with another.
        RuntimeError: the module or the optimizer cannot be served; the message says why and names the way out.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        t0: Any = None,
        k: Any = None,
        *,
        loss: Loss | None = None,
        accumulate: int = 1,
        scaler: torch.amp.GradScaler | None = None,
        skip_frozen_gradients: bool = False,
        planned_steps: int | None = None,
        n_replicas: int | None = None,
        data_parallel: bool | None = None,
        **options: Any,
    ) -> None:
        self._options = Options(t0=t0, k=k, skip_frozen_gradients=skip_frozen_gradients, **options)
        if loss is None and self._options.reads_samples:
            raise ValueError(
                "`loss` is needed to compute gradients of single samples: pass a function (model, batch) -> mean loss,"
                " or an order that does not read the variance, such as `order='progress'`, with `samples='auto'`."
            )
        self._accumulate = _checks.integer("accumulate", accumulate, at_least=1)
        if planned_steps not in (None, math.inf):
            _checks.number("planned_steps", planned_steps, above=0)
        self._module, model, wrapper = unwrapped_module(module)
        inner, found_scaler = unwrapped_optimizer(optimizer)
        self._scaler = scaler or found_scaler
        self._scales_inside = scaler is None and self._scaler is not None  # Fabric and Accelerate, in `backward`
        shards = Shards(sharded_parameters(self._module))
        if data_parallel is None:
            data_parallel = wrapper is not None or shards.is_sharded
        device = next(p.device for group in inner.param_groups for p in group["params"])
        world = World.current(device) if data_parallel else SINGLE_PROCESS
        all_reduce = LiveAllReduce() if wrapper is not None else None
        self._is_first_rank = world.rank == 0
        self._state = State(self._options)
        self._run = Run(
            self._options,
            self._state,
            Surroundings(
                module=self._module,
                optimizer=inner,
                training_step=None if loss is None else lambda batch, _: loss(model, batch),
                wrapper=wrapper,
                world=world,
                n_replicas=_n_replicas(n_replicas, world, shards),
                all_reduce=all_reduce,
                watches_gradients=False,
                readers=[] if skip_frozen_gradients else ["the training loop"],
                loss_scale=lambda: float(self._scaler.get_scale()) if self._scaler is not None else 1.0,
                planned_steps=lambda: math.inf if planned_steps is None else planned_steps,
                inform=self._inform,
                warn=self._warn,
            ),
        )
        if all_reduce:
            all_reduce.register(wrapper, self._inform)
        self._batch_idx = self._micro_batches = 0  # of all; since the last step
        self._window_began_at = 0  # optimizer steps when the first of these came
        self._weights: list[float | Tensor] = []  # of the losses since the last step, where they were given
        self._is_closed = False

    # The loop ------------------------------------------------------------------------------------------------------

    def begin_batch(self, batch: Any) -> None:
        """Take in a batch, before its forward pass.

        Args:
            batch: what `loss` will be given; the first sample is copied.

        Raises:
            RuntimeError: the freezer is closed, or the state that was loaded is of another model or other options.
        """
        if self._is_closed:
            raise RuntimeError("This Freezer is closed. Make a new one to train on, and load this one's `state_dict`.")
        if not self._run.has_begun:
            self._run.begin()
        is_first = self._micro_batches == 0
        if not is_first and self._state.steps != self._window_began_at:
            raise RuntimeError(
                f"The optimizer stepped after {self._micro_batches} of `accumulate={self._accumulate}` backward passes."
                " Pass `is_last=True` to the last one before a step."
            )
        if is_first:
            self._weights, self._window_began_at = [], self._state.steps
            self._run.after_batch()  # of the batch before
        self._run.begin_batch(batch, self._batch_idx, is_first)
        if is_first:
            self._run.zero_grad()
        self._batch_idx += 1

    def backward(
        self,
        loss: Tensor,
        *args: Any,
        is_last: bool | None = None,
        backward: Callable[..., Any] = Tensor.backward,
        **kwargs: Any,
    ) -> None:
        """Run the backward pass of a loss: ``loss.backward()``, and what has to happen around it.

        Args:
            loss: 0-dim; divided by `accumulate`, and scaled by the scaler, if there is one.
            args: of `backward`.
            is_last: whether the optimizer steps next; None: after each `accumulate` calls.
            backward: what to call in place of ``loss.backward``, such as ``fabric.backward``.
            kwargs: of `backward`.
        """
        self.before_backward(loss)
        backward(loss, *args, **kwargs)
        self.after_backward(is_last)

    def before_backward(self, loss: Tensor, weight: float | Tensor | None = None) -> None:
        """Do what has to happen right before a backward pass, where the loop runs that itself; see `backward`.

        Args:
            loss: 0-dim; as for `backward`, or, with `weight`, the mean loss itself.
            weight: what the mean loss is multiplied by before its backward pass; None: the loss scale / `accumulate`.
        """
        if not self._run.has_begun:
            raise RuntimeError("Call `freezer.begin_batch(batch)` before the forward pass of each batch.")
        self._weights += [] if weight is None else [weight]
        divided_by: float | None = self._accumulate if weight is None else None
        if divided_by and self._scales_inside and self._scaler is not None:
            divided_by *= float(self._scaler.get_scale())  # `loss` is not scaled yet
        self._run.before_backward(loss, divided_by)

    def after_backward(self, is_last: bool | None = None, share: float | Tensor | None = None) -> None:
        """Do what has to happen right after a backward pass, before gradients are unscaled and clipped.

        Args:
            is_last: whether the optimizer steps next; None: after each `accumulate` calls.
            share: the sum of the weights of a step, its mean over processes; None: as it is on this process.
        """
        self._micro_batches += 1
        is_last = self._micro_batches >= self._accumulate if is_last is None else is_last
        self._run.after_backward(is_last, self._accumulate, self._weights or None, share)
        if is_last:
            self._micro_batches, self._weights = 0, []
            self._run.before_step(may_be_skipped=self._scaler is not None)

    def record_validation_loss(self, loss: float) -> None:
        """Take in the loss of a validation, for ``k=Growth(monitor=...)``; the mean over processes counts.

        Args:
            loss: on this process.
        """
        self._run.record_validation_loss(float(loss))

    def metrics(self) -> dict[str, float]:
        """Return what there is to log now, by tag: ``gcfreeze/frozen_fraction`` and so on."""
        return self._run.take_metrics()

    def close(self) -> None:
        """Leave the module and the optimizer as they were, but for the values. What was found stays."""
        if not self._is_closed:
            self._is_closed = True
            try:
                if self._run.has_begun:
                    self._run.after_batch()
                self._run.end()
            finally:
                self._run.close()
            for sentence in filter(None, self._state.unfinished()):
                self._warn(sentence)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on from here; see `State.state_dict`. Call it on all processes."""
        if self._run.has_begun and not self._is_closed:
            self._run.synchronize()
        return self._state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state. The optimizer's own state is loaded as always, before the first batch.

        Raises:
            ValueError: an unknown format.
            RuntimeError: the first batch has come already.
        """
        if self._run.has_begun:
            raise RuntimeError(
                "A state is loaded before the first batch. Close this Freezer, make a new one, and load it into that."
            )
        self._state.load_state_dict(state_dict)

    # What was found ------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies and pickles: they would follow the model and the optimizer of the original."""
        raise TypeError("A Freezer cannot be copied or pickled. Make a new one, and load this one's `state_dict()`.")

    def __repr__(self) -> str:
        """Return the arguments that are not the defaults, and the state, in one line."""
        return f"{type(self).__name__}({self._options.given()}): {self._state!r}"

    @property
    def steps(self) -> int:
        """The number of optimizer steps taken."""
        return self._state.steps

    @property
    def phase(self) -> Literal["observing", "frozen"]:
        """The phase: "observing" until step t0 has been taken, then "frozen"."""
        return self._state.phase

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The masks, ``{name: bool (*p.shape)}``, True = held constant; empty while observing."""
        return self._state.frozen

    @property
    def frozen_fraction(self) -> float:
        """Frozen elements / eligible elements; 0.0 while observing."""
        return self._state.frozen_fraction

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t, ``{name: (*p.shape)}``; see `GradCovFreezeCallback.variance`."""
        return self._state.variance

    @property
    def covariance(self) -> Tensor | None:
        """C_t, (p, p), with ``covariance="full"``; else None."""
        return self._state.covariance

    @property
    def ranks(self) -> dict[str, Tensor]:
        """The paper's I, ``{name: int64 (*p.shape)}``; see `GradCovFreezeCallback.ranks`."""
        return self._state.ranks(self._run.stages.scores)

    @property
    def savings(self) -> Savings | None:
        """What the freeze saved, and what it did not; None while observing."""
        return self._state.savings

    def report(self) -> reporting.Report:
        """Return what froze and what that saves: text to print, and HTML in notebooks."""
        return self._state.report(repr(self))

    def trainable_parameters(self) -> tuple[int, int]:
        """Return how many elements train now, and how many the module has."""
        return self._state.trainable_parameters()

    def plot_frozen(self, ax: Any = None) -> Any:
        """Plot frozen fractions, layers x steps; see `GradCovFreezeCallback.plot_frozen`."""
        return self._state.plot_frozen(ax)

    def plot_mask(self, name: str, ax: Any = None) -> Any:
        """Plot the mask of a parameter; see `GradCovFreezeCallback.plot_mask`."""
        return self._state.plot_mask(name, ax)

    def delta(self, file: str | Path | None = None) -> dict[str, Tensor]:
        """Return the live elements' positions and values; see `GradCovFreezeCallback.delta`."""
        return self._state.delta(self._module, file)

    def save_masks(self, file: str | Path) -> None:
        """Write the masks, for ``masks=file`` in another run; see `GradCovFreezeCallback.save_masks`."""
        self._state.save_masks(file)

    def save_order(self, file: str | Path) -> None:
        """Write the scores of the last decision; see `GradCovFreezeCallback.save_order`."""
        self._state.save_order(file)

    # Internals -----------------------------------------------------------------------------------------------------

    def _inform(self, sentence: str) -> None:
        if self._is_first_rank:
            _log.info("Freezer: %s", sentence)

    def _warn(self, sentence: str) -> None:
        if self._is_first_rank:
            warnings.warn(f"Freezer: {sentence}", stacklevel=2)


def _n_replicas(given: int | None, world: World, shards: Shards) -> int:
    """Return how many processes have batches of their own: all, unless a mesh has several dimensions."""
    if given is not None:
        return _checks.integer("n_replicas", given, at_least=1, at_most=world.size)
    if several := [mesh for mesh in shards.meshes if mesh.ndim > 1]:
        raise ValueError(
            f"Parameters are sharded over {several[0]}: pass `n_replicas`, the number of processes whose batches differ"
            " (the size of the data-parallel dimensions)."
        )
    return world.size

"""`GradCovFreezeCallback`: the front for Lightning. It tells a `Run` when things happen, see there; no maths here."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_gcfreeze import _checks, _lightning, misconfiguration, orderings, refusals, reporting
from lightning_gcfreeze._types import Granularity
from lightning_gcfreeze.delta import Stream
from lightning_gcfreeze.distributed.comm_hook import LiveAllReduce
from lightning_gcfreeze.estimators import gains
from lightning_gcfreeze.freezing.savings import Savings
from lightning_gcfreeze.gradients.choice import Source
from lightning_gcfreeze.masks import Masks
from lightning_gcfreeze.options import Options, arguments_of_preset
from lightning_gcfreeze.planning import deprecated
from lightning_gcfreeze.planning.budget import Budget
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.planning.schedule import FreezeSchedule, Stage
from lightning_gcfreeze.planning.settling import Settled
from lightning_gcfreeze.run import Run
from lightning_gcfreeze.state import State


class GradCovFreezeCallback(_lightning.Callback):
    """Freeze, after t0 optimizer steps, the k scalar parameters with the quietest gradients; train on with the rest.

    While observing, the covariance of the gradient noise is tracked by the recursion
    C_t = (1 - κ_t) C_{t-1} + κ_t (g_1 - g_S)(g_1 - g_S)ᵀ, Eq. (2.6) of the paper, from C_0 = 0: g_S is the gradient
    that the optimizer will use, g_1 that of the loss on the batch's first sample. After step t0 all eligible elements
    are ranked by its diagonal and the k lowest are held constant to the bit. Observing leaves no trace: weights,
    buffers, metrics, logged values and random streams are as without it.

    The arguments are for: *Basics*, `t0` to `seed`; *Automatic*, `schedule` and what `t0` and `k` may be but numbers;
    *Observing*, `samples` to `gradients`; *Holding*, `granularity` to `optimizer`; *Reporting*, the last three.

    Args:
        t0: optimizer steps observed before the freeze; step t0 + 1 is the first with frozen elements. A float in (0, 1)
            is a fraction of the planned steps. "auto", or a `Settled`: freeze when the order has settled and the loss
            has come down.
        k: how many eligible elements to freeze: an int is a count, a float in [0, 1] a fraction. "auto", or a `Growth`:
            more and more along the order, as long as the loss does not rise. A `Budget`: what memory or work asks for.
        order: what to rank by, lowest first: "variance" (the paper), "random", "reverse" (highest variance first),
            "magnitude", "second_moment", "snr", "displacement", "progress", "movement" (recommended; like "momentum"
            it reads weights and the optimizer's state alone), or a callable; see `lightning_gcfreeze.orderings`.
        include: patterns (fnmatch) of eligible names; None: all parameters that train and that the optimizer has.
        exclude: patterns of the names that are not.
        masks: what to freeze from the first step on, without observing: a file of `save_masks`; ``{name: bool
            (*p.shape)}`` or ``{name: bool}``, True = held constant; or a selection of `lightning_gcfreeze.masks`.
        seed: of the random order; None: torch's initial seed, as `seed_everything` sets it.
        schedule: several stages, in place of `t0` and `k`: a `FreezeSchedule`, or a list of (t, k).
        samples: whose gradients feed the recursion: "first" (the paper), "all" of the batch, or the first m. The
            squared noise is then the mean over them. "auto": "first" where `order` reads the variance; elsewhere no
            gradients of single samples are taken, `variance` stays empty, and a batch may hold one sample.
        every: observe each `every`-th optimizer step: `every`, 2·`every`, …
        covariance: "diagonal", or "full" for the p x p matrix of a small model.
        gain: κ_t: "1/t", a float in (0, 1], or a callable t -> κ, t counting observed steps from 1.
        gradients: how per-sample gradients are computed: "replay" runs `training_step` on the sample again, "capture"
            takes them from the batch's own backward pass, "auto" captures where a comparison with replay allows it.
        granularity: what freezes together: "element", each element on its own; "row", what has the same first index (an
            output neuron, a filter, a word's embedding); "tensor", a whole parameter; rows and tensors by their mean
            score, as many as fit into `k`. "mixed": rows and columns of weights where that saves work, else elements.
        hold: "compact", the optimizer receives only the live elements; "restore", frozen values are put back after each
            step; "auto", "compact" if the optimizer is elementwise, no code looks its state up by parameter and, until
            the last stage of a `schedule`, `order` reads no gradients, as "movement", and nothing may thaw.
        skip_frozen_gradients: skip computing weight gradients of fully frozen parameters, rows and columns. Where code
            of the user may look at gradients, and until such a stage, all are computed, and stay in place.
        batch_norm: "freeze": BatchNorm layers that froze as a whole keep and use their running statistics; or "track".
        lr_after_freeze: factor on the learning rates of all parameter groups in each step with frozen elements, from
            step t0 + 1 on. The optimizer alone sees it, schedulers do not, and it is the same in all stages. None: 1.
        optimizer: index of the optimizer to follow, where manual optimization has several: pass a callback for each.
        log_every_n_steps: None: the Trainer's.
        log_parameters: parameters that loggers get numbers of, one by one; of more, modules have them. 0: none.
        stream: where to publish the live elements' values while training: a `lightning_gcfreeze.delta.Stream`.
        promote: deprecated: `skip_frozen_gradients`. `max_t0`, `max_loss_increase`, `monitor`: of `Settled`, `Growth`.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an argument is outside its range, or does not go with another or, when training starts, the model.
        MisconfigurationException: when training starts, the Trainer, module or optimizer cannot be served.
    """

    def __init__(
        self,
        t0: int | float | Literal["auto"] | Settled | None = None,
        k: int | float | Literal["auto"] | Growth | Budget | None = None,
        *,
        order: orderings.Name | Callable[[orderings.Evidence], Any] = "variance",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        masks: Masks | None = None,
        seed: int | None = None,
        schedule: FreezeSchedule | list[Stage] | None = None,
        samples: Literal["auto", "first", "all"] | int = "auto",
        every: int = 1,
        covariance: Literal["diagonal", "full"] = "diagonal",
        gain: gains.Gain = "1/t",
        gradients: Source = "auto",
        granularity: Granularity = "element",
        hold: Literal["auto", "compact", "restore"] = "auto",
        skip_frozen_gradients: bool = True,
        batch_norm: Literal["track", "freeze"] = "track",
        lr_after_freeze: float | None = None,
        optimizer: int | None = None,
        log_every_n_steps: int | None = None,
        log_parameters: int = reporting.MAX_GROUPS,
        stream: Stream | None = None,
        promote: bool | None = None,
        max_t0: int | None = None,
        max_loss_increase: float | None = None,
        monitor: str | None = None,
    ) -> None:
        super().__init__()
        t0, k = deprecated.from_deprecated(t0, k, max_t0, max_loss_increase, monitor)
        self._options = Options(
            t0=t0, k=k, order=order, samples=samples, every=every, covariance=covariance, gain=gain,
            gradients=gradients, granularity=granularity, hold=hold, include=include,
            exclude=exclude, seed=seed, schedule=schedule, lr_after_freeze=lr_after_freeze, masks=masks, stream=stream,
            batch_norm=batch_norm, log_parameters=log_parameters,
            skip_frozen_gradients=deprecated.from_promote(skip_frozen_gradients, promote),
        )  # fmt: skip
        self.log_every_n_steps = _checks.integer_or_none("log_every_n_steps", log_every_n_steps, at_least=1)
        self.optimizer = _checks.integer_or_none("optimizer", optimizer, at_least=0)
        self._mailbox = _lightning.Mailbox()
        self._start_afresh()

    @classmethod
    def preset(cls, name: Literal["paper", "recommended"], **overrides: Any) -> "GradCovFreezeCallback":
        """Make a callback with the arguments of a preset of `lightning_gcfreeze.PRESETS`.

        Args:
            name: "paper", as published; "recommended", what docs/orders.md recommends.
            overrides: `t0` and `k`, or `schedule`, and any other argument, which wins over the preset's.
        """
        return cls(**arguments_of_preset(name) | overrides)

    def _start_afresh(self) -> None:
        self._state = State(self._options)
        self._run: Run | None = None  # during a fit
        self._all_reduce: LiveAllReduce | None = None  # DDP's communication hook
        self._module: Callable[[], LightningModule | None] = _lightning.no_module  # of the last fit
        self._board = reporting.Board(self.optimizer, self._options.log_parameters)
        self._arguments = self._board.tagged(self._options.hyperparameters())

    def __getattr__(self, name: str) -> Any:
        """Return an argument that was given at construction, such as ``callback.hold``."""
        options = self.__dict__.get("_options")
        if options is None or name.startswith("_") or name not in vars(options):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return vars(options)[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse to change an argument: a run has checked it."""
        if name in vars(self.__dict__.get("_options", object)):
            raise AttributeError(f"`{name}` is set when the callback is made. Make a new one with `{name}={value!r}`.")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        """Return the arguments that are not the defaults, and the state."""
        return f"{type(self).__name__}({self._options.given()}): {self._known!r}"

    @property
    def phase(self) -> Literal["observing", "frozen"]:
        """The phase: "observing" before any run and until step t0 has been taken, then "frozen"."""
        return self._known.phase

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The masks, ``{name: bool (*p.shape)}``, True = held constant; empty while observing. DTensors if sharded."""
        return self._known.frozen

    @property
    def frozen_fraction(self) -> float:
        """Frozen elements / eligible elements; 0.0 while observing."""
        return self._known.frozen_fraction

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t, ``{name: (*p.shape)}``, float32 or wider, in squared gradients; after t0 the last one.

        With S fixed it estimates (1 - 1/S) times the variance of a single sample's gradient. Empty before the first
        observed step, and where no gradients of single samples are taken; see `samples`. DTensors where sharded.
        """
        return self._known.variance

    @property
    def covariance(self) -> Tensor | None:
        """C_t, (p, p), rows in the order of ``named_parameters()``, with ``covariance="full"``; else None."""
        return self._known.covariance

    @property
    def ranks(self) -> dict[str, Tensor]:
        """The paper's I, ``{name: int64 (*p.shape)}``: 1-based places in the order, 1 = lowest score; frozen is <= k.

        While a run is observing, the order as it would be now; empty before its first observed step.

        Raises:
            RuntimeError: the parameters are sharded: no process has all scores.
        """
        return self._known.ranks(self._run.stages.scores if self._run else dict)

    @property
    def savings(self) -> Savings | None:
        """What the freeze saved, and what it did not; None while observing."""
        return self._known.savings

    def report(self) -> reporting.Report:
        """Return what froze and what that saves: text to print, and HTML in notebooks."""
        return self._known.report(repr(self))

    def trainable_parameters(self) -> tuple[int, int]:
        """Return how many elements train now, and how many the module has; (0, 0) before a fit."""
        return self._known.trainable_parameters()

    def plot_frozen(self, ax: Any = None) -> Any:
        """Plot frozen fractions, layers x steps, by matplotlib, on `ax` or a new figure; return matplotlib's Axes."""
        return self._known.plot_frozen(ax)

    def plot_mask(self, name: str, ax: Any = None) -> Any:
        """Plot the mask of a parameter, rows x columns; as `plot_frozen`. Sharded: call it on all processes."""
        return self._known.plot_mask(name, ax)

    def delta(self, file: str | Path | None = None) -> dict[str, Tensor]:
        """Return the live elements' positions and values, CPU tensors: with the weights of t0 they give those of now.

        Args:
            file: where to save them as well, as safetensors, for `apply_delta`; see `lightning_gcfreeze.delta`.

        Raises:
            RuntimeError: nothing is frozen yet, the module of the last fit is gone, or its frozen elements have other
                values than they froze with.
            ImportError: a file is wanted, and safetensors is not installed.
        """
        return self._known.delta(self._module(), file)

    def save_masks(self, file: str | Path) -> None:
        """Write the masks, for ``masks=file`` in another run. With sharded parameters call it on all processes.

        Raises:
            RuntimeError: nothing is frozen yet.
        """
        self._known.save_masks(file)

    def save_order(self, file: str | Path) -> None:
        """Write the scores of the last decision, for ``masks=lowest(file, k)``; as `save_masks` does."""
        self._known.save_order(file)

    @property
    def state_key(self) -> str:
        """The key in checkpoints. A Trainer compares keys when it is made, and would refuse two without a reason."""
        callbacks = _lightning.callbacks_being_validated()
        _lightning.refuse(refusals.too_many_callbacks(_lightning.followed(callbacks, GradCovFreezeCallback)))
        name = type(self).__qualname__
        return f"{name}{{'optimizer': {self.optimizer}}}" if self.optimizer else name

    # Hooks, in the order in which they run -------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit. Runs before a checkpoint is loaded."""
        if stage == "fit":
            _lightning.refuse(refusals.unsupported_strategy(trainer.strategy))
            callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
            _lightning.refuse(refusals.too_many_callbacks(_lightning.followed(callbacks, GradCovFreezeCallback)))
            self._start_afresh()
            self._all_reduce = _lightning.take_comm_hook(trainer.strategy) if not self.optimizer else None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state. Runs between `setup` and `on_fit_start`, under some strategies after it."""
        self._state.load_state_dict(state_dict)
        if self._run and self._run.has_begun:  # a tuner of Lightning's puts back what was before its trial
            self._run.attach()
            self._board.begin(self._state)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on from here; see `State.state_dict` for keys, types and shapes.

        With several processes it must be called on all of them, as a Trainer does: all go on from the mean of their
        statistics. A checkpoint triggered by a SLURM signal, which can arrive at any point, holds only rank 0's.
        """
        if self._run and not _lightning.in_signal_handler():
            self._run.synchronize()
        return self._known.state_dict()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work, before anything is trained. The optimizers exist by now."""
        self._module = weakref.ref(pl_module)
        _lightning.refuse_unsupported(trainer, pl_module, self.optimizer, self._options)
        name, tag = type(self).__name__, self._board.tag(reporting.FROZEN_FRACTION)
        around = _lightning.surroundings(trainer, pl_module, self.optimizer or 0, name, tag, self._all_reduce)
        self._run = Run(self._options, self._state, around)
        callbacks: Any = () if self._options.masks else trainer.callbacks  # type: ignore[attr-defined]
        around.warn_of([misconfiguration.averaged_weights(callbacks)])
        _lightning.refuse(refusals.unsupported_mesh(trainer.strategy, self._run.shards.meshes))
        if self._all_reduce:
            _lightning.give_back_comm_hook(trainer.strategy, self._all_reduce)
            self._all_reduce.register(trainer.strategy.model, around.inform)
        _lightning.log_hyperparameters(trainer, pl_module, self._arguments)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, or go on where the checkpoint stopped: by now all of it is loaded under every strategy."""
        self._running.begin()
        self._board.begin(self._state)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first sample, before `training_step` can change the batch in place."""
        _lightning.refuse(refusals.other_trainer(pl_module.trainer is trainer))
        is_first = not pl_module.automatic_optimization or batch_idx % trainer.accumulate_grad_batches == 0
        self._running.begin_batch(batch, batch_idx, is_first)
        if not pl_module.automatic_optimization:
            self._running.zero_grad()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero what the optimizer does not know of, too. Runs between forward and backward of a step's first batch."""
        if self._run:
            self._run.zero_grad()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take in the loss. Runs before every micro-batch's backward."""
        if pl_module.automatic_optimization:
            self._running.before_backward(loss, trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Observe one step, or take the live elements' gradients. Runs after every micro-batch's backward."""
        if pl_module.automatic_optimization:
            is_last = _lightning.is_last_micro_batch(trainer)
            self._running.after_backward(is_last, trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Zero the frozen elements' gradients. Runs after averaging and unscaling, before clipping."""
        if self._run and _lightning.is_optimizer(optimizer, trainer, self.optimizer or 0):
            if not pl_module.automatic_optimization:  # which backward passes are this optimizer's, nobody knows
                self._run.gradients_are_ready()
            self._run.before_step(_lightning.may_skip_steps(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after each n-th optimizer step, and whenever something was found out or decided."""
        run, state = self._running, self._state
        run.check_step_was_seen()
        run.after_batch()
        every_n: int = self.log_every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._board.is_due(state.steps, every_n, has_news=bool(state.plan.metrics)):
            self._board.log(trainer.loggers, _lightning.log_step(trainer), run.take_metrics(), state)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the monitored loss, if there is one."""
        monitor = self._state.plan.monitor
        if self._run and monitor is not None and not trainer.sanity_checking:
            _lightning.refuse(refusals.not_monitored(monitor, trainer.callback_metrics))
            self._run.record_validation_loss(float(trainer.callback_metrics[monitor]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing was frozen, or a stage was not reached. Share what was seen while there is a way to."""
        if self._run:
            self._run.end()
            self._board.draw(trainer.loggers, _lightning.log_step(trainer) - 1, self._state)
        _lightning.say(*self._state.unfinished())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of module and optimizer; what was found stays, also in the process that launched this one."""
        if stage == "fit":
            if self._run and (warning := misconfiguration.moved_at_the_end(self._state.moved(pl_module))):
                _lightning.say(f"{type(self).__name__}: {warning}")
            self._unbind(trainer)
            self._mailbox.send(self._state, trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of module and optimizer: there is no teardown."""
        self._unbind(trainer)

    @property
    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError(f"{type(self).__name__} needs a Trainer's fit: `on_fit_start` has not run.")
        return self._run

    @property
    def _known(self) -> State:
        """The state; that of the processes that trained, where this one launched them (ddp_spawn, ddp_fork)."""
        if self._run is None:
            self._mailbox.receive(self._state)
        return self._state

    def _unbind(self, trainer: Trainer) -> None:
        _lightning.forget_hyperparameters(trainer, self._arguments)
        _lightning.give_back_comm_hook(trainer.strategy, self._all_reduce)
        if self._run:
            self._run.close()
        self._run = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Trainer out of copies and pickles, and the module, whose `log` Lightning attaches to callbacks."""
        kept = {name: v for name, v in self.__dict__.items() if name not in ("log", "log_dict")}
        return kept | {"_run": None, "_module": _lightning.no_module, "_all_reduce": None}

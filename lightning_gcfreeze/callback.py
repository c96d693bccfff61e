"""`GradCovFreezeCallback`: when things happen. The only module that imports Lightning; no maths here.

One optimizer step, t = 1, 2, …, in hooks of the Trainer:

    on_train_batch_start        keep the first sample of the batch
    on_after_backward           while observing: fold (g_1, g_S) into C_t
                                once frozen: hand the live elements' gradients to the optimizer,
    on_before_optimizer_step    or zero those of frozen elements, before clipping
    the optimizer's post-hook   count t; at t0 decide and freeze; once frozen: write live elements, or frozen ones, back
                                and decide again, where there are several stages or k grows
    on_train_batch_end          log
"""

import copy
import inspect
import math
import multiprocessing
import pickle
import sys
import tempfile
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_module, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze import _checks, _modules, delta, misconfiguration, orderings, refusals, reporting, selection
from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Granularity
from lightning_gcfreeze.distributed import SINGLE_PROCESS, Shards, World, local
from lightning_gcfreeze.distributed.comm_hook import LiveAllReduce
from lightning_gcfreeze.estimators import FullCovariance, gains
from lightning_gcfreeze.freezing import ThawStates, WeightUses
from lightning_gcfreeze.freezing.fingerprints import fingerprints
from lightning_gcfreeze.freezing.hold import Holder
from lightning_gcfreeze.freezing.savings import Savings
from lightning_gcfreeze.gradients import isolation
from lightning_gcfreeze.gradients.replay import Window
from lightning_gcfreeze.gradients.source import How, SampleGradients
from lightning_gcfreeze.phases import Frozen, Observing
from lightning_gcfreeze.planning import plan
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.planning.plan import Plan
from lightning_gcfreeze.planning.schedule import FreezeSchedule
from lightning_gcfreeze.planning.settling import SAMPLE, Settled
from lightning_gcfreeze.user_code import readers
from lightning_gcfreeze.user_code.reached import Owners
from lightning_gcfreeze.user_code.watch import GradientWatch

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
else:
    # Lightning is published under two names whose classes know nothing of each other. The Trainer of either takes any
    # callback in a list, but a single `callbacks=callback` and the LightningCLI ask for their own class.
    rank_zero_log = rank_zero_module.log
    try:
        from pytorch_lightning import Callback as _StandaloneCallback

        rank_zero_module.log = rank_zero_log  # the import turns the Trainer's messages over to another logger

        class _Callback(pl.Callback, _StandaloneCallback):
            """A callback of both packages."""

    except ImportError:
        _Callback = pl.Callback

_FORMAT = 5
_DECISIVE = (
    "t0", "k", "max_t0", "max_loss_increase", "monitor", "schedule",
    "order", "samples", "every", "gain", "granularity", "include", "exclude", "seed",
)  # fmt: skip


@dataclass
class _Run:
    """What exists only while a Trainer trains: everything that refers to its module or optimizer."""

    trainer: pl.Trainer
    parameters: dict[str, Parameter]  # the eligible ones
    observable: dict[str, Parameter]  # those, and what `include` and `exclude` leave out
    count: int  # of their elements
    samples: SampleGradients
    positions: WeightUses
    shards: Shards
    replicas: int  # processes whose batches differ
    step_hooks: tuple[RemovableHandle, ...] = ()
    hold: Holder | None = None
    tried: bool = False  # whether the optimizer step to come was tried to observe
    logged_step: int = 0
    micro_batches: int = 0  # since the last optimizer step
    evaluations: int = 0  # of the loss, since the last optimizer step or batch
    decided: bool = False  # in this batch
    writes: bool = False  # whether other code may write to weights between steps
    holding_accumulators: list[str] = field(default_factory=list)
    callbacks: list[Any] = field(default_factory=list)  # the Trainer's, when training began
    watch: GradientWatch | None = None
    compiled: bool = False
    held_since: int = 0  # the step
    depth: int = 0  # of steps within the optimizer's step
    looked_through: bool = False  # the graph of a loss
    in_trial: bool = False  # a finder of Lightning's trains with other callbacks than the run's


class GradCovFreezeCallback(_Callback):
    """Freeze, after t0 optimizer steps, the k scalar parameters with the quietest gradients; train on with the rest.

    While observing, the covariance of the gradient noise is followed by the recursion
    C_t = (1 - κ_t) C_{t-1} + κ_t (g_1 - g_S)(g_1 - g_S)ᵀ, Eq. (2.6) of the paper, from C_0 = 0: g_S is the gradient
    that the optimizer will use, g_1 that of the loss on the batch's first sample. After step t0 all eligible elements
    are ranked by its diagonal and the k lowest are held constant to the bit.

    Observing leaves no trace: weights, buffers, metrics, logged values and random streams are as without it.

    Args:
        t0: optimizer steps observed before the freeze; step t0 + 1 is the first with frozen elements. "auto", or a
            `Settled`: freeze when the order has settled and the loss has come down.
        k: how many eligible elements to freeze: an int is a count, a float in [0, 1] a fraction. "auto", or a `Growth`:
            freeze more and more of them along the order, as long as the loss does not rise.
        order: what to rank by, lowest first: "variance" (the paper), "random", "reverse" (highest variance first),
            "magnitude", "second_moment", "snr", "displacement", "progress" (recommended with Adam),
            "variance_by_tensor", "variance_by_second_moment", "variance_by_magnitude", or a callable; see
            `lightning_gcfreeze.orderings`.
        samples: whose gradients feed the recursion: "first" (the paper), "all" of the batch, or the first m. Then the
            squared noise is the mean over them: m times the information, at a third to a half of a step's cost. "auto"
            is "first" where `order` reads the variance; where it does not, no single sample's gradient is taken:
            `variance` stays empty, and a batch may hold one sample.
        every: observe each `every`-th optimizer step: `every`, 2·`every`, …
        covariance: "diagonal", or "full" for the p x p matrix of a small model.
        gain: κ_t: "1/t", a float in (0, 1], or a callable t -> κ, t counting observed steps from 1.
        gradients: how single samples' gradients are had: "replay", the loss on the sample once more; "capture", from
            the batch's own pass; "auto", captured where a comparison with replay allows it.
        granularity: what freezes together: "element", nothing; "row", what has the same first index (an output neuron,
            a filter, a word's embedding); "tensor", a whole parameter. Rows and tensors are ranked by their mean score,
            and as many freeze as fit into `k` elements.
        hold: how constancy is kept: "compact", the optimizer gets the live elements alone, which saves its memory and
            its work, and leaves no ``p.grad``; "restore", frozen values are put back after each step, under any
            optimizer; "auto", compact where the optimizer is known to treat every element by itself and no code looks
            its state up by parameter. Where code of other people may look at gradients, "compact" leaves them where
            they are, and nothing is promoted. Until the last stage of a `schedule` all gradients are wanted, so values
            are restored and nothing is promoted, whatever this says.
        promote: spare the gradients that whole frozen parameters, rows and columns do not need.
        include: patterns (fnmatch) of the parameter names that are eligible; None: all. Only parameters that require
            a gradient and that the optimizer has are ever eligible.
        exclude: patterns of the names that are not.
        seed: of the random order; None: torch's initial seed, as `seed_everything` sets it.
        log_every_n_steps: None: the Trainer's.
        max_t0: with ``t0="auto"``, freeze after this step at the latest; None: after half of the planned ones.
        max_loss_increase: with ``k="auto"``, what a stage may cost, relative to the loss; None: 0.01.
        monitor: with ``k="auto"``, the logged validation loss to watch; None: the training loss.
        schedule: several stages, in place of `t0` and `k`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument outside its range, or that does not go with another; at the start of training, one that
            does not fit the model.
        MisconfigurationException: at the start of training, the Trainer, module or optimizer cannot be served; the
            message says why and names the way out.
    """

    def __init__(
        self,
        t0: int | Literal["auto"] | Settled | None = None,
        k: int | float | Literal["auto"] | Growth | None = None,
        *,
        order: orderings.Name | orderings.Ordering = "variance",
        samples: Literal["auto", "first", "all"] | int = "auto",
        every: int = 1,
        covariance: Literal["diagonal", "full"] = "diagonal",
        gain: gains.Gain = "1/t",
        gradients: How = "auto",
        granularity: Granularity = "element",
        hold: Literal["auto", "compact", "restore"] = "auto",
        promote: bool = True,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int | None = None,
        log_every_n_steps: int | None = None,
        max_t0: int | None = None,
        max_loss_increase: float | None = None,
        monitor: str | None = None,
        schedule: FreezeSchedule | None = None,
    ) -> None:
        super().__init__()
        self._decisions, self._monotone = plan.decisions(t0, k, max_t0, max_loss_increase, monitor, schedule)
        self.t0, self.k, self.schedule = t0, k, schedule
        self.max_t0, self.max_loss_increase, self.monitor = max_t0, max_loss_increase, monitor
        self._ordering = orderings.resolve(order)
        self.order = order
        self.samples = _checks.integer_or_name("samples", samples, at_least=1, allowed=["auto", "first", "all"])
        self.every = _checks.integer("every", every, at_least=1)
        plan.check_every(self.every, self._decisions)
        self.gain = gains.check(gain)
        _checks.one_of("gradients", gradients, ["auto", "replay", "capture"])
        self.gradients: How = gradients
        _checks.one_of("granularity", granularity, ["element", "row", "tensor"])
        self.granularity: Granularity = granularity
        _checks.one_of("hold", hold, ["auto", "compact", "restore"])
        self.hold = hold
        self.promote = _checks.boolean("promote", promote)
        self.include = _checks.patterns("include", include)
        self.exclude = _checks.patterns("exclude", exclude)
        self.seed = None if seed is None else _checks.integer("seed", seed, at_least=0, at_most=2**63 - 1)
        self.log_every_n_steps = (
            None if log_every_n_steps is None else _checks.integer("log_every_n_steps", log_every_n_steps, at_least=1)
        )
        self._full = _checks.one_of("covariance", covariance, ["diagonal", "full"]) == "full"
        self._mailbox = uuid.uuid4().hex
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._phase: Observing | Frozen = Observing({})
        self._plan = Plan(self._decisions, self._gain_of_scores)
        self._aside = ThawStates()
        self._steps = 0  # optimizer steps; Trainer.global_step counts every optimizer's
        self._observed_step = 0  # the last that was observed; ahead of these, if a loss scaler left it out since
        self._seed = 0  # of the random order; set when a run begins
        self._resumed: dict[str, Any] | None = None  # the arguments that the loaded state was made with
        self._savings: Savings | None = None
        self._world = SINGLE_PROCESS
        self._mean: LiveAllReduce | None = None  # DDP's communication hook
        self._module: Callable[[], pl.LightningModule | None] = _gone  # of the last fit
        self._readers: list[str] = []  # who was seen to ask for gradients
        self._held: dict[str, int] = {}  # fingerprints of the frozen elements' bits
        # Whether single samples' gradients are taken.
        self._noise = self.samples != "auto" or self._full or orderings.reads_variance(self._ordering)
        self._run: _Run | None = None

    # What there is to see ------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """The arguments that are not the defaults, and the state, in one line."""
        defaults = {n: p.default for n, p in inspect.signature(GradCovFreezeCallback).parameters.items()}
        now = {name: getattr(self, name) for name in defaults if name != "covariance"}
        given = ", ".join(f"{name}={value!r}" for name, value in now.items() if value != defaults[name])
        given += ", covariance='full'" if self._full else ""
        phase = self._found()
        if isinstance(phase, Frozen):
            state = f"frozen {phase.count:,} of {sum(shape.numel() for shape in phase.shapes.values()):,}"
        else:
            state = f"observing, {self._steps} optimizer steps"
        return f"{type(self).__name__}({given}): {state}"

    @property
    def phase(self) -> Literal["observing", "frozen"]:
        """Before any run and until step t0 has been taken "observing", then "frozen"."""
        return "frozen" if isinstance(self._found(), Frozen) else "observing"

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The masks, ``{name: bool (*p.shape)}``, True = held constant; empty while observing.

        Of a sharded parameter the mask is a DTensor, laid out as the parameter is.
        """
        phase = self._found()
        frozen = phase.frozen if isinstance(phase, Frozen) else {}
        return phase.shards.wrapped({name: mask.clone() for name, mask in frozen.items()})

    @property
    def frozen_fraction(self) -> float:
        """Frozen elements / eligible elements; 0.0 while observing."""
        phase = self._found()
        return phase.fraction if isinstance(phase, Frozen) else 0.0

    @property
    def variance(self) -> dict[str, Tensor]:
        """The diagonal of C_t, ``{name: (*p.shape)}``, float32 or wider, in squared gradients; from t0 on that of the
        last decision.

        With S fixed it estimates (1 - 1/S) times the variance of a single sample's gradient. Empty before the first
        observed step, and where no single sample's gradient is taken; see `samples`. Of a sharded parameter it is a
        DTensor, laid out as the parameter is.
        """
        phase = self._found()
        return phase.shards.wrapped({name: v.clone() for name, v in phase.variance.items()})

    @property
    def covariance(self) -> Tensor | None:
        """C_t, (p, p), rows in the order of ``named_parameters()``, with `covariance="full"`; else None."""
        matrix = self._found().matrix
        return None if matrix is None else matrix.clone()

    @property
    def ranks(self) -> dict[str, Tensor]:
        """The paper's I, ``{name: int64 (*p.shape)}``: places in the order from 1, the lowest score; frozen is <= k.

        While a run is observing, the order as it would be now; empty before its first observed step.

        Raises:
            RuntimeError: the parameters are sharded: no process has all scores.
        """
        phase = self._found()
        if phase.shards:
            raise RuntimeError("World need all scores in one place, and these are sharded. See `frozen` or `variance`.")
        if isinstance(phase, Frozen):
            return selection.ranks(phase.scores)
        if self._run is None or not phase.observed:
            return {}
        scores = phase.scores(self._ordering, _local(self._run.parameters), self._seed, self.granularity)
        return selection.ranks(scores)

    @property
    def savings(self) -> Savings | None:
        """What the freeze saved, and what it did not; None while observing."""
        self._found()
        return self._savings

    def delta(self, file: str | Path | None = None) -> dict[str, Tensor]:
        """The live elements' places and values: all that makes the weights of step t0 the ones that there are now.

        Args:
            file: where to save them, too, as safetensors; `apply_delta` takes it.

        Returns:
            A flat dict of CPU tensors, see `lightning_gcfreeze.delta`.

        Raises:
            RuntimeError: nothing is frozen yet, the module of the last fit is gone, or its frozen elements do not have
                the values any more that they froze with.
            ImportError: a file is wanted, and safetensors is not installed.
        """
        phase = self._found()
        if not isinstance(phase, Frozen):
            raise RuntimeError(f"There is no delta before step t0={self._t0}: nothing is frozen yet.")
        if (module := self._module()) is None:
            raise RuntimeError(
                "This callback is a copy and knows no module, its fit ran in processes of its own (ddp_spawn,"
                " ddp_fork), or the last fit's is gone. Use"
                " `lightning_gcfreeze.delta.of(module, callback.frozen)`."
            )
        if moved := self._moved(module):
            raise RuntimeError(
                f"{shortened(moved)}: frozen elements do not have the values any more that they froze with,"
                " so the weights of step t0 and the live elements would not give this model. Averages of weights (EMA,"
                " SWA) and code that writes to parameters do this. Take the delta before, or average after `t0` alone."
            )
        found = delta.of(module, self.frozen)
        if file is not None:
            delta.save(found, file)
        return found

    @property
    def state_key(self) -> str:
        """The key in checkpoints. A Trainer compares keys when it is made, and would refuse two without a reason."""
        asks = sys._getframe(1)
        if asks.f_code.co_name == "_validate_callbacks_list":
            others = asks.f_locals.get("callbacks", ())
            _refuse(refusals.too_many_callbacks([0 for c in others if isinstance(c, GradCovFreezeCallback)]))
        return type(self).__qualname__

    # Hooks, in the order in which they run -------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier fit. Runs before a checkpoint is loaded."""
        if stage == "fit":
            _refuse(refusals.unsupported_strategy(trainer.strategy))
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            _refuse(refusals.too_many_callbacks([0 for c in callbacks if isinstance(c, GradCovFreezeCallback)]))
            self._start_afresh()
            self._mean = LiveAllReduce.in_place_of_hook(trainer.strategy)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state. Runs between `setup` and `on_fit_start`, under some strategies after it."""
        if (version := state_dict.get("format")) != _FORMAT:
            raise ValueError(
                f"The checkpoint's {type(self).__name__} state has the format {version}, this version reads {_FORMAT}."
                " Resume with the version that wrote it."
            )
        if not state_dict["state"]["begun"]:  # saved before training began, as LearningRateFinder does
            return
        phase = Frozen if state_dict["phase"] == Frozen.name else Observing
        self._phase = phase.from_state_dict(state_dict["state"])
        self._plan.load_state_dict(state_dict["plan"])
        self._aside.load_state_dict(state_dict["aside"])
        self._steps = state_dict["steps"]
        self._observed_step, self._readers = state_dict.get("observed_step", 0), list(state_dict.get("readers", []))
        self._seed = state_dict["seed"]
        self._resumed = state_dict["arguments"]
        if self._run and self._run.step_hooks:  # a finder of Lightning's puts back what was before its trial
            self._attach(self._run)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here: tensors, numbers and strings, under parameter names.

        With several processes it must be called on all of them, as a Trainer does: while observing, each goes on from
        the mean of their statistics afterwards, so that a run that is resumed here has the bits of this one. What a
        signal of SLURM's makes Lightning save has rank 0's statistics alone: it comes in the middle of anything, and
        the ranks may be at different steps.
        """
        self._found()
        if self._run and not _in_a_signal_handler():
            self._share(self._run)
        return {
            "format": _FORMAT,
            "arguments": self._arguments(),
            "seed": self._seed,
            "steps": self._steps,
            "observed_step": self._observed_step,
            "readers": self._readers,
            "phase": self.phase,
            "plan": self._plan.state_dict(),
            "aside": self._aside.state_dict(),
            "state": self._phase.state_dict(self._world),
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work, before anything is trained. The optimizers exist by now."""
        self._module = weakref.ref(pl_module)
        step = pl_module.training_step
        _refuse(refusals.unsupported_module(pl_module, step, self._noise))
        if not pl_module.automatic_optimization:
            _refuse(refusals.unsupported_manual_optimization(True, True))
        _refuse(refusals.unsupported_optimizer_index(None, trainer.optimizers))
        _refuse(refusals.unsupported_optimizer(trainer.optimizers[0]))
        if self.hold == "compact":
            _refuse(refusals.not_compactable(trainer.optimizers[0], pl_module))
            _refuse(refusals.optimizer_state_is_read(readers.optimizer_state_readers(_owners(trainer))))
        if self._noise:
            _refuse(refusals.unsupported_samples(pl_module, self._count))
        parameters = selection.eligible(pl_module, trainer.optimizers[0], self.include, self.exclude)
        count = sum(p.numel() for p in parameters.values())
        for _, k in self._decisions:
            if not isinstance(k, Growth):
                selection.resolve_count(k, count)
        shards = Shards(parameters)
        _refuse(refusals.unsupported_mesh(trainer.strategy, shards.meshes))
        if shards:
            _refuse(refusals.unsupported_with_shards(self._full, self.hold, self._may_thaw))
        if self._full:
            FullCovariance({name: p.to("meta") for name, p in parameters.items()})  # refuses one that is too large
        self._world = World(trainer.world_size, trainer.strategy.root_device)
        if self._mean and (why := self._mean.install(trainer.strategy)):
            rank_zero_info(f"{type(self).__name__}: all gradients go on being sent, since {why}.")
        samples = SampleGradients(
            self.gradients,
            pl_module,
            parameters,
            _training_step(pl_module),
            lambda: _aside(trainer),
            lambda sentence: rank_zero_info(f"{type(self).__name__}: {sentence}"),
            count=self._count,
            singly=self._full,
            total=self._world.all_reduce_sum if shards else None,
        )
        data = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        replicas = data.get("num_replicas", 1)
        everything = selection.trained(pl_module, trainer.optimizers[0])
        self._run = _Run(
            trainer, parameters, everything, count, samples, WeightUses(pl_module, parameters), shards, replicas
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, or go on where the checkpoint stopped: by now all of it is loaded under every strategy."""
        run, optimizer = self._running, trainer.optimizers[0]
        if self._resumed is None:
            seed = torch.initial_seed() % 2**63 if self.seed is None else self.seed
            self._seed = self._world.broadcast_object(seed)
            self._phase = self._observing(run)
        else:
            _refuse(refusals.not_resumable(self._resumed, self._arguments(), self._phase.shapes, run.parameters))
        _refuse(self._plan.begin(lambda: trainer.estimated_stepping_batches))
        if not isinstance(trainer.strategy.model, DistributedDataParallel) and not run.shards:  # DDP does so itself
            run.holding_accumulators = readers.accumulator_holders(run.parameters)
        self._attach(run)
        run.compiled = _modules.has_compiled(pl_module)
        run.callbacks = [*trainer.callbacks]  # type: ignore[attr-defined]
        before_step = optimizer.register_step_pre_hook(self._before_step)
        run.step_hooks = (before_step, optimizer.register_step_post_hook(self._after_step))
        self._warn(trainer, run)

    def _attach(self, run: _Run) -> None:
        """Tie the state, which has just begun or was loaded, to the module and the optimizer of this run."""
        if self._resumed is not None:
            self._phase.to(_local(run.parameters), run.shards)
            self._aside.to(run.parameters)
            self._noise = self._watched.has_noise if self._watched else self._noise
        run.logged_step, run.tried, run.in_trial = self._steps, False, False
        run.samples.forget()
        if watched := self._watched:
            if watched.decided is None:
                watched.decided = run.samples.decided
            else:
                run.samples.decided = watched.decided
        if isinstance(self._phase, Frozen):
            run.shards.check_agreement(self._phase.frozen, self._world)
            self._begin_to_hold(run, self._phase, resumed=True)
        self._publish(run)

    def _warn(self, trainer: pl.Trainer, run: _Run) -> None:
        """Say, before the first step, what is probably not meant."""
        names = [name for name, _ in trainer.lightning_module.named_parameters()]
        stages = [t for t, _ in self._decisions if isinstance(t, int)][self._plan.made :]
        for sentence in (
            misconfiguration.freeze_never_reached(stages, _planned_steps(trainer)),
            misconfiguration.useless_patterns("include", self.include, names),
            misconfiguration.useless_patterns("exclude", self.exclude, names),
            *(misconfiguration.small_count(k, run.count) for _, k in self._decisions),
            misconfiguration.averaged_weights(trainer.callbacks),  # type: ignore[attr-defined]
        ):
            if sentence:
                rank_zero_warn(f"{type(self).__name__}: {sentence}")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first sample, before `training_step` can change the batch in place."""
        run = self._running
        if pl_module.trainer is not trainer:
            raise MisconfigurationException(
                "Another Trainer was used on this module in the middle of the fit, and Lightning sends hooks there from"
                " now on. Give that Trainer a copy of the module (`copy.deepcopy`)."
            )
        run.evaluations = run.depth = 0
        if run.in_trial:  # that was not rolled back
            self._attach(run)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            run.samples.forget()  # Lightning zeroes the gradients here, also of a window that was broken off
            run.positions.clear()
            run.micro_batches = 0
            self._watch_gradients(run)
            # Between our two hooks on the step lies what the optimizer does, and nobody else's hook.
            for hook, last in zip(run.step_hooks, (True, False), strict=True):
                if (hooks := hook.hooks_dict_ref()) is not None:
                    hooks.move_to_end(hook.id, last=last)
        if self._plan.may_decide_after(self._steps + 1):
            run.positions.listen()
        if self._watched and self._noise and (self._due or self._steps == 0):
            run.samples.keep(batch, batch_idx)

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Zero what the optimizer does not know of, too. Runs between forward and backward of a step's first batch."""
        if self._mean:
            self._mean.begin_step()
        if self._run and self._run.hold:
            self._run.hold.begin_step()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The backward pass to come is the training step's own. Runs before every micro-batch's backward."""
        run = self._running
        if self._plan.listens(self._steps + 1):
            self._plan.hear(loss.detach() * (trainer.accumulate_grad_batches / self._loss_scale(trainer)))
        if self._watched:
            run.positions.stop()
            if not run.looked_through and (self.gradients == "capture" if self._noise else self.promote):
                _refuse(refusals.unsupported_graph(loss))
            run.looked_through = True
            run.samples.begin_backward()
        if run.hold:
            run.hold.begin_backward(loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Observe one step, while observing; then take the live elements' gradients.

        Runs after every micro-batch's backward; ``p.grad`` is g_S, times the loss scale, on the last one of a step.
        """
        run = self._running
        if run.hold and not trainer.fit_loop._should_accumulate():
            run.hold.after_backward()
        watched, run.micro_batches = self._watched, run.micro_batches + 1
        if watched is None or not (run.samples.join() or not self._noise) or trainer.fit_loop._should_accumulate():
            return
        window = run.samples.take() if self._noise else None
        size = None if window is None or window.batch_size is None else window.batch_size * run.replicas
        if size == 1 and self._steps == 0:  # at the first step it is no short last batch
            raise MisconfigurationException(
                "The batch holds one sample: its gradient is the batch's, and there is no noise to see. Use batches of"
                " at least 2 samples, accumulate gradients, or take no single sample's gradient: use an order that does"
                " not read the variance, such as `order='progress'`, with `samples='auto'` and `covariance='diagonal'`."
            )
        if self._steps == 0 and all(p.grad is None for p in run.parameters.values()):
            raise MisconfigurationException(
                "No eligible parameter has a gradient after the backward pass: something uses it up before it can be"
                " observed, as optimizers do that step in the backward pass. Leave the gradients in ``p.grad``."
            )
        if self._observed_step > self._steps and not watched.settle():
            self._observed_step = self._steps  # a loss scaler left the optimizer step out, and it comes again
        if self._due and self._observed_step <= self._steps:
            run.tried = True
            if self._observe(watched, run, window, size):
                self._observed_step = self._steps + 1

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Zero the frozen elements' gradients. Runs after averaging and unscaling, before clipping."""
        if self._run and not _may_skip_steps(trainer):
            self._run.evaluations += 1
            if self._run.evaluations > 1:
                _refuse(refusals.several_evaluations(optimizer))
        if self._run and self._run.hold:
            self._run.hold.before_step()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Find out whether a finder of Lightning's is trying something: it trains with other callbacks than the run's.

        And hand the live elements over, where that is done late. Runs before the forward pass, but under a loss scaler.
        """
        run = self._running
        run.depth += 1
        now: list[Any] = run.trainer.callbacks  # type: ignore[attr-defined]
        if not run.in_trial and not any(callback is known for callback in now for known in run.callbacks):
            run.in_trial = True
            run.samples.forget()
            run.positions.stop()
            if isinstance(self._phase, Frozen):
                self._begin_to_hold(run, self._phase, resumed=True)
        return run.hold.before_late_step(args, kwargs) if run.hold else None

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the step; freeze at t0; put frozen values back. Runs right after the parameters have moved.

        It does not run on a step that a loss scaler leaves out, except with a fused optimizer, which is told to leave
        it out itself.
        """
        run = self._running
        run.depth -= 1
        if run.depth > 0:  # the step of a parent class, within that of its child
            return
        run.evaluations = 0
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            if run.hold:
                run.hold.after_step()  # nothing has moved, but the optimizer had what its steps are given
            return
        if run.in_trial:  # its steps count for nothing
            if run.hold:
                run.hold.after_step()
            return
        watched = self._watched
        if watched and self._due and not run.tried and self._observed_step <= self._steps:
            watched.skipped += 1  # `training_step` returned no loss
        run.tried = False
        run.samples.forget()
        self._steps += 1
        if run.hold:
            self._check_held(run)
            run.hold.after_step()
        if watched and self._plan.may_decide_after(self._steps):
            if self._is_time(watched, run):
                self._change(run, self._decide(watched, run))
        elif isinstance(self._phase, Frozen):
            self._judge(run, self._phase)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log after each n-th optimizer step, and whenever something was found out or decided."""
        run = self._running
        if run.evaluations:
            _refuse(refusals.no_step_hooks(trainer.optimizers[0]))
        if run.hold and run.writes and isinstance(self._phase, Frozen):
            run.hold.after_batch(first=run.decided)
            if run.decided:
                self._held = fingerprints(run.parameters, self._phase.frozen)
        run.decided = False
        every_n: int = self.log_every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = bool(self._plan.news) or (every_n > 0 and self._steps % every_n == 0)
        if due and run.logged_step != self._steps:
            run.logged_step = self._steps
            self._log(trainer, run)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the monitored loss, if there is one."""
        growth = self._plan.growth
        if self._run is None or trainer.sanity_checking or not self._plan.unfinished:
            return
        if growth is None or growth.monitor is None:
            return
        if growth.monitor not in trainer.callback_metrics:
            raise MisconfigurationException(
                f"`monitor={growth.monitor!r}` was not logged by this validation, but"
                f" {', '.join(sorted(trainer.callback_metrics)) or 'nothing'} was. Log it with `self.log`, or leave"
                " `monitor` out, to watch the training loss."
            )
        of_all = self._world.all_gather_object(float(trainer.callback_metrics[growth.monitor]))
        self._plan.hear_of_validation(sum(of_all) / len(of_all))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if nothing was frozen, or a stage was not reached. Share what was seen while there is a way to."""
        if self._run:
            self._share(self._run)
        if self._plan.observes:
            what = "Nothing was frozen" if self._plan.t0 is None else f"Only stage {self._plan.made} was reached"
            rank_zero_warn(
                f"{what}: training ended after {self._steps} optimizer steps, before `t0={self._t0}`."
                " Lower `t0` or train longer."
            )
        elif self._plan.unfinished:
            rank_zero_info(
                f"`k='auto'` was not settled: training ended with stage {int(self._plan.k * 100)} % under watch. Train"
                " longer, validate more often, or make `every` of `Growth` smaller."
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of module and optimizer; what was found stays, also in the process that launched this one."""
        if stage != "fit":
            return
        if self._run and isinstance(self._phase, Frozen):
            self._say_if_moved(pl_module)
        self._unbind(trainer)
        if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher" and trainer.is_global_zero:
            self._send_home()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of module and optimizer: after an exception there is no teardown."""
        self._unbind(trainer)

    # Behind the hooks ----------------------------------------------------------------------------------------------

    @property
    def _watched(self) -> Observing | None:
        """What is observed for a decision to come."""
        return self._phase if isinstance(self._phase, Observing) else self._phase.again

    @property
    def _t0(self) -> int | str:
        """The step of the next decision, or how it will be found."""
        return self._plan.latest if self._plan.settling or isinstance(self.t0, int) or self.schedule else "auto"

    def _gain_of_scores(self, t: int) -> float:
        """Of the statistic that the order knows least of."""
        kappa = gains.at(self.gain, t)
        return gains.recent(kappa, t) if "recent_mean" in orderings.needed_by(self._ordering) else kappa

    @property
    def _may_thaw(self) -> bool:
        return not self._monotone or self._plan.growth is not None

    @property
    def _due(self) -> bool:
        """Whether the optimizer step to come is to be observed."""
        return (self._steps + 1) % self.every == 0

    @property
    def _count(self) -> int | None:
        """How many samples of a batch are observed; None: all."""
        return self.samples if isinstance(self.samples, int) else {"auto": 1, "first": 1, "all": None}[self.samples]

    @property
    def _running(self) -> _Run:
        if self._run is None:
            raise RuntimeError(f"{type(self).__name__} needs a Trainer's fit: `on_fit_start` has not run.")
        return self._run

    def _found(self) -> Observing | Frozen:
        """The state; that of the processes that trained, where they were launched by this one (ddp_spawn, ddp_fork)."""
        mail = self._mail
        if self._run is None and mail.exists() and multiprocessing.parent_process() is None:
            with mail.open("rb") as file:
                self.__dict__.update(pickle.load(file))
            mail.unlink()
        return self._phase

    def _send_home(self) -> None:
        if multiprocessing.parent_process() is not None:
            kept = {name: self.__dict__[name] for name in ("_phase", "_plan", "_aside", "_steps", "_seed", "_savings")}
            self._mail.touch(mode=0o600)
            with self._mail.open("wb") as file:
                pickle.dump(kept, file)

    @property
    def _mail(self) -> Path:
        return Path(tempfile.gettempdir()) / f"lightning_gcfreeze-{self._mailbox}.pickle"

    def _moved(self, module: pl.LightningModule) -> list[str]:
        """Names of parameters whose frozen elements do not have the bits that they are held at."""
        parameters = dict(module.named_parameters())
        masks = self._phase.frozen if isinstance(self._phase, Frozen) else {}
        now = fingerprints(parameters, {name: masks[name] for name in self._held if name in parameters})
        return [name for name, fingerprint in now.items() if fingerprint != self._held[name]]

    def _check_held(self, run: _Run) -> None:
        """Do frozen elements have their values, where nothing puts them back? Asked now and then, and each epoch.

        Right after a step: what others swap for a while (averages, for a validation) is in its place again.
        """
        age = self._steps - run.held_since
        looks = age & (age - 1) == 0 or run.trainer.is_last_batch
        if run.hold is None or run.hold.puts_back or not looks:
            return
        if moved := self._moved(run.trainer.lightning_module):
            raise RuntimeError(
                f"{shortened(moved)}: frozen elements were written to between steps, by code that was not"
                " found. Use `hold='restore'`, which puts them back after each step."
            )

    def _say_if_moved(self, module: pl.LightningModule) -> None:
        if moved := self._moved(module):
            rank_zero_warn(
                f"{type(self).__name__}: the fit ends with other values of frozen elements in"
                f" {shortened(moved)} than they froze with: something replaced them after the last step,"
                " as averages of weights do, in a callback or within the optimizer."
            )

    def _watch_gradients(self, run: _Run) -> None:
        """Note who asks for gradients, in the 1st, 2nd, 8th, 64th, … observed step; until the next one begins."""
        if run.watch is not None:
            run.watch.disarm()
            self._readers += [name for name in run.watch.seen if name not in self._readers]
            run.watch = None
        if self._watched and self._steps + 1 in (1, 2, 8, 64, 512, 4096) and not (run.shards or run.compiled):
            run.watch = GradientWatch(run.parameters.values())
            run.watch.arm()

    def _share(self, run: _Run) -> None:
        """Become the same on all processes."""
        if self._watched:
            self._watched.share(self._world)
            run.samples.share(self._world)
        self._plan.share(self._world)

    def _publish(self, run: _Run) -> None:
        """Let other callbacks read the frozen fraction: EarlyStopping, ModelCheckpoint's file names, progress bars."""
        run.trainer.callback_metrics["gcfreeze/frozen_fraction"] = torch.tensor(self.frozen_fraction)

    def _unbind(self, trainer: pl.Trainer) -> None:
        if self._mean:
            self._mean.give_back(trainer.strategy)
        if self._run:
            self._run.samples.forget()
            self._run.positions.stop()
            if self._run.watch is not None:
                self._run.watch.disarm()
            if self._run.hold:
                self._run.hold.release()
            for hook in self._run.step_hooks:
                hook.remove()
        self._run = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradCovFreezeCallback":
        """A copy has a mailbox of its own: what its processes find out is not this one's."""
        copied = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__getstate__(), memo) | {"_mailbox": uuid.uuid4().hex}
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Leave the Trainer out of copies and pickles, and the module, whose `log` Lightning attaches to callbacks."""
        kept = {name: v for name, v in self.__dict__.items() if name not in ("log", "log_dict")}
        return kept | {"_run": None, "_module": _gone, "_mean": None}

    def _observe(self, phase: Observing, run: _Run, window: Window | None, size: int | None) -> bool:
        """Take one pair into the statistics, if it can be had and is finite; tell whether it was."""
        # Lightning divides each loss by the full number of micro-batches, also in the short last window of an epoch.
        share = run.micro_batches / run.trainer.accumulate_grad_batches
        loss_scale = self._loss_scale(run.trainer)
        g_batch = isolation.of_batch(run.parameters if phase.reads_gradients else {}, share * loss_scale)
        if window is None:
            return phase.observe({}, g_batch, self.gain)
        scale = loss_scale / run.trainer.accumulate_grad_batches
        found = None if size == 1 else run.samples.gradients(window, scale, g_batch, size)
        if found is None:
            phase.skipped += 1
            return False
        return phase.observe(found.by_name, g_batch, self.gain, size, found.centred)

    @staticmethod
    def _loss_scale(trainer: pl.Trainer) -> float:
        scaler = _scaler(trainer)
        return scaler.get_scale() if scaler else 1.0

    def _observing(self, run: _Run) -> Observing:
        needs = orderings.needed_by(self._ordering)
        return Observing(_local(run.parameters), self._full, needs, run.shards, self._noise)

    def _is_time(self, phase: Observing, run: _Run) -> bool:
        """Whether to decide now; with ``t0="auto"`` that is asked of the data, the same on all ranks."""
        if self._plan.settling is None:
            return True
        last = self._steps >= self._plan.latest
        observed = -int(self._world.all_reduce_max(torch.tensor(-phase.observed)))
        if not observed:
            if not last:
                self._plan.settling.skip()
            return last
        scores = phase.scores(self._ordering, _local(run.parameters), self._seed, self.granularity, self._world)
        look = self._plan.look(
            selection.sampled(scores, SAMPLE, run.shards, self._world),
            selection.sampled(phase.activity(_local(run.parameters)), SAMPLE, run.shards, self._world) > 0,
            observed,
            selection.resolve_count(self._plan.k, run.count) / run.count,
            self._world,
        )
        if look.settled or last:
            why = "the order and the loss have settled" if look.settled else "`max_t0` is reached"
            rank_zero_info(f"{type(self).__name__}: {why}. The last look: {look.sentence()}.")
        return look.settled or last

    def _decide(self, phase: Observing, run: _Run) -> Frozen:
        """Rank and mark, the same on all ranks: their statistics are averaged first."""
        if self._world.all_reduce_sum(torch.tensor(int(not phase.observed))):
            since = "among the first" if self._plan.t0 is None else "since the last stage, until"
            raise RuntimeError(
                f"No step could be observed {since} `t0={self._steps}`: {phase.skipped} were left out because a"
                " gradient was not finite, there was no loss, or the batch had one sample."
            )
        phase.share(self._world)
        if late := misconfiguration.late_parameters(
            run.trainer.lightning_module, run.trainer.optimizers[0], run.observable
        ):
            rank_zero_warn(f"{type(self).__name__}: {late}")
        weights = _local(run.parameters)
        keep = self._phase.frozen if isinstance(self._phase, Frozen) and self._monotone else None
        self._plan.decided(self._steps, self._world)
        k = selection.resolve_count(self._plan.k, run.count)
        frozen = phase.freeze(
            self._ordering, weights, self._seed, k, self.granularity, run.positions.counts, self._world, keep
        )
        if self._plan.observes:
            frozen.again = self._observing(run)
            frozen.again.decided = run.samples.decided
        else:
            run.samples.release()
        rank_zero_info(
            f"{type(self).__name__}: after {self._steps} optimizer steps ({phase.observed} observed, {phase.skipped}"
            f" left out) {frozen.fraction:.1%} of the eligible elements are frozen: {frozen.count:,}."
        )
        if k and not frozen.count:
            rank_zero_warn(
                f"Nothing was frozen: the first {self.granularity} in the order has more than `k={self._plan.k}`"
                f" allows, {k:,} elements. Raise `k`, or choose a finer `granularity`."
            )
        if (dead := frozen.never_moved) > 0.1 * k:
            rank_zero_warn(
                f"{dead:,} of the {frozen.count:,} frozen elements never had a gradient in the {phase.observed}"
                " observed steps (constant inputs, dead units, unseen embedding rows, unused parameters)."
                " They rank lowest, but have not converged; a larger `t0` or `exclude` tells them apart."
            )
        return frozen

    def _judge(self, run: _Run, phase: Frozen) -> None:
        """Freeze the next stage, or thaw the last, where k grows."""
        verdict = self._plan.judge(self._steps, self._world)
        if verdict == "stay":
            self._aside.forget()
            self._tell_savings()
        elif verdict in ("grow", "thaw"):
            k = selection.resolve_count(self._plan.k, run.count)
            self._change(run, phase.of_count(k, self.granularity, self._world))
        if self._plan.growing and verdict != "wait":
            rank_zero_info(
                f"{type(self).__name__}: after {self._steps} optimizer steps {self._plan.growing.sentence(verdict)}"
                f" {self.frozen_fraction:.1%} of the eligible elements are frozen."
            )

    def _tell_savings(self) -> None:
        if self._savings and not self._plan.unfinished:
            rank_zero_info(self._savings.table())

    def _change(self, run: _Run, phase: Frozen) -> None:
        """Hold what the new decision says, and nothing else."""
        nothing = {name: torch.zeros_like(mask) for name, mask in phase.frozen.items()}
        before = self._phase.frozen if isinstance(self._phase, Frozen) else nothing
        optimizer = run.trainer.optimizers[0]
        if run.hold:
            run.hold.release()
            run.hold = None
        self._phase = phase
        if self._may_thaw:
            thawing = {name: mask & ~phase.frozen[name] for name, mask in before.items()}
            self._aside.give_back(optimizer, run.parameters, thawing)
            if self._plan.growth or not self._plan.unfinished:
                self._aside.forget()  # where k grows, only the last stage may thaw
            if self._plan.unfinished:
                freezing = {name: mask & ~before[name] for name, mask in phase.frozen.items()}
                self._aside.keep(optimizer, run.parameters, freezing)
        run.decided = True
        self._begin_to_hold(run, phase, resumed=False)
        self._publish(run)
        self._tell_savings()

    def _begin_to_hold(self, run: _Run, phase: Frozen, resumed: bool) -> None:
        # As long as more is observed, frozen elements' gradients are wanted too: nothing is spared yet.
        observes = phase.again is not None
        trainer = run.trainer
        module, optimizer = trainer.lightning_module, trainer.optimizers[0]
        if run.hold:
            run.hold.release()
        who = _owners(trainer)
        looking = [*readers.gradient_readers(who, run.parameters, optimizer), *run.holding_accumulators]
        looking = looking or [*self._readers, *(run.watch.seen if run.watch else ())]
        if not run.in_trial:  # what travels depends on it
            looking = list(dict.fromkeys(name for found in self._world.all_gather_object(looking) for name in found))
        how: Literal["compact", "restore"] = "restore"
        if self.hold != "restore" and not (run.shards or observes or run.in_trial):
            of_state = readers.optimizer_state_readers(who)
            if not (of_state or refusals.not_compactable(optimizer, module)):
                how = "compact"
            if looking and how == "compact":
                rank_zero_info(f"{type(self).__name__}: {refusals.gradients_are_kept(looking)}")
            elif of_state:
                rank_zero_info(
                    f"{type(self).__name__}: values are put back. {refusals.optimizer_state_is_read(of_state)}"
                )
        writing = readers.weight_writers(who, run.parameters, optimizer)
        promote = self.promote and not (run.shards or observes or run.in_trial or looking)
        where = (run.parameters, phase.frozen, phase.positions)
        late, run.writes = how == "compact" and bool(looking), bool(writing)
        run.hold = Holder(how, optimizer, module, trainer.strategy.model, *where, promote, late, run.writes, resumed)
        self._held, run.held_since = fingerprints(run.parameters, phase.frozen), self._steps
        self._savings = run.hold.savings
        if self._mean and not (observes or looking):
            self._mean.leave_out({run.parameters[name]: mask for name, mask in phase.frozen.items()})

    def _log(self, trainer: pl.Trainer, run: _Run) -> None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the axis of whatever `self.log` writes
        frozen = self._phase.frozen if isinstance(self._phase, Frozen) else {}
        fractions = self._phase.fractions if isinstance(self._phase, Frozen) else dict.fromkeys(run.parameters, 0.0)
        metrics = reporting.scalars(
            fractions,
            self.frozen_fraction,
            self._phase.observed,
            self._savings.scalars() if self._savings else None,
            self._mean.sent if self._mean else None,
            self._plan.news,
        )
        histograms = reporting.histograms(frozen, self._phase.variance) if "gcfreeze/t0" in self._plan.news else None
        self._plan.news = {}
        reporting.log(trainer.loggers, step, metrics, histograms)

    def _arguments(self) -> dict[str, Any]:
        """What decides the outcome, as numbers and strings."""

        def plain(value: Any) -> Any:
            if isinstance(value, FreezeSchedule | Settled | Growth):
                return {"class": type(value).__name__, **{n: plain(v) for n, v in vars(value).items()}}
            if callable(value):
                return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        values = {name: plain(getattr(self, name)) for name in _DECISIVE}
        return {**values, "covariance": "full" if self._full else "diagonal"}


def _gone() -> None:
    """In place of a reference to a module."""


def _local(parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    return {name: local(p.detach()) for name, p in parameters.items()}


def _in_a_signal_handler() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_slurm_sigusr_handler_fn":
        frame = frame.f_back
    return frame is not None


def _scaler(trainer: pl.Trainer) -> Any:
    """The loss scaler of 16-mixed precision, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _may_skip_steps(trainer: pl.Trainer) -> bool:
    """Whether the optimizer's step may be left out after its gradients were made ready."""
    own = type(trainer.precision_plugin).optimizer_step.__module__.split(".")[0]
    return _scaler(trainer) is not None or own not in ("lightning", "pytorch_lightning")


def _owners(trainer: pl.Trainer) -> Owners:
    """Whatever of a run may have code of the user's."""
    schedulers: list[Any] = [config.scheduler for config in trainer.lr_scheduler_configs]
    lambdas = [function for scheduler in schedulers for function in getattr(scheduler, "lr_lambdas", ())]
    others: list[Any] = [trainer.strategy, trainer.precision_plugin, trainer, *trainer.loggers, *schedulers, *lambdas]
    others += [] if (data := getattr(trainer, "datamodule", None)) is None else [data]
    return Owners(trainer.lightning_module, [*trainer.callbacks, *others])  # type: ignore[attr-defined]


def _planned_steps(trainer: pl.Trainer) -> float:
    """Optimizer steps that the Trainer will take in all; NaN where it cannot tell."""
    try:
        return float(trainer.estimated_stepping_batches)
    except MisconfigurationException:  # accumulation that changes from epoch to epoch
        return math.nan


def _refuse(reason: str | None) -> None:
    if reason:
        raise MisconfigurationException(reason)


@contextmanager
def _aside(trainer: pl.Trainer) -> Iterator[None]:
    """The surroundings of a training step, but with mute loggers: a `training_step` may talk to `self.logger`."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        with trainer.precision_plugin.train_step_context():
            yield
    finally:
        trainer.loggers = loggers


def _training_step(pl_module: pl.LightningModule) -> Callable[[Any, int], Any]:
    """`training_step` of (batch, batch_idx), also where it takes the batch alone."""
    if is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2):
        return pl_module.training_step
    return lambda batch, batch_idx: pl_module.training_step(batch)

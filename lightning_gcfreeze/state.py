"""`State`: what outlives a run and goes into checkpoints: counters, statistics, the decision, the plan.

A checkpoint of a front is `State.state_dict`, format 6; format 5, of version 0.1, is converted when it is read.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from lightning_gcfreeze import delta, masks, reporting, selection
from lightning_gcfreeze._format_5 import from_format_5
from lightning_gcfreeze._names import closest, shortened
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.decision import Decision
from lightning_gcfreeze.distributed import Shards, sharded_parameters, whole
from lightning_gcfreeze.freezing import ThawStates
from lightning_gcfreeze.freezing.fingerprints import fingerprints
from lightning_gcfreeze.freezing.savings import Savings
from lightning_gcfreeze.gradients.choice import SourceChoice
from lightning_gcfreeze.observing import Observing
from lightning_gcfreeze.options import Options
from lightning_gcfreeze.planning.plan import Plan
from lightning_gcfreeze.planning.settling import Settled

FORMAT = 6


class State:
    """Everything found out so far. What is observed and what was decided stand side by side.

    Args:
        options: the arguments of the run.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.steps = 0
        """Optimizer steps taken; a trainer's own counter may count the steps of several optimizers."""
        self.seed = 0
        """Of the random order; set when a run begins."""
        self.observing: Observing | None = None
        """The statistics for the next decision; None before a run, and where no decision is to come."""
        self.decision: Decision | None = None
        """The last decision; None before t0."""
        self.plan = Plan(options.decisions, options.gain_of_scores)
        self.thaw_states = ThawStates()
        self.choice = SourceChoice.initial(options.gradients, ())
        """Which gradients of single samples are captured and which are replayed."""
        self.gradient_readers: list[str] = []
        """Code that was seen to ask for gradients."""
        self.savings: Savings | None = None
        self.history: list[tuple[int, dict[str, float]]] = []
        """The step of each change of the masks, and the frozen fraction of each parameter from there on."""
        self.n_parameters = (0, 0)
        """Elements of the module, and those of them that the optimizer was given to train; of whole parameters."""
        self._trained: dict[str, int] = {}  # these, by parameter
        self.held_bits: dict[str, int] = {}
        """Fingerprints of the frozen elements' bits, by parameter name; not in checkpoints."""
        self.loaded_arguments: dict[str, Any] | None = None
        """The decisive arguments that a loaded state was made with."""

    def decide(self, decision: Decision, module: nn.Module, optimizer: Optimizer) -> None:
        """Take over a decision. The optimizer's groups are those of whole parameters."""
        self.decision = decision
        self.history.append((self.steps, decision.fractions))
        self.count_parameters(module, optimizer)

    def count_parameters(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Count the elements that there are, and that are trained: now, or at an earlier call, before some froze."""
        known = [p for p in module.parameters() if not isinstance(p, UninitializedParameter)]
        self._trained |= {name: p.numel() for name, p in selection.trained(module, optimizer).items()}
        self.n_parameters = sum(map(Tensor.numel, known)), sum(self._trained.values())

    # Public properties of the fronts -------------------------------------------------------------------------------

    def __repr__(self) -> str:
        """Return the progress in words."""
        if self.decision is None:
            return f"observing, {self.steps} optimizer steps"
        return f"frozen {self.decision.count:,} of {self.decision.n_eligible:,}"

    @property
    def phase(self) -> Literal["observing", "frozen"]:
        """The phase: "observing" until step t0 has been taken, then "frozen"."""
        return "observing" if self.decision is None else "frozen"

    @property
    def _latest(self) -> Decision | Observing | None:
        """The decision, or, before t0, the statistics for it."""
        return self.decision or self.observing

    @property
    def shards(self) -> Shards:
        """How the parameters lie on the processes."""
        return self._latest.shards if self._latest else Shards()

    @property
    def frozen(self) -> dict[str, Tensor]:
        """Copies of the masks, ``{name: bool (*p.shape)}``, True = held constant; DTensors where sharded."""
        frozen = self.decision.frozen if self.decision else {}
        return self.shards.wrapped({name: mask.clone() for name, mask in frozen.items()})

    @property
    def frozen_fraction(self) -> float:
        """Frozen elements / eligible elements; 0.0 before t0."""
        return self.decision.fraction if self.decision else 0.0

    @property
    def lr_factor(self) -> float | None:
        """What learning rates are multiplied by in the next step; None without `lr_after_freeze`."""
        factor = self._options.lr_after_freeze
        return factor if factor is None or self.frozen_fraction > 0.0 else 1.0

    @property
    def variance(self) -> dict[str, Tensor]:
        """A copy of the diagonal of C_t, from t0 on of the last decision, ``{name: (*p.shape)}``."""
        known = self._latest.variance if self._latest else {}
        return self.shards.wrapped({name: v.clone() for name, v in known.items()})

    @property
    def covariance(self) -> Tensor | None:
        """A copy of C_t, (p, p), if it is kept."""
        matrix = self._latest.matrix if self._latest else None
        return None if matrix is None else matrix.clone()

    def ranks(self, scores_now: Callable[[], Named]) -> dict[str, Tensor]:
        """Return the paper's I by the decision's scores, or, before t0, by the scores as they would be now.

        Args:
            scores_now: returns these; empty if nothing was observed yet.

        Raises:
            RuntimeError: the parameters are sharded: no process has all scores.
        """
        if self.shards.is_sharded:
            raise RuntimeError("`ranks` needs all scores on one process, but they are sharded. Use `frozen`.")
        scores = self.decision.scores if self.decision else scores_now()
        return selection.ranks(scores) if scores else {}

    def delta(self, module: nn.Module | None, file: str | Path | None) -> dict[str, Tensor]:
        """Return the live elements' positions and values, see `lightning_gcfreeze.delta`.

        Args:
            module: the module of the last run, if it is still there.
            file: where to save them as well, as safetensors.

        Raises:
            RuntimeError: nothing is frozen yet, there is no module, or its frozen elements have moved.
        """
        self._decided("delta")
        if module is None:
            raise RuntimeError(
                "The module of the last run is not known here: this is a copy, or the run took place in other processes"
                " (ddp_spawn, ddp_fork), or the module is gone. Use `lightning_gcfreeze.delta.of(module, frozen)`."
            )
        if moved := self.moved(module):
            raise RuntimeError(
                f"{shortened(moved)}: frozen elements have other values than they froze with, so the weights of"
                " step t0 and the live elements do not give this model. Averages of weights (EMA, SWA) and code that"
                " writes to parameters do this. Take the delta before, or average weights only from `t0` on."
            )
        found = delta.of(module, self.frozen)
        if file is not None:
            delta.save(found, file)
        return found

    def save_masks(self, file: str | Path) -> None:
        """Write the masks, whole ones. If parameters are sharded, all processes must call it; rank 0 writes.

        Raises:
            RuntimeError: nothing is frozen yet.
        """
        decision = self._decided("masks")
        masks.save_gathered(masks.save, decision.frozen, decision.shards, file)

    def save_order(self, file: str | Path) -> None:
        """Write the scores that the elements are ordered by; as `save_masks` does.

        Raises:
            RuntimeError: nothing is frozen yet, or the masks were given, so there are no scores.
        """
        decision = self._decided("order")
        if not decision.scores:
            raise RuntimeError("There is no order: the masks were given. Save them with `save_masks`.")
        masks.save_gathered(masks.save_order, decision.scores, decision.shards, file)

    def trainable_parameters(self) -> tuple[int, int]:
        """Return how many elements the optimizer trains, and how many the module has; (0, 0) if that is not known."""
        n_all, n_trained = self.n_parameters
        return (n_trained - (self.decision.count if self.decision else 0), n_all) if n_all else (0, 0)

    def report(self, title: str) -> reporting.Report:
        """Return what happened, what is frozen and what that saves.

        Args:
            title: of the report.
        """
        (live, n_all), (_, n_trained) = self.trainable_parameters(), self.n_parameters
        if self.decision:
            counts = (live, n_trained, n_all)
            return reporting.report(title, self.steps, self.decision, self.history, counts, self.savings)
        begun = f"Optimizer steps: {self.steps:,}" if self.steps or n_all else "No run has begun"
        begins = f", freezing begins after {self._next_step}" if self.plan.has_next_decision else ""
        return reporting.Report(title, (f"{begun}; nothing is frozen yet{begins}.",))

    def plot_frozen(self, ax: Any) -> Any:
        """Plot frozen fractions, layers x optimizer steps; see `reporting.plot_frozen`.

        Raises:
            RuntimeError: nothing is frozen yet.
            ImportError: matplotlib is not installed.
        """
        shapes = self._decided("plot").shapes
        return reporting.plot_frozen(reporting.history_by_layer(self.history, shapes, 32), self.steps, ax)

    def plot_mask(self, name: str, ax: Any) -> Any:
        """Plot the mask of a parameter; see `reporting.plot_mask`. With sharded parameters all processes must call it.

        Raises:
            RuntimeError: nothing is frozen yet.
            ValueError: there is no eligible parameter of that name.
            ImportError: matplotlib is not installed.
        """
        decision = self._decided("plot")
        if name not in decision.shapes:
            raise ValueError(f"No eligible parameter is called {closest(name, decision.shapes)}.")
        mask = whole(decision.shards.wrapped({name: decision.frozen[name]})[name])
        return reporting.plot_mask(mask.cpu().numpy(), name, ax)

    def _decided(self, what: str) -> Decision:
        if self.decision is None:
            begins = self._next_step if self.plan.has_next_decision else "training begins"
            raise RuntimeError(f"There is no {what} before {begins}: nothing is frozen yet.")
        return self.decision

    def unfinished(self) -> tuple[str | None, str | None]:
        """Return, at the end of training, a warning and a remark about decisions that did not come about."""
        if self.plan.has_next_decision:
            what = "Nothing was frozen" if self.plan.t0 is None else f"Only stage {self.plan.n_decisions} was reached"
            return (
                f"{what}: training ended after {self.steps} optimizer steps, before `t0={self._next_t0}`. Lower `t0` or"
                " train longer.",
                None,
            )
        if self.plan.growing and self.plan.masks_may_change:
            stage = round(self.plan.growing.fraction * 100)
            if self.plan.waits_for_forecast:
                return None, (
                    f"`k='auto'` froze {stage} %: by the forecast, more would have left the loss at the end too far"
                    " above that of the unfrozen run. Raise `max_loss_increase` of `Growth`, let it `monitor` a"
                    " validation loss, or pass a number."
                )
            return None, (
                f"`k='auto'` was not settled: training ended with stage {stage} % still being evaluated."
                " Train longer, validate more often, or make `every` of `Growth` smaller."
            )
        return None, None

    @property
    def _next_t0(self) -> float | str:
        """The step of the next decision, or, where it is not known yet, a fraction of the planned ones or "auto"."""
        t, _ = self.plan.decisions[self.plan.n_decisions]
        if isinstance(t, Settled) and not self.plan.settling:
            return "auto"
        return t if isinstance(t, float) else self.plan.next_deadline

    @property
    def _next_step(self) -> str:
        t = self._next_t0
        if isinstance(t, float):
            return f"{t:.4g} of the planned steps (`t0={t}`)"
        return f"step t0={t}" if isinstance(t, int) else "the order has settled (`t0='auto'`)"

    def metrics(self, names: Iterable[str], bytes_sent: int | None) -> dict[str, float]:
        """Return what there is to log now, by tag.

        Args:
            names: of the eligible parameters.
            bytes_sent: what this process passed to DDP's all-reduce in the step; None without DDP.
        """
        return reporting.scalars(
            self.decision.fractions if self.decision else dict.fromkeys(names, 0.0),
            self.frozen_fraction,
            self._latest.observed if self._latest else 0,
            self.savings.scalars() if self.savings else None,
            bytes_sent,
            self.plan.metrics,
            self.lr_factor,
            self.shapes,
            self._options.log_parameters,
        )

    # Constancy -----------------------------------------------------------------------------------------------------

    def remember_bits(self, parameters: Mapping[str, Tensor]) -> None:
        """Take the fingerprints of the frozen elements as they are now."""
        self.held_bits = fingerprints(parameters, self.decision.frozen if self.decision else {})

    def moved(self, module: nn.Module) -> list[str]:
        """Return the names of parameters whose frozen elements do not have the bits that they are held at."""
        parameters = sharded_parameters(module)
        frozen = self.decision.frozen if self.decision else {}
        now = fingerprints(parameters, {name: frozen[name] for name in self.held_bits if name in parameters})
        return [name for name, bits in now.items() if bits != self.held_bits[name]]

    # Checkpoints ---------------------------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes of the eligible parameters, whole ones, by name."""
        return self._latest.shapes if self._latest else {}

    def synchronize(self, shards: Shards) -> None:
        """Let all processes go on from the same statistics, by means over processes."""
        if self.observing:
            self.observing.synchronize()
            self.choice.synchronize(shards.world)
        self.plan.synchronize(shards.world)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors under parameter names, numbers and strings.

        Where parameters are sharded, tensors are whole, on the CPU of rank 0, and all processes must call.

        Keys: ``format`` int; ``begun`` bool, False before the first step of a first run; ``arguments`` {name: plain
        value}, of the arguments that decide what freezes; ``seed``, ``steps`` int; ``gradient_readers`` list of str;
        ``source`` see `SourceChoice`; ``observing`` see `Observing`, or None; ``decision`` see `Decision`, or None;
        ``plan`` see `Plan`; ``thaw_states`` see `ThawStates`; ``history`` [(step, {name: frozen fraction})];
        ``n_parameters`` (int, int).
        """
        return {
            "format": FORMAT,
            "begun": self._latest is not None,
            "arguments": self._options.decisive(),
            "seed": self.seed,
            "steps": self.steps,
            "gradient_readers": list(self.gradient_readers),
            "source": self.choice.state_dict(),
            "observing": self.observing and self.observing.state_dict(),
            "decision": self.decision and self.decision.state_dict(),
            "plan": self.plan.state_dict(),
            "thaw_states": self.thaw_states.state_dict(self.shards),
            "history": list(self.history),
            "n_parameters": self.n_parameters,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, here or in version 0.1.

        Raises:
            ValueError: an unknown format.
        """
        if (version := state.get("format")) not in (5, FORMAT):
            raise ValueError(
                f"The checkpoint's state has the format {version}, and this version reads 5 and {FORMAT}. Resume with"
                " the version of lightning_gcfreeze that wrote it."
            )
        state = from_format_5(state) if version == 5 else state
        if not state["begun"]:  # saved before training began, as LearningRateFinder does
            return
        self.loaded_arguments = state["arguments"]
        self.seed, self.steps = state["seed"], state["steps"]
        self.gradient_readers = list(state["gradient_readers"])
        self.choice.load_state_dict(state["source"])
        self.observing = state["observing"] and Observing.from_state_dict(state["observing"])
        self.decision = state["decision"] and Decision.from_state_dict(state["decision"])
        self.plan.load_state_dict(state["plan"])
        self.thaw_states.load_state_dict(state["thaw_states"])
        known = [(self.plan.last_step, self.decision.fractions)] if self.decision else []
        self.history = list(state.get("history", known))  # 0.1.0 had none
        self.n_parameters = state.get("n_parameters", self.n_parameters)

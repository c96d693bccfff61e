"""`Stages`: from statistics to held elements, stage by stage. No trainer is known here."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gcfreeze import masks, misconfiguration, orderings, refusals
from lightning_gcfreeze._computed import Computed
from lightning_gcfreeze._memory import give_back
from lightning_gcfreeze._names import shortened
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.counting import how_many, least_fraction, shortfalls
from lightning_gcfreeze.decision import Decision, decide, scores_now
from lightning_gcfreeze.distributed import Shards, local
from lightning_gcfreeze.freezing import Holder, LearningRates, WeightUses, worth_cutting
from lightning_gcfreeze.gradients import momentum
from lightning_gcfreeze.gradients.choice import SourceChoice
from lightning_gcfreeze.holding import plan_holding
from lightning_gcfreeze.observing import Observing
from lightning_gcfreeze.options import Options
from lightning_gcfreeze.planning.arguments import check_every
from lightning_gcfreeze.planning.settling import SAMPLE_SIZE, sampled
from lightning_gcfreeze.state import State
from lightning_gcfreeze.surroundings import Surroundings

_log = logging.getLogger(__name__)


class Stages:
    """Decide what to freeze, hold it, and change that from stage to stage, until `release`.

    Args:
        options: what to freeze, and how.
        state: what is known so far; the decision, the plan and the savings are written to it.
        around: the loop.
        parameters: the eligible parameters, by name.
        shards: how they lie on the processes.
        uses: counts at how many positions of a step's batch each weight is applied.
        seen_reading: returns the code that was seen to ask for gradients.
        trained: all parameters that the optimizer trained when the run began, by name.

    Raises:
        Surroundings.error: the ordering reads the optimizer's momentum, and this optimizer has none.
    """

    def __init__(
        self,
        options: Options,
        state: State,
        around: Surroundings,
        parameters: dict[str, Parameter],
        shards: Shards,
        uses: WeightUses,
        seen_reading: Callable[[], list[str]],
        trained: dict[str, Parameter],
    ) -> None:
        self._options, self._state, self._around, self._shards = options, state, around, shards
        self._parameters, self._trained, self._uses, self._seen_reading = parameters, trained, uses, seen_reading
        self.n_eligible = sum(p.numel() for p in parameters.values())
        self._group_of = momentum.group_indices(around.optimizer, parameters)  # before vectors take their places
        self._held_since = 0  # the optimizer step
        self._rates: LearningRates | None = None
        if options.lr_after_freeze is not None:
            around.refuse(refusals.unsupported_rates(around.optimizer))
            self._rates = LearningRates(around.optimizer)
        self.holder: Holder | None = None
        """Holds the frozen elements; None before t0."""
        self.others_write = False
        """Whether other code may write to weights between optimizer steps."""
        self.learns_uses = False
        """Whether the step to come has to tell how often it uses each weight: masks were given before any step."""
        self._from_optimizer = orderings.needed_from_optimizer(options.ordering)
        self._has_stepped = False  # in this run
        self._refuse_unreadable_state()
        state.count_parameters(around.module, around.optimizer)

    # Deciding ------------------------------------------------------------------------------------------------------

    def begin(self, reads_samples: bool) -> None:
        """Begin to observe, or with the masks that were given; or check that a loaded state is of such a run."""
        state, around, options = self._state, self._around, self._options
        if state.loaded_arguments is not None:
            saved, now = state.loaded_arguments, options.decisive()
            around.refuse(refusals.not_resumable(saved, now, state.shapes, self._parameters))
        elif options.masks is not None:
            shapes = {name: self._shards.shape(name, p) for name, p in self._parameters.items()}
            decision = Decision.given(self._given_masks(), shapes, self._shards)
            state.decide(decision, around.module, around.optimizer)
            around.inform(decision.sentence(state.steps))
        else:
            seed = torch.initial_seed() % 2**63 if options.seed is None else options.seed
            state.seed = around.world.broadcast_object(seed)
            state.observing = self.new_observing(reads_samples)
            state.choice = SourceChoice.initial(options.gradients, self._parameters)
        around.refuse(state.plan.start(around.planned_steps))
        check_every(options.every, state.plan.decisions)

    def check_masks(self, decision: Decision) -> None:
        """Refuse a loaded decision that is not that of the given masks."""
        if self._options.masks is not None and self._state.loaded_arguments is not None:
            given = self._given_masks()
            differing = [name for name, mask in decision.frozen.items() if not torch.equal(mask, given[name])]
            by_rank = self._around.world.all_gather_object(differing)  # all processes refuse together
            names = dict.fromkeys(name for found in by_rank for name in found)
            self._around.refuse(refusals.other_masks(list(names)))

    def _given_masks(self) -> dict[str, Tensor]:
        assert self._options.masks is not None
        return masks.resolve(self._options.masks, self._around.module, self._parameters, self._shards)

    def advance(self) -> bool:
        """Decide, grow or thaw, if it is time; return whether the masks changed. Right after each optimizer step."""
        state, before = self._state, self._state.decision
        state.plan.end_step(state.steps, self._around.world)
        is_first, self._has_stepped = not self._has_stepped, True
        if is_first and self.holder is None:  # else vectors have the state: a decision, without them, asks then
            self._refuse_unreadable_state()
        if state.observing and state.plan.is_decision_step(state.steps):
            if self._is_time(state.observing):
                self.release()  # so that the optimizer's state is that of whole parameters
                self._change(self._decide(state.observing))
        elif before:
            self._learn_uses(before)
            self._judge(before)
        if state.observing and state.plan.has_next_decision and state.steps == state.plan.halfway:
            self._begin_movement(state.observing)
        return state.decision is not before

    def new_observing(self, reads_samples: bool) -> Observing:
        """Return empty statistics of what the ordering reads."""
        options = self._options
        full = options.covariance == "full"
        needs = orderings.needed_by(options.ordering)
        observing = Observing(self.weights(), full, needs, self._shards, reads_samples)
        self._begin_movement(observing)
        return observing

    def _begin_movement(self, observing: Observing) -> None:
        if "movement" in self._from_optimizer:
            rates = momentum.learning_rates(self._around.optimizer, self._group_of)
            observing.begin_movement(self.weights(), rates)

    def weights(self) -> dict[str, Tensor]:
        """Return the eligible parameters themselves, of sharded ones the local parts."""
        return {name: local(p.detach()) for name, p in self._parameters.items()}

    def scores(self) -> Named:
        """Return the scores by what was observed so far; empty before the first observed step."""
        state, options = self._state, self._options
        observing, no_step_yet = state.observing, self._from_optimizer and not state.steps
        if observing is None or not observing.observed or no_step_yet:  # the first one is observed, but not taken yet
            return {}
        moments = self._moments(observing)
        return scores_now(observing, options.ordering, self.weights(), state.seed, options.granularity, moments)

    def _moments(self, observing: Observing) -> dict[str, Named]:
        """Read what the ordering wants of the optimizer, by field of `orderings.Evidence`."""
        if not self._from_optimizer:
            return {}
        self._refuse_unreadable_state()
        optimizer, found = self._around.optimizer, dict[str, Named]()
        read = momentum.moments(optimizer, self._parameters, self._from_optimizer)
        if "movement" in self._from_optimizer:
            rates = momentum.learning_rates(optimizer, self._group_of)
            found["movement"] = observing.movement(self.weights(), rates)
        return found | {field: getattr(read, field) for field in sorted(self._from_optimizer - found.keys())}

    def _refuse_unreadable_state(self) -> None:
        """Refuse an optimizer that does not keep what the ordering reads, where another decision is to come."""
        if self._from_optimizer and (self._state.observing or not self._has_stepped):
            around, mean = self._around, not self._from_optimizer.isdisjoint(("momentum", "update"))
            around.refuse(refusals.unreadable_momentum(around.optimizer, self._parameters, self._has_stepped, mean))

    def _count(self) -> int:
        return how_many(self._state.plan.k, self.n_eligible, self._parameters.values(), self._options, self._around)

    def _is_time(self, observing: Observing) -> bool:
        """Return whether to decide now. With ``t0="auto"`` the data say so, the same on all processes."""
        state, options, world = self._state, self._options, self._around.world
        if state.plan.settling is None:
            return True
        is_last = state.steps >= state.plan.next_deadline
        observed = int(world.all_reduce_min(torch.tensor(observing.observed)))
        if not observed:
            if not is_last:
                state.plan.settling.skip()
            return is_last
        weights, moments = self.weights(), self._moments(observing)
        scores = scores_now(observing, options.ordering, weights, state.seed, options.granularity, moments)
        check = state.plan.check_settled(
            sampled(scores, SAMPLE_SIZE, self._shards),
            sampled(observing.activity(weights, moments), SAMPLE_SIZE, self._shards) > 0,
            observed,
            least_fraction(state.plan.k, self._count(), self.n_eligible),
            world,
        )
        if check.settled or is_last:
            self._around.inform("order and loss have settled." if check.settled else "`t0='auto'` waits no longer.")
            _log.debug("At the last check %s.", check.sentence())
        return check.settled or is_last

    def _decide(self, observing: Observing) -> Decision:
        """Rank and mark, the same on all processes: their statistics are averaged first."""
        state, options, around = self._state, self._options, self._around
        if around.world.any(not observing.observed):
            since = "among the first" if state.plan.t0 is None else "since the last stage, until"
            raise RuntimeError(
                f"No step could be observed {since} `t0={state.steps}`: {observing.skipped} were left out because a"
                " gradient was not finite, there was no loss, or the batch had one sample; or because, with manual"
                " optimization, the optimizer that was stepped is not one that `self.optimizers()` returns."
            )
        observing.synchronize()
        if late := misconfiguration.late_parameters(around.module, around.optimizer, self._trained):
            around.warn(late)
        held = state.decision.frozen if state.decision else None
        keep = held if options.monotone else None
        state.plan.record_decision(state.steps, around.world)
        k, granularity = self._count(), options.granularity
        before = state.decision.uses_per_step if state.decision else {}  # of layers that are skipped by now, too
        uses, moments = {**before, **self._uses.uses_per_step}, self._moments(observing)
        costs = worth_cutting(self._parameters, uses)
        decision = decide(
            observing, options.ordering, self.weights(), state.seed, k, granularity, uses, keep, moments, held, costs,
            budget=state.plan.budget,
        )  # fmt: skip
        read, reads_samples = () if observing.reads_gradients else self._from_optimizer, observing.reads_samples
        observing.release()
        state.observing = self.new_observing(reads_samples) if state.plan.has_next_decision else None
        around.inform(decision.sentence(state.steps) + state.plan.remark)
        for doubt in decision.doubts(max(k, decision.count), state.plan.k, granularity, read):
            around.warn(doubt)
        return decision

    def _learn_uses(self, decision: Decision) -> None:
        """Skip, from the next step on, what masks that were given before any step allow to skip."""
        if self.learns_uses and self.holder:
            self.learns_uses = False
            decision.uses_per_step = self._uses.uses_per_step
            self.holder.learn_uses(decision.frozen, decision.uses_per_step)
            self._state.savings = self.holder.savings
            self._tell_savings()

    def _judge(self, decision: Decision) -> None:
        """Freeze the next stage, or thaw the last, where k grows."""
        state = self._state
        verdict = state.plan.judge_stage(state.steps, self._around.world)
        if verdict in ("keep", "stay"):
            state.thaw_states.forget()
            self._tell_savings()
        elif verdict in ("grow", "thaw"):
            self._change(decision.with_k(self._count(), self._options.granularity))
        if state.plan.growing and verdict != "wait":
            self._around.inform(
                f"after {state.steps} optimizer steps {state.plan.growing.sentence(verdict)}"
                f" {state.frozen_fraction:.1%} of the eligible elements are frozen."
            )

    def _tell_savings(self) -> None:
        if self._state.savings and not self._state.plan.may_change_soon:
            self._around.inform(self._state.savings.table())
            for sentence in shortfalls(self._options, self._state.savings):
                self._around.warn(sentence)

    # Holding -------------------------------------------------------------------------------------------------------

    def hold(self, decision: Decision, resumed: bool, in_trial: bool = False) -> None:
        """Hold the elements of a decision from now on at the values that they have.

        Args:
            decision: what is frozen.
            resumed: whether the optimizer's state already is that of a run with this decision.
            in_trial: whether a tuner tries steps that do not count.
        """
        state, around, options = self._state, self._around, self._options
        self.release()
        self.learns_uses = options.masks is not None and not state.steps and not in_trial
        plan, sends_live_only = plan_holding(
            options,
            around,
            self._parameters,
            self._seen_reading(),
            whole_gradients=(seen := state.observing) is not None and (seen.reads_gradients or not options.monotone),
            in_trial=in_trial,
        )
        if plan.mode == "compact" and not plan.late:  # which takes them away; the states are yet to be gathered
            for name, n_frozen in decision.n_frozen.items():
                if n_frozen:
                    self._parameters[name].grad = None
        self.holder = Holder(
            plan,
            around.optimizer,
            around.module,
            around.wrapper,
            self._parameters,
            decision.frozen,
            decision.uses_per_step,
            resumed,
            decision.n_frozen,
            self._uses.names if self.learns_uses else (),
        )
        self.others_write, self._held_since = plan.puts_back, state.steps
        state.remember_bits(self._parameters)
        state.savings = self.holder.savings
        if around.all_reduce and sends_live_only:
            around.all_reduce.leave_out({self._parameters[name]: mask for name, mask in decision.frozen.items()})
        give_back()

    def before_update(self, args: tuple[Any, ...], kwargs: dict[str, Any], is_nested: bool) -> Any:
        """Hand the live elements over, where that is done late, and multiply the learning rates.

        Args:
            args: arguments that a pre-hook of the optimizer's step receives.
            kwargs: keyword arguments that the hook receives.
            is_nested: whether this is the step of a parent class, within that of its child.

        Returns:
            What the hook has to return.
        """
        changed = self.holder.before_update(args, kwargs) if self.holder else None
        if self._rates is None or is_nested or (factor := self._state.lr_factor) is None:
            return changed
        self._around.refuse(refusals.unsupported_rates(self._around.optimizer))
        args, kwargs = changed or (args, kwargs)
        return self._rates.before_step(args, kwargs, factor) or changed

    def after_update(self, is_complete: bool = True) -> None:
        """Put the learning rates back.

        Args:
            is_complete: False after a step that may have raised.
        """
        if self._rates is not None and self._rates.restore_() and is_complete:
            self._around.refuse(refusals.unsupported_rates(self._around.optimizer, sets_them=True))

    def check_held(self) -> None:
        """Check the bits of frozen elements where nothing puts them back: at powers of two and at each epoch's end.

        Right after the optimizer's step, what others swap for a while (averages, for a validation) is in its place.

        Raises:
            RuntimeError: other code has written to them.
        """
        age = self._state.steps - self._held_since
        is_due = age & (age - 1) == 0 or self._around.is_last_batch()
        if self.holder is None or self.holder.puts_back or not is_due:
            return
        if moved := self._state.moved(self._around.module):
            raise RuntimeError(
                f"{shortened(moved)}: code that was not found has written to frozen elements between steps. Use"
                " `hold='restore'`, which puts them back after each step."
            )

    def keep_gradients_for(self, readers: list[str]) -> None:
        """Leave gradients in place from now on, if code was seen to look at them on any process. All must call it."""
        decision = self._state.decision
        if decision and self.holder and self.holder.takes_gradients and self._around.world.any(bool(readers)):
            self._around.warn(
                f"{shortened(readers) or 'code on another process'} looked at gradients, and found those of frozen"
                " elements missing: nothing had told that it would. From now on all gradients are computed, and stay in"
                " place until the optimizer steps. To have them from the first step on, pass"
                " `skip_frozen_gradients=False` and `hold='restore'`."
            )
            self.hold(decision, resumed=True)

    def release(self) -> None:
        """Leave the module, its communication hook and the optimizer as they were, but for the values."""
        if self.holder:
            self.holder.release()
            if self._around.all_reduce:
                self._around.all_reduce.leave_out({})
        self.holder = None

    def close(self) -> None:
        """Leave the learning rates as they were, too."""
        self.release()
        if self._rates is not None:
            self._rates.release()

    def _change(self, decision: Decision) -> None:
        """Hold what a new decision says, and nothing else."""
        state, around = self._state, self._around
        nothing = Computed(decision.frozen, lambda name, cut: torch.zeros_like(cut(decision.frozen[name])))
        before = state.decision.frozen if state.decision else nothing
        self.release()
        state.decide(decision, around.module, around.optimizer)
        if self._options.may_thaw:
            thawing = {name: mask & ~decision.frozen[name] for name, mask in before.items()}
            state.thaw_states.restore_to(around.optimizer, self._parameters, thawing)
            if state.plan.growth or not state.plan.masks_may_change:
                state.thaw_states.forget()  # where k grows, only the last stage may thaw
            if state.plan.masks_may_change:
                freezing = {name: mask & ~before[name] for name, mask in decision.frozen.items()}
                state.thaw_states.store(around.optimizer, self._parameters, freezing)
        self.hold(decision, resumed=False)
        around.publish(state.frozen_fraction)
        self._tell_savings()

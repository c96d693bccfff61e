"""`Run`: one training run of one optimizer, driven by events. No trainer is known here.

One optimizer step, t = 1, 2, …, as a loop tells of it:

    begin_batch           a batch comes: keep its first sample
    before_backward       its loss is there
    after_backward        while observing: fold (g_1, g_S) into C_t; once frozen: hand over the live elements' gradients
    before_step           zero the gradients of frozen elements, before they are clipped
    (the optimizer steps) in its hooks: count t; at t0 decide and freeze; write live elements, or frozen ones, back
    after_batch           put frozen values back, where other code may have written to them
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gcfreeze import _modules, _torch, misconfiguration, refusals, selection
from lightning_gcfreeze.delta.stream import Writer
from lightning_gcfreeze.distributed import Shards
from lightning_gcfreeze.estimators import FullCovariance
from lightning_gcfreeze.freezing import WeightUses
from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.gradients.source import SampleGradients
from lightning_gcfreeze.holding import refuse_compact
from lightning_gcfreeze.observing import Observing
from lightning_gcfreeze.options import Options
from lightning_gcfreeze.planning.budget import Budget
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.stages import Stages
from lightning_gcfreeze.state import State
from lightning_gcfreeze.surroundings import Surroundings
from lightning_gcfreeze.user_code import readers
from lightning_gcfreeze.user_code.watch import WATCHED_STEPS, GradientWatch

_FOLLOWED: WeakKeyDictionary[Optimizer, None] = WeakKeyDictionary()
"""Optimizers that a run follows: two runs would hold elements against each other."""


class Run:
    """Observe the steps of an optimizer, decide, and hold what froze, until `close`.

    Args:
        options: what to do.
        state: what is known so far, which the run goes on with and writes to.
        around: the loop that drives the run.

    Raises:
        ValueError: no parameter is eligible, or k exceeds their number.
        Surroundings.error: the module, the optimizer or the loop cannot be served.
    """

    def __init__(self, options: Options, state: State, around: Surroundings) -> None:
        self._options, self._state, self._around = options, state, around
        module, optimizer = around.module, around.optimizer
        around.refuse(refusals.unsupported_module(module, around.training_step, options.reads_samples))
        around.refuse(refusals.unsupported_optimizer(optimizer))
        if options.hold == "compact":
            refuse_compact(around)
        if options.reads_samples:
            around.refuse(refusals.unsupported_samples(module, options.n_samples))
        self.parameters = selection.eligible(module, optimizer, options.include, options.exclude)
        self.shards = Shards(self.parameters, around.world)
        self._uses = WeightUses(module, self.parameters)
        self._watch: GradientWatch | None = None
        trained = selection.trained(module, optimizer)
        seen, parts = self._seen_reading, (self.parameters, self.shards, self._uses)
        self.stages = Stages(options, state, around, *parts, seen, trained)
        for _, k in options.decisions:
            if not isinstance(k, Growth | Budget):
                selection.resolve_count(k, self.stages.n_eligible)
        full = options.covariance == "full"
        if self.shards.is_sharded:
            around.refuse(refusals.unsupported_with_shards(full))
        if full:
            FullCovariance({name: p.to("meta") for name, p in self.parameters.items()})  # refuses one that is too large
        self.source: SampleGradients | None = None
        if around.training_step is not None:
            world = around.world if self.shards.is_sharded else None
            self.source = SampleGradients(
                options.gradients, module, self.parameters, around.training_step, around.context, around.inform,
                state.choice, n_samples=options.n_samples, keep_each=full, world=world,
            )  # fmt: skip
        self._writer = Writer(options.stream, module, around.world, around.warn) if options.stream else None
        self.has_begun = False
        """Whether `begin` was called."""
        self._hooks: tuple[RemovableHandle, ...] = ()  # on the optimizer's step
        self._reads_samples = options.reads_samples
        self._in_trial = False  # a tuner's steps are being taken
        self._is_compiled = _modules.has_compiled(module)
        self._graph_was_checked = False
        self._micro_batches = self._n_evaluations = 0  # since the last optimizer step
        self._depth = 0  # of optimizer steps within the optimizer's step
        self._is_for_checkpoint = False  # the step at hand
        self._changed_in_batch = False  # the masks

    def begin(self) -> None:
        """Begin, or go on from a loaded state, which is complete by now."""
        around, optimizer = self._around, self._around.optimizer
        around.refuse(refusals.already_followed(optimizer, optimizer in _FOLLOWED))
        self.stages.begin(self._reads_samples)
        if not (isinstance(around.wrapper, DistributedDataParallel) or self.shards.is_sharded):  # DDP holds them itself
            around.readers.extend(readers.accumulator_holders(self.parameters))
        self.attach()
        _FOLLOWED[optimizer], self.has_begun = None, True
        hook = optimizer.register_step_pre_hook(self._before_optimizer_step)
        self._hooks = (hook, optimizer.register_step_post_hook(self._after_optimizer_step))
        self._publish()
        options, plan = self._options, self._state.plan
        around.warn_of(
            misconfiguration.before_the_first_step(
                [t for t, _ in plan.decisions[plan.n_decisions :] if isinstance(t, int)],
                around.planned_steps(),
                {"include": options.include, "exclude": options.exclude},
                [name for name, _ in around.module.named_parameters()],
                [k for _, k in options.decisions],
                self.stages.n_eligible,
            )
        )

    def attach(self) -> None:
        """Tie the state, which has just begun or was loaded, to the module and the optimizer."""
        state = self._state
        if state.loaded_arguments is not None:
            weights = self.stages.weights()
            for known in (state.observing, state.decision):
                if known is not None:
                    known.to(weights, self.shards)
            state.thaw_states.to(self.parameters, self.shards)
            if state.observing:
                self._reads_samples = state.observing.reads_samples  # of version 0.1, it may differ from the options
        self._in_trial = False
        if self.source:
            self.source.reset()
            self.source.choice = state.choice
        if state.decision:
            self.shards.check_agreement(state.decision.frozen)
            self.stages.check_masks(state.decision)
            self.stages.hold(state.decision, resumed=state.loaded_arguments is not None)
        self._around.publish(state.frozen_fraction)

    # Events, in the order of a step --------------------------------------------------------------------------------

    def begin_batch(self, batch: object, batch_idx: int, is_first: bool) -> None:
        """Keep what will be needed of a batch, before the loss is computed and the batch can be changed in place.

        Args:
            batch: the batch to come.
            batch_idx: its number in the epoch.
            is_first: whether it is the first since the last optimizer step, whose gradients are, or will be, zero.
        """
        state = self._state
        self._n_evaluations = self._depth = 0
        self.stages.after_update(is_complete=False)
        if self._in_trial:  # that was not taken back
            self.attach()
        if is_first:
            self._begin_step()
        if state.plan.is_decision_step(state.steps + 1) or self.stages.learns_uses:
            self._uses.listen()
        if self.source and state.observing and self._reads_samples and (self._is_due or state.steps == 0):
            self.source.begin_batch(batch, batch_idx)

    def zero_grad(self) -> None:
        """Let go of gradients that the optimizer does not know of, when it zeroes its own."""
        if self._around.all_reduce:
            self._around.all_reduce.begin_step()
        if self.stages.holder:
            self.stages.holder.begin_step()

    def before_backward(self, loss: Tensor, n_micro_batches: float | None = 1) -> None:
        """Take in the loss of a batch, right before its backward pass.

        Args:
            loss: 0-dim.
            n_micro_batches: what the mean loss was divided by, apart from the loss scale; None: `loss` is the mean.
        """
        state, options = self._state, self._options
        if state.plan.needs_loss(state.steps + 1):
            to_mean = 1.0 if n_micro_batches is None else n_micro_batches / self._around.loss_scale()
            state.plan.record_loss(loss.detach() * to_mean, state.steps + 1)
        self._uses.stop()
        if state.observing:
            needs_graph = options.gradients == "capture" if self._reads_samples else options.skip_frozen_gradients
            if needs_graph and not self._graph_was_checked:
                self._around.refuse(refusals.unsupported_graph(loss))
            self._graph_was_checked = True
            if self.source:
                self.source.begin_backward()
        if self.stages.holder:
            self.stages.holder.begin_backward(loss)

    def after_backward(
        self,
        is_last: bool,
        n_micro_batches: int = 1,
        weights: Sequence[float | Tensor] | None = None,
        share: float | Tensor | None = None,
    ) -> None:
        """Observe a step, or take the live elements' gradients. After each backward pass.

        Args:
            is_last: whether the optimizer steps next: ``p.grad`` is g_S, times the loss scale.
            n_micro_batches: what each mean loss was divided by, the micro-batches of a full step.
            weights: in place of that and of the loss scale, what the mean loss of each micro-batch was multiplied by.
            share: their sum, if it is not that of this process.
        """
        if self.stages.holder and is_last:
            self.stages.holder.after_backward()
        self._micro_batches += 1
        if (observing := self._state.observing) is None:
            return
        has_batch = bool(self.source and self.source.end_backward()) or not self._reads_samples
        if has_batch and is_last:
            self._observe(observing, n_micro_batches, weights, share)

    def gradients_are_ready(self) -> None:
        """Observe a step right before the optimizer takes it, in a loop that does not tell of its backward passes."""
        self._uses.stop()
        self.after_backward(is_last=True, weights=[1.0])

    def before_step(self, may_be_skipped: bool = False) -> None:
        """Zero the gradients of frozen elements, after averaging and unscaling, before clipping.

        Args:
            may_be_skipped: whether a loss scaler may leave the optimizer's step out.
        """
        if not may_be_skipped:
            self._n_evaluations += 1
            if self._n_evaluations > 1:
                self._around.refuse(refusals.several_evaluations(self._around.optimizer))
        if self.stages.holder:
            self.stages.holder.before_step()

    def check_step_was_seen(self) -> None:
        """Refuse an optimizer whose hooks did not run, in a loop that always steps after `before_step`."""
        if self._n_evaluations:
            self._around.refuse(refusals.no_step_hooks(self._around.optimizer))

    def after_batch(self) -> None:
        """Put frozen values back where others may have written to them since the optimizer's step."""
        stages, self._changed_in_batch, first = self.stages, False, self._changed_in_batch
        if stages.holder and stages.others_write:
            stages.holder.after_batch(first)
            if first:
                self._state.remember_bits(self.parameters)
        self._publish()

    def record_validation_loss(self, loss: float) -> None:
        """Take in a validation's loss on this process; the mean over processes counts."""
        losses = self.shards.world.all_gather_object(loss)
        self._state.plan.record_validation_loss(sum(losses) / len(losses), self._state.steps)

    def synchronize(self) -> None:
        """Let all processes go on from the same statistics."""
        self._state.synchronize(self.shards)

    def end(self) -> None:
        """Share and publish what there is at the end of training."""
        self._state.count_parameters(self._around.module, self._around.optimizer)  # some may have begun to train
        if self.has_begun:
            self.synchronize()
            self._publish(is_last=True)

    def close(self) -> None:
        """Leave the module and the optimizer as they were, but for the values."""
        if self.source:
            self.source.reset()
        self._uses.stop()
        if self._watch is not None:
            self._watch.disarm()
        self.stages.close()
        for hook in self._hooks:
            hook.remove()
        if self.has_begun:
            _FOLLOWED.pop(self._around.optimizer, None)

    def take_metrics(self) -> dict[str, float]:
        """Return what there is to log now, by tag; what the plan has found since the last call is returned once."""
        sent = self._around.all_reduce.bytes_sent if self._around.all_reduce else None
        found, self._state.plan.metrics = self._state.metrics(self.parameters, sent), {}
        return found

    def _publish(self, is_last: bool = False) -> None:
        if self._writer and (state := self._state).decision:
            self._writer.record(state.decision, lambda: state.frozen, state.steps, is_last)

    # Observing -----------------------------------------------------------------------------------------------------

    @property
    def _is_due(self) -> bool:
        """Whether the optimizer step to come is to be observed."""
        return (self._state.steps + 1) % self._options.every == 0

    def _seen_reading(self) -> list[str]:
        return [*self._state.gradient_readers, *(self._watch.seen if self._watch else ())]

    def _begin_step(self) -> None:
        if self.source:
            self.source.reset()
        self._uses.clear()
        self._micro_batches = 0
        self._watch_gradients()
        # Between our two hooks on the step lies what the optimizer does, and no hook of anybody else.
        for hook, last in zip(self._hooks, (True, False), strict=False):
            if (hooks := hook.hooks_dict_ref()) is not None:
                hooks.move_to_end(hook.id, last=last)

    def _observe(self, observing: Observing, n_micro_batches: int, weights: Any, share: Any) -> None:
        state, source, size = self._state, self.source, None
        if self._reads_samples and source and source.batch_size is not None:
            size = source.batch_size * self._around.n_replicas
        if state.steps == 0:  # at a later step it is a short last batch
            self._around.refuse(refusals.single_sample(size))
            self._around.refuse(refusals.no_gradients(self.parameters))
        step = state.steps + 1
        if not (self._is_due and observing.wants(step)):
            return
        if weights is None:  # each was divided by the micro-batches of a full step, also in an epoch's short last one
            loss_scale = self._around.loss_scale()
            scale, share = loss_scale / n_micro_batches, self._micro_batches / n_micro_batches * loss_scale
        else:
            scale, share = float(weights[0]), float(sum(weights) if share is None else share)
        g_batch = batch_gradients(self.parameters if observing.reads_gradients else {}, share)
        gain = self._options.gain
        if not self._reads_samples:
            observing.observe(step, {}, g_batch, gain)
            return
        found = source.gradients(scale, g_batch, size) if source and size != 1 else None
        if found is None:
            observing.leave_out(step)
        else:
            observing.observe(step, found.by_name, g_batch, gain, size, found.mean_is_g_batch)

    def _watch_gradients(self) -> None:
        """Note who asks for gradients in a few steps, each until the next step begins."""
        state = self._state
        if self._watch is not None:
            self._watch.disarm()
            seen = [name for name in self._watch.seen if name not in state.gradient_readers]
            state.gradient_readers += seen
            self._watch = None
            self.stages.keep_gradients_for(seen)
        watches = self._around.watches_gradients and bool(state.observing or self._options.masks is not None)
        if watches and state.steps + 1 in WATCHED_STEPS and not self._is_compiled:
            self._watch = GradientWatch(self.parameters.values())
            self._watch.arm()

    # Hooks on the optimizer's step ---------------------------------------------------------------------------------

    def _before_optimizer_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare the optimizer's update, see `Stages`. Without a loss scaler, runs before the forward pass."""
        self._depth += 1
        if self._depth == 1:
            self._is_for_checkpoint = not optimizer.state and _torch.is_step_for_checkpoint()
        if self._is_for_checkpoint:
            return None
        if not self._in_trial and self._around.in_trial():
            self._in_trial = True
            if self.source:
                self.source.reset()
            self._uses.stop()
            if self._state.decision:
                self.stages.hold(self._state.decision, resumed=True, in_trial=True)
        return self.stages.before_update(args, kwargs, is_nested=self._depth > 1)

    def _after_optimizer_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Count the step; freeze at t0; put frozen values back. Runs right after the parameters have moved.

        It does not run on a step that a loss scaler leaves out, except with a fused optimizer, which leaves the step
        out itself when ``found_inf`` says so.
        """
        state = self._state
        self._depth -= 1
        if self._depth > 0 or self._is_for_checkpoint:  # the step of a parent class within that of its child
            return
        self._n_evaluations = 0
        self.stages.after_update()
        found_inf = getattr(optimizer, "found_inf", None)
        if self._in_trial or (found_inf is not None and bool(found_inf)):  # the step does not count
            if self.stages.holder:
                self.stages.holder.after_step()
            return
        if self.source:
            self.source.reset()
        state.steps += 1
        if (observing := state.observing) and state.steps % self._options.every == 0:
            observing.close_step(state.steps)
        if self.stages.holder:
            self.stages.check_held()
            self.stages.holder.after_step()
        self._changed_in_batch |= self.stages.advance()
        if state.observing is None and observing and self.source:
            self.source.close()

"""Planted faults: does the test suite notice when the package is wrong?

    uv run python -m tests.mutations
    uv run python -m tests.mutations --only "the freeze comes one step late"

Each fault is a mistake that somebody could have made, in one line of the package: a comparison the wrong way round, a
factor upside down, a case left out. It is planted in a fresh copy of the working tree, and the few tests that should
prevent it are run on the copy. They have to fail; a fault that survives them is a blind spot. First, the same tests
have to pass on a copy without a fault, or their failing would mean nothing.

Each run is a fork of this process, which has imported torch and Lightning but neither the package nor its tests: a
fault takes seconds. The operating system has to be able to fork.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple, NoReturn

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_gcfreeze"
PASSED, FAILED, NOT_RUN = 0, 1, 3  # pytest's exit statuses; with any other one the tests could not be run
PRELOADED = ("torch._dynamo", "torch.distributed.fsdp", "lightning.pytorch", "hypothesis.extra.numpy", "pytest")


class Fault(NamedTuple):
    """One line that is wrong."""

    name: str  # what goes wrong: a subject, and what it wrongly does
    file: str  # in the package
    old: str  # found exactly once in the file
    new: str
    tests: list[str]  # node ids in the folder of tests, of which at least one has to fail


OBSERVING, STAGES, FREEZER = "callback/test_observing.py::", "callback/test_stages.py::", "test_freezer.py::"

LIVE_SHARDS, MIXED = "freezing/test_live_shards.py::", "selection/test_mixed.py::"

# fmt: off
FAULTS = [
    # A run: steps, losses, stages ----------------------------------------------------------------------------------
    Fault("the optimizer step that a loss scaler skipped is counted", "run.py",
          'getattr(optimizer, "found_inf", None)', 'getattr(optimizer, "_found_inf", None)',
          ["callback/test_scaler.py::test_step_that_overflows_is_neither_counted_nor_observed"
           "[Adam fused-at t0-auto-at once]"]),
    Fault("the gradient of a short accumulation window is scaled the wrong way", "run.py",
          "self._micro_batches / n_micro_batches * loss_scale", "n_micro_batches / self._micro_batches * loss_scale",
          [OBSERVING + "test_accumulated_micro_batches_make_one_step_of_the_recursion[replay]"]),
    Fault("the recorded loss is multiplied by the loss scale, not divided", "run.py",
          "n_micro_batches / self._around.loss_scale()", "n_micro_batches * self._around.loss_scale()",
          ["callback/test_scaler.py::test_recorded_loss_does_not_depend_on_the_loss_scale"]),
    Fault("the step after each n-th is observed", "run.py",
          "(self._state.steps + 1) % self._options.every == 0", "self._state.steps % self._options.every == 0",
          [OBSERVING + "test_every_nth_step_is_observed"]),
    Fault("the freeze comes one step late", "stages.py",
          "is_decision_step(state.steps):", "is_decision_step(state.steps - 1):",
          [OBSERVING + "test_k_lowest_elements_freeze_after_step_t0"]),
    Fault("each process decides by its own statistics", "stages.py",
          "observing.synchronize()", "observing.resolve_pending()",
          ["test_synchronizing.py::test_decision_is_made_by_the_statistics_of_all_processes"]),
    Fault("newly frozen elements are taken for thawed ones", "stages.py",
          "mask & ~before[name] for", "before[name] & ~mask for",
          [STAGES + "test_thawed_elements_have_the_optimizer_state_of_their_freeze"]),
    Fault("states of frozen elements are kept after the last stage", "stages.py",
          "if state.plan.growth or not", "if state.plan.growth and not",
          [STAGES + "test_thawed_elements_have_the_optimizer_state_of_their_freeze"]),
    Fault("an unsettled order may freeze later than `max_t0`", "stages.py",
          "is_last = state.steps >= state.plan.next_deadline", "is_last = state.steps > state.plan.next_deadline",
          [STAGES + "test_order_that_does_not_settle_freezes_at_max_t0"]),
    # Statistics and decisions --------------------------------------------------------------------------------------
    Fault("a step without a loss is not counted as skipped", "observing.py",
          "max(self._tried_step, self._observed_step) < step", "max(self._tried_step, self._observed_step) > step",
          [OBSERVING + "test_step_without_a_loss_is_skipped"]),
    Fault("the largest of the processes' counts of observed steps is used", "observing.py",
          "int(world.all_reduce_min(torch.tensor(self._observed)))",
          "-int(world.all_reduce_min(torch.tensor(-self._observed)))",
          ["test_observing.py::test_synchronized_statistics_are_the_mean_over_processes"]),
    Fault("a step that turns out not to be finite decays the statistics", "observing.py",
          "self._scale = self._scale_if_skipped", "self._scale_if_skipped = self._scale",
          ["test_observing.py::test_outcome_is_the_same_where_the_device_is_asked_a_step_later"]),
    Fault("frozen elements are the last in the order of the next stage", "decision.py",
          "masked_fill(keep[name], -math.inf)", "masked_fill(keep[name], math.inf)",
          [STAGES + "test_monotone_schedule_keeps_what_the_order_would_thaw"]),
    Fault("scores share the memory of weights that go on training", "decision.py",
          "score.clone() if _torch.has_same_memory(w, score) else score", "score",
          ["test_decision.py::test_scores_that_are_the_weights_stay_as_they_were_when_the_weights_move"]),
    Fault("evidence that was kept has the weights of a later step", "decision.py",
          "                named.close()", "                pass",
          ["test_decision.py::test_evidence_that_was_kept_is_an_error_and_a_copy_is_not"]),
    Fault("the last rows of a large tensor are not scored", "_computed.py",
          "range(0, len(tensor), height)", "range(0, len(tensor) - height, height)",
          ["test_decision.py::test_scores_in_pieces_are_those_of_the_whole"]),
    Fault("the gradients of a scaled step are in memory at once", "observing.py",
          "chain(batch, others)", "(*batch, *others)",
          ["test_memory.py::test_gradient_of_a_step_is_scaled_tensor_by_tensor"]),
    Fault("weights that a replayed step wrote to are not put back", "gradients/isolation.py",
          "if not _torch.has_same_memory(p, values):", "if _torch.has_same_memory(p, values):",
          ["gradients/test_isolation.py"]),
    Fault("gradients that were taken stay in memory", "gradients/replay.py",
          "    return gradient.new_zeros(()).expand_as(gradient)", "    return gradient",
          ["test_memory.py::test_replayed_gradients_are_not_in_memory_at_once_where_they_are_taken"]),
    Fault("the last elements of a mask are packed away", "_masks.py",
          "(len(flat) + 7) // 8", "len(flat) // 8 + 1", ["test_masks.py"]),
    Fault("tensors overlap in the file", "_aside.py",
          "offset += tensor.nbytes", "offset += tensor.numel()", ["test_aside.py"]),
    # The state, and the fronts -------------------------------------------------------------------------------------
    Fault("a run resumed after the freeze counts from t0 again", "state.py",
          'self.seed, self.steps = state["seed"], state["steps"]',
          'self.seed, self.steps = state["seed"], (state["decision"] or {"observed": state["steps"]})["observed"]',
          ["callback/test_resume.py::test_run_resumed_at_any_step_equals_the_unbroken_run[12]"]),
    Fault("statistics between two stages of format 5 are dropped", "_format_5.py",
          'else (state["again"], state)', "else (None, state)", ["test_state.py"]),
    Fault("the variance of another order of format 5 is replaced by the scores", "_format_5.py",
          'None if decision["by_variance"] else', 'None if "by_variance" in decision else', ["test_state.py"]),
    Fault("frozen elements that were written to are not found", "state.py",
          "for name in self.held_bits if name in parameters", "for name in self.held_bits if name not in parameters",
          ["test_misconfiguration.py::test_a_frozen_value_that_somebody_wrote_is_noticed_and_a_live_one_is_not"]),
    Fault("statistics stay those of each process at the end of training", "run.py",
          "            self.synchronize()\n            self._publish(", "            self._publish(",
          ["test_synchronizing.py::test_statistics_are_those_of_all_processes_after_training[callback]"]),
    Fault("under manual optimization steps of other optimizers are observed", "callback.py",
          "if self._run and _lightning.is_optimizer(optimizer, trainer, self.optimizer or 0):", "if self._run:",
          ["callback/test_manual_optimization.py::test_second_moment_observed_at_each_step_is_that_of_a_loop"]),
    Fault("Freezer observes accumulated gradients one micro-batch late", "freezer.py",
          "self._micro_batches >= self._accumulate if", "self._micro_batches > self._accumulate if",
          [FREEZER + "test_freezer_with_accumulation_and_clipping_gives_the_callbacks_bits"]),
    Fault("Freezer lets an optimizer evaluate the loss several times in a step", "freezer.py",
          "may_be_skipped=self._scaler is not None", "may_be_skipped=True",
          [FREEZER + "test_optimizer_that_evaluates_the_loss_twice_in_a_step_is_refused"]),
    Fault("statistics of a closed Freezer are those of one process", "freezer.py",
          "                self._run.end()\n            finally:", "                pass\n            finally:",
          ["test_synchronizing.py::test_statistics_are_those_of_all_processes_after_training[Freezer]"]),
    Fault("the number of targets of a micro-batch does not weigh its gradient", "huggingface/callback.py",
          "append(gradient * share)", "append(gradient)",
          ["huggingface/test_training.py::test_second_moment_is_that_of_the_mean_gradients_of_all_targets_of_each_step"]),
    # The optimizer's momentum --------------------------------------------------------------------------------------
    Fault("one group's hyper-parameters correct all", "gradients/momentum.py",
          "groups.get(p, optimizer.defaults)", "optimizer.param_groups[0]",
          ["gradients/test_momentum.py::test_moments_of_groups_are_by_their_own_hyperparameters"]),
    Fault("the second moment of an optimizer is not corrected for its bias", "gradients/momentum.py",
          "(squares / corrections[1])", "squares.clone()",
          ["gradients/test_momentum.py::test_moments_are_those_of_the_recorded_gradients[Adam]"]),
    Fault("the largest second moment of amsgrad is not used", "gradients/momentum.py",
          'found.get("max_exp_avg_sq", found.get("exp_avg_sq"))', 'found.get("exp_avg_sq")',
          ["gradients/test_momentum.py::test_moments_are_those_of_the_recorded_gradients[amsgrad]"]),
    Fault("the buffer of RMSprop is taken for a mean of gradients", "gradients/momentum.py",
          "return _with_epsilon(squares.sqrt(), eps).mul_(share)", "return torch.full_like(zeros, share)",
          ["gradients/test_momentum.py::test_moments_are_those_of_the_recorded_gradients[RMSprop]"]),
    Fault("narrow states are rooted and divided as they are", "gradients/momentum.py",
          "value.to(torch.promote_types(value.dtype, torch.float32), copy=True)", "value.clone()",
          ["gradients/test_momentum.py::test_moments_are_float32_or_wider"]),
    Fault("a buffer that is no longer used is read", "gradients/momentum.py",
          'if float(group["momentum"]) == 0 else None', 'if not (optimizer.state or group["momentum"]) else None',
          ["gradients/test_momentum.py::test_momentum_that_was_switched_off_is_refused"]),
    Fault("a subclass of Adam is taken for Adam", "refusals/optimizers.py",
          "    if kind not in ELEMENTWISE:\n        why =", "    if not {*kind.__mro__} & ELEMENTWISE:\n        why =",
          ["callback/test_momentum.py::test_optimizer_without_a_known_mean_is_refused_before_or_at_its_first_step"]),
    Fault("an optimizer without any state is not refused at its first step", "refusals/optimizers.py",
          "elif has_stepped and not", "elif not has_stepped and not",
          ["callback/test_momentum.py::test_optimizer_without_a_known_mean_is_refused_before_or_at_its_first_step"]),
    Fault("frozen elements are counted as without gradients at the next stage", "observing.py",
          "return found if held is None else", "return found if held is held else",
          ["callback/test_momentum.py::test_frozen_elements_are_the_lowest_at_the_next_stage"
           "_and_not_counted_as_without_gradients"]),
    Fault("there are ranks by the momentum before the first step", "stages.py",
          "self._from_optimizer and not state.steps", "self._from_optimizer and state.steps",
          ["callback/test_momentum.py::test_ranks_while_observing_are_empty_before_the_first_step"
           "_and_known_from_then_on[element]"]),
    Fault("the noise of a momentum is that of all observed steps", "estimators/gains.py",
          "return (1 - _MOMENTUM**every) / (1 - _MOMENTUM ** (every * t))", "return 1 / t",
          ["estimators/test_gains.py::test_gain_of_a_momentum_gives_the_weights_of_a_mean_with_corrected_bias"]),
    Fault("gradients are observed for an order that reads the optimizer's state", "orderings.py",
          '@needs("momentum", "update", variance=False)', '@needs("momentum", "update", "mean", variance=False)',
          ["callback/test_momentum.py::test_nothing_is_computed_or_kept_before_t0"]),
    # The way since halfway -----------------------------------------------------------------------------------------
    Fault("the way is counted from a third of t0 on", "planning/plan.py",
          "return (before + t) // 2", "return (before + t) // 3",
          ["callback/test_movement.py::test_masks_are_those_of_the_way_since_halfway_to_t0[7-SGD]"]),
    Fault("the way of a slowly growing check is counted from long ago", "planning/settling.py",
          "int(self.next_check / min(1.5, self.settled.growth) + 1e-9)", "2 * self.next_check // 3",
          ["callback/test_movement.py::test_settled_t0_at_another_growth_counts_no_way_of_long_ago[1.25-13-10]"]),
    Fault("the way is not in units of the learning rate", "observing.py",
          "(rate + self.halfway_rates[name]) / 2 or 1.0", "1.0",
          ["callback/test_movement.py::test_rates_that_differ_from_group_to_group_do_not_order"]),
    Fault("only the rate at t0 counts", "observing.py",
          "(rate + self.halfway_rates[name]) / 2 or 1.0", "rate",
          ["callback/test_movement.py::test_own_orders_may_read_the_way"]),
    Fault("the weights halfway are not resumed", "observing.py",
          "observing.halfway = halfway and _cloned(halfway)", "observing.halfway = None",
          ["callback/test_movement.py::test_resumed_run_equals_the_unbroken_one[6]"]),
    Fault("what decay moved is taken for a way that gradients made", "gradients/momentum.py",
          "return torch.where(root == 0, root, root + eps)", "return root + eps",
          ["callback/test_movement.py::test_elements_without_a_gradient_come_first_and_are_counted"]),
    # When and how much ---------------------------------------------------------------------------------------------
    Fault("the loss before the freeze is a mean over one step too many", "planning/plan.py",
          "self.next_deadline - self._averaged_steps", "self.next_deadline - 1 - self._averaged_steps",
          ["planning/test_plan.py::test_reference_with_a_given_t0_is_the_loss_of_the_last_tenth_before_it"]),
    Fault("a loss that is only noise counts as settled", "planning/settling.py",
          "improvement + improvement_noise <=", "improvement - improvement_noise <=",
          ["planning/test_settling.py::test_loss_settles_only_if_it_neither_falls_nor_hides_a_fall_in_noise"]),
    Fault("a stage thaws after a single loss that is too high", "planning/growing.py",
          "self._n_too_high >= 2", "self._n_too_high >= 1",
          ["planning/test_growing.py::test_single_loss_that_is_too_high_does_not_thaw"]),
    Fault("what earlier stages forgo is forgotten", "planning/growing.py",
          "forgone = self.forgone + (shares", "forgone = (shares",
          ["planning/test_plan.py::test_stages_come_once_what_they_forgo_of_a_falling_loss_is_allowed"]),
    Fault("the forecast looks past the end of training", "planning/trend.py",
          "math.log(planned_steps / step)", "math.log(1 + planned_steps / step)",
          ["planning/test_trend.py::test_loss_that_is_straight_in_log_t_is_followed_to_the_end"]),
    Fault("a loss while waiting replaces the lowest", "planning/growing.py",
          "min(self.reference, loss) if self.reference.n else loss", "loss",
          ["planning/test_plan.py::test_loss_while_waiting_does_not_raise_the_reference"]),
    Fault("a resumed run asks live vectors for the state of parameters", "stages.py",
          "if is_first and self.holder is None:", "if is_first:",
          [STAGES + "test_run_resumed_at_any_step_equals_the_unbroken_run[compact everywhere-auto]"]),
    Fault("stages hold all gradients whatever the order reads", "stages.py",
          "is not None and (seen.reads_gradients or not options.monotone)", "is not None",
          [STAGES + "test_stages_of_a_schedule_are_compact_where_the_order_reads_no_gradients"]),
    Fault("random elements of a seed are those of another", "masks/selections.py",
          "torch.Generator().manual_seed(seed)", "torch.Generator().manual_seed(0)",
          ["masks/test_selections.py::test_random_elements_are_spread_evenly_and_differ_from_seed_to_seed"]),
    Fault("the standard error is computed with n in place of n - 1", "planning/losses.py",
          "squares / (n - 1) / n", "squares / n / n",
          ["planning/test_losses.py::test_mean_and_standard_error_are_those_of_numpy"]),
    Fault("two stages of a schedule may have the same step", "planning/schedule.py",
          "if later <= t:", "if later < t:",
          ["planning/test_schedule.py::test_stages_that_are_no_schedule_are_refused"]),
    # Per-sample gradients ------------------------------------------------------------------------------------------
    Fault("captured gradients are compared with replayed ones at the first attempt only", "gradients/comparison.py",
          "attempt & (attempt - 1) == 0", "attempt == 1",
          ["gradients/test_comparison.py::test_mean_over_tokens_is_replayed_once_there_is_padding"]),
    Fault("noise summed in the backward pass is corrected by the variance's factor", "gradients/source.py",
          "finite_batch_correction(size, batch_size) ** 0.5", "finite_batch_correction(size, batch_size)",
          ["gradients/test_capture.py::test_noise_summed_in_backward_is_around_the_mean_of_its_micro_batch"]),
    Fault("noise is summed in the backward pass where a gradient was there before", "gradients/capture.py",
          "if self._parameters[name].grad is None}", "if self._parameters[name].grad is not None}",
          [OBSERVING + "test_large_layers_are_summed_within_the_backward_pass"]),
    Fault("the size of accumulated batches is that of the last one", "gradients/window.py",
          "self.batch_size += other.batch_size", "self.batch_size = other.batch_size",
          [OBSERVING + "test_accumulated_micro_batches_make_one_step_of_the_recursion[replay]"]),
    Fault("a dilated convolution has one window too few", "gradients/layer_rules.py",
          "(n - dilation * (kernel - 1) - 1) // stride + 1", "(n - dilation * kernel) // stride + 1",
          ["gradients/test_layer_rules.py::test_convolution_of_any_geometry"]),
    Fault("a tensor of length 1 sets the size of the batch", "gradients/slicing.py",
          "max(sizes.values(), default=0)", "min(sizes.values(), default=0)",
          ["gradients/test_slicing.py::test_tensor_of_length_one_is_kept_for_every_sample"]),
    Fault("a replay changes the state of Python's random stream", "gradients/isolation.py",
          "random.setstate(python_state)", "random.getstate()",
          [OBSERVING + "test_observing_leaves_all_state_bit_identical"]),
    # The arithmetic of the noise -----------------------------------------------------------------------------------
    Fault("products of two different positions are counted once", "estimators/outer_products.py",
          "by_output[:, positions:] *= 2", "by_output[:, positions:] *= 1",
          ["estimators/test_per_sample.py::test_squared_noise_equals_a_loop_for_any_chunk_size"]),
    Fault("the noise of a short batch is rescaled the wrong way", "estimators/base.py",
          "(1.0 - 1.0 / reference) / (1.0 - 1.0 / batch_size)", "(1.0 - 1.0 / batch_size) / (1.0 - 1.0 / reference)",
          ["estimators/test_estimators.py::test_correction_puts_batches_of_any_size_on_one_scale"]),
    Fault("a sum that takes over its scale takes that of the step before", "estimators/base.py",
          "tensor.mul_(after)", "tensor.mul_(scale)", ["estimators/test_estimators.py", "test_observing.py"]),
    Fault("the recent mean forgets too slowly", "estimators/gains.py",
          "5 / (t + 4)", "5 / (t + 5)",
          ["estimators/test_estimators.py::test_recent_mean_with_one_over_t_has_weights_of_the_fourth_power"]),
    Fault("progress is divided by the second moment, not its root", "orderings.py",
          "_ratio(m.square(), second[name].sqrt())", "_ratio(m.square(), second[name])",
          ["test_orderings.py::test_named_ordering_gives_the_scores_of_numpy_and_does_not_modify_evidence"]),
    # Which elements freeze -----------------------------------------------------------------------------------------
    Fault("rows that fill k exactly are not frozen", "selection/lowest.py",
          "else with_those_before <= k", "else with_those_before < k",
          ["selection/test_lowest.py::TestRowsAndTensors::test_units_are_taken_in_the_order_of_their_means_while_they_fit"]),
    Fault("a fraction of the elements is rounded down", "selection/eligible.py",
          "round(k * n_eligible)", "int(k * n_eligible)", ["selection/test_lowest.py::test_k_is_resolved_to_a_count"]),
    Fault("0 and -0 are different scores", "selection/radix.py",
          "(numbers + 0.0).view(", "numbers.clone().view(",
          ["selection/test_radix.py", "selection/test_lowest.py::test_lowest_k_marks_exactly_the_k_lowest"]),
    # Given masks ---------------------------------------------------------------------------------------------------
    Fault("the digest of a file of masks is not compared", "masks/files.py",
          "return fits and torch.equal(", "return fits or torch.equal(",
          ["masks/test_files.py::test_content_that_was_changed_is_refused"]),
    Fault("what is left of a selection is the selection", "masks/selections.py",
          "{name: ~mask for", "{name: mask.clone() for",
          ["masks/test_selections.py::test_operators_are_those_of_sets"]),
    Fault("a tied weight has no second name", "masks/resolving.py",
          "if id(p) in first and name not in parameters}", "if id(p) not in first}",
          ["masks/test_selections.py::test_tied_weight_is_found_by_either_name"]),
    Fault("masks are the user's own tensors", "masks/resolving.py",
          "if isinstance(masks, Mapping):", "if isinstance(masks, Selection):",
          ["callback/test_masks.py::test_masks_are_copied_when_training_begins"]),
    Fault("a checkpoint of other masks is gone on from", "stages.py",
          "if not torch.equal(mask, given[name])]", "if mask.shape != given[name].shape]",
          ["callback/test_masks.py::test_resuming_with_other_masks_is_refused_by_name"]),
    Fault("rows of given masks are not skipped", "stages.py",
          "and not state.steps and not in_trial", "and state.steps and not in_trial",
          ["callback/test_masks.py::test_savings_are_bytes_counted_by_hand"]),
    Fault("savings do not count the state that frozen elements never had", "freezing/holder.py",
          "if_live(self._optimizer, n_without_state)", "if_live(self._optimizer, 0)",
          ["callback/test_masks.py::test_savings_are_bytes_counted_by_hand"]),
    Fault("with given masks nobody notes who reads gradients", "run.py",
          "bool(state.observing or self._options.masks is not None)", "bool(state.observing)",
          ["callback/test_masks_integrations.py::"
           "test_code_that_is_seen_to_read_gradients_finds_them_from_the_next_step_on[element]"]),
    # Constancy, and what it saves ----------------------------------------------------------------------------------
    Fault("a row with one marked element counts as a whole row", "_masks.py",
          "torch.equal(marked, rows.all(1))", "torch.equal(marked, rows.any(1))",
          ["test_masks.py::test_gathers_scatters_and_fills_as_numpy_does"]),
    Fault("live elements of sparse gradients are zeroed, not frozen ones", "freezing/restore.py",
          "masked_fill_(~live[", "masked_fill_(live[",
          ["freezing/test_restore.py::TestGradients::test_sparse_gradient_stays_sparse"]),
    Fault("only the last of several backward passes before a step counts", "freezing/live_vector.py",
          "grad_slice += bundle.gather(gradients)", "grad_slice.copy_(bundle.gather(gradients))",
          ["freezing/test_compact.py::test_gradients_are_gathered_during_backward_and_freed"]),
    Fault("the learning rate is multiplied in step t0 itself, before the freeze", "state.py",
          "factor if factor is None or self.frozen_fraction > 0.0 else 1.0", "factor",
          ["callback/test_learning_rate.py::test_step_t0_itself_has_the_whole_rate_and_the_next_one_the_factor"]),
    Fault("the learning rate stays multiplied once everything has thawed", "state.py",
          "factor is None or self.frozen_fraction > 0.0", "factor is None or self.decision",
          ["callback/test_learning_rate.py::test_rate_is_whole_again_once_everything_has_thawed",
           "callback/test_learning_rate.py::test_nothing_frozen_means_no_factor"]),
    Fault("the learning rate is not put back after the update", "run.py",
          "        self.stages.after_update()\n", "",
          ["callback/test_learning_rate.py::"
           "test_schedulers_rates_are_those_of_the_run_without_the_factor_at_every_step[SGD-StepLR]"]),
    Fault("the learning rate of a step that raised stays multiplied", "run.py",
          "self.stages.after_update(is_complete=False)", "pass",
          ["test_freezer.py::test_loop_that_goes_on_after_a_step_that_raised_has_its_own_rates"]),
    Fault("a learning rate that is a tensor is divided again, not copied back", "freezing/learning_rate.py",
          "rate.before.copy_(rate.value)", "rate.before.div_(0.3)",
          ["callback/test_learning_rate.py::test_weights_are_those_of_rates_multiplied_by_hand_around_each_step"
           "[Adam, tensor-auto]"]),
    Fault("a learning rate that groups share is multiplied for each of them", "freezing/learning_rate.py",
          "rate.copy_(value * factor)", "rate.mul_(factor)",
          ["callback/test_learning_rate.py::test_weights_are_those_of_rates_multiplied_by_hand_around_each_step"
           "[SGD, one tensor for two groups-restore]"]),
    Fault("the learning rate is multiplied once more in the step of a parent class", "stages.py",
          "if self._rates is None or is_nested or", "if self._rates is None or",
          ["callback/test_learning_rate.py::test_step_on_top_of_a_parents_step_has_the_factor_once"]),
    Fault("the learning rate is multiplied before the closure", "freezing/late.py",
          "        undo()\n        loss = closure()\n        begin()\n",
          "        undo()\n        begin()\n        loss = closure()\n",
          ["callback/test_learning_rate.py::test_code_that_sets_rates_goes_on_working[InTrainingStep-None-progress]"]),
    Fault("an optimizer that sets its own learning rate is not noticed", "freezing/learning_rate.py",
          "not own and not rate.", "own and not rate.",
          ["callback/test_learning_rate.py::"
           "test_optimizer_that_sets_its_rate_in_its_step_is_refused_at_the_first_step"]),
    Fault("an optimizer that steps by a copy of its learning rate is not noticed", "freezing/learning_rate.py",
          " and self.before is not at_start", "",
          ["freezing/test_learning_rate.py::test_rate_that_the_step_has_copied_before_its_closure_is_told"]),
    Fault("a BatchNorm layer that keeps still follows its model into training mode", "freezing/still_norms.py",
          "layer.training = False\n    return layer", "layer.training = mode\n    return layer",
          ["freezing/test_still_norms.py::test_norm_that_froze_as_a_whole_keeps_its_statistics_whoever_calls_train"]),
    Fault("a BatchNorm layer with a live element keeps still", "freezing/still_norms.py",
          "if froze and not any(p.requires_grad for name, p in own.items() if name not in froze):", "if froze:",
          ["freezing/test_still_norms.py::test_norm_with_a_live_element_goes_on_tracking"]),
    Fault("a BatchNorm layer keeps still after the fit", "freezing/still_norms.py",
          "            for name in _INSTEAD:\n", "            for name in ():\n",
          ["freezing/test_still_norms.py::test_each_fit_has_its_own_choice"]),
    Fault("a BatchNorm layer is not found while FSDP2 has gathered its parameters", "freezing/still_norms.py",
          "if name in frozen or id(p) in constant", "if id(p) in constant",
          ["freezing/test_still_norms.py::test_norm_is_known_by_name_while_other_parameters_are_in_its_place"]),
    Fault("a copy of a still BatchNorm layer keeps still for ever", "freezing/still_norms.py",
          "return getattr, (self._layer, self._name)", "return type(self), (self._layer, self._name, self._function)",
          ["freezing/test_still_norms.py::test_copies_of_a_still_norm_follow_their_own_model"]),
    Fault("an element that thaws a second time gets the state of its first freeze", "freezing/thawing.py",
          "masks[name] = mask & ~thawing[name]", "masks[name] = mask",
          ["freezing/test_thawing.py::test_thawed_elements_have_the_state_they_froze_with"]),
    Fault("the lowest price is taken, not the highest", "selection/mixed.py",
          "max(good, default=-1)", "min(good, default=-1)",
          [MIXED + "test_work_is_near_the_least_that_any_block_has"]),
    Fault("what is used more often is not dearer", "selection/mixed.py",
          "cost *= kernel", "cost = kernel",
          [MIXED + "test_what_is_used_more_often_is_cut_more"]),
    Fault("blocks may keep fewer elements than are to be live", "selection/mixed.py",
          "counts[i + 1, -1] >= n_live and kept", "kept",
          [MIXED + "test_exactly_k_freeze_for_much_less_work_and_little_less_of_the_scores",
           MIXED + "test_all_that_has_a_score_is_live_where_most_have_none"]),
    Fault("the budget of work is that of the cheapest weight", "selection/mixed.py",
          "<= work * products", "<= products",
          ["callback/test_budget.py::test_a_budget_of_work_is_kept_and_used"]),
    Fault("a budget of memory forgets the indices", "counting.py",
          "2 * INDEX_BYTES *", "0 *",
          ["callback/test_budget.py::test_a_budget_of_memory_is_kept_and_used"]),
    Fault("a budget of memory forgets what other parameters take", "freezing/savings.py",
          "(memory - fixed) / max", "memory / max",
          ["callback/test_budget.py::test_other_parameters_and_states_count"]),
    Fault("an input is copied although it stays in memory", "freezing/blocks.py",
          "not isinstance(layer, nn.Linear) or _torch.keeps_own_result(x)", "not isinstance(layer, nn.Linear)",
          ["freezing/test_skipping.py::test_an_input_that_stays_in_memory_anyway_is_not_copied"]),
    Fault("of an input the frozen columns are kept", "freezing/blocks.py",
          "return x.index_select(self.axis, self.columns)", "return x.index_select(self.axis, self.columns.flip(0))",
          ["freezing/test_skipping.py::test_of_a_layer_s_input_only_the_live_columns_are_kept"]),
    Fault("a block leaves out columns with a frozen element", "freezing/blocks.py",
          "live.any(2).any(1), live.any(2).any(0)", "live.any(2).any(1), live.any(2).all(0)",
          ["freezing/test_skipping.py::test_live_elements_have_the_gradient_of_plain_autograd"]),
    Fault("gradients are gathered twice in a step, or not at all", "freezing/holder.py",
          "if not self._gathered:", "if self._gathered:",
          ["callback/test_saving.py::test_micro_batches_without_a_loss_train_alike_under_both_holds"]),
    Fault("the skipped work is counted with the work that is left at half", "freezing/savings.py",
          "flops - 2 * uses_per_step[name] * computed", "flops - uses_per_step[name] * computed",
          ["freezing/test_savings.py::test_flops_are_two_for_each_element_and_use"]),
    Fault("the fingerprint ignores the first element and the highest bit of others", "freezing/fingerprints.py",
          "mul_(2).add_(1)", "mul_(2)",
          ["freezing/test_fingerprints.py::test_fingerprint_changes_with_every_bit_of_every_frozen_element"]),
    # Several processes ---------------------------------------------------------------------------------------------
    Fault("frozen elements that DDP does not send keep their local gradient", "distributed/comm_hook.py",
          "buffer.zero_()", "buffer.detach()", ["test_processes.py::test_two_ranks_agree_with_one_process[comm_hook]"]),
    Fault("the index in a whole parameter is computed with the shape of its local part", "distributed/shards.py",
          "found * layout.shape[axis] +", "found * tensor.shape[axis] +",
          ["distributed/test_shards.py::test_every_element_of_a_sharded_parameter_is_counted_once_and_has_its_index"]),
    Fault("a vector of shards is clipped by the norm of one process", "distributed/shards.py",
          "[p if p.is_replicate() else Shard(0) for p in", "[Replicate() for p in",
          ["distributed/test_shards.py::test_flat_values_lie_on_the_processes_of_a_parameter_whatever_their_number"]),
    Fault("a parameter whose shard on this process is frozen leaves the optimizer", "freezing/compact.py",
          "counts = n_frozen or {name", "counts = {name",
          [LIVE_SHARDS + "test_each_process_steps_its_own_live_elements"]),
    Fault("a parameter whose shard on this process is frozen gets no gradient", "freezing/holder.py",
          "if n_frozen[name] == parameters[name].numel()]", "if frozen[name].all()]",
          [LIVE_SHARDS + "test_savings_are_those_of_this_process"]),
    Fault("gradients of a step that was left out are added to the next step's", "freezing/compact.py",
          "for vector in self._vectors if self._swaps else ():", "for vector in ():",
          [LIVE_SHARDS + "test_optimizer_has_its_parameters_until_the_last_backward_pass"]),
    Fault("states of what thaws are cut a second time", "freezing/thawing.py",
          "shards.parts(whole_masks) if self._is_loaded else whole_masks", "shards.parts(whole_masks)",
          [LIVE_SHARDS + "test_states_of_thawing_shards_are_saved_whole_and_loaded_in_part"]),
    Fault("a step that is taken for a checkpoint counts", "run.py",
          "self._depth > 0 or self._is_for_checkpoint", "self._depth > 0",
          [FREEZER + "test_step_that_is_taken_to_have_a_state_to_save_does_not_count"]),
    # Who reads gradients, and what is refused ----------------------------------------------------------------------
    Fault("a parameter's hook is found only next to one of the other kind", "user_code/readers.py",
          "for name, p in parameters.items() if p._backward_hooks or p._post",
          "for name, p in parameters.items() if p._backward_hooks and p._post",
          ["user_code/test_readers.py::test_hooks_on_tensors_modules_and_the_optimizer_are_found"]),
    Fault("an optimizer with half a sign of two sets of weights is refused", "refusals/optimizers.py",
          "if known <= signs:", "if known & signs:",
          ["test_refusals.py::TestOptimizersWithTwoSetsOfWeights::test_half_a_sign_is_supported"]),
    Fault("a freeze after the very last step is not warned of", "misconfiguration.py",
          "all(t < planned_steps for t in decision_steps)", "all(t <= planned_steps for t in decision_steps)",
          ["test_misconfiguration.py::test_a_likely_mistake_is_warned_of_before_the_first_step"]),
    # What is saved and logged --------------------------------------------------------------------------------------
    Fault("a delta of few frozen elements forgets which these are", "delta/entries.py",
          "    if not frozen.any():\n", "    if frozen.float().mean() < 0.5:\n",
          ["delta/test_comparing.py::test_disjoint_masks_of_which_one_leaves_most_live_merge"]),
    Fault("the places are left out of the fingerprint", "delta/entries.py",
          "    digest.update(indices.to(_place_dtype(len(units))).numpy().data)\n", "",
          ["delta/test_entries.py::test_weights_of_zeros_are_told_apart_by_dtype_and_places"]),
    Fault("values are written to a copy where a tensor is not contiguous", "delta/entries.py",
          "if not tensor.is_contiguous():", "if False:", ["delta/test_applying.py::test_apply_and_revert"]),
    Fault("low bits of places are read in the wrong order", "delta/places.py",
          "<< bit\n    places", "<< (low_bits - 1 - bit)\n    places", ["delta/test_places.py"]),
    Fault("a wrong digest is not noticed", "delta/files.py",
          'if content(source["digest"]) != digest(source):', 'if not len(source["digest"]):',
          ["delta/test_files.py::test_damaged_files_are_refused_or_give_the_right_model[False]"]),
    Fault("values alone are taken for another mask", "delta/files.py",
          'if not torch.equal(of_places["mask"], tensors["mask"]):', "if False:",
          ["delta/test_files.py::test_values_alone_and_their_mask_are_the_delta"]),
    Fault("a file's layout may claim other values than there are", "delta/files.py",
          "or sum(item.nbytes for item in items) != values.numel()", "or False",
          ["delta/test_files.py::test_a_forged_layout_is_refused"]),
    Fault("half of a delta stays where writing fails", "delta/applying.py",
          "        overwrite(before)\n        raise\n    return before", "        raise\n    return before",
          ["delta/test_applying.py::test_a_write_that_fails_half_way_is_taken_back"]),
    Fault("a conflict of equal bits is one", "delta/comparing.py",
          "known & touched & ~same_bits(before, current).cpu()", "known & touched",
          ["delta/test_comparing.py::test_overlap_and_merge_against_loops"]),
    Fault("the places of the tenant before keep its values", "delta/tenants.py",
          "if before is not None and (tenant is None or tenant.mask is not before):",
          "if before is not None and tenant is None:",
          ["delta/test_tenants.py::test_each_tenant_answers_as_its_own_model"]),
    Fault("a tenant's values are overwritten while a pass runs", "delta/tenants.py",
          "(not self._readers or self._current == name)", "True",
          ["delta/test_tenants.py::test_passes_of_one_tenant_run_side_by_side_and_another_waits"]),
    Fault("an update is applied twice", "delta/tenants.py",
          "number <= last", "number < last", ["delta/test_tenants.py::test_updates_by_values_alone"]),
    Fault("a stream forgets what was live before the last stage", "delta/stream.py",
          "frozen.get(name, mask) & mask", "frozen.get(name, mask)", ["delta/test_stream.py::test_masks_that_change"]),
    Fault("a stream that goes on forgets the places of the run before", "delta/stream.py",
          "frozen.get(entry.name, still) & still", "frozen.get(entry.name, still)",
          ["delta/test_stream.py::test_a_new_run_goes_on_from_what_was_published_and_one_from_another_base_is_refused"]),
    Fault("the last step is not published", "delta/stream.py",
          "if has_changed or is_last or step", "if has_changed or step",
          ["delta/test_stream.py::test_every_update_is_the_training_at_its_step"]),
    Fault("an update of another run is taken for the next", "delta/follower.py",
          "number == self.number + 1 and previous != self.digest", "False",
          ["delta/test_stream.py::test_updates_out_of_order_are_refused"]),
    Fault("the logarithm of a variance of 0 is logged", "reporting/board.py",
          "logs[logs.isfinite()]", "logs[~logs.isnan()]", ["reporting/test_board.py"]),
    Fault("parameters of a group count alike", "reporting/groups.py",
          "fractions[name] * size for", "fractions[name] for", ["reporting/test_board.py"]),
    Fault("the heat map has its layers upside down", "reporting/images.py",
          "values[at].T,", "values[at].T[::-1],", ["reporting/test_images.py"]),
    Fault("a resumed run forgets when its first stage began", "state.py",
          'self.history = list(state.get("history", known))', "self.history = known", ["callback/test_report.py"]),
    Fault("frozen elements count as trainable", "state.py",
          "n_trained - (self.decision.count if self.decision else 0)", "n_trained", ["callback/test_report.py"]),
    Fault("a fraction of the steps moves when a run is resumed", "planning/plan.py",
          'if (step := state.get("first_step")) and', "if (step := None) and", ["callback/test_report.py"]),
    Fault("names in a report's HTML are not escaped", "reporting/report.py",
          "<tr><td>{escape(name)}</td>", "<tr><td>{name}</td>", ["reporting/test_report.py"]),
    Fault("a plot has the fractions of the stage after", "reporting/plots.py",
          "edges = [*(step for step, _ in history), max(", "edges = [0, *(step for step, _ in history[1:]), 0 * max(",
          ["reporting/test_plots.py"]),
    Fault("masks that a run began with are not drawn", "reporting/board.py",
          "sum(step < known.steps for", "sum(step <= known.steps for", ["reporting/test_board.py"]),
    Fault("a module keeps the callback's arguments", "_lightning.py",
          "initial.pop(name, None)", "pass", ["callback/test_loggers.py"]),
]
# fmt: on


def copied(folder: Path) -> None:
    """Copy the files of the working tree that git does not ignore to a folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():  # git also lists a file that was deleted since
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def run_tests(folder: Path, tests: list[str]) -> NoReturn:
    """Run tests of a copy, and end this process, a fork, with pytest's exit status."""
    status = NOT_RUN
    try:
        import pytest

        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)  # of processes that the tests start
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
        del sys.modules["tests"]
        # What this process imported before cannot be rewritten, which pytest warns of.
        options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        status = pytest.main([*options, *(f"tests/{test}" for test in tests)])
        origin = importlib.import_module(PACKAGE).__file__
        if not Path(str(origin)).is_relative_to(folder):
            print(f"The tests ran on {origin}, not on the copy.")
            status = NOT_RUN
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def outcome(tests: list[str], fault: Fault | None = None) -> tuple[int, str]:
    """Return pytest's exit status and output on a copy, with a fault or without one."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        folder = Path(name).resolve()
        copied(folder)
        if fault:
            file = folder / PACKAGE / fault.file
            file.write_text(file.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
        sys.stdout.flush()
        with tempfile.TemporaryFile("w+") as output:
            if (child := os.fork()) == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                run_tests(folder, tests)
            _, status = os.waitpid(child, 0)
            output.seek(0)
            return os.waitstatus_to_exitcode(status), output.read()


def main() -> int:
    """Plant each fault, and print whether it was caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="plant only this fault")
    only = parser.parse_args().only
    faults = [fault for fault in FAULTS if only in (None, fault.name)]
    if not faults:
        parser.error(f"no fault is called {only!r}")
    if misplaced := [f for f in faults if (ROOT / PACKAGE / f.file).read_text(encoding="utf-8").count(f.old) != 1]:
        parser.error("\n".join(f"not found exactly once in {f.file}: {f.old!r} ({f.name})" for f in misplaced))
    for module in PRELOADED:
        importlib.import_module(module)
    status, said = outcome(sorted({test for fault in faults for test in fault.tests}))
    if status != PASSED:
        print(f"{said}\nWithout any fault the tests do not pass.")
        return 1
    width, survivors = max(len(fault.name) for fault in faults), 0
    for fault in faults:
        start = time.monotonic()
        status, said = outcome(fault.tests, fault)
        seconds, caught = time.monotonic() - start, status == FAILED
        survivors += not caught
        verdict = "caught" if caught else "SURVIVED" if status == PASSED else "could not be tested"
        print(f"{fault.file:26}{fault.name:{width}}  {verdict:10}{seconds:6.1f} s", flush=True)
        if status not in (PASSED, FAILED):
            print(said)
    print(f"{len(faults) - survivors} of {len(faults)} faults were caught.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())

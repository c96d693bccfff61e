"""Unsupported configurations and their error messages.

Each function returns a sentence with the reason and the way out, or None if the configuration is supported.
Strategies and callbacks are recognized by class names and attributes, so both of Lightning's packages are covered and
neither is imported.
"""

from lightning_gcfreeze.refusals.checkpoints import not_resumable, other_masks
from lightning_gcfreeze.refusals.modules import (
    no_gradients,
    single_sample,
    unsupported_graph,
    unsupported_module,
    unsupported_samples,
)
from lightning_gcfreeze.refusals.optimizers import (
    already_followed,
    gradients_are_kept,
    no_step_hooks,
    not_compactable,
    optimizer_state_is_read,
    several_evaluations,
    unreadable_momentum,
    unsupported_optimizer,
    unsupported_rates,
)
from lightning_gcfreeze.refusals.trainers import (
    not_monitored,
    other_trainer,
    too_many_callbacks,
    unsupported_averaging,
    unsupported_manual_optimization,
    unsupported_mesh,
    unsupported_optimizer_index,
    unsupported_probe,
    unsupported_strategy,
    unsupported_with_shards,
)

__all__ = [
    "already_followed",
    "gradients_are_kept",
    "no_gradients",
    "no_step_hooks",
    "not_compactable",
    "not_monitored",
    "not_resumable",
    "optimizer_state_is_read",
    "other_masks",
    "other_trainer",
    "several_evaluations",
    "single_sample",
    "too_many_callbacks",
    "unreadable_momentum",
    "unsupported_averaging",
    "unsupported_graph",
    "unsupported_manual_optimization",
    "unsupported_mesh",
    "unsupported_module",
    "unsupported_optimizer",
    "unsupported_optimizer_index",
    "unsupported_probe",
    "unsupported_rates",
    "unsupported_samples",
    "unsupported_strategy",
    "unsupported_with_shards",
]

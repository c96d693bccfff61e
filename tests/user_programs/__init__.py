"""What users write around a training step: each hook that can see or change gradients, weights or the optimizer, once.

`CHANGES` lists code that changes where training ends, `READS` code that records gradients, and `HARMLESS` code that
overrides a hook and leaves gradients alone. A case plants its code into a `Setup`, and says how to take it out again.
"""

from tests.user_programs import (
    callbacks,
    harmless,
    hooks,
    indirect,
    modules,
    plugins,
    reads,
    replaced_methods,
    training_steps,
)
from tests.user_programs.case import CHANGES, HARMLESS, READS, T0, Case, Net, Setup

__all__ = [
    "CHANGES",
    "HARMLESS",
    "READS",
    "T0",
    "Case",
    "Net",
    "Setup",
    "callbacks",
    "harmless",
    "hooks",
    "indirect",
    "modules",
    "plugins",
    "reads",
    "replaced_methods",
    "training_steps",
]

"""Which way each parameter's per-sample gradients are computed: the part of a run's state that decides it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_gcfreeze.distributed import World

Source = Literal["replay", "capture", "auto"]
Reduction = Literal["mean", "sum"]
"""How the loss reduces the losses of samples."""


@dataclass
class SourceChoice:
    """What is known so far about capturing, by name of the parameters. A resumed run goes on with it."""

    n_attempts: int = 0
    """Optimizer steps for which per-sample gradients were asked for."""
    captured: dict[str, Reduction] = field(default_factory=dict)
    """Parameters whose gradients are captured, with the reduction that the captured shares are scaled by."""
    replayed: list[str] = field(default_factory=list)
    """Parameters for which capture was found to differ from a replay: never captured again."""
    missed_once: bool = False
    """Whether a parameter that was to be captured was missing once. Then the first sample is kept in every step."""

    @classmethod
    def initial(cls, mode: Source, names: Iterable[str]) -> "SourceChoice":
        """Return the choice of a new run: with mode "capture" all of `names` are captured, else none so far."""
        return cls(captured=dict.fromkeys(names, "mean") if mode == "capture" else {})

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, strings and containers of them.

        Keys: "tries" (int, `n_attempts`), "captured" (dict of name -> "mean" or "sum"), "replayed" (list of names),
        "missed" (bool, `missed_once`).
        """
        return {
            "tries": self.n_attempts,
            "captured": dict(self.captured),
            "replayed": list(self.replayed),
            "missed": self.missed_once,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.n_attempts, self.missed_once = state["tries"], state["missed"]
        self.captured, self.replayed = dict(state["captured"]), list(state["replayed"])

    def synchronize(self, world: World) -> None:
        """Make all processes choose the same: captured is only what all of them capture, with the same reduction."""
        if world.size == 1:
            return
        states: list[dict[str, Any]] = world.all_gather_object(self.state_dict())
        common = set.intersection(*(set(state["captured"].items()) for state in states))
        self.captured = {name: by for name, by in self.captured.items() if (name, by) in common}
        self.replayed = list(dict.fromkeys(name for state in states for name in state["replayed"]))
        self.missed_once = any(state["missed"] for state in states)

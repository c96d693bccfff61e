"""The layout of checkpoints of version 0.1, format 5, written down by hand: what the conversion is compared with."""

from typing import Any

OBSERVING = ("shapes", "full", "covariance", "moments", "start", "scale", "observed", "skipped", "batch_size")


def as_format_5(state: dict[str, Any], samples: str = "auto") -> dict[str, Any]:
    """Return a callback's state as version 0.1 would have saved it, without the keys that its last commits added."""
    observing, decision = state["observing"], state["decision"]
    phase = observing and {"begun": True, **{key: observing[key] for key in OBSERVING}, "decided": state["source"]}
    if decision:
        by_variance = decision["variance"] is None
        phase = {
            "begun": True,
            "frozen": decision["frozen"],
            "scores": decision["scores"],
            "variance": decision["scores"] if by_variance else decision["variance"],
            "by_variance": by_variance,
            "matrix": decision["matrix"],
            "observed": decision["observed"],
            "skipped": decision["skipped"],
            "positions": decision["uses_per_step"],
            "never_moved": decision["n_without_gradient"],
            "again": phase,
        }
    arguments = {**state["arguments"], "samples": samples, "max_t0": None, "max_loss_increase": None, "monitor": None}
    return {
        "format": 5,
        "arguments": arguments,
        "seed": state["seed"],
        "steps": state["steps"],
        "phase": "frozen" if decision else "observing",
        "plan": state["plan"],
        "aside": state["thaw_states"],
        "state": phase,
    }

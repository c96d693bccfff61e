"""States of version 0.1 in the present format."""

import dataclasses
from typing import Any

from lightning_gcfreeze.gradients.choice import SourceChoice
from lightning_gcfreeze.planning.growing import Growth
from lightning_gcfreeze.planning.settling import Settled


def from_format_5(old: dict[str, Any]) -> dict[str, Any]:
    """Return a state of format 5 in format 6: there an observation was a phase, or within a phase."""
    state = old["state"]
    if not state["begun"]:
        return {"begun": False}
    observing, decision = (state, None) if old["phase"] == "observing" else (state["again"], state)
    source = observing and observing["decided"]
    if observing:
        fields = ("shapes", "full", "covariance", "moments", "start", "scale", "observed", "skipped", "batch_size")
        observing = {name: observing[name] for name in fields} | {"observed_step": old.get("observed_step", 0)}
    if decision:
        decision = {name: decision[name] for name in ("frozen", "scores", "matrix", "observed", "skipped")} | {
            "variance": None if decision["by_variance"] else decision["variance"],
            "n_without_gradient": decision["never_moved"],
            "uses_per_step": decision["positions"],
        }
    arguments = dict(old["arguments"])
    max_t0, increase, monitor = (arguments.pop(name, None) for name in ("max_t0", "max_loss_increase", "monitor"))
    if max_t0 is not None:
        arguments["t0"] = {"class": "Settled", **dataclasses.asdict(Settled(max_t0=max_t0))}
    if increase is not None or monitor is not None:
        growth = Growth(Growth.max_loss_increase if increase is None else increase, monitor)
        arguments["k"] = {"class": "Growth", **dataclasses.asdict(growth)}
    return {
        "begun": True,
        "arguments": arguments,
        "seed": old["seed"],
        "steps": old["steps"],
        "gradient_readers": old.get("readers", []),
        "source": source or SourceChoice.initial("auto", ()).state_dict(),
        "observing": observing,
        "decision": decision,
        "plan": old["plan"],
        "thaw_states": old["aside"],
    }

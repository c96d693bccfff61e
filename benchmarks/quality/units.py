"""What does it cost to freeze rows, or rows and columns that save work, in place of single elements?

    uv run --group bench python -m benchmarks.quality.units [--tasks digits,mnist] [--seeds 5] [--out DIR]

The runs are those of `benchmarks.quality.rates`: Adam at a constant rate tuned on each task, the order `movement`, and
for each unit its own best factor of the rate. The layers of these tasks are so small that no block would pay in time;
here all weights are cut, so that what is measured is the choice. Leaves units-TASK-SEED.json in DIR.
"""

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.rate_summary import Runs, apart, difference, load, lost, mean_of
from benchmarks.quality.rates import FACTORS, WAYS, End, Start, base_rate, finite, go_on, prepare, save
from benchmarks.quality.summary import table
from benchmarks.quality.tasks import FRESH_TASKS, RATE_TASKS
from lightning_gcfreeze import orderings, selection
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.freezing import WeightUses

FRACTIONS = (0.8, 0.9, 0.95)
UNITS = ("element", "mixed", "row", "random element")
TASKS = ("boston", "mnist", "synthetic1", "digits", "autoencoder", "patches", "clusters", "deep", "norms")


def uses_of(start: Start) -> dict[str, int]:
    """How often a step uses each weight that has blocks."""
    uses = WeightUses(start.model, dict(start.model.named_parameters()))
    uses.listen()
    x, y = start.batches[0]
    start.model.loss(start.model(x), y)
    uses.stop()
    return {name: count for name, count in uses.uses_per_step.items() if count}


def choose(unit: str, scores: Named, drawn: Named, k: int, uses: Mapping[str, int]) -> dict[str, Tensor]:
    if unit == "mixed":
        return selection.lowest_k(dict(selection.in_blocks(scores, k, uses)), k)
    if unit == "row":
        return selection.lowest_k(selection.pooled(scores, "row"), k, "row")
    return selection.lowest_k(scores if unit == "element" else drawn, k)


def work(masks: Named, uses: Mapping[str, int]) -> float:
    """The share of the products of weights' gradients that blocks around live elements take."""
    computed = total = 0
    for name, count in uses.items():
        live = ~masks[name].reshape(*masks[name].shape[:2], -1)
        kernel = live.shape[2]
        computed += count * kernel * int(live.any(2).any(1).sum()) * int(live.any(2).any(0).sum())
        total += count * masks[name].numel()
    return computed / total


def run(name: str, seed: int, out: Path) -> dict[str, Any]:
    """Everything of one task and seed."""
    start, seen = prepare((RATE_TASKS | FRESH_TASKS)[name], WAYS["adam"], seed, base_rate(name, "adam", out))
    end = End(start.task, start.model, start.held_out, 1)
    end(1, {n: w[None] for n, w in start.weights.items()})
    stopped = {n: finite(value) for n, value in end.means().items()}
    everything = {n: torch.ones_like(w, dtype=torch.bool) for n, w in start.weights.items()}
    ((_, unfrozen, _),) = go_on(start, {"unfrozen": everything}, FACTORS)
    scores, drawn, uses = orderings.movement(seen.first), orderings.random(seen.first), uses_of(start)
    p = sum(w.numel() for w in start.weights.values())
    masks = {
        f"{unit}@{f}": choose(unit, scores, drawn, selection.resolve_count(f, p), uses)
        for unit in UNITS
        for f in FRACTIONS
    }
    lives = {way: {n: ~mask for n, mask in of.items()} for way, of in masks.items()}
    return {
        "p": p, "base": start.base, "all_frozen": stopped, "unfrozen": unfrozen,
        "members": {way: of for way, of, _ in go_on(start, lives, FACTORS)},
        "work": {way: work(of, uses) for way, of in masks.items()},
    }  # fmt: skip


def report(runs: Runs) -> str:
    """Lost shares and work, means over tasks, and differences to single elements with 95 % intervals for the table."""
    rows, alpha = [], 0.05 / (len(UNITS) - 1)
    for unit in UNITS:
        cells = []
        for f in FRACTIONS:
            share = sum(run["work"][f"{unit}@{f}"] for run in runs.values()) / len(runs)
            cells.append(f"{mean_of(lost(runs, unit, f)):.2f} ({share:.2f})")
        rows.append([unit, *cells, difference(apart(lost(runs, unit), lost(runs, "element")), alpha)])
    by_task = [
        [task, *(" ".join(f"{mean_of({task: lost(runs, unit, f)[task]}):.2f}" for f in FRACTIONS) for unit in UNITS)]
        for task in runs.gains
    ]
    head = ["unit", *(f"f = {f}" for f in FRACTIONS), f"to element, {1 - alpha:.1%}"]
    return f"Lost share (work)\n\n{table(head, rows)}\n\n{table(['task', *UNITS], by_task)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda v: v.split(","), default=list(TASKS), help="(all that are small)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of a task (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where results lie (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        for seed in range(min(args.seeds, (RATE_TASKS | FRESH_TASKS)[name].seeds)):
            file, began = args.out / f"units-{name}-{seed}.json", time.monotonic()
            if not file.exists():
                save(run(name, seed, args.out), file)
                print(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
    print(report(load(args.out, ["units"], args.tasks, args.seeds)["units"]))


if __name__ == "__main__":
    main()

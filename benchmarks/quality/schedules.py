"""When to freeze? One freeze, early or late, against growing, changing the live set, and a trial that is taken back.

    uv run --group bench python -m benchmarks.quality.schedules [--tasks digits,mnist] [--ways adam,adam_decay]
                                                                [--seeds 3] [--out DIR]

All have the same number of steps, and the same number of elements frozen on the average over them, so that they save as
much: three fifths, or four fifths. The order is `movement`; where the live set is chosen anew, `momentum`, as frozen
elements do not move. Rates as in `benchmarks.quality.rates`: a base that is tuned for the unfrozen run, and for each
schedule its own best factor from the first freeze on, found on one half of the held-out data and reported on the other.
Leaves schedules-WAY-TASK-SEED.json in DIR.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.quality import batched
from benchmarks.quality.rate_summary import apart, difference, load, lost, mean_of
from benchmarks.quality.rates import WAYS, End, Way, base_rate, batches_of, finite, save, splits_of
from benchmarks.quality.summary import table
from benchmarks.quality.tasks import FRESH_TASKS, RATE_TASKS, Task
from lightning_gcfreeze import selection
from lightning_gcfreeze._types import Named

FACTORS = (0.5, 1.0, 2.0)
TASKS = ("boston", "mnist", "synthetic1", "synthetic2", "synthetic3", "digits", "diabetes", "cancer", "friedman",
         "autoencoder", "patches", "clusters", "friedman2", "friedman3", "deep", "norms")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A choice of what is live."""

    at: float  # share of the steps
    fraction: float  # frozen from here on
    by: Literal["fresh", "first", "anew", "random"] = "fresh"
    """"fresh": what is frozen stays, the others are ranked by how they moved since the last stage; "first": all by the
    order of the first stage; "anew": all, what was frozen too, by the optimizer's momentum."""
    back: float = 0.0
    """The share of the steps at which weights and optimizer are taken back to where they were."""


def growing(first: float, last: float, most: float, stages: int, by: Literal["fresh", "first"]) -> list[Stage]:
    """Stages at equal distances, each freezing as much more as the one before."""
    return [Stage(first + (last - first) * i / (stages - 1), most * (i + 1) / stages, by) for i in range(stages)]


SCHEDULES: dict[str, dict[str, list[Stage]]] = {
    "0.6": {
        "once": [Stage(0.25, 0.8)],
        "once, early": [Stage(0.1, 2 / 3)],
        "once, late": [Stage(0.35, 0.6 / 0.65)],
        "three stages": [Stage(0.1, 0.25), Stage(0.25, 0.5), Stage(0.5, 0.875)],
        "three stages, first order": [Stage(0.1, 0.25), Stage(0.25, 0.5, "first"), Stage(0.5, 0.875, "first")],
        "ten stages": growing(0.1, 0.6, 0.923, 10, "fresh"),
        "chosen anew": [Stage(0.25 + 0.125 * i, 0.8, "anew") for i in range(6)],
        "a trial taken back": [Stage(0.35, 0.6 / 0.65, back=0.25)],
        "random": [Stage(0.25, 0.8, "random")],
    },
    "0.8": {
        "once": [Stage(0.15, 0.8 / 0.85)],
        "once, early": [Stage(0.08, 0.8 / 0.92)],
        "three stages": [Stage(0.05, 0.6), Stage(0.15, 0.8), Stage(0.35, 0.892)],
        "three stages, first order": [Stage(0.05, 0.6), Stage(0.15, 0.8, "first"), Stage(0.35, 0.892, "first")],
        "ten stages": growing(0.03, 0.25, 0.93, 10, "fresh"),
        "chosen anew": [Stage(0.15 + 0.17 * i, 0.8 / 0.85, "anew") for i in range(5)],
        "random": [Stage(0.15, 0.8 / 0.85, "random")],
    },
}  # fmt: skip


def on_average(stages: Sequence[Stage]) -> float:
    """The share of elements that are frozen, over all steps."""
    ends = [*(stage.at for stage in stages[1:]), 1.0]
    return sum(stage.fraction * (end - stage.at) for stage, end in zip(stages, ends, strict=True))


class Following:
    """Lets members follow schedules, one after the other for each factor."""

    def __init__(self, schedules: Sequence[Sequence[Stage]], task: Task, shapes: Named, seed: int) -> None:
        self.schedules = [stages for stages in schedules for _ in FACTORS]
        self.factors = torch.tensor(FACTORS).repeat(len(schedules))
        m, self.steps = len(self.schedules), task.steps
        self.live = {name: torch.ones(m, *w.shape, dtype=torch.bool) for name, w in shapes.items()}
        self.first: dict[int, Named] = {}  # scores of a member's first stage
        self.half = {name: w.expand(m, *w.shape).clone() for name, w in shapes.items()}
        self.then = torch.ones(m)  # the factors so far
        draw = torch.Generator().manual_seed(seed)
        self.drawn = {name: torch.rand(w.shape, generator=draw) for name, w in shapes.items()}
        self.saved: dict[int, tuple[Named, list[Named]]] = {}

    def __call__(self, step: int, weights: Named, optimizer: torch.optim.Optimizer) -> tuple[Named, Tensor] | None:
        changed, states = False, list(optimizer.state.values())
        for i, stages in enumerate(self.schedules):
            before = 0.0
            for stage in stages:
                if step == round(stage.back * self.steps) and stage.back:
                    state = [{k: v[i].clone() for k, v in s.items() if v.dim()} for s in states]
                    self.saved[i] = {n: w[i].clone() for n, w in weights.items()}, state
                if step == round((before + stage.at) / 2 * self.steps) or step == round(stage.back * self.steps):
                    for name, w in weights.items():
                        self.half[name][i] = w[i]
                if step == round(stage.at * self.steps):
                    self._choose(i, stage, weights, states)
                    changed, self.then[i] = True, self.factors[i]
                before = stage.at
        return (self.live, self.then) if changed else None

    def _choose(self, i: int, stage: Stage, weights: Named, states: Sequence[Named]) -> None:
        scores: dict[str, Tensor] = {}
        for (name, w), state in zip(weights.items(), states, strict=True):
            divisor = state["exp_avg_sq"][i].sqrt()
            if stage.by == "anew":
                scores[name] = (state["exp_avg"][i].square() / divisor).nan_to_num_(0.0)
            elif stage.by == "random":
                scores[name] = self.drawn[name]
            else:
                scores[name] = (w[i] - self.half[name][i]).square() * divisor
        if stage.by == "first":
            scores = dict(self.first[i])
        self.first.setdefault(i, scores)
        if stage.by == "fresh":  # what is frozen comes first
            scores = {name: s.masked_fill(~self.live[name][i], -1.0) for name, s in scores.items()}
        p = sum(s.numel() for s in scores.values())
        for name, mask in selection.lowest_k(scores, round(stage.fraction * p)).items():
            self.live[name][i] = ~mask
        if i in self.saved:
            back, state_back = self.saved[i]
            for (name, w), state, old in zip(weights.items(), states, state_back, strict=True):
                w[i] = back[name]
                for key, value in old.items():
                    state[key][i] = value


def run(task: Task, way: Way, seed: int, base: float) -> dict[str, Any]:
    """All schedules of a task, with all factors, beside the unfrozen run and what it is at a quarter of its steps."""
    splits, batches = splits_of(task, seed), batches_of(task, seed)
    pl.seed_everything(seed, verbose=False)
    model = task.model()
    start = {name: p.detach() for name, p in model.named_parameters()}
    held_out = {name: splits[name] for name in ("val", "test")}
    names = [f"{name}@{average}" for average, of in SCHEDULES.items() for name in of]
    schedules = [stages for of in SCHEDULES.values() for stages in of.values()]
    never = [Stage(0.25, 0.0)]
    following = Following([never, *schedules], task, start, seed)
    ones = torch.ones(len(following.schedules))
    members = batched.Members(model, start, following.live, ones, {})
    end, quarter = End(task, model, held_out, task.steps), End(task, model, held_out, 1)

    def judge(steps: int, weights: Named) -> None:
        end(steps, weights)
        if steps == round(0.25 * task.steps):
            quarter(1, {name: w[1:2] for name, w in weights.items()})

    batched.train(members, way.optimizers, batches, [base * r for r in way.rates(task.steps)], judge, following)
    means = end.means()
    found = {
        name: {"factors": list(FACTORS)}
        | {key: finite(v[i * len(FACTORS) :][: len(FACTORS)]) for key, v in means.items()}
        for i, name in enumerate(["unfrozen", *names])
    }
    stopped = {name: finite(value) for name, value in quarter.means().items()}
    p = sum(w.numel() for w in start.values())
    return {"p": p, "base": base, "all_frozen": stopped, "unfrozen": found.pop("unfrozen"), "members": found}


def report(runs: Any) -> str:
    """Lost shares, means over tasks, and differences to one freeze with 95 % intervals for the table."""
    rows = []
    for average, schedules in SCHEDULES.items():
        alpha = 0.05 / (len(schedules) - 1)
        for name in schedules:
            shares = lost(runs, name, float(average))
            once = lost(runs, "once", float(average))
            apart_from = "" if name == "once" else difference(apart(shares, once), alpha)
            rows.append([average, name, f"{mean_of(shares):.2f}", apart_from])
    by_task = [
        [task, *(f"{mean_of({task: lost(runs, name, 0.6)[task]}):.2f}" for name in SCHEDULES["0.6"])]
        for task in runs.gains
    ]
    tables = table(["frozen on average", "schedule", "lost share", "to one freeze"], rows)
    return f"{tables}\n\n{table(['task, 0.6', *SCHEDULES['0.6']], by_task)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda v: v.split(","), default=list(TASKS), help="(all that are small)")
    parser.add_argument("--ways", type=lambda v: v.split(","), default=["adam"], help="of " + ", ".join(WAYS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of a task (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where results lie (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    for way in args.ways:
        for name in args.tasks:
            task = (RATE_TASKS | FRESH_TASKS)[name]
            for seed in range(min(args.seeds, task.seeds)):
                file, began = args.out / f"schedules-{way}-{name}-{seed}.json", time.monotonic()
                if not file.exists():
                    save(run(task, WAYS[way], seed, base_rate(name, way, args.out)), file)
                    print(f"{way}, {name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
        found = load(args.out, [f"schedules-{way}"], args.tasks, args.seeds)[f"schedules-{way}"]
        print(f"{way}\n\n{report(found)}")


if __name__ == "__main__":
    main()

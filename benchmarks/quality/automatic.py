"""What t0="auto" and k="auto" make of the tasks: quality against the unfrozen run, at the fraction that they find.

    uv run --group bench python -m benchmarks.quality.automatic [--tasks boston,text] [--seeds 3]
                                                                [--order movement] [--tuned] [--out DIR]
                                                                [--only-report]

Every run is a fit of a Lightning Trainer, from the same weights on the same batches: unfrozen; with both left to the
data, by the training loss and by a validation loss, `VALIDATIONS` times a run. The tasks train `LONGER` than where
orders are compared, so that there is a plateau to find. With `--tuned` a task's learning rate is the one with which it
trains best unfrozen, as `benchmarks.quality.rates` finds it; else the task's own.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.quality.rates import base_rate
from benchmarks.quality.run import mean_over
from benchmarks.quality.summary import interval, table
from benchmarks.quality.tasks import FRESH_TASKS, METRICS, RATE_TASKS, TASKS, Task
from examples.paper.run import epochs
from lightning_gcfreeze import GradCovFreezeCallback, Growth

LONGER = {"text": 2, "minilm": 1}  # times as many steps; the others
DEFAULT = 3
VALIDATIONS = 30
KINDS = ("auto", "monitored")
ALL_TASKS = TASKS | RATE_TASKS | FRESH_TASKS


class Fractions(pl.Callback):
    """How much is frozen after each step."""

    def __init__(self, freeze: GradCovFreezeCallback) -> None:
        self.freeze, self.counts = freeze, list[int]()

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.counts.append(sum(int(mask.sum()) for mask in self.freeze.frozen.values()))

    @property
    def stages(self) -> list[tuple[int, int]]:
        """(t, k) of each change."""
        before = [0, *self.counts]
        return [(t, k) for t, (k, was) in enumerate(zip(self.counts, before, strict=False), start=1) if k != was]


def fit(
    task: Task, seed: int, steps: int, lr: float, freeze: GradCovFreezeCallback | None, monitors: bool = False
) -> dict[str, Any]:
    """Train, and judge on the test split."""
    splits = task.data(seed)
    pl.seed_everything(seed, verbose=False)
    model = task.make(lr)
    fractions = Fractions(freeze) if freeze else None
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=[freeze, fractions] if freeze else [], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        val_check_interval=max(1, steps // VALIDATIONS),
    )  # fmt: skip
    batches = epochs(len(splits["train"]), task.batch_size, steps, seed)
    validation = DataLoader(splits["val"], batch_size=250) if monitors else None
    trainer.fit(model, DataLoader(splits["train"], sampler=batches, batch_size=None), validation)
    model.eval()
    with torch.no_grad():
        measure = METRICS[task.metric] or model.loss
        found: dict[str, Any] = {
            name: float(mean_over(splits["test"], lambda x: model(x)[None], of)[0])
            for name, of in (("metric", measure), ("test", model.loss))
        }
    if fractions:
        p = sum(w.numel() for w in model.parameters())
        found |= {"stages": fractions.stages, "frozen": fractions.counts[-1] / p, "p": p}
        found |= {"on_average": float(np.mean(fractions.counts)) / p}
    return found


def run(name: str, seed: int, order: str, lr: float) -> dict[str, Any]:
    """All runs of one task and seed."""
    task = ALL_TASKS[name]
    steps = task.steps * LONGER.get(name, DEFAULT)
    found = {"steps": steps, "lr": lr, "unfrozen": fit(task, seed, steps, lr, None)}
    auto = GradCovFreezeCallback("auto", "auto", order=order, seed=seed)  # type: ignore[arg-type]
    found["auto"] = fit(task, seed, steps, lr, auto)
    monitored = GradCovFreezeCallback("auto", Growth(monitor="val/loss"), order=order, seed=seed)  # type: ignore[arg-type]
    found["monitored"] = fit(task, seed, steps, lr, monitored, monitors=True)
    return found


def quality(name: str, run: dict[str, Any], which: str) -> float:
    """The test metric against the unfrozen run's, in percent of it; positive is better."""
    sign = 100 if ALL_TASKS[name].higher_is_better else -100
    return sign * (run[which]["metric"] - run["unfrozen"]["metric"]) / run["unfrozen"]["metric"]


def report(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A table: a row a task, then the mean over tasks, and paired differences with 95 % intervals."""
    rows = []
    values = {
        kind: {name: np.array([quality(name, r, kind) for r in of]) for name, of in runs.items()} for kind in KINDS
    }
    for name, of in runs.items():
        cells = [name, str(of[0]["steps"])]
        for kind in KINDS:
            cells += [" / ".join(f"{np.mean([r[kind][key] for r in of]):.0%}" for key in ("frozen", "on_average"))]
        rows.append([*cells, *(f"{v[name].mean():+.2f} ({v[name].min():+.2f})" for v in values.values())])
    means = [f"{np.mean([v.mean() for v in of.values()]):+.2f}" for of in values.values()]
    frozen = [f"{np.mean([r[kind]['on_average'] for of in runs.values() for r in of]):.0%}" for kind in KINDS]
    rows.append(["mean", "", *frozen, *means])
    head = ["task", "steps", *(f"frozen, {kind}: end / average" for kind in KINDS), *KINDS]
    lines = [table(head, rows), ""]
    for kind in KINDS:
        mean, low, high = interval(values[kind])
        lines.append(f"{kind}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", type=lambda v: v.split(","), default=list(ALL_TASKS), help="of " + ", ".join(ALL_TASKS)
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of a task, at most (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--order", default="movement", help="(%(default)s)")
    parser.add_argument("--tuned", action="store_true", help="tune learning rates first")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where results lie (%(default)s)")
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    if args.tuned and (others := [name for name in args.tasks if name not in RATE_TASKS | FRESH_TASKS]):
        parser.error(f"no learning rates are tuned for {', '.join(others)}: pass other --tasks")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    kind = f"automatic-{args.order}" + ("-tuned" if args.tuned else "")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in args.tasks:
            file = args.out / f"{kind}-{name}-{seed}.json"
            if not file.exists() and not args.only_report and seed - args.first_seed < ALL_TASKS[name].seeds:
                lr = base_rate(name, "adam", args.out) if args.tuned else ALL_TASKS[name].lr
                file.write_text(json.dumps(run(name, seed, args.order, lr), indent=1), encoding="utf-8")
            if file.exists():
                runs.setdefault(name, []).append(json.loads(file.read_text(encoding="utf-8")))
    text = report(runs)
    (args.out / f"{kind}.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

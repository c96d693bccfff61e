"""What does freezing forgo of what the training loss would still fall, and can that be known before?

    uv run --group bench python -m benchmarks.quality.forgone [--tasks digits,mnist] [--seeds 2] [--out DIR]

Each task trains unfrozen, with Adam at the rate at which it trains best, three times as long as where orders are
compared. From a half and from three quarters of its steps it goes on frozen by `movement`, at five fractions. The lost
share is that of the fall of the loss over the training data until the end:

    (L(frozen) - L(unfrozen)) / (L(all frozen) - L(unfrozen))

Beside it are what one might forecast it by: the frozen share of progress, the sum of scores; and of the fall itself the
line in log t that `k="auto"` follows. Leaves forgone-TASK-SEED.json in DIR.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import TensorDataset

from benchmarks.quality import batched
from benchmarks.quality.automatic import DEFAULT, LONGER
from benchmarks.quality.rates import WAYS, End, base_rate, save, splits_of
from benchmarks.quality.summary import table
from benchmarks.quality.tasks import FRESH_TASKS, RATE_TASKS, Task
from examples.paper.run import epochs
from lightning_gcfreeze import selection
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.planning.trend import Fall, Trend

FRACTIONS = (0.3, 0.5, 0.8, 0.9, 0.95)
TIMES = (0.5, 0.75)
JUDGED = 2000  # training samples over which a loss is taken, at most
NOTED = 0.05  # falls below this part of the loss at the end are left out: their shares are mostly noise


def run(task: Task, seed: int, steps: int, base: float) -> dict[str, Any]:
    """Everything of one task and seed."""
    splits = splits_of(task, seed)
    batches = [splits["train"][rows] for rows in epochs(len(splits["train"]), task.batch_size, steps, seed)]
    some = TensorDataset(*splits["train"][:JUDGED])
    pl.seed_everything(seed, verbose=False)
    model = task.model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    p = sum(w.numel() for w in start.values())
    kept: dict[int, tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]] = {}
    wanted = {round(q * steps * half) for q in TIMES for half in (0.5, 1.0)}

    def keep(step: int, weights: Named, optimizer: torch.optim.Optimizer) -> None:
        if step in wanted:
            states = zip(weights, optimizer.state.values(), strict=True)
            state = {n: {k: v[0].clone() if v.dim() else v.clone() for k, v in s.items()} for n, s in states}
            kept[step] = {n: w[0].detach().clone() for n, w in weights.items()}, state

    everything = {n: torch.ones(1, *w.shape, dtype=torch.bool) for n, w in start.items()}
    whole = batched.Members(model, start, everything, torch.ones(1), {})
    _, history = batched.train(whole, WAYS["adam"].optimizers, batches, [base] * steps, change=keep)
    found: dict[str, Any] = {"steps": steps, "base": base, "history": history[:, 0].tolist(), "times": {}}
    for q in TIMES:
        t = round(q * steps)
        weights, state = kept[t]
        half, _ = kept[round(q * steps * 0.5)]
        scores = {n: (w - half[n]).square() * state[n]["exp_avg_sq"].sqrt() for n, w in weights.items()}
        masks = [selection.lowest_k(scores, round(f * p)) for f in (0.0, *FRACTIONS, 1.0)]
        live = {n: torch.stack([~mask[n] for mask in masks]) for n in weights}
        members = batched.Members(model, weights, live, torch.ones(len(masks)), state)
        end = End(task, model, {"train": some}, steps - t)
        batched.train(members, WAYS["adam"].optimizers, batches[t:], [base] * (steps - t), end)
        total = sum(float(s.double().sum()) for s in scores.values())
        progress = [sum(float(scores[n][mask[n]].double().sum()) for n in scores) / total for mask in masks]
        found["times"][str(q)] = {"train": end.means()["train"].tolist(), "progress": progress}
    return found


def forecast(history: Sequence[float], t: int, steps: int) -> Fall:
    """What the callback would forecast after so many steps."""
    trend = Trend()
    for step, loss in enumerate(history[:t], start=1):
        trend.add(torch.tensor(loss))
        trend.end_step(step)
    return trend.fall(t, steps)


def report(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row a task and time: lost shares, shares of progress, and the fall of the loss beside its forecast."""
    rows, most = [], np.zeros(len(FRACTIONS))
    for name, of in runs.items():
        for q in TIMES:
            lost, progress, falls = [], [], []
            for one in of:
                losses, t = np.array(one["times"][str(q)]["train"]), round(q * one["steps"])
                fall = forecast(one["history"], t, one["steps"])
                falls.append(((losses[-1] - losses[0]) / losses[-1], (fall.value + fall.error) / losses[-1]))
                if losses[-1] - losses[0] > NOTED * abs(losses[-1]):
                    lost.append((losses[1:-1] - losses[0]) / (losses[-1] - losses[0]))
                    progress.append(one["times"][str(q)]["progress"][1:-1])
            cells = ["-"] * 2
            if lost:
                most = np.maximum(most, np.mean(lost, 0))
                cells = [" ".join(f"{v:.2f}" for v in np.mean(values, 0)) for values in (lost, progress)]
            rows.append([name, f"{q}", *cells, *(f"{v:.2f}" for v in np.mean(falls, 0))])
    rows.append(["most", "", " ".join(f"{v:.2f}" for v in most), "", "", ""])
    rows.append(["f^1.5", "", " ".join(f"{f**1.5:.2f}" for f in FRACTIONS), "", "", ""])
    fractions = " ".join(f"{f}" for f in FRACTIONS)
    head = ["task", "from", f"lost share, {fractions}", "share of progress", "fall", "forecast"]
    return table(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then report."""
    tasks = RATE_TASKS | FRESH_TASKS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda v: v.split(","), default=list(tasks), help="of " + ", ".join(tasks))
    parser.add_argument("--seeds", type=int, default=2, help="runs of a task (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where results lie (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, Any]]] = {}
    for name in args.tasks:
        for seed in range(args.seeds):
            file, began = args.out / f"forgone-{name}-{seed}.json", time.monotonic()
            if not file.exists():
                steps = tasks[name].steps * LONGER.get(name, DEFAULT)
                save(run(tasks[name], seed, steps, base_rate(name, "adam", args.out)), file)
                print(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
            runs.setdefault(name, []).append(json.loads(file.read_text(encoding="utf-8")))
    print(report(runs))


if __name__ == "__main__":
    main()

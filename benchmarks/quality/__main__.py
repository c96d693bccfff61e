"""What does freezing cost, in which order? Quality against the live fraction on eleven tasks.

    uv run --group bench python -m benchmarks.quality [--tasks boston,text] [--seeds 5] [--out DIR] [--quick]
                                                      [--only-report]

Leaves TASK-SEED.json in DIR as it goes, so that an interrupted command goes on where it stopped, and at the end
quality.md, quality.json and quality.png, of whatever is in DIR.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import torch

from benchmarks.quality import run, summary
from benchmarks.quality.tasks import TASKS, Task


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=lambda v: v.split(","), default=list(TASKS), help="of " + ", ".join(TASKS))
    parser.add_argument("--seeds", type=int, default=5, help="runs of a task, at most (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="where results lie (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two seeds, and no tasks but those trained together")
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"--tasks: {', '.join(sorted(unknown))} is none of {', '.join(TASKS)}")
    if args.quick:
        args.tasks, args.seeds = [name for name in args.tasks if TASKS[name].together], min(args.seeds, 2)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in range(0 if args.only_report else args.seeds):
        for name in args.tasks:
            if seed < TASKS[name].seeds:
                _complete(name, TASKS[name], seed, args.out)
    summary.report(summary.load(args.out, args.tasks, args.seeds), args.out)
    print((args.out / "quality.md").read_text(encoding="utf-8"))


def _complete(name: str, task: Task, seed: int, out: Path) -> None:
    file = out / f"{name}-{seed}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def save(figures: run.Figures) -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        part.replace(file)

    if set(run.orders(task)) - set(found.get("complete", ())):
        began = time.monotonic()
        run.run(task, seed, found, save)
        print(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()

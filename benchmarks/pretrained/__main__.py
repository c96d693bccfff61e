"""What is a freeze worth where a model is pre-trained? Quality, what is forgotten, bytes to ship, seconds, memory.

    uv run --group bench --group pretrained python -m benchmarks.pretrained [--tasks minilm,crepe] [--seeds 1]
                                                                            [--jobs 2] [--out DIR]

Each method is tuned on each task first: from the unfrozen run's best learning rate on, it goes up or down by factors of
four until the best on the validation data, with seed 0, lies between two that are worse; steps before a freeze have the
unfrozen run's. What is reported is the test data's, and the mean over seeds at that rate. Leaves a file for each run in
DIR: interrupted, the same command goes on where it stopped, and more seeds add to what is there.
"""

import argparse
import json
import logging
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.pretrained import report
from benchmarks.pretrained.run import over, run
from benchmarks.pretrained.tasks import TASKS_BY_NAME

VARIANTS: tuple[tuple[str, float], ...] = (
    ("recommended", 0.9), ("recommended", 0.99), ("recommended", 0.999),
    ("from_the_base", 0.9), ("from_the_base", 0.99), ("from_the_base", 0.999),
    ("probed", 0.99), ("random", 0.99), ("random_rows", 0.99), ("last_layers", 0.99), ("lora", 0.99), ("shira", 0.99),
)  # fmt: skip
"""What is compared with `full`."""
STEP = 4.0


def kept(name: str, method: str, fraction: float, lr: float, base: float, seed: int, out: Path) -> dict[str, Any]:
    """The run of that name in `out`, made now if it is not there."""
    file = out / f"{name}-{method}-{fraction}-{lr:.3g}-{seed}.json"
    if not file.exists():
        began = time.monotonic()
        receiving, sending = multiprocessing.Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(  # the data are there already
            target=lambda: sending.send(run(name, method, fraction, lr, base, seed))
        )
        child.start()
        sending.close()
        found = receiving.recv()  # EOFError, if the run has failed
        child.join()
        file.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
        file.with_suffix(".part").replace(file)
        print(f"{file.stem}: {time.monotonic() - began:.0f} s", flush=True)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def tuned(name: str, method: str, fraction: float, start: float, out: Path) -> float | None:
    """The learning rate of the best validation quality, with seed 0; None where a method has no setting."""
    sign = 1 if TASKS_BY_NAME[name].higher_is_better else -1
    found: dict[int, tuple[float, float]] = {}

    def at(i: int) -> tuple[float, float]:
        if i not in found:
            of = kept(name, method, fraction, start * STEP**i, start, 0, out)
            value, loss = of.get("val"), of.get("val_loss")
            found[i] = (-torch.inf, -torch.inf) if value is None or loss is None else (sign * value, -loss)
        return found[i]

    at(0)
    if "left_out" in kept(name, method, fraction, start, start, 0, out):
        return None
    best = 0
    while at(best + 1) > at(best):
        best += 1
    while at(best - 1) > at(best):
        best -= 1
    return start * STEP**best


def untuned(name: str) -> dict[str, float]:
    """The qualities of a network as it ships; a new head knows nothing."""
    task = TASKS_BY_NAME[name]
    data = task.data()
    torch.manual_seed(0)
    net: Any = task.make().eval()
    features = over(net, data.source, features=True)
    return {
        "test": float(task.quality(over(net, data.test[0]), data.test[1])),
        "kept": task.kept(features, features, data.source_y),
    }


def compare(name: str, seeds: int, out: Path, jobs: int) -> dict[str, list[dict[str, Any]]]:
    """All runs of a task at the rates that were found, by method and fraction."""
    task = TASKS_BY_NAME[name]
    task.data()
    base = tuned(name, "full", 0.0, task.lr, out)
    assert base is not None

    def all_of(variant: tuple[str, float]) -> list[dict[str, Any]]:
        method, fraction = variant
        lr = base if method == "full" else tuned(name, method, fraction, base, out)
        if lr is None:
            return [kept(name, method, fraction, base, base, 0, out)]
        return [kept(name, method, fraction, lr, base, seed, out) | {"lr": lr} for seed in range(seeds)]

    variants = (("full", 0.0), *VARIANTS)
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(all_of, variants))
    return {f"{method}@{fraction}": of for (method, fraction), of in zip(variants, runs, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(TASKS_BY_NAME)
    parser.add_argument("--tasks", type=lambda v: v.split(","), default=names, help="of " + ", ".join(names))
    parser.add_argument("--seeds", type=int, default=1, help="runs of each method (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("pretrained"), help="where results lie (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    found, before = {}, {}
    for name in args.tasks:
        before[name] = untuned(name)
        found[name] = compare(name, args.seeds, args.out, args.jobs)
        text = report.of_task(name, before[name], found[name])
        (args.out / f"{name}.md").write_text(text, encoding="utf-8")
        print(text, flush=True)
    text = report.headline(before, found)
    (args.out / "headline.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

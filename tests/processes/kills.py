"""SIGKILL at random moments around the writing of a checkpoint; the last complete one goes on to the bits of the end.

    uv run python -m tests.processes.kills --times 100 --seed 7

A child trains and saves after every step or two, before the freeze and after it. It says when it begins to save and
when it is done, and is killed some time after a beginning that was drawn. Then the run goes on from the last checkpoint
that can be read, or from nothing if there is none, and has to end as the unbroken run. Every other child writes its
files in place, so that a kill leaves half a file; the others as Lightning does, which renames complete ones.
"""

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_gcfreeze import GradCovFreezeCallback
from tests import cases
from tests.fuzz import large

T0, STEPS = 7, 18
BEGINS, ENDS = b"(", b")"


class InPlace(TorchCheckpointIO):
    """Writes into the file itself, as a plain `torch.save` does."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            torch.save(checkpoint, file)


class Announcing(ModelCheckpoint):
    """Says through a pipe when a checkpoint begins to be gathered and written, and when it is complete."""

    def __init__(self, folder: Path, every: int, pipe: int | None) -> None:
        super().__init__(folder, "{step}", auto_insert_metric_name=False, every_n_train_steps=every, save_top_k=-1)
        self.pipe = pipe

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if self.pipe is not None:
            os.write(self.pipe, BEGINS)
        super()._save_checkpoint(trainer, filepath)
        if self.pipe is not None:
            os.write(self.pipe, ENDS)


def train(
    folder: Path, every: int, in_place: bool, ckpt: Path | None = None, pipe: int | None = None
) -> dict[str, Any]:
    """A run up to its end: what it comes to."""
    torch.manual_seed(5)
    callback = GradCovFreezeCallback(t0=T0, k=0.5)
    module = cases.Regression(large(), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3))
    trainer = cases.trainer(
        callbacks=[callback, Announcing(folder, every, pipe)],
        max_epochs=3,
        enable_checkpointing=True,
        plugins=[InPlace()] if in_place else [],
    )
    trainer.fit(module, cases.ResumableLoader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    assert trainer.global_step == STEPS
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "callback": callback.state_dict(),
        "frozen": callback.frozen,
    }


def kill_a_child(folder: Path, every: int, in_place: bool, after: int, delay: float) -> bool:
    """Start a run as a child, and kill it `delay` seconds after it began with its `after`-th checkpoint.

    Returns:
        Whether it was saving when it died.
    """
    listening, telling = os.pipe()
    if not (child := os.fork()):
        try:
            train(folder, every, in_place, pipe=telling)
        finally:
            os._exit(0)
    os.close(telling)
    told = b""
    while told.count(BEGINS) < after:
        more = os.read(listening, 1)
        assert more, "the child ended by itself, before it had saved as often as it should"
        told += more
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(listening, 64):
        told += more
    os.close(listening)
    return told.count(BEGINS) > told.count(ENDS)


def last_complete(folder: Path) -> tuple[Path | None, int]:
    """The complete checkpoint with the most steps, and how many after it cannot be read."""
    found = sorted(folder.glob("*.ckpt"), key=lambda file: -int(file.stem))
    for incomplete, file in enumerate(found):
        try:
            torch.load(file, weights_only=True)
        except (RuntimeError, EOFError, OSError):
            continue
        return file, incomplete
    return None, len(found)


def run(times: int, seed: int) -> Counter[str]:
    """Kill so many children, each at a moment of its own; what they left."""
    draw, seen = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        unbroken = train(Path(scratch, "unbroken"), 1, False)
        assert any(mask.any() for mask in unbroken["frozen"].values())
        start = time.monotonic()
        cases.assert_identical(train(Path(scratch, "again"), 1, True), unbroken)
        a_step = (time.monotonic() - start) / STEPS  # with its checkpoint
        for i in range(times):
            folder, every, in_place = Path(scratch, str(i)), draw.choice([1, 2]), bool(i % 2)
            after = draw.randint(1, STEPS // every)
            saving = kill_a_child(folder, every, in_place, after, draw.uniform(0, a_step / 2))
            ckpt, incomplete = last_complete(folder)
            resumed = train(folder, every, in_place, ckpt=ckpt)
            cases.assert_identical(resumed, unbroken, f"kill {i} of seed {seed}, resumed from {ckpt and ckpt.name}: ")
            step = int(ckpt.stem) if ckpt else 0
            seen["resumed before t0" if step < T0 else "resumed after t0"] += 1
            seen["died while saving"] += saving
            seen["left half a file"] += bool(incomplete)
            seen["had nothing to resume from"] += ckpt is None
            seen["resumed to the bit"] += 1
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and fork no other threads
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    start = time.monotonic()
    seen = run(options.times, options.seed)
    print(f"seed {options.seed}: {options.times} kills in {time.monotonic() - start:.0f} s")
    for what, times in sorted(seen.items()):
        print(f"{times:6} {what}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

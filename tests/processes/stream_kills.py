"""SIGKILL at random moments to a training that streams, and to its follower; both end at the same bits and digest.

    uv run python -m tests.processes.stream_kills --times 50 --seed 7

A child trains, saves a checkpoint after every second step and publishes after every one; another follows and says what
it has. Each is killed at moments that were drawn, and started again: the training from its last checkpoint, the
follower from the base. At the end a follower that was never killed, one that starts only now, and the training agree.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_gcfreeze import Freezer, delta
from tests.fuzz import large

STEPS = 30


def trained(folder: Path) -> nn.Module:
    """Go on from the last checkpoint up to the end, publishing."""
    torch.manual_seed(3)
    model = large()
    masks = {name: torch.rand(p.shape) < 0.9 for name, p in model.named_parameters() if p.dim() > 1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    freezer = Freezer(model, optimizer, masks=masks, stream=delta.Stream(folder / "stream", every=1))
    checkpoint = folder / "checkpoint"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        freezer.load_state_dict(saved["freezer"])
    x = torch.linspace(-1, 1, 40).view(8, 5)
    while freezer.steps < STEPS:
        freezer.begin_batch(x)
        freezer.backward((model(x) - freezer.steps).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if freezer.steps % 2 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "freezer": freezer.state_dict()}
            torch.save(state, folder / "new")
            os.replace(folder / "new", checkpoint)
    freezer.close()
    return model


def follow(folder: Path) -> delta.Follower:
    """Follow until the last step is there."""
    torch.manual_seed(3)
    follower = delta.Follower(large(), folder / "stream")
    while follower.step != STEPS:
        if not follower.poll():
            time.sleep(0.002)
    return follower


def child(work: Callable[[Path], object], folder: Path) -> int:
    if not (pid := os.fork()):
        try:
            work(folder)
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def run(times: int, seed: int) -> Counter[str]:
    """So many kills, half of them of the training; what came of it."""
    draw, seen = random.Random(seed), Counter[str]()
    while seen["kills"] < times:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            torch.manual_seed(3)
            base, kept = delta.fingerprint(large()), delta.Follower(large(), folder / "stream")
            alive: dict[Callable[[Path], object], int] = {work: child(work, folder) for work in (trained, follow)}
            while alive:
                time.sleep(draw.uniform(0, 0.12))
                kept.poll()
                for work, pid in list(alive.items()):
                    if os.waitpid(pid, os.WNOHANG)[0]:
                        del alive[work]
                if alive and seen["kills"] < times and draw.random() < 0.5:
                    work = draw.choice(list(alive))
                    os.kill(alive[work], signal.SIGKILL)
                    os.waitpid(alive[work], 0)
                    seen["kills"] += 1
                    seen[f"of {work.__name__}"] += 1
                    alive[work] = child(work, folder)
            kept.poll()
            late = follow(folder)
            model = trained(folder)  # from the last checkpoint, which has the last step
            prints = set()
            for follower in (kept, late):
                with follower.tenants.use("stream") as served:
                    prints.add(delta.fingerprint(served))
                assert follower.tenants.verify() == base
            assert prints == {delta.fingerprint(model)} != {base}
            assert kept.digest == late.digest
            updates = delta.stream.Folder(folder / "stream").updates()
            assert list(updates) == list(range(len(updates)))
            assert not list((folder / "stream").glob(".*"))
            seen["runs that ended at the same bits"] += 1
            seen["updates"] += len(updates)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # and fork no other threads
    warnings.simplefilter("ignore")
    for what, times in sorted(run(options.times, options.seed).items()):
        print(f"{times:6} {what}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

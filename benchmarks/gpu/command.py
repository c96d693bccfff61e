"""What observing and freezing cost on a GPU: time, memory and the freeze itself, against the plain step.

    uv run --group bench python -m benchmarks.gpu [--minutes 9] [--tests] [--models ViT,GPT2] [--parts frozen,observed]
        [--json FILE] [--out FILE]
    uv run --group bench python -m benchmarks.gpu --tiny

A GPU works off a queue that the CPU fills, so steps are timed in bursts that end with a synchronization. Each round
times one burst of every way, in turn; the figure is the median of the rounds' ratios to the plain step with the same
optimizer: fused AdamW for ViT and GPT2, Adam for the others. "frozen" and "observed" are steps as those of
`benchmarks.frozen` and `benchmarks.observe`, "trainer" and "memory" are whole runs of Lightning's.

Parts, and in each the models, are in order of importance. What would begin after so many minutes is skipped, and named
at the end. Figures are written after each piece. With --tiny, all of it runs on very small models and the CPU, and the
exit status is 1 if anything fails.
"""

import argparse
import contextlib
import gc
import logging
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's lines on each start and stop

import torch

from benchmarks.gpu import models, parts
from benchmarks.gpu.record import TINY, Effort, Record
from benchmarks.gpu.timing import clear
from lightning_gcfreeze.freezing import blocks

ROOT = Path(__file__).parents[2]
PARTS = ("frozen", "observed", "selection", "memory", "trainer")


def run_tests(record: Record, path: Path = ROOT / "tests" / "test_gpu.py") -> None:
    """Run pytest on a file in a process of its own, for at most half of the time, and note what it says."""
    seconds = max(1.0, record.seconds_left() / 2)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", str(path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what the tests have started
        process.communicate()
        record.has_failed = True
        record.say(f"{path.name}: not finished in {seconds:.0f} s")
        return
    lines = output.strip().splitlines() or ["pytest says nothing"]
    record.has_failed |= process.returncode != 0
    record.say(f"{path.name}: {lines[-1].strip('= ')}")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            record.note(line)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what Lightning, torch and PEFT warn about in runs this short."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def collecting_fast() -> Iterator[None]:
    """Spare the garbage collector what is there already: it runs before each way, and would take half a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def on_a_small_scale() -> Iterator[None]:
    """On one thread, and with gradients in blocks however little that saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.multiple(blocks, MIN_SAVED_MACS=1, MAX_BLOCK_FRACTION=1.0):
            yield
    finally:
        torch.set_num_threads(threads)


def measure(record: Record, args: argparse.Namespace) -> None:
    fractions = [float(fraction) for fraction in args.fractions.split(",")]
    if args.tests:
        record.piece("tests", partial(run_tests, record))
    of_models = {"observed": parts.observed, "memory": parts.memory, "trainer": parts.in_trainer}
    for part in args.parts.split(","):
        for name in args.models.split(",") if part != "selection" else ():
            if part == "frozen":
                record.piece(f"frozen, {name}", partial(parts.frozen, record, name, fractions))
            else:
                record.piece(f"{part}, {name}", partial(of_models[part], record, name))
            clear()
        for size in map(int, args.sizes.split(",") if part == "selection" else ()):
            record.piece(f"selection, {size:.0e}", partial(parts.select, record, size))
            clear()


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="(%(default)s)")
    parser.add_argument("--models", default=",".join(models.DEFAULT), help="(%(default)s)")
    parser.add_argument("--fractions", default="0.9,0.99", help="of frozen elements (%(default)s)")
    parser.add_argument("--sizes", help="of selections (10000000,100000000,1000000000)")
    parser.add_argument("--minutes", type=float, default=9.0, help="after which nothing begins (%(default)s)")
    parser.add_argument("--tests", action="store_true", help="run tests/test_gpu.py first")
    parser.add_argument("--tiny", action="store_true", help="very small models on the CPU, to try this program")
    parser.add_argument("--device", help='"cpu" to try this program on the models themselves (cuda)')
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--out", type=Path, help="where to write the tables, in Markdown")
    args = parser.parse_args(argv)
    args.device = args.device or ("cpu" if args.tiny else "cuda")
    args.sizes = args.sizes or ("1000,10000" if args.tiny else "10000000,100000000,1000000000")
    for option, given, known in (("parts", args.parts, PARTS), ("models", args.models, [*models.MODELS])):
        if unknown := sorted({*given.split(",")} - {*known}):
            parser.error(f"--{option}: unknown {', '.join(unknown)}; there are {', '.join(known)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny tries everything on the CPU")
    return args


def head(args: argparse.Namespace, argv: Sequence[str], effort: Effort) -> list[str]:
    """Lines above the tables: the card, the versions, the command without the files it writes, the models."""
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    words = iter(argv)
    shown = []
    for word in words:
        if word in ("--json", "--out"):
            next(words, None)
        elif not word.startswith(("--json=", "--out=")):
            shown.append(word)
    command = shlex.join(["uv", "run", "--group", "bench", "python", "-m", "benchmarks.gpu", *shown])
    of_models = models.TINY if args.tiny else models.MODELS
    names = [(name, of_models[name]) for name in args.models.split(",")]
    return [
        f"{card}, torch {torch.__version__}, `{command}`",
        "",
        f"Medians of {effort.rounds} rounds, in a Trainer of {effort.timed[2]} runs.",
        "",
        *(f"- {name}: {model.description}; {model.n_parameters():,} parameters" for name, model in names),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    effort = TINY if args.tiny else Effort()
    with quietly(), collecting_fast(), on_a_small_scale() if args.tiny else contextlib.nullcontext():
        record = Record(
            models.TINY if args.tiny else models.MODELS, args.device, head(args, argv, effort), args.minutes, effort,
            args.json, args.out,
        )  # fmt: skip
        print("\n".join(record.head), flush=True)
        measure(record, args)
        record.write()
    print(record.text().removeprefix("\n".join(record.head)))
    return int(args.tiny and record.has_failed)

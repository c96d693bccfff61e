"""What is measured: steps that observe, steps once something is frozen, both in a Trainer, and the selection.

A part takes a record and the name of a model, and leaves figures in tables. Steps are timed in bursts that end with a
synchronization, of every way in turn; the figure is the median of the rounds' ratios to the plain step with the same
optimizer. What is frozen is lowest in an order after some steps on random batches.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.frozen import (
    Decision,
    FrozenPrefix,
    GradientMask,
    LoRA,
    NoOptimizer,
    Ours,
    Plain,
    SHiRA,
    scores_of,
    warm_up,
)
from benchmarks.gpu.models import OPTIMIZERS
from benchmarks.gpu.record import SKIPPED, Figures, Record
from benchmarks.gpu.timing import (
    MIB,
    allocated,
    alternated,
    built,
    clear,
    launches,
    peak,
    restart_peak,
    synchronize,
)
from benchmarks.memory import Trained
from benchmarks.observe import Batch, Empty, Step
from lightning_gcfreeze import GradCovFreezeCallback, orderings, selection
from lightning_gcfreeze._types import Named
from lightning_gcfreeze.gradients.batch import batch_gradients
from lightning_gcfreeze.observing import Observing


class ForProgress(Step):
    """A step that is observed for orders by progress, without gradients of single samples."""

    def __init__(self, model: nn.Module, batch: Batch, **options: Any) -> None:
        super().__init__(model, batch, **options)
        needs = orderings.needed_by(orderings.progress)
        self.statistics = Observing(self.parameters, needs=needs, reads_samples=False)
        self.steps = itertools.count(1)

    def __call__(self) -> None:
        self.training_step(self.batch, 0).backward()
        self.statistics.observe(next(self.steps), {}, batch_gradients(self.parameters), "1/t")
        self.optimizer.step()
        self.optimizer.zero_grad()


OBSERVED: dict[str, Callable[..., Any]] = {
    "plain": Step,
    "first sample": partial(Step, count=1),
    "first sample, by replay": partial(Step, count=1, how="replay"),
    "all samples": partial(Step, count=None),
    "for progress, no single samples": ForProgress,
}
"""Nothing is observed for an order by movement: it copies the parameters once."""
FROZEN: dict[str, tuple[str, Callable[..., Plain]]] = {
    "plain": ("movement", Plain),
    "no optimizer (a limit)": ("movement", NoOptimizer),
    "element": ("movement", partial(Ours, "element", "compact", True)),
    "element, skip_frozen_gradients=False": ("movement", partial(Ours, "element", "compact", False)),
    "element, by variance": ("variance", partial(Ours, "element", "compact", True)),
    "mixed": ("movement", partial(Ours, "mixed", "compact", True)),
    "row": ("movement", partial(Ours, "row", "compact", True)),
    "tensor": ("movement", partial(Ours, "tensor", "compact", True)),
    "gradient mask, torch.where": ("movement", GradientMask),
    "PEFT LoRA": ("movement", LoRA),
    "PEFT SHiRA": ("movement", SHiRA),
    "first layers frozen": ("movement", FrozenPrefix),
}
"""The order, and what makes a step."""
LAUNCHING = ("plain", "element", "element, skip_frozen_gradients=False", "mixed", "row", "PEFT LoRA")
"""The ways whose launches are counted."""
IN_TRAINER: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "a callback with empty hooks": None,
    "observe for movement": {"k": 0.5, "order": "movement"},
    "observe, first sample": {"k": 0.5},
    "observe, all samples, each 16th step": {"k": 0.5, "samples": "all", "every": 16},
    "frozen .9, element": {"k": 0.9, "order": "movement"},
    "frozen .9, mixed": {"k": 0.9, "order": "movement", "granularity": "mixed"},
    "frozen .9, row": {"k": 0.9, "order": "movement", "granularity": "row"},
    "frozen .9, tensor": {"k": 0.9, "order": "movement", "granularity": "tensor"},
    "frozen .9, element, by variance": {"k": 0.9},
    "frozen .99, element": {"k": 0.99, "order": "movement"},
    "frozen .99, mixed": {"k": 0.99, "order": "movement", "granularity": "mixed"},
}
IN_MEMORY: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "element": {"k": 0.9, "order": "movement"},
    "mixed": {"k": 0.9, "order": "movement", "granularity": "mixed"},
    "row": {"k": 0.9, "order": "movement", "granularity": "row"},
    "element, hold=restore": {"k": 0.9, "order": "movement", "hold": "restore"},
    "element, by variance": {"k": 0.9},
    "element, by variance, all samples": {"k": 0.9, "samples": "all"},
}
MOMENTS = ("observing", "the freeze", "frozen")


def frozen(record: Record, name: str, fractions: Sequence[float]) -> None:
    """Steps once a fraction is frozen: time, memory, what trains."""
    model, batch, scores = scored(record, name)
    optimizers = record.models[name].optimizers
    for fraction in fractions:
        decisions = {order: Decision(of_order, fraction) for order, of_order in scores.items()}
        for optimizer in optimizers if fraction == 0.9 else optimizers[-1:]:
            case = f"{name} f={fraction:g}, {optimizer}"
            record.piece(f"frozen, {case}", partial(frozen_once, record, case, model, batch, decisions, optimizer))
            clear()


def scored(record: Record, name: str) -> tuple[nn.Module, Batch, dict[str, dict[str, Tensor]]]:
    """A model that was observed for some steps, a batch, and its scores by order."""
    large = record.models[name].is_large
    model, data = record.models[name].trained_on(record.device)
    step = Step(model, data(), record.models[name].optimizer(), count=1 if large else None)
    warm_up(step, data, record.effort.warm_up)
    return model, step.batch, {order: scores_of(step, order) for order in ("movement", "variance")}


def frozen_once(
    record: Record, case: str, model: nn.Module, batch: Batch, decisions: dict[str, Decision], optimizer: str
) -> None:
    kind, fused = OPTIMIZERS[optimizer]
    makers = {
        way: partial(maker, decision=decisions[order], fused=fused, optimizer=kind)
        for way, (order, maker) in FROZEN.items()
    }
    where = f"frozen, {case}"
    steps, without, peaks = built(record, where, makers, model, batch)
    times = alternated(record, where, steps, FROZEN, without)
    record.keep("Frozen: step, as a ratio to plain, whose own is in ms", case, times)
    record.keep("Frozen: most memory in a step, the model's included, MiB", case, peaks)
    one = steps["plain"].state_bytes()
    state = without | {way: (its.state_bytes() + its.index_bytes()) / one for way, its in steps.items()}
    record.keep("Frozen: optimizer state and indices, as a ratio to plain, whose own is in MiB", case, {
        way: one / MIB if way == "plain" else state[way] for way in FROZEN
    })  # fmt: skip
    trained = without | {way: its.share for way, its in steps.items()}
    record.keep("Frozen: trained parameters, as a ratio to (1 - f) of all", case, {
        way: trained[way] for way in FROZEN if way != "plain"
    })  # fmt: skip
    kernels, waits = launches(record, where, {way: steps[way] for way in LAUNCHING if way in steps})
    record.keep("Frozen: kernels launched in a step", case, kernels)
    record.keep("Frozen: waits for the device in a step", case, waits)


def observed(record: Record, name: str) -> None:
    """Steps that are observed."""
    model, data = record.models[name].trained_on(record.device)
    optimizer = record.models[name].optimizer()
    makers = {way: partial(maker, optimizer=optimizer) for way, maker in OBSERVED.items()}
    where = f"observed, {name}"
    steps, without, peaks = built(record, where, makers, model, data())
    times = alternated(record, where, steps, OBSERVED, without)
    record.keep("Observed: step, as a ratio to plain, whose own is in ms", name, times)
    record.keep("Observed: most memory in a step, the model's included, MiB", name, peaks)
    kernels, waits = launches(record, where, steps)
    record.keep("Observed: kernels launched in a step", name, kernels)
    record.keep("Observed: waits for the device in a step", name, waits)


class Timed(pl.Callback):
    """The mean step between two, with nothing left in the queue at either."""

    def __init__(self, first: int, last: int) -> None:
        self.bounds, self.times = (first, last), list[float]()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.bounds:
            synchronize()
            self.times.append(time.perf_counter())

    def seconds(self) -> float:
        return (self.times[1] - self.times[0]) / (self.bounds[1] - self.bounds[0])


class Peaks(pl.Callback):
    """The most memory that is allocated in the steps up to t0, in step t0, and after it, in MiB."""

    def __init__(self, t0: int) -> None:
        self.t0, self.before = t0, allocated()
        self.found = dict.fromkeys(MOMENTS, 0.0)

    def on_train_batch_start(self, *args: Any) -> None:
        restart_peak()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = batch_idx + 1
        if step != self.t0 + 1:  # in which what is frozen is let go of
            when = MOMENTS[(step >= self.t0) + (step > self.t0)]
            self.found[when] = max(self.found[when], (peak() - self.before) / MIB)


def fit(record: Record, name: str, steps: int, *callbacks: pl.Callback) -> None:
    torch.manual_seed(0)
    model = record.models[name]
    x, y = model.data()
    trainer = pl.Trainer(
        accelerator="gpu" if record.device == "cuda" else "cpu", devices=1, max_steps=steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        precision="bf16-mixed" if model.is_large else "32-true", callbacks=list(callbacks),
    )  # fmt: skip
    batch = x.to(record.device), y.to(record.device)
    trainer.fit(Trained(model.make(), model.optimizer()), DataLoader([batch] * steps, batch_size=None))


def in_trainer(record: Record, name: str) -> None:
    """Of every 16th step as many as of the others; none of the timed ones compares capture with replay."""
    effort, where = record.effort, f"trainer, {name}"
    first, steps, runs = effort.timed_if_large if record.models[name].is_large else effort.timed
    times: dict[str, list[float]] = {way: [] for way in IN_TRAINER}
    found: Figures = {}
    for _ in range(runs):
        for way, arguments in IN_TRAINER.items():
            if record.is_late() or way in found:
                continue
            timed = Timed(first, first + steps)
            t0 = effort.t0 if way.startswith("frozen") else 10**6
            ours = [] if arguments is None else [GradCovFreezeCallback(t0, **arguments)]
            empty = [Empty()] if way == "a callback with empty hooks" else []
            try:
                fit(record, name, first + steps + 1, timed, *ours, *empty)
                times[way].append(timed.seconds())
            except Exception as error:
                found[way] = record.failure(f"{where}, {way}", error)
            clear()
    plain = times["plain"]
    ratios = {way: [t / one for t, one in zip(of_way, plain, strict=False)] for way, of_way in times.items()}
    found = {way: statistics.median(of_way) for way, of_way in ratios.items() if of_way} | found
    if plain:
        found["plain"] = 1000 * statistics.median(plain)
    keep_all(record, where, "Trainer: step, as a ratio to plain, whose own is in ms", name, IN_TRAINER, found)


def memory(record: Record, name: str) -> None:
    """Most memory of a Trainer's steps, by way and moment, beyond what was there before the model."""
    where = f"memory, {name}"
    found: dict[str, Figures] = {moment: {} for moment in MOMENTS}
    for way, arguments in IN_MEMORY.items():
        if record.is_late():
            break
        clear()
        peaks = Peaks(record.effort.t0)
        ours = [] if arguments is None else [GradCovFreezeCallback(record.effort.t0, **arguments)]
        try:
            fit(record, name, record.effort.memory, peaks, *ours)
            most: Figures = {**peaks.found}
        except Exception as error:
            most = dict.fromkeys(MOMENTS, record.failure(f"{where}, {way}", error))
        for moment in MOMENTS:
            found[moment][way] = most[moment]
    for moment, of_ways in found.items():
        keep_all(record, where, "Trainer: most memory in a step, MiB", f"{name}, {moment}", IN_MEMORY, of_ways)


def keep_all(
    record: Record, where: str, title: str, case: str, ways: dict[str, dict[str, Any] | None], found: Figures
) -> None:
    """Keep a figure of each way: those without one had no time."""
    if missing := [way for way in ways if way not in found]:
        note = f"{where}, {', '.join(missing)}"
        if not any(note in text for text in record.notes):
            record.skip(note)
    record.keep(title, case, {way: found.get(way, SKIPPED) for way in ways})


def lowest(scores: Named, k: int) -> Any:
    return selection.lowest_k(scores, k)


def by_sort(scores: Named, k: int) -> Any:
    return torch.cat([*scores.values()]).sort(stable=True)


def by_kthvalue(scores: Named, k: int) -> Any:
    return torch.cat([*scores.values()]).kthvalue(k)


SELECTIONS: dict[str, Callable[[Named, int], Any]] = {
    "selection.lowest_k": lowest,
    "torch.sort": by_sort,
    "torch.kthvalue": by_kthvalue,
}


def select(record: Record, size: int) -> None:
    """Time and peak extra memory of finding the lowest 90 % of scores in ten tensors."""
    scores = {f"w{i}": torch.rand(size // 10, device=record.device) for i in range(10)}
    few = {name: score[:1000] for name, score in scores.items()}
    times: Figures = {}
    memory: Figures = {}
    for way, run in SELECTIONS.items():
        if record.is_late():
            times[way] = memory[way] = record.skip(f"selection, {size:.0e}, {way}")
            continue
        try:
            run(few, 100)  # loads what there is to load
            clear()
            before = allocated()
            restart_peak()
            synchronize()
            start = time.perf_counter()
            run(scores, round(0.9 * size))
            synchronize()
            times[way] = 1000 * (time.perf_counter() - start)
            memory[way] = (peak() - before) / (4 * size)
        except Exception as error:
            times[way] = memory[way] = record.failure(f"selection, {size:.0e}, {way}", error)
    record.keep("Selection of the lowest .9: ms, by the number of scores", f"{size:.0e}", times)
    record.keep("Selection: peak extra memory, as a ratio to the scores'", f"{size:.0e}", memory)

"""Time, memory and launches of steps on a GPU. On a CPU memory and launches are 0."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.record import SKIPPED, Figures, Record
from benchmarks.observe import Batch

Steps = dict[str, Any]
"""By way; the first is "plain"."""
MIB = 2**20


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes of tensors now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def restart_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Most bytes of tensors since `restart_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def built(
    record: Record, where: str, makers: dict[str, Callable[..., Any]], model: nn.Module, batch: Batch
) -> tuple[Steps, Figures, Figures]:
    """Make a step of every way, each with a copy of the model, past its first runs.

    Returns:
        The steps; what the cells of the ways without one say; for all ways the peak of three steps in MiB, with the
        way's model and whatever else it keeps.
    """
    steps: Steps = {}
    without: Figures = {}
    peaks: Figures = {}
    for way, maker in makers.items():
        if steps and record.is_late():
            peaks[way] = without[way] = SKIPPED
            continue
        clear()
        before = allocated()
        try:
            step = maker(deepcopy(model).train(), batch)
            for _ in range(3):  # the first ones allocate, and compare
                step()
            gc.collect()
            restart_peak()
            for _ in range(3):
                step()
            peaks[way], steps[way] = (peak() - before) / MIB, step
        except Exception as error:
            if way == "plain":
                raise
            peaks[way] = without[way] = record.failure(f"{where}, {way}", error)
        step = None
    if SKIPPED in without.values():
        record.skip(f"{where}, {', '.join(way for way, why in without.items() if why == SKIPPED)}")
    return steps, without, peaks


def alternated(record: Record, where: str, steps: Steps, ways: Iterable[str], without: Figures) -> Figures:
    """Median ratio to "plain" of bursts, by way; "plain" in milliseconds, and the part of it that the CPU needs."""
    ratios: dict[str, list[float]] = {way: [] for way in steps}
    failed: Figures = {}

    def burst(way: str, length: int) -> tuple[float, float]:
        """Seconds of a step, and until it was queued."""
        synchronize()
        start = time.perf_counter()
        for _ in range(length):
            steps[way]()
        queued = time.perf_counter()
        synchronize()
        return (time.perf_counter() - start) / length, (queued - start) / length

    least = min(burst("plain", 3)[0] for _ in range(3))
    length = max(3, math.ceil(record.effort.burst / least))
    slow, plain, launching = dict[str, float](), list[float](), list[float]()
    for i in range(record.effort.rounds):
        if i and record.is_late():
            break
        for way in steps:
            try:
                if way in failed:
                    continue
                if not i and (alone := burst(way, 1)[0]) > 15 * least:
                    slow[way] = alone  # known well enough
                seconds, queued = (slow[way], 0.0) if way in slow else burst(way, length)
            except Exception as error:
                if way == "plain":
                    raise
                failed[way] = record.failure(f"{where}, {way}", error)
                continue
            if way == "plain":
                plain.append(seconds)
                launching.append(queued / seconds)
            ratios[way].append(seconds / plain[-1])
    found: Figures = {way: statistics.median(of_way) for way, of_way in ratios.items() if of_way}
    found |= without | failed
    found["plain"] = 1000 * statistics.median(plain)
    return {way: found[way] for way in ways} | {"plain, the CPU's part": statistics.median(launching)}


def launches(record: Record, where: str, steps: Steps) -> tuple[Figures, Figures]:
    """What steps ask of CUDA, by way: kernels launched, and waits for the device."""
    kernels: Figures = {}
    waits: Figures = {}
    for way, step in steps.items():
        if record.is_late():
            kernels[way] = waits[way] = SKIPPED
            continue
        try:
            with torch.profiler.profile() as profile:
                step()
                synchronize()
        except Exception as error:
            kernels[way] = waits[way] = record.failure(f"{where}, launches, {way}", error)
            continue
        counts = {event.key: event.count for event in profile.key_averages()}
        kernels[way] = float(sum(n for key, n in counts.items() if "LaunchKernel" in key))
        waits[way] = float(counts.get("cudaStreamSynchronize", 0))
    return kernels, waits

"""What a run of the command has found so far: figures in tables, what failed, and what there was no time for."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.models import Model

Figures = dict[str, float | str]
"""By way; words where there is no number."""
SKIPPED, OUT_OF_MEMORY, FAILED = "skipped", "out of memory", "fails"
COLUMNS = 6


@dataclass(frozen=True)
class Effort:
    """How much is done for a figure."""

    burst: float = 0.025  # seconds
    rounds: int = 5
    warm_up: int = 24  # observed steps before a freeze
    t0: int = 8  # in a Trainer
    timed: tuple[int, int, int] = (72, 48, 2)  # in a Trainer: steps before, timed steps, runs
    timed_if_large: tuple[int, int, int] = (40, 16, 2)
    memory: int = 20  # steps of which the memory is measured in a Trainer


TINY = Effort(burst=0.0, rounds=1, warm_up=4, t0=2, timed=(3, 1, 1), timed_if_large=(3, 1, 1), memory=4)


@dataclass
class Record:
    """The figures, as tables of cases and ways, written to files after each piece of work."""

    models: dict[str, Model]
    device: str
    head: Sequence[str]
    minutes: float
    effort: Effort = field(default_factory=Effort)
    json: Path | None = None
    markdown: Path | None = None
    tables: dict[str, dict[str, Figures]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    has_failed: bool = False
    start: float = field(default_factory=time.perf_counter)

    def seconds_left(self) -> float:
        return self.start + 60 * self.minutes - time.perf_counter()

    def is_late(self) -> bool:
        return self.seconds_left() <= 0

    def keep(self, table: str, case: str, figures: Figures) -> None:
        self.tables.setdefault(table, {}).setdefault(case, {}).update(figures)

    def say(self, text: str) -> None:
        """Add a line above the tables."""
        self.head = [*self.head, "", text]
        print(text, flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def failure(self, where: str, error: Exception) -> str:
        """Take down why something failed. Returns what its cells say."""
        self.has_failed = True
        is_memory = isinstance(error, torch.OutOfMemoryError)
        message = " ".join(str(error).split())[:200]
        self.note(f"{where}: {OUT_OF_MEMORY}" if is_memory else f"{where}: {type(error).__name__}: {message}")
        return OUT_OF_MEMORY if is_memory else FAILED

    def skip(self, where: str) -> str:
        """Take down that there was no time. Returns what the cells say."""
        self.note(f"{where}: skipped, {self.minutes:g} minutes were over")
        return SKIPPED

    def piece(self, where: str, do: Callable[[], None]) -> None:
        """Do a piece of work, if there is time, and write what was found."""
        if self.is_late():
            self.skip(where)
        else:
            try:
                do()
            except Exception as error:
                self.failure(where, error)
            print(f"{time.perf_counter() - self.start:.0f} s: {where}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        if self.json:
            self.json.write_text(json.dumps(self.tables | {"notes": self.notes}, indent=1), encoding="utf-8")
        if self.markdown:
            self.markdown.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """All tables, in Markdown."""
        blocks = ["\n".join(self.head)]
        for title, cases in self.tables.items():
            names = [*cases]
            parts = [names[i : i + COLUMNS] for i in range(0, len(names), COLUMNS)]
            blocks += [f"## {title}", *(table({name: cases[name] for name in part}) for part in parts)]
        if self.notes:
            blocks += ["## Failed or skipped", "\n".join(f"- {note}" for note in self.notes)]
        return "\n\n".join(blocks) + "\n"


def table(cases: dict[str, Figures]) -> str:
    """A column for each case, a row for each way of any."""
    ways = list(dict.fromkeys(way for figures in cases.values() for way in figures))

    def cell(value: float | str) -> str:
        if isinstance(value, str):
            return value
        return f"{value:.2f}" if value < 30 else f"{value:,.0f}"

    lines = [f"| | {' | '.join(cases)} |", f"| --- |{' --- |' * len(cases)}"]
    lines += [f"| {way} | {' | '.join(cell(figures.get(way, '')) for figures in cases.values())} |" for way in ways]
    return "\n".join(lines)

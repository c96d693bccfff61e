"""`Report`: what froze and what that is worth, as text and, in notebooks, as HTML."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import Protocol

import torch

from lightning_gcfreeze.reporting.groups import MAX_GROUPS, History, by_module, grouped, shortened_name

_WIDTH, _BAR = 100, 20  # characters


class Decided(Protocol):
    """What is told of a decision."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of whole parameters."""

    @property
    def fractions(self) -> Mapping[str, float]:
        """Frozen elements of each parameter / its elements."""

    @property
    def count(self) -> int:
        """The number of frozen elements."""

    @property
    def n_eligible(self) -> int:
        """The number of eligible elements."""


class Saved(Protocol):
    """What is told of savings."""

    @property
    def verdict(self) -> str:
        """What the freeze is worth, in a sentence or two."""

    @property
    def totals(self) -> Sequence[tuple[str, str]]:
        """What was saved, by what it is."""


@dataclass(frozen=True)
class Report:
    """What a run found out, to print or to let a notebook show: ``print(freeze.report())``."""

    title: str
    """The callback as it was made, and its state."""
    sentences: Sequence[str]
    """What happened, what is frozen, and what that saves, one after the other."""
    totals: Sequence[tuple[str, str]] = ()
    """What was saved, by what it is."""
    layers: Sequence[tuple[str, int, float]] = ()
    """(name, elements, frozen fraction) of each parameter, or of modules where there are many."""

    def __str__(self) -> str:
        """Return the report as text of several lines."""
        sentences = (line for sentence in self.sentences for line in wrap(sentence, _WIDTH))
        return "\n".join([*wrap(self.title, _WIDTH), "", *sentences, *self._totals(), *self._layers()])

    __repr__ = __str__

    def _totals(self) -> Iterator[str]:
        width = max((len(label) for label, _ in self.totals), default=0)
        yield from ["", *(f"{label:<{width}}  {text}" for label, text in self.totals)] if self.totals else ()

    def _layers(self) -> Iterator[str]:
        names = [shortened_name(name) for name, _, _ in self.layers]
        width = max([5, *map(len, names)])
        if self.layers:
            yield from ("", f"{'layer':<{width}}  {'elements':>13}  frozen")
        for name, (_, elements, fraction) in zip(names, self.layers, strict=True):
            bar = "█" * round(_BAR * fraction)
            yield f"{name:<{width}}  {elements:>13,}  {fraction:>6.1%}  {bar:·<{_BAR}}"

    def _repr_html_(self) -> str:
        """Return the report for a notebook: colours are those of its theme, and nothing is loaded from elsewhere."""
        paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in self.sentences)
        totals = "".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in self.totals)
        rows = "".join(
            f'<tr><td>{escape(name)}</td><td style="text-align:right">{elements:,}</td><td style="min-width:10em;'
            f'background:linear-gradient(90deg,#6baed680 {fraction:.1%},transparent {fraction:.1%})">{fraction:.1%}'
            "</td></tr>"
            for name, elements, fraction in self.layers
        )
        head = "<tr><th>layer</th><th>elements</th><th>frozen</th></tr>" if rows else ""
        tables = "".join(f"<table>{table}</table>" for table in (totals, head + rows) if table)
        return f"<div><p><b>{escape(self.title)}</b></p>{paragraphs}{tables}</div>"


def report(
    title: str,
    steps: int,
    decision: Decided,
    history: History,
    n_parameters: tuple[int, int, int],
    savings: Saved | None,
) -> Report:
    """Return what is frozen and what that saves.

    Args:
        title: of the report.
        steps: optimizer steps taken.
        decision: what is frozen.
        history: the stages, by parameter.
        n_parameters: elements that train now, that the optimizer was given, and that the module has; 0 if not known.
        savings: what was saved, if it is known.
    """
    stages = [f"{fraction:.1%} since step {step:,}" for step, fraction in _totals(history, decision.shapes)]
    if len(stages) > 5:
        stages[2:-2] = [f"… {len(stages) - 4} more stages …"]
    some = f"{decision.count:,} of {decision.n_eligible:,} eligible elements are frozen to the bit"
    sentences = [f"Optimizer steps: {steps:,}. {some if decision.count else 'Nothing is frozen'}: {', '.join(stages)}."]
    live, n_trained, n_all = n_parameters
    if n_all:
        others = "" if n_trained == n_all else f" that the optimizer was given; the module has {n_all:,}"
        still = f"still train ({live / max(1, n_trained):.1%})"
        sentences += [f"{live:,} of {n_trained:,} parameters {still}{others}."]
    by_layer = by_module(decision.shapes, MAX_GROUPS)
    fractions = grouped(decision.fractions, decision.shapes, MAX_GROUPS)
    return Report(
        title,
        (*sentences, *([savings.verdict] if savings else [])),
        tuple(savings.totals) if savings else (),
        tuple(
            (layer, sum(decision.shapes[name].numel() for name in members), fractions[layer])
            for layer, members in by_layer.items()
        ),
    )


def _totals(history: History, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[int, float]]:
    for step, fractions in history:
        yield from ((step, fraction) for fraction in grouped(fractions, shapes, 1).values())

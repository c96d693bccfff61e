"""`Report`: what froze and what that is worth, as text and, in notebooks, as HTML."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

_BAR = 20  # characters


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
        return "\n".join([self.title, "", *self.sentences, *self._totals(), *self._layers()])

    __repr__ = __str__

    def _totals(self) -> Iterator[str]:
        width = max((len(label) for label, _ in self.totals), default=0)
        yield from ["", *(f"{label:<{width}}  {text}" for label, text in self.totals)] if self.totals else ()

    def _layers(self) -> Iterator[str]:
        if self.layers:
            width = max(5, *(len(name) for name, _, _ in self.layers))
            yield from ("", f"{'layer':<{width}}  {'elements':>13}  frozen")
        for name, elements, fraction in self.layers:
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

"""Formulas as MathML, which browsers draw themselves: no script from elsewhere, and readable offline."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

# What the converter writes, and what a browser with a mathematical font needs: bars would grow with what follows them,
# and a tilde is a relation.
_MENDED = {
    "<mo>&#x0007C;</mo>": '<mo stretchy="false">|</mo>',
    "<mo>&#x02016;</mo>": '<mo stretchy="false">‖</mo>',
    "<mi>&#x0007E;</mi>": "<mo>\N{TILDE OPERATOR}</mo>",
}
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Replace what the Markdown extension marked as a formula. Called by MkDocs for each page."""

    def as_mathml(match: re.Match[str]) -> str:
        display = "inline" if match[2] == "(" else "block"
        formula = convert(unescape(match[3]).strip(), display=display)
        for written, mended in _MENDED.items():
            formula = formula.replace(written, mended)
        # A block keeps its element, in which a formula wider than the screen can scroll.
        return formula if display == "inline" else f'<div class="arithmatex">{formula}</div>'

    return _FORMULA.sub(as_mathml, html)

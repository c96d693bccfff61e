"""Formulas as MathML, which browsers draw themselves: no script from elsewhere, and readable offline."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Replace what the Markdown extension marked as a formula. Called by MkDocs for each page."""

    def as_mathml(match: re.Match[str]) -> str:
        display = "inline" if match[2] == "(" else "block"
        formula = convert(unescape(match[3]).strip(), display=display)
        # A block keeps its element, in which a formula wider than the screen can scroll.
        return formula if display == "inline" else f'<div class="arithmatex">{formula}</div>'

    return _FORMULA.sub(as_mathml, html)

"""Search: what the guide says before what the reference lists, and decisions last."""

from typing import Any

_BOOST = {"Guide": 3.0, "The related methods": 0.2, "Internals": 0.2}
"""Factors on the scores of pages, by the section of the navigation that they are in."""


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Weight a page that does not say ``search: boost`` itself. Called by MkDocs for each page."""
    factors = [_BOOST[section.title] for section in page.ancestors if section.title in _BOOST]
    page.meta.setdefault("search", {}).setdefault("boost", factors[0] if factors else 1.0)
    return markdown

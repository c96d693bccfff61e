"""Intervals in tables, such as ``0.69 [0.61, 0.78]``, break before their bracket and not within it."""

import re
from typing import Any

_CELL = re.compile(r"<td\b[^>]*>.*?</td>", re.DOTALL)
_INTERVAL = re.compile(r"\[([-+]?[\d.,]+), ([-+]?[\d.,]+)\]")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Put a no-break space into each interval of a table. Called by MkDocs for each page."""
    return _CELL.sub(lambda cell: _INTERVAL.sub("[\\1,\N{NO-BREAK SPACE}\\2]", cell[0]), html)

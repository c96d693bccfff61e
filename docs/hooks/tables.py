"""Tables that narrow screens can show: intervals stay whole, and cells of prose are marked for the style sheet."""

import re
from typing import Any

_CELL = re.compile(r"<td\b([^>]*>)(.*?)</td>", re.DOTALL)
_INTERVAL = re.compile(r"\[([-+]?[\d.,]+), ([-+]?[\d.,]+)\]")
_TAG = re.compile(r"<[^>]+>")
MIN_PROSE = 40  # characters of a cell that wants some width


def on_page_content(html: str, **kwargs: Any) -> str:
    """Let ``0.69 [0.61, 0.78]`` break before the bracket only, and mark long cells. Called by MkDocs for each page."""

    def mend(cell: re.Match[str]) -> str:
        text = _INTERVAL.sub("[\\1,\N{NO-BREAK SPACE}\\2]", cell[2])
        prose = ' class="prose"' if len(_TAG.sub("", text)) >= MIN_PROSE and "class=" not in cell[1] else ""
        return f"<td{prose}{cell[1]}{text}</td>"

    return _CELL.sub(mend, html)

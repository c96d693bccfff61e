"""The page "Changelog": CHANGELOG.md, which lies beside docs/ and links to its pages as ``docs/page.md``."""

from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """Put CHANGELOG.md in the place of docs/changelog.md. Called by MkDocs for each page."""
    if page.file.src_uri != "changelog.md":
        return markdown
    changelog = Path(config.config_file_path).with_name("CHANGELOG.md").read_text(encoding="utf-8")
    return changelog.replace("](docs/", "](")

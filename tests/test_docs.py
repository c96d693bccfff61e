"""Pages of docs/: a place for each public name, a group for each argument, a heading for what users search for."""

import importlib
import inspect
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import lightning_gcfreeze
from lightning_gcfreeze import GradCovFreezeCallback, delta, masks

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted(DOCS.glob("*.md"))  # neither the API nor decisions
GROUPS = ["Basics", "Automatic", "Observing", "Holding", "Reporting"]
SEARCHED = [
    "install", "unfreeze", "GPU", "OOM", "out of memory", "wandb", "MLflow", "notebook", "Colab", "progress bar",
    "early stopping", "citation", "Hugging Face", "Trainer", "Accelerate", "Fabric", "LoRA", "PEFT", "bitsandbytes",
    "resume", "checkpoint", "FSDP", "DeepSpeed", "BatchNorm", "learning rate", "t0", "torch.compile",
    "gradient clipping", "GAN", "Ray", "TensorBoard", "ONNX", "export",
]  # fmt: skip


def rendered() -> list[str]:
    """Return what the pages under docs/api/ show by ``::: name``."""
    pages = sorted((DOCS / "api").glob("*.md"))
    return [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)]


def named(path: str) -> Any:
    """Return the object of a dotted path, whose beginning is a module."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def sections(page: Path, level: int) -> dict[str, str]:
    """Return the text below each heading of a level, by heading."""
    _, *found = re.split(rf"^{'#' * level} (.*)\n", page.read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in (lightning_gcfreeze, delta, masks) for name in module.__all__],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_each_public_name_is_rendered_under_docs_api(module, name):
    same = [path for path in rendered() if path.rpartition(".")[2] == name]
    assert any(named(path) is getattr(module, name) for path in same)


def test_nothing_is_rendered_twice():
    assert [path for path, n in Counter(rendered()).items() if n > 1] == []


@pytest.mark.parametrize("name", lightning_gcfreeze.__all__)
def test_each_name_of_the_package_is_in_the_index_of_the_api(name):
    assert re.search(rf"^\| \[`{name}`\]\(", (DOCS / "api" / "index.md").read_text("utf-8"), re.MULTILINE)


def test_each_argument_is_in_one_of_five_groups_or_deprecated():
    found = sections(DOCS / "api" / "callback.md", 3)
    assert list(found) == [*GROUPS, "Deprecated"]
    in_tables = [name for group in GROUPS for name in re.findall(r"^\| `(\w+)`[ {].*\|", found[group], re.MULTILINE)]
    text = found["Deprecated"].partition(":::")[0]
    deprecated = {"promote", "max_t0", "max_loss_increase", "monitor"}
    assert all(f"`{name}`" in text for name in deprecated)
    arguments = [name for name in inspect.signature(GradCovFreezeCallback).parameters if name not in deprecated]
    assert sorted(in_tables) == sorted(arguments)


@pytest.mark.parametrize("words", SEARCHED)
def test_what_users_search_for_is_in_a_heading(words):
    """Search weighs a heading a thousand times as much as text."""
    texts = [re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE) for page in GUIDES]
    headings = [heading for text in texts for heading in re.findall(r"^#+ .*", text, re.MULTILINE)]
    assert any(re.search(rf"\b{re.escape(words)}(s|ation)?\b", heading, re.IGNORECASE) for heading in headings)

"""Tasks of the tenants: what is a text from the sources of a package, by its first words?

A tenant is a package that is installed with this project. All have the same four classes, docstrings of three kinds and
error messages, and equally many texts of each. Sources are parsed, not imported.
"""

import ast
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.tenants.encoder import KINDS, tokens

TRAIN, TEST = 64, 32  # texts of a class
LEAST = 30  # characters of a text

TENANTS = {
    "torchmetrics": "torchmetrics",
    "hypothesis": "hypothesis",
    "networkx": "networkx",
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "sklearn",
    "matplotlib": "matplotlib",
    "sympy": "sympy/physics",
    "torch": "torch/distributed",
    "lightning": "lightning",
    "timm": "timm",
    "fonttools": "fontTools",
}
"""The tenants that are reported, each with its package or a folder within; those that are read fastest come first."""

TUNING = {"hub": "huggingface_hub", "peft": "peft", "pytest": "_pytest"}
"""Those by which learning rates were chosen."""


class Split(NamedTuple):
    """Texts and their classes."""

    x: Tensor
    """Token numbers, (S, TOKENS) int64, 0 where there is none."""
    y: Tensor
    """Places in `KINDS`, (S,) int64."""


def splits(tenant: str) -> tuple[Split, Split]:
    """The training and the test texts of a tenant, the same in every call."""
    train, test = texts(tenant)
    return _split(train), _split(test)


@cache
def texts(tenant: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The training and the test texts of a tenant as (kind, text), the same in every call; none begin alike.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: it has too few texts.
    """
    found = sorted(set(sources((TENANTS | TUNING)[tenant])))
    beginnings = [tuple(row) for row in tokens([text for _, text in found]).tolist()]
    count = Counter(beginnings)
    draw = np.random.default_rng(0)
    train, test = list[tuple[str, str]](), list[tuple[str, str]]()
    for kind in KINDS:
        own = [pair for pair, row in zip(found, beginnings, strict=True) if pair[0] == kind and count[row] == 1]
        if len(own) < TRAIN + TEST:
            raise ValueError(f"{tenant} has {len(own)} texts of the kind {kind!r}, fewer than {TRAIN + TEST}.")
        chosen = [own[i] for i in draw.choice(len(own), TRAIN + TEST, replace=False)]
        train += chosen[:TRAIN]
        test += chosen[TRAIN:]
    return train, test


def sources(path: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of all texts in a package or a folder of one, without its tests."""
    for file in _files(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences
            tree = ast.parse(file.read_text(encoding="utf-8"))
        for parent in ast.walk(tree):
            for node in ast.iter_child_nodes(parent):
                kind, text = _text(node, parent)
                if text and len(text) >= LEAST:
                    yield kind, text


def _text(node: ast.AST, parent: ast.AST) -> tuple[str, str | None]:
    match node:
        case ast.ClassDef():
            return "class", ast.get_docstring(node)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return "method" if isinstance(parent, ast.ClassDef) else "function", ast.get_docstring(node)
        case ast.Raise(exc=ast.Call(args=[ast.Constant(value=str(message)), *_])):
            return "error", message
        case ast.Raise(exc=ast.Call(args=[ast.JoinedStr(values=parts), *_])):
            return "error", "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
    return "", None


def _files(path: str) -> list[Path]:
    package, *rest = path.split("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; a tenant's texts are its. Run `uv sync` first.")
    root = Path(spec.origin).parent.joinpath(*rest)
    return [file for file in sorted(root.rglob("*.py")) if not {"test", "tests"} & set(file.relative_to(root).parts)]


def _split(pairs: list[tuple[str, str]]) -> Split:
    return Split(tokens([text for _, text in pairs]), torch.tensor([KINDS.index(kind) for kind, _ in pairs]))

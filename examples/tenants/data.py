"""Tasks of the tenants: from which part of a package is a docstring, by its first words?

The docstrings are those of installed packages and of Python's library; sources are parsed, not imported. Every tenant
has equally many classes, and equally many docstrings of each.
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

from examples.tenants.encoder import tokens

TRAIN, TEST = 64, 32  # docstrings of a class
LEAST = 40  # characters of a docstring

TENANTS = {
    "numpy": ("numpy/lib", "numpy/_core", "numpy/polynomial", "numpy/ma"),
    "scipy": ("scipy/stats", "scipy/signal", "scipy/sparse", "scipy/optimize"),
    "sklearn": ("sklearn/ensemble", "sklearn/linear_model", "sklearn/metrics", "sklearn/preprocessing"),
    "torch": ("torch/nn", "torch/fx", "torch/onnx", "torch/cuda"),
    "lightning": ("lightning/pytorch/callbacks", "lightning/pytorch/core", "lightning/fabric",
                  "torchmetrics/functional"),
    "transformers": ("transformers/generation", "transformers/integrations", "transformers/pipelines",
                     "transformers/utils"),
    "timm": ("timm/models", "timm/layers", "timm/data", "timm/optim"),
    "matplotlib": ("matplotlib/axes", "matplotlib/backends", "matplotlib/patches", "matplotlib/transforms"),
    "images": ("PIL", "torchvision/models", "torchvision/datasets", "torchvision/transforms"),
    "sympy": ("sympy/polys", "sympy/physics", "sympy/combinatorics", "sympy/geometry"),
    "physics": ("sympy/physics/quantum", "sympy/physics/mechanics", "sympy/physics/control",
                "sympy/physics/continuum_mechanics"),
    "python": ("asyncio", "email", "importlib", "tkinter"),
}  # fmt: skip
"""The tenants that are reported, with their classes: folders or modules."""

TUNING = {
    "numerics": ("scipy/interpolate", "scipy/linalg", "scipy/special", "scipy/io"),
    "hub": ("huggingface_hub/utils", "huggingface_hub/cli", "huggingface_hub/hf_api", "huggingface_hub/inference"),
    "testing": ("hypothesis", "_pytest", "mypy", "unittest"),
}
"""Those by which learning rates were chosen."""


class Split(NamedTuple):
    """Docstrings of a tenant and their classes."""

    x: Tensor
    """Token numbers, (S, TOKENS) int64, 0 where there is none."""
    y: Tensor
    """(S,) int64, places in the tenant's tuple of classes."""


@cache
def splits(tenant: str) -> tuple[Split, Split]:
    """The training and the test docstrings of a tenant, the same ones in every call; none begin alike.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: a class has too few docstrings.
    """
    classes = (TENANTS | TUNING)[tenant]
    texts = [(text, y) for y, path in enumerate(classes) for text in sorted(set(docstrings(path)))]
    rows = tokens([text for text, _ in texts])
    beginnings = Counter(map(tuple, rows.tolist()))
    once = torch.tensor([beginnings[tuple(row)] == 1 for row in rows.tolist()])
    x, of = rows[once], torch.tensor([y for _, y in texts])[once]
    draw = np.random.default_rng(0)
    train, test = [], []
    for y, path in enumerate(classes):
        places = (of == y).nonzero().squeeze(1).numpy()
        if len(places) < TRAIN + TEST:
            raise ValueError(f"{path} has {len(places)} docstrings that begin unlike all others, not {TRAIN + TEST}.")
        chosen = torch.tensor(draw.choice(places, TRAIN + TEST, replace=False))
        train.append(chosen[:TRAIN])
        test.append(chosen[TRAIN:])
    return Split(x[torch.cat(train)], of[torch.cat(train)]), Split(x[torch.cat(test)], of[torch.cat(test)])


def docstrings(path: str) -> Iterator[str]:
    """The docstrings in a folder, without its tests, or in a module: of modules, classes and functions."""
    for file in _sources(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the packages' own, of escape sequences
            tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= LEAST:
                    yield text


def _sources(path: str) -> list[Path]:
    package, *rest = path.split("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed: its docstrings are a tenant's. Run `uv sync` first.")
    root = Path(spec.origin).parent.joinpath(*rest)
    found = sorted(root.rglob("*.py")) or [root.with_suffix(".py")]
    return [file for file in found if file.is_file() and not {"test", "tests"} & set(file.relative_to(root.parent).parts)]

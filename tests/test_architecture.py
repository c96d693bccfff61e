"""Imports point one way. Each rule is a function of a source tree, and is shown to find a planted violation."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "lightning_gcfreeze"
TESTS = Path(__file__).parent
SOURCE = TESTS.parent / PACKAGE

# A module imports from layers above it in this table, which know nothing of it, and from nothing beside or below. So
# arithmetic can be read and tested without modules, modules without phases, and everything without a Trainer.
LAYERS = (
    ("_types", "_checks"),  # shapes and arguments: no tensors are touched
    # gradients of several samples, the k-th of many numbers; which elements this process has, what it tells the others
    # who has code in a run, and what is probably not meant
    ("per_sample", "kth", "distributed", "gains", "gradient_access", "misconfiguration"),
    ("estimators", "orderings", "losses", "schedule"),  # the paper's formulas: tensors in, tensors out
    # what they apply to: modules, batches, layers, names, optimizers
    ("gradients", "samples", "rules", "selection", "settling", "growing"),
    # put together: a warm-up, a decision and its holding, a sample, tags
    ("phases", "freezing", "replay", "capture", "reporting", "savings", "delta", "plan"),
    # which of the two ways to g_1, of the two to constancy; what travels; sentences
    ("sample_gradients", "holding", "comm_hook", "refusals"),
    ("callback",),  # when each of it happens
    ("__init__",),  # public names
)
LAYER = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.py"))


def imported(path: Path, root: Path, package: str) -> Iterator[str]:
    """Absolute dotted names of all that a file imports, at any depth of its syntax tree, relative imports resolved."""
    inside = [*package.split("."), *path.relative_to(root).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = inside[: len(inside) + 1 - node.level] if node.level else []
            for alias in node.names:
                yield ".".join([*origin, *([node.module] if node.module else []), alias.name])


def against_the_layers(root: Path) -> list[str]:
    """Imports within the package that do not point to a lower layer, and modules without a layer.

    In a folder, `base` lies below its siblings, which do not know each other, and ``__init__`` above them.
    """
    modules = {path.relative_to(root).with_suffix("").parts for path in files(root)}
    found = [f"{'.'.join(module)} has no layer" for module in sorted(modules) if module[0] not in LAYER]
    for path in files(root):
        importer = path.relative_to(root).with_suffix("").parts
        for name in imported(path, root, PACKAGE):
            if name.split(".")[0] != PACKAGE:
                continue
            parts = name.split(".")[1:]
            target = parts[0] if parts and parts[0] in {module[0] for module in modules} else "__init__"
            if importer[0] == target and len(importer) > 1:
                allowed = importer[1] == "__init__" or parts[1:2] == ["base"] != [importer[1]]
            else:
                allowed = LAYER.get(target, 99) < LAYER.get(importer[0], -1)
            if not allowed:
                found.append(f"{'.'.join(importer)} imports {name}")
    return found


def lightning_outside_the_callback(root: Path) -> list[str]:
    """Imports of either of Lightning's packages, or their parts, anywhere but in callback.py."""
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in files(root)
        if path != root / "callback.py"
        for name in imported(path, root, PACKAGE)
        if name.split(".")[0] in LIGHTNING
    ]


def more_than_names(root: Path) -> list[str]:
    """Statements of an ``__init__.py`` that are neither docstring, import, ``__all__`` nor ``__version__``."""
    found = []
    for path in root.rglob("__init__.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__"):
                continue
            found.append(f"{path.relative_to(root)}: {ast.unparse(node)}")
    return found


def oracles_that_know_the_package(root: Path) -> list[str]:
    """Imports of the package in oracles, which would share its mistakes, or of tests that import it."""
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in files(root)
        for name in imported(path, root, "tests.oracles")
        if name.split(".")[0] == PACKAGE or (name.split(".")[0] == "tests" and name.split(".")[1:2] != ["oracles"])
    ]


RULES = {
    against_the_layers: SOURCE,
    lightning_outside_the_callback: SOURCE,
    more_than_names: SOURCE,
    oracles_that_know_the_package: TESTS / "oracles",
}


def copy_with(tree: Path, file: str, planted: str, folder: Path) -> Path:
    """A copy of a source tree, in one file of which something was added at the end."""
    root = folder / tree.name
    shutil.copytree(tree, root, ignore=shutil.ignore_patterns("__pycache__"))
    with (root / file).open("a", encoding="utf-8") as source:
        source.write(f"\n{planted}\n")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_holds(rule):
    """Nothing is found in the source tree, which is there."""
    assert len(files(RULES[rule])) > 1
    assert rule(RULES[rule]) == []


PLANTED = [
    (against_the_layers, "gains.py", "import lightning_gcfreeze.phases", "gains imports lightning_gcfreeze.phases"),
    (against_the_layers, "_types.py", "from . import gains", "_types imports lightning_gcfreeze.gains"),
    (
        against_the_layers,
        "samples.py",
        "def f():\n    from lightning_gcfreeze.gradients import of_batch",
        "samples imports lightning_gcfreeze.gradients.of_batch",
    ),
    (
        against_the_layers,
        "selection.py",
        "from lightning_gcfreeze import orderings, callback",
        "selection imports lightning_gcfreeze.callback",
    ),
    (
        against_the_layers,
        "reporting.py",
        "if TYPE_CHECKING:\n    from .phases import Frozen",
        "reporting imports lightning_gcfreeze.phases.Frozen",
    ),
    (
        against_the_layers,
        "callback.py",
        "from lightning_gcfreeze import GradCovFreezeCallback as Itself",
        "callback imports lightning_gcfreeze.GradCovFreezeCallback",
    ),
    (
        against_the_layers,
        "freezing/restore.py",
        "from ..phases import Frozen",
        "freezing.restore imports lightning_gcfreeze.phases.Frozen",
    ),
    (
        against_the_layers,
        "estimators/full.py",
        "from .diagonal import DiagonalCovariance",
        "estimators.full imports lightning_gcfreeze.estimators.diagonal.DiagonalCovariance",
    ),
    (
        against_the_layers,
        "estimators/base.py",
        "from lightning_gcfreeze.estimators import full",
        "estimators.base imports lightning_gcfreeze.estimators.full",
    ),
    (against_the_layers, "sharing.py", "", "sharing has no layer"),
    (
        lightning_outside_the_callback,
        "gradients.py",
        "import lightning.pytorch as pl",
        "gradients.py imports lightning.pytorch",
    ),
    (
        lightning_outside_the_callback,
        "freezing/restore.py",
        "def f():\n    from pytorch_lightning import Trainer",
        "freezing/restore.py imports pytorch_lightning.Trainer",
    ),
    (
        lightning_outside_the_callback,
        "__init__.py",
        "from lightning_utilities.core import apply_func",
        "__init__.py imports lightning_utilities.core.apply_func",
    ),
    (more_than_names, "__init__.py", "print('imported')", "__init__.py: print('imported')"),
    (more_than_names, "freezing/__init__.py", "registry = {}", "freezing/__init__.py: registry = {}"),
    (
        oracles_that_know_the_package,
        "recursion.py",
        "from lightning_gcfreeze.estimators import FullCovariance",
        "recursion.py imports lightning_gcfreeze.estimators.FullCovariance",
    ),
    (
        oracles_that_know_the_package,
        "recursion.py",
        "from tests import conformance",
        "recursion.py imports tests.conformance",
    ),
    (
        oracles_that_know_the_package,
        "recursion.py",
        "from ..cases import mlp",
        "recursion.py imports tests.cases.mlp",
    ),
]


@pytest.mark.parametrize(("rule", "file", "planted", "found"), PLANTED, ids=[found for *_, found in PLANTED])
def test_the_rule_finds_a_planted_violation(rule, file, planted, found, tmp_path):
    """In a copy of the tree to which one line was added, exactly this is found."""
    assert rule(copy_with(RULES[rule], file, planted, tmp_path)) == [found]


@pytest.mark.parametrize(
    ("rule", "file", "planted"),
    [
        (against_the_layers, "phases.py", "from . import selection"),
        (against_the_layers, "estimators/full.py", "from .base import zeros"),
        (lightning_outside_the_callback, "callback.py", "import pytorch_lightning"),
        (lightning_outside_the_callback, "gradients.py", "import torch.nn, lightningcss"),
        (oracles_that_know_the_package, "recursion.py", "from tests.oracles import recursion as itself"),
    ],
)
def test_the_rule_lets_the_rest_pass(rule, file, planted, tmp_path):
    """What points down, and names that only look alike, are no violations."""
    assert rule(copy_with(RULES[rule], file, planted, tmp_path)) == []

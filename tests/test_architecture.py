"""Imports point one way. Each rule is a function of a source tree, and is shown to find a planted violation."""

import ast
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = "lightning_gcfreeze"
TESTS = Path(__file__).parent
SOURCE = TESTS.parent / PACKAGE

# A module imports from layers above it in this table, and from nothing next to it or below. A folder has one layer for
# all of its modules, whose order is in `INSIDE`; names without a file are of modules to come.
LAYERS = (
    (
        "_types",
        "_checks",
        "_names",
        "_modules",
        "_torch",
        "_wrappers",
        "_aside",
        "_memory",
    ),  # no knowledge of the method
    ("_computed", "_masks"),
    ("distributed", "user_code", "misconfiguration"),  # which elements a process has; which code a run has
    ("estimators",),  # the paper's recursion: tensors in, tensors out
    # stages of the method, which do not know each other
    ("gradients", "orderings", "selection", "freezing", "planning", "delta", "reporting"),
    ("masks",),
    ("refusals", "shira", "options"),
    ("surroundings", "observing"),
    ("decision", "holding", "counting", "_format_5"),
    ("state", "probe"),
    ("stages",),
    ("run",),
    ("_lightning",),
    ("callback", "freezer", "probe_callback"),
    ("huggingface",),
    ("__init__",),  # public names
)
LAYER = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}
INSIDE = {
    "distributed": (("collectives",), ("shards",), ("comm_hook",)),
    "estimators": (
        ("gains", "scratch"),
        ("per_sample",),
        ("outer_products",),
        ("base",),
        ("diagonal", "full", "moments"),
    ),
    "gradients": (
        ("isolation", "batch", "momentum", "slicing", "choice"),
        ("layer_rules", "window"),
        ("replay", "capture"),
        ("comparison",),
        ("source",),
    ),
    "selection": (("radix", "units", "eligible"), ("lowest", "mixed")),
    "delta": (
        ("errors",),
        ("places",),
        ("files",),
        ("entries",),
        ("applying", "comparing", "inspecting"),
        ("tenants", "stream"),
        ("follower", "__main__"),
    ),
    "masks": (("files",), ("selections",), ("resolving",)),
    "planning": (
        ("losses", "schedule", "budget"),
        ("settling", "trend"),
        ("growing",),
        ("deprecated", "arguments"),
        ("plan",),
    ),
    "freezing": (
        ("optimizer_state", "fingerprints", "late"),
        ("restore", "live_vector", "state_dicts", "thawing", "blocks", "learning_rate"),
        ("compact", "savings", "skipping", "still_norms"),
        ("holder",),
    ),
    "reporting": (("groups",), ("images", "plots", "report"), ("board",)),
    "user_code": (("reached",), ("readers", "watch")),
    "refusals": (("checkpoints", "modules", "optimizers", "trainers"),),
    "huggingface": (("loss_shares", "checkpoints"), ("callback",)),
}
"""The layers of each folder's modules; its ``__init__`` is above them."""
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
MAX_LINES = 400
WITHOUT_TRAINER = ("run.py", "observing.py", "decision.py", "state.py", "stages.py", "holding.py", "options.py")


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


def layer_inside(folder: str, module: str) -> int:
    """The layer of a module in its folder; -1 if it has none."""
    layers = INSIDE.get(folder, ())
    return len(layers) if module == "__init__" else next((i for i, names in enumerate(layers) if module in names), -1)


def may_import(importer: tuple[str, ...], target: tuple[str, ...]) -> bool:
    """Whether an import points to a lower layer; `target` has the names after the package's."""
    if importer[0] == target[0] and len(importer) > 1:
        module = target[1] if len(target) > 1 else "__init__"
        return layer_inside(importer[0], module) < layer_inside(importer[0], importer[1])
    return LAYER.get(target[0], 99) < LAYER.get(importer[0], -1)


def against_the_layers(root: Path) -> list[str]:
    """Imports within the package that do not point to a lower layer, and modules without a layer."""
    modules = {path.relative_to(root).with_suffix("").parts for path in files(root)}
    tops = {module[0] for module in modules}
    found = [
        f"{'.'.join(module)} has no layer"
        for module in sorted(modules)
        if module[0] not in LAYER or (len(module) > 1 and layer_inside(*module) < 0)
    ]
    for path in files(root):
        importer = path.relative_to(root).with_suffix("").parts
        for name in imported(path, root, PACKAGE):
            if name.split(".")[0] != PACKAGE:
                continue
            parts = tuple(name.split(".")[1:])
            target = parts if parts and parts[0] in tops else ("__init__",)
            if len(target) > 1 and (target[0], target[1]) not in {module[:2] for module in modules}:
                target = (target[0], "__init__")  # a name of the folder's ``__init__``
            if not may_import(importer, target):
                found.append(f"{'.'.join(importer)} imports {name}")
    return found


def lightning_outside_its_files(root: Path) -> list[str]:
    """Imports of either of Lightning's packages, or their parts, but in the callbacks and _lightning.py."""
    return imports_outside(root, LIGHTNING, ("callback.py", "probe_callback.py", "_lightning.py"))


def transformers_outside_its_folder(root: Path) -> list[str]:
    """Imports of transformers or accelerate anywhere but in huggingface/."""
    inside = [path.relative_to(root).as_posix() for path in files(root / "huggingface")]
    return imports_outside(root, ("transformers", "accelerate"), inside)


def imports_outside(root: Path, packages: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """Imports of packages in other files than the allowed ones."""
    return [
        f"{path.relative_to(root)} imports {name}"
        for path in files(root)
        if path.relative_to(root).as_posix() not in allowed
        for name in imported(path, root, PACKAGE)
        if name.split(".")[0] in packages
    ]


def trainer_in_the_core(root: Path) -> list[str]:
    """Files that conduct a run and have an identifier with "trainer" in it: they serve plain loops, too."""
    found = []
    for path in (root / file for file in WITHOUT_TRAINER if (root / file).exists()):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
            found += [
                f"{path.name}:{getattr(node, 'lineno', 0)} knows {name}"
                for name in names
                if isinstance(name, str) and "trainer" in name.lower()
            ]
    return found


def longer_than_a_subject(root: Path) -> list[str]:
    """Files of more than 400 lines."""
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(root)}
    return [f"{path.relative_to(root)} has {count} lines" for path, count in counts.items() if count > MAX_LINES]


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
    lightning_outside_its_files: SOURCE,
    transformers_outside_its_folder: SOURCE,
    trainer_in_the_core: SOURCE,
    longer_than_a_subject: SOURCE,
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
    (against_the_layers, "_types.py", "from . import orderings", "_types imports lightning_gcfreeze.orderings"),
    (
        against_the_layers,
        "estimators/gains.py",
        "import lightning_gcfreeze.selection",
        "estimators.gains imports lightning_gcfreeze.selection",
    ),
    (
        against_the_layers,
        "orderings.py",
        "def f():\n    from lightning_gcfreeze.gradients.isolation import no_trace",
        "orderings imports lightning_gcfreeze.gradients.isolation.no_trace",
    ),
    (
        against_the_layers,
        "selection/lowest.py",
        "from lightning_gcfreeze import _checks, callback",
        "selection.lowest imports lightning_gcfreeze.callback",
    ),
    (
        against_the_layers,
        "reporting/board.py",
        "if TYPE_CHECKING:\n    from ..callback import GradCovFreezeCallback",
        "reporting.board imports lightning_gcfreeze.callback.GradCovFreezeCallback",
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
        "from ..planning import plan",
        "freezing.restore imports lightning_gcfreeze.planning.plan",
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
    (
        against_the_layers,
        "user_code/reached.py",
        "from lightning_gcfreeze.user_code.readers import weight_writers",
        "user_code.reached imports lightning_gcfreeze.user_code.readers.weight_writers",
    ),
    (against_the_layers, "sharing.py", "", "sharing has no layer"),
    (against_the_layers, "selection/sharing.py", "", "selection.sharing has no layer"),
    (
        lightning_outside_its_files,
        "gradients/isolation.py",
        "import lightning.pytorch as pl",
        "gradients/isolation.py imports lightning.pytorch",
    ),
    (
        lightning_outside_its_files,
        "freezing/restore.py",
        "def f():\n    from pytorch_lightning import Trainer",
        "freezing/restore.py imports pytorch_lightning.Trainer",
    ),
    (
        lightning_outside_its_files,
        "__init__.py",
        "from lightning_utilities.core import apply_func",
        "__init__.py imports lightning_utilities.core.apply_func",
    ),
    (
        transformers_outside_its_folder,
        "callback.py",
        "from transformers import TrainerCallback",
        "callback.py imports transformers.TrainerCallback",
    ),
    (
        longer_than_a_subject,
        "_types.py",
        "\n" * 400,
        f"_types.py has {len((SOURCE / '_types.py').read_text(encoding='utf-8').splitlines()) + 402} lines",
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
    ("file", "planted", "name"),
    [
        ("run.py", "def begin(trainer): ...", "trainer"),
        ("state.py", "steps = self._trainer.global_step", "_trainer"),
        ("decision.py", "from lightning.pytorch import Trainer", "Trainer"),
        ("observing.py", "x: pl.Trainer", "Trainer"),
    ],
)
def test_a_trainer_in_the_core_is_found(file, planted, name, tmp_path):
    """In a file of this name, whether the package has it yet or not; a word in a comment or string is none."""
    (tmp_path / file).write_text(f'"""No Trainer."""  # no trainer\n{planted}\n', encoding="utf-8")
    (tmp_path / "callback.py").write_text(planted, encoding="utf-8")
    assert trainer_in_the_core(tmp_path) == [f"{file}:2 knows {name}"]


@pytest.mark.parametrize(
    ("rule", "file", "planted"),
    [
        (against_the_layers, "planning/plan.py", "from lightning_gcfreeze.planning import losses"),
        (against_the_layers, "refusals/modules.py", "from .. import selection"),
        (against_the_layers, "estimators/full.py", "from .base import zeros"),
        (lightning_outside_its_files, "callback.py", "import pytorch_lightning"),
        (lightning_outside_its_files, "_lightning.py", "import lightning"),
        (lightning_outside_its_files, "gradients/isolation.py", "import torch.nn, lightningcss"),
        (transformers_outside_its_folder, "huggingface/loss_shares.py", "import transformers"),
        (oracles_that_know_the_package, "recursion.py", "from tests.oracles import recursion as itself"),
    ],
)
def test_the_rule_lets_the_rest_pass(rule, file, planted, tmp_path):
    """What points down, and names that only look alike, are no violations."""
    assert rule(copy_with(RULES[rule], file, planted, tmp_path)) == []

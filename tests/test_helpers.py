"""What tests share stands in modules of its own: no test module imports another one."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def imported_test_modules(root: Path) -> list[str]:
    """Return the imports of test modules in the files of a folder."""
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module or '.'}.{alias.name}" for alias in node.names]
            for name in names:
                parts = [part for part in name.split(".") if part.startswith("test_") and part != path.stem]
                if parts and (name.startswith(("tests", ".")) or (isinstance(node, ast.ImportFrom) and node.level)):
                    found.append(f"{path.relative_to(root)} imports {name}")
    return found


def test_no_test_module_imports_another():
    """Helpers stand in `cases`, `conformance`, `witnesses`, `interruptions` and the like."""
    assert imported_test_modules(TESTS) == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from tests.test_delta import of", "tests.test_delta.of"),
        ("from tests.callback import test_faults as faults", "tests.callback.test_faults"),
        ("def f():\n    import tests.callback.test_faults", "tests.callback.test_faults"),
        ("from .test_faults import run", "test_faults.run"),
    ],
)
def test_import_of_a_test_module_is_found(tmp_path, line, name):
    """Also within a function, and by a relative name."""
    (tmp_path / "test_new.py").write_text(f"from tests import cases\n{line}\n")
    assert imported_test_modules(tmp_path) == [f"test_new.py imports {name}"]

"""Imports follow the arrows of the pipeline, and training needs neither torch nor TVM."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pocktvm"
# Who may import what of ours, by the first part of the module path behind `pocktvm.`.
MAY_IMPORT = {
    "ir": {"errors", "ir"},
    "passes": {"errors", "ir", "passes", "reference"},
    "reference": {"errors", "registry", "ir", "reference", "tvm_api"},
    "memory": {"errors", "ir", "memory", "units"},
    "autodiff": {"errors", "registry", "ir", "autodiff", "tvm_api", "reference"},
    "frontend": {"errors", "registry", "ir", "frontend", "tvm_api", "models"},
    "schedule": {"errors", "registry", "files", "ir", "schedule", "tvm_api", "reference"},
    "models": {"errors", "models"},
    "targets": {"errors", "ir", "host", "units"},
    "runtime": {"errors", "ir", "runtime", "manifest", "units"},
}
TRAINING = "pocktvm.cli", "pocktvm.cli.run", "pocktvm.cli.evaluate", "pocktvm.data"


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "_targets" not in p.parts)


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, inside functions too, but not for type checkers."""
    names = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_along_the_arrows(room: str):
    files = [p for p in modules() if p.relative_to(PACKAGE).parts[0] in (room, f"{room}.py")]
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files
        for name in sorted(imported(path))
        if name.startswith("pocktvm.") and name.split(".")[1] not in MAY_IMPORT[room]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_tvm_api_names_tvm():
    """One file to mend when TVM moves a name."""
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in modules()
        if path.name != "tvm_api.py"
        for name in sorted(imported(path))
        if name.split(".")[0] in ("tvm", "tvm_ffi")
    ]
    assert not wrong, "\n".join(wrong)


def test_relative_imports_are_not_used():
    """The checks above read absolute names."""
    for path in modules():
        tree = ast.parse(path.read_text())
        assert not any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(tree)), path


@pytest.mark.parametrize("module", TRAINING)
def test_training_imports_neither_torch_nor_tvm(module: str):
    code = (
        f"import sys, {module}\n"
        "print([m for m in ('torch', 'tvm', 'tvm_ffi', 'ziglang', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

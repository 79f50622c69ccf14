"""The arrows between the folders of the package run one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "workflow/demo2eval"
COMMON = {"errors", "config", "cli", "fingerprint", "figures", "provenance", "robots"}
MAY_IMPORT = {
    "pi0": {"errors"},
    "maniskill": {"errors", "config", "robots"},
    "checkpoints": COMMON | {"pi0"},
    "data": COMMON | {"pi0", "maniskill", "checkpoints"},
    "training": COMMON | {"pi0", "maniskill", "checkpoints", "data"},
    "evaluation": COMMON | {"pi0", "maniskill", "checkpoints", "data"},
}


def imported_folders(folder: str) -> set[str]:
    """Return the modules and folders of the package that a folder's modules import."""
    found = set()
    for file in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found |= {name.split(".")[1] for name in names if name.startswith("demo2eval.")}
    return found - {folder}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_is_below_it(folder):
    assert imported_folders(folder) <= MAY_IMPORT[folder]

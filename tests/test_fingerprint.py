"""What counts as a change of code, tried on a copy of the package."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE_PARENT = Path(__file__).resolve().parents[1] / "workflow"
MODULE = "demo2eval.evaluation.success_table"


@pytest.fixture
def package(tmp_path):
    shutil.copytree(
        PACKAGE_PARENT / "demo2eval",
        tmp_path / "demo2eval",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path


def fingerprint(package: Path, module: str = MODULE) -> str:
    command = [sys.executable, "-m", "demo2eval.fingerprint", module]
    printed = subprocess.run(
        command, env={"PYTHONPATH": str(package)}, check=True, capture_output=True, text=True
    ).stdout
    return printed.split()[1]


def edit(package: Path, name: str, change):
    file = package / "demo2eval" / name
    file.write_text(change(file.read_text()))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text + "\n# a comment\n", id="comment"),
        pytest.param(lambda text: text.replace('"""', '"""Reworded. ', 1), id="docstring"),
        pytest.param(lambda text: text.replace("\n\n\n", "\n\n\n\n\n"), id="layout"),
        pytest.param(lambda text: text.replace('help="', 'help="in other words: '), id="help text"),
    ],
)
def test_words_and_layout_change_nothing(package, change):
    before = fingerprint(package)
    edit(package, "evaluation/success_table.py", change)
    assert fingerprint(package) == before


def test_an_edit_counts_and_restoring_undoes_it(package):
    before = fingerprint(package)
    edit(package, "evaluation/success_table.py", lambda text: text + "\nEDITED = 1\n")
    assert fingerprint(package) != before
    edit(package, "evaluation/success_table.py", lambda text: text.removesuffix("\nEDITED = 1\n"))
    assert fingerprint(package) == before


def test_an_imported_module_counts_and_another_does_not(package):
    module = "demo2eval.training.train"
    before = fingerprint(package, module)
    edit(package, "evaluation/success_table.py", lambda text: text + "\nEDITED = 1\n")
    assert fingerprint(package, module) == before
    edit(package, "training/state.py", lambda text: text + "\nEDITED = 1\n")
    assert fingerprint(package, module) != before


def test_bookkeeping_does_not_count(package):
    before = fingerprint(package)
    edit(package, "provenance.py", lambda text: text + "\nEDITED = 1\n")
    assert fingerprint(package) == before


def test_the_words_of_a_user_error_do_not_count(package):
    module = "demo2eval.checkpoints.policy_metadata"
    before = fingerprint(package, module)
    edit(
        package,
        "checkpoints/policy_metadata.py",
        lambda text: text.replace("was written by another version", "is of another version"),
    )
    assert fingerprint(package, module) == before

"""What the pages tell a user to type is there, and links lead somewhere."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "README.zh.md", "CONTRIBUTING.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"<run>": "quickstart", "<step>": "950"}
# What needs finished runs (test_workflow.py types it), or another machine's programs.
ELSEWHERE = (" report", "datasets.yaml", "--touch", "--unlock", "slurm", "benchmarks/")


def read_blocks(page: str) -> Iterator[str]:
    """Yield the indented blocks of a page."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"(?:^ {4}.*\n)+", text, re.MULTILINE):
        yield re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE)


def read_commands(page: str) -> list[list[str]]:
    """Return the commands of a page that a dry run can check, in words."""
    text = "\n".join(read_blocks(page)).replace("\\\n", "")
    text += "\n".join(re.findall(r"`(\.venv/bin/snakemake [^`]*)`", (ROOT / page).read_text()))
    for name, value in PLACEHOLDERS.items():
        text = text.replace(name, value)
    typed = dict.fromkeys(
        line
        for line in text.split("\n")
        if line.startswith((".venv/bin/snakemake", "snakemake", "make "))
        and not any(word in line for word in ELSEWHERE)
    )
    return [shlex.split(line) for line in typed]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if read_commands(page) and page != "README.zh.md"]
)
def test_commands_of_a_page_can_be_typed_in_a_fresh_clone(page, tmp_path, stackcube_demos):
    for name in ("workflow", "config", "envs"):
        ignored = shutil.ignore_patterns("__pycache__", ".venv")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("Snakefile", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "profiles").symlink_to("workflow/profiles")
    shutil.copytree(stackcube_demos.parent, tmp_path / "path/to")
    for block in read_blocks(page):
        if block.startswith("# my.yaml"):
            (tmp_path / "my.yaml").write_text(block)
    for program, *words in read_commands(page):
        if program == "make":
            command = ["make", "--dry-run", *words]
        else:
            command = [sys.executable, "-m", "snakemake", "--dry-run", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{program} {shlex.join(words)}\n{result.stdout[-2000:]}"


def test_both_readmes_type_the_same():
    chinese = read_commands("README.zh.md")
    assert len(chinese) > 3
    assert all(command in read_commands("README.md") for command in chinese)


@pytest.mark.parametrize("page", [*PAGES, "docs/results/README.md", "config/README.md"])
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text())
    for path, anchor in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {path}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page}: {path}#{anchor}"


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == version

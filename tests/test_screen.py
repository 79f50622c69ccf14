"""What a user sees of Snakemake: few words, and the reason why something failed."""

import subprocess
import sys

import pytest

from snakemake_logger_plugin_demo2eval import LONGEST, describe_failure, find_reason, strip_location

INPUT_FUNCTION = """InputFunctionException in rule train in file "rules/training.smk", line 36:
Error:
  WorkflowError:
    run 'mine' has no such thing.
Wildcards:
  run=mine
  step=5
Traceback:
  File "workflow/rules/common.smk", line 40, in wrapped"""

SNAKEFILE = """
rule good:
    output: "good.txt"
    log: "logs/good.log"
    shell: "echo fine > {output} 2> {log}"

rule bad:
    input: "good.txt"
    output: "bad.txt"
    log: "logs/bad.log"
    shell: "(echo 'loading'; echo 'demo2eval: error: it hurts.'; exit 1) > {log}"

def lacking(wildcards):
    raise WorkflowError("there is nothing here.")

rule wrong:
    input: lacking
    output: "wrong.txt"
"""


def test_an_error_of_the_workflow_is_its_sentence():
    assert strip_location(INPUT_FUNCTION) == "run 'mine' has no such thing."
    assert strip_location("SyntaxError in file x:\nhere") == "SyntaxError in file x:\nhere"
    missing = "Traceback (most recent call last):\n  File x\nFileNotFoundError: my.yaml\n"
    assert strip_location(missing) == "FileNotFoundError: my.yaml (--verbose shows where)"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("loading\ndemo2eval: error: a.h5 is damaged.\n", "a.h5 is damaged."),
        ("Traceback (most recent call last):\n  x\nValueError: 3\n", "ValueError: 3"),
        ("loading\n 40%|##\n", "it ended without a reason; it was killed, perhaps"),
        ("", "it ended without a reason"),
    ],
)
def test_the_reason_is_in_the_log(tmp_path, log, reason):
    file = tmp_path / "train.log"
    file.write_text(log)
    said = describe_failure("train", [str(file)])
    assert said.startswith(f"train failed: {reason}")
    assert said.endswith(f"\n  log: {file}")


def test_a_long_reason_keeps_its_end():
    said = find_reason(f"demo2eval: error: {'a.h5 is damaged; ' * 100}copy it again.")
    assert len(said) < LONGEST + 10
    assert said.endswith("copy it again.")


@pytest.fixture
def snakemake(tmp_path):
    """A function that runs Snakemake with the logger on a small workflow."""
    (tmp_path / "Snakefile").write_text(SNAKEFILE)

    def run(*words: str) -> list[str]:
        command = [sys.executable, "-m", "snakemake", *words]
        command += ["--cores", "1", "--logger", "demo2eval"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return (result.stdout + result.stderr).splitlines()

    return run


def test_a_line_per_job_and_a_sentence_for_one_that_fails(snakemake):
    said = [line[9:] if line[2:3] == ":" else line for line in snakemake("bad.txt")]
    assert said == [
        "2 jobs: 1 good, 1 bad",
        "good good.txt",
        "1 of 2 jobs done",
        "bad bad.txt",
        "bad failed: it hurts.",
        "  log: logs/bad.log",
    ]


def test_an_error_before_any_job_is_its_sentence(snakemake):
    assert snakemake("wrong.txt") == ["there is nothing here."]
    assert "Traceback:" in snakemake("wrong.txt", "--verbose")
    assert "rule good:" in snakemake("good.txt", "--dry-run")


def test_the_package_is_left_to_the_snakefile():
    """Which may lie in another checkout than the environment's."""
    code = "import sys, snakemake_logger_plugin_demo2eval; sys.exit('demo2eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

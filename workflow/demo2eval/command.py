"""From ManiSkill demonstrations to a success-rate table for Pi0.5.

A run is a name in the configuration, config/*.yaml or a file of your own beside the Snakefile.
`run` is Snakemake with the right options; Snakemake alone does the same.
"""

import argparse
import copy
import os
import shlex
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from demo2eval import doctor
from demo2eval.cli import report_errors
from demo2eval.errors import UserError

BASE_FILES = ("config/config.yaml", "config/quickstart.yaml")
"""What the Snakefile itself reads."""
RUN = """
Make a run's success table, and everything that it needs and that is stale:

    demo2eval run quickstart
    demo2eval run stackcube --dry-run            what would run, and why
    demo2eval run stackcube --cores 16
    demo2eval run quickstart --training.peak_lr 5e-4 --training.no-augment

The last one changes settings of the run, by the names of config/README.md, without a file. All
other options are Snakemake's (snakemake --help), which is started by the command that is printed.
The run is looked for in config/*.yaml and *.yaml; --configfile names other files.
"""
RUNS = """
List the runs of all configuration files: task, model, and how far each is. The last column is
what lies below results/. Whether that is stale, `demo2eval run NAME --dry-run` says.
"""
EXAMPLES = """
examples:
  demo2eval doctor                      what this machine has, and what that lets you do
  demo2eval run quickstart              a tiny Pi0.5 in minutes, without a GPU
  demo2eval run stackcube --dry-run     what a full-size run would do
  demo2eval validate demos/*.h5         whether your demonstrations are sound

`demo2eval COMMAND --help` says more.
"""
SNAKEMAKES = ("--cores", "-c", "--jobs", "-j", "--profile", "--workflow-profile", "--executor")
"""Options of Snakemake's that say how many jobs run at a time."""


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="demo2eval",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"demo2eval {metadata.version('demo2eval')}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands"
    )

    def add(name: str, summary: str, description: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=description is not None,
        )

    run = add("run", "make a run's success table, and what it needs", RUN)
    run.add_argument("name", metavar="RUN", help="its name in the configuration")
    run.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="settings; Snakemake's"
    )
    add("runs", "list the runs: task, model, state of the results", RUNS)
    for name, summary in (
        ("doctor", "say what this machine has, and what that lets you do"),
        ("convert", "turn Hugging Face safetensors into openpi's layout, and back"),
        ("validate", "look for everything that is wrong with trajectory files"),
    ):
        add(name, summary)
    arguments, rest = parser.parse_known_args()
    with report_errors():
        if arguments.command in ("convert", "validate", "doctor"):
            run_module(arguments.command, rest)
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        elif arguments.command == "run":
            run_snakemake(arguments.name, arguments.options)
        else:
            list_runs()


def run_module(command: str, words: Sequence[str]) -> None:
    """Become one of the commands that are modules of their own."""
    from importlib import import_module

    modules = {"convert": "checkpoints.huggingface", "validate": "data.validate"}
    sys.argv = [f"demo2eval {command}", *words]
    os.environ |= doctor.read_environment()
    import_module(f"demo2eval.{modules.get(command, command)}").main()


# Runs.


def read_files(names: Sequence[str | Path]) -> dict[str, Any]:
    """Return the configuration of some files, as Snakemake merges them.

    Raises:
        UserError: if a file does not exist or is no YAML.
    """
    from snakemake.utils import update_config

    merged: dict[str, Any] = {}
    for name in names:
        update_config(merged, copy.deepcopy(_read_file(Path(name))))
    return merged


@cache
def _read_file(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; give --configfile an existing file.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} is no YAML file: {' '.join(str(error).split())}.") from None
    return content if isinstance(content, dict) else {}


def find_folder() -> None:
    """Raise a UserError if this is not the folder of the workflow."""
    if not all(map(os.path.exists, ("Snakefile", *BASE_FILES))):
        raise UserError(
            f"{Path.cwd()} has no Snakefile of demo2eval with its config/; go to the folder of the "
            f"project first: cd {doctor.ROOT}"
        )


def find_run(name: str) -> list[str]:
    """Return the configuration files, besides those of the Snakefile, that a run is in.

    Raises:
        UserError: if it is in none, or in several.
    """
    files: list[str] = []
    runs = read_files(BASE_FILES)["runs"]
    missing = name
    while missing is not None and missing not in runs:
        found = [
            str(file)
            for file in sorted([*Path("config").glob("*.yaml"), *Path(".").glob("*.yaml")])
            if missing in _runs_of(file)
        ]
        if len(found) != 1:
            raise UserError(_not_one(missing, found))
        files = [*found, *files]
        runs = runs | _runs_of(Path(found[0]))
        chain = name
        while chain in runs:
            chain = (runs[chain] or {}).get("extends")
        missing = chain
    return files


def _runs_of(file: Path) -> dict[str, Any]:
    try:
        runs = read_files([file]).get("runs")
    except UserError:
        return {}
    return runs if isinstance(runs, dict) else {}


def _not_one(name: str, found: list[str]) -> str:
    from demo2eval.config import suggest

    if found:
        return f"run {name!r} is in {' and in '.join(found)}; name one: --configfile {found[0]}"
    known = {run for _, runs in all_runs() for run in runs}
    return (
        f"there is no run {name!r} in config/*.yaml or *.yaml.{suggest(name, known)} "
        "`demo2eval runs` lists all; --configfile names other files."
    )


def all_runs() -> list[tuple[str, dict[str, Any]]]:
    """Return (file, its runs) of all configuration files."""
    files = [*BASE_FILES, *sorted(map(str, Path("config").glob("*.yaml")))]
    files += sorted(map(str, Path(".").glob("*.yaml")))
    return [(file, runs) for file in dict.fromkeys(files) if (runs := _runs_of(Path(file)))]


def list_runs() -> None:
    """Print a table of all runs."""
    from demo2eval import config
    from demo2eval.results import describe_state

    find_folder()
    rows = []
    for file, names in all_runs():
        for name in names:
            try:
                files = [*BASE_FILES, *find_run(name)]
                content = read_files([*files, file] if file not in files else files)
                entries = config.Config.model_validate(content)
                run = config.resolve(entries, name)
            except (UserError, ValueError) as error:
                reason = str(error).splitlines()[0]
                rows.append({"run": name, "task": "", "model": "", "file": file, "results": reason})
                continue
            weights = "from scratch" if run.model.weights is None else run.model.weights
            rows.append(
                {
                    "run": name,
                    "task": run.task,
                    "model": f"{run.model.variant}, {weights}",
                    "file": file,
                    "results": describe_state(run),
                }
            )
    widths = {key: max(len(row[key]) for row in rows) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(value.ljust(widths[key]) for key, value in row.items()).rstrip())


# Snakemake.


def run_snakemake(name: str, words: Sequence[str]) -> None:
    """Become the Snakemake that makes a run's table."""
    find_folder()
    settings, options = split_settings(name, words)
    command = ["snakemake", f"results/{name}/success.csv"]
    if not any(word.split("=")[0] in SNAKEMAKES for word in options):
        command += ["--cores", str(len(os.sched_getaffinity(0)))]
    if not any(word.split("=")[0] in ("--configfile", "--configfiles") for word in options):
        files = find_run(name)
        command += ["--configfile", *files] if files else []
    command += options + settings
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.environ |= doctor.read_environment()
    os.execv(sys.executable, [sys.executable, "-m", *command])


def split_settings(name: str, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return settings of the run as Snakemake's --config takes them, and the other words.

    Raises:
        UserError: if a setting has no value.
    """
    from demo2eval.config import Sections

    keys_of = {name: type(section).model_fields for name, section in Sections()}
    changes: dict[str, dict[str, Any]] = {}
    others, waiting = [], [word for word in words if word != "--"]
    while waiting:
        word, equals, value = waiting.pop(0).partition("=")
        section, dot, key = word.removeprefix("--").partition(".")
        if not (word.startswith("--") and dot and section in keys_of):
            others.append(f"{word}{equals}{value}")
            continue
        field = keys_of[section].get(key.removeprefix("no-"))
        if field is not None and field.annotation is bool and not equals:
            key, value = key.removeprefix("no-"), str(not key.startswith("no-")).lower()
        elif not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"{word} has no value; give one: {word} VALUE")
            value = waiting.pop(0)
        changes.setdefault(section, {})[key] = value
    if not changes:
        return [], others
    sections = ", ".join(
        f"{section}: {{{', '.join(f'{key}: {value}' for key, value in keys.items())}}}"
        for section, keys in changes.items()
    )
    return ["--config", f"runs={{{name}: {{{sections}}}}}"], others


if __name__ == "__main__":
    main()

"""Publish a finished run: copy what a reader needs, and merge all its manifests into one file.

    .venv/bin/python benchmarks/collect_provenance.py results/<run> docs/results/<run>

In:  results/<run>, and what it was made from, below the same results/.
Out: success.csv, success.png and milestones.csv as they are;
     episodes.csv, the episodes of all rollouts, named in the column `evaluation`;
     action_errors.csv, likewise, where there are action errors;
     provenance.json, which leads from a checkpoint in success.csv to the seeds of the demos.

provenance.json holds the outputs of each stage by path. An output names its inputs by path and
digest, so the way from rollouts to demos is: rollout, train, image_cache, dataset,
replay, plan. What all outputs of a stage share stands once, above them. Files appear as a count
and their bytes, seeds as ranges. Copy a video by hand where a page shows it.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

from demo2eval.errors import UserError
from demo2eval.evaluation.provenance_page import to_ranges
from demo2eval.provenance import read_manifest

COPIED = ("success.csv", "success.png", "milestones.csv")
TABLES = {"rollout": "episodes.csv", "action_error": "action_errors.csv"}
LONGEST_LIST = 20
LINE_LENGTH = 100


def read_chain(run: Path) -> dict[str, dict]:
    """Return the manifests of a run's rollouts and action errors, and of all their inputs.

    Returns:
        {path: manifest}; paths begin with `results/`, as in the manifests.

    Raises:
        UserError: if one is missing, or was made again after something that was made from it.
    """
    results = run.absolute().parent
    first = [path for name in ("rollouts", "action_errors") for path in run.glob(f"{name}/*.json")]
    pending = sorted(str(path.absolute().relative_to(results.parent)) for path in first)
    chain: dict[str, dict] = {}
    while pending:
        path = pending.pop(0)
        chain[path] = read_manifest(results.parent / path)
        pending += [
            item
            for item in inputs_of(chain[path])
            # A user's own files and published weights have a digest, but no manifest.
            if item.startswith(f"{results.name}/") and item.endswith(".json") and item not in chain
        ]
    for path, manifest in chain.items():
        for item, digest in inputs_of(manifest).items():
            if item in chain and digest != chain[item]["digest"]:
                raise UserError(
                    f"{path} was made from another version of {item}; run the workflow again, "
                    f"or remove {path} if it is not part of the result."
                )
    return chain


def inputs_of(manifest: dict) -> dict[str, str]:
    """Return {path: digest} of all inputs of an output."""
    return {item["path"]: item["digest"] for items in manifest["inputs"].values() for item in items}


def shorten(name: str, value):
    """Return a value of a manifest's metadata: seeds as ranges, other long lists as extent."""
    if name == "seeds":
        return to_ranges(value)
    if isinstance(value, list) and len(value) > LONGEST_LIST:
        return {"count": len(value), "min": min(value), "max": max(value)}
    return value


def describe(manifest: dict) -> dict:
    """Return what provenance.json says about one output."""
    return {
        "digest": manifest["digest"],
        "code": manifest["code"],
        "settings": manifest["settings"],
        "inputs": {
            name: {item["path"]: item["digest"] for item in items}
            for name, items in manifest["inputs"].items()
        },
        "metadata": {name: shorten(name, value) for name, value in manifest["metadata"].items()},
        "outputs": len(manifest["outputs"]),
        "bytes": sum(file["bytes"] for file in manifest["outputs"].values()),
        "wall_time_s": manifest["wall_time_s"],
        "created": manifest["created"],
        "versions": manifest["versions"],
    }


def shared_items(mappings: list[dict]) -> dict:
    """Return the items that are equal in all mappings."""
    first, *others = mappings
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }


def merge_outputs(outputs: dict[str, dict]) -> dict:
    """Return the outputs of one stage below the code, versions and settings that all share."""
    settings = shared_items([output["settings"] for output in outputs.values()])
    shared = shared_items(
        [{key: output[key] for key in ("code", "versions")} for output in outputs.values()]
    )
    differing = {}
    for path, output in outputs.items():
        differing[path] = {key: value for key, value in output.items() if key not in shared}
        differing[path]["settings"] = {
            key: value for key, value in output["settings"].items() if key not in settings
        }
    return {**shared, "settings": settings, "outputs": differing}


def merge_manifests(chain: dict[str, dict]) -> dict:
    """Return {stage: its outputs}, from the result back to the demos, checkpoints by step."""
    stages: dict[str, dict] = {manifest["stage"]: {} for manifest in chain.values()}
    for path, manifest in sorted(chain.items(), key=step_and_path):
        stages[manifest["stage"]][path] = describe(manifest)
    return {stage: merge_outputs(outputs) for stage, outputs in stages.items()}


def step_and_path(item: tuple[str, dict]) -> tuple[int, str]:
    """Return the sorting key of a (path, manifest) pair."""
    path, manifest = item
    return manifest["metadata"].get("step", 0), path


def to_text(value, indent: int = 0) -> str:
    """Return JSON in which whatever fits into a line stands on one."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or not value or indent + len(line) <= LINE_LENGTH:
        return line
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {to_text(item, indent + 1)}" for key, item in value.items()]
    else:
        items = [to_text(item, indent + 1) for item in value]
    pad = "\n" + " " * indent
    return opening + pad + " " + f",{pad} ".join(items) + pad + closing


def merge_tables(chain: dict[str, dict], stage: str, base: Path, file: Path) -> None:
    """Write the tables of all rollouts, or of all action errors, below each other."""
    rows = []
    header: list[str] = []
    for path, manifest in sorted(chain.items(), key=step_and_path):
        if manifest["stage"] == stage:
            (table,) = manifest["outputs"]
            with open((base / path).parent / table, newline="") as source:
                header, *own = csv.reader(source)
            rows += [[Path(path).stem, manifest["metadata"]["step"], *row] for row in own]
    if rows:
        with open(file, "w", newline="") as target:
            writer = csv.writer(target, lineterminator="\n")
            writer.writerows([["evaluation", "step", *header], *rows])


def publish(run: Path, folder: Path) -> None:
    """Write the tables, the curve and provenance.json of a run into a folder.

    Raises:
        UserError: if the run is not finished, or its parts do not belong together.
    """
    if not (run / "success.csv").is_file():
        raise UserError(f"{run} has no success.csv; make it with snakemake, then publish it.")
    chain = read_chain(run)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    for stage, name in TABLES.items():
        merge_tables(chain, stage, run.absolute().parent.parent, folder / name)
    provenance = to_text({"run": run.name, "stages": merge_manifests(chain)})
    (folder / "provenance.json").write_text(provenance + "\n", encoding="utf-8")


def main() -> None:
    """Publish the run that is named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the run, results/<run>")
    parser.add_argument("folder", type=Path, help="folder to write, docs/results/<run>")
    arguments = parser.parse_args()
    try:
        publish(arguments.run, arguments.folder)
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

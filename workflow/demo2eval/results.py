"""What there is of a run below results/, in words: for the end of a run, and for a list of runs."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from demo2eval.config import ALL_DEMOS, Run
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest

LEFT_OUT_SHOWN = 3


def read_success(run: Run) -> list[dict[str, str]]:
    """Return the rows of a run's success.csv, a checkpoint each; none if there is no table."""
    try:
        with open(f"results/{run.name}/success.csv", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def describe_success(row: dict[str, str]) -> str:
    """Return a row of success.csv in words."""
    low, high = (f"{float(row[key]):.0%}" for key in ("ci_low", "ci_high"))
    return (
        f"{row['successes']} of {row['episodes']} episodes at step {row['step']} ({low} to {high})"
    )


def describe_state(run: Run) -> str:
    """Return how far a run is, in a few words. Whether it is stale, only Snakemake knows."""
    last = run.steps[-1]
    folder = Path("results", run.name)
    trained = [int(path.stem) for path in folder.glob("checkpoints/[0-9]*.json")]
    rows = read_success(run)
    if rows and int(rows[-1]["step"]) == last:
        return describe_success(rows[-1])
    if trained and max(trained) > 0:
        return f"trained {max(trained)} of {last} steps"
    if trained or (folder / "norm_stats/manifest.json").exists():
        return "has its dataset"
    return "-"


def closing_lines(run: Run, dataset: Path, shards: Iterable[Path]) -> Iterator[str]:
    """Yield what a user wants to know when a run has ended.

    Args:
        dataset: manifest of the run's dataset.
        shards: manifests of its imported and replayed shards.
    """
    folder = Path("results", run.name)
    rows = read_success(run)
    before = f"; {rows[0]['successes']} before training" if rows[0]["step"] == "0" else ""
    yield f"{run.name}: {describe_success(rows[-1])}{before}"
    yield f"  table  {folder}/success.csv"
    yield f"  curve  {folder}/success.png, of the loss {folder}/loss.png"
    yield f"  video  {folder}/videos/{rows[-1]['step']}.mp4"
    left_out = list(find_left_out(run, dataset, shards))
    yield from (f"  left out: {sentence}" for sentence in left_out[:LEFT_OUT_SHOWN])
    if len(left_out) > LEFT_OUT_SHOWN:
        yield f"  left out: {len(left_out) - LEFT_OUT_SHOWN} more; {dataset} and the logs name them"


def find_left_out(run: Run, dataset: Path, shards: Iterable[Path]) -> Iterator[str]:
    """Yield which demonstrations are not in a run's dataset, and why."""
    lost = 0
    for manifest in [*shards, dataset]:
        try:
            metadata = read_manifest(manifest)["metadata"]
        except UserError:  # removed, since nothing needs it any more
            continue
        for issue in metadata.get("skipped", []):
            yield f"{issue['file']} {issue['trajectory']}: {issue['reason']}"
        lost += len(metadata.get("lost_in_conversion", []))
        episodes = metadata.get("episodes", 0)
    if lost:
        yield f"{lost} that do not succeed any more in {run.replay.control_mode}"
    if episodes < run.demos.num_demos < ALL_DEMOS:
        yield f"the dataset has {episodes} of the {run.demos.num_demos} of demos.num_demos"

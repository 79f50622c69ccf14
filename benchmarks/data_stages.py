"""Print what each data stage took: a Markdown table from the manifests of finished runs.

    .venv/bin/python benchmarks/data_stages.py                 # the runs of config/datasets.yaml
    .venv/bin/python benchmarks/data_stages.py --runs small_stackcube

Nothing is measured here; config/datasets.yaml says how to make its runs. The script starts from a
run's norm stats and follows the inputs back to the dataset, the replayed demos and the demos.
Training caches are found by the digest of their dataset.

`time` is the sum of the wall times of all shards, which ran side by side as far as there were
cores. `from first to last` is the time between the first start and the last end, with whatever
else ran in between. A rate is that of one process; the rate of replay counts the images that came
into the dataset.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest

COLUMNS = (
    "run",
    "stage",
    "shards",
    "demos",
    "attempts",
    "frames",
    "images",
    "time, s",
    "from first to last, s",
    "rate",
    "size, MB",
)
TEXT_COLUMNS = 2
"""The first so many columns are text; the others are numbers."""


@dataclass(frozen=True)
class Stage:
    """All manifests of one stage of a run, and what they made.

    Attributes:
        rate_of: (count, unit) that the rate is of.
        demos: in the stage's result; None where the stage does not count them.
        attempts: of the planner.
        frames: control steps.
        images: of all cameras.
    """

    name: str
    manifests: list[dict]
    rate_of: tuple[int, str]
    demos: int | None = None
    attempts: int | None = None
    frames: int | None = None
    images: int | None = None

    @property
    def seconds(self) -> float:
        """Wall times of all manifests, added up."""
        return sum(manifest["wall_time_s"] for manifest in self.manifests)

    @property
    def span(self) -> float:
        """Seconds from the first start to the last end; ends are recorded to the second."""
        starts, ends = [], []
        for manifest in self.manifests:
            ends.append(datetime.fromisoformat(manifest["created"]).timestamp())
            starts.append(ends[-1] - manifest["wall_time_s"])
        return max(max(ends) - min(starts), self.seconds / len(self.manifests))

    @property
    def size(self) -> int:
        """Bytes of all outputs."""
        return sum(
            file["bytes"] for manifest in self.manifests for file in manifest["outputs"].values()
        )

    def format_row(self, run: str) -> list[str]:
        """Return the stage's row of the table, in the order of `COLUMNS`."""
        counts = [self.demos, self.attempts, self.frames, self.images]
        count, unit = self.rate_of
        return [
            run,
            self.name,
            str(len(self.manifests)),
            *("" if number is None else f"{number:,}" for number in counts),
            f"{self.seconds:,.1f}",
            f"{self.span:,.0f}",
            f"{count / max(self.seconds, 1e-3):,.2f} {unit}/s",
            f"{self.size / 1e6:,.1f}",
        ]


def read_inputs(manifests: Iterable[dict], name: str, base: Path) -> list[dict]:
    """Return the manifests that are the input `name` of others; paths are relative to `base`."""
    return [
        read_manifest(base / item["path"])
        for manifest in manifests
        for item in manifest["inputs"].get(name, [])
    ]


def sum_facts(manifests: list[dict], name: str) -> int | None:
    """Return the sum of a fact over manifests, None if one of them does not have it."""
    values = [manifest["metadata"].get(name) for manifest in manifests]
    return None if None in values else sum(values)


def read_stages(results: Path, run: str) -> list[Stage]:
    """Return the stages of a run from its demos to its image caches, as far as they exist.

    Raises:
        UserError: if the run has no norm stats, or one of their inputs is gone.
    """
    base = results.absolute().parent
    norm_stats = read_manifest(results / run / "norm_stats" / "manifest.json")
    (dataset,) = read_inputs([norm_stats], "dataset", base)
    replays = read_inputs([dataset], "replays", base)
    plans = read_inputs(replays, "demos", base)
    num_cameras = len(dataset["metadata"]["cameras"])
    episodes, frames = dataset["metadata"]["episodes"], dataset["metadata"]["frames"]
    images = dataset["metadata"]["images"] * num_cameras
    planned, replayed = (sum_facts(shards, "demos") for shards in (plans, replays))
    attempts, rows = sum_facts(plans, "attempts"), norm_stats["metadata"]["rows"]
    stages = [
        Stage(plans[0]["stage"], plans, (planned or 0, "demos"), planned, attempts),
        Stage("replay", replays, (images, "images"), replayed, frames=frames, images=images),
        Stage("dataset", [dataset], (frames, "frames"), episodes, frames=frames, images=images),
        Stage("norm_stats", [norm_stats], (rows, "rows"), episodes, frames=frames),
    ]
    for path in sorted(results.glob("image_caches/*/manifest.json")):
        cache = read_manifest(path)
        if cache["inputs"]["dataset"][0]["digest"] == dataset["digest"]:
            cached = cache["metadata"]["samples"] * num_cameras
            name = f"image_cache, {cache['settings']['image_size']} px"
            rate = (cached, "images")
            stages.append(Stage(name, [cache], rate, episodes, frames=frames, images=cached))
    return stages


def print_table(rows: list[list[str]]) -> None:
    """Print rows of cells, the first of them the header, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = [
        "-" * width if index < TEXT_COLUMNS else "-" * (width - 1) + ":"
        for index, width in enumerate(widths)
    ]
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            cell.ljust(width) if index < TEXT_COLUMNS else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    """Print the table of the runs that are named, or of all named datasets_..."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="where Snakemake put its results"
    )
    parser.add_argument("--runs", nargs="+", help="runs (default: those named datasets_...)")
    arguments = parser.parse_args()
    found = arguments.results.glob("datasets_*/norm_stats/manifest.json")
    runs = arguments.runs or sorted(path.parts[-3] for path in found)
    if not runs:
        raise SystemExit(
            f"{arguments.results} has no run named datasets_...; make those of "
            "config/datasets.yaml, or name others with --runs."
        )
    try:
        rows = [
            stage.format_row(run) for run in runs for stage in read_stages(arguments.results, run)
        ]
    except UserError as error:
        raise SystemExit(str(error)) from None
    print_table([list(COLUMNS), *rows])


if __name__ == "__main__":
    main()

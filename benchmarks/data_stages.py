"""What each stage took, from the manifests of runs that are there: a table in Markdown, a line for each stage of each run.

    .venv/bin/python benchmarks/data_stages.py                 # the runs of config/datasets.yaml, below results/
    python benchmarks/data_stages.py --runs small_stackcube

Nothing is measured here; config/datasets.yaml says how to make its runs. From a run's norm stats the way leads back over the inputs to
dataset, replays and demonstrations, and over the dataset's digest to its training caches. `time` adds up the wall times of all shards,
which ran side by side as far as there were cores; `from first to last` is the time between the stage's first beginning and its last end,
with whatever else ran between. A rate is that of one process; replay's is of the pictures that came into the dataset.
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
    "demonstrations",
    "attempts",
    "frames",
    "pictures",
    "time, s",
    "from first to last, s",
    "rate",
    "size, MB",
)


@dataclass(frozen=True)
class Stage:
    """All manifests of one stage of a run, and what they made.

    Attributes:
        demonstrations: in the stage's result; None where it does not count them.
        attempts: of the planner.
        frames: control steps.
        pictures: of all cameras.
        counted: (how many, of what) the rate is of.
    """

    name: str
    manifests: list[dict]
    counted: tuple[int, str]
    demonstrations: int | None = None
    attempts: int | None = None
    frames: int | None = None
    pictures: int | None = None

    @property
    def seconds(self) -> float:
        """Wall times of all manifests, added up."""
        return sum(manifest["wall_time_s"] for manifest in self.manifests)

    @property
    def span(self) -> float:
        """Seconds from the first beginning to the last end; ends are recorded to the second."""
        ends = [
            datetime.fromisoformat(manifest["created"]).timestamp() for manifest in self.manifests
        ]
        starts = [
            end - manifest["wall_time_s"]
            for end, manifest in zip(ends, self.manifests, strict=True)
        ]
        return max(ends) - min(starts)

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return sum(
            file["bytes"] for manifest in self.manifests for file in manifest["outputs"].values()
        )

    def cells(self, run: str) -> list[str]:
        """Return the stage's line of the table."""
        amount, unit = self.counted
        counts = [self.demonstrations, self.attempts, self.frames, self.pictures]
        shown = ["" if count is None else f"{count:,}" for count in counts]
        times = [
            f"{self.seconds:,.1f}",
            f"{max(self.span, self.seconds / len(self.manifests)):,.0f}",
        ]
        rate = f"{amount / max(self.seconds, 1e-3):,.2f} {unit}/s"
        return [
            run,
            self.name,
            str(len(self.manifests)),
            *shown,
            *times,
            rate,
            f"{self.size / 1e6:,.1f}",
        ]


def inputs(manifests: Iterable[dict], name: str, base: Path) -> list[dict]:
    """Return the manifests that some manifests name as their input; paths are as seen from `base`, where Snakemake ran."""
    return [
        read_manifest(base / item["path"])
        for manifest in manifests
        for item in manifest["inputs"].get(name, [])
    ]


def total(manifests: list[dict], fact: str) -> int | None:
    """Return the sum of a fact over manifests, None if any lacks it."""
    values = [manifest["metadata"].get(fact) for manifest in manifests]
    return None if None in values else sum(values)


def data_stages(results: Path, run: str) -> list[Stage]:
    """Return the stages of a run from its demonstrations to its training cache, as far as they are there.

    Raises:
        UserError: if the run has no norm stats, or something that they were made from is gone.
    """
    base = results.resolve().parent
    stats = read_manifest(results / run / "norm_stats" / "manifest.json")
    (made,) = inputs([stats], "dataset", base)
    replays = inputs([made], "replays", base)
    demos = inputs(replays, "demos", base)
    facts = made["metadata"]
    cameras, frames = len(made["settings"]["cameras"]), facts["frames"]
    pictures = facts["pictures"] * cameras
    stages = [
        Stage(
            demos[0]["stage"],
            demos,
            (total(demos, "demonstrations"), "demonstrations"),
            demonstrations=total(demos, "demonstrations"),
            attempts=total(demos, "attempts"),
        ),
        Stage(
            "replay",
            replays,
            (pictures, "pictures"),
            demonstrations=total(replays, "demonstrations"),
            frames=frames,
            pictures=pictures,
        ),
        Stage(
            "dataset",
            [made],
            (frames, "frames"),
            demonstrations=facts["episodes"],
            frames=frames,
            pictures=pictures,
        ),
        Stage(
            "norm_stats",
            [stats],
            (stats["metadata"]["rows"], "rows"),
            demonstrations=facts["episodes"],
            frames=frames,
        ),
    ]
    for path in sorted(results.glob("caches/*/manifest.json")):
        cache = read_manifest(path)
        if cache["inputs"]["dataset"][0]["digest"] == made["digest"]:
            looks = cache["metadata"]["looks"] * cameras
            name = f"training_cache, {cache['settings']['image_size']} px"
            stages.append(
                Stage(
                    name,
                    [cache],
                    (looks, "pictures"),
                    demonstrations=facts["episodes"],
                    frames=frames,
                    pictures=looks,
                )
            )
    return stages


def print_table(lines: list[list[str]]) -> None:
    """Print lines of cells as a table in Markdown."""
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("| " + " | ".join(cells) + " |")
        if number == 0:
            print(
                "|"
                + "|".join(
                    "-" * (width + 2) if index < 2 else "-" * (width + 1) + ":"
                    for index, width in enumerate(widths)
                )
                + "|"
            )


def main() -> None:
    """Print the table of all runs that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="where Snakemake put its results"
    )
    parser.add_argument(
        "--runs", nargs="+", help="names of runs (default: those named datasets_...)"
    )
    arguments = parser.parse_args()
    found = sorted(
        path.parts[-3] for path in arguments.results.glob("datasets_*/norm_stats/manifest.json")
    )
    runs = arguments.runs or found
    if not runs:
        raise SystemExit(
            f"{arguments.results} has no run named datasets_...; make those of config/datasets.yaml or name others with --runs."
        )
    try:
        print_table(
            [list(COLUMNS)]
            + [stage.cells(run) for run in runs for stage in data_stages(arguments.results, run)]
        )
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

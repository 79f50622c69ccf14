"""The success table and curve of a run.

In:  the manifests of the rollouts of its checkpoints, with episodes.csv in the folder beside each.
Out: success.csv, one row a checkpoint; stages.csv, how many episodes of a checkpoint came how far; and success.png.

success_once is the share of episodes in which the task was solved at some step, success_at_end at the last step; both with the bounds
of their 95 % Wilson interval. An episode's length is the number of actions until success was first seen, or all of them where it
never was. The wall time is that of the rollouts. A row of stages.csv counts the episodes whose furthest stage was that stage or a later
one, by the simulator's own state (`demo2eval.maniskill.milestones`), and those that ended their way there.
"""

import csv
import math
from pathlib import Path

import numpy as np

from demo2eval.cli import run, stage_parser
from demo2eval.errors import UserError
from demo2eval.maniskill.milestones import NOTHING
from demo2eval.maniskill.tasks import find_task
from demo2eval.provenance import read_manifest, write_atomic

Z95 = 1.959963984540054
COLUMNS = (
    "run",
    "step",
    "episodes",
    "successes",
    "success_once",
    "ci_low",
    "ci_high",
    "success_at_end",
    "at_end_ci_low",
    "at_end_ci_high",
    "mean_episode_length",
    "wall_time_s",
    "checkpoint",
    "dataset",
)
STAGE_COLUMNS = ("run", "step", "stage", "came_so_far", "and_no_further", "median_nearest_mm")


def wilson_interval(successes: int, episodes: int, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion (Wilson, 1927), both bounds in [0, 1].

    Args:
        z: quantile of the normal distribution; the default gives 95 %.
    """
    share = successes / episodes
    center = (share + z**2 / (2 * episodes)) / (1 + z**2 / episodes)
    half = (
        z
        / (1 + z**2 / episodes)
        * math.sqrt(share * (1 - share) / episodes + z**2 / (4 * episodes**2))
    )
    # At 0 and 1 the bounds are exact; rounding must not move them past the share.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == episodes else center + half
    return low, high


def read_episodes(manifest_file: Path) -> list[dict[str, str]]:
    """Return the rows of episodes.csv beside the manifest of rollouts."""
    path = manifest_file.with_suffix("") / "episodes.csv"
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; delete {manifest_file}, and its rule will run again."
        ) from None


def table_row(run_name: str, manifest_file: Path) -> dict:
    """Return the row of one checkpoint, from the manifest of its rollouts.

    Raises:
        UserError: if the episodes are missing or are not those of the manifest.
    """
    manifest = read_manifest(manifest_file)
    episodes = read_episodes(manifest_file)
    if len(episodes) != manifest["settings"]["episodes"]:
        raise UserError(
            f"episodes.csv beside {manifest_file} has {len(episodes)} episodes instead of {manifest['settings']['episodes']}; "
            "delete the manifest, and its rule will run again."
        )
    once = sum(int(row["success_once"]) for row in episodes)
    at_end = sum(int(row["success_at_end"]) for row in episodes)
    low, high = wilson_interval(once, len(episodes))
    end_low, end_high = wilson_interval(at_end, len(episodes))
    lengths = [int(row["first_success_step"] or row["steps"]) for row in episodes]
    return {
        "run": run_name,
        "step": manifest["metadata"]["step"],
        "episodes": len(episodes),
        "successes": once,
        "success_once": round(once / len(episodes), 4),
        "ci_low": round(low, 4),
        "ci_high": round(high, 4),
        "success_at_end": round(at_end / len(episodes), 4),
        "at_end_ci_low": round(end_low, 4),
        "at_end_ci_high": round(end_high, 4),
        "mean_episode_length": round(sum(lengths) / len(lengths), 2),
        "wall_time_s": manifest["wall_time_s"],
        "checkpoint": manifest["metadata"]["checkpoint"][:16],
        "dataset": manifest["metadata"]["dataset"][:16],
    }


def stage_rows(run_name: str, manifest_file: Path) -> list[dict]:
    """Return how far the episodes of one checkpoint came, a row for each stage of the task, in order.

    Where nobody stopped there, median_nearest_mm is empty; else it is the median, over those that did, of the smallest distance of the
    gripper from the object.
    """
    manifest, episodes = read_manifest(manifest_file), read_episodes(manifest_file)
    order = (NOTHING, *find_task(manifest["settings"]["task"]).stages)
    furthest = np.array([order.index(row["stage"]) for row in episodes])
    nearest = np.array([float(row["nearest_mm"]) for row in episodes])
    return [
        {
            "run": run_name,
            "step": manifest["metadata"]["step"],
            "stage": stage,
            "came_so_far": int((furthest >= index).sum()),
            "and_no_further": int((furthest == index).sum()),
            "median_nearest_mm": round(float(np.median(nearest[furthest == index])), 1)
            if (furthest == index).any()
            else "",
        }
        for index, stage in enumerate(order)
    ]


def write_table(file: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """Write a table as CSV, whole or not at all."""
    write_atomic(
        file,
        "\n".join(
            [",".join(columns), *(",".join(str(row[column]) for column in columns) for row in rows)]
        )
        + "\n",
    )


def success_table(
    run_name: str, rollouts: list[Path], table: Path, curve: Path, stages: Path
) -> list[dict]:
    """Write the tables and the curve of a run and return the rows of success.csv.

    Raises:
        UserError: if the checkpoints were not evaluated on the same seeds under the same settings.
    """
    kinds = {str(read_manifest(path)["settings"]): path for path in rollouts}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise UserError(
            f"{one} and {other} were evaluated under different settings; run their rules again before comparing them."
        )
    rows = sorted((table_row(run_name, path) for path in rollouts), key=lambda row: row["step"])
    draw_curve(rows, read_manifest(rollouts[0])["settings"], curve)
    in_order = sorted(rollouts, key=lambda path: read_manifest(path)["metadata"]["step"])
    write_table(
        stages, STAGE_COLUMNS, [row for path in in_order for row in stage_rows(run_name, path)]
    )
    write_table(table, COLUMNS, rows)
    return rows


def draw_curve(rows: list[dict], settings: dict, file: Path) -> None:
    """Draw success over training steps with its intervals; the untrained floor is a dotted line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    # Blue and vermilion of Okabe and Ito's colour-blind safe palette; marker and line tell the curves apart in grey as well.
    blue, vermilion = "#0072B2", "#D55E00"
    once, low, high, at_end = (
        np.array([100 * row[key] for row in rows])
        for key in ("success_once", "ci_low", "ci_high", "success_at_end")
    )
    axes.fill_between(steps, low, high, color=blue, alpha=0.15, linewidth=0)
    bars = [once - low, high - once]
    label = "success once, 95 % Wilson interval"
    curves = [
        axes.errorbar(
            steps, once, bars, fmt="o-", color=blue, capsize=3, elinewidth=1, label=label
        ),
        *axes.plot(steps, at_end, "s--", color=vermilion, markersize=4, label="success at end"),
    ]
    if steps[0] == 0:
        curves.append(
            axes.axhline(
                once[0], color="0.3", linestyle=":", linewidth=1.2, label="untrained, success once"
            )
        )
    axes.set(xlabel="training step", ylabel="successful episodes (%)", ylim=(-3, 103))
    axes.set_title(
        f"{rows[0]['run']}: {settings['task']}, {rows[0]['episodes']} episodes a checkpoint",
        fontsize=11,
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=curves, frameon=False, fontsize=9)
    figure.savefig(file, dpi=150, format="png", metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__)
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument(
        "--inputs", type=Path, nargs="+", required=True, help="manifests of rollouts"
    )
    parser.add_argument("--table", type=Path, required=True, help="success.csv to write")
    parser.add_argument("--curve", type=Path, required=True, help="success.png to write")
    parser.add_argument("--stages", type=Path, required=True, help="stages.csv to write")
    arguments = parser.parse_args()
    for row in success_table(
        arguments.run, arguments.inputs, arguments.table, arguments.curve, arguments.stages
    ):
        bounds = f"{row['ci_low']:.0%} to {row['ci_high']:.0%}"
        print(
            f"step {row['step']:>7}: {row['successes']}/{row['episodes']} succeed ({bounds}), at end {row['success_at_end']:.0%}"
        )


if __name__ == "__main__":
    run(main)

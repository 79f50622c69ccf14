"""The success table and curve of a run.

In:  the manifests of the rollouts of its checkpoints, with a CSV file of episodes beside each.
Out: success.csv, a row per checkpoint, and success.png, its curve; milestones.csv and .png, how far
     the episodes of each checkpoint came; provenance.html, what made the numbers.

success_once is the share of episodes in which the task was solved after some step, success_at_end
after the last; both with the bounds of their 95 % Wilson interval. An episode's length is the
number of actions until the first success, or all of them where there was none. The wall time is
that of the rollouts. A row of milestones.csv counts the episodes whose furthest milestone was
this one or a later one, and those that ended their way here.
"""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.evaluation.provenance_page import write_provenance_page
from demo2eval.evaluation.statistics import wilson_interval
from demo2eval.figures import BLUE, STYLES, VERMILION, draw_published, new_figure
from demo2eval.maniskill.milestones import NOTHING
from demo2eval.provenance import read_manifest, report_full_disk, verify_outputs, write_atomic

if TYPE_CHECKING:
    import pandas as pd


def make_success_table(
    run: str,
    rollouts: list[Path],
    *,
    published: dict[str, float] | None = None,
    table: Path,
    curve: Path,
    milestones: Path,
    milestone_curve: Path,
    provenance: Path,
) -> None:
    """Make the tables, the curves and the page of provenance of a run.

    Args:
        run: name of the run.
        rollouts: manifests of the rollouts of its checkpoints.
        published: success rates of others on the task, percent, for lines to compare with.
        table: success.csv to write.
        curve: success.png to write.
        milestones: milestones.csv to write.
        milestone_curve: milestones.png to write.
        provenance: provenance.html to write.

    Raises:
        UserError: if the checkpoints were not evaluated on the same seeds under the same
            settings, or a file is not what its manifest says.
    """
    import pandas as pd

    for path in rollouts:
        verify_outputs(path)
    manifests = {path: read_manifest(path) for path in rollouts}
    by_settings = {str(manifest["settings"]): path for path, manifest in manifests.items()}
    if len(by_settings) > 1:
        first, second = list(by_settings.values())[:2]
        raise UserError(
            f"{first} and {second} were evaluated under different settings; run their rules again "
            "before comparing them."
        )
    rows, milestone_rows = [], []
    for path, manifest in sorted(manifests.items(), key=lambda item: item[1]["metadata"]["step"]):
        episodes = pd.read_csv(path.with_suffix(".csv"))
        rows.append({"run": run} | summarize(episodes, manifest))
        names = manifest["settings"]["milestones"]["names"]
        milestone_rows += [
            {"run": run, "step": manifest["metadata"]["step"]} | row
            for row in count_milestones(episodes, [NOTHING, *names])
        ]
    success, reached = pd.DataFrame(rows), pd.DataFrame(milestone_rows)
    with report_full_disk(table.parent):
        draw_curve(success, manifests[rollouts[0]]["settings"]["task"], curve, published or {})
        draw_milestones(reached, len(episodes), milestone_curve)
        write_provenance_page(success, rollouts, provenance)
        for frame, path in ((reached, milestones), (success, table)):
            write_atomic(path, frame.to_csv(index=False, lineterminator="\n"))
    for row in rows:
        print(
            f"step {row['step']:>7}: {row['successes']}/{row['episodes']} succeed "
            f"({row['ci_low']:.0%} to {row['ci_high']:.0%}), at end {row['success_at_end']:.0%}"
        )


def summarize(episodes: "pd.DataFrame", manifest: dict) -> dict:
    """Return the row of a checkpoint in success.csv, without the run's name."""
    count = len(episodes)
    once, at_end = int(episodes.success_once.sum()), int(episodes.success_at_end.sum())
    low, high = wilson_interval(once, count)
    end_low, end_high = wilson_interval(at_end, count)
    return {
        "step": manifest["metadata"]["step"],
        "episodes": count,
        "successes": once,
        "success_once": round(once / count, 4),
        "ci_low": round(low, 4),
        "ci_high": round(high, 4),
        "success_at_end": round(at_end / count, 4),
        "at_end_ci_low": round(end_low, 4),
        "at_end_ci_high": round(end_high, 4),
        "mean_episode_length": round(
            float(episodes.first_success_step.fillna(episodes.steps).mean()), 2
        ),
        "wall_time_s": manifest["wall_time_s"],
        "checkpoint": manifest["metadata"]["checkpoint"][:16],
        "dataset": manifest["metadata"]["dataset"][:16],
    }


def count_milestones(episodes: "pd.DataFrame", names: list[str]) -> list[dict]:
    """Return how far episodes came, a row per milestone.

    median_nearest_mm is the median, over the episodes that came no further, of the smallest
    distance of the gripper from the object; None if there are none.
    """
    furthest = episodes.milestone.map(names.index)
    rows = []
    for index, name in enumerate(names):
        nearest = episodes.nearest_mm[furthest == index]
        rows.append(
            {
                "milestone": name,
                "reached": int((furthest >= index).sum()),
                "stopped": len(nearest),
                "median_nearest_mm": round(float(nearest.median()), 1) if len(nearest) else None,
            }
        )
    return rows


def draw_curve(rows: "pd.DataFrame", task: str, file: Path, published: dict[str, float]) -> None:
    """Draw success over training steps, with intervals; a dotted line is the untrained policy."""
    once, low, high = 100 * rows.success_once, 100 * rows.ci_low, 100 * rows.ci_high
    with new_figure(file, figsize=(6.4, 4.0)) as (_, axes):
        axes.fill_between(rows.step, low, high, color=BLUE, alpha=0.15, linewidth=0)
        curves = [
            axes.errorbar(
                rows.step,
                once,
                [once - low, high - once],
                fmt="o-",
                color=BLUE,
                capsize=3,
                elinewidth=1,
                label="success once, 95 % Wilson interval",
            ),
            *axes.plot(
                rows.step,
                100 * rows.success_at_end,
                "s--",
                color=VERMILION,
                markersize=4,
                label="success at end",
            ),
        ]
        if rows.step[0] == 0:
            label = "untrained, success once"
            style = {"color": "0.3", "linestyle": (0, (6, 3)), "linewidth": 1}
            curves.append(axes.axhline(once[0], label=label, **style))
        draw_published(axes, published)
        axes.set(xlabel="training step", ylabel="successful episodes (%)", ylim=(-3, 103))
        title = f"{rows.run[0]}: {task}, {rows.episodes[0]} episodes per checkpoint"
        axes.set_title(title, fontsize=11)
        axes.legend(handles=curves, frameon=False, fontsize=9)


def draw_milestones(rows: "pd.DataFrame", episodes: int, file: Path) -> None:
    """Draw for each milestone the share of episodes that reached it, over training steps.

    Args:
        rows: of milestones.csv.
        episodes: of each checkpoint.
    """
    with new_figure(file, figsize=(6.4, 4.0)) as (_, axes):
        milestones = rows[rows.milestone != NOTHING].groupby("milestone", sort=False)
        for index, ((name, reached), style) in enumerate(
            zip(milestones, cycle(STYLES), strict=False)
        ):
            # Where milestones coincide, each marker is seen inside the one before.
            marker = {"fillstyle": "none", "markersize": max(12 - 2 * index, 4)}
            axes.plot(reached.step, 100 * reached.reached / episodes, label=name, **marker, **style)
        axes.set(xlabel="training step", ylabel="episodes that reached it (%)", ylim=(-3, 103))
        axes.set_title(f"{rows.run[0]}: milestones of {episodes} episodes", fontsize=11)
        axes.legend(frameon=False, fontsize=9, handlelength=4)


if __name__ == "__main__":
    run(make_success_table)

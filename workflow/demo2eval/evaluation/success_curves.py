"""The success of several runs in one figure, a panel for each task.

In:  success.csv of each run.
Out: success_curves.csv, the rows of all; success_curves.png.
"""

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from demo2eval.cli import run
from demo2eval.figures import STYLES, draw_published, new_figure
from demo2eval.provenance import write_atomic

if TYPE_CHECKING:
    import pandas as pd


def make_success_curves(
    tables: list[Path],
    *,
    tasks: dict[str, str],
    published: dict[str, dict[str, float]] | None = None,
    table: Path,
    curves: Path,
) -> None:
    """Join the success tables of runs, and draw them.

    Args:
        tables: success.csv of each run.
        tasks: {run: task}.
        published: {task: {name: success rate of others, percent}}.
        table: success_curves.csv to write.
        curves: success_curves.png to write.
    """
    import pandas as pd

    rows = pd.concat([pd.read_csv(path) for path in tables], ignore_index=True)
    rows.insert(1, "task", rows.run.map(tasks))
    draw_curves(rows, published or {}, curves)
    write_atomic(table, rows.to_csv(index=False, lineterminator="\n"))


def draw_curves(rows: "pd.DataFrame", published: dict[str, dict[str, float]], file: Path) -> None:
    """Draw success once over training steps, a curve per run, with 95 % Wilson intervals."""
    by_task = rows.groupby("task", sort=False)
    size = {"figsize": (7.2, 0.6 + 3.4 * len(by_task)), "nrows": len(by_task), "squeeze": False}
    with new_figure(file, **size) as (_, axes):
        for (task, of_task), panel in zip(by_task, axes[:, 0], strict=True):
            of_runs = of_task.groupby("run", sort=False)
            for (name, curve), style in zip(of_runs, cycle(STYLES), strict=False):
                once = 100 * curve.success_once
                panel.errorbar(
                    curve.step,
                    once,
                    [once - 100 * curve.ci_low, 100 * curve.ci_high - once],
                    label=f"{name}, {curve.episodes.iloc[0]} episodes",
                    capsize=3,
                    elinewidth=1,
                    markersize=5,
                    **style,
                )
            draw_published(panel, published.get(str(task), {}))
            panel.set(xlabel="training step", ylabel="success once (%)", ylim=(-3, 103))
            panel.set_title(f"{task}, 95 % Wilson intervals", fontsize=11)
            panel.legend(frameon=False, fontsize=9, handlelength=4)


if __name__ == "__main__":
    run(make_success_curves)

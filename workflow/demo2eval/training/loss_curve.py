"""The metrics of a whole training, and their curve.

In:  metrics.csv of each checkpoint, in the order of their steps.
Out: metrics.csv, a row for each step, and loss.png: loss, gradient norm and learning rate.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.provenance import report_full_disk, verify_outputs, write_atomic

if TYPE_CHECKING:
    import pandas as pd

NUM_WINDOWS = 100
"""The mean line averages this part of all steps."""


def make_loss_curve(run: str, metrics: list[Path], *, table: Path, curve: Path) -> None:
    """Join the metrics of a training's segments, and draw them.

    Args:
        run: name of the run.
        metrics: metrics.csv of each checkpoint, in the order of their steps.
        table: metrics.csv to write.
        curve: loss.png to write.

    Raises:
        UserError: if a file is not what its checkpoint's manifest says, or a step is missing or
            comes twice.
    """
    import pandas as pd

    for manifest in (path.parent.with_suffix(".json") for path in metrics):
        if manifest.exists():
            verify_outputs(manifest)
    # As text, so that the numbers stay what the training wrote.
    rows = pd.concat([pd.read_csv(path, dtype=str) for path in metrics], ignore_index=True)
    steps = rows.step.astype(int)
    if (gaps := steps[steps != range(1, len(steps) + 1)]).any():
        raise UserError(
            f"the metrics of run {run!r} do not go on from step to step at {gaps.iloc[0]}: "
            f"{', '.join(map(str, metrics))}. Give those of all checkpoints, in the order of their "
            "steps."
        )
    with report_full_disk(table.parent):
        draw_metrics(rows.astype(float), run, curve)
        write_atomic(table, rows.to_csv(index=False, lineterminator="\n"))


def draw_metrics(rows: "pd.DataFrame", run: str, file: Path) -> None:
    """Draw loss, gradient norm and learning rate over training steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = max(1, len(rows) // NUM_WINDOWS)
    figure, axes = pyplot.subplots(
        3, sharex=True, figsize=(6.4, 5.6), height_ratios=(3, 2, 1), layout="constrained"
    )
    blue, gray = "#0072B2", "0.75"
    for panel, (column, label) in zip(
        axes, [("loss", "loss"), ("grad_norm", "gradient norm")], strict=False
    ):
        panel.plot(rows.step, rows[column], color=gray, linewidth=0.6, label="each step")
        mean = rows[column].rolling(window, min_periods=1, center=True).mean()
        panel.plot(rows.step, mean, color=blue, label=f"mean of {window} steps")
        panel.set(ylabel=label, yscale="log")
    axes[2].plot(rows.step, rows.learning_rate, color=blue)
    axes[2].set(xlabel="training step", ylabel="learning rate", ylim=(0, None))
    axes[2].ticklabel_format(axis="y", scilimits=(0, 0))
    axes[0].legend(frameon=False, fontsize=9)
    axes[0].set_title(f"{run}: training", fontsize=11)
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png", metadata={"Software": None})
    pyplot.close(figure)
    write_atomic(file, image.getvalue())


if __name__ == "__main__":
    run(make_loss_curve)

"""The metrics of a whole training, and their curve.

In:  the manifest of each checkpoint, in the order of their steps, with metrics.csv in its folder.
Out: metrics.csv, a row for each step, and loss.png: loss, gradient norm and learning rate;
     throughput.csv and throughput.png: samples per second of each segment, compilation included.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.figures import BLUE, GRAY, new_figure
from demo2eval.provenance import read_manifest, report_full_disk, verify_outputs, write_atomic

if TYPE_CHECKING:
    import pandas as pd

NUM_WINDOWS = 100
"""The mean line averages this part of all steps."""


def make_loss_curve(
    run: str,
    checkpoints: list[Path],
    *,
    table: Path,
    curve: Path,
    throughput_table: Path,
    throughput: Path,
) -> None:
    """Join the metrics of a training's segments, and draw them.

    Args:
        run: name of the run.
        checkpoints: manifest of each checkpoint that was trained, in the order of their steps.
        table: metrics.csv to write.
        curve: loss.png to write.
        throughput_table: throughput.csv to write.
        throughput: throughput.png to write.

    Raises:
        UserError: if metrics are not what the manifest says, or a step is missing or comes twice.
    """
    import pandas as pd

    for checkpoint in checkpoints:
        verify_outputs(checkpoint)
    # As text, so that the numbers stay what the training wrote.
    metrics = [path.with_suffix("") / "metrics.csv" for path in map(Path, checkpoints)]
    rows = pd.concat([pd.read_csv(path, dtype=str) for path in metrics], ignore_index=True)
    steps = rows.step.astype(int)
    if (gaps := steps[steps != range(1, len(steps) + 1)]).any():
        raise UserError(
            f"the metrics of run {run!r} do not go on from step to step at {gaps.iloc[0]}: "
            f"{', '.join(map(str, metrics))}. Give those of all checkpoints, in the order of their "
            "steps."
        )
    segments = pd.DataFrame([describe_segment(read_manifest(path)) for path in checkpoints])
    with report_full_disk(table.parent):
        draw_metrics(rows.astype(float), run, curve)
        draw_throughput(segments, run, throughput)
        write_atomic(throughput_table, segments.to_csv(index=False, lineterminator="\n"))
        write_atomic(table, rows.to_csv(index=False, lineterminator="\n"))


def describe_segment(manifest: dict) -> dict:
    """Return the row of a checkpoint's training in throughput.csv."""
    names = ("step", "samples_per_s", "training_time_s", "device", "num_devices")
    return {name: manifest["metadata"][name] for name in names}


def draw_metrics(rows: "pd.DataFrame", run: str, file: Path) -> None:
    """Draw loss, gradient norm and learning rate over training steps."""
    window = max(1, len(rows) // NUM_WINDOWS)
    size = {"figsize": (6.4, 5.6), "height_ratios": (3, 2, 1)}
    with new_figure(file, nrows=3, sharex=True, **size) as (_, axes):
        for panel, (column, label) in zip(
            axes, [("loss", "loss"), ("grad_norm", "gradient norm")], strict=False
        ):
            panel.plot(rows.step, rows[column], color=GRAY, linewidth=0.6, label="each step")
            mean = rows[column].rolling(window, min_periods=1, center=True).mean()
            panel.plot(rows.step, mean, color=BLUE, label=f"mean of {window} steps")
            panel.set(ylabel=label, yscale="log")
        axes[2].plot(rows.step, rows.learning_rate, color=BLUE)
        axes[2].set(xlabel="training step", ylabel="learning rate", ylim=(0, None))
        axes[2].ticklabel_format(axis="y", scilimits=(0, 0))
        axes[0].legend(frameon=False, fontsize=9)
        axes[0].set_title(f"{run}: training", fontsize=11)


def draw_throughput(segments: "pd.DataFrame", run: str, file: Path) -> None:
    """Draw the samples per second of each segment, and the time of all segments so far."""
    with new_figure(file, nrows=2, sharex=True, figsize=(6.4, 4.4)) as (_, axes):
        axes[0].plot(segments.step, segments.samples_per_s, "o-", color=BLUE, markersize=4)
        axes[0].set(ylabel="samples per second", ylim=(0, None))
        axes[1].plot(
            [0, *segments.step],
            [0, *segments.training_time_s.cumsum() / 60],
            "o-",
            color=BLUE,
            markersize=4,
        )
        axes[1].set(xlabel="training step", ylabel="minutes of training", ylim=(0, None))
        last = segments.iloc[-1]
        title = f"{run}: throughput of each segment, {last.num_devices} x {last.device}"
        axes[0].set_title(title, fontsize=11)


if __name__ == "__main__":
    run(make_loss_curve)

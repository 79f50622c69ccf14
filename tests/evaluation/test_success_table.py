"""The success table: what it counts, its intervals, and what it refuses to compare."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import find_task

from demo2eval.config import Evaluation
from demo2eval.errors import UserError
from demo2eval.evaluation.success_table import make_success_table, wilson_interval
from demo2eval.provenance import run_stage

FAILED, SOLVED, LOST_AGAIN = (0, 0, ""), (1, 1, "20"), (1, 0, "30")


def write_rollouts(folder: Path, step: int, episodes: list[tuple], max_episode_steps=50) -> Path:
    """Write rollouts from (success_once, success_at_end, first_success_step) of each episode."""
    output = folder / "rollouts" / f"{step}.json"
    settings = {
        "task": "PushCube-v1",
        "milestones": find_task("PushCube-v1").milestones,
        "evaluation": Evaluation(num_episodes=4, max_episode_steps=max_episode_steps),
    }
    with run_stage(
        output, stage="rollout", module="demo2eval.evaluation.rollout", settings=settings
    ) as job:
        rows = [
            f"{seed},{once},{at_end},{first},50,7,"
            f"{'place' if once else 'nothing' if seed % 2 else 'reach'},{10 * seed + 5}.5\n"
            for seed, (once, at_end, first) in enumerate(episodes)
        ]
        table = output.with_suffix(".csv")
        table.write_text(
            "seed,success_once,success_at_end,first_success_step,steps,policy_calls,milestone,"
            "nearest_mm\n" + "".join(rows)
        )
        job.finish(
            [table], step=step, checkpoint=f"checkpoint-{step}", dataset="dataset-of-the-run"
        )
    return output


@pytest.fixture
def rollouts(tmp_path) -> list[Path]:
    """Manifests of the rollouts of three checkpoints, not in order."""
    return [
        write_rollouts(tmp_path, 1000, [SOLVED, SOLVED, SOLVED, LOST_AGAIN]),
        write_rollouts(tmp_path, 0, [FAILED] * 4),
        write_rollouts(tmp_path, 500, [SOLVED, FAILED, LOST_AGAIN, FAILED]),
    ]


@pytest.fixture
def make(tmp_path):
    """A function that makes the tables and the curve of rollouts, in tmp_path."""
    outputs = {
        "table": tmp_path / "success.csv",
        "curve": tmp_path / "success.png",
        "milestones": tmp_path / "milestones.csv",
    }
    return lambda rollouts, **changes: make_success_table("my_run", rollouts, **outputs | changes)


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        # The four cases that Newcombe (1998) compares methods on.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # No and only successes: one bound is exact, the other is z^2 / (n + z^2) away from it.
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_interval(successes, episodes, low, high):
    assert wilson_interval(successes, episodes) == pytest.approx((low, high), abs=1e-4)


def test_one_row_per_checkpoint_in_order_of_steps(rollouts, make, tmp_path):
    make(rollouts)
    table = pd.read_csv(tmp_path / "success.csv")
    assert table.columns.tolist() == [
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
    ]
    assert table.step.tolist() == [0, 500, 1000]
    assert table.successes.tolist() == [0, 2, 4]
    assert table.success_once.tolist() == [0, 0.5, 1]
    assert table.success_at_end.tolist() == [0, 0.25, 0.75]
    # Actions until success, or all 50: (20 + 50 + 30 + 50) / 4.
    assert table.mean_episode_length.tolist() == [50, 37.5, 22.5]
    assert table.checkpoint.tolist() == ["checkpoint-0", "checkpoint-500", "checkpoint-1000"]
    assert (table.ci_low[1], table.ci_high[1]) == pytest.approx(wilson_interval(2, 4), abs=1e-4)
    assert (table.at_end_ci_low[1], table.at_end_ci_high[1]) == pytest.approx(
        wilson_interval(1, 4), abs=1e-4
    )
    for column, value in (("run", "my_run"), ("episodes", 4), ("dataset", "dataset-of-the-r")):
        assert set(table[column]) == {value}


def test_the_curve_is_an_image_and_the_same_each_time(rollouts, make, tmp_path):
    from PIL import Image

    curves = [tmp_path / name for name in ("first.png", "second.png")]
    for curve in curves:
        make(rollouts, curve=curve)
    assert curves[0].read_bytes() == curves[1].read_bytes()
    with Image.open(curves[0]) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors


def test_different_settings_are_not_compared(rollouts, make, tmp_path):
    longer = write_rollouts(tmp_path, 1500, [SOLVED] * 4, max_episode_steps=100)
    with pytest.raises(UserError, match=r"1500\.json were evaluated under different settings"):
        make([*rollouts, longer])
    assert not (tmp_path / "success.csv").exists()


def test_missing_episodes_are_a_sentence(rollouts, make):
    table = rollouts[0].with_suffix(".csv")
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"1000.csv is not what .*1000.json describes"):
        make(rollouts)
    table.unlink()
    with pytest.raises(UserError, match=r"1000.csv is not what .*1000.json describes"):
        make(rollouts)


def test_milestones_say_how_far_episodes_came(rollouts, make, tmp_path):
    make(rollouts)
    table = pd.read_csv(tmp_path / "milestones.csv", keep_default_na=False)
    assert table.columns[:2].tolist() == ["run", "step"]
    # Episodes 0 and 2 succeeded; 1 and 3 came to nothing, 15.5 and 35.5 mm from the cube.
    assert table[table.step == 500].to_numpy()[:, 2:].tolist() == [
        ["nothing", 4, 2, "25.5"],
        ["reach", 2, 0, ""],
        ["move", 2, 0, ""],
        ["place", 2, 2, "15.5"],
    ]
    assert table.step.tolist() == [0] * 4 + [500] * 4 + [1000] * 4

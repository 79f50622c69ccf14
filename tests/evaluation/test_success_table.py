"""The success table: what it counts, its intervals, and what it refuses to compare."""

import csv
from pathlib import Path

import pytest

from demo2eval.errors import UserError
from demo2eval.evaluation.success_table import success_table, wilson_interval
from demo2eval.provenance import run_stage

SETTINGS = {"task": "PushCube-v1", "episodes": 4, "max_episode_steps": 50}


def rollouts(folder: Path, step: int, episodes: list[tuple[int, int, str]], **changes) -> Path:
    """Write rollouts of a checkpoint: (success_once, success_at_end, first_success_step) of each episode."""
    output = folder / "rollouts" / f"{step}.json"
    with run_stage(
        output, stage="rollout", module="demo2eval.evaluation.rollout", settings=SETTINGS | changes
    ) as job:
        table = output.with_suffix("") / "episodes.csv"
        table.parent.mkdir()
        stages = [
            "place" if once else "nothing" if seed % 2 else "reach"
            for seed, (once, _, _) in enumerate(episodes)
        ]
        rows = [
            f"{seed},{once},{end},{first},50,7,{stages[seed]},{10 * seed + 5}.5\n"
            for seed, (once, end, first) in enumerate(episodes)
        ]
        table.write_text(
            "seed,success_once,success_at_end,first_success_step,steps,looks,stage,nearest_mm\n"
            + "".join(rows)
        )
        job.finish(
            [table], step=step, checkpoint=f"checkpoint-{step}", dataset="dataset-of-the-run"
        )
    return output


FAILED, SOLVED, LOST_AGAIN = (0, 0, ""), (1, 1, "20"), (1, 0, "30")


@pytest.fixture
def three_checkpoints(tmp_path) -> list[Path]:
    return [
        rollouts(tmp_path, 1000, [SOLVED, SOLVED, SOLVED, LOST_AGAIN]),
        rollouts(tmp_path, 0, [FAILED] * 4),
        rollouts(tmp_path, 500, [SOLVED, FAILED, LOST_AGAIN, FAILED]),
    ]


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


def test_one_row_a_checkpoint_in_order_of_steps(three_checkpoints, tmp_path):
    table, curve = tmp_path / "success.csv", tmp_path / "success.png"
    rows = success_table("run_one", three_checkpoints, table, curve, tmp_path / "stages.csv")
    with open(table, newline="") as file:
        written = list(csv.DictReader(file))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == written
    assert [row["step"] for row in rows] == [0, 500, 1000]
    assert [row["successes"] for row in rows] == [0, 2, 4]
    assert [row["success_once"] for row in rows] == [0, 0.5, 1]
    assert [row["success_at_end"] for row in rows] == [0, 0.25, 0.75]
    # Actions until success, or all 50: (20 + 50 + 30 + 50) / 4.
    assert [row["mean_episode_length"] for row in rows] == [50, 37.5, 22.5]
    assert [row["checkpoint"] for row in rows] == [
        "checkpoint-0",
        "checkpoint-500",
        "checkpoint-1000",
    ]
    assert (rows[1]["ci_low"], rows[1]["ci_high"]) == pytest.approx(wilson_interval(2, 4), abs=1e-4)
    assert (rows[1]["at_end_ci_low"], rows[1]["at_end_ci_high"]) == pytest.approx(
        wilson_interval(1, 4), abs=1e-4
    )
    assert {(row["run"], row["episodes"], row["dataset"]) for row in rows} == {
        ("run_one", 4, "dataset-of-the-r")
    }


def test_the_curve_is_a_picture_and_the_same_each_time(three_checkpoints, tmp_path):
    from PIL import Image

    pictures = [tmp_path / name for name in ("one.png", "two.png")]
    for picture in pictures:
        success_table(
            "run_one", three_checkpoints, tmp_path / "success.csv", picture, tmp_path / "stages.csv"
        )
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    with Image.open(pictures[0]) as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colors


def test_different_settings_are_not_compared(three_checkpoints, tmp_path):
    other = rollouts(tmp_path, 1500, [SOLVED] * 4, max_episode_steps=100)
    with pytest.raises(UserError, match=r"1500\.json were evaluated under different settings"):
        success_table(
            "run_one",
            [*three_checkpoints, other],
            tmp_path / "success.csv",
            tmp_path / "success.png",
            tmp_path / "stages.csv",
        )
    assert not (tmp_path / "success.csv").exists()


def test_missing_episodes_are_a_sentence(three_checkpoints, tmp_path):
    table = three_checkpoints[0].with_suffix("") / "episodes.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="has 3 episodes instead of 4"):
        success_table(
            "run_one",
            three_checkpoints,
            tmp_path / "success.csv",
            tmp_path / "success.png",
            tmp_path / "stages.csv",
        )
    table.unlink()
    with pytest.raises(UserError, match="does not exist"):
        success_table(
            "run_one",
            three_checkpoints,
            tmp_path / "success.csv",
            tmp_path / "success.png",
            tmp_path / "stages.csv",
        )


def test_stages_say_how_far_episodes_came(three_checkpoints, tmp_path):
    success_table(
        "run_one",
        three_checkpoints,
        tmp_path / "success.csv",
        tmp_path / "success.png",
        tmp_path / "stages.csv",
    )
    with open(tmp_path / "stages.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    of_500 = [
        (row["stage"], row["came_so_far"], row["and_no_further"], row["median_nearest_mm"])
        for row in rows
        if row["step"] == "500"
    ]
    # Episodes 0 and 2 succeeded; 1 and 3 came to nothing, 15.5 and 35.5 mm from the cube.
    assert of_500 == [
        ("nothing", "4", "2", "25.5"),
        ("reach", "2", "0", ""),
        ("move", "2", "0", ""),
        ("place", "2", "2", "15.5"),
    ]
    assert [row["step"] for row in rows] == ["0"] * 4 + ["500"] * 4 + ["1000"] * 4

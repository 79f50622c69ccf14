"""Whatever was changed since its manifest was written is found before another stage reads it."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import find_task

from demo2eval.config import Actions, Model
from demo2eval.data.image_cache import build_image_cache
from demo2eval.data.norm_stats import compute_norm_stats
from demo2eval.data.replay import replay_demos
from demo2eval.errors import UserError
from demo2eval.evaluation.rollout import run_rollouts
from demo2eval.evaluation.success_table import make_success_table
from demo2eval.provenance import run_stage
from demo2eval.training.init_checkpoint import init_checkpoint
from demo2eval.training.loss_curve import make_loss_curve
from demo2eval.training.train import train

TASK = find_task("PushCube-v1")
PUSHCUBE = {"task": "PushCube-v1", "robot": TASK.robot}


@pytest.fixture
def run(pushcube_run, pushcube_demos, tmp_path) -> Path:
    """A copy of a run's folder, with demos and tables of rollouts and training, to be damaged."""
    folder = tmp_path / "run"
    shutil.copytree(pushcube_run, folder, symlinks=True)
    shutil.copytree(pushcube_demos.parent, folder / "demos")
    with run_stage(
        folder / "rollouts/0.json", stage="rollout", module="demo2eval.config", settings={}
    ) as job:
        (job.partial / "0.csv").write_text("seed,success_once\n0,1\n")
        job.finish(job.publish("0.csv"))
    with run_stage(
        folder / "checkpoints/3.json", stage="train", module="demo2eval.config", settings={}
    ) as job:
        (job.partial / "3").mkdir()
        (job.partial / "3/metrics.csv").write_text("step,loss,grad_norm,learning_rate\n1,1,1,1\n")
        (metrics,) = job.publish("3")
        job.finish([metrics])
    return folder


def replay(run: Path, output: Path) -> None:
    replay_demos(
        run / "demos/manifest.json",
        output,
        task="PushCube-v1",
        robot=TASK.robot,
        object=TASK.object,
    )


def norm_stats(run: Path, output: Path) -> None:
    compute_norm_stats(run / "dataset/manifest.json", output)


def image_cache(run: Path, output: Path) -> None:
    build_image_cache(run / "dataset/manifest.json", output, image_size=64)


def checkpoint_0(run: Path, output: Path) -> None:
    init_checkpoint(
        run / "norm_stats/manifest.json",
        output,
        task="PushCube-v1",
        prompt=TASK.prompt,
        robot=TASK.robot,
        actions=Actions(action_horizon=8),
        model=Model(variant="pi05_tiny", weights=None, tokenizer=None),
    )


def training(run: Path, output: Path) -> None:
    train(run / "checkpoints/0.json", run / "cache_64/manifest.json", output, step=3)


def rollouts(run: Path, output: Path) -> None:
    run_rollouts(
        run / "checkpoints/0.json",
        None,
        output,
        task="PushCube-v1",
        object=TASK.object,
        milestones=TASK.milestones,
    )


def success_table(run: Path, output: Path) -> None:
    names = ("table", "curve", "milestones", "milestone_curve", "provenance")
    files = dict.fromkeys(names, output)
    make_success_table("run", [run / "rollouts/0.json"], **files)


def loss_curve(run: Path, output: Path) -> None:
    names = ("table", "curve", "throughput_table", "throughput")
    make_loss_curve("run", [run / "checkpoints/3.json"], **dict.fromkeys(names, output))


# The file, and the stage that reads it.
CASES: list[tuple[str, Callable[[Path, Path], None]]] = [
    ("demos/trajectory.h5", replay),
    ("demos/trajectory.json", replay),
    ("dataset/lerobot/data/**/*.parquet", norm_stats),
    ("dataset/lerobot/data/**/*.parquet", image_cache),
    ("dataset/lerobot/meta/info.json", norm_stats),
    ("dataset/lerobot/meta/episodes/**/*.parquet", image_cache),
    ("norm_stats/norm_stats.json", checkpoint_0),
    ("cache_64/images_base_camera.npy", training),
    ("cache_64/sample_row.npy", training),
    ("cache_64/state.npy", training),
    ("cache_64/action.npy", training),
    ("cache_64/episode.npy", training),
    ("checkpoints/0/params/d/*", training),
    ("checkpoints/0/params/d/*", rollouts),
    ("checkpoints/0/params/_METADATA", rollouts),
    ("checkpoints/0/assets/**/norm_stats.json", rollouts),
    ("checkpoints/0/assets/**/tokenizer.model", training),
    ("checkpoints/0/assets/**/policy.json", rollouts),
    ("rollouts/0.csv", success_table),
    ("checkpoints/3/metrics.csv", loss_curve),
]


def flip(path: Path) -> None:
    """Change a bit in the middle of a file, as a disk may."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_damaged_file_is_found_by_its_reader(run, tmp_path, name, stage, damage):
    damage(next(path for path in run.glob(name) if path.is_file()))
    named = re.split(r"[*]|/d/|/_METADATA", name)[0]
    found = rf"{named}.* is not what .*\.json describes.* Put the right file"
    with pytest.raises(UserError, match=found):
        stage(run, tmp_path / "out/1.json")
    assert not (tmp_path / "out/1.json").exists()


# The stage, its arguments, and the KiB above which no file of it can be written.
FULL_DISKS: list[tuple[str, dict[str, str], int]] = [
    ("data.import_demos", PUSHCUBE | {"sources": "demos/trajectory.h5", "num_demos": "3"}, 500),
    ("data.replay", PUSHCUBE | {"demos": "demos/manifest.json", "object": TASK.object}, 500),
    ("data.dataset", {"replays": '["replay/manifest.json"]', "prompt": "push"}, 50),
    ("data.image_cache", {"dataset": "dataset/manifest.json", "image_size": "64"}, 50),
    (
        "training.init_checkpoint",
        PUSHCUBE
        | {
            "norm_stats": "norm_stats/manifest.json",
            "prompt": TASK.prompt,
            "actions.action_horizon": "8",
            "model": '{"variant": "pi05_tiny", "weights": null, "tokenizer": null}',
        },
        50,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "arguments", "limit"), FULL_DISKS)
def test_a_full_disk_is_one_sentence(run, pushcube_replay, stage, arguments, limit):
    """HDF5 crashes on one, mapped memory ends the process, and Orbax prints an error per array."""
    shutil.copytree(pushcube_replay.parent, run / "replay")
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", f"demo2eval.{stage}", *words, "--output", "out/1.json"]
    limited = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
    result = subprocess.run(limited, cwd=run, capture_output=True, text=True)
    assert result.returncode == 1
    assert re.search(r"the disk is full .*run the same command again", result.stderr)
    assert "Traceback" not in result.stderr
    assert not (run / "out/1.json").exists()
    again = subprocess.run(command, cwd=run, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_what_the_sentence_advises_mends_it(run, tmp_path, damage):
    """The work is done again, and the same manifest makes nothing stale."""
    output = tmp_path / "again/manifest.json"
    stats = output.with_name("norm_stats.json")
    norm_stats(run, output)
    files = stats.read_bytes(), output.read_bytes()
    damage(stats)
    output.unlink()
    norm_stats(run, output)
    assert (stats.read_bytes(), output.read_bytes()) == files

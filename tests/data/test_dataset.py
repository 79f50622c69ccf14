"""The LeRobot dataset: the official reader gives back what was demonstrated, and nothing but the demonstrations decides its bytes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from demo2eval.data.dataset import Settings, dataset
from demo2eval.provenance import read_manifest

PROMPT = "push the cube to the goal"
STATE = ["qpos", "tcp_pose"]


def settings(**changes) -> Settings:
    defaults = {"prompt": PROMPT, "cameras": ["base_camera"], "state": STATE, "video_crf": 0}
    return Settings(**(defaults | changes))


def make(folder: Path, replays: list[Path], workers: int = 1, **changes) -> dict:
    """Make a dataset and return its manifest."""
    dataset(settings(**changes), replays, folder / "manifest.json", workers=workers)
    return read_manifest(folder / "manifest.json")


@pytest.fixture(scope="module", params=["video", "png"])
def stored(request, pushcube_shards, tmp_path_factory) -> tuple[str, Path, dict]:
    """(how pictures are stored, folder, manifest) of a dataset of two shards."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, make(folder, pushcube_shards, image_storage=request.param)


@pytest.fixture
def damaged(pushcube_replay, tmp_path) -> Path:
    """A copy of the replay, to be spoilt."""
    shutil.copytree(pushcube_replay.parent, tmp_path / "damaged")
    return tmp_path / "damaged" / "manifest.json"


def test_the_official_reader_gives_the_demonstrations_back(stored, pushcube_replay):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    storage, folder, manifest = stored
    opened = LeRobotDataset("demo2eval/any", root=folder / "lerobot", video_backend="pyav")
    assert opened.num_episodes == 3
    assert len(opened) == sum(manifest["metadata"]["lengths"]) == manifest["metadata"]["frames"]
    names = opened.features["observation.state"]["names"]
    assert names[0] == "panda_joint1"
    assert len(names) == 16
    tolerance = 3 if storage == "video" else 1e-3
    row = 0
    with h5py.File(pushcube_replay.parent / "trajectory.h5") as file:
        for episode in range(3):
            group = file[f"traj_{episode}"]
            state = np.concatenate(
                [group["obs/agent/qpos"][()], group["obs/extra/tcp_pose"][()]], axis=1
            ).astype(np.float32)
            steps, pictures = (
                group[f"obs/sensor_data/base_camera/{name}"][()] for name in ("step", "rgb")
            )
            length = len(group["actions"])
            for step in {0, 1, int(steps[1]) - 1, int(steps[1]), int(steps[2]), length - 1}:
                item = opened[row + step]
                assert np.array_equal(item["action"].numpy(), group["actions"][step])
                assert np.array_equal(item["observation.state"].numpy(), state[step])
                newest = np.flatnonzero(steps <= step)[-1]
                assert item["picture_age"] == step - steps[newest]
                seen = item["observation.images.base_camera"].numpy().transpose(1, 2, 0) * 255
                assert np.abs(seen - pictures[newest]).max() <= tolerance
                assert (item["episode_index"], item["frame_index"], item["task"]) == (
                    episode,
                    step,
                    PROMPT,
                )
            row += length


def test_official_chunks_stop_at_the_end_of_the_episode(stored):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    _, folder, manifest = stored
    times = {"action": [step / 20 for step in range(4)]}
    opened = LeRobotDataset(
        "demo2eval/any", root=folder / "lerobot", video_backend="pyav", delta_timestamps=times
    )
    last = opened[manifest["metadata"]["lengths"][0] - 2]
    assert last["action_is_pad"].tolist() == [False, False, True, True]


def test_statistics_are_those_of_all_values(stored, pushcube_replay):
    _, folder, _ = stored
    stats = json.loads((folder / "lerobot" / "meta" / "stats.json").read_text())
    with h5py.File(pushcube_replay.parent / "trajectory.h5") as file:
        groups = [file[f"traj_{index}"] for index in range(3)]
        actions = np.concatenate([group["actions"][()] for group in groups])
        looks = []
        for group in groups:
            steps = group["obs/sensor_data/base_camera/step"][()]
            looks.append(
                group["obs/sensor_data/base_camera/rgb"][()][steps < len(group["actions"])]
            )
    actions = actions.astype(np.float64)
    assert np.allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0), atol=1e-12)
    assert np.allclose(stats["action"]["std"], actions.std(axis=0), atol=1e-12)
    pictures = np.concatenate(looks).reshape(-1, 3) / 255
    image = stats["observation.images.base_camera"]
    assert np.allclose(np.ravel(image["mean"]), pictures.mean(axis=0), atol=1e-9)
    assert np.allclose(np.ravel(image["q90"]), np.quantile(pictures, 0.9, axis=0), atol=1e-9)
    assert image["count"] == [sum(len(item) for item in looks)]


def test_the_manifest_says_what_video_lost(stored):
    storage, _, manifest = stored
    psnr = manifest["metadata"]["psnr_db"]
    assert psnr is None if storage == "png" else psnr["base_camera"] > 50


def test_workers_change_nothing(stored, pushcube_shards, tmp_path):
    storage, _, manifest = stored
    other = make(tmp_path, pushcube_shards, workers=2, image_storage=storage)
    assert other["digest"] == manifest["digest"]


def command(folder: Path, replays: list[Path]) -> list[str]:
    """The command line that makes the dataset of `make` with two workers."""
    words = [
        "-m",
        "demo2eval.data.dataset",
        "--prompt",
        PROMPT,
        "--cameras",
        '["base_camera"]',
        "--state",
        json.dumps(STATE),
    ]
    places = ["--inputs", *map(str, replays), "--output", str(folder / "manifest.json")]
    return [sys.executable, *words, "--video-crf", "0", *places, "--workers", "2"]


def test_killed_and_started_again_it_ends_the_same(pushcube_shards, tmp_path):
    undisturbed = make(tmp_path / "undisturbed", pushcube_shards)
    tmp_path = tmp_path / "killed"
    process = subprocess.Popen(command(tmp_path, pushcube_shards), stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".manifest.partial-*/shard-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "manifest.json").exists()
    assert list(tmp_path.glob(".manifest.partial-*/shard-*"))
    again = make(tmp_path, pushcube_shards, workers=2)
    assert again["digest"] == undisturbed["digest"]
    assert not list(tmp_path.glob(".manifest.partial-*"))


def test_a_killed_worker_costs_its_shard_alone(pushcube_shards, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, pushcube_shards), stderr=subprocess.PIPE, text=True
    )
    while not (begun := list(tmp_path.glob(".manifest.partial-*/shard-*.*"))):
        time.sleep(0.002)
    os.kill(int(begun[0].suffix[1:]), signal.SIGKILL)
    killed = pushcube_shards[int(begun[0].name.split(".")[0].removeprefix("shard-"))]
    said = process.communicate()[1]
    assert process.returncode == 1, said
    assert f"error: {killed.parent / 'trajectory.h5'}: the process that wrote this shard" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert not (tmp_path / "manifest.json").exists()
    assert (
        len([path for path in tmp_path.glob(".manifest.partial-*/shard-*") if not path.suffix])
        == len(pushcube_shards) - 1
    )
    again = make(tmp_path, pushcube_shards)
    assert again["digest"] == make(tmp_path / "undisturbed", pushcube_shards)["digest"]


# The second is more than the rows need and less than the video.
@pytest.mark.parametrize("largest_file", [4_000, 60_000])
def test_a_full_disk_is_one_sentence_and_nothing_is_finished(
    pushcube_shards, tmp_path, largest_file
):
    result = subprocess.run(
        command(tmp_path, pushcube_shards),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    assert f"{tmp_path} cannot be written, the disk is full" in result.stderr
    assert "shard-00" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "manifest.json").exists()
    assert not (tmp_path / "lerobot").exists()
    assert all(path.suffix for path in tmp_path.glob(".manifest.partial-*/shard-*"))
    assert make(tmp_path, pushcube_shards)["metadata"]["episodes"] == 3


def test_finished_shards_are_not_written_again(pushcube_shards, tmp_path, monkeypatch):
    from demo2eval.data import dataset as module

    written = []
    monkeypatch.setattr(module, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, pushcube_shards)
    monkeypatch.undo()
    original = module.write_shard
    monkeypatch.setattr(
        module,
        "write_shard",
        lambda shard, *rest: written.append(shard.index) or original(shard, *rest),
    )
    shutil.rmtree(next(tmp_path.glob(".manifest.partial-*/shard-001")))
    make(tmp_path, pushcube_shards)
    assert written == [1]


def test_count_takes_the_first_demonstrations_across_shards(pushcube_shards, tmp_path):
    manifest = make(tmp_path, pushcube_shards, count=2)
    seeds = read_manifest(pushcube_shards[0])["metadata"]["seeds"]
    assert manifest["metadata"]["seeds"] == seeds[:2]
    assert manifest["metadata"]["episodes"] == 2
    assert make(tmp_path / "all", pushcube_shards[::-1], count=2)["metadata"]["seeds"] == [
        seeds[2],
        seeds[0],
    ]

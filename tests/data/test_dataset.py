"""The LeRobot dataset: the official reader gives the demos back, and only they decide its bytes."""

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

from demo2eval.config import Dataset
from demo2eval.data import dataset as module
from demo2eval.data.dataset import build_dataset
from demo2eval.provenance import read_manifest

PROMPT = "push the cube to the goal"
STATE = ["qpos", "tcp_pose"]


def make(
    folder: Path, replays: list[Path], image_storage: str = "video", num_workers: int = 1, **options
) -> dict:
    """Make a dataset and return its manifest."""
    settings = Dataset.model_validate({"state": STATE, "image_storage": image_storage})
    output = folder / "manifest.json"
    build_dataset(
        replays, output, prompt=PROMPT, dataset=settings, num_workers=num_workers, **options
    )
    return read_manifest(output)


@pytest.fixture(scope="module", params=["video", "png"])
def stored(request, pushcube_shards, tmp_path_factory) -> tuple[str, Path, dict]:
    """(how images are stored, folder, manifest) of a dataset of two shards."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, make(folder, pushcube_shards, image_storage=request.param)


def test_the_official_reader_gives_the_demos_back(stored, pushcube_replay):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    storage, folder, manifest = stored
    opened = LeRobotDataset("demo2eval/any", root=folder / "lerobot", video_backend="pyav")
    assert opened.num_episodes == manifest["metadata"]["episodes"] == 3
    assert len(opened) == manifest["metadata"]["frames"]
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
            camera = group["obs/sensor_data/base_camera"]
            steps, images = camera["step"][()], camera["rgb"][()]
            length = len(group["actions"])
            for step in {0, 1, int(steps[1]) - 1, int(steps[1]), int(steps[2]), length - 1}:
                item = opened[row + step]
                assert np.array_equal(item["action"].numpy(), group["actions"][step])
                assert np.array_equal(item["observation.state"].numpy(), state[step])
                newest = np.flatnonzero(steps <= step)[-1]
                assert item["frame_age"] == step - steps[newest]
                image = item["observation.images.base_camera"].numpy().transpose(1, 2, 0) * 255
                assert np.abs(image - images[newest]).max() <= tolerance
                assert (item["episode_index"], item["frame_index"]) == (episode, step)
                assert item["task"] == PROMPT
            row += length


def test_official_chunks_stop_at_the_end_of_the_episode(stored):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    _, folder, _ = stored
    times = {"action": [step / 20 for step in range(4)]}
    opened = LeRobotDataset(
        "demo2eval/any", root=folder / "lerobot", video_backend="pyav", delta_timestamps=times
    )
    last = opened[opened.meta.episodes["length"][0] - 2]
    assert last["action_is_pad"].tolist() == [False, False, True, True]


def test_statistics_are_those_of_all_values(stored, pushcube_replay):
    _, folder, _ = stored
    stats = json.loads((folder / "lerobot" / "meta" / "stats.json").read_text())
    with h5py.File(pushcube_replay.parent / "trajectory.h5") as file:
        groups = [file[f"traj_{index}"] for index in range(3)]
        actions = np.concatenate([group["actions"][()] for group in groups])
        images = []
        for group in groups:
            camera = group["obs/sensor_data/base_camera"]
            images.append(camera["rgb"][()][camera["step"][()] < len(group["actions"])])
    actions = actions.astype(np.float64)
    assert np.allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0), atol=1e-12)
    assert np.allclose(stats["action"]["std"], actions.std(axis=0), atol=1e-12)
    pixels = np.concatenate(images).reshape(-1, 3) / 255
    image = stats["observation.images.base_camera"]
    assert np.allclose(np.ravel(image["mean"]), pixels.mean(axis=0), atol=1e-9)
    assert np.allclose(np.ravel(image["q90"]), np.quantile(pixels, 0.9, axis=0), atol=1e-9)
    assert image["count"] == [sum(len(item) for item in images)]


def test_the_manifest_says_what_the_dataset_holds_and_what_video_lost(stored, pushcube_shards):
    storage, _, manifest = stored
    metadata = manifest["metadata"]
    psnr = metadata.pop("psnr_db", None)
    assert psnr is None if storage == "png" else psnr["base_camera"] > 50
    shards = [read_manifest(shard)["metadata"]["seeds"] for shard in pushcube_shards]
    assert metadata.pop("seeds") == shards[0]
    assert 0 < metadata.pop("images") < metadata.pop("frames") / 5
    assert metadata == {
        "action_dim": 8,
        "cameras": ["base_camera"],
        "control_mode": "pd_joint_pos",
        "episodes": 3,
        "fps": 20,
        "skipped": [],
        "state": STATE,
    }


def test_workers_change_nothing(stored, pushcube_shards, tmp_path):
    storage, _, manifest = stored
    again = make(tmp_path, pushcube_shards, image_storage=storage, num_workers=2)
    assert again["digest"] == manifest["digest"]


def command(folder: Path, replays: list[Path]) -> list[str]:
    """The command line that makes the dataset of `make` with two workers."""
    options = {
        "replays": json.dumps([str(replay) for replay in replays]),
        "output": str(folder / "manifest.json"),
        "prompt": PROMPT,
        "dataset": json.dumps({"state": STATE, "image_storage": "video"}),
        "num_workers": "2",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "demo2eval.data.dataset", *words]


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
    again = make(tmp_path, pushcube_shards, num_workers=2)
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
    stderr = process.communicate()[1]
    assert process.returncode == 1, stderr
    assert f"error: {killed.parent / 'trajectory.h5'}: the process that wrote this shard" in stderr
    assert "run the same command again" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "manifest.json").exists()
    finished = [path for path in tmp_path.glob(".manifest.partial-*/shard-*") if not path.suffix]
    assert len(finished) == len(pushcube_shards) - 1
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
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "assemble_dataset", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, pushcube_shards)
    written, original = [], module.write_shard

    def note(shard, *rest):
        written.append(shard.index)
        return original(shard, *rest)

    monkeypatch.setattr(module, "write_shard", note)
    shutil.rmtree(next(tmp_path.glob(".manifest.partial-*/shard-001")))
    make(tmp_path, pushcube_shards)
    assert written == [1]


def test_num_demos_takes_the_first_demos_across_shards(pushcube_shards, tmp_path):
    metadata = make(tmp_path, pushcube_shards, num_demos=2)["metadata"]
    seeds = read_manifest(pushcube_shards[0])["metadata"]["seeds"]
    assert metadata["seeds"] == seeds[:2]
    assert metadata["episodes"] == 2
    backwards = make(tmp_path / "backwards", pushcube_shards[::-1], num_demos=2)["metadata"]
    assert backwards["seeds"] == [seeds[2], seeds[0]]

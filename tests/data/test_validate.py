"""Every kind of issue: a real replayed file, spoilt in that way, is found out and named."""

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import h5py
import mani_skill
import numpy as np
import pytest

from demo2eval.config import Dataset
from demo2eval.data import dataset
from demo2eval.data.dataset import build_dataset
from demo2eval.data.validate import (
    find_image_issue,
    validate_files,
    validate_paths,
    validate_replays,
)
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest, sha256_file, to_json
from demo2eval.robots import JOINT_LIMITS

CAMERA = "obs/sensor_data/base_camera"
CUBE = "env_states/actors/cube"
STATE = ["qpos", "tcp_pose"]


def sign(manifest: Path) -> None:
    """Write into a manifest what its files are now, as if a stage had made them so."""
    outputs = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in manifest.parent.glob("trajectory.*")
    }
    manifest.write_text(to_json(read_manifest(manifest) | {"outputs": outputs}))


def make(folder: Path, shards: list[Path], image_storage: str = "png", **options) -> dict:
    """Make a dataset and return its manifest."""
    settings = Dataset.model_validate({"state": STATE, "image_storage": image_storage})
    output = folder / "manifest.json"
    for manifest in shards:
        sign(manifest)
    build_dataset(shards, output, prompt="push", dataset=settings, **options)
    return read_manifest(output)


@pytest.fixture
def shards(pushcube_shards, tmp_path) -> list[Path]:
    """Copies of two replayed shards, with traj_0 and traj_1, and traj_2, to be spoilt."""
    shutil.copytree(pushcube_shards[0].parent.parent, tmp_path / "shards")
    return sorted(tmp_path.glob("shards/*/manifest.json"))


# Ways to spoil the shards. Each takes their manifests, and is about traj_1 in the first shard
# unless it says otherwise.


def change_array(name: str, change, shard: int = 0, trajectory: str = "traj_1"):
    """Replace an array by what `change` makes of it."""

    def spoil(manifests):
        with h5py.File(manifests[shard].with_name("trajectory.h5"), "r+") as file:
            values = change(file[f"{trajectory}/{name}"][()])
            del file[f"{trajectory}/{name}"]
            file[f"{trajectory}/{name}"] = values

    return spoil


def set_values(name: str, index, value):
    """Set some values of an array."""

    def change(values):
        values[index] = value
        return values

    return change_array(name, change)


def change_file(change):
    """Change the open HDF5 file."""

    def spoil(manifests):
        with h5py.File(manifests[0].with_name("trajectory.h5"), "r+") as file:
            change(file)

    return spoil


def remove(name: str):
    return change_file(lambda file: file.__delitem__(f"traj_1/{name}"))


def zero_block(name: str):
    """Overwrite a part of the file with zeros, where a compressed array lies."""

    def spoil(manifests):
        path = manifests[0].with_name("trajectory.h5")
        with h5py.File(path, "r+") as file:
            values = file[f"traj_1/{name}"][()]
            del file[f"traj_1/{name}"]
            file.create_dataset(
                f"traj_1/{name}", data=values, chunks=(1, *values.shape[1:]), compression="gzip"
            )
            file.flush()
            chunk = file[f"traj_1/{name}"].id.get_chunk_info(1)
        with open(path, "r+b") as raw:
            raw.seek(chunk.byte_offset)
            raw.write(bytes(chunk.size))

    return spoil


def change_metadata(change):
    """Change the .json of both shards."""

    def spoil(manifests):
        for manifest in manifests:
            path = manifest.with_name("trajectory.json")
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

    return spoil


def change_entry(**changes):
    """Change traj_1's entry in the .json."""
    return change_metadata(
        lambda content: [
            entry.update(changes) for entry in content["episodes"] if entry["episode_id"] == 1
        ]
    )


def unlist(content):
    content["episodes"] = [entry for entry in content["episodes"] if entry["episode_id"] != 1]


def list_twice(content):
    content["episodes"] += [entry for entry in content["episodes"] if entry["episode_id"] == 1]


def remove_seed(content):
    for entry in content["episodes"]:
        if entry["episode_id"] == 1:
            del entry["episode_seed"]


def replace_file(content: bytes | None, name: str = "trajectory.json"):
    """Replace a file of the first shard, or remove it."""

    def spoil(manifests):
        path = manifests[0].with_name(name)
        path.unlink()
        if content is not None:
            path.write_bytes(content)

    return spoil


def cut(manifests):
    path = manifests[0].with_name("trajectory.h5")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_all(manifests):
    change_metadata(lambda content: content["episodes"].clear())(manifests)
    for manifest in manifests:
        with h5py.File(manifest.with_name("trajectory.h5"), "w"):
            pass


def repeat(manifests):
    path = manifests[0].with_name("trajectory.h5")
    with h5py.File(path, "r+") as file:
        del file["traj_1"]
        file.copy("traj_0", "traj_1")
        change_entry(elapsed_steps=len(file["traj_0/actions"]))(manifests)


def change_robot(file):
    file["traj_1/env_states/articulations"].move("panda", "fetch")


def add_camera(file):
    file.copy(f"traj_1/{CAMERA}", "traj_1/obs/sensor_data/hand_camera")
    file["traj_1/obs/sensor_data/hand_camera/step"][1] += 1


def lead_elsewhere(kind: str):
    """Let the actions lead to another file: an array there, or any bytes."""

    def change(file):
        other = Path(file.filename).with_name("other.h5")
        with h5py.File(other, "w") as stranger:
            stranger["actions"] = values = file["traj_1/actions"][()]
        del file["traj_1/actions"]
        if kind == "link":
            file["traj_1/actions"] = h5py.ExternalLink(str(other), "actions")
        elif kind == "storage":
            external = [(str(other), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("traj_1/actions", values.shape, values.dtype, external=external)
        else:
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[:] = h5py.VirtualSource(str(other), "actions", values.shape)
            file.create_virtual_dataset("traj_1/actions", layout)

    return change_file(change)


def claim_gigabytes(file):
    """Give the actions a shape of 40 GB that takes no byte of the file."""
    del file["traj_1/actions"]
    file.create_dataset("traj_1/actions", (1_250_000_000, 8), np.float32, chunks=(1000, 8))


def repeat_seed(content):
    for entry in content["episodes"]:
        if entry["episode_id"] == 1:
            entry["episode_seed"] = content["episodes"][0]["episode_seed"]


def blacken(images):
    images[3] = 0
    return images


# The reason of an issue: the trajectory that it is about, and how to cause it.
CASES = {
    "does not exist; give .*": ("", replace_file(None, "trajectory.h5")),
    "does not exist; ManiSkill's trajectories need it beside trajectory.h5": (
        "",
        replace_file(None),
    ),
    "is not the .json of a ManiSkill trajectory file.*": ("", replace_file(b"[]")),
    "cannot be read .*: it is cut off, damaged or not HDF5.*": ("", cut),
    "was changed or damaged since manifest.json.*": ("", set_values("actions", (5, 2), 0.1)),
    "has demonstrations of PullCube-v1, not of PushCube-v1.*": (
        "",
        change_metadata(lambda content: content["env_info"].update(env_id="PullCube-v1")),
    ),
    "says that the robot is fetch, but PushCube-v1 is evaluated with panda.*": (
        "",
        change_metadata(
            lambda content: content["env_info"]["env_kwargs"].update(robot_uids="fetch")
        ),
    ),
    "its env_states are of the robot fetch, but the task is evaluated with panda": (
        "traj_1",
        change_file(change_robot),
    ),
    "holds no demonstration": ("", remove_all),
    "is listed in the .json but missing in the .h5": (
        "traj_1",
        change_file(lambda file: file.__delitem__("traj_1")),
    ),
    "is in the .h5 but not listed in the .json": ("traj_1", change_metadata(unlist)),
    "is listed twice in the .json": ("traj_1", change_metadata(list_twice)),
    "its entry in the .json is incomplete .*": ("traj_1", change_metadata(remove_seed)),
    "has no success": ("traj_1", remove("success")),
    "cannot be read .*: a part of the file is damaged": ("traj_1", zero_block("actions")),
    "repeats traj_0": ("traj_1", repeat),
    "has the seed of traj_0": ("traj_1", change_metadata(repeat_seed)),
    "its episode_seed is -1, not between 0 and .*": ("traj_1", change_entry(episode_seed=-1)),
    "actions is a link; .*": ("traj_1", lead_elsewhere("link")),
    "actions lies in another file; .*": ("traj_1", lead_elsewhere("storage")),
    "actions lies in another file; copy .*": ("traj_1", lead_elsewhere("virtual dataset")),
    r"actions has the shape \[1250000000, 8\], 37 GiB": ("traj_1", change_file(claim_gigabytes)),
    "env_states/actors/cube is 1e\\+03 m from the origin": (
        "traj_1",
        set_values(CUBE, (slice(None), 0), 1000),
    ),
    "its control mode is pd_joint_vel, not one of .*": (
        "traj_1",
        change_entry(control_mode="pd_joint_vel"),
    ),
    r"its actions are float64 .*, not float32 \[T, A\]": (
        "traj_1",
        change_array("actions", lambda values: values.astype(np.float64)),
    ),
    "it has 1 actions; at least 2 are needed": (
        "traj_1",
        change_array("actions", lambda values: values[:1]),
    ),
    "its actions have 7 dimensions, but pd_joint_pos has 8": (
        "traj_1",
        change_array("actions", lambda values: values[:, :7]),
    ),
    r"its actions reach .*, outside the \[-1, 1\] of pd_joint_delta_pos": (
        "traj_1",
        change_entry(control_mode="pd_joint_delta_pos"),
    ),
    "its actions are not finite at step 5": ("traj_1", set_values("actions", (5, 2), np.nan)),
    "its actions are all zero at step 10.*": (
        "traj_1",
        set_values("actions", slice(10, 20), 0),
    ),
    "its target of joint 4 is 0.5 rad at step 5, outside the arm's .*": (
        "traj_1",
        set_values("actions", (5, 3), 0.5),
    ),
    "its target of the gripper is 1.5 at step 5.*": (
        "traj_1",
        set_values("actions", (5, 7), 1.5),
    ),
    "env_states/actors/cube is int32 .*, not floating point.*": (
        "traj_1",
        change_array(CUBE, lambda values: values.astype(np.int32)),
    ),
    "env_states/actors/cube has .* steps for .* actions.*": (
        "traj_1",
        change_array(CUBE, lambda values: values[:-3]),
    ),
    "env_states/actors/cube is not finite at step 3": (
        "traj_1",
        set_values(CUBE, (3, 0), np.inf),
    ),
    "env_states/actors/cube holds no rotation at step 3.*": (
        "traj_1",
        set_values(CUBE, slice(3, 9), 0),
    ),
    "success is float32 .*": (
        "traj_1",
        change_array("success", lambda values: values.astype(np.float32)),
    ),
    "success has .* steps for .* actions": (
        "traj_1",
        change_array("success", lambda values: values[1:]),
    ),
    "it does not end in success": ("traj_1", set_values("success", slice(None), False)),
    "the .json says that it did not succeed": ("traj_1", change_entry(success=False)),
    "the .json counts 3 steps, but it has .* actions": ("traj_1", change_entry(elapsed_steps=3)),
    "has no obs/extra/tcp_pose": ("traj_1", remove("obs/extra/tcp_pose")),
    "obs/agent/qpos is int64 .*, not floating point.*": (
        "traj_1",
        change_array("obs/agent/qpos", lambda values: values.astype(np.int64)),
    ),
    "obs/agent/qpos has .* steps for .* actions.*": (
        "traj_1",
        change_array("obs/agent/qpos", lambda values: values[:-1]),
    ),
    "obs/agent/qpos is not finite at step 5": (
        "traj_1",
        set_values("obs/agent/qpos", (5, 2), np.nan),
    ),
    "has no images": ("traj_1", remove(f"{CAMERA}/rgb")),
    "its images of base_camera are float32 .*, not uint8 .*": (
        "traj_1",
        change_array(f"{CAMERA}/rgb", lambda values: values.astype(np.float32)),
    ),
    "it has .* images of base_camera for .* rendered steps": (
        "traj_1",
        change_array(f"{CAMERA}/rgb", lambda values: values[:-3]),
    ),
    "the rendered steps of base_camera do not rise from 0": (
        "traj_1",
        change_array(f"{CAMERA}/step", lambda values: values[::-1]),
    ),
    "the rendered steps of base_camera reach 400, beyond its .* actions": (
        "traj_1",
        set_values(f"{CAMERA}/step", -1, 400),
    ),
    "hand_camera was rendered at other steps than base_camera": (
        "traj_1",
        change_file(add_camera),
    ),
    "its images of base_camera cannot be read .*": ("traj_1", zero_block(f"{CAMERA}/rgb")),
    r"of its images of base_camera 1 of .* show nothing: number 3 is all \[0, 0, 0\]": (
        "traj_1",
        change_array(f"{CAMERA}/rgb", blacken),
    ),
    "of its images of base_camera all .* are the same": (
        "traj_1",
        change_array(f"{CAMERA}/rgb", lambda values: np.repeat(values[:1], len(values), axis=0)),
    ),
    "has the cameras base_camera of 64 x 64 pixels, but .* has base_camera of 128 x 128 pixels": (
        "traj_2",
        change_array(f"{CAMERA}/rgb", lambda values: values[:, ::2, ::2], 1, "traj_2"),
    ),
    r"has the state qpos \[8\], tcp_pose \[7\], but .* has qpos \[9\], tcp_pose \[7\]": (
        "traj_1",
        change_array("obs/agent/qpos", lambda values: values[:, :8]),
    ),
}
# A dataset is given no task and no robot, and its inputs are compared with their manifests before.
NOT_OF_A_DATASET = (
    "does not exist; give",
    "has demonstrations of",
    "says that",
    "its env_states are",
    "was changed",
)


def test_valid_shards_pass(shards):
    issues, files = validate_paths(shards)
    assert (issues, len(files), sum(len(file.demos) for file in files)) == ([], 2, 3)
    paths = [shard.with_name("trajectory.h5") for shard in shards]
    assert not any(file.issues for file in validate_replays(paths, STATE, decode_images=True))


@pytest.mark.parametrize("reason", CASES)
def test_each_kind_of_issue(shards, tmp_path, reason):
    trajectory, spoil = CASES[reason]
    spoil(shards)
    if not reason.startswith(NOT_OF_A_DATASET):
        with pytest.raises(UserError, match=re.compile(reason, re.DOTALL)):
            make(tmp_path, shards)
        assert not (tmp_path / "manifest.json").exists()
        assert not (tmp_path / "lerobot").exists()
    paths = [shard.with_name("trajectory.h5") for shard in shards]
    files = validate_replays(paths, STATE, decode_images=True)
    files += validate_files(paths, task="PushCube-v1", robot="panda")
    issues = [issue for file in files for issue in file.issues] + validate_paths(shards)[0]
    if reason != "holds no demonstration":
        found = [issue for issue in issues if re.fullmatch(reason, issue.reason, re.DOTALL)]
        assert {issue.trajectory for issue in found} == {trajectory}, list(map(str, issues))
    # No other is accused; that the file was changed is found as well.
    assert {issue.trajectory for issue in issues} <= {trajectory, ""}


def test_all_issues_of_all_shards_are_one_list(shards, tmp_path):
    set_values("actions", (5, 2), np.nan)(shards)
    change_array(f"{CAMERA}/rgb", blacken, shard=1, trajectory="traj_2")(shards)
    with pytest.raises(
        UserError,
        match=r"traj_1: its actions are not finite at step 5; .*shard-001.* traj_2: of its images",
    ):
        make(tmp_path, shards)


def test_a_hand_before_the_camera_is_no_issue():
    """In PegInsertionSide it fills base_camera for a second; a camera that sees nothing differs."""
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    images[3:8] = np.arange(140, 145)[:, None, None, None]
    assert find_image_issue(images) is None
    images[8] = 139
    assert find_image_issue(images) == "6 of 10 show nothing: number 3 is all [140, 140, 140]"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_invalid_images_of_all_shards_are_one_list(shards, tmp_path, num_workers):
    """They are found while the shards are written, each by its own process."""
    for shard, trajectory in enumerate(["traj_0", "traj_2"]):
        change_array(f"{CAMERA}/rgb", blacken, shard, trajectory)(shards)
    change_array(f"{CAMERA}/rgb", lambda values: np.repeat(values[:1], len(values), axis=0))(shards)
    images = "of its images of base_camera"
    with pytest.raises(
        UserError,
        match=rf"traj_0: {images} 1 .*; .* traj_1: {images} all .*; .*shard-001.* traj_2: {images}",
    ):
        make(tmp_path, shards, num_workers=num_workers)
    assert not (tmp_path / "lerobot").exists()


@pytest.mark.parametrize("storage", ["png", "video"])
def test_skipping_makes_the_dataset_of_the_others(shards, pushcube_shards, tmp_path, storage):
    """Bytes are those of a dataset for which the invalid demo was never recorded."""
    change_array(f"{CAMERA}/rgb", blacken)(shards)
    skipped = make(tmp_path / "skipped", shards, storage, on_invalid="skip")
    change_file(lambda file: file.__delitem__("traj_1"))(shards)
    change_metadata(unlist)(shards)
    without = make(tmp_path / "without", shards, storage)
    assert skipped["digest"] == without["digest"]
    assert without["metadata"]["skipped"] == []
    (entry,) = skipped["metadata"]["skipped"]
    assert entry["file"] == str(shards[0].with_name("trajectory.h5"))
    assert entry["trajectory"] == "traj_1"
    assert entry["reason"].startswith("of its images of base_camera 1 of")
    seeds = read_manifest(pushcube_shards[0])["metadata"]["seeds"]
    assert skipped["metadata"]["seeds"] == [seeds[0], seeds[2]]


def test_shards_of_a_killed_job_that_skipped_others_are_not_kept(shards, tmp_path, monkeypatch):
    """They have other numbers if a demo was skipped that has been copied again since."""

    def interrupt(*_):
        raise KeyboardInterrupt

    whole = make(tmp_path / "whole", shards)
    valid = shards[0].with_name("trajectory.h5").read_bytes()
    set_values("actions", (5, 2), np.nan)(shards)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "assemble_dataset", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "again", shards, on_invalid="skip")
    shards[0].with_name("trajectory.h5").write_bytes(valid)
    assert make(tmp_path / "again", shards, on_invalid="skip")["digest"] == whole["digest"]


def test_a_demo_repeated_in_another_shard(shards, tmp_path):
    with (
        h5py.File(shards[0].with_name("trajectory.h5")) as first,
        h5py.File(shards[1].with_name("trajectory.h5"), "r+") as second,
    ):
        first.copy("traj_0", second, "traj_3")
    contents = [json.loads(shard.with_name("trajectory.json").read_text()) for shard in shards]
    contents[1]["episodes"].append(contents[0]["episodes"][0] | {"episode_id": 3})
    shards[1].with_name("trajectory.json").write_text(json.dumps(contents[1]))
    with pytest.raises(
        UserError, match=r"shard-001/trajectory.h5 traj_3: repeats .*shard-000/trajectory.h5 traj_0"
    ):
        make(tmp_path / "error", shards)
    metadata = make(tmp_path / "skipped", shards, on_invalid="skip")["metadata"]
    assert metadata["episodes"] == 3
    assert [entry["trajectory"] for entry in metadata["skipped"]] == ["traj_3"]


@pytest.mark.parametrize("spoil", [cut, replace_file(b"{"), replace_file(None, "trajectory.h5")])
def test_an_invalid_file_is_never_skipped(shards, tmp_path, spoil):
    spoil(shards)
    with pytest.raises(UserError, match="shard-000/trajectory"):
        make(tmp_path, shards, on_invalid="skip")


def test_every_zeroed_block_is_found(pushcube_demos, tmp_path):
    """Whatever block of the file a disk has lost, HDF5's own tables included."""
    content = pushcube_demos.with_name("trajectory.h5").read_bytes()
    shutil.copy(pushcube_demos.with_name("trajectory.json"), tmp_path)
    path = tmp_path / "trajectory.h5"
    for start in range(0, len(content), 1024):
        end = min(start + 512, len(content))
        spoilt = content[:start] + bytes(end - start) + content[end:]
        path.write_bytes(spoilt)
        (file,) = validate_files([path], task="PushCube-v1", robot="panda")
        assert file.issues or spoilt == content, f"the block at {start}"


def test_the_joint_limits_are_the_robots():
    for robot in ("panda_v2.urdf", "panda_v3.urdf"):
        folder = Path(mani_skill.__file__).parent / "assets/robots/panda"
        tree = xml.etree.ElementTree.parse(folder / robot)
        joints = {joint.get("name"): joint.find("limit") for joint in tree.getroot().iter("joint")}
        limits = [joints[f"panda_joint{number}"] for number in range(1, 8)]
        assert JOINT_LIMITS.tolist() == [
            [float(limit.get(end)) for limit in limits] for end in ("lower", "upper")
        ]


def test_the_command_lists_everything_and_writes_nothing(shards):
    set_values("actions", slice(10, 20), 0)(shards)
    change_array(f"{CAMERA}/rgb", blacken, shard=1, trajectory="traj_2")(shards)
    before = sorted(shards[0].parent.parent.rglob("*"))
    files = [str(shard.with_name("trajectory.h5")) for shard in shards]

    def validate(*paths: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "demo2eval.data.validate", *paths]
        return subprocess.run(command, capture_output=True, text=True)

    result = validate(*files)
    first, second = result.stdout.splitlines()
    reason = "its actions are all zero at step 10: a block of the file was lost"
    assert first == f"{files[0]} traj_1: {reason}"
    assert second.startswith(f"{files[1]} traj_2: of its images of base_camera 1 of")
    assert result.returncode == 1
    assert sorted(shards[0].parent.parent.rglob("*")) == before
    result = validate(str(shards[0].parent / "missing.h5"))
    assert (result.returncode, result.stdout.count("does not exist")) == (1, 1)
    # Of a manifest, what was changed since is found as well.
    result = validate(str(shards[1]))
    assert "was changed or damaged since manifest.json beside it was written" in result.stdout

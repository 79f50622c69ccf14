"""Every row of docs/checks.md: a real replayed file, spoilt in that way, is found out with that message; and what is done then."""

import ast
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

from demo2eval.data import dataset, replayed
from demo2eval.data import trajectory as demonstrations
from demo2eval.data import validate as check_demos
from demo2eval.data.import_demos import Settings as ImportSettings
from demo2eval.data.import_demos import import_demos
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checks.md"
CAMERA = "obs/sensor_data/base_camera"


def settings(**changes) -> dataset.Settings:
    defaults = {
        "prompt": "push",
        "cameras": ["base_camera"],
        "state": ["qpos", "tcp_pose"],
        "image_storage": "png",
    }
    return dataset.Settings(**(defaults | changes))


def make(folder: Path, shards: list[Path], workers: int = 1, **changes) -> dict:
    """Make a dataset and return its manifest."""
    dataset.dataset(settings(**changes), shards, folder / "manifest.json", workers=workers)
    return read_manifest(folder / "manifest.json")


@pytest.fixture
def shards(pushcube_shards, tmp_path) -> list[Path]:
    """Copies of two replayed shards, traj_0 and traj_1 in the first and traj_2 in the second, to be spoilt."""
    shutil.copytree(pushcube_shards[0].parent.parent, tmp_path / "shards")
    return sorted(tmp_path.glob("shards/*/manifest.json"))


# Ways to spoil the shards: each takes their manifests. Unless it says otherwise it is about traj_1, in the first shard.


def array(name: str, change, shard: int = 0, trajectory: str = "traj_1"):
    """Replace an array by what `change` makes of it."""

    def spoil(manifests):
        with h5py.File(manifests[shard].with_name("trajectory.h5"), "r+") as file:
            values = change(file[f"{trajectory}/{name}"][()])
            del file[f"{trajectory}/{name}"]
            file[f"{trajectory}/{name}"] = values

    return spoil


def put(name: str, index, value):
    """Set some values of an array."""

    def change(values):
        values[index] = value
        return values

    return array(name, change)


def within(change):
    """Change the open HDF5 file."""

    def spoil(manifests):
        with h5py.File(manifests[0].with_name("trajectory.h5"), "r+") as file:
            change(file)

    return spoil


def remove(name: str):
    return within(lambda file: file.__delitem__(f"traj_1/{name}"))


def zeroed(name: str):
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
            place = file[f"traj_1/{name}"].id.get_chunk_info(1)
        with open(path, "r+b") as raw:
            raw.seek(place.byte_offset)
            raw.write(bytes(place.size))

    return spoil


def described(change):
    """Change the .json of both shards."""

    def spoil(manifests):
        for manifest in manifests:
            path = manifest.with_name("trajectory.json")
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))

    return spoil


def entry(**changes):
    """Change traj_1's entry in the .json."""
    return described(
        lambda content: [
            one.update(changes) for one in content["episodes"] if one["episode_id"] == 1
        ]
    )


def unlisted(content):
    content["episodes"] = [one for one in content["episodes"] if one["episode_id"] != 1]


def listed_twice(content):
    content["episodes"] += [one for one in content["episodes"] if one["episode_id"] == 1]


def unseeded(content):
    for one in content["episodes"]:
        if one["episode_id"] == 1:
            del one["episode_seed"]


def file_with(content: bytes | None, name: str = "trajectory.json"):
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


def emptied(manifests):
    described(lambda content: content["episodes"].clear())(manifests)
    for manifest in manifests:
        with h5py.File(manifest.with_name("trajectory.h5"), "w"):
            pass


def repeated(manifests):
    path = manifests[0].with_name("trajectory.h5")
    with h5py.File(path, "r+") as file:
        del file["traj_1"]
        file.copy("traj_0", "traj_1")
        entry(elapsed_steps=len(file["traj_0/actions"]))(manifests)


def other_robot(file):
    file["traj_1/env_states/articulations"].move("panda", "fetch")


def second_camera(file):
    file.copy(f"traj_1/{CAMERA}", "traj_1/obs/sensor_data/hand_camera")
    file["traj_1/obs/sensor_data/hand_camera/step"][1] += 1


def black(pictures):
    pictures[3] = 0
    return pictures


CUBE = "env_states/actors/cube"
# First words of a message in the page: the trajectory that it is about, and what brings it about.
CASES = {
    "does not exist; give": ("", file_with(None, "trajectory.h5")),
    "does not exist; ManiSkill's": ("", file_with(None)),
    "is not the description": ("", file_with(b"[]")),
    "cannot be opened": ("", cut),
    "cannot be read": ("traj_1", zeroed("actions")),
    "is not what": ("", put("actions", (5, 2), 0.1)),
    "holds demonstrations of <task>, not": (
        "",
        described(lambda content: content["env_info"].update(env_id="PullCube-v1")),
    ),
    "holds demonstrations of <task>, which": (
        "",
        described(lambda content: content["env_info"].update(env_id="PokeCube-v1")),
    ),
    "says that": (
        "",
        described(lambda content: content["env_info"]["env_kwargs"].update(robot_uids="fetch")),
    ),
    "its env_states are of the robot": ("traj_1", within(other_robot)),
    "holds no demonstration": ("", emptied),
    "is listed in the .json but": ("traj_1", within(lambda file: file.__delitem__("traj_1"))),
    "is in the .h5 but": ("traj_1", described(unlisted)),
    "is listed twice": ("traj_1", described(listed_twice)),
    "its entry in the .json": ("traj_1", described(unseeded)),
    "lacks": ("traj_1", remove("success")),
    "repeats": ("traj_1", repeated),
    "its control mode is": ("traj_1", entry(control_mode="pd_joint_vel")),
    "its actions are <type>": (
        "traj_1",
        array("actions", lambda values: values.astype(np.float64)),
    ),
    "it has <n> actions": ("traj_1", array("actions", lambda values: values[:1])),
    "its actions have": ("traj_1", array("actions", lambda values: values[:, :7])),
    "its actions reach": ("traj_1", entry(control_mode="pd_joint_delta_pos")),
    "its actions are not finite": ("traj_1", put("actions", (5, 2), np.nan)),
    "its actions are all zero": ("traj_1", put("actions", slice(10, 20), 0)),
    "its target of joint": ("traj_1", put("actions", (5, 3), 0.5)),
    "its target of the gripper": ("traj_1", put("actions", (5, 7), 1.5)),
    "env_states/<part> is <type>": ("traj_1", array(CUBE, lambda values: values.astype(np.int32))),
    "env_states/<part> has": ("traj_1", array(CUBE, lambda values: values[:-3])),
    "env_states/<part> is not finite": ("traj_1", put(CUBE, (3, 0), np.inf)),
    "env_states/<part> holds no rotation": ("traj_1", put(CUBE, slice(3, 9), 0)),
    "success is": ("traj_1", array("success", lambda values: values.astype(np.float32))),
    "success has": ("traj_1", array("success", lambda values: values[1:])),
    "it does not end": ("traj_1", put("success", slice(None), False)),
    "the .json says": ("traj_1", entry(success=False)),
    "the .json counts": ("traj_1", entry(elapsed_steps=3)),
    "its observations cannot": ("traj_1", zeroed("obs/agent/qpos")),
    "has no obs/agent": ("traj_1", remove("obs/extra/tcp_pose")),
    "obs/<part> is <type>": ("traj_1", array("obs/agent/qpos", lambda values: values[:, :8])),
    "obs/<part> has": ("traj_1", array("obs/agent/qpos", lambda values: values[:-1])),
    "obs/<part> is not finite": ("traj_1", put("obs/agent/qpos", (5, 2), np.nan)),
    "has no <arrays>": ("traj_1", remove(f"{CAMERA}/step")),
    "its pictures of <camera> are": (
        "traj_1",
        array(f"{CAMERA}/rgb", lambda values: values.astype(np.float32)),
    ),
    "it has <n> pictures": ("traj_1", array(f"{CAMERA}/rgb", lambda values: values[:-3])),
    "the rendered steps of <camera> do not": (
        "traj_1",
        array(f"{CAMERA}/step", lambda values: values[::-1]),
    ),
    "the rendered steps of <camera> reach": ("traj_1", put(f"{CAMERA}/step", -1, 400)),
    "<camera> was rendered": ("traj_1", within(second_camera)),
    "its pictures of <camera> cannot": ("traj_1", zeroed(f"{CAMERA}/rgb")),
    "<n> of its": ("traj_1", array(f"{CAMERA}/rgb", black)),
    "all <n> pictures": (
        "traj_1",
        array(f"{CAMERA}/rgb", lambda values: np.repeat(values[:1], len(values), axis=0)),
    ),
    "has <value>": (
        "traj_2",
        array(f"{CAMERA}/rgb", lambda values: values[:, ::2, ::2], shard=1, trajectory="traj_2"),
    ),
}


# A dataset is not told its task, takes the cameras that it needs, and has the hashes of manifests only.
NOT_OF_A_DATASET = ("holds demonstrations of <task>, not", "<camera> was rendered", "is not what")


def page_messages() -> list[str]:
    """Return the messages of the page's tables."""
    rows = [
        line.split(" | ")
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and "`" in line
    ]
    return [row[1].strip("`") for row in rows]


def code_messages() -> set[str]:
    """Return every reason that the code can give for a finding, with <> for what it puts in."""
    found = set()
    for module in (demonstrations, replayed, dataset, check_demos):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            values = []
            if isinstance(node, ast.Yield):
                values = [node.value]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                place = {"Finding": 2, "wrong": 0, "UnfitPictures": 0}.get(node.func.id)
                values = [] if place is None else node.args[place : place + 1]
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "reason":
                values = [node.value]
            for value in values:
                if isinstance(value, ast.JoinedStr):
                    found.add(
                        "".join(
                            part.value if isinstance(part, ast.Constant) else "<>"
                            for part in value.values
                        )
                    )
                elif isinstance(value, ast.Constant):
                    found.add(value.value)
    return found


def test_the_page_tells_what_the_code_says():
    assert {re.sub("<[^>]*>", "<>", message) for message in page_messages()} == code_messages()
    assert len(page_messages()) == len(CASES) == len(set(page_messages()))


def test_good_shards_pass(shards):
    assert check_demos.check_demos(shards) == ([], 2, 3)
    assert not any(
        recording.findings for recording in dataset.inspect(shards, settings(on_invalid="skip"))
    )


@pytest.mark.parametrize("message", page_messages())
def test_each_row_of_the_page(shards, tmp_path, message):
    ((trajectory, spoil),) = [case for start, case in CASES.items() if message.startswith(start)]
    expected = re.compile(
        ".+".join(re.escape(part) for part in re.split("<[^>]*>", message)), re.DOTALL
    )
    spoil(shards)
    if not message.startswith(NOT_OF_A_DATASET):
        with pytest.raises(UserError, match=expected):
            make(tmp_path, shards)
        assert not (tmp_path / "manifest.json").exists()
        assert not (tmp_path / "lerobot").exists()
    recordings = dataset.inspect(shards, settings(on_invalid="skip"))
    recordings += demonstrations.examine(
        [shard.with_name("trajectory.h5") for shard in shards], "PushCube-v1"
    )
    findings = [
        finding for recording in recordings for finding in recording.findings
    ] + check_demos.check_demos(shards)[0]
    if message != "holds no demonstration":
        found = [finding for finding in findings if expected.fullmatch(finding.reason)]
        assert {finding.trajectory for finding in found} == {trajectory}, [
            str(finding) for finding in findings
        ]
    # Nobody else is accused; that the file was changed is found as well.
    assert {finding.trajectory for finding in findings} <= {trajectory, ""}


def test_all_findings_of_all_shards_are_one_list(shards, tmp_path):
    put("actions", (5, 2), np.nan)(shards)
    array(f"{CAMERA}/rgb", black, shard=1, trajectory="traj_2")(shards)
    with pytest.raises(
        UserError,
        match=r"traj_1: its actions are not finite at step 5; .*shard-001.* traj_2: 1 of its \d+ pictures",
    ):
        make(tmp_path, shards)


def test_a_hand_before_the_camera_is_no_fault():
    """In PegInsertionSide it fills base_camera for a second; a camera that never sees anything is told from it."""
    pictures = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    pictures[3:8] = np.arange(140, 145)[:, None, None, None]
    assert list(replayed.picture_faults(pictures, "base_camera")) == []
    pictures[8] = 139
    (fault,) = replayed.picture_faults(pictures, "base_camera")
    assert (
        fault
        == "6 of its 10 pictures of base_camera show nothing: number 3 has the one colour [140, 140, 140]"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_pictures_of_all_shards_are_one_list(shards, tmp_path, workers):
    """They are found while the shards are written, each by its own process."""
    for shard, trajectory in enumerate(["traj_0", "traj_2"]):
        array(f"{CAMERA}/rgb", black, shard, trajectory)(shards)
    array(f"{CAMERA}/rgb", lambda values: np.repeat(values[:1], len(values), axis=0))(shards)
    with pytest.raises(
        UserError, match=r"traj_0: 1 of its .*; .* traj_1: all .*; .*shard-001.* traj_2: 1 of its"
    ):
        make(tmp_path, shards, workers=workers)
    assert not (tmp_path / "lerobot").exists()


@pytest.mark.parametrize("storage", ["png", "video"])
def test_skipping_makes_the_dataset_of_the_others(shards, pushcube_shards, tmp_path, storage):
    """Bytes are those of a dataset for which the bad demonstration was never recorded."""
    array(f"{CAMERA}/rgb", black)(shards)
    skipped = make(tmp_path / "skipped", shards, on_invalid="skip", image_storage=storage)[
        "metadata"
    ]
    within(lambda file: file.__delitem__("traj_1"))(shards)
    described(unlisted)(shards)
    without = make(tmp_path / "without", shards, image_storage=storage)
    assert read_manifest(tmp_path / "skipped" / "manifest.json")["digest"] == without["digest"]
    ((file, trajectory, reason),) = [
        (one["file"], one["trajectory"], one["reason"]) for one in skipped["skipped"]
    ]
    assert (file, trajectory) == (str(shards[0].with_name("trajectory.h5")), "traj_1")
    assert reason.startswith("1 of its")
    assert without["metadata"]["skipped"] == []
    seeds = read_manifest(pushcube_shards[0])["metadata"]["seeds"]
    assert skipped["seeds"] == [seeds[0], seeds[2]]


def test_a_run_that_left_others_out_is_not_gone_on_with(shards, tmp_path, monkeypatch):
    """Shards of an interrupted run have other numbers if it skipped something that was copied again since."""
    whole = make(tmp_path / "whole", shards)
    sound = shards[0].with_name("trajectory.h5").read_bytes()
    put("actions", (5, 2), np.nan)(shards)
    monkeypatch.setattr(dataset, "assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "again", shards, on_invalid="skip")
    monkeypatch.undo()
    shards[0].with_name("trajectory.h5").write_bytes(sound)
    assert make(tmp_path / "again", shards, on_invalid="skip")["digest"] == whole["digest"]


def test_a_demonstration_repeated_in_another_shard(shards, tmp_path):
    with (
        h5py.File(shards[0].with_name("trajectory.h5")) as first,
        h5py.File(shards[1].with_name("trajectory.h5"), "r+") as second,
    ):
        first.copy("traj_0", second, "traj_3")
    entries = [json.loads(shard.with_name("trajectory.json").read_text()) for shard in shards]
    entries[1]["episodes"].append(entries[0]["episodes"][0] | {"episode_id": 3})
    shards[1].with_name("trajectory.json").write_text(json.dumps(entries[1]))
    with pytest.raises(
        UserError, match=r"shard-001/trajectory.h5 traj_3: repeats .*shard-000/trajectory.h5 traj_0"
    ):
        make(tmp_path / "refused", shards)
    facts = make(tmp_path / "skipped", shards, on_invalid="skip")["metadata"]
    assert (facts["episodes"], [one["trajectory"] for one in facts["skipped"]]) == (3, ["traj_3"])


@pytest.mark.parametrize(
    "spoil",
    [
        cut,
        file_with(b"{"),
        described(lambda content: content["env_info"].update(env_id="PokeCube-v1")),
    ],
)
def test_a_bad_file_is_never_skipped(shards, tmp_path, spoil):
    spoil(shards)
    with pytest.raises(UserError, match="shard-000/trajectory"):
        make(tmp_path, shards, on_invalid="skip")


def test_importing_skips_what_is_bad(pushcube_demos, tmp_path):
    for name in ("trajectory.h5", "trajectory.json"):
        shutil.copy(pushcube_demos.with_name(name), tmp_path)
    put("actions", (5, 2), np.nan)([tmp_path / "manifest.json"])
    output = tmp_path / "shard-000" / "manifest.json"
    with pytest.raises(
        UserError, match=r"not finite.*or leave these trajectories out with demos.on_invalid: skip"
    ):
        import_demos(
            ImportSettings(task="PushCube-v1", count=2), tmp_path / "trajectory.h5", output
        )
    assert not output.exists()
    import_demos(
        ImportSettings(task="PushCube-v1", count=2, on_invalid="skip"),
        tmp_path / "trajectory.h5",
        output,
    )
    facts, seeds = (
        read_manifest(output)["metadata"],
        read_manifest(pushcube_demos)["metadata"]["seeds"],
    )
    assert facts["seeds"] == [seeds[0], seeds[2]]
    reason = "its actions are not finite at step 5"
    assert facts["skipped"] == [
        {"file": str(tmp_path / "trajectory.h5"), "trajectory": "traj_1", "reason": reason}
    ]
    assert [
        one.name
        for one in demonstrations.read_demonstrations(
            output.with_name("trajectory.h5"), "PushCube-v1"
        )[0]
    ] == [
        "traj_0",
        "traj_2",
    ]


def test_replaying_skips_what_is_bad(pushcube_demos, tmp_path):
    from demo2eval.data.replay import Settings, replay

    shutil.copytree(pushcube_demos.parent, tmp_path / "demos")
    put("actions", (5, 2), np.nan)([tmp_path / "demos" / "manifest.json"])
    output = tmp_path / "shard-000" / "manifest.json"
    settings = Settings(
        task="PushCube-v1",
        cameras=["base_camera"],
        image_size=32,
        image_stride=60,
        on_invalid="skip",
    )
    replay(settings, tmp_path / "demos" / "manifest.json", output)
    facts, seeds = (
        read_manifest(output)["metadata"],
        read_manifest(pushcube_demos)["metadata"]["seeds"],
    )
    assert (facts["demonstrations"], facts["seeds"]) == (2, [seeds[0], seeds[2]])
    assert [one["trajectory"] for one in facts["skipped"]] == ["traj_1"]
    assert check_demos.check_demos([output]) == ([], 1, 2)


def test_nothing_left_is_refused(pushcube_demos, tmp_path):
    for name in ("trajectory.h5", "trajectory.json"):
        shutil.copy(pushcube_demos.with_name(name), tmp_path)
    described(lambda content: [one.update(success=False) for one in content["episodes"]])(
        [tmp_path / "manifest.json"]
    )
    with pytest.raises(UserError, match=r"traj_0: the .json says .* traj_2: the .json says"):
        demonstrations.sound_demonstrations(tmp_path / "trajectory.h5", "PushCube-v1", "skip")


def test_every_zeroed_block_is_found(pushcube_demos, tmp_path):
    """Whatever block of the file a disk has lost, HDF5's own tables included."""
    content = pushcube_demos.with_name("trajectory.h5").read_bytes()
    shutil.copy(pushcube_demos.with_name("trajectory.json"), tmp_path)
    for start in range(0, len(content), 1024):
        spoilt = content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]
        (tmp_path / "trajectory.h5").write_bytes(spoilt)
        (recording,) = demonstrations.examine([tmp_path / "trajectory.h5"], "PushCube-v1")
        assert recording.findings or spoilt == content, f"the block at {start}"


def test_the_joint_limits_are_the_robots():
    for robot in ("panda_v2.urdf", "panda_v3.urdf"):
        tree = xml.etree.ElementTree.parse(
            Path(mani_skill.__file__).parent / "assets/robots/panda" / robot
        )
        joints = {joint.get("name"): joint.find("limit") for joint in tree.getroot().iter("joint")}
        limits = [joints[f"panda_joint{number}"] for number in range(1, 8)]
        assert [
            [float(one.get(end)) for one in limits] for end in ("lower", "upper")
        ] == demonstrations.JOINT_LIMITS.tolist()


def test_the_command_lists_everything_and_writes_nothing(shards):
    put("actions", slice(10, 20), 0)(shards)
    array(f"{CAMERA}/rgb", black, shard=1, trajectory="traj_2")(shards)
    before = sorted(shards[0].parent.parent.rglob("*"))
    files = [str(shard.with_name("trajectory.h5")) for shard in shards]
    command = [sys.executable, "-m", "demo2eval.data.validate"]
    result = subprocess.run([*command, *files], capture_output=True, text=True)
    first, second = result.stdout.splitlines()
    assert (
        first
        == f"{files[0]} traj_1: its actions are all zero at step 10: a block of the file was lost"
    )
    assert second.startswith(f"{files[1]} traj_2: 1 of its")
    assert result.returncode == 1
    assert sorted(shards[0].parent.parent.rglob("*")) == before
    result = subprocess.run(
        [*command, str(shards[0].parent / "missing.h5")], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout.count("does not exist")) == (1, 1)

"""What demos.source names, and what is refused before any job."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from demo2eval import config
from demo2eval.data import sources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(pushcube_demos, tmp_path, monkeypatch) -> Path:
    """A folder with two copies of three demos, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    sources._content_id.cache_clear()
    sources._read_episodes.cache_clear()
    for name in ("a", "b"):
        for suffix in (".h5", ".json"):
            shutil.copy(pushcube_demos.with_name(f"trajectory{suffix}"), tmp_path / (name + suffix))
    return tmp_path


def edit_json(file: Path, function) -> None:
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def find_problems(name: str, **changes: dict) -> str | None:
    """Return what is said of a run, with changes to its sections."""
    files = ("config/config.yaml", "tests/config/smallest.yaml")
    content = [yaml.safe_load((ROOT / file).read_text()) for file in files]
    run = content[1]["runs"]["smallest"]
    for section, change in changes.items():
        run[section] = run.get(section, {}) | change
    run["demos"]["source"] = name
    return sources.find_problems(config.load({**content[0], "runs": {"mine": run}})["mine"])


def test_a_file_a_list_a_folder_and_a_glob(folder):
    a, b = Path("a.h5"), Path("b.h5")
    assert sources.list_files("a.h5") == [a]
    assert sources.list_files(["b.h5", "a.h5", "b.h5"]) == [b, a]
    assert sources.list_files(str(folder)) == [folder / "a.h5", folder / "b.h5"]
    assert sources.list_files("*.h5") == [a, b]
    assert sources.list_files("**/b*.h5") == [b]
    assert [sources.count_demos(file) for file in (a, b)] == [3, 3]


def test_what_identifies_files_is_their_content(folder):
    identity = sources.content_id([Path("a.h5")])
    # The same content, elsewhere, and known without a look at a file that did not change.
    assert sources.content_id([Path("b.h5")]) == identity
    (folder / "moved").mkdir()
    for suffix in (".h5", ".json"):
        (folder / f"a{suffix}").rename(folder / f"moved/a{suffix}")
    assert sources.content_id([Path("moved/a.h5")]) == identity
    known = json.loads(sources.HASHES.read_text())
    assert len(known) == 6
    edit_json(Path("b.json"), lambda content: content["episodes"].pop())
    sources._content_id.cache_clear()
    assert sources.content_id([Path("b.h5")]) != identity


def test_a_file_is_read_once(folder):
    sources.content_id([Path("a.h5")])
    known = json.loads(sources.HASHES.read_text())
    known[str(folder / "a.h5")][2] = "what was known"
    sources.HASHES.write_text(json.dumps(known))
    sources._content_id.cache_clear()
    identity = sources.content_id([Path("a.h5")])
    (folder / "a.h5").touch()
    sources._content_id.cache_clear()
    assert sources.content_id([Path("a.h5")]) != identity


def robot(content: dict) -> None:
    content["env_info"]["env_kwargs"]["robot_uids"] = "panda_wristcam"


def task(content: dict) -> None:
    content["env_info"]["env_id"] = "StackCube-v1"


def control_mode(content: dict) -> None:
    for episode in content["episodes"]:
        episode["control_mode"] = "pd_ee_delta_pose"


def no_episodes(content: dict) -> None:
    content["episodes"] = []


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("a.h5", task, "a.h5: has demonstrations of StackCube-v1, not of PushCube-v1"),
        ("a.h5", robot, "a.json: says that the robot is panda_wristcam"),
        ("a.h5", control_mode, "replay.control_mode to pd_ee_delta_pose, and actions.delta to fal"),
        ("*.h5", control_mode, "a run of its own"),
        ("a.h5", no_episodes, "a.json: lists no trajectories"),
        ("a.json", None, "a.json: is no trajectory file; give the .h5"),
        ("c.h5", None, "c.h5: does not exist; give ManiSkill trajectory files"),
        ("c*.h5", None, "c*.h5: does not exist"),
        ("results", None, "results: holds no .h5; results/**/*.h5 looks"),
    ],
)
def test_files_that_do_not_fit_are_a_sentence(folder, name, change, expected):
    (folder / "results").mkdir()
    if change:
        edit_json(folder / "a.json", change)
    said = find_problems(name)
    assert said is not None
    assert expected in said
    assert "run 'mine'" in said


def test_evaluation_seeds_are_compared_with_the_demonstrations(folder):
    seeds = [
        episode["episode_seed"] for episode in json.loads(Path("a.json").read_text())["episodes"]
    ]
    assert find_problems("a.h5") is None
    said = find_problems("a.h5", evaluation={"first_seed": seeds[0]}, demos={"first_seed": 2**30})
    assert said is not None
    assert f"evaluation.first_seed to {max(seeds) + 1}" in said

"""Parcels: what travels, what stays, what is adopted and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest

from demo2eval import parcel
from demo2eval.errors import UserError
from demo2eval.manifest import making

STEP_2 = "results/run/checkpoints/2.json"


def make(output: str, stage: str, files: dict[str, bytes], inputs: tuple[str, ...] = (), setting: int = 1) -> None:
    """Make an output as a rule would, with Snakemake's record of it."""
    path = Path(output)
    with making(path, stage=stage, module="demo2eval.plan", settings={"a": setting}, inputs={"all": list(inputs)}) as work:
        for name, content in files.items():
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (path.parent / name).write_bytes(content)
        work.finish([path.parent / name for name in files])
    log = path.parent / f"{path.stem}.log"
    log.write_text("said something\n")
    record = {"rule": stage, "input": list(inputs), "log": [str(log)], "params": [f"'{setting}'"], "record_format_version": 6}
    parcel.Records().write(output, record)


def make_chain() -> None:
    """Make a small chain, in which names sort against the order of work."""
    dataset, cache = "results/datasets/d/manifest.json", "results/caches/c/manifest.json"
    make(dataset, "dataset", {"data.bin": b"d" * 1000})
    make(cache, "training_cache", {"images.npy": b"i" * 1000}, (dataset,))
    make("results/run/checkpoints/0.json", "init_checkpoint", {"0/assets/policy.json": b"{}"}, (dataset,))
    payload = {"2/assets/policy.json": b"{}", "2/metrics.csv": b"step\n", "2/params/data": bytes(range(256)) * 100}
    make(STEP_2, "train_segment", payload, ("results/run/checkpoints/0.json", cache))
    Path("results/run/checkpoints/2/train_state").mkdir()
    Path("results/run/checkpoints/2/train_state/data").write_bytes(b"t" * 500)
    make("results/run/rollouts/2.json", "rollout", {"2/episodes.csv": b"seed\n0\n"}, (STEP_2, dataset))


@pytest.fixture
def made(tmp_path, monkeypatch) -> Path:
    """A folder in which the chain was made, and into which the test goes."""
    folder = tmp_path / "there"
    folder.mkdir()
    monkeypatch.chdir(folder)
    make_chain()
    return folder


@pytest.fixture
def home(tmp_path) -> Path:
    """An empty folder, which `go_home` enters."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def files() -> set[str]:
    """Return the visible files under results/."""
    return {path.as_posix() for path in Path("results").rglob("*") if path.is_file() and not path.name.startswith(".")}


def test_light_work_is_adopted_as_if_it_had_been_made_here(made, home, tmp_path, monkeypatch):
    manifest = Path(STEP_2).read_bytes()
    assert parcel.pack(tmp_path / "box") == 1
    monkeypatch.chdir(home)
    adopted, incomplete = parcel.unpack(tmp_path / "box")
    assert len(adopted) == 5
    assert incomplete == []
    assert Path(STEP_2).read_bytes() == manifest
    assert parcel.Records().read(STEP_2)["params"] == ["'1'"]
    assert {
        "results/run/rollouts/2/episodes.csv",
        "results/run/checkpoints/2/metrics.csv",
        "results/datasets/d/manifest.log",
    } <= files()
    left_behind = ("data.bin", "images.npy", "/params/", "/train_state/")
    assert not [name for name in files() if any(part in name for part in left_behind)]
    assert not parcel.INCOMING.exists()
    made_of = [
        Path(name).stat().st_mtime_ns for name in ("results/datasets/d/manifest.json", STEP_2, "results/run/rollouts/2.json")
    ]
    assert made_of == sorted(made_of)
    # A stage that is asked to make it again finds it finished.
    make("results/run/rollouts/2.json", "rollout", {"2/episodes.csv": b"seed\n0\n"}, (STEP_2, "results/datasets/d/manifest.json"))


def test_large_payload_is_cut_and_may_come_in_parts(made, home, tmp_path, monkeypatch):
    first, second, outputs = tmp_path / "first", tmp_path / "second", [Path(STEP_2)]
    options = {"payload": outputs, "train_state": True, "parcel_bytes": 16_000}
    number = parcel.pack(first, outputs, parcels=2, **options)
    assert number > 2
    assert len(list(first.iterdir())) == 2
    assert parcel.pack(second, outputs, skip=2, **options) == number
    weights = Path("results/run/checkpoints/2/params/data").read_bytes()
    monkeypatch.chdir(home)
    assert STEP_2 in parcel.unpack(second)[1]
    assert not Path("results/run/checkpoints/2/params").exists()
    parcel.unpack(first)
    assert Path("results/run/checkpoints/2/params/data").read_bytes() == weights
    assert Path("results/run/checkpoints/2/train_state/data").exists()
    assert not parcel.INCOMING.exists()


def test_every_parcel_keeps_to_its_size(made, tmp_path):
    Path("results/run/checkpoints/2/params/data").write_bytes(os.urandom(300_000))
    parcel.pack(tmp_path / "box", payload=[Path("results")], parcel_bytes=64_000, parcels=99)
    sizes = [path.stat().st_size for path in (tmp_path / "box").iterdir()]
    assert len(sizes) > 4
    assert max(sizes) <= 64_000


def test_a_second_unpack_changes_nothing(made, home, tmp_path, monkeypatch):
    parcel.pack(tmp_path / "box")
    assert parcel.unpack(tmp_path / "box") == ([], [])
    monkeypatch.chdir(home)
    parcel.unpack(tmp_path / "box")
    before = files()
    assert parcel.unpack(tmp_path / "box") == ([], [])
    assert files() == before


def test_other_work_under_the_same_name_is_refused_unless_told(made, home, tmp_path, monkeypatch):
    parcel.pack(tmp_path / "box")
    monkeypatch.chdir(home)
    make("results/datasets/d/manifest.json", "dataset", {"data.bin": b"other"}, setting=2)
    before = files()
    with pytest.raises(UserError, match=r"datasets/d/manifest.json was made here too"):
        parcel.unpack(tmp_path / "box")
    assert files() == before
    parcel.unpack(tmp_path / "box", overwrite=True)
    assert json.loads(Path("results/datasets/d/manifest.json").read_text())["settings"] == {"a": 1}
    assert not Path("results/datasets/d/data.bin").exists()


def test_an_unfinished_job_is_not_packed(made, tmp_path):
    parcel.Records()._store._mark_incomplete("results/run/rollouts/2.json", None)
    assert "results/run/rollouts/2.json" not in {piece.output for piece in parcel.collect([Path("results")], [], False)}


@pytest.mark.parametrize("damage", [b"", b"no parcel", None])
def test_a_damaged_parcel_is_a_sentence(made, home, tmp_path, monkeypatch, damage):
    parcel.pack(tmp_path / "box")
    file = tmp_path / "box/parcel-000.tar.gz"
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    monkeypatch.chdir(home)
    with pytest.raises(UserError, match="damaged or no parcel"):
        parcel.unpack(tmp_path / "box")
    assert files() == set()


@pytest.mark.parametrize("name", ["/etc/passwd", "results/../x", "config/config.yaml", "results"])
def test_a_parcel_reaches_nothing_but_results(name):
    with pytest.raises(UserError, match="not below results/"):
        parcel.check_path(name)


def test_nothing_is_unpacked_while_snakemake_works(made, tmp_path):
    parcel.pack(tmp_path / "box")
    parcel.Records()._store._write_locks("output", ["results/run/success.csv"])
    with pytest.raises(UserError, match="Snakemake is at work"):
        parcel.unpack(tmp_path / "box")


def test_an_empty_folder_and_a_foreign_path_are_refused(made, tmp_path):
    with pytest.raises(UserError, match="holds no parcel"):
        parcel.unpack(tmp_path)
    with pytest.raises(UserError, match="not under results/"):
        parcel.pack(tmp_path / "box", [Path("config")])


def test_pruned_payload_leaves_the_manifest_to_travel(made, home, tmp_path, monkeypatch):
    shutil.rmtree("results/caches/c")
    parcel.pack(tmp_path / "box")
    monkeypatch.chdir(home)
    adopted, _ = parcel.unpack(tmp_path / "box")
    assert STEP_2 in adopted

"""The training cache: the dataset's looks, decoded; a killed run is finished by the next."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from demo2eval.data import image_cache as module
from demo2eval.data.dataset import Settings as DatasetSettings
from demo2eval.data.dataset import dataset
from demo2eval.data.image_cache import Settings, training_cache
from demo2eval.data.lerobot_reader import dataset_root, image_keys, read_columns, read_info
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.provenance import read_manifest


@pytest.fixture(scope="module", params=["video", "png"])
def stored(request, pushcube_shards, tmp_path_factory) -> tuple[str, Path]:
    """(how pictures are stored, manifest) of a dataset of two shards."""
    output = tmp_path_factory.mktemp(request.param) / "manifest.json"
    settings = DatasetSettings(
        prompt="push",
        cameras=["base_camera"],
        state=["qpos"],
        image_storage=request.param,
        video_crf=0,
    )
    dataset(settings, pushcube_shards, output)
    return request.param, output


@pytest.fixture(scope="module")
def looks(pushcube_replay) -> np.ndarray:
    """The rendered pictures that have a row, uint8 [looks, 128, 128, 3], of the dataset's two shards."""
    kept = []
    with h5py.File(pushcube_replay.parent / "trajectory.h5") as file:
        for index in range(3):
            camera = file[f"traj_{index}/obs/sensor_data/base_camera"]
            kept.append(camera["rgb"][()][camera["step"][()] < len(file[f"traj_{index}/actions"])])
    return np.concatenate(kept)


def make(folder: Path, source: Path, image_size: int, workers: int = 1) -> dict[str, np.ndarray]:
    """Make a cache and return its arrays."""
    training_cache(
        Settings(image_size=image_size), source, folder / "manifest.json", workers=workers
    )
    return {path.stem: np.load(path) for path in folder.glob("*.npy")}


def test_small_pictures_are_kept(stored, looks, tmp_path):
    storage, source = stored
    images = make(tmp_path, source, image_size=224)["images_base_camera"]
    assert images.shape == looks.shape
    assert np.abs(images.astype(int) - looks).max() <= (3 if storage == "video" else 0)


def test_large_pictures_are_resized_as_the_model_would(stored, looks, tmp_path):
    storage, source = stored
    images = make(tmp_path, source, image_size=64)["images_base_camera"]
    expected = np.stack([resize_with_pad(picture, 64, 64) for picture in looks])
    assert images.shape == expected.shape
    assert np.abs(images.astype(int) - expected).max() <= (3 if storage == "video" else 0)


def test_rows_are_those_of_the_dataset(stored, tmp_path):
    _, source = stored
    arrays = make(tmp_path, source, image_size=64)
    columns = read_columns(
        dataset_root(source), ["observation.state", "action", "episode_index", "picture_age"]
    )
    assert np.array_equal(arrays["state"], columns["observation.state"])
    assert np.array_equal(arrays["action"], columns["action"])
    assert np.array_equal(arrays["episode"], columns["episode_index"])
    assert np.array_equal(arrays["look_row"], np.flatnonzero(columns["picture_age"] == 0))
    assert len(arrays["images_base_camera"]) == len(arrays["look_row"])


def test_threads_change_nothing(stored, tmp_path):
    _, source = stored
    make(tmp_path / "one", source, image_size=64)
    make(tmp_path / "two", source, image_size=64, workers=2)
    digests = [
        read_manifest(tmp_path / name / "manifest.json")["digest"] for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "instant", ["in the first file", "after the first file", "while publishing"]
)
def test_killed_and_started_again_it_ends_the_same(stored, tmp_path, monkeypatch, instant):
    _, source = stored
    make(tmp_path / "undisturbed", source, image_size=64)
    decoded = []
    original = module.fill

    def interrupted(part, array, folder, resized_to):
        if instant == "in the first file":
            array[:3] = 7
            raise KeyboardInterrupt
        if instant == "after the first file" and part.number == 1:
            raise KeyboardInterrupt
        original(part, array, folder, resized_to)

    def publishing_stops(path, target):
        if "images" in path.name:
            original_rename(path, target)
            raise KeyboardInterrupt
        return original_rename(path, target)

    original_rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(module, "fill", interrupted)
        if instant == "while publishing":
            patch.setattr(Path, "rename", publishing_stops)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "killed", source, image_size=64)
    assert not (tmp_path / "killed" / "manifest.json").exists()

    decoding = module.decode_video if stored[0] == "video" else module.decode_png
    monkeypatch.setattr(
        module, decoding.__name__, lambda *given: (decoded.append(given[0]), decoding(*given))[1]
    )
    make(tmp_path / "killed", source, image_size=64)
    digests = [
        read_manifest(tmp_path / name / "manifest.json")["digest"]
        for name in ("undisturbed", "killed")
    ]
    assert digests[0] == digests[1]
    assert len(decoded) == (1 if instant == "after the first file" else 2)


def test_a_damaged_video_is_a_sentence(stored, tmp_path):
    import shutil

    storage, source = stored
    if storage == "png":
        pytest.skip("PNG images are inside the parquet file, whose damage test_norm_stats covers")
    copy = tmp_path / "dataset"
    shutil.copytree(source.parent, copy)
    path = sorted((copy / "lerobot" / "videos").rglob("*.mp4"))[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"file-001.mp4"):
        make(tmp_path / "out", copy / "manifest.json", image_size=64)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_pictures_are_named_by_camera(stored):
    _, source = stored
    assert image_keys(read_info(dataset_root(source))) == ["observation.images.base_camera"]

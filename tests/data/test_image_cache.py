"""The image cache: the dataset's samples, decoded; a killed job is finished by the next."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from demo2eval.config import Dataset
from demo2eval.data import image_cache as module
from demo2eval.data.dataset import build_dataset
from demo2eval.data.image_cache import build_image_cache
from demo2eval.data.lerobot_reader import dataset_root, image_keys, read_columns, read_info
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.provenance import read_manifest


@pytest.fixture(scope="module", params=["video", "png"])
def stored(request, pushcube_shards, tmp_path_factory) -> tuple[str, Path]:
    """(how images are stored, manifest) of a dataset of two shards."""
    output = tmp_path_factory.mktemp(request.param) / "manifest.json"
    settings = Dataset(image_storage=request.param)
    build_dataset(pushcube_shards, output, prompt="push", dataset=settings)
    return request.param, output


@pytest.fixture(scope="module")
def images(pushcube_replay) -> np.ndarray:
    """The rendered images that have a row, uint8 [samples, 128, 128, 3]."""
    kept = []
    with h5py.File(pushcube_replay.parent / "trajectory.h5") as file:
        for index in range(3):
            camera = file[f"traj_{index}/obs/sensor_data/base_camera"]
            kept.append(camera["rgb"][()][camera["step"][()] < len(file[f"traj_{index}/actions"])])
    return np.concatenate(kept)


def make(folder: Path, dataset: Path, image_size: int, num_workers: int = 1) -> dict:
    """Make a cache and return its arrays."""
    build_image_cache(
        dataset, folder / "manifest.json", image_size=image_size, num_workers=num_workers
    )
    return {path.stem: np.load(path) for path in folder.glob("*.npy")}


def test_small_images_are_kept(stored, images, tmp_path):
    storage, dataset = stored
    cached = make(tmp_path, dataset, image_size=224)["images_base_camera"]
    assert cached.shape == images.shape
    assert np.abs(cached.astype(int) - images).max() <= (3 if storage == "video" else 0)


def test_large_images_are_resized_as_the_model_would(stored, images, tmp_path):
    storage, dataset = stored
    cached = make(tmp_path, dataset, image_size=64)["images_base_camera"]
    expected = np.stack([resize_with_pad(image, 64, 64) for image in images])
    assert cached.shape == expected.shape
    assert np.abs(cached.astype(int) - expected).max() <= (3 if storage == "video" else 0)


def test_rows_are_those_of_the_dataset(stored, tmp_path):
    _, dataset = stored
    arrays = make(tmp_path, dataset, image_size=64)
    columns = read_columns(
        dataset_root(dataset), ["observation.state", "action", "episode_index", "frame_age"]
    )
    assert np.array_equal(arrays["state"], columns["observation.state"])
    assert np.array_equal(arrays["action"], columns["action"])
    assert np.array_equal(arrays["episode"], columns["episode_index"])
    assert np.array_equal(arrays["sample_row"], np.flatnonzero(columns["frame_age"] == 0))
    assert len(arrays["images_base_camera"]) == len(arrays["sample_row"])
    metadata = read_manifest(tmp_path / "manifest.json")["metadata"]
    assert metadata == {
        "episodes": 3,
        "rows": len(arrays["action"]),
        "samples": len(arrays["sample_row"]),
    }


def test_threads_change_nothing(stored, tmp_path):
    _, dataset = stored
    make(tmp_path / "one", dataset, image_size=64)
    make(tmp_path / "two", dataset, image_size=64, num_workers=2)
    digests = [
        read_manifest(tmp_path / name / "manifest.json")["digest"] for name in ("one", "two")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "instant", ["in the first file", "after the first file", "while publishing"]
)
def test_killed_and_started_again_it_ends_the_same(stored, tmp_path, monkeypatch, instant):
    storage, dataset = stored
    make(tmp_path / "undisturbed", dataset, image_size=64)
    decode_file, replace = module.decode_file, Path.replace

    def interrupt_decoding(task, array, folder, resize_to):
        if instant == "in the first file":
            array[:3] = 7
            raise KeyboardInterrupt
        if instant == "after the first file" and task.number == 1:
            raise KeyboardInterrupt
        decode_file(task, array, folder, resize_to)

    def interrupt_publishing(path, target):
        replaced = replace(path, target)
        if path.name.startswith("images"):
            raise KeyboardInterrupt
        return replaced

    with monkeypatch.context() as patch:
        patch.setattr(module, "decode_file", interrupt_decoding)
        if instant == "while publishing":
            patch.setattr(Path, "replace", interrupt_publishing)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "killed", dataset, image_size=64)
    assert not (tmp_path / "killed" / "manifest.json").exists()

    decoded, name = [], "decode_video" if storage == "video" else "decode_png"
    decode = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: (decoded.append(args[0]), decode(*args))[1])
    make(tmp_path / "killed", dataset, image_size=64)
    digests = [
        read_manifest(tmp_path / folder / "manifest.json")["digest"]
        for folder in ("undisturbed", "killed")
    ]
    assert digests[0] == digests[1]
    assert len(decoded) == (1 if instant == "after the first file" else 2)


def test_a_damaged_video_is_a_sentence(stored, tmp_path):
    storage, dataset = stored
    if storage == "png":
        pytest.skip("PNG images are inside the parquet file, whose damage test_norm_stats covers")
    copy = tmp_path / "dataset"
    shutil.copytree(dataset.parent, copy)
    path = sorted((copy / "lerobot" / "videos").rglob("*.mp4"))[1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"file-001.mp4"):
        make(tmp_path / "out", copy / "manifest.json", image_size=64)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_images_are_named_by_camera(stored):
    _, dataset = stored
    assert image_keys(read_info(dataset_root(dataset))) == ["observation.images.base_camera"]

"""Norm stats: those of every action chunk, computed the slow way; bad input is a sentence."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from demo2eval.config import Actions, Dataset
from demo2eval.data.dataset import build_dataset
from demo2eval.data.lerobot_reader import dataset_root, read_columns
from demo2eval.data.norm_stats import action_chunks, compute_norm_stats, compute_stats
from demo2eval.errors import UserError
from demo2eval.pi0.normalize import NormStats, load_norm_stats
from demo2eval.provenance import read_manifest

MASK = [True] * 7 + [False]
HORIZON = 16


@pytest.fixture(scope="module")
def pushcube(pushcube_replay, tmp_path_factory) -> Path:
    """Manifest of a dataset of three demos."""
    output = tmp_path_factory.mktemp("dataset") / "manifest.json"
    build_dataset([pushcube_replay], output, prompt="push")
    return output


@pytest.fixture(scope="module")
def columns(pushcube) -> dict[str, np.ndarray]:
    return read_columns(dataset_root(pushcube), ["observation.state", "action", "episode_index"])


def compute(columns: dict[str, np.ndarray], **settings) -> dict[str, NormStats]:
    """Return the statistics of a dataset's columns."""
    actions = Actions.model_validate({"action_horizon": HORIZON} | settings)
    mask = MASK if actions.delta else None
    chunks = action_chunks(columns, actions.action_horizon, mask)
    return compute_stats(columns["observation.state"], chunks, actions, mask)


def slow_chunks(columns: dict[str, np.ndarray], delta: bool) -> np.ndarray:
    """Return [rows, horizon, 8] chunks by loops, as the words of the definition say."""
    state, action, episode = columns.values()
    chunks = []
    for row in range(len(action)):
        chunk = []
        for ahead in range(HORIZON):
            there = row + ahead
            while there >= len(action) or episode[there] != episode[row]:
                there -= 1
            chunk.append(
                [action[there, j] - (state[row, j] if delta and j < 7 else 0) for j in range(8)]
            )
        chunks.append(chunk)
    return np.array(chunks, dtype=np.float64)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("per_timestep", [True, False])
def test_equal_to_the_definition(columns, delta, per_timestep):
    chunks = slow_chunks(columns, delta)
    values = chunks if per_timestep else chunks.reshape(-1, 8)
    stats = compute(columns, delta=delta, per_timestep_action_stats=per_timestep)["actions"]
    assert stats.mean.shape == values.shape[1:]
    assert np.allclose(stats.mean, values.mean(axis=0), rtol=0, atol=1e-9)
    assert np.allclose(stats.std, values.std(axis=0), rtol=0, atol=1e-9)
    assert np.allclose(stats.q01, np.quantile(values, 0.01, axis=0), rtol=0, atol=1e-9)
    assert np.allclose(stats.q99, np.quantile(values, 0.99, axis=0), rtol=0, atol=1e-9)


def test_the_state_counts_once_per_row(columns):
    mean = columns["observation.state"].mean(axis=0, dtype=np.float64)
    assert np.allclose(compute(columns)["state"].mean, mean, rtol=0, atol=1e-9)


def test_min_scale_widens_what_is_narrow_and_nothing_else(columns):
    plain = compute(columns)["actions"]
    widened = compute(columns, min_scale=0.02)["actions"]
    half = (plain.q99 - plain.q01) / 2
    assert (half < 0.02).any()
    assert (half > 0.02).any()
    assert np.allclose((widened.q99 - widened.q01) / 2, np.maximum(half, 0.02))
    assert np.allclose(widened.q99 + widened.q01, plain.q99 + plain.q01)
    assert np.allclose(widened.std, np.maximum(plain.std, 0.02))
    wide = half > 0.02
    assert np.array_equal(widened.q99[wide], plain.q99[wide])


def test_state_noise_widens_joints_and_differences_as_the_noise_does():
    random = np.random.default_rng(0)
    rows, noise = 60_000, 0.03
    columns = {
        "observation.state": random.normal(0.3, 0.05, (rows, 9)).astype(np.float32),
        "action": random.normal(0.1, 0.02, (rows, 8)).astype(np.float32),
        "episode_index": np.zeros(rows, np.int64),
    }
    stats = compute(columns, action_horizon=1, state_noise=noise)
    noisy = columns["observation.state"].copy()
    noisy[:, :7] += random.normal(0, noise, (rows, 7))
    delta = columns["action"].copy()
    delta[:, :7] -= noisy[:, :7]
    for found, expected in ((stats["state"], noisy), (stats["actions"], delta)):
        assert np.allclose(found.std, expected.std(axis=0), rtol=0.02)
        assert np.allclose(found.q01, np.quantile(expected, 0.01, axis=0), atol=0.006)
        assert np.allclose(found.q99, np.quantile(expected, 0.99, axis=0), atol=0.006)


def test_the_file_is_openpis_and_the_manifest_names_what_hardly_varies(pushcube, columns, tmp_path):
    compute_norm_stats(
        pushcube, tmp_path / "manifest.json", actions=Actions(action_horizon=HORIZON)
    )
    content = json.loads((tmp_path / "norm_stats.json").read_text())["norm_stats"]
    assert set(content) == {"state", "actions"}
    lengths = {key: len(value) for key, value in content["actions"].items()}
    assert lengths == {"mean": 8, "std": 8, "q01": 8, "q99": 8}
    assert np.allclose(
        load_norm_stats(tmp_path / "norm_stats.json")["actions"].q99,
        compute(columns)["actions"].q99,
    )
    metadata = read_manifest(tmp_path / "manifest.json")["metadata"]
    assert metadata["rows"] == len(columns["action"])
    # PushCube keeps its gripper closed.
    assert [text for text in metadata["hardly_varies"] if text.startswith("action gripper: std 0")]


def test_every_dimension_is_listed_with_its_range(pushcube, columns, tmp_path):
    actions = Actions(action_horizon=HORIZON, min_scale=0.5)
    compute_norm_stats(pushcube, tmp_path / "manifest.json", actions=actions)
    with open(tmp_path / "ranges.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    state = columns["observation.state"].astype(np.float64)
    names = ["observation.state"] * state.shape[1] + ["action"] * 8
    assert [row["column"] for row in rows] == names
    assert rows[0]["dimension"] == "panda_joint1"
    for dimension, row in enumerate(rows[: state.shape[1]]):
        values = state[:, dimension]
        expected = [
            values.min(),
            np.quantile(values, 0.01),
            values.mean(),
            values.std(),
            np.quantile(values, 0.99),
            values.max(),
        ]
        found = [float(row[key]) for key in ("min", "q01", "mean", "std", "q99", "max")]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # The gripper's commands, which are no differences, stay as they are.
    gripper = columns["action"][:, 7]
    assert (float(rows[-1]["min"]), float(rows[-1]["max"])) == (gripper.min(), gripper.max())


def test_a_state_without_joints_has_no_differences(pushcube_replay, tmp_path):
    dataset = tmp_path / "dataset" / "manifest.json"
    build_dataset([pushcube_replay], dataset, prompt="push", dataset=Dataset(state=["tcp_pose"]))
    output = tmp_path / "stats" / "manifest.json"
    with pytest.raises(
        UserError, match=r"actions.delta needs .*has pd_joint_pos and tcp_pose; set actions.delta"
    ):
        compute_norm_stats(dataset, output)
    assert not output.exists()
    compute_norm_stats(dataset, output, actions=Actions(delta=False))


def test_a_cut_file_is_a_sentence(pushcube, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(pushcube.parent, copy)
    path = next((copy / "lerobot" / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"parquet is not what .* describes"):
        compute_norm_stats(copy / "manifest.json", tmp_path / "out" / "manifest.json")

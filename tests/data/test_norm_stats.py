"""Norm stats: those of every action chunk, computed the slow way; bad input is a sentence."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo2eval.data.dataset import Settings as DatasetSettings
from demo2eval.data.dataset import dataset
from demo2eval.data.lerobot_reader import dataset_root, read_columns
from demo2eval.data.norm_stats import Settings, compute, norm_stats
from demo2eval.errors import UserError
from demo2eval.pi0.normalize import load_norm_stats
from demo2eval.provenance import read_manifest

MASK = [True] * 7 + [False]
HORIZON = 16


@pytest.fixture(scope="module")
def pushcube(pushcube_replay, tmp_path_factory) -> Path:
    """Manifest of a dataset of three demonstrations."""
    output = tmp_path_factory.mktemp("dataset") / "manifest.json"
    dataset(
        DatasetSettings(prompt="push", cameras=["base_camera"], state=["qpos"]),
        [pushcube_replay],
        output,
    )
    return output


@pytest.fixture(scope="module")
def columns(pushcube) -> dict[str, np.ndarray]:
    return read_columns(dataset_root(pushcube), ["observation.state", "action", "episode_index"])


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
@pytest.mark.parametrize("chunkwise", [True, False])
def test_equal_to_the_definition(columns, delta, chunkwise):
    settings = Settings(
        action_horizon=HORIZON,
        delta_action_mask=MASK if delta else None,
        per_timestep_action_stats=chunkwise,
    )
    chunks = slow_chunks(columns, delta)
    values = chunks if chunkwise else chunks.reshape(-1, 8)
    stats = compute(columns, settings)["actions"]
    assert stats.mean.shape == values.shape[1:]
    assert np.allclose(stats.mean, values.mean(axis=0), rtol=0, atol=1e-9)
    assert np.allclose(stats.std, values.std(axis=0), rtol=0, atol=1e-9)
    assert np.allclose(stats.q01, np.quantile(values, 0.01, axis=0), rtol=0, atol=1e-9)
    assert np.allclose(stats.q99, np.quantile(values, 0.99, axis=0), rtol=0, atol=1e-9)


def test_the_state_counts_once_a_row(columns):
    stats = compute(columns, Settings(action_horizon=HORIZON, delta_action_mask=MASK))["state"]
    assert np.allclose(
        stats.mean, columns["observation.state"].mean(axis=0, dtype=np.float64), rtol=0, atol=1e-9
    )


def test_the_floor_widens_what_is_narrow_and_nothing_else(columns):
    plain = compute(columns, Settings(action_horizon=HORIZON, delta_action_mask=MASK))["actions"]
    floored = compute(
        columns, Settings(action_horizon=HORIZON, delta_action_mask=MASK, min_scale=0.02)
    )["actions"]
    half = (plain.q99 - plain.q01) / 2
    assert (half < 0.02).any()
    assert (half > 0.02).any()
    assert np.allclose((floored.q99 - floored.q01) / 2, np.maximum(half, 0.02))
    assert np.allclose(floored.q99 + floored.q01, plain.q99 + plain.q01)
    assert np.allclose(floored.std, np.maximum(plain.std, 0.02))
    wide = half > 0.02
    assert np.array_equal(floored.q99[wide], plain.q99[wide])


def test_state_noise_widens_joints_and_differences_as_the_noise_does():
    random = np.random.default_rng(0)
    rows, noise = 60_000, 0.03
    columns = {
        "observation.state": random.normal(0.3, 0.05, (rows, 9)).astype(np.float32),
        "action": random.normal(0.1, 0.02, (rows, 8)).astype(np.float32),
        "episode_index": np.zeros(rows, np.int64),
    }
    stats = compute(columns, Settings(action_horizon=1, delta_action_mask=MASK, state_noise=noise))
    noisy = columns["observation.state"].copy()
    noisy[:, :7] += random.normal(0, noise, (rows, 7))
    delta = columns["action"].copy()
    delta[:, :7] -= noisy[:, :7]
    for seen, expected in ((stats["state"], noisy), (stats["actions"], delta)):
        assert np.allclose(seen.std, expected.std(axis=0), rtol=0.02)
        assert np.allclose(seen.q01, np.quantile(expected, 0.01, axis=0), atol=0.006)
        assert np.allclose(seen.q99, np.quantile(expected, 0.99, axis=0), atol=0.006)


def test_the_file_is_openpis_and_the_manifest_names_what_hardly_varies(pushcube, columns, tmp_path):
    settings = Settings(action_horizon=HORIZON, delta_action_mask=MASK)
    norm_stats(settings, pushcube, tmp_path / "manifest.json")
    content = json.loads((tmp_path / "norm_stats.json").read_text())["norm_stats"]
    assert set(content) == {"state", "actions"}
    assert {key: len(value) for key, value in content["actions"].items()} == {
        "mean": 8,
        "std": 8,
        "q01": 8,
        "q99": 8,
    }
    assert np.allclose(
        load_norm_stats(tmp_path / "norm_stats.json")["actions"].q99,
        compute(columns, settings)["actions"].q99,
    )
    facts = read_manifest(tmp_path / "manifest.json")["metadata"]
    assert facts["rows"] == len(columns["action"])
    assert facts["actions_counted"] == "every step of every chunk, as openpi's"
    # PushCube keeps its gripper closed.
    assert [note for note in facts["notes"] if note.startswith("action gripper: std 0")]


def test_every_dimension_is_listed_with_its_range(pushcube, columns, tmp_path):
    norm_stats(
        Settings(action_horizon=HORIZON, delta_action_mask=MASK, min_scale=0.5),
        pushcube,
        tmp_path / "manifest.json",
    )
    with open(tmp_path / "ranges.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    state = columns["observation.state"].astype(np.float64)
    assert [row["column"] for row in rows] == ["observation.state"] * state.shape[1] + [
        "action"
    ] * 8
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
        assert [
            float(row[key]) for key in ("min", "q01", "mean", "std", "q99", "max")
        ] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # The gripper's commands, which are no differences, stay as they are.
    assert (float(rows[-1]["min"]), float(rows[-1]["max"])) == (
        columns["action"][:, 7].min(),
        columns["action"][:, 7].max(),
    )


@pytest.mark.parametrize(("column", "value"), [("action", np.nan), ("observation.state", np.inf)])
def test_values_that_are_not_finite_are_a_sentence(pushcube, tmp_path, column, value):
    copy = tmp_path / "dataset"
    shutil.copytree(pushcube.parent, copy)
    path = next((copy / "lerobot" / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    rows = table.column(column).to_pylist()
    first = table.column("episode_index").to_pylist().index(1)
    rows[first + 5][3] = value
    index = table.schema.get_field_index(column)
    pq.write_table(
        table.set_column(index, column, pa.array(rows, table.schema.field(column).type)), path
    )
    with pytest.raises(
        UserError, match=f"column '{column}' of episode 1 holds NaN or infinity at step 5"
    ):
        norm_stats(
            Settings(action_horizon=HORIZON),
            copy / "manifest.json",
            tmp_path / "out" / "manifest.json",
        )
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_mask_that_does_not_fit_is_a_sentence(pushcube, tmp_path):
    with pytest.raises(UserError, match="delta_action_mask has 9 dimensions"):
        norm_stats(
            Settings(action_horizon=4, delta_action_mask=[True] * 9),
            pushcube,
            tmp_path / "manifest.json",
        )


def test_a_cut_file_is_a_sentence(pushcube, tmp_path):
    copy = tmp_path / "dataset"
    shutil.copytree(pushcube.parent, copy)
    path = next((copy / "lerobot" / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        norm_stats(
            Settings(action_horizon=4), copy / "manifest.json", tmp_path / "out" / "manifest.json"
        )

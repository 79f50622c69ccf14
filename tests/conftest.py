"""Fixtures of the whole suite."""

import functools
import json
import os
from pathlib import Path

import pytest
import yaml

# Two workers of pytest share two cores; nothing numerical has been imported yet.
for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# What one test compiled, the next one need not.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

FIXTURES = Path(__file__).resolve().parent / "fixtures"
SIMULATED = {"pushcube_replay", "pushcube_shards", "pushcube_run", "stack"}
"""Fixtures that need the simulator, and so the tests that use them."""
TASKS = (
    "StackCube-v1",
    "PickCube-v1",
    "PushCube-v1",
    "PullCube-v1",
    "PlaceSphere-v1",
    "PegInsertionSide-v1",
)


@functools.cache
def find_task(name: str):
    """Return a task's facts and settings, a `demo2eval.config.Task`, from config/config.yaml."""
    from demo2eval.config import Task

    config = yaml.safe_load((FIXTURES.parent.parent / "config/config.yaml").read_text())
    return Task.model_validate(config["tasks"][name])


def pytest_collection_modifyitems(items) -> None:
    """Mark what needs the simulator, and begin with the whole chain, which takes longest."""
    for item in items:
        if SIMULATED & set(item.fixturenames):
            item.add_marker("simulator")
    items.sort(key=lambda item: "test_workflow" not in item.nodeid)


@pytest.fixture(scope="session")
def pushcube_demos() -> Path:
    """Manifest of a shard of three planned PushCube demos."""
    return FIXTURES / "pushcube" / "manifest.json"


@pytest.fixture(scope="session")
def stackcube_demos() -> Path:
    """Manifest of a shard of two planned StackCube demos, by the Panda with a wrist camera."""
    return FIXTURES / "stackcube" / "manifest.json"


@pytest.fixture(scope="session")
def pushcube_replay(pushcube_demos, tmp_path_factory) -> Path:
    """Manifest of the three demos replayed with an image at every sixth step."""
    from demo2eval.config import Replay
    from demo2eval.data.replay import replay_demos

    output = tmp_path_factory.mktemp("replay") / "shard-000" / "manifest.json"
    task = find_task("PushCube-v1")
    replay_demos(
        pushcube_demos,
        output,
        task="PushCube-v1",
        robot=task.robot,
        object=task.object,
        replay=Replay(image_stride=6),
    )
    return output


@pytest.fixture(scope="session")
def pushcube_shards(pushcube_replay, tmp_path_factory) -> list[Path]:
    """Manifests of two shards with the three replayed demos: two, and one."""
    import h5py

    from demo2eval.provenance import read_manifest, sha256_file, sha256_text, to_json

    folder, manifests = tmp_path_factory.mktemp("shards"), []
    metadata = json.loads(pushcube_replay.with_name("trajectory.json").read_text())
    for number, episodes in enumerate((metadata["episodes"][:2], metadata["episodes"][2:])):
        shard = folder / f"shard-{number:03d}"
        shard.mkdir()
        (shard / "trajectory.json").write_text(json.dumps(metadata | {"episodes": episodes}))
        with (
            h5py.File(pushcube_replay.with_name("trajectory.h5")) as whole,
            h5py.File(shard / "trajectory.h5", "w") as file,
        ):
            for episode in episodes:
                whole.copy(f"traj_{episode['episode_id']}", file)
        outputs = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(shard.iterdir())
        }
        changes = {"outputs": outputs, "digest": sha256_text(to_json(outputs))}
        manifest = to_json(read_manifest(pushcube_replay) | changes)
        (shard / "manifest.json").write_text(manifest)
        manifests.append(shard / "manifest.json")
    return manifests


@pytest.fixture(scope="session")
def pushcube_run(pushcube_replay, tmp_path_factory) -> Path:
    """A run's folder: dataset, norm stats, image caches of two sizes, and checkpoint 0.

    pi05_tiny takes images of 64 pixels; the images of cache_128 have yet to be resized.
    """
    from demo2eval.config import Actions, Dataset, Model, Replay
    from demo2eval.data.dataset import build_dataset
    from demo2eval.data.image_cache import build_image_cache
    from demo2eval.data.norm_stats import compute_norm_stats
    from demo2eval.training.init_checkpoint import init_checkpoint

    folder, task = tmp_path_factory.mktemp("run"), find_task("PushCube-v1")
    dataset, norm_stats = folder / "dataset/manifest.json", folder / "norm_stats/manifest.json"
    build_dataset([pushcube_replay], dataset, prompt=task.prompt)
    for image_size in (64, 128):
        output = folder / f"cache_{image_size}/manifest.json"
        build_image_cache(dataset, output, image_size=image_size)
    actions = Actions(action_horizon=8, per_timestep_action_stats=True, min_scale=0.02)
    compute_norm_stats(dataset, norm_stats, actions=actions)
    init_checkpoint(
        norm_stats,
        folder / "checkpoints/0.json",
        task="PushCube-v1",
        prompt=task.prompt,
        robot=task.robot,
        replay=Replay(),
        dataset=Dataset(),
        actions=actions,
        model=Model(variant="pi05_tiny", weights=None, tokenizer=None, continuous_state_token=True),
    )
    return folder

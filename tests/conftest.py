"""Fixtures of the whole suite."""

import os
from pathlib import Path

import pytest

# Two workers of pytest share two cores; nothing numerical has been imported yet.
for name in ("OMP_NUM_THREADS", "LP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# What one test compiled, the next one need not.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def pytest_collection_modifyitems(items) -> None:
    """Begin with the whole chain: it takes longest, and would otherwise run alone at the end."""
    items.sort(key=lambda item: "test_workflow" not in item.nodeid)


@pytest.fixture(scope="session")
def pushcube_demos() -> Path:
    """Manifest of a shard of three planned PushCube demonstrations."""
    return FIXTURES / "pushcube" / "manifest.json"


@pytest.fixture(scope="session")
def stackcube_demos() -> Path:
    """Manifest of a shard of two planned StackCube demonstrations, by the Panda with a camera on its hand."""
    return FIXTURES / "stackcube" / "manifest.json"


@pytest.fixture(scope="session")
def pushcube_replay(pushcube_demos, tmp_path_factory) -> Path:
    """Manifest of the three demonstrations replayed with pictures at every sixth step."""
    from demo2eval.replay import Settings, replay

    output = tmp_path_factory.mktemp("replay") / "shard-000" / "manifest.json"
    replay(Settings(task="PushCube-v1", cameras=["base_camera"], render_every=6), pushcube_demos, output)
    return output

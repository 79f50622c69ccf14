"""policy.json: written, read, missing and of another version."""

import pytest

from demo2eval.checkpoints.policy_metadata import (
    PolicyMetadata,
    find_assets,
    read_policy_metadata,
)
from demo2eval.errors import UserError

METADATA = PolicyMetadata(
    variant="pi05_tiny",
    model_overrides={"action_horizon": 4},
    asset_id="maniskill/PushCube-v1",
    task="PushCube-v1",
    prompt="push the cube",
    robot="panda",
    cameras={"base_0_rgb": "base_camera"},
    image_size=128,
    state=["qpos"],
    control_mode="pd_joint_pos",
    delta_action_mask=None,
    action_dim=8,
    use_quantiles=True,
)


@pytest.fixture
def assets(tmp_path):
    """The assets folder of a checkpoint at `tmp_path`."""
    assets = tmp_path / "assets" / METADATA.asset_id
    assets.mkdir(parents=True)
    METADATA.write(tmp_path)
    return assets


def test_there_and_back(assets, tmp_path):
    assert find_assets(tmp_path) == assets
    assert read_policy_metadata(tmp_path) == METADATA
    assert read_policy_metadata(tmp_path).config.action_horizon == 4


def test_a_folder_without_metadata_is_a_sentence(tmp_path):
    with pytest.raises(
        UserError,
        match=rf"^{tmp_path} holds 0 files policy.json below assets/, not one; "
        "it is no checkpoint of demo2eval.$",
    ):
        read_policy_metadata(tmp_path)


def test_metadata_of_another_version_is_a_sentence(assets, tmp_path):
    file = assets / "policy.json"
    file.write_text(file.read_text().replace('"action_dim"', '"width"'))
    with pytest.raises(
        UserError,
        match=rf"^{file} was written by another version \(.*'width'.*\); "
        "make checkpoint 0 again.$",
    ):
        read_policy_metadata(tmp_path)

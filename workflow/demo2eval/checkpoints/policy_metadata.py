"""policy.json: what a policy needs besides its weights, norm stats and tokenizer."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config, make_config


@dataclass(frozen=True)
class PolicyMetadata:
    """The content of `<step>/assets/<asset id>/policy.json`.

    Attributes:
        variant: model variant, and `model_overrides`: arguments of `make_config` for it.
        asset_id: folder below `assets`.
        task: ManiSkill's task that the policy does, and `prompt`: what it is told to do.
        robot: ManiSkill's robot, of the data and so of the evaluation.
        cameras: camera of the model -> camera of the env.
        image_size: side of the env's images, pixels; the model's own is `config.siglip.image_size`.
        state: what the env's state vector is made of, in order.
        control_mode: of the env.
        delta_action_mask: per action dimension, whether it is a difference from the state; None: no
            one is.
        action_dim: dim of the env's actions; the model's are padded to `config.action_dim`.
        use_quantiles: normalize by q01 and q99 (Pi0.5) rather than by mean and std (Pi0).
    """

    variant: str
    model_overrides: dict
    asset_id: str
    task: str
    robot: str
    prompt: str
    cameras: dict[str, str]
    image_size: int
    state: list[str]
    control_mode: str
    delta_action_mask: list[bool] | None
    action_dim: int
    use_quantiles: bool

    @property
    def config(self) -> Pi0Config:
        """The model."""
        return make_config(self.variant, **self.model_overrides)

    def write(self, checkpoint: Path) -> None:
        """Write policy.json into a checkpoint's folder, whose assets folder exists."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)
        (checkpoint / "assets" / self.asset_id / "policy.json").write_text(text, encoding="utf-8")


def find_assets(checkpoint: Path) -> Path:
    """Return the folder that holds a checkpoint's norm_stats.json, tokenizer.model and policy.json.

    Raises:
        UserError: if there is not exactly one.
    """
    files = sorted(Path(checkpoint).glob("assets/**/policy.json"))
    if len(files) != 1:
        raise UserError(
            f"{checkpoint} holds {len(files)} files policy.json below assets/, not one; "
            "it is no checkpoint of demo2eval."
        )
    return files[0].parent


def read_policy_metadata(checkpoint: Path) -> PolicyMetadata:
    """Read a checkpoint's policy.json.

    Args:
        checkpoint: the folder of a step, results/<run>/checkpoints/<step>.

    Raises:
        UserError: if it is missing or does not hold what it should.
    """
    file = find_assets(checkpoint) / "policy.json"
    try:
        return PolicyMetadata(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{file} was written by another version ({error}); make checkpoint 0 again."
        ) from error

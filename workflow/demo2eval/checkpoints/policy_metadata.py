"""policy.json: what a checkpoint carries, besides weights, norm stats and tokenizer, to turn an observation into actions."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from demo2eval.errors import UserError


@dataclass(frozen=True)
class PolicyDescription:
    """The content of `<step>/assets/<asset id>/policy.json`.

    Attributes:
        variant: model variant, and `model_overrides`: arguments of `make_config` for it.
        asset_id: folder below `assets`.
        cameras: camera of the model -> camera of ManiSkill.
        image_size_rendered: side of ManiSkill's pictures, pixels.
        state: parts of the state vector, in order.
        delta_action_mask: per action dimension, whether it is a difference from the state; None: no one is.
        action_width: dimensions of ManiSkill's action.
        use_quantiles: normalise by q01 and q99 (Pi0.5) rather than by mean and std (Pi0).
    """

    variant: str
    model_overrides: dict
    asset_id: str
    task: str
    robot: str
    prompt: str
    cameras: dict[str, str]
    image_size_rendered: int
    state: list[str]
    control_mode: str
    delta_action_mask: list[bool] | None
    action_width: int
    use_quantiles: bool

    @property
    def config(self):
        """The model's `Pi0Config`."""
        from demo2eval.pi0.config import make_config

        return make_config(self.variant, **self.model_overrides)

    def write(self, checkpoint: Path) -> None:
        """Write policy.json into a checkpoint's folder, whose assets folder exists."""
        text = json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)
        (checkpoint / "assets" / self.asset_id / "policy.json").write_text(text, encoding="utf-8")


def assets_folder(checkpoint: Path) -> Path:
    """Return the folder that holds norm_stats.json, tokenizer.model and policy.json of a checkpoint.

    Raises:
        UserError: if there is not exactly one.
    """
    found = sorted(Path(checkpoint).glob("assets/**/policy.json"))
    if len(found) != 1:
        raise UserError(
            f"{checkpoint} holds {len(found)} files policy.json below assets/, not one; it is no checkpoint of demo2eval."
        )
    return found[0].parent


def read_description(checkpoint: Path) -> PolicyDescription:
    """Read a checkpoint's policy.json.

    Args:
        checkpoint: the folder of a step, results/<run>/checkpoints/<step>.

    Raises:
        UserError: if it is missing or does not hold what it should.
    """
    file = assets_folder(checkpoint) / "policy.json"
    try:
        return PolicyDescription(**json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{file} was written by another version ({error}); make checkpoint 0 again."
        ) from error

"""Checkpoint 0: where training starts, from published weights or from scratch, with all that evaluation needs beside it.

In:  the run's norm stats; base weights (an openpi checkpoint or Hugging Face safetensors), or none.
Out: <output without .json>/params and assets/<asset id>/{norm_stats.json, tokenizer.model, policy.json}. Weights that are in
     openpi's layout already are linked, not copied.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from demo2eval.checkpoints.policy_metadata import PolicyMetadata
from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.errors import UserError
from demo2eval.pi0.config import make_config, without_lora
from demo2eval.provenance import Work, making, read_manifest, sha256_text, to_json


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the policy is: the model, where its weights start, and how observations and actions are read."""

    task: str = option("ManiSkill task, such as PushCube-v1")
    prompt: str = option("the instruction that the policy is given")
    variant: str = option("model variant, such as pi05 or pi05_tiny")
    model_overrides: dict = option("fields of Pi0Config that differ from the variant's")
    weights: str | None = option(
        "openpi checkpoint, or folder or file of safetensors; null: from scratch", None
    )
    tokenizer: str | None = option(
        "SentencePiece model; null: one is trained from the prompt", None
    )
    seed: int = option("seed of the initial weights", 0)
    cameras: dict = option("camera of the model -> camera of ManiSkill")
    image_size: int = option("side of the rendered pictures, pixels")
    state: list = option("parts of the state vector, in order")
    control_mode: str = option("ManiSkill control mode of the actions")
    delta_action_mask: list | None = option(
        "per action dimension, whether it is a difference from the state; null: none", None
    )


def asset_id(task: str) -> str:
    """Return the name of the assets folder in checkpoints of a task."""
    return f"maniskill/{task}"


def describe(settings: Settings, norm_stats: dict, tokenizer) -> PolicyMetadata:
    """Return the description of the policy.

    Args:
        norm_stats: {"state": NormStats, "actions": NormStats}.
        tokenizer: the run's `Tokenizer`; the prompt is padded to what this task needs of it.
    """
    overrides = dict(settings.model_overrides)
    if settings.weights is None and settings.tokenizer is None:
        overrides.setdefault("vocab_size", tokenizer.vocab_size)
    config = make_config(settings.variant, **overrides)
    state_dim = norm_stats["state"].mean.shape[-1] if config.discrete_state_input else None
    overrides["max_token_len"] = min(
        config.max_token_len, tokenizer.needed_length([settings.prompt], state_dim)
    )
    return PolicyMetadata(
        variant=settings.variant,
        model_overrides=overrides,
        asset_id=asset_id(settings.task),
        task=settings.task,
        prompt=settings.prompt,
        cameras=settings.cameras,
        image_size=settings.image_size,
        state=settings.state,
        control_mode=settings.control_mode,
        delta_action_mask=settings.delta_action_mask,
        action_dim=int(norm_stats["actions"].mean.shape[-1]),
        use_quantiles=config.family == "pi05",
    )


def write_params(settings: Settings, config, folder: Path) -> str:
    """Put the initial weights at `folder` and return their digest.

    Raises:
        UserError: if the base weights are missing, damaged or of another family or size.
    """
    import jax

    from demo2eval.checkpoints.openpi import load_params, save_params
    from demo2eval.pi0.params import init_params
    from demo2eval.training.state import tree_digest

    if settings.weights is None:
        params = init_params(config, jax.random.key(settings.seed))
        save_params(folder, params)
        return tree_digest(params)
    source = Path(settings.weights)
    if not source.exists():
        raise UserError(
            f"the base weights {source} do not exist; put them there, or train from scratch with weights null."
        )
    if (source / "params").is_dir():
        folder.symlink_to((source / "params").absolute(), target_is_directory=True)
    else:
        from demo2eval.checkpoints.huggingface import from_huggingface

        from_huggingface(source, folder, without_lora(config))
    if config != without_lora(config):
        add_lora(settings, config, folder)
    return tree_digest(load_params(folder, config))


def add_lora(settings: Settings, config, folder: Path) -> None:
    """Put fresh low-rank factors beside base weights that have none, as openpi does."""
    import jax

    from demo2eval.checkpoints.mismatch import check_params
    from demo2eval.checkpoints.openpi import load_params, save_params
    from demo2eval.pi0.params import flatten, init_params, unflatten

    base = flatten(load_params(folder))
    if any("lora" in name for name in base):
        return
    check_params(without_lora(config), base, Path(settings.weights))
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    draw = jax.jit(
        lambda key: {
            name: value
            for name, value in flatten(init_params(config, key)).items()
            if "lora" in name
        }
    )
    save_params(folder, unflatten(base | draw(jax.random.key(settings.seed))))


def load_tokenizer(settings: Settings):
    """Return the tokenizer that belongs to the weights, or one trained from the prompt."""
    from demo2eval.pi0.tokenizer import Tokenizer

    if settings.tokenizer is not None:
        return Tokenizer.from_file(settings.tokenizer)
    if settings.weights is not None:
        raise UserError(
            "published weights need the tokenizer that they were trained with; set model.tokenizer to its file."
        )
    return Tokenizer.train(
        [settings.prompt],
        with_state=bool(settings.model_overrides.get("discrete_state_input", False)),
    )


def init_checkpoint(settings: Settings, norm_stats: Path, output: Path) -> None:
    """Make checkpoint 0 at `output` (results/<run>/checkpoints/0.json) from the manifest of the norm stats."""
    with making(
        output,
        stage="init_checkpoint",
        module=__spec__.name,
        settings=settings,
        inputs={"norm_stats": norm_stats},
    ) as work:
        if not work.finished:
            _make(settings, norm_stats, work)


def _make(settings: Settings, norm_stats: Path, work: Work) -> None:
    from demo2eval.pi0.normalize import load_norm_stats

    payload = work.output.with_suffix("")
    shutil.rmtree(payload, ignore_errors=True)
    stats_file = norm_stats.parent / "norm_stats.json"
    tokenizer = load_tokenizer(settings)
    description = describe(settings, load_norm_stats(stats_file), tokenizer)
    assets = work.partial / "assets" / description.asset_id
    assets.mkdir(parents=True, exist_ok=True)
    shutil.copy(stats_file, assets / "norm_stats.json")
    tokenizer.save(assets / "tokenizer.model")
    description.write(work.partial)
    shutil.rmtree(work.partial / "params", ignore_errors=True)
    digest = write_params(settings, description.config, work.partial / "params")
    work.partial.rename(payload)
    # The base weights may be linked: they are not ours to list, and their digest is in the manifest anyway.
    work.finish(
        [payload / "assets"],
        digest=sha256_text(digest + to_json(description)),
        step=0,
        parameters=parameter_count(description.config),
        dataset=dataset_digest(norm_stats),
    )


def parameter_count(config) -> int:
    """Return the number of values in all parameter arrays of a model, without making any."""
    import jax

    from demo2eval.pi0.params import init_params

    return sum(
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    )


def dataset_digest(norm_stats: Path) -> str:
    """Return the digest of the dataset that the norm stats were taken from."""
    return read_manifest(norm_stats)["inputs"]["dataset"][0]["digest"]


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument("--norm-stats", type=Path, required=True, help="manifest of the norm stats")
    parser.add_argument(
        "--output", type=Path, required=True, help="manifest to write, <run>/checkpoints/0.json"
    )
    arguments = parser.parse_args()
    init_checkpoint(settings_from(arguments, Settings), arguments.norm_stats, arguments.output)


if __name__ == "__main__":
    run(main)

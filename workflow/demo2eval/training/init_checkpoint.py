"""Checkpoint 0: where training starts, with all that evaluation needs beside the weights.

In:  the manifest of the run's norm stats; base weights (an openpi checkpoint or Hugging Face
     safetensors), or none.
Out: <output without .json>/params and assets/<asset id>/{norm_stats.json, tokenizer.model,
     policy.json}. Weights that are in openpi's layout already are linked, not copied.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from demo2eval.checkpoints.policy_metadata import PolicyMetadata
from demo2eval.cli import run
from demo2eval.config import Actions, Dataset, Model, Replay
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config, make_config, merge_overrides, without_lora
from demo2eval.provenance import (
    read_manifest,
    run_stage,
    sha256_text,
    to_json,
)
from demo2eval.robots import Robot, delta_action_mask


def init_checkpoint(
    norm_stats: Path,
    output: Path,
    *,
    task: str,
    prompt: str,
    robot: Robot,
    seed: int = 0,
    replay: Replay = Replay(),
    dataset: Dataset = Dataset(),
    actions: Actions = Actions(),
    model: Model = Model(),
) -> None:
    """Make checkpoint 0.

    Args:
        norm_stats: manifest of the norm stats.
        output: manifest to write, <run>/checkpoints/0.json.
        task: ManiSkill's environment id.
        prompt: the instruction.
        robot: ManiSkill's robot.
        seed: seed of initial weights.
        replay: settings of the replay: cameras, image size and control mode.
        dataset: settings of the dataset, of which the state counts here.
        actions: settings of the actions.
        model: settings of the model.

    Raises:
        UserError: if the base weights or their tokenizer are missing, damaged or of another model.
    """
    settings = {
        "task": task,
        "prompt": prompt,
        "robot": robot,
        "seed": seed,
        "replay": replay,
        "dataset": dataset,
        "actions": actions,
        "model": model,
    }
    with run_stage(
        output,
        stage="init_checkpoint",
        module=__spec__.name,
        settings=settings,
        inputs={"norm_stats": norm_stats},
    ) as job:
        if job.reused:
            return
        from demo2eval.pi0.normalize import load_norm_stats

        stats_file = norm_stats.parent / "norm_stats.json"
        stats = load_norm_stats(stats_file)
        tokenizer = load_tokenizer(model, prompt)
        overrides = model_overrides(
            model, actions, prompt, tokenizer, stats["state"].mean.shape[-1]
        )
        policy = PolicyMetadata(
            variant=model.variant,
            model_overrides=overrides,
            asset_id=f"maniskill/{task}",
            task=task,
            robot=robot,
            prompt=prompt,
            cameras={**replay.cameras},
            image_size=replay.image_size,
            state=dataset.state,
            control_mode=replay.control_mode,
            delta_action_mask=delta_action_mask(replay.control_mode, actions.delta),
            action_dim=stats["actions"].mean.shape[-1],
            use_quantiles=make_config(model.variant, **overrides).is_pi05,
        )
        unfinished = job.partial / output.stem
        shutil.rmtree(unfinished, ignore_errors=True)
        assets = unfinished / "assets" / policy.asset_id
        assets.mkdir(parents=True)
        shutil.copy(stats_file, assets / "norm_stats.json")
        tokenizer.save(assets / "tokenizer.model")
        policy.write(unfinished)
        digest = write_params(model, seed, policy.config, unfinished / "params")
        (folder,) = job.publish(output.stem)
        job.finish(
            [folder / "assets"],
            removable=[folder / "params"],
            digest=sha256_text(digest + to_json(asdict(policy))),
            step=0,
            parameters=parameter_count(policy.config),
            dataset=read_manifest(norm_stats)["inputs"]["dataset"][0]["digest"],
        )


def load_tokenizer(model: Model, prompt: str):
    """Return the `Tokenizer` that belongs to the weights, or one trained from the prompt."""
    from demo2eval.pi0.tokenizer import Tokenizer

    if model.tokenizer is not None:
        return Tokenizer.from_file(Path(model.tokenizer))
    if model.weights is not None:
        raise UserError(
            "published weights need the tokenizer that they were trained with; set model.tokenizer "
            "to its file."
        )
    return Tokenizer.train([prompt], with_state=model.discrete_state_input)


def model_overrides(
    model: Model, actions: Actions, prompt: str, tokenizer, state_dim: int
) -> dict[str, Any]:
    """Return the fields of `Pi0Config` in which the model differs from its variant.

    The vocabulary is the tokenizer's if it was trained here, and prompts are padded to the length
    that this one needs.
    """
    overrides = merge_overrides(
        model.overrides,
        action_horizon=actions.action_horizon,
        discrete_state_input=model.discrete_state_input,
        continuous_state_token=model.continuous_state_token,
    )
    if model.weights is None and model.tokenizer is None:
        overrides.setdefault("vocab_size", tokenizer.vocab_size)
    config = make_config(model.variant, **overrides)
    length = tokenizer.needed_length([prompt], state_dim if config.discrete_state_input else None)
    return overrides | {"max_token_len": min(config.max_token_len, length)}


def write_params(model: Model, seed: int, config: Pi0Config, folder: Path) -> str:
    """Put the initial weights at `folder` and return their digest.

    Raises:
        UserError: if the base weights are missing, damaged or of another family or size.
    """
    import jax

    from demo2eval.checkpoints.openpi import check_finite, load_params, save_params
    from demo2eval.pi0.params import init_params
    from demo2eval.training.state import tree_digest

    if model.weights is None:
        params = init_params(config, jax.random.key(seed))
        save_params(folder, params)
        return tree_digest(params)
    weights = Path(model.weights)
    if not weights.exists():
        raise UserError(
            f"the base weights {weights} do not exist; put them there, or train from scratch with "
            "model.weights null."
        )
    if (weights / "params").is_dir():
        folder.symlink_to((weights / "params").absolute(), target_is_directory=True)
    else:
        from demo2eval.checkpoints.huggingface import from_huggingface

        from_huggingface(weights, folder, without_lora(config))
    if config != without_lora(config):
        add_lora(weights, seed, config, folder)
    params = load_params(folder, config)
    check_finite(params, f"the base weights {weights}")
    return tree_digest(params)


def add_lora(weights: Path, seed: int, config: Pi0Config, folder: Path) -> None:
    """Put fresh low-rank factors beside base weights that have none, as openpi does."""
    import jax

    from demo2eval.checkpoints.mismatch import check_params
    from demo2eval.checkpoints.openpi import load_params, save_params
    from demo2eval.pi0.params import flatten, init_params, unflatten

    def init_factors(key: jax.Array) -> dict:
        params = flatten(init_params(config, key))
        return {name: value for name, value in params.items() if "lora" in name}

    base = flatten(load_params(folder))
    if any("lora" in name for name in base):
        return
    check_params(without_lora(config), base, weights)
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    save_params(folder, unflatten(base | jax.jit(init_factors)(jax.random.key(seed))))


def parameter_count(config: Pi0Config) -> int:
    """Return the number of values in all parameter arrays of a model, without making any."""
    import jax

    from demo2eval.pi0.params import init_params

    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


if __name__ == "__main__":
    run(init_checkpoint)

"""How far a checkpoint's actions are from those of demonstrations it was and was not trained on.

In:  the manifest of a checkpoint, and that of the image cache of its dataset.
Out: <output without .json>.csv: for each set of samples, training and validation, and each
     dimension of the action, the mean and the 95 % quantile of the absolute error over the
     actions that a rollout would execute, in the env's units (radians for joint targets).

The samples are spread evenly over a set, and the policy infers as in a rollout, without noise on
the state. An equal error on both sets says that more training may help; one that is much larger
on the validation set says that more demonstrations may.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from demo2eval.checkpoints.verify import verify_checkpoint
from demo2eval.cli import run
from demo2eval.config import Evaluation
from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest, run_stage

if TYPE_CHECKING:
    import pandas as pd

NUM_SAMPLES = 512
"""Samples of each set."""
BATCH_SIZE = 32


def measure_action_error(
    checkpoint: Path,
    image_cache: Path,
    output: Path,
    *,
    num_val_demos: int | None = None,
    evaluation: Evaluation = Evaluation(),
) -> None:
    """Measure the action error of a checkpoint.

    Args:
        checkpoint: manifest of the checkpoint.
        image_cache: manifest of the image cache of its dataset.
        output: manifest to write, <run>/action_errors/<step>.json.
        num_val_demos: demonstrations at the dataset's end that were not trained on; null: as the
            checkpoint says.
        evaluation: settings of the rollouts, of which those of the policy count here.

    Raises:
        UserError: if the cache is not of the dataset that the checkpoint was trained on.
    """
    if num_val_demos is None:
        trained_with = read_manifest(checkpoint)["settings"].get("training", {})
        num_val_demos = int(trained_with.get("num_val_demos", 0))
    settings = {
        "num_val_demos": num_val_demos,
        "num_samples": NUM_SAMPLES,
        "replan_steps": evaluation.replan_steps,
        "num_steps": evaluation.num_steps,
        "policy_seed": evaluation.policy_seed,
    }
    inputs = {"checkpoint": checkpoint, "image_cache": image_cache}
    with run_stage(
        output, stage="action_error", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if job.reused:
            return
        import pandas as pd

        from demo2eval.evaluation.policy import Policy

        metadata = read_manifest(checkpoint)["metadata"]
        if read_manifest(image_cache)["inputs"]["dataset"][0]["digest"] != metadata["dataset"]:
            raise UserError(
                f"{checkpoint} was not trained on the dataset of {image_cache}; give the cache of "
                "its own dataset."
            )
        cache = image_cache.parent
        folder = verify_checkpoint(checkpoint, "params")
        policy = Policy(folder, num_steps=evaluation.num_steps, batch_size=BATCH_SIZE)
        tables = {}
        for name, samples in select_samples(cache, num_val_demos).items():
            tables[name] = summarize(action_errors(policy, cache, samples, evaluation))
            print(f"{name}, {len(samples)} samples:\n{tables[name].to_string()}")
        table = pd.concat(tables, names=["set"])
        table.to_csv(job.partial / f"{output.stem}.csv", lineterminator="\n")
        job.finish(
            job.publish(f"{output.stem}.csv"),
            step=metadata["step"],
            mean_abs_error={name: table.mean_abs_error.tolist() for name, table in tables.items()},
        )


def summarize(errors: np.ndarray) -> "pd.DataFrame":
    """Return mean and 95 % quantile of errors [samples, steps, action dim], by dimension."""
    import pandas as pd

    means, quantiles = errors.mean(axis=(0, 1)), np.quantile(errors, 0.95, axis=(0, 1))
    table = pd.DataFrame(
        {
            "samples": len(errors),
            "mean_abs_error": [round(float(value), 6) for value in means],
            "q95_abs_error": [round(float(value), 6) for value in quantiles],
        }
    )
    return table.rename_axis("dimension")


def select_samples(cache: Path, num_val_demos: int) -> dict[str, np.ndarray]:
    """Return up to `NUM_SAMPLES` samples of each set, {"training": ..., "validation": ...}.

    Args:
        cache: the folder of an image cache.
        num_val_demos: without any, there is no validation set.
    """
    from demo2eval.data.loader import count_training_samples

    episode = np.load(cache / "episode.npy")[np.load(cache / "sample_row.npy")]
    num_training = count_training_samples(episode, num_val_demos)
    sets = {
        "training": np.arange(num_training),
        "validation": np.arange(num_training, len(episode)),
    }
    return {
        name: samples[:: max(1, len(samples) // NUM_SAMPLES)][:NUM_SAMPLES]
        for name, samples in sets.items()
        if len(samples)
    }


def action_errors(policy, cache: Path, samples: np.ndarray, evaluation: Evaluation) -> np.ndarray:
    """Return |policy's action - demonstration's|, float [samples, replan_steps, action dim]."""
    sample_row, episode, state, action = (
        np.load(cache / f"{name}.npy") for name in ("sample_row", "episode", "state", "action")
    )
    images = {
        camera: np.load(cache / f"images_{camera}.npy", mmap_mode="r")
        for camera in set(policy.metadata.cameras.values())
    }
    rows, steps = sample_row[samples], evaluation.replan_steps
    demonstrated = action[chunk_rows(rows, last_rows(episode), steps)]
    observations = [
        {"images": {camera: images[camera][sample] for camera in images}, "state": state[row]}
        for sample, row in zip(samples, rows, strict=True)
    ]
    noise = [policy.draw_noise(evaluation.policy_seed, int(sample), 0) for sample in samples]
    return np.abs(policy.infer(observations, noise)[:, :steps] - demonstrated)


if __name__ == "__main__":
    run(measure_action_error)

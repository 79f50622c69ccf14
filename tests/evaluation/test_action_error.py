"""Action errors of demonstrations that were trained on, and of others."""

import json
import shutil

import pandas as pd
import pytest

from demo2eval.config import Actions, Evaluation, Training
from demo2eval.errors import UserError
from demo2eval.evaluation import action_error
from demo2eval.evaluation.action_error import measure_action_error
from demo2eval.provenance import read_manifest
from demo2eval.training.train import train


def test_errors_of_training_and_validation_samples(pushcube_run, tmp_path, monkeypatch):
    monkeypatch.setattr(action_error, "NUM_SAMPLES", 20)
    image_cache = pushcube_run / "cache_64/manifest.json"
    shutil.copytree(pushcube_run / "checkpoints", tmp_path / "checkpoints")
    training = Training(
        batch_size=4, warmup_steps=2, peak_lr=1e-3, ema_decay=0.9, augment=False, num_val_demos=1
    )
    tables = {}
    for previous, step in ((0, 1), (1, 120)):
        checkpoint = tmp_path / f"checkpoints/{step}.json"
        train(
            tmp_path / f"checkpoints/{previous}.json",
            image_cache,
            checkpoint,
            step=step,
            training=training,
            actions=Actions(),
        )
        output = tmp_path / f"action_errors/{step}.json"
        evaluation = Evaluation(replan_steps=4)
        measure_action_error(
            checkpoint, image_cache, output, num_val_demos=1, evaluation=evaluation
        )
        tables[step] = pd.read_csv(output.with_suffix(".csv"))
        metadata = read_manifest(output)["metadata"]
        assert metadata["step"] == step
        assert metadata["mean_abs_error"]["training"] == tables[step].mean_abs_error[:8].tolist()
    columns = ["set", "dimension", "samples", "mean_abs_error", "q95_abs_error"]
    assert tables[1].columns.tolist() == columns
    assert tables[1].set.tolist() == ["training"] * 8 + ["validation"] * 8
    assert tables[1].dimension.tolist() == [*range(8)] * 2
    means = {step: table.groupby("set").mean_abs_error.mean() for step, table in tables.items()}
    # Two demonstrations are learned by heart in no time; the third was never seen.
    assert means[120].training < 0.7 * means[1].training
    assert means[120].training < means[120].validation


def test_another_dataset_is_refused(pushcube_run, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(pushcube_run / "cache_64", cache)
    content = json.loads((cache / "manifest.json").read_text())
    content["inputs"]["dataset"][0]["digest"] = "0" * 64
    (cache / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="was not trained on the dataset of"):
        measure_action_error(
            pushcube_run / "checkpoints/0.json",
            cache / "manifest.json",
            tmp_path / "0.json",
            num_val_demos=1,
        )

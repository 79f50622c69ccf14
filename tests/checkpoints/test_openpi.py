"""Weights in openpi's layout: read, written, missing and damaged."""

import re
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from golden_data import assert_equal, read
from golden_weights import OPENPI_CHECKPOINT, PI05, golden_params

from demo2eval.checkpoints import openpi
from demo2eval.checkpoints.openpi import LazyArray, load_params, save_lazy_params, save_params
from demo2eval.errors import UserError
from demo2eval.pi0.params import flatten, unflatten


def load_error(path) -> str:
    with pytest.raises(UserError) as caught:
        load_params(path, PI05)
    return str(caught.value)


def test_openpis_checkpoint_is_read():
    flat = flatten(load_params(OPENPI_CHECKPOINT / "params", PI05))
    golden = read("pi05_ema_train3")
    assert {f"ema_after3/{name}" for name in flat} == {
        name for name in golden if name.startswith("ema_after3/")
    }
    for name, value in flat.items():
        assert_equal(value, golden[f"ema_after3/{name}"], name)


def test_what_is_written_is_read_the_way_openpi_does(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params()))
    # As openpi's loader does: every array as numpy, by name.
    arguments = {
        "params": unflatten(
            dict.fromkeys(golden_params(), ocp.RestoreArgs(restore_type=np.ndarray))
        )
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        template = {"params": checkpointer.metadata(tmp_path / "params").item_metadata["params"]}
        restored = checkpointer.restore(
            tmp_path / "params", ocp.args.PyTreeRestore(item=template, restore_args=arguments)
        )["params"]
    for name, value in golden_params().items():
        np.testing.assert_array_equal(flatten(restored)[name], value)


def test_lazy_arrays_of_several_chunks_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(openpi, "CHUNK_BYTES", 2**14)
    value = np.random.default_rng(0).standard_normal((9, 301, 127), np.float32)
    array = LazyArray(value.shape, value.dtype, lambda: value)
    save_lazy_params(tmp_path / "params", {"a/b": array})
    np.testing.assert_array_equal(load_params(tmp_path / "params")["a"]["b"], value)


def test_a_missing_checkpoint_is_a_sentence(tmp_path):
    path = tmp_path / "3/params"
    assert load_error(path) == (
        f"{path} does not exist; a checkpoint keeps its weights in <step>/params."
    )
    path.mkdir(parents=True)
    assert load_error(path) == (
        f"{path} holds no weights, or not all of them: it has no file _METADATA; "
        "copy or make it again."
    )


@pytest.mark.parametrize("cut", ["_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
def test_a_cut_checkpoint_is_a_sentence_and_nothing_else(tmp_path, cut, capfd):
    path = tmp_path / "params"
    shutil.copytree(OPENPI_CHECKPOINT / "params", path)
    file = max(path.glob(cut), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    message = load_error(path)
    of_array = r"array PaliGemma/\S+ of " if cut.startswith("ocdbt") else ""
    assert re.fullmatch(
        rf"{of_array}{path} cannot be read \(.+\): it is incomplete; copy or make it again\.",
        message,
    ), message
    assert "\n" not in message
    # Orbax, reading all arrays at once, would leave a traceback for each of the others.
    assert "Traceback" not in capfd.readouterr().err

"""A checkpoint is what its manifest says: nothing in its folder was swapped, changed or lost."""

from pathlib import Path

from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest, sha256_folder


def verify_checkpoint(manifest: Path, *parts: str) -> Path:
    """Compare parts of a checkpoint with the hashes in its manifest, and return its folder.

    Its assets are compared where it is given to `demo2eval.provenance.run_stage`.

    Args:
        manifest: <run>/checkpoints/<step>.json.
        parts: folders of the checkpoint that may be removed later: "params" or "train_state".

    Raises:
        UserError: if a part is missing or differs.
    """
    folder, hashes = manifest.with_suffix(""), read_manifest(manifest).get("folders", {})
    for part in parts:
        path, way_out = folder / part, _WAYS_OUT["0" if folder.name == "0" else part]
        if not path.is_dir():
            raise UserError(f"{path} does not exist. {way_out.format(folder)}")
        if sha256_folder(path) != hashes.get(f"{folder.name}/{part}"):
            raise UserError(
                f"{path} is not what {manifest} describes: files were changed, or belong to "
                f"another checkpoint. {way_out.format(folder)}"
            )
    return folder


# None of them may cost a training.
_WAYS_OUT = {
    "0": "Put the right files back, or delete {0}.json, and it is made again.",
    "params": "Put the right files back. Where training.keep_period removed them, they were "
    "evaluated before; only weights that are kept can be evaluated again.",
    "train_state": "Put the right files back; only the newest checkpoint keeps its training state. "
    "Without it, a run of another name can start from the weights: model.weights: {0}, with "
    "model.tokenizer: the tokenizer.model below its assets.",
}

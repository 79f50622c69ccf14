"""A checkpoint is what its manifest says: nothing in its folder was swapped, changed or lost."""

from pathlib import Path

from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest, sha256_folder


def verify_checkpoint(manifest: Path, *parts: str) -> Path:
    """Compare parts of a checkpoint with the hashes in its manifest, and return its folder.

    Args:
        manifest: <run>/checkpoints/<step>.json.
        parts: folders of the checkpoint: "params", "assets" or "train_state".

    Raises:
        UserError: if a part is missing or differs.
    """
    folder, hashes = manifest.with_suffix(""), read_manifest(manifest)["metadata"]["sha256"]
    for part in parts:
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part} does not exist.{_WAYS_OUT[part].format(folder)}")
        if part in hashes and sha256_folder(folder / part) != hashes[part]:
            raise UserError(
                f"{folder / part} is not what {manifest} describes: files were changed, or belong "
                f"to another checkpoint.{_WAYS_OUT[part].format(folder)}"
            )
    return folder


_TRAIN_AGAIN = " Put the right files back, or delete {0}.json, and it is trained again."
_WAYS_OUT = {
    "params": " training.keep_period removes weights that were evaluated." + _TRAIN_AGAIN,
    "assets": _TRAIN_AGAIN,
    "train_state": " Only the newest checkpoint keeps its training state; delete the manifests "
    "back to one that has it, or all but 0.json to train from the start.",
}

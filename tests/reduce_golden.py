"""Make the reference data of tests/golden from openpi's whole arrays.

    PYTHONPATH=workflow:tests python tests/reduce_golden.py FULL_FOLDER tests/golden

Everything that is not named here is copied. golden/README.md says what is kept and why that is
enough. Needs nothing of openpi.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from golden_data import REDUCTIONS, digest, read, to_differences
from safetensors import safe_open

from demo2eval.checkpoints.huggingface import EXPERT_HEAD

# Smaller arrays stay whole.
SMALLEST = 1024
# tensors.json holds what is left of the first two; the texts belong to the reduced folder.
REPLACED = ("model.safetensors", "keys.json", "README.md", "hf_to_jax_names.md")
# File -> the file that has some of its arrays too.
ORIGINALS = {
    "pi0_params": "pi05_params",
    "pi05_lora_params": "pi05_params",
    "pi0_inputs": "pi05_inputs",
}
# An array is hashed if it is compared bit by bit, and folded if it is compared with a tolerance. In
# bfloat16 the rounding of the sums would come near the tolerance: these arrays are sampled.
FORMS = {
    "*": {
        "image/": "differences",
        "attn_mask": "sha256",
        "positions": "sha256",
        "prefix_mask": "sha256",
    },
    "*_float32": {"grad/": "fold_16", "prefix_embs": "fold_8", "prefix_out": "fold_8"},
    "*_bfloat16*": {"prefix_embs": "every_7"},
    "pi05_ema_train3": {"ema_after3/": "sha256", "params_after3/": "fold_8", "aug0/": "every_7"},
    # `jax*` comes from openpi's resize in JAX, which the project does not have.
    "data": {"img_": "differences", "pil_": "sha256", "posemb_1024": "every_7", "jax": "drop"},
}


def form_of(file: str, name: str, array: np.ndarray) -> str:
    """Return the form in which an array is kept, "" for whole."""
    for pattern, forms in FORMS.items():
        for prefix, form in forms.items():
            if Path(file).match(pattern) and name.startswith(prefix):
                small = array.size < SMALLEST and form.startswith(("fold", "every"))
                return "" if small else form
    return ""


def visible_prefix(full: Path, family: str) -> np.ndarray:
    """Return which tokens of the prefix are neither padding nor of a masked camera, bool [b, s]."""
    spec, inputs = json.loads((full / "golden.json").read_text()), read(f"{family}_inputs", full)
    siglip = spec["config"]["siglip"]
    tokens = (siglip["image"][0] // siglip["patch_size"][0]) ** 2
    images = [
        np.repeat(inputs[f"image_mask/{name}"][:, None], tokens, axis=1) for name in spec["cams"]
    ]
    return np.concatenate([*images, inputs["tokenized_prompt_mask"]], axis=1)


def reduce_file(full: Path, file: str) -> dict[str, np.ndarray]:
    """Return the arrays to store for `<file>.npz`, by name@form."""
    original = ORIGINALS.get(file)
    shared = read(original, full) if original else {}
    stored, copies = {}, []
    for name, array in read(file, full).items():
        if name in shared and np.array_equal(digest(array), digest(shared[name])):
            copies.append(name)
            continue
        if name in ("prefix_embs", "prefix_out"):
            visible = visible_prefix(full, file.split("_")[0])
            array = np.where(visible[..., None], array, array.dtype.type(0))
        form = form_of(file, name, array)
        if form == "differences":
            stored[f"{name}@{form}"] = to_differences(array)
        elif form in REDUCTIONS:
            stored[f"{name}@{form}"] = REDUCTIONS[form](array)
        elif form != "drop":
            stored[name] = array
    if copies:
        stored[f"{original}@copies"] = np.array(copies)
    return stored


def reduce_safetensors(path: Path) -> dict:
    """Return the digest of each of LeRobot's tensors, and what the file's metadata say."""
    with safe_open(path, "numpy") as file:
        digests = {
            name: str(digest(file.get_tensor(name)))
            for name in sorted(file.keys())
            if name != f"model.{EXPERT_HEAD}"
        }
        return {"metadata": file.metadata(), "tensors": digests}


def main() -> None:
    """Reduce one folder into another."""
    parser = argparse.ArgumentParser(description="Reduce a folder of reference data.")
    parser.add_argument("full", type=Path, help="folder with openpi's whole arrays")
    parser.add_argument("output", type=Path, help="folder to write; files there are replaced")
    arguments = parser.parse_args()
    full, output = arguments.full, arguments.output
    for path in sorted(path for path in full.rglob("*") if path.is_file()):
        target = output / path.relative_to(full)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            np.savez_compressed(target, allow_pickle=False, **reduce_file(full, path.stem))
        elif path.name not in REPLACED:
            shutil.copyfile(path, target)
    tensors = reduce_safetensors(full / "hf_pi05/model.safetensors")
    (output / "hf_pi05/tensors.json").write_text(json.dumps(tensors, indent=1) + "\n")


if __name__ == "__main__":
    main()

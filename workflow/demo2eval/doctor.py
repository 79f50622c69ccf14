"""Says what this machine has, and what each thing lets you do.

It also runs with another Python where `make setup` has made nothing yet, so it imports the standard
library alone.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv/bin/python"
PLANNING_PYTHON = ROOT / "envs/planning/.venv/bin/python"
ENVIRONMENT_FILE = ROOT / ".tools/environment"
QUICKSTART_DISK_GIB = 5
FULL_SIZE_GPU_GIB = 60

IMPORT = """
import sys, flax, lerobot, mani_skill, orbax.checkpoint, snakemake
print("Python %d.%d.%d, all packages import" % sys.version_info[:3])
"""
PLAN = "import mplib, numpy; print(f'mplib {mplib.__version__}, numpy {numpy.__version__}')"
RENDER = """
import sys
import sapien
devices = sapien.render.get_device_summary().splitlines()
name = next(line for line in devices if line.startswith("GPU:"))
from demo2eval.maniskill.env import get_observation, make_env, render_backend
env = make_env("PushCube-v1", robot="panda", control_mode="pd_joint_pos",
               cameras=["base_camera"], image_size=32)
env.reset(seed=0)
if get_observation(env)["images"]["base_camera"].std() < 5:
    sys.exit("the image is empty")
print(name.removeprefix("GPU: ") + ", on the " + render_backend())
"""
JAX = """
import jax
devices = jax.devices()
kind, platform = devices[0].device_kind, devices[0].platform
print(f"JAX {jax.__version__}: {len(devices)} x {kind}, on the {platform}")
"""


def read_environment() -> dict[str, str]:
    """Return the variables that lead to the Mesa that `make setup` unpacked, if it had to."""
    if not ENVIRONMENT_FILE.exists():
        return {}
    return dict(re.findall(r"^export (\w+)='(.*)'$", ENVIRONMENT_FILE.read_text(), re.MULTILINE))


def run_code(code: str, python: Path) -> tuple[bool, str]:
    """Run Python code in its own process; return whether it succeeded, and its last line."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    try:
        result = subprocess.run(
            [str(python), "-c", code], env=env, capture_output=True, text=True, timeout=180
        )
    except FileNotFoundError:
        return False, f"{python.relative_to(ROOT)} does not exist"
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    return result.returncode == 0, lines[-1] if lines else f"exit status {result.returncode}"


def check_uv() -> tuple[bool, str, str]:
    """What makes the Python environments."""
    for uv in (str(ROOT / ".tools/uv"), "uv"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            version = subprocess.run(
                [uv, "--version"], capture_output=True, text=True, check=True, timeout=60
            ).stdout
            return True, version.split("(")[0].strip(), "makes the Python environments"
    return True, "none", "`make setup` fetches it"


def check_python() -> tuple[bool, str, str]:
    """The Python environment of the workflow."""
    ok, output = run_code(IMPORT, PYTHON)
    return ok, output, "runs the workflow" if ok else "run `make setup`"


def check_planning() -> tuple[bool, str, str]:
    """The Python environment of the motion planner."""
    ok, output = run_code(PLAN, PLANNING_PYTHON)
    return ok, output, "plans demonstrations" if ok else "run `make setup`"


def check_vulkan() -> tuple[bool, str, str]:
    """An image, really rendered."""
    ok, output = run_code(RENDER, PYTHON)
    if not ok:
        return False, output, "nothing can be rendered; run `make setup`"
    on_cpu = output.endswith("cpu")
    return True, output, "about 20 images per second and core" if on_cpu else "renders fast"


def list_gpus() -> list[tuple[str, float]]:
    """Return (name, GiB of memory) of each NVIDIA GPU that the driver lists."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(",") for line in output.stdout.strip().splitlines()]
    return [(name, float(mebibytes) / 1024) for name, mebibytes in rows]


def check_gpu() -> tuple[bool, str, str]:
    """NVIDIA GPUs and their memory."""
    gpus = list_gpus()
    if not gpus:
        return True, "none", "the quickstart and the tests; not the full-size models"
    name, memory = max(gpus, key=lambda gpu: gpu[1])
    use = f"small models; full-size Pi0.5 needs about {FULL_SIZE_GPU_GIB} GiB"
    if memory >= FULL_SIZE_GPU_GIB:
        use = "full-size Pi0.5 at a batch of 32"
    return True, f"{len(gpus)} x {name}, {memory:.0f} GiB", use


def check_jax() -> tuple[bool, str, str]:
    """The devices that JAX sees."""
    ok, output = run_code(JAX, PYTHON)
    if not ok:
        return False, output, "run `make setup`"
    if not output.endswith("cpu"):
        return True, output, "trains"
    if list_gpus():
        return False, output, "the GPU is not seen; run `make setup`, which brings JAX for it"
    return True, output, "trains tiny models in minutes"


def check_machine() -> tuple[bool, str, str]:
    """Cores, memory and disk."""
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(ROOT).free / 2**30
    ok = free >= QUICKSTART_DISK_GIB
    use = f"the quickstart needs {QUICKSTART_DISK_GIB} GiB of disk; make room"
    if ok:
        use = f"about {max(1, min(cores, int(memory // 2)))} simulator processes at a time"
    return ok, f"{cores} cores, {memory:.0f} GiB memory, {free:.0f} GiB disk free", use


CHECKS: dict[str, Callable[[], tuple[bool, str, str]]] = {
    "uv": check_uv,
    "python": check_python,
    "planning": check_planning,
    "vulkan": check_vulkan,
    "gpu": check_gpu,
    "jax": check_jax,
    "machine": check_machine,
}


def diagnose() -> Iterator[tuple[bool, str]]:
    """Yield (is it well, a line) of each check."""
    for name, check in CHECKS.items():
        ok, found, use = check()
        yield ok, f"{'ok  ' if ok else 'FAIL'} {name:<9} {found}: {use}"


def main() -> None:
    """Print the table; exit with status 1 if something that the quickstart needs is missing."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    all_ok = True
    for ok, line in diagnose():
        all_ok = all_ok and ok
        print(line, flush=True)
    sys.exit(0 if all_ok else 1)


if __name__ == "__main__":
    main()

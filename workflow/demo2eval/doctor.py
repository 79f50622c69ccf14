"""Says what this machine has, and what each thing lets you do.

It also runs with another Python where `make setup` has made nothing yet, so it imports the standard library alone.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PYTHON = ROOT / ".venv/bin/python"
PLANNING_PYTHON = ROOT / "envs/planning/.venv/bin/python"
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
name = next(line for line in sapien.render.get_device_summary().splitlines() if line.startswith("GPU:"))
from demo2eval.maniskill.env import look, make_environment, render_backend
environment = make_environment("PushCube-v1", control_mode="pd_joint_pos", cameras=["base_camera"], image_size=32)
environment.reset(seed=0)
if look(environment)["images"]["base_camera"].std() < 5:
    sys.exit("the picture is empty")
print(name.removeprefix("GPU: ") + ", on the " + render_backend())
"""
JAX = "import jax; d = jax.devices(); print(f'JAX {jax.__version__}: {len(d)} x {d[0].device_kind}, on the {d[0].platform}')"


def ask(code: str, python: Path) -> tuple[bool, str]:
    """Run Python code in a process of its own; return whether it succeeded, and the last line that it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    try:
        result = subprocess.run(
            [str(python), "-c", code], env=environment, capture_output=True, text=True, timeout=180
        )
    except FileNotFoundError:
        return False, f"{python.relative_to(ROOT)} does not exist"
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    return result.returncode == 0, lines[-1] if lines else f"exit status {result.returncode}"


def check_uv() -> tuple[bool, str, str]:
    """What makes the environments."""
    for uv in (str(ROOT / ".tools/uv"), "uv"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(
                [uv, "--version"], capture_output=True, text=True, check=True, timeout=60
            ).stdout
            return True, said.split("(")[0].strip(), "makes the environments"
    return True, "none", "`make setup` fetches it"


def check_python() -> tuple[bool, str, str]:
    """The environment of the workflow."""
    good, said = ask(IMPORT, PYTHON)
    return good, said, "runs the workflow" if good else "run `make setup`"


def check_planning() -> tuple[bool, str, str]:
    """The environment of the motion planner."""
    good, said = ask(PLAN, PLANNING_PYTHON)
    return good, said, "plans demonstrations" if good else "run `make setup`"


def check_vulkan() -> tuple[bool, str, str]:
    """A picture really rendered."""
    good, said = ask(RENDER, PYTHON)
    if not good:
        return False, said, "nothing can be rendered; run `make setup`"
    return (
        True,
        said,
        "some 20 pictures a second and core" if said.endswith("cpu") else "renders fast",
    )


def gpus() -> list[tuple[str, float]]:
    """Return (name, GiB of memory) of each NVIDIA GPU that the driver lists."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
            .stdout.strip()
            .splitlines()
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [(line.split(",")[0], float(line.split(",")[1]) / 1024) for line in lines]


def check_gpu() -> tuple[bool, str, str]:
    """NVIDIA GPUs and their memory."""
    found = gpus()
    if not found:
        return True, "none", "the quickstart and the tests; not the full-size models"
    name, memory = max(found, key=lambda gpu: gpu[1])
    enough = memory >= FULL_SIZE_GPU_GIB
    use = (
        "full-size Pi0.5 at a batch of 32"
        if enough
        else f"small models; full-size Pi0.5 needs about {FULL_SIZE_GPU_GIB} GiB"
    )
    return True, f"{len(found)} x {name}, {memory:.0f} GiB", use


def check_jax() -> tuple[bool, str, str]:
    """The devices that JAX sees."""
    good, said = ask(JAX, PYTHON)
    if not good:
        return False, said, "run `make setup`"
    if not said.endswith("cpu"):
        return True, said, "trains"
    if gpus():
        return False, said, "the GPU is not seen; run `make setup`, which brings JAX for it"
    return True, said, "trains tiny models in minutes"


def check_machine() -> tuple[bool, str, str]:
    """Cores, memory and disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(ROOT).free / 2**30
    simulators = max(1, min(os.cpu_count() or 1, int(memory // 2)))
    enough = free >= QUICKSTART_DISK_GIB
    use = (
        f"about {simulators} simulators at a time"
        if enough
        else f"the quickstart needs {QUICKSTART_DISK_GIB} GiB of disk; make room"
    )
    return enough, f"{os.cpu_count()} cores, {memory:.0f} GiB memory, {free:.0f} GiB disk free", use


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
        good, found, use = check()
        yield good, f"{'ok  ' if good else 'FAIL'} {name:<9} {found}: {use}"


def main() -> None:
    """Print the table; exit with status 1 if something that the quickstart needs is missing."""
    well = True
    for good, line in diagnose():
        well = well and good
        print(line, flush=True)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()

"""One ManiSkill environment on the CPU's physics, rendered by the GPU if there is one, and only when somebody looks."""

import contextlib
import functools
import glob
import io
import logging
import os
import subprocess
import warnings
from collections.abc import Sequence

import numpy as np

from demo2eval.errors import UserError
from demo2eval.maniskill.tasks import STATE_DIMS, check_cameras, find_task

CONTROL_FREQUENCY = 20
"""Control steps a second, of all six tasks; also the frame rate of the datasets."""
BACKEND_VARIABLE = "DEMO2EVAL_RENDER_BACKEND"
GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/dxg")
"""Device files of NVIDIA's driver; the second is that of Windows' Linux."""


def limit_threads(count: int = 1) -> None:
    """Let this process render and compute with `count` threads; to be called before the simulator is imported."""
    for name in ("LP_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)


@functools.cache
def render_backend() -> str:
    """Return what renders: "gpu" where an NVIDIA driver lists one, else "cpu", which is Mesa's software renderer.

    The environment variable DEMO2EVAL_RENDER_BACKEND, cpu or gpu, decides where it is set. envs/setup.py asks the same questions.

    Raises:
        UserError: if the variable says something else.
    """
    wanted = os.environ.get(BACKEND_VARIABLE)
    if wanted:
        if wanted not in ("cpu", "gpu"):
            raise UserError(
                f"{BACKEND_VARIABLE} is {wanted!r}; set it to cpu or gpu, or not at all."
            )
        return wanted
    # To ask the driver can take a second; without a device it need not be asked.
    if not any(glob.glob(pattern) for pattern in GPU_DEVICES):
        return "cpu"
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "cpu"
    return "gpu" if listed.startswith("GPU ") else "cpu"


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    for name in ("mani_skill", "gymnasium", "toppra"):
        logging.getLogger(name).setLevel(logging.ERROR)


def make_environment(
    task: str,
    *,
    control_mode: str,
    cameras: Sequence[str] = (),
    image_size: int = 128,
    max_episode_steps: int | None = None,
    **kwargs,
):
    """Make a task's environment, a `gymnasium.Env` of ManiSkill, with the task's own robot.

    Args:
        task: ManiSkill id, one of the six.
        control_mode: what actions mean.
        cameras: those that `look` shall return.
        image_size: side of the pictures, pixels.
        max_episode_steps: after which an episode is truncated; None leaves ManiSkill's own limit, shorter than demonstrations.
        kwargs: passed to `gymnasium.make`.

    Raises:
        UserError: if the task is unknown or lacks a camera, or there is no Vulkan device.
    """
    robot = find_task(task).robot
    check_cameras(task, cameras)
    _quiet()
    with contextlib.redirect_stderr(io.StringIO()):
        import gymnasium
        import mani_skill.envs  # noqa: F401  (registers the tasks)
    try:
        environment = gymnasium.make(
            task,
            obs_mode="rgb" if cameras else "none",
            reward_mode="none",
            control_mode=control_mode,
            robot_uids=robot,
            max_episode_steps=max_episode_steps,
            sim_backend="physx_cpu",
            render_backend=render_backend(),
            sensor_configs={"width": image_size, "height": image_size},
            **kwargs,
        )
    except RuntimeError as error:
        if "device" not in str(error):
            raise
        raise UserError(
            f"the simulator found no Vulkan device ({error}); run `make setup`, then `make doctor`."
        ) from error
    environment.unwrapped.demo2eval_cameras = tuple(cameras)
    set_rendering(environment, False)
    return environment


def set_rendering(environment, enabled: bool) -> None:
    """Switch rendering in `step` and `reset` on or off; `look` works in any case."""
    base = environment.unwrapped
    base._obs_mode = "rgb" if enabled and base.demo2eval_cameras else "none"


def look(environment) -> dict[str, dict[str, np.ndarray]]:
    """Render the cameras and read the robot, as ManiSkill's own rgb observation would.

    Returns:
        {"images": {camera: uint8 [H, W, 3]}, "state": {part: float32 [dim]}} of the present instant.
    """
    base = environment.unwrapped
    base._obs_mode = "rgb"
    try:
        observation = base.get_obs(base.get_info())
    finally:
        base._obs_mode = "none"
    cameras = base.demo2eval_cameras
    images = {
        camera: observation["sensor_data"][camera]["rgb"][0].cpu().numpy() for camera in cameras
    }
    return {"images": images, "state": _parts(observation)}


def state_parts(environment) -> dict[str, np.ndarray]:
    """Return the parts of the state vector, {part: float32 [dim]}, without rendering."""
    base = environment.unwrapped
    mode, base._obs_mode = base._obs_mode, "rgb"
    try:
        observation = {
            "agent": base._get_obs_agent(),
            "extra": base._get_obs_extra(base.get_info()),
        }
    finally:
        base._obs_mode = mode
    return _parts(observation)


def _parts(observation) -> dict[str, np.ndarray]:
    found = {
        "qpos": observation["agent"]["qpos"],
        **{key: observation["extra"].get(key) for key in STATE_DIMS if key != "qpos"},
    }
    return {
        key: np.asarray(value[0].cpu(), dtype=np.float32)
        for key, value in found.items()
        if value is not None
    }

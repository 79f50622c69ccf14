"""One ManiSkill env: physics on the CPU, images from the GPU if there is one.

`env.step` renders nothing; `get_observation` does. Where a policy acts in chunks, episodes are many
times faster for it.
"""

import contextlib
import functools
import glob
import io
import logging
import os
import subprocess
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from demo2eval.errors import UserError
from demo2eval.robots import CAMERAS

CONTROL_FREQUENCY = 20
"""Control steps per second of ManiSkill's tasks, and so the frame rate of datasets and videos."""
BACKEND_VARIABLE = "DEMO2EVAL_RENDER_BACKEND"
GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/dxg")
"""Device files of NVIDIA's driver; the second is that of Linux on Windows."""


def limit_threads(count: int = 1) -> None:
    """Let this process use `count` threads. Call it before ManiSkill is imported."""
    for name in ("LP_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)


@functools.cache
def render_backend() -> str:
    """Return what renders: "gpu" if NVIDIA's driver lists one, else "cpu", Mesa's renderer.

    The variable DEMO2EVAL_RENDER_BACKEND, cpu or gpu, has the last word. envs/setup.py decides in
    the same way.

    Raises:
        UserError: if the variable has another value.
    """
    backend = os.environ.get(BACKEND_VARIABLE)
    if backend:
        if backend not in ("cpu", "gpu"):
            raise UserError(
                f"{BACKEND_VARIABLE} is {backend!r}; set it to cpu or gpu, or not at all."
            )
        return backend
    # The driver may take a second to answer; without a device there is nothing to ask.
    if not any(glob.glob(pattern) for pattern in GPU_DEVICES):
        return "cpu"
    try:
        output = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "cpu"
    return "gpu" if output.startswith("GPU ") else "cpu"


def make_env(
    task: str,
    *,
    robot: str,
    control_mode: str,
    cameras: Sequence[str] = (),
    image_size: int = 128,
    max_episode_steps: int | None = None,
    **kwargs: Any,
) -> Any:
    """Make a ManiSkill env of a task.

    Args:
        task: ManiSkill's environment id.
        robot: the task's robot; the two Pandas start with their last joint 90 degrees apart.
        control_mode: what actions mean.
        cameras: those that `get_observation` returns.
        image_size: side of the images, pixels.
        max_episode_steps: length at which an episode is truncated; None is ManiSkill's own, which
            is shorter than demonstrations.
        kwargs: passed to `gymnasium.make`.

    Returns:
        A `gymnasium.Env`. Its `reset` and `step` return empty observations.

    Raises:
        UserError: if ManiSkill has no such task, the robot no such camera, or the machine no Vulkan
            device.
    """
    for camera in cameras:
        if camera not in CAMERAS[robot]:
            known = ", ".join(CAMERAS[robot])
            raise UserError(f"the robot {robot} has no camera {camera!r}; it has {known}.")
    warnings.filterwarnings("ignore")
    for name in ("mani_skill", "gymnasium", "toppra"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        import gymnasium
        import mani_skill.envs  # noqa: F401  (registers the tasks)
    from mani_skill.envs.utils.observations import parse_obs_mode_to_struct

    try:
        env: Any = gymnasium.make(
            task,
            obs_mode="none",
            reward_mode="none",
            control_mode=control_mode,
            robot_uids=robot,
            max_episode_steps=max_episode_steps,
            sim_backend="physx_cpu",
            render_backend=render_backend(),
            sensor_configs={"width": image_size, "height": image_size},
            **kwargs,
        )
    except gymnasium.error.UnregisteredEnv as error:
        raise UserError(f"ManiSkill has no task {task!r} ({error}); mend `task`.") from None
    except RuntimeError as error:
        if "device" not in str(error):
            raise
        raise UserError(
            f"ManiSkill found no Vulkan device ({error}); run `make setup`, then `make doctor`."
        ) from error
    # obs_mode "none" keeps `step` from rendering; this says what `get_sensor_images` returns.
    env.unwrapped.obs_mode_struct = parse_obs_mode_to_struct("rgb")
    env.unwrapped.observed_cameras = tuple(cameras)
    return env


def get_observation(env: Any) -> dict[str, dict[str, np.ndarray]]:
    """Render the cameras and read the robot, as ManiSkill's obs_mode "rgb" does.

    Returns:
        {"images": {camera: uint8 [H, W, 3]}, "state": {part: float32 [dim]}} of this instant.
    """
    images = env.unwrapped.get_sensor_images()
    return {
        "images": {
            camera: images[camera]["rgb"][0].cpu().numpy()
            for camera in env.unwrapped.observed_cameras
        },
        "state": get_state(env),
    }


def get_state(env: Any) -> dict[str, np.ndarray]:
    """Read the robot without rendering.

    Returns:
        {part: float32 [dim]}: `qpos`, then each vector of ManiSkill's `obs["extra"]`.
    """
    base = env.unwrapped
    # ManiSkill's interface of a task, for which it has no public caller that does not render.
    extra = base._get_obs_extra(base.get_info())
    vectors = {
        name: value
        for name, value in extra.items()
        if value.ndim == 2 and value.is_floating_point()
    }
    parts = {"qpos": base.agent.get_proprioception()["qpos"]} | vectors
    return {name: np.asarray(value[0].cpu(), np.float32) for name, value in parts.items()}

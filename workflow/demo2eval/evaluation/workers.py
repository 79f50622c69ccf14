"""Simulator processes: each holds one env and runs whole episodes.

A process gets a seed, sends a `PolicyCall` whenever the episode needs actions, and at its end the
`EpisodeResult`. An episode goes on to its time limit also after success, since success at the end
is measured there.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from demo2eval.checkpoints.policy_metadata import PolicyMetadata
from demo2eval.config import Evaluation, Milestones
from demo2eval.errors import UserError

FRAME_SIZE = 256
"""Side of the recorded frames, pixels."""
SILENCE_S = 600.0
"""A process that owes an answer for so long hangs: to make an env takes up to a minute, a chunk of
actions seconds."""


@dataclass(frozen=True)
class EpisodeSettings:
    """What envs and episodes are made from.

    Attributes:
        cameras: ManiSkill's, that the policy sees.
        state: parts of the state vector.
        object: env attribute of the object that is manipulated.
        max_episode_steps: length of every episode.
        replan_steps: actions executed between two policy calls.
        record_frames: return a frame per step as well.
    """

    task: str
    robot: str
    control_mode: str
    cameras: tuple[str, ...]
    image_size: int
    state: tuple[str, ...]
    object: str
    milestones: Milestones
    max_episode_steps: int
    replan_steps: int
    record_frames: bool = False


def make_episode_settings(
    policy: PolicyMetadata,
    task: str,
    object: str,
    milestones: Milestones,
    evaluation: Evaluation,
    record_frames: bool = False,
) -> EpisodeSettings:
    """Return what the simulator processes need, with the env as the policy was trained in it.

    Raises:
        UserError: if the policy is of another task, or predicts too few actions.
    """
    if policy.task != task:
        raise UserError(
            f"the checkpoint is a policy for {policy.task}, not for {task}; evaluate it on its own "
            "task."
        )
    horizon = policy.config.action_horizon
    if evaluation.replan_steps > horizon:
        raise UserError(
            f"evaluation.replan_steps {evaluation.replan_steps} is more than the policy's "
            f"{horizon} actions; lower it."
        )
    return EpisodeSettings(
        task=task,
        robot=policy.robot,
        control_mode=policy.control_mode,
        cameras=tuple(sorted(set(policy.cameras.values()))),
        image_size=policy.image_size,
        state=tuple(policy.state),
        object=object,
        milestones=milestones,
        max_episode_steps=evaluation.max_episode_steps,
        replan_steps=evaluation.replan_steps,
        record_frames=record_frames,
    )


@dataclass(frozen=True)
class PolicyCall:
    """An observation that waits for actions.

    Attributes:
        seed: of the episode.
        index: number of the policy call in its episode.
        observation: {"images": {camera: uint8 [h, w, 3]}, "state": float32 [dim]}.
    """

    seed: int
    index: int
    observation: dict


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went.

    Attributes:
        success_once: success after some step; success_at_end: after the last.
        first_success_step: number of actions executed at the first success; None if there was none.
        steps: actions executed.
        milestone: the furthest (`demo2eval.maniskill.milestones`).
        nearest: smallest distance of the tool center point from the object, meters.
        frames: uint8 [steps + 1, h, w, 3] of ManiSkill's human render camera, which also shows
            hidden goals; None unless they are recorded.
        success_so_far: bool [steps + 1], for each frame.
    """

    seed: int
    success_once: bool
    success_at_end: bool
    first_success_step: int | None
    steps: int
    policy_calls: int
    milestone: str
    nearest: float
    frames: np.ndarray | None = None
    success_so_far: np.ndarray | None = None


Infer = Callable[[list[PolicyCall]], Iterable[np.ndarray]]
"""Returns the actions of each call, [at least replan_steps, action_dim]."""


def make_rollout_env(settings: EpisodeSettings) -> Any:
    """Make the env for `run_episode`."""
    from demo2eval.maniskill.env import make_env

    frame_size = {"width": FRAME_SIZE, "height": FRAME_SIZE}
    return make_env(
        settings.task,
        robot=settings.robot,
        control_mode=settings.control_mode,
        cameras=settings.cameras,
        image_size=settings.image_size,
        # `run_episode` ends the episode; gymnasium's own limit must not come first.
        max_episode_steps=settings.max_episode_steps + 1,
        **({"human_render_camera_configs": frame_size} if settings.record_frames else {}),
    )


def run_episode(env: Any, settings: EpisodeSettings, seed: int, infer: Infer) -> EpisodeResult:
    """Run one episode, and call the policy every `replan_steps`."""
    from demo2eval.maniskill.env import get_observation
    from demo2eval.maniskill.milestones import MilestoneTracker
    from demo2eval.maniskill.observation import state_vector

    # A scene that was used before keeps contacts in its solver: the same seed and actions then end
    # up to centimeters apart. A fresh one costs 0.2 s, and makes episodes independent of each
    # other.
    env.reset(seed=seed, options={"reconfigure": True})
    tracker = MilestoneTracker(env, settings.object, settings.milestones)
    success, frames = [False], [_render(env)] if settings.record_frames else []
    starts = range(0, settings.max_episode_steps, settings.replan_steps)
    for index, start in enumerate(starts):
        observed = get_observation(env)
        state = state_vector(settings.state, observed["state"])
        call = PolicyCall(seed, index, {"images": observed["images"], "state": state})
        (actions,) = infer([call])
        for action in actions[: min(settings.replan_steps, settings.max_episode_steps - start)]:
            info = env.step(action)[4]
            success.append(bool(info["success"]))
            tracker.update(info)
            if settings.record_frames:
                frames.append(_render(env))
    success_so_far = np.maximum.accumulate(success)
    return EpisodeResult(
        seed=seed,
        success_once=any(success),
        success_at_end=success[-1],
        first_success_step=success.index(True) if any(success) else None,
        steps=len(success) - 1,
        policy_calls=len(starts),
        milestone=tracker.furthest,
        nearest=tracker.nearest,
        frames=np.stack(frames) if frames else None,
        success_so_far=success_so_far if frames else None,
    )


def _render(env: Any) -> np.ndarray:
    return env.unwrapped.render_rgb_array()[0].cpu().numpy()


def work(connection: Connection, settings: EpisodeSettings) -> None:
    """Make an env; run episodes of the seeds that come, until None comes or the parent ends."""
    from demo2eval.maniskill.env import limit_threads

    # Control-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_threads()

    def infer(calls: list[PolicyCall]) -> list[np.ndarray]:
        connection.send(calls[0])
        return [connection.recv()]

    try:
        env = make_rollout_env(settings)
        connection.send("ready")
        while (seed := connection.recv()) is not None:
            connection.send(run_episode(env, settings, seed, infer))
    except (EOFError, ConnectionError):
        pass
    except UserError as error:
        connection.send(error)
    except Exception:
        connection.send(RuntimeError(traceback.format_exc()))
    finally:
        # Taking the renderer down would take seconds and save nothing.
        os._exit(0)


@dataclass
class Worker:
    """A simulator process, as its parent sees it.

    Attributes:
        seed: of its episode; None while it starts.
        asked: when it was given something to do, seconds.
        is_replacement: whether it was started because one before it hung.
    """

    number: int
    process: BaseProcess
    connection: Connection
    seed: int | None = None
    asked: float = field(default_factory=time.monotonic)
    is_replacement: bool = False

    @classmethod
    def start(cls, number: int, settings: EpisodeSettings) -> "Worker":
        """Start the process, which sends "ready" when its env is made."""
        # A forked copy of a process that has used JAX can hang; a new interpreter cannot.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, settings), daemon=True)
        process.start()
        theirs.close()
        return cls(number, process, ours)

    @property
    def during(self) -> str:
        """What it does, in words."""
        return "while it started" if self.seed is None else f"in the episode of seed {self.seed}"

    @property
    def hangs(self) -> bool:
        """Whether it owes an answer for longer than it may."""
        return time.monotonic() - self.asked > SILENCE_S and not self.connection.poll()

    def send(self, message: Any) -> None:
        """Send a message; if the process is dead, the next `receive` says so."""
        self.asked = time.monotonic()
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)

    def replace(self, settings: EpisodeSettings) -> "Worker":
        """Kill the process, which hangs, and start another in its place.

        Raises:
            UserError: if it has taken the place of one that hung itself.
        """
        self.process.kill()
        sentence = (
            f"simulator process {self.number} gave no answer for {SILENCE_S:.0f} s {self.during}"
        )
        if self.is_replacement:
            raise UserError(
                f"{sentence}, as one before it; see whether the machine or its GPU driver hangs, "
                "and run the same command again, which keeps the finished episodes."
            )
        print(f"{sentence}; another is started in its place.", file=sys.stderr)
        replacement = Worker.start(self.number, settings)
        replacement.is_replacement = True
        return replacement

    def receive(self) -> Any:
        """Return the next message.

        Raises:
            UserError: if the process raised it, or died.
            RuntimeError: if it failed.
        """
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise UserError(
                f"simulator process {self.number} died with status {self.process.exitcode} "
                f"{self.during}; if memory ran out, lower evaluation.num_workers."
            ) from None
        if isinstance(message, RuntimeError):
            raise RuntimeError(f"simulator process {self.number} failed {self.during}:\n{message}")
        if isinstance(message, UserError):
            raise message
        return message


def run_episodes(
    settings: EpisodeSettings,
    seeds: Sequence[int],
    num_workers: int,
    load_policy: Callable[[], Infer],
) -> Iterator[EpisodeResult]:
    """Run one episode of each seed in parallel; yield the results as they come, in no order.

    A result depends on its seed and the actions alone, not on `num_workers` or on what its process
    ran before.

    Args:
        num_workers: processes; fewer are started where more would not help.
        load_policy: called while the processes start. What it returns is given all calls that wait.

    Raises:
        UserError: if a process dies, hangs twice, or cannot do with the settings.
        RuntimeError: if one fails.
    """
    from demo2eval.maniskill.env import render_backend

    if render_backend() == "cpu":
        # To render on the CPU takes nearly all of a core.
        num_workers = min(num_workers, len(os.sched_getaffinity(0)))
    if not seeds:
        return
    remaining = list(reversed(seeds))
    started: list[Worker] = []
    try:
        for number in range(min(num_workers, len(seeds))):
            started.append(Worker.start(number, settings))
        busy = list(started)
        infer = load_policy()
        while busy:
            calls = []
            ready = wait([worker.connection for worker in busy], timeout=SILENCE_S / 10)
            for worker in [worker for worker in busy if worker.hangs]:
                busy[busy.index(worker)] = replacement = worker.replace(settings)
                started.append(replacement)
                if worker.seed is not None:
                    remaining.append(worker.seed)
            for worker in [worker for worker in busy if worker.connection in ready]:
                message = worker.receive()
                if isinstance(message, PolicyCall):
                    calls.append((worker, message))
                    continue
                worker.seed = remaining.pop() if remaining else None
                worker.send(worker.seed)
                if worker.seed is None:
                    busy.remove(worker)
                if isinstance(message, EpisodeResult):
                    yield message
            if calls:
                chunks = infer([call for _, call in calls])
                for (worker, _), actions in zip(calls, chunks, strict=True):
                    worker.send(actions)
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.join()

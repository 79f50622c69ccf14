"""Simulator processes: each holds one environment, plays whole episodes, and asks for actions when it looks.

A worker reports ("look", look number, observation) and gets a chunk of actions, or reports ("done", `EpisodeResult`) and gets its next
seed. An episode runs to its time limit also after success, since success at the end is measured there.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

import numpy as np

from demo2eval.errors import UserError

FILM_SIZE = 256
PATIENCE = 5.0
"""Seconds that workers are given to end by themselves."""


@dataclass(frozen=True)
class EpisodeSettings:
    """What an environment and its episodes are made from.

    Attributes:
        state: parts of the state vector.
        replan_steps: actions executed before the next look.
        film: return a picture of every step as well.
    """

    task: str
    control_mode: str
    cameras: tuple[str, ...]
    image_size: int
    state: tuple[str, ...]
    max_episode_steps: int
    replan_steps: int
    film: bool = False


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went.

    Attributes:
        success_once: success at any step; success_at_end: at the last one.
        first_success_step: number of actions executed when success was first seen; None if never.
        steps: actions executed.
        looks: times the policy was asked.
        stage: the furthest stage of the task that was seen (`demo2eval.maniskill.milestones`).
        nearest: smallest distance of the tool centre point from the object, meters.
        film: if it was asked for, uint8 [steps + 1, h, w, 3] of ManiSkill's camera for people, which also shows hidden goals.
        successes: for each frame of the film whether success was seen so far.
    """

    seed: int
    success_once: bool
    success_at_end: bool
    first_success_step: int | None
    steps: int
    looks: int
    stage: str
    nearest: float
    film: np.ndarray | None = None
    successes: np.ndarray | None = None


class AnswersLooks(Protocol):
    """What `play` asks for actions."""

    def prepare(self) -> None:
        """Get ready."""

    def __call__(self, looks: list[tuple[int, int, dict]]) -> Sequence[np.ndarray]:
        """Return the actions of looks (seed, look number, observation), each [at least replan_steps, width]."""


def make_simulator(settings: EpisodeSettings):
    """Make the environment in which `play_episode` plays."""
    from demo2eval.maniskill.env import make_environment

    film = (
        {"human_render_camera_configs": {"width": FILM_SIZE, "height": FILM_SIZE}}
        if settings.film
        else {}
    )
    return make_environment(
        settings.task,
        control_mode=settings.control_mode,
        cameras=settings.cameras,
        image_size=settings.image_size,
        # `play_episode` ends the episode; ManiSkill's own limit must not come first.
        max_episode_steps=settings.max_episode_steps + 1,
        **film,
    )


def play_episode(
    environment, settings: EpisodeSettings, seed: int, ask: Callable[[int, dict], np.ndarray]
) -> EpisodeResult:
    """Play one episode.

    Args:
        ask: (look number, {"images", "state"}) -> actions [at least replan_steps, width].
    """
    from demo2eval.maniskill.env import look
    from demo2eval.maniskill.milestones import Progress
    from demo2eval.maniskill.observation import state_vector

    # A scene that was used before keeps contacts in its solver: the same seed and actions then end up to centimetres apart. A fresh
    # one costs 0.2 s and makes an episode independent of what the process played before.
    environment.reset(seed=seed, options={"reconfigure": True})
    history, looks, progress = [], 0, Progress(environment)
    frames = [_film_frame(environment)] if settings.film else []
    while len(history) < settings.max_episode_steps:
        seen = look(environment)
        actions = ask(
            looks, {"images": seen["images"], "state": state_vector(settings.state, seen["state"])}
        )
        looks += 1
        for action in actions[
            : min(settings.replan_steps, settings.max_episode_steps - len(history))
        ]:
            information = environment.step(action)[4]
            history.append(bool(information["success"]))
            progress.see(information)
            if settings.film:
                frames.append(_film_frame(environment))
    once = np.maximum.accumulate([False, *history])
    return EpisodeResult(
        seed=seed,
        success_once=bool(once[-1]),
        success_at_end=history[-1],
        first_success_step=int(np.argmax(once)) if once[-1] else None,
        steps=len(history),
        looks=looks,
        stage=progress.furthest,
        nearest=progress.nearest,
        film=np.stack(frames) if frames else None,
        successes=once if frames else None,
    )


def _film_frame(environment) -> np.ndarray:
    return environment.unwrapped.render_rgb_array()[0].cpu().numpy()


def _end_with_parent() -> None:
    """End this process when the one that started it was killed."""

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(connection: Connection, settings: EpisodeSettings) -> None:
    """Make an environment and play the seeds that come through the connection, until None comes."""
    from demo2eval.maniskill.env import limit_threads

    # Control-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_threads()
    _end_with_parent()

    def ask(look_number: int, observation: dict) -> np.ndarray:
        connection.send(("look", look_number, observation))
        return connection.recv()

    try:
        environment = make_simulator(settings)
        connection.send(("ready",))
        while (seed := connection.recv()) is not None:
            connection.send(("done", play_episode(environment, settings, seed, ask)))
    except (EOFError, ConnectionError):
        pass
    except UserError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
    finally:
        # To take the renderer down would take seconds and save nothing.
        os._exit(0)


@dataclass
class Worker:
    """A simulator process, as its parent sees it; `seed` is that of the episode it plays."""

    number: int
    process: BaseProcess
    connection: Connection
    seed: int | None = None

    @classmethod
    def start(cls, number: int, settings: EpisodeSettings) -> "Worker":
        """Start the process; it reports ("ready",) when its environment is made."""
        # A forked copy of a process that has used JAX can hang; a new interpreter cannot.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, settings), daemon=True)
        process.start()
        theirs.close()
        return cls(number, process, ours)

    @property
    def doing(self) -> str:
        """What the process was doing, for messages."""
        return "while it started" if self.seed is None else f"while it played seed {self.seed}"

    def send(self, message) -> None:
        """Send a message; that the process is dead is told by the next `receive`."""
        with contextlib.suppress(ConnectionError):
            self.connection.send(message)

    def receive(self) -> tuple:
        """Return the next message.

        Raises:
            UserError: if the process refused its settings or died.
            RuntimeError: if it raised.
        """
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            raise UserError(
                f"simulator process {self.number} died with status {self.process.exitcode} {self.doing}; if memory ran out, "
                "use fewer workers."
            ) from None
        if message[0] == "refused":
            raise UserError(message[1])
        if message[0] == "failed":
            raise RuntimeError(
                f"simulator process {self.number} failed {self.doing}:\n{message[1]}"
            )
        return message


def stop(workers: Sequence[Worker]) -> None:
    """End processes: those that are idle or wait for actions by themselves, the others after `PATIENCE` by force."""
    for worker in workers:
        worker.connection.close()
    deadline = time.monotonic() + PATIENCE
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
    for worker in workers:
        worker.process.kill()
        worker.process.join()


def process_count(workers: int, episodes: int) -> int:
    """Return how many processes to start: at most one an episode, and where the CPU renders one a core.

    A process that renders on the CPU needs all of a core for 10 s before its first picture, and nearly all of it afterwards.
    """
    from demo2eval.maniskill.env import render_backend

    cores = len(os.sched_getaffinity(0)) if render_backend() == "cpu" else workers
    return min(workers, episodes, cores)


def play(
    settings: EpisodeSettings, seeds: Sequence[int], workers: int, policy: AnswersLooks
) -> Iterator[EpisodeResult]:
    """Play one episode of each seed in parallel and yield the results as they come, in no particular order.

    A result depends on its seed and the actions alone, not on `workers` or on what the same process played before.

    Args:
        workers: processes, at least 1; fewer are started where more would not help.
        policy: is given all looks that wait, at most one of each process; prepared while the processes start.

    Raises:
        UserError: if a process refuses the task or dies.
        RuntimeError: if one raises; both name the seed.
    """
    waiting, started = list(reversed(seeds)), []
    try:
        for number in range(process_count(workers, len(waiting))):
            started.append(Worker.start(number, settings))
        busy = {worker.connection: worker for worker in started}
        if busy:
            policy.prepare()
        while busy:
            looks = []
            for connection in wait(list(busy)):
                worker = busy[connection]
                message = worker.receive()
                if message[0] == "look":
                    looks.append((worker, (worker.seed, *message[1:])))
                    continue
                worker.seed = waiting.pop() if waiting else None
                worker.send(worker.seed)
                if worker.seed is None:
                    del busy[connection]
                if message[0] == "done":
                    yield message[1]
            answers = policy([look for _, look in looks]) if looks else []
            for (worker, _), actions in zip(looks, answers, strict=True):
                worker.send(actions)
    finally:
        stop(started)

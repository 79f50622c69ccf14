"""Simulator processes: each holds one environment, plays whole episodes, and asks for actions when it looks.

A worker reports ("look", seed, look number, observation) and gets a chunk of actions, or reports ("done", `EpisodeResult`) and gets
its next seed. An episode runs to its time limit also after success, since success at the end is measured there.
"""

import dataclasses
import multiprocessing
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Protocol

import numpy as np

from demo2eval.errors import UserError


@dataclass(frozen=True)
class EpisodeSettings:
    """What an environment and its episodes are made from.

    Attributes:
        state: parts of the state vector.
        replan_interval: actions executed before the next look.
        film: return a picture of every step as well.
    """

    task: str
    control_mode: str
    cameras: tuple[str, ...]
    image_size: int
    state: tuple[str, ...]
    max_episode_steps: int
    replan_interval: int
    film: bool = False


@dataclass(frozen=True)
class EpisodeResult:
    """How one episode went.

    Attributes:
        success_once: success at any step; success_at_end: at the last one.
        first_success_step: number of actions executed when success was first seen; None if never.
        steps: actions executed.
        looks: times the policy was asked.
        film: uint8 [steps + 1, h, w, 3] of the first camera, if it was asked for.
        successes: for each frame of the film whether success was seen so far.
    """

    seed: int
    success_once: bool
    success_at_end: bool
    first_success_step: int | None
    steps: int
    looks: int
    film: np.ndarray | None = None
    successes: np.ndarray | None = None


def play_episode(environment, settings: EpisodeSettings, seed: int, ask: Callable[[int, dict], np.ndarray]) -> EpisodeResult:
    """Play one episode.

    Args:
        ask: (look number, {"images", "state"}) -> actions [at least replan_interval, width].
    """
    from demo2eval.maniskill.environment import look
    from demo2eval.maniskill.observation import state_vector

    environment.reset(seed=seed)
    history, looks, frames = [], 0, []
    while len(history) < settings.max_episode_steps:
        seen = look(environment)
        actions = ask(looks, {"images": seen["images"], "state": state_vector(settings.state, seen["state"])})
        looks += 1
        if settings.film and not frames:
            frames.append(seen["images"][settings.cameras[0]])
        for action in actions[: min(settings.replan_interval, settings.max_episode_steps - len(history))]:
            information = environment.step(action)[4]
            history.append(bool(information["success"]))
            if settings.film:
                frames.append(look(environment)["images"][settings.cameras[0]])
    once = np.maximum.accumulate([False, *history])
    return EpisodeResult(
        seed=seed,
        success_once=bool(once[-1]),
        success_at_end=history[-1],
        first_success_step=int(np.argmax(once)) if once[-1] else None,
        steps=len(history),
        looks=looks,
        film=np.stack(frames) if frames else None,
        successes=once if frames else None,
    )


class AnswersLooks(Protocol):
    """What `play` asks for actions."""

    def prepare(self) -> None:
        """Get ready."""

    def __call__(self, looks: list[tuple[int, int, dict]]) -> Sequence[np.ndarray]:
        """Return the actions of looks (seed, look number, observation), each [at least replan_interval, width]."""


def _end_with_parent() -> None:
    """End this process when the one that started it was killed."""
    import os

    def watch() -> None:
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(connection: Connection, settings: EpisodeSettings) -> None:
    """Make an environment and play the seeds that come through the connection, until None comes."""
    from demo2eval.maniskill.environment import limit_threads, make_environment

    limit_threads()
    _end_with_parent()
    seed = None

    def ask(look_number: int, observation: dict) -> np.ndarray:
        connection.send(("look", seed, look_number, observation))
        return connection.recv()

    try:
        environment = make_environment(
            settings.task,
            control_mode=settings.control_mode,
            cameras=settings.cameras,
            image_size=settings.image_size,
            # The loop above ends the episode; ManiSkill's own limit must not come first.
            max_episode_steps=settings.max_episode_steps + 1,
        )
        connection.send(("ready",))
        while (seed := connection.recv()) is not None:
            connection.send(("done", play_episode(environment, settings, seed, ask)))
        environment.close()
    except (EOFError, KeyboardInterrupt):
        return
    except UserError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", seed, traceback.format_exc()))


def play(settings: EpisodeSettings, seeds: Sequence[int], workers: int, policy: AnswersLooks) -> Iterator[EpisodeResult]:
    """Play one episode of each seed in parallel and yield the results as they come, in no particular order.

    Args:
        workers: processes; at most one look of each is answered in a batch.
        policy: answers up to `workers` looks at a time; prepared while the processes start.

    Raises:
        UserError: if a worker refuses the task or dies.
        RuntimeError: if a worker raises; names the seed.
    """
    context = multiprocessing.get_context("spawn")
    waiting, processes = list(reversed(seeds)), {}
    for _ in range(min(workers, len(waiting))):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, settings), daemon=True)
        process.start()
        theirs.close()
        processes[ours] = process
    playing: dict[Connection, int | None] = dict.fromkeys(processes)
    try:
        if playing:
            policy.prepare()
        while playing:
            looks = []
            for connection in wait(list(playing)):
                message = _receive(connection, processes[connection], playing[connection])
                if message[0] == "look":
                    looks.append((connection, message[1:]))
                    continue
                if message[0] == "done":
                    yield message[1]
                playing[connection] = waiting.pop() if waiting else None
                connection.send(playing[connection])
                if playing[connection] is None:
                    del playing[connection]
            if looks:
                answers = policy([look for _, look in looks])
                for (connection, _), actions in zip(looks, answers, strict=True):
                    connection.send(actions)
    finally:
        for connection, process in processes.items():
            connection.close()
            process.join(timeout=5)
            process.terminate()


def _receive(connection: Connection, process, seed: int | None) -> tuple:
    try:
        message = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        where = "while it started" if seed is None else f"while it played seed {seed}"
        raise UserError(
            f"a simulator process died with status {process.exitcode} {where}; it may have run out of memory: use fewer workers."
        ) from None
    if message[0] == "refused":
        raise UserError(message[1])
    if message[0] == "failed":
        raise RuntimeError(f"a simulator process failed at seed {message[1]}:\n{message[2]}")
    return message


def without_film(result: EpisodeResult) -> dict:
    """Return a result as a row of a table."""
    row = dataclasses.asdict(dataclasses.replace(result, film=None, successes=None))
    return {key: value for key, value in row.items() if key not in ("film", "successes")}

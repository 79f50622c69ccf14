"""Batches for training, from a training cache: what a step sees follows from the seed and the step's number alone.

Samples are drawn without replacement: every epoch is a new permutation of all looks, and batches run across the border between
epochs. Nothing is kept between calls, so a resumed training sees the very batches of an uninterrupted one.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from demo2eval.data.chunks import ARM_JOINTS, chunk_rows, last_rows
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.pi0.normalize import NormStats, load_norm_stats, normalize
from demo2eval.pi0.transforms import delta_actions, pad

ORDER, NOISE = 0, 1
RESIZE_THREADS = 8
END = object()


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Return the random numbers of one epoch's order or one step's noise; streams of different arguments are independent."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, number])))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, looks: int) -> np.ndarray:
    """Return the order of all looks in an epoch, int64 [looks]."""
    return generator(seed, ORDER, epoch).permutation(looks)


def looks_of(step: int, batch_size: int, seed: int, looks: int) -> np.ndarray:
    """Return the looks of a step's batch, int64 [batch_size]."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, places = np.divmod(positions, looks)
    return np.concatenate(
        [
            epoch_order(seed, int(epoch), looks)[places[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
    )


class Prompt:
    """The prompt's tokens for a batch of states; the same for every sample unless the model reads the state from the prompt."""

    def __init__(self, tokenizer, text: str, max_token_len: int, with_state: bool):
        """Take a `Tokenizer`, the instruction, the length to pad to, and whether the normalised state is written into the prompt."""
        self._tokenizer, self._text, self._length, self._with_state = (
            tokenizer,
            text,
            max_token_len,
            with_state,
        )
        self._fixed = None if with_state else tokenizer.tokenize(text, None, max_token_len)

    def __call__(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens int32 [b, l], mask bool [b, l]) for normalised, unpadded states [b, state dim]."""
        if self._fixed is not None:
            tokens, mask = self._fixed
            return np.tile(np.asarray(tokens, np.int32), (len(state), 1)), np.tile(
                np.asarray(mask, bool), (len(state), 1)
            )
        pairs = [self._tokenizer.tokenize(self._text, one, self._length) for one in state]
        return np.array([tokens for tokens, _ in pairs], np.int32), np.array(
            [mask for _, mask in pairs], bool
        )


class TrainingData:
    """Training samples: pictures, normalised state and normalised action chunk at every look of a training cache.

    The transforms are openpi's, in its order: differences from the state, normalisation, prompt, padding to the model's width.
    """

    def __init__(
        self,
        cache: Path,
        norm_stats: dict[str, NormStats],
        *,
        prompt: Prompt,
        cameras: dict[str, str],
        image_size: int,
        action_horizon: int,
        action_dim: int,
        delta_action_mask: list[bool] | None,
        use_quantiles: bool,
        state_noise: float = 0.0,
        num_val_demos: int = 0,
    ):
        """Open a cache.

        Args:
            cache: its folder.
            norm_stats: {"state": ..., "actions": ...}; those of the actions [action width] or [action_horizon, action width].
            prompt: gives the tokens of a sample.
            cameras: camera of the model -> camera of ManiSkill.
            image_size: side of the model's pictures.
            action_dim: width of the model's state and actions; what is shorter is padded with zeros.
            delta_action_mask: per action dimension, whether it is a difference from the state; None: no one is.
            use_quantiles: normalise by q01 and q99 rather than by mean and std.
            state_noise: standard deviation, radians, of noise on the seven arm joints, which must lead the state. Differences
                are taken from the noisy joints, so that what the model is asked for leads back to the demonstration.
            num_val_demos: the last so many demonstrations are left out.

        Raises:
            UserError: if the cache, the norm stats and the model do not fit together.
        """
        episode = _load(cache, "episode")
        self._episode_last = last_rows(episode)
        self._look_row, self._state, self._action = (
            _load(cache, name) for name in ("look_row", "state", "action")
        )
        # Episodes lie in order, so what is held out are the last looks.
        self._looks = trained_looks(episode[self._look_row], num_val_demos)
        self._pictures = {
            model: _load(cache, f"images_{camera}", mmap_mode="r")
            for model, camera in cameras.items()
        }
        self._norm_stats, self._prompt = norm_stats, prompt
        self._image_size, self._horizon, self._action_dim = image_size, action_horizon, action_dim
        self._mask, self._use_quantiles, self._state_noise = (
            delta_action_mask,
            use_quantiles,
            state_noise,
        )
        self._pool = ThreadPoolExecutor(RESIZE_THREADS, thread_name_prefix="resize")
        self._check(cache)

    def __len__(self) -> int:
        """Return the number of looks, which is the number of samples in an epoch."""
        return self._looks

    def _check(self, cache: Path) -> None:
        state, actions = (
            self._norm_stats["state"].mean.shape,
            self._norm_stats["actions"].mean.shape,
        )
        if state[-1] != self._state.shape[1] or actions[-1] != self._action.shape[1]:
            raise UserError(
                f"{cache} has {self._state.shape[1]} state and {self._action.shape[1]} action dimensions, "
                f"the norm stats {state[-1]} and {actions[-1]}; take them from the same dataset."
            )
        if len(actions) == 2 and actions[0] != self._horizon:
            raise UserError(
                f"the norm stats are of {actions[0]} action steps, the model's horizon is {self._horizon}; make them again."
            )
        if max(state[-1], actions[-1]) > self._action_dim:
            raise UserError(
                f"the model is {self._action_dim} wide, less than the {max(state[-1], actions[-1])} of {cache}."
            )

    def batch(self, step: int, batch_size: int, seed: int) -> dict:
        """Return the batch of a training step.

        Returns:
            images: camera of the model -> uint8 [batch_size, image_size, image_size, 3].
            state: float32 [batch_size, action_dim], normalised, padded.
            actions: float32 [batch_size, horizon, action_dim], normalised, padded.
            tokenized_prompt, tokenized_prompt_mask: int32 and bool [batch_size, tokens].
        """
        looks = looks_of(step, batch_size, seed, len(self))
        rows = self._look_row[looks]
        state = self._state[rows]
        if self._state_noise:
            noise = generator(seed, NOISE, step).standard_normal(
                (batch_size, ARM_JOINTS), dtype=np.float32
            )
            state[:, :ARM_JOINTS] += np.float32(self._state_noise) * noise
        actions = self._action[chunk_rows(rows, self._episode_last, self._horizon)]
        if self._mask is not None:
            actions = delta_actions(actions, state, self._mask)
        state = normalize(state, self._norm_stats["state"], self._use_quantiles)
        actions = normalize(actions, self._norm_stats["actions"], self._use_quantiles)
        tokens, token_mask = self._prompt(state)
        return {
            "images": {
                camera: self._resized(pictures, looks)
                for camera, pictures in self._pictures.items()
            },
            "state": pad(state, self._action_dim).astype(np.float32),
            "actions": pad(actions, self._action_dim).astype(np.float32),
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": token_mask,
        }

    def _resized(self, pictures: np.ndarray, looks: np.ndarray) -> np.ndarray:
        side = self._image_size
        if pictures.shape[1:3] == (side, side):
            return pictures[looks]
        batch = np.empty((len(looks), side, side, 3), np.uint8)

        def resize(index: int) -> None:
            batch[index] = resize_with_pad(pictures[looks[index]], side, side)

        list(self._pool.map(resize, range(len(looks))))
        return batch

    @classmethod
    def for_policy(
        cls, cache: Path, checkpoint: Path, *, state_noise: float = 0.0, num_val_demos: int = 0
    ) -> "TrainingData":
        """Open a cache for the policy that a checkpoint describes.

        Args:
            cache: the cache's folder.
            checkpoint: the folder of a step, whose assets hold policy.json, norm_stats.json and tokenizer.model.
        """
        from demo2eval.checkpoints.policy_metadata import find_assets, read_policy_metadata
        from demo2eval.pi0.tokenizer import Tokenizer

        policy, assets = read_policy_metadata(checkpoint), find_assets(checkpoint)
        config = policy.config
        prompt = Prompt(
            Tokenizer.from_file(assets / "tokenizer.model"),
            policy.prompt,
            config.max_token_len,
            config.discrete_state_input,
        )
        return cls(
            cache,
            load_norm_stats(assets / "norm_stats.json"),
            prompt=prompt,
            cameras=policy.cameras,
            image_size=config.siglip.image_size,
            action_horizon=config.action_horizon,
            action_dim=config.action_dim,
            delta_action_mask=policy.delta_action_mask,
            use_quantiles=policy.use_quantiles,
            state_noise=state_noise,
            num_val_demos=num_val_demos,
        )


def trained_looks(episode: np.ndarray, num_val_demos: int) -> int:
    """Return how many looks, from the first, training may see if the last `num_val_demos` demonstrations are kept from it.

    Args:
        episode: [looks] the demonstration of each look, ascending.

    Raises:
        UserError: if nothing is left.
    """
    looks = int(np.searchsorted(episode, episode[-1] + 1 - num_val_demos))
    if looks == 0:
        raise UserError(
            f"training.num_val_demos is {num_val_demos}, and there are {int(episode[-1]) + 1} demonstrations; lower it."
        )
    return looks


def _load(cache: Path, name: str, **options) -> np.ndarray:
    path = Path(cache) / f"{name}.npy"
    try:
        return np.load(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete the cache's manifest and make it again."
        ) from error


def prefetch(batches: Iterable[dict], depth: int) -> Iterator[dict]:
    """Yield what `batches` yields, made by a background thread that is up to `depth` ahead; its exceptions are raised here."""
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
            put((END, None))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=work, daemon=True, name="prefetch").start()
    try:
        while True:
            batch, error = waiting.get()
            if error is not None:
                raise error
            if batch is END:
                return
            yield batch
    finally:
        stopped.set()

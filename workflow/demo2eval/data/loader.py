"""Batches for training, from an image cache: a batch follows from the seed and the step alone.

Samples are drawn without replacement: every epoch is a new permutation of all samples, and batches
run across the border between epochs. Nothing is kept between calls, so a resumed training sees the
very batches of an uninterrupted one.

Grain over the same arrays was slower (docs/benchmarks.md): it makes each sample by a call of its
own, where a batch here is one index into each array.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np

from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.pi0.normalize import NormStats, load_norm_stats, normalize
from demo2eval.pi0.transforms import delta_actions, pad
from demo2eval.robots import ARM_JOINTS

ORDER, NOISE = 0, 1
RESIZE_THREADS = 8
END = object()


def make_generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """Return the random numbers of an epoch's order or a step's noise."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, number])))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return the order of all samples in an epoch, int64 [num_samples]."""
    return make_generator(seed, ORDER, epoch).permutation(num_samples)


def draw_samples(step: int, batch_size: int, seed: int, num_samples: int) -> np.ndarray:
    """Return the samples of a step's batch, int64 [batch_size]."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, positions = np.divmod(positions, num_samples)
    batch = [
        epoch_order(seed, int(epoch), num_samples)[positions[epochs == epoch]]
        for epoch in np.unique(epochs)
    ]
    return np.concatenate(batch)


def count_training_samples(episode: np.ndarray, num_val_demos: int) -> int:
    """Return how many samples, from the first, are not of the last `num_val_demos` demos.

    Args:
        episode: [samples] the demo of each sample, ascending.

    Raises:
        UserError: if none is left.
    """
    num_samples = int(np.searchsorted(episode, episode[-1] + 1 - num_val_demos))
    if num_samples == 0:
        raise UserError(
            f"training.num_val_demos is {num_val_demos}, and there are {int(episode[-1]) + 1} "
            "demos; lower it."
        )
    return num_samples


class PromptTokenizer:
    """Tokens of the prompt for a batch of states; all the same unless it contains the state."""

    def __init__(self, tokenizer, prompt: str, max_token_len: int, with_state: bool):
        """Take a `Tokenizer`, the instruction, and whether the normalized state is written into it.

        Args:
            max_token_len: length to pad to.
        """
        self._tokenizer, self._prompt = tokenizer, prompt
        self._length, self._with_state = max_token_len, with_state

    def tokenize(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens int32 [b, l] and mask bool [b, l] of normalized states [b, state dim]."""
        states = state if self._with_state else [None]
        pairs = [self._tokenizer.tokenize(self._prompt, item, self._length) for item in states]
        tokens = np.array([tokens for tokens, _ in pairs], np.int32)
        mask = np.array([mask for _, mask in pairs], bool)
        shape = (len(state), tokens.shape[1])
        return np.broadcast_to(tokens, shape).copy(), np.broadcast_to(mask, shape).copy()


class BatchLoader:
    """Training batches: images, normalized state and normalized action chunk of samples of a cache.

    The transforms are openpi's, in its order: differences from the state, normalization, prompt,
    padding to the model's dimensions.
    """

    def __init__(
        self,
        cache: Path,
        norm_stats: dict[str, NormStats],
        *,
        prompt: PromptTokenizer,
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
            norm_stats: {"state": ..., "actions": ...}; those of the actions [action dim] or
                [horizon, action dim].
            cameras: camera of the model -> camera of ManiSkill.
            image_size: side of the model's images.
            action_dim: the model's, of state and actions; shorter ones are padded with zeros.
            delta_action_mask: per action dimension, whether it is a difference from the state.
            use_quantiles: normalize by q01 and q99 rather than by mean and std.
            state_noise: standard deviation, radians, of noise on the arm's joints, which must lead
                the state. Differences are taken from the noisy joints, so that what the model is
                asked for leads back to the demo.
            num_val_demos: the last so many demos are left out.

        Raises:
            UserError: if the cache, the norm stats and the model do not fit together.
        """
        episode = _load(cache, "episode")
        self._episode, self._last_row = episode, last_rows(episode)
        self._sample_row = _load(cache, "sample_row")
        self._state, self._action = _load(cache, "state"), _load(cache, "action")
        # Episodes lie in order, so the validation demos are the last samples.
        self._num_samples = count_training_samples(episode[self._sample_row], num_val_demos)
        self._images = {
            model: _load(cache, f"images_{camera}", mmap_mode="r")
            for model, camera in cameras.items()
        }
        self._norm_stats, self._prompt = norm_stats, prompt
        self._image_size, self._horizon = image_size, action_horizon
        self._action_dim, self._mask = action_dim, delta_action_mask
        self._use_quantiles, self._state_noise = use_quantiles, state_noise
        self._pool = ThreadPoolExecutor(RESIZE_THREADS, thread_name_prefix="resize")
        self._check_dims(cache)

    @classmethod
    def for_policy(
        cls, cache: Path, checkpoint: Path, *, state_noise: float = 0.0, num_val_demos: int = 0
    ) -> "BatchLoader":
        """Open a cache for the policy of a checkpoint.

        Args:
            cache: the cache's folder.
            checkpoint: the folder of a step, whose assets hold policy.json, norm_stats.json and
                tokenizer.model.
        """
        from demo2eval.checkpoints.policy_metadata import find_assets, read_policy_metadata
        from demo2eval.pi0.tokenizer import Tokenizer

        policy, assets = read_policy_metadata(checkpoint), find_assets(checkpoint)
        config = policy.config
        prompt = PromptTokenizer(
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

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        return self._num_samples

    def _check_dims(self, cache: Path) -> None:
        state = self._norm_stats["state"].mean.shape
        actions = self._norm_stats["actions"].mean.shape
        if (state[-1], actions[-1]) != (self._state.shape[1], self._action.shape[1]):
            raise UserError(
                f"{cache} has {self._state.shape[1]} state and {self._action.shape[1]} action "
                f"dimensions, the norm stats {state[-1]} and {actions[-1]}; take them from the "
                "same dataset."
            )
        if len(actions) == 2 and actions[0] != self._horizon:
            raise UserError(
                f"the norm stats are of {actions[0]} timesteps, the model's action_horizon is "
                f"{self._horizon}; make them again."
            )
        dim = max(state[-1], actions[-1])
        if dim > self._action_dim:
            raise UserError(
                f"the model's action_dim is {self._action_dim}, less than the {dim} dimensions "
                f"of {cache}."
            )

    def load_batch(self, step: int, batch_size: int, seed: int, part: slice = slice(None)) -> dict:
        """Return the batch of a training step, or a part of it.

        Args:
            step: from 0.
            batch_size: of the whole batch.
            seed: of samples and noise.
            part: of the batch, b samples; the others are neither read nor returned.

        Returns:
            images: camera of the model -> uint8 [b, image_size, image_size, 3].
            state: float32 [b, action_dim], normalized, padded.
            actions: float32 [b, horizon, action_dim], normalized, padded.
            tokenized_prompt, tokenized_prompt_mask: int32 and bool [b, tokens].
        """
        samples = draw_samples(step, batch_size, seed, len(self))[part]
        rows = self._sample_row[samples]
        state = self._state[rows]
        if self._state_noise:
            generator = make_generator(seed, NOISE, step)
            noise = generator.standard_normal((batch_size, ARM_JOINTS), dtype=np.float32)
            state[:, :ARM_JOINTS] += np.float32(self._state_noise) * noise[part]
        actions = self._action[chunk_rows(rows, self._last_row, self._horizon)]
        if self._mask is not None:
            actions = delta_actions(actions, state, self._mask)
        state = normalize(state, self._norm_stats["state"], self._use_quantiles)
        actions = normalize(actions, self._norm_stats["actions"], self._use_quantiles)
        tokens, token_mask = self._prompt.tokenize(state)
        images = {camera: self._resize(images, samples) for camera, images in self._images.items()}
        return {
            "images": images,
            "state": pad(state, self._action_dim).astype(np.float32),
            "actions": pad(actions, self._action_dim).astype(np.float32),
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": token_mask,
        }

    def batch_episodes(self, step: int, batch_size: int, seed: int) -> list[int]:
        """Return the episodes of the samples in the batch of a step, each once."""
        samples = draw_samples(step, batch_size, seed, len(self))
        return np.unique(self._episode[self._sample_row[samples]]).tolist()

    @property
    def num_cameras(self) -> int:
        """The cameras of each sample."""
        return len(self._images)

    def _resize(self, images: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return the images of samples in the model's size."""
        side = self._image_size
        if images.shape[1:3] == (side, side):
            return images[samples]
        resized = self._pool.map(
            lambda sample: resize_with_pad(images[sample], side, side), samples
        )
        return np.stack(list(resized))


def _load(cache: Path, name: str, **options) -> np.ndarray:
    path = Path(cache) / f"{name}.npy"
    try:
        return np.load(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete the cache's manifest and make it again."
        ) from error


def prefetch(batches: Iterable[dict], depth: int) -> Iterator[dict]:
    """Yield `batches`, made by a thread up to `depth` ahead; its exceptions are raised here."""
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

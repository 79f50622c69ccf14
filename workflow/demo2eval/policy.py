"""A checkpoint as a policy: observations in, chunks of actions out, with training's own transforms."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from demo2eval.description import assets_folder, read_description
from demo2eval.pi0.checkpoint import load_params
from demo2eval.pi0.model import Observation, sample_actions
from demo2eval.pi0.normalization import load_norm_stats, normalize, unnormalize
from demo2eval.pi0.tokenizer import Tokenizer
from demo2eval.pi0.transforms import absolute_actions, pad, resize_with_pad


class Policy:
    """A loaded checkpoint that answers looks, several at a time, always with the same compiled batch size."""

    def __init__(self, checkpoint: Path, *, batch_size: int, flow_steps: int = 10):
        """Load a checkpoint.

        Args:
            checkpoint: the folder of a step, results/<run>/checkpoints/<step>.
            batch_size: of the compiled model; fewer looks are padded to it, so an answer does not depend on how many are asked.
            flow_steps: Euler steps from noise to actions.

        Raises:
            UserError: if something of the checkpoint is missing or does not fit.
        """
        self.description = read_description(checkpoint)
        self.config = self.description.config
        self.batch_size = batch_size
        assets = assets_folder(checkpoint)
        self._stats = load_norm_stats(assets / "norm_stats.json")
        self._tokenizer = Tokenizer.from_file(assets / "tokenizer.model")
        self._params = jax.device_put(load_params(Path(checkpoint) / "params", self.config))
        self._sample = jax.jit(partial(sample_actions, self.config, num_steps=flow_steps))

    def noise(self, policy_seed: int, episode_seed: int, look: int) -> np.ndarray:
        """Return the noise of one look, float32 [horizon, action_dim]; it depends on these three numbers alone."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([policy_seed, episode_seed, look])))
        return generator.standard_normal((self.config.action_horizon, self.config.action_dim), dtype=np.float32)

    def inputs(self, observations: Sequence[Mapping]) -> Observation:
        """Return what the model sees of looks.

        Args:
            observations: n <= batch_size looks, {"images": {ManiSkill's camera: uint8 [h, w, 3]}, "state": float32 [S]}.

        Returns:
            an `Observation` of n.
        """
        size, states = self.config.siglip.image_size, np.stack([item["state"] for item in observations])
        images = {
            camera: np.stack([resize_with_pad(item["images"][source], size, size) for item in observations])
            for camera, source in self.description.cameras.items()
        }
        normalized = normalize(states, self._stats["state"], self.description.use_quantiles)
        tokens = [
            self._tokenizer.tokenize(
                self.description.prompt, state if self.config.discrete_state_input else None, self.config.max_token_len
            )
            for state in normalized
        ]
        return Observation(
            images={camera: pixels.astype(np.float32) / 255.0 * 2.0 - 1.0 for camera, pixels in images.items()},
            state=pad(normalized, self.config.action_dim).astype(np.float32),
            tokenized_prompt=np.stack([ids for ids, _ in tokens]),
            tokenized_prompt_mask=np.stack([mask for _, mask in tokens]),
        )

    def act(self, observations: Sequence[Mapping], noise: Sequence[np.ndarray]) -> np.ndarray:
        """Answer looks.

        Args:
            observations: n <= batch_size looks, as for `inputs`.
            noise: of each look, float32 [horizon, action_dim].

        Returns:
            float32 [n, horizon, action width] in the environment's units, absolute where the model predicts differences.
        """
        count = len(observations)
        filled = [observations[min(index, count - 1)] for index in range(self.batch_size)]
        drawn = np.stack([noise[min(index, count - 1)] for index in range(self.batch_size)])
        chunk = np.asarray(self._sample(self._params, self.inputs(filled), drawn))[:count]
        chunk = chunk[..., : self.description.action_width].astype(np.float64)
        actions = unnormalize(chunk, self._stats["actions"], self.description.use_quantiles)
        if self.description.delta_action_mask is not None:
            states = np.stack([item["state"] for item in observations])
            actions = absolute_actions(actions, states, self.description.delta_action_mask)
        return actions.astype(np.float32)

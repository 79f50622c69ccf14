"""A checkpoint as a policy: observations in, chunks of actions out, with training's own transforms."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from demo2eval.checkpoints.openpi import load_params
from demo2eval.checkpoints.policy_metadata import find_assets, read_policy_metadata
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.pi0.model import Observation
from demo2eval.pi0.normalize import load_norm_stats, normalize, unnormalize
from demo2eval.pi0.sampling import compiler_options, fold_params, sample_folded
from demo2eval.pi0.tokenizer import Tokenizer
from demo2eval.pi0.transforms import absolute_actions, pad

BATCH_SIZES = {"cpu": 4, "gpu": 8}
"""Looks answered at once, by JAX's backend: a CPU's time grows with the batch, a GPU's hardly."""


class Policy:
    """A loaded checkpoint that answers looks, always with the same compiled batch size.

    Batches of different sizes differ in their last bits, which a contact in the simulator turns into another episode. One fixed size
    makes the answer to a look independent of how many are asked together.
    """

    def __init__(self, checkpoint: Path, *, num_steps: int = 10, batch_size: int | None = None):
        """Load a checkpoint.

        Args:
            checkpoint: the folder of a step, results/<run>/checkpoints/<step>.
            num_steps: Euler steps from noise to actions.
            batch_size: looks answered at once; None takes that of `BATCH_SIZES`.

        Raises:
            UserError: if something of the checkpoint is missing or does not fit.
        """
        self.description = read_policy_metadata(checkpoint)
        self.config = self.description.config
        self.batch_size = batch_size or BATCH_SIZES.get(jax.default_backend(), 8)
        assets = find_assets(checkpoint)
        self._checkpoint = checkpoint
        self._stats = load_norm_stats(assets / "norm_stats.json")
        self._tokenizer = Tokenizer.from_file(assets / "tokenizer.model")
        params = load_params(Path(checkpoint) / "params", self.config)
        self._folded = jax.jit(partial(fold_params, self.config, num_steps=num_steps))(params)
        self._sample = jax.jit(
            partial(sample_folded, self.config), compiler_options=compiler_options(self.batch_size)
        )

    def compile(self) -> None:
        """Compile the model, which the first answer would do otherwise."""
        size = self.description.image_size
        black = {
            camera: np.zeros((size, size, 3), np.uint8)
            for camera in self.description.cameras.values()
        }
        state = np.zeros(self._stats["state"].mean.shape[-1], np.float32)
        self.act([{"images": black, "state": state}], [self.noise(0, 0, 0)])

    def noise(self, policy_seed: int, episode_seed: int, look: int) -> np.ndarray:
        """Return the noise of one look, float32 [horizon, action_dim]; it depends on these three numbers alone."""
        generator = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([policy_seed, episode_seed, look]))
        )
        return generator.standard_normal(
            (self.config.action_horizon, self.config.action_dim), dtype=np.float32
        )

    def inputs(self, observations: Sequence[Mapping]) -> Observation:
        """Return what the model sees of looks.

        Args:
            observations: n looks, {"images": {ManiSkill's camera: uint8 [h, w, 3]}, "state": float32 [S]}.

        Returns:
            an `Observation` of n.
        """
        size, states = (
            self.config.siglip.image_size,
            np.stack([item["state"] for item in observations]),
        )
        images = {
            camera: np.stack(
                [resize_with_pad(item["images"][source], size, size) for item in observations]
            )
            for camera, source in self.description.cameras.items()
        }
        normalized = normalize(states, self._stats["state"], self.description.use_quantiles)
        prompts = [
            self._tokenizer.tokenize(
                self.description.prompt,
                state if self.config.discrete_state_input else None,
                self.config.max_token_len,
            )
            for state in normalized
        ]
        ids, masks = (np.stack(parts) for parts in zip(*prompts, strict=True))
        # With the state in it, the prompt's length changes from look to look.
        padded = self.config.discrete_state_input or not masks.all()
        return Observation(
            images=images,
            state=pad(normalized, self.config.action_dim).astype(np.float32),
            tokenized_prompt=ids,
            tokenized_prompt_mask=masks if padded else None,
        )

    def actions(self, chunk: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Return what the model says as actions of the environment.

        Args:
            chunk: [n, horizon, action_dim], normalised and padded.
            states: float32 [n, S], of the looks that were answered.

        Returns:
            float32 [n, horizon, action width] in the environment's units, absolute where the model predicts differences.
        """
        known = np.asarray(chunk, np.float64)[..., : self.description.action_dim]
        actions = unnormalize(known, self._stats["actions"], self.description.use_quantiles)
        if self.description.delta_action_mask is not None:
            actions = absolute_actions(actions, states, self.description.delta_action_mask)
        return actions.astype(np.float32)

    def act(self, observations: Sequence[Mapping], noise: Sequence[np.ndarray]) -> np.ndarray:
        """Answer looks.

        Args:
            observations: n looks, as for `inputs`.
            noise: of each look, float32 [horizon, action_dim].

        Returns:
            as `actions`.

        Raises:
            UserError: if the model's output is not finite.
        """
        batches = range(0, len(observations), self.batch_size)
        parts = [
            (observations[start : start + self.batch_size], noise[start : start + self.batch_size])
            for start in batches
        ]
        chunk = np.concatenate([self._answer(*part) for part in parts])
        if not np.isfinite(chunk).all():
            raise UserError(
                f"the policy in {self._checkpoint} answers with values that are not finite; its training diverged."
            )
        return self.actions(chunk, np.stack([item["state"] for item in observations]))

    def _answer(self, observations: Sequence[Mapping], noise: Sequence[np.ndarray]) -> np.ndarray:
        missing = self.batch_size - len(observations)
        inputs = self.inputs([*observations, *[observations[-1]] * missing])
        drawn = np.stack([*noise, *[noise[-1]] * missing])
        return np.asarray(self._sample(self._folded, inputs, drawn))[: len(observations)]

"""A checkpoint as a policy: observations in, action chunks out, with training's own transforms."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from demo2eval.checkpoints.openpi import load_params
from demo2eval.checkpoints.policy_metadata import find_assets, read_policy_metadata
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.pi0.model import Observation
from demo2eval.pi0.normalize import load_norm_stats, normalize, unnormalize
from demo2eval.pi0.sampling import compiler_options, fold_params, sample_folded
from demo2eval.pi0.tokenizer import Tokenizer, padding_mask
from demo2eval.pi0.transforms import absolute_actions, pad

BATCH_SIZES = {"cpu": 4, "gpu": 8}
"""By JAX's backend: a CPU's time grows with the batch, a GPU's hardly."""


class Policy:
    """A loaded checkpoint, which always infers with the same compiled batch size.

    Batches of different sizes differ in their last bits, which a contact in the simulation turns
    into another episode. One fixed size makes the actions for an observation independent of how
    many observations come together.

    Attributes:
        metadata: the checkpoint's policy.json.
        config: the model's `Pi0Config`.
    """

    def __init__(self, checkpoint: Path, *, num_steps: int = 10, batch_size: int | None = None):
        """Load a checkpoint.

        Args:
            checkpoint: the folder of a step, results/<run>/checkpoints/<step>.
            num_steps: Euler steps from noise to actions.
            batch_size: observations inferred at once; None takes that of `BATCH_SIZES`.

        Raises:
            UserError: if something of the checkpoint is missing or does not fit.
        """
        self.metadata = read_policy_metadata(checkpoint)
        self.config = self.metadata.config
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
        """Compile the model, which the first `infer` would do otherwise."""
        size = self.metadata.image_size
        black = np.zeros((size, size, 3), np.uint8)
        images = dict.fromkeys(self.metadata.cameras.values(), black)
        state = np.zeros(self._stats["state"].mean.shape[-1], np.float32)
        self.infer([{"images": images, "state": state}], [self.draw_noise(0, 0, 0)])

    def draw_noise(self, policy_seed: int, episode_seed: int, index: int) -> np.ndarray:
        """Return the noise of policy call `index` of an episode, float32 [horizon, action_dim].

        It depends on these three numbers alone.
        """
        sequence = np.random.SeedSequence([policy_seed, episode_seed, index])
        return np.random.Generator(np.random.Philox(sequence)).standard_normal(
            (self.config.action_horizon, self.config.action_dim), dtype=np.float32
        )

    def infer(self, observations: Sequence[Mapping], noise: Sequence[np.ndarray]) -> np.ndarray:
        """Return a chunk of actions for each observation.

        Args:
            observations: n times {"images": {ManiSkill's camera: uint8 [h, w, 3]}, "state": float32
                [state dim]}.
            noise: n times float32 [horizon, action_dim].

        Returns:
            float32 [n, horizon, dim of ManiSkill's action], as `transform_outputs`.

        Raises:
            UserError: if the model's output is not finite.
        """
        size = self.batch_size
        chunks = np.concatenate(
            [
                self._sample_batch(observations[start : start + size], noise[start : start + size])
                for start in range(0, len(observations), size)
            ]
        )
        if not np.isfinite(chunks).all():
            raise UserError(
                f"the policy in {self._checkpoint} returns actions that are not finite; its "
                "training diverged."
            )
        return self.transform_outputs(chunks, np.stack([item["state"] for item in observations]))

    def _sample_batch(
        self, observations: Sequence[Mapping], noise: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Fill the batch up with its last observation, sample, and return what was asked for."""
        missing = self.batch_size - len(observations)
        inputs = self.transform_inputs([*observations, *[observations[-1]] * missing])
        filled = np.stack([*noise, *[noise[-1]] * missing])
        return np.asarray(self._sample(self._folded, inputs, filled))[: len(observations)]

    def transform_inputs(self, observations: Sequence[Mapping]) -> Observation:
        """Return what the model gets of observations, as `infer` takes them."""
        config, size = self.config, self.config.siglip.image_size
        states = np.stack([item["state"] for item in observations])
        images = {
            camera: jnp.asarray(
                [resize_with_pad(item["images"][source], size, size) for item in observations]
            )
            for camera, source in self.metadata.cameras.items()
        }
        normalized = normalize(states, self._stats["state"], self.metadata.use_quantiles)
        prompts = [
            self._tokenizer.tokenize(
                self.metadata.prompt,
                state if config.discrete_state_input else None,
                config.max_token_len,
            )
            for state in normalized
        ]
        tokens, masks = (np.stack(arrays) for arrays in zip(*prompts, strict=True))
        mask = padding_mask(masks, config.discrete_state_input)
        return Observation(
            images=images,
            state=jnp.asarray(pad(normalized, config.action_dim), jnp.float32),
            tokenized_prompt=jnp.asarray(tokens),
            tokenized_prompt_mask=None if mask is None else jnp.asarray(mask),
        )

    def transform_outputs(self, chunks: np.ndarray, states: np.ndarray) -> np.ndarray:
        """Return the model's output as actions of the env.

        Args:
            chunks: [n, horizon, action_dim], normalized and padded.
            states: float32 [n, state dim], of the observations.

        Returns:
            float32 [n, horizon, dim of ManiSkill's action], in the env's units, absolute where the
            model predicts differences from the state.
        """
        unpadded = np.asarray(chunks, np.float64)[..., : self.metadata.action_dim]
        actions = unnormalize(unpadded, self._stats["actions"], self.metadata.use_quantiles)
        if self.metadata.delta_action_mask is not None:
            actions = absolute_actions(actions, states, self.metadata.delta_action_mask)
        return actions.astype(np.float32)

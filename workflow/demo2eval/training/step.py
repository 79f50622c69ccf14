"""One training step: the gradient of a batch, piece by piece, and the update of the weights.

A step casts the weights to the dtype of the computation once. Each device then takes its part of
the batch, micro-batch by micro-batch; the backward pass adds every gradient to one float32 array
where it lies. The devices' sums are added up once per step, and the optimizer changes the float32
weights. All random numbers are drawn for the whole batch, so neither the number of micro-batches
nor that of devices changes what is computed, rounding aside.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from demo2eval.config import Training
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.layers import CastWeight
from demo2eval.pi0.model import Observation, draw_noise, flow_losses
from demo2eval.pi0.params import IS_CAST, unflatten
from demo2eval.training.augmentation import augment, draw_shifts, shift
from demo2eval.training.optimizer import ema_update
from demo2eval.training.sharding import AXES
from demo2eval.training.state import FlatParams, TrainState

IS_STACKED = re.compile(r"/(layers|encoderblock)/")
"""Names of the arrays whose first axis is the layer."""


def cast_weights(config: Pi0Config, params: FlatParams) -> FlatParams:
    """Return the weights as the computation uses them: cast where the model would cast them.

    Those of stacked layers are lists of each layer's, so that none is cut out again for every use;
    so are the gate and the upward half of a feed-forward.
    """

    def cast(name: str, value: jax.Array):
        if not IS_CAST.match(name) or config.dtype == "float32":
            return value
        if IS_STACKED.search(name):
            return [cast_layer(name, layer) for layer in value]
        return value.astype(config.dtype)

    def cast_layer(name: str, layer: jax.Array):
        if name.endswith("gating_einsum"):
            return [half.astype(config.dtype) for half in layer]
        return layer.astype(config.dtype)

    return {name: cast(name, value) for name, value in params.items()}


def draw_batch(training: Training, batch: dict, key: jax.Array) -> dict:
    """Return a batch with all of its random numbers, the batch the first axis of every array.

    Args:
        batch: as `BatchLoader.load_batch` gives it.
        key: of the step.
    """
    size = len(batch["state"])
    augment_key, loss_key = jax.random.split(key)
    noise, time = draw_noise(loss_key, batch["actions"].shape, training.num_noise_samples)
    drawn = batch | {"noise": noise.swapaxes(0, 1), "time": time.swapaxes(0, 1)}
    if training.random_shift:
        shift_key = jax.random.fold_in(augment_key, 1)
        drawn["shifts"] = draw_shifts(shift_key, batch["images"], size, training.random_shift)
    if training.augment:
        drawn["augment_keys"] = jax.random.split(augment_key, size)
    return drawn


def batch_loss(config: Pi0Config, training: Training, params: FlatParams, drawn: dict) -> jax.Array:
    """Return the mean flow-matching loss of a batch from `draw_batch`, after augmentation."""
    images = drawn["images"]
    if training.random_shift:
        images = {
            camera: shift(image, drawn["shifts"][camera], training.random_shift)
            for camera, image in images.items()
        }
    images = {
        camera: image.astype(jnp.float32) / 255.0 * 2.0 - 1.0 for camera, image in images.items()
    }
    if training.augment:
        images = augment(drawn["augment_keys"], images)
    observation = Observation(
        images=images,
        state=drawn["state"],
        tokenized_prompt=drawn["tokenized_prompt"],
        tokenized_prompt_mask=drawn["tokenized_prompt_mask"],
    )
    noise, time = (drawn[name].swapaxes(0, 1) for name in ("noise", "time"))
    losses = flow_losses(config, unflatten(params), observation, drawn["actions"], noise, time)
    return jnp.mean(losses)


def accumulate_gradients(
    config: Pi0Config,
    training: Training,
    weights: FlatParams,
    shapes: dict[str, tuple[int, ...]],
    frozen: FlatParams,
    drawn: dict,
    num_micro_batches: int,
) -> tuple[jax.Array, FlatParams]:
    """Return the mean loss of a batch and its gradient, float32.

    Args:
        weights: from `cast_weights`.
        shapes: of the gradients.
        frozen: weights without gradient.
        drawn: from `draw_batch`, or a part of it.
    """

    cast = [name for name in weights if IS_CAST.match(name) and config.dtype != "float32"]
    zeros = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

    def add_micro_batch(sums: tuple[jax.Array, FlatParams], micro_batch: dict):
        # Tokens are never negative, which XLA does not know: only behind an index that it cannot
        # compute does it add a layer's gradient where it lies, and not to a copy of all layers.
        zero = jnp.minimum(micro_batch["tokenized_prompt"][0, 0], 0)

        def join(master: jax.Array, copy: jax.Array | list[jax.Array]) -> CastWeight:
            if isinstance(copy, list):
                layers = [master[zero + index] for index in range(len(copy))]
                return CastWeight(layers, copy)
            return CastWeight(master, copy)

        def loss_of(trained: FlatParams) -> jax.Array:
            params = {
                name: join(value, weights[name]) if name in cast else value
                for name, value in trained.items()
            }
            return batch_loss(config, training, params | frozen, micro_batch) / num_micro_batches

        trained = weights | {name: zeros[name] for name in cast}
        loss, gradient = jax.vjp(loss_of, trained)
        refs = jax.tree.map(jax.new_ref, sums[1])
        gradient.with_refs(refs)(jnp.ones_like(loss))
        return (sums[0] + loss, jax.tree.map(jax.freeze, refs)), None

    sums = (jnp.zeros(()), zeros)
    if num_micro_batches == 1:
        return add_micro_batch(sums, drawn)[0]
    micro_batches = jax.tree.map(
        lambda array: array.reshape(num_micro_batches, -1, *array.shape[1:]), drawn
    )
    return jax.lax.scan(add_micro_batch, sums, micro_batches)[0]


def compute_gradients(
    config: Pi0Config,
    training: Training,
    mesh: Mesh,
    num_micro_batches: int,
    params: FlatParams,
    frozen: FlatParams,
    batch: dict,
    key: jax.Array,
) -> tuple[jax.Array, FlatParams]:
    """Return the mean loss of a batch, and its gradient with the devices' parts not yet added up.

    Args:
        num_micro_batches: per device.
        batch: as `BatchLoader.load_batch` gives it.
        key: of augmentation, noise and time.

    Returns:
        ([devices], name -> float32 [devices, ...]).
    """
    split, whole = PartitionSpec(AXES), PartitionSpec()
    shapes = {name: value.shape for name, value in params.items()}

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(whole, whole, split),
        out_specs=(split, split),
        check_vma=False,
    )
    def on_each_device(weights, frozen, drawn):
        sums = accumulate_gradients(
            config, training, weights, shapes, frozen, drawn, num_micro_batches
        )
        return jax.tree.map(lambda array: array[None], sums)

    return on_each_device(cast_weights(config, params), frozen, draw_batch(training, batch, key))


def update_state(
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    state: TrainState,
    losses: jax.Array,
    gradients: FlatParams,
) -> tuple[TrainState, dict]:
    """Return the state after a step, and {"loss", "grad_norm"}.

    Args:
        ema_decay: None if the average is not among the arrays of the state.
        losses, gradients: from `compute_gradients`.
    """
    gradients = jax.tree.map(lambda array: array.mean(axis=0), gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None and ema_decay is not None:
        ema = ema_update(ema, params, ema_decay)
    state = dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema)
    return state, {"loss": losses.mean(), "grad_norm": optax.global_norm(gradients)}

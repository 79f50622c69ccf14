"""openpi's optimizer, its learning rate, and the exponential moving average of weights."""

import jax
import optax


def make_schedule(
    warmup_steps: int, peak_lr: float, decay_steps: int, decay_lr: float
) -> optax.Schedule:
    """Return the learning rate as a function of the step (Loshchilov and Hutter, 2017).

    It rises linearly from peak_lr / (warmup_steps + 1) to peak_lr, then falls as a cosine to
    decay_lr at `decay_steps`, the warm-up included.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=peak_lr / (warmup_steps + 1),
        peak_value=peak_lr,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        end_value=decay_lr,
    )


def make_optimizer(
    schedule: optax.Schedule, clip_gradient_norm: float = 1.0, weight_decay: float = 1e-10
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter, 2019) behind clipping of the gradient's global norm.

    The weight decay is on all parameters.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_gradient_norm),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay),
    )


def ema_update(average, params, decay: float):
    """Return decay * average + (1 - decay) * params, array by array."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)

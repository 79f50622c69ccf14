"""openpi's optimizer: AdamW after clipping by global norm, cosine decay with warm-up, and the exponential moving average of weights."""

import jax
import optax


def make_schedule(
    warmup_steps: int, peak_lr: float, decay_steps: int, decay_lr: float
) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Linear from peak_lr / (warmup_steps + 1) to peak_lr, then a cosine to decay_lr, which is reached at `decay_steps`, the warm-up
    included (Loshchilov and Hutter, 2017).
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=peak_lr / (warmup_steps + 1),
        peak_value=peak_lr,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        end_value=decay_lr,
    )


def make_optimizer(
    schedule: optax.Schedule,
    clip: float = 1.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 1e-10,
) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter, 2019), with decay on all parameters, after clipping the gradient's global norm."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )


def ema_update(average, params, decay: float):
    """Return decay * average + (1 - decay) * params, array by array."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)

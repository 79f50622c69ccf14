"""What jobs ask of a cluster: the host's memory and time, from the sizes of model and run.

Times are limits and not forecasts: a job that meets its limit has lost time, and one that asks for
too much waits a little longer in the queue.
"""

from demo2eval.config import Run
from demo2eval.training.budget import Sizes, flops_per_sample, model_config

MB = 10**6
PROGRAM_MB = 8_000
"""The program itself, and what the estimates leave out."""
WORKER_MB = 1_500
"""A simulator process; it was seen to take 1,000."""
SLOWEST_FLOPS = 125e12
"""Operations per second of the slowest GPU to plan for: 40 % of an A100's."""
START_MINUTES = 20
"""To load, compile and save at full size on a slow disk."""
WORKER_STEPS_PER_S = 10
"""Control steps of a simulator process; without a GPU and with a tiny policy it took 20 to 30."""


def train_mem(run: Run) -> int:
    """Return the memory of a host that trains, MB.

    Weights, both moments and the average pass through it as float32, and the weights once more.
    """
    sizes = Sizes.of(run.pi0_config())
    return PROGRAM_MB + (20 * sizes.trained + 4 * sizes.frozen) // MB


def train_minutes(run: Run) -> int:
    """Return minutes from one checkpoint to the next on one of the slowest GPUs."""
    training = run.training
    flops = flops_per_sample(model_config(run), len(run.replay.cameras), training.num_noise_samples)
    samples = training.save_interval * training.batch_size
    return START_MINUTES + round(samples * flops / SLOWEST_FLOPS / 60)


def init_mem(run: Run) -> int:
    """Return the memory in which weights are read, converted and written, MB."""
    return PROGRAM_MB + 2 * Sizes.of(run.pi0_config()).weights_bytes() // MB


def rollout_mem(run: Run) -> int:
    """Return the memory of a policy, read as float32 and cast, and of its simulators, MB."""
    weights = 3 * Sizes.of(run.pi0_config()).weights_bytes() // 2
    return PROGRAM_MB + weights // MB + run.evaluation.num_workers * WORKER_MB


def rollout_minutes(run: Run) -> int:
    """Return minutes for the episodes of one checkpoint."""
    evaluation = run.evaluation
    steps = evaluation.num_episodes * evaluation.max_episode_steps / evaluation.num_workers
    return START_MINUTES + round(steps / WORKER_STEPS_PER_S / 60)

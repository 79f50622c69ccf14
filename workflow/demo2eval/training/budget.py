"""What training needs: the memory of a device, arithmetic and disk, from the model's sizes alone.

The estimate of memory was compared with XLA's own on one H100 (docs/benchmarks.md).
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demo2eval.config import Run, Training
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.params import IS_CAST, is_trainable, param_table

GIB = 2**30
JAX_SHARE = 0.97
"""How much of a GPU's memory training lets JAX take."""
MARGIN = 2 * GIB
"""Left free on a device: the program itself, and what the estimate leaves out."""
RECOMPUTED = {"elementwise": 0.0, "vision": 0.05, "all": 0.33}
"""Arithmetic that each choice of remat adds, as a share of a sample's."""
ACCUMULATION = 0.8
"""What adding up gradients costs per micro-batch, as a share of a sample's time."""
HOST_EMA = 16.0
"""What moving weights to the host costs per step, likewise."""
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""bfloat16 operations per second of a device without sparsity, from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of values of a model.

    Attributes:
        trained, frozen: in parameter arrays that training changes, and in those it does not.
        cast: of the trained ones, those with a copy in the dtype of the computation.
    """

    trained: int
    frozen: int
    cast: int

    @classmethod
    def of(cls, config: Pi0Config) -> "Sizes":
        """Count the values of a model, without making any."""
        sizes = {name: math.prod(shape) for name, (shape, _) in param_table(config).items()}
        trained = {name: size for name, size in sizes.items() if is_trainable(config, name)}
        cast = sum(size for name, size in trained.items() if IS_CAST.match(name))
        return cls(
            trained=sum(trained.values()),
            frozen=sum(sizes.values()) - sum(trained.values()),
            cast=0 if config.dtype == "float32" else cast,
        )

    def state_bytes(self, fsdp_devices: int = 1) -> int:
        """Weights, both moments and frozen weights on each device."""
        return 12 * self.trained // fsdp_devices + 2 * self.frozen

    def ema_bytes(self, fsdp_devices: int = 1) -> int:
        """The moving average on each device."""
        return 4 * self.trained // fsdp_devices

    def step_bytes(self) -> int:
        """Gradients and cast weights, which every device holds whole during a step."""
        return 4 * self.trained + 2 * self.cast

    def weights_bytes(self, params_dtype: str = "float32") -> int:
        """The weights of a checkpoint on disk."""
        rounded = self.cast if params_dtype == "bfloat16" else 0
        return 4 * self.trained + 2 * self.frozen - 2 * rounded

    def train_state_bytes(self) -> int:
        """The training state of a checkpoint on disk."""
        return 12 * self.trained


def _count_tokens(config: Pi0Config, num_cameras: int) -> tuple[int, int]:
    """Return the tokens of the vision encoder and of the prefix for one sample."""
    patches = num_cameras * config.siglip.num_patches
    return patches, patches + config.max_token_len


def activation_bytes(config: Pi0Config, num_cameras: int, remat: str) -> int:
    """Return what one sample keeps for the backward pass, and the largest layer's working set."""
    vision, language = config.siglip, config.paligemma
    patches, tokens = _count_tokens(config, num_cameras)
    value = 4 if config.dtype == "float32" else 2
    heads = language.num_heads * language.head_dim
    kv_heads = language.num_kv_heads * language.head_dim
    of_vision, of_language = vision.width, language.width
    if remat == "elementwise":
        of_vision += 5 * vision.width + vision.mlp_dim
    if remat != "all":
        of_language += 2 * heads + 2 * kv_heads + language.width + 2 * language.mlp_dim
    kept = patches * vision.depth * of_vision + tokens * (language.depth - 1) * of_language
    return value * (kept + 6 * tokens * language.mlp_dim)


def flops_per_sample(config: Pi0Config, num_cameras: int, num_noise_samples: int = 1) -> float:
    """Return the operations of matrix products for one sample, forward and backward.

    Nothing that is computed twice counts twice: this is what MFU is measured by (Chowdhery et al.,
    2022). Of the last layer the prefix needs keys and values alone.
    """
    vision, language, expert = config.siglip, config.paligemma, config.action_expert
    patches, tokens = _count_tokens(config, num_cameras)
    suffix = num_noise_samples * (config.action_horizon + (0 if config.is_pi05 else 1))
    heads = language.num_heads * language.head_dim
    products = (
        patches * vision.depth * vision.layer_size
        + tokens * (language.depth - 1) * language.layer_size
        + suffix * expert.depth * expert.layer_size
    )
    attention = (
        patches * vision.num_patches * vision.width * vision.depth
        + tokens * tokens * heads * (language.depth - 1)
        + suffix * (tokens + config.action_horizon) * heads * expert.depth
    )
    return 3 * (2 * products + 4 * attention)


@dataclass(frozen=True)
class StepPlan:
    """How a step is computed on each device.

    Attributes:
        micro_batch_size: samples at a time.
        remat: as of `Pi0Config`.
        ema_on_host: whether the moving average is kept in the host's memory.
        device_bytes: what a device holds at most.
    """

    micro_batch_size: int
    remat: str
    ema_on_host: bool
    device_bytes: int

    def __str__(self) -> str:
        """Return a line for people."""
        average = ", EMA in the host's memory" if self.ema_on_host else ""
        return (
            f"micro-batches of {self.micro_batch_size}, remat {self.remat}{average}: "
            f"{self.device_bytes / GIB:.1f} GiB per device"
        )


def plan_step(
    config: Pi0Config,
    training: Training,
    num_cameras: int,
    *,
    devices: int = 1,
    memory: int | None = None,
) -> StepPlan:
    """Return the fastest way to compute a step that fits into a device's memory.

    Args:
        config: of the model; small variants, whose remat is "none", are computed in one piece.
        training: its micro_batch_size and remat are kept if they are given.
        devices: among which the batch is divided.
        memory: of each device, bytes; None: there is no limit.

    Raises:
        UserError: if the devices cannot divide the batch, or if nothing fits.
    """
    if training.batch_size % devices or devices % training.fsdp_devices:
        raise UserError(
            f"training.batch_size {training.batch_size} and training.fsdp_devices "
            f"{training.fsdp_devices} do not go with {devices} devices: the batch must be a "
            "multiple of the devices, and they of fsdp_devices."
        )
    sizes, samples = Sizes.of(config), training.batch_size // devices
    fixed = sizes.state_bytes(training.fsdp_devices) + sizes.step_bytes()
    ema = sizes.ema_bytes(training.fsdp_devices) if training.ema_decay is not None else 0
    sizes_of_micro_batch = [size for size in range(samples, 0, -1) if samples % size == 0]
    if training.micro_batch_size is not None:
        if training.micro_batch_size not in sizes_of_micro_batch:
            raise UserError(
                f"training.micro_batch_size {training.micro_batch_size} does not divide the "
                f"{samples} samples of each device."
            )
        sizes_of_micro_batch = [training.micro_batch_size]
    elif memory is None or config.remat == "none":
        sizes_of_micro_batch = [samples]
    remats = [training.remat or config.remat]
    if training.remat is None and memory is not None and config.remat != "none":
        remats = list(RECOMPUTED)
    plans = []
    for remat in remats:
        per_sample = activation_bytes(
            config, num_cameras, "elementwise" if remat == "none" else remat
        )
        for size in sizes_of_micro_batch:
            for on_host in (False, True) if ema and devices == 1 and memory else (False,):
                needed = fixed + (0 if on_host else ema) + size * per_sample
                cost = RECOMPUTED.get(remat, 0.0) + ACCUMULATION / size
                cost += HOST_EMA / training.batch_size * on_host
                plans.append((cost, StepPlan(size, remat, on_host, needed)))
    fitting = [
        (cost, plan)
        for cost, plan in plans
        if memory is None or plan.device_bytes <= memory - MARGIN
    ]
    if fitting:
        return min(fitting, key=lambda item: item[0])[1]
    least = min((plan for _, plan in plans), key=lambda plan: plan.device_bytes)
    assert memory is not None
    raise UserError(
        f"training needs {(least.device_bytes + MARGIN) / GIB:.0f} GiB of memory per device, with "
        f"{least}; there are {memory / GIB:.0f}. Use a LoRA variant (model.variant: pi05_lora, "
        "training.ema_decay: null), share the state among several GPUs (training.fsdp_devices), or "
        "take a GPU with more memory."
    )


def model_config(run: Run) -> Pi0Config:
    """Return a run's model with about as many prompt tokens as its prompt will have."""
    config = run.pi0_config()
    tokens = len(run.prompt) // 3 + 4 + (48 if config.discrete_state_input else 0)
    return dataclasses.replace(config, max_token_len=min(tokens, config.max_token_len))


def disk_bytes(run: Run, num_checkpoints: int) -> int:
    """Return what checkpoints take: weights that are kept, and the training states on the way."""
    sizes, period = Sizes.of(run.pi0_config()), run.training.keep_period
    if period is not None:
        num_checkpoints = min(num_checkpoints, run.training.num_train_steps // period + 3)
    ema = sizes.ema_bytes() if run.training.ema_decay is not None else 0
    # The newest training state and the next, and two that are saved within a segment.
    newest = sizes.train_state_bytes() + (ema if run.training.params_dtype == "bfloat16" else 0)
    states = 2 * newest + 2 * (sizes.train_state_bytes() + ema)
    return num_checkpoints * sizes.weights_bytes(run.training.params_dtype) + states


def list_shortages(
    run: Run, num_checkpoints: int, folder: Path, gpus: list[tuple[str, float]]
) -> Iterator[str]:
    """Yield a sentence for what this machine lacks to train a run: memory or disk.

    Args:
        num_checkpoints: that have yet to be made.
        folder: where results will be.
        gpus: name and GiB of memory of each.
    """
    config = model_config(run)
    if gpus:
        try:
            memory = min(int(gibibytes * GIB * JAX_SHARE) for _, gibibytes in gpus)
            num_cameras = len(run.replay.cameras)
            plan_step(config, run.training, num_cameras, devices=len(gpus), memory=memory)
        except UserError as error:
            yield f"run {run.name!r}: {error}"
    else:
        needed, memory = Sizes.of(config).state_bytes() + Sizes.of(config).step_bytes(), read_ram()
        if needed > memory:
            yield (
                f"run {run.name!r} trains a model whose state alone takes {needed / GIB:.0f} GiB; "
                f"this machine has no GPU and {memory / GIB:.0f} GiB of memory. Take a machine "
                "with a GPU of 80 GB, or a smaller model (model.variant)."
            )
    needed, free = disk_bytes(run, num_checkpoints), shutil.disk_usage(folder).free
    if needed > free:
        yield (
            f"run {run.name!r}: {num_checkpoints} checkpoints take up to {needed / GIB:.0f} "
            f"GiB, and {folder.resolve()} has {free / GIB:.0f} GiB free. Keep fewer "
            "(training.keep_period), make room, or let `results` be a link to another disk."
        )


def read_ram() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_run(run: Run, gibibytes: float = 79) -> dict[str, str]:
    """Return a row for people: what a run's training needs.

    Args:
        gibibytes: memory of the GPU to plan for; an "80 GB" H100 offers 79.
    """
    config, num_cameras = model_config(run), len(run.replay.cameras)
    sizes = Sizes.of(config)
    try:
        plan = str(
            plan_step(config, run.training, num_cameras, memory=int(gibibytes * GIB * JAX_SHARE))
        )
    except UserError:
        plan = "does not fit"
    return {
        "run": run.name,
        "parameters": f"{(sizes.trained + sizes.frozen) / 1e6:,.1f} M",
        "batch": str(run.training.batch_size),
        "checkpoints": str(len(run.steps)),
        f"one GPU of {gibibytes:.0f} GiB": plan,
        "disk": f"{disk_bytes(run, len(run.steps)) / 1e9:,.1f} GB",
        "TFLOP per sample": f"{flops_per_sample(config, num_cameras) / 1e12:.3g}",
    }

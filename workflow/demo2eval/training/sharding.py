"""Where arrays lie on several devices: a mesh, and shardings by its axes."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
SMALLEST_SHARDED = 2**20
"""Values; smaller arrays lie on every device."""


def make_mesh(fsdp_devices: int = 1) -> Mesh:
    """Return the mesh of all devices of all hosts, [devices / fsdp_devices, fsdp_devices].

    The batch is split over both axes, the training state over `fsdp` alone.
    """
    shape = (jax.device_count() // fsdp_devices, fsdp_devices)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)


def shard_state(mesh: Mesh, tree):
    """Return the sharding of each array of a training state.

    The longest axis that the devices divide is split; small arrays lie on every device.
    """
    devices = mesh.shape["fsdp"]

    def shard(leaf) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % devices == 0]
        if devices == 1 or not axes or np.prod(leaf.shape) < SMALLEST_SHARDED:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(shard, tree)


def place(mesh: Mesh, tree):
    """Return a tree with its arrays on the mesh's devices, sharded as `shard_state` says.

    Where there are several processes, each has the whole arrays and places its devices' parts.
    """

    def put(leaf, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or isinstance(leaf, jax.Array):
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, tree, shard_state(mesh, tree))


def process_rows(sharding: NamedSharding, batch_size: int) -> slice:
    """Return the samples of a batch that this process's devices compute."""
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))

"""Devices: the mesh, the sharding of every leaf of the state, and batches on their way to the devices."""

import collections
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = "data"
"""Mesh axis over which the photos of a batch are divided."""

CLASS_KERNEL = "class_kernel"
"""Name of a parameter [classes, d], a row a training person: too many for one device, so its rows are always divided."""


def make_mesh(devices: int | None = None) -> Mesh:
    """A mesh ("data", "model") of all devices of all processes, or of the first few; "model" has size 1.

    Raises:
      ValueError: if there are fewer devices than asked for, or several processes and not as many devices of each.
    """
    present = by_process(jax.devices())
    if devices is None:
        devices = len(present)
    if not 1 <= devices <= len(present):
        raise ValueError(
            f"--devices is {devices}, and JAX sees {len(present)} ({present[0].platform}). "
            f"Give 1 to {len(present)}; on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={max(devices, 1)} "
            "makes virtual ones."
        )
    if devices < len(present) and jax.process_count() > 1:
        raise ValueError(
            f"--devices is {devices}, and {jax.process_count()} processes have {len(present)}: each process computes on "
            "all of its own. Leave --devices out, or start fewer processes."
        )
    # Auto, not make_mesh's default Explicit: with that a plain `emb @ emb.T` raises.
    return jax.make_mesh((devices, 1), (DATA, "model"), (AxisType.Auto,) * 2, devices=present[:devices])


def by_process(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Devices in the order of their processes, as `data.sampling.share` divides a batch.

    Raises:
      ValueError: if one process has more of them than another: their shares of a batch are equal.
    """
    count = collections.Counter(device.process_index for device in devices)
    if len(set(count.values())) > 1:
        each = ", ".join(f"process {process} has {number}" for process, number in sorted(count.items()))
        raise ValueError(
            f"the processes do not have equally many devices: {each}. Each reads an equal share of a batch; let "
            "CUDA_VISIBLE_DEVICES name as many on every host."
        )
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def check_batch(mesh: Mesh, people: int, photos: int, *, microbatches: int = 1, accumulate: int = 1) -> None:
    """Raises ValueError, saying what to type, when a batch does not divide over the mesh, or a device's share in chunks."""
    devices = mesh.shape[DATA]
    if people * photos % devices:
        raise ValueError(
            f"global batch {people * photos} (people={people} × photos={photos}) does not divide over {devices} devices; "
            f"set --batch.people to a multiple of {devices // math.gcd(devices, photos)}."
        )
    share = people * photos // devices
    for name, chunks in (("microbatches", microbatches), ("accumulate", accumulate)):
        if share % chunks:
            lower = max(n for n in range(1, min(chunks, share) + 1) if share % n == 0)
            raise ValueError(
                f"batch.{name} is {chunks}, which does not divide the {share} photos (people={people} × photos={photos}) "
                f"that each of {devices} devices has; try --batch.{name} {lower}, or set --batch.people to a multiple of "
                f"{devices * chunks // math.gcd(devices * chunks, photos)}."
            )


def state_sharding(mesh: Mesh, state: Any, *, shard_optimizer: bool = False) -> Any:
    """The sharding of every leaf of a state.

    Args:
      state: a TrainState of arrays or of their abstract shapes.
      shard_optimizer: divide the optimizer's state and the moving averages over the data axis (ZeRO stage 1): each leaf
        along its longest dimension that divides, so that a device holds 1/n of them. Leaves without such a dimension,
        and everything else, are whole on every device.

    Returns:
      The same tree of shardings.
    """
    devices = mesh.shape[DATA]

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = PartitionSpec()
        if any(getattr(part, "key", None) == CLASS_KERNEL for part in path):
            # The optimizer's moments of it have the same name in their path.
            spec = PartitionSpec(DATA)
        elif shard_optimizer and path[0].name in ("opt_state", "ema"):
            divisible = [axis for axis, size in enumerate(leaf.shape) if size and size % devices == 0]
            if divisible:
                longest = max(divisible, key=lambda axis: leaf.shape[axis])
                spec = PartitionSpec(*(DATA if axis == longest else None for axis in range(leaf.ndim)))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def gathered(mesh: Mesh, tree: Any) -> Any:
    """The same arrays, whole, on this process's first device alone: it computes with them without the other processes."""
    whole = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda x: x.addressable_data(0), whole)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Photos divided over the data axis."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def to_devices(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, depth: int = 2) -> Iterator[dict[str, jax.Array]]:
    """Moves host batches (this process's share) to the devices, `depth` of them ahead of their use."""
    sharding = batch_sharding(mesh)
    source = iter(batches)
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()

    def fill(count: int) -> None:
        for batch in itertools.islice(source, count):
            queue.append({name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()})

    fill(depth)
    while queue:
        batch = queue.popleft()
        yield batch
        fill(1)

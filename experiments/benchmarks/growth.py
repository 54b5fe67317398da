"""How does the training step grow with the batch, the image's size and the number of devices?  (6 min on 2 cores.)

    python -m experiments.benchmarks.growth

The whole update of `convnet` (augmentation, encoder, semi-hard triplets, AdamW, moving averages) as
`training.step.make_train_step` compiles it, each row in a process of its own. "step" and "photo" are the times of a step
and of a photo in multiples of the table's first row: linear growth keeps "photo" at 1. Rows are measured one after the
other, so a machine that is busy only at times bends the curve; q10 and q90 are quantiles of the row's own steps, in ms.

MB is the most memory one update holds beyond its state and batch. With more devices the global batch stays as it is, and
on a CPU virtual devices share the same cores: what a row costs beyond the first is the overhead of dividing the work. No
bar is set.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import harness
from faceembed import config, embed
from faceembed import mesh as meshes
from faceembed.preprocess import crop_side
from faceembed.training import loop
from faceembed.training import step as steps

BATCH, SIZE = 64, 64
"""Held where something else grows."""
GROWTH = {
    "batch": [{"batch": batch} for batch in (16, 32, 64, 128, 256)],
    "image size": [{"size": size} for size in (32, 48, 64, 96, 112)],
    "devices": [{"devices": devices} for devices in (1, 2, 4, 8)],
}
PHOTOS = 4


def make(batch: int, size: int, devices: int, microbatches: int = 1) -> Callable[[], jax.Array]:
    """() → the loss before one more update by `batch` photos of `size` pixels, divided over `devices`.

    The photos are encoded in so many chunks as `microbatches` says.
    """
    experiment = config.Experiment(
        preprocess=config.Preprocess(size=size), batch=config.Batch(people=batch // PHOTOS, photos=PHOTOS)
    )
    schedule, mesh = experiment.schedule, meshes.make_mesh(devices)
    encoder = embed.build_encoder(experiment)
    loss, loss_params = loop.make_loss(experiment)
    optimizer, _ = steps.make_optimizer(
        optax.scale_by_adam(), learning_rate=schedule.learning_rate, warmup=schedule.warmup, steps=experiment.steps,
        weight_decay=schedule.weight_decay, clip_norm=schedule.clip_norm,
    )  # fmt: skip
    state = steps.init_state(encoder, optimizer, seed=0, size=size, loss_params=loss_params, dtype=jnp.float32)
    shardings = meshes.state_sharding(mesh, state)
    update = steps.make_train_step(
        encoder, loss, optimizer, loop.make_views(experiment), seed=0, ema=schedule.ema, mesh=mesh, shardings=shardings,
        microbatches=microbatches,
    )  # fmt: skip
    side = crop_side(size, experiment.data.margin)
    host: dict[str, np.ndarray] = {
        "image": np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8),
        "identity": np.arange(batch, dtype=np.int32) // PHOTOS,
        "slot": np.arange(batch, dtype=np.int32),
    }
    moved = next(meshes.to_devices([host], mesh))
    # An update consumes its state, so a call leaves the new one for the next.
    kept = [jax.device_put(state, shardings)]

    def call() -> jax.Array:
        kept[0], metrics = jax.block_until_ready(update(kept[0], moved))
        return metrics["loss"]

    return call


def make_alone(batch: int, size: int, devices: int, microbatches: int = 1) -> Callable[[], jax.Array]:
    """`make` in a process in which XLA has not started: there it can still get any number of CPU devices."""
    if harness.on_cpu():
        jax.config.update("jax_num_cpu_devices", devices)
        # XLA has a thread a device or a core. One that waits for the others in a collective is lost to the rest, and
        # independent collectives of one device wait at the same time: with too few threads all wait for ever.
        os.environ.setdefault("NPROC", str(4 * devices))
    return make(batch, size, devices, microbatches)


def milliseconds(batch: int, size: int, devices: int, repeats: int) -> harness.Spread:
    """Of an update, timed in this process."""
    times = harness.interleave({"step": make_alone(batch, size, devices)}, repeats=repeats)["step"]
    return harness.summary([1e3 * seconds for seconds in times])


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A table for each way to grow."""
    rows = []
    for name, cases in GROWTH.items():
        first = None
        for case in cases[:2] if quick else cases:
            full = {"batch": BATCH // 4 if quick else BATCH, "size": SIZE // 2 if quick else SIZE, "devices": 1} | case
            if not harness.on_cpu() and full["devices"] > jax.device_count():
                continue
            spread = harness.fresh(milliseconds, *full.values(), 2 if quick else 5)
            peak = harness.peak_bytes(make_alone, *full.values())
            first = first or (spread.median, full["batch"])
            step = spread.median / first[0]
            rows.append({
                "table": f"growth with {name}", **full, "ms": spread.median, "q10": spread.q10, "q90": spread.q90,
                "step": step, "photo": step * first[1] / full["batch"],
                "MB": None if peak is None else peak / 1e6,
            })  # fmt: skip
    return rows


if __name__ == "__main__":
    harness.main(run)

"""What do a million class weights cost a device, divided over 8 of them?  (13 min on 2 busy cores, 6 GB.)

    python -m experiments.benchmarks.margin_softmax

The whole update of a tiny `convnet` with ArcFace, 64 photos, embeddings of 128 numbers, AdamW, as
`training.step.make_train_step` compiles it. "state MB" is what a device holds of the class kernel and its two moments,
"temporary MB" what its compiled program takes beyond arguments and results, both of ONE device. "sample" is the share of
the classes that serve as negatives. With few photos most of what is temporary is the gradient and the optimizer's change of
all rows, which a dense optimizer has whatever is sampled. So the second table has the loss and its gradient alone, of
embeddings and rows, for more photos; it is compiled and not run. The gradient of a device's rows, a result, is not in it.

The third table compares with the plain way on as many classes as that allows here: every row on every device, which
multiplies its own photos alone. That both compute the same is asserted (loss and gradient of the first update, relative
1e-4). "ratio" is how many times as fast as the plain way we are, round by round. Virtual devices share the same cores: the
plain way's eight updates of all rows are eight times the work here, and would be so much the work, at once, on a GPU each.

Bar: none.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks import harness
from faceembed import config, embed, margin_softmax
from faceembed import mesh as meshes
from faceembed.training import loop
from faceembed.training import step as steps

DEVICES, BATCH, SIZE, DIM = 8, 64, 16, 128
MILLION, PLAIN = 1_000_000, 100_000
TOLERANCE = 1e-4


def start(devices: int) -> None:
    """So many CPU devices, in a process in which XLA has not started."""
    if harness.on_cpu():
        jax.config.update("jax_num_cpu_devices", devices)
        os.environ.setdefault("NPROC", str(4 * devices))  # see growth.make_alone


def make(
    classes: int, devices: int, sample: float, plain: bool = False
) -> tuple[Callable[[], dict[str, float]], dict[str, float]]:
    """(() → metrics before one more update, {"state MB", "temporary MB"} of one device)."""
    experiment = config.Experiment(
        preprocess=config.Preprocess(size=SIZE),
        encoder=config.ConvNet(widths=(8, 16), blocks=(1, 1), dim=DIM),
        loss=config.ArcFace(sample=sample),
    )
    mesh, encoder = meshes.make_mesh(devices), embed.build_encoder(experiment)
    loss, loss_params = loop.make_loss(experiment, classes=classes, mesh=mesh)
    optimizer, _ = steps.make_optimizer(
        optax.scale_by_adam(), learning_rate=1e-3, warmup=0, steps=10**6, weight_decay=1e-2, clip_norm=1.0
    )
    state = steps.init_state(encoder, optimizer, seed=0, size=SIZE, loss_params=loss_params, dtype=jnp.float32)
    del loss_params
    shardings = meshes.state_sharding(mesh, state)
    if plain:
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shardings)
        arcface = experiment.loss
        assert isinstance(arcface, config.ArcFace)

        def loss(emb, identity, params, _, __, ___, axis):
            value, metrics = margin_softmax.margin_softmax_loss(
                emb, identity, params[meshes.CLASS_KERNEL], classes=classes, kind="arcface", scale=arcface.scale,
                margin=arcface.margin,
            )  # fmt: skip
            return jax.lax.pmean((value, metrics), axis)

    draw = np.random.default_rng(0)
    host: dict[str, np.ndarray] = {
        "image": draw.integers(0, 256, (BATCH, SIZE + 2, SIZE + 2, 3), dtype=np.uint8),
        "identity": draw.integers(0, classes, BATCH, dtype=np.int32),
        "slot": np.arange(BATCH, dtype=np.int32),
    }
    moved = next(meshes.to_devices([host], mesh))
    update: Any = steps.make_train_step(
        encoder, loss, optimizer, loop.make_views(experiment), seed=0, ema=0.999, mesh=mesh, shardings=shardings
    )
    kept = [jax.device_put(state, shardings)]
    del state
    program = update.lower(kept[0], moved).compile()
    rows = [
        leaf.addressable_shards[0].data.nbytes
        for path, leaf in jax.tree_util.tree_leaves_with_path(kept[0])
        if any(getattr(part, "key", None) == meshes.CLASS_KERNEL for part in path)
    ]
    sizes = {"state MB": sum(rows) / 1e6, "temporary MB": program.memory_analysis().temp_size_in_bytes / 1e6}

    def call() -> dict[str, float]:
        kept[0], metrics = jax.block_until_ready(program(kept[0], moved))
        return {name: float(metrics[name]) for name in ("loss", "grad_norm", "classes")}

    return call, sizes


def divided(classes: int, devices: int, sample: float, repeats: int) -> dict[str, Any]:
    """A row of the first table, measured in this process."""
    start(devices)
    call, sizes = make(classes, devices, sample)
    compared = call()["classes"]
    spread = harness.summary([1e3 * t for t in harness.interleave({"step": call}, repeats=repeats)["step"]])
    return {
        "classes": classes, "devices": devices, "sample": sample, "compared": int(compared), **sizes,
        "ms": spread.median, "q10": spread.q10, "q90": spread.q90,
    }  # fmt: skip


def compiled(classes: int, devices: int, batch: int, sample: float) -> dict[str, Any]:
    """A row of the second table: memory of the loss and its gradient, compiled in this process."""
    start(devices)
    mesh, data = meshes.make_mesh(devices), PartitionSpec(meshes.DATA)

    def arcface(emb: jax.Array, identity: jax.Array, kernel: jax.Array) -> jax.Array:
        return margin_softmax.margin_softmax_loss(
            emb, identity, kernel, classes=classes, kind="arcface", scale=64.0, margin=0.5, sample=sample,
            key=jax.random.key(0), axis_name=meshes.DATA,
        )[0]  # fmt: skip

    loss = jax.shard_map(arcface, mesh=mesh, in_specs=data, out_specs=PartitionSpec())
    rows = margin_softmax.padded_rows(classes)
    sharding = meshes.batch_sharding(mesh)
    shapes = (((batch, DIM), np.float32), ((batch,), np.int32), ((rows, DIM), np.float32))
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    program: Any = jax.jit(jax.value_and_grad(loss, (0, 2))).lower(*arrays).compile()
    temporary = program.memory_analysis().temp_size_in_bytes / 1e6
    return {"classes": classes, "devices": devices, "photos": batch, "sample": sample, "temporary MB": temporary}


def beside_plain(classes: int, devices: int, repeats: int) -> dict[str, Any]:
    """A row of the third table, measured in this process."""
    start(devices)
    ours, sizes = make(classes, devices, 1.0)
    plain, plain_sizes = make(classes, devices, 1.0, plain=True)
    first, second = ours(), plain()
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(first[name], second[name], rtol=TOLERANCE, err_msg="the two do not compare")
    times = harness.interleave({"faceembed": ours, "plain": plain}, repeats=repeats)
    return {
        "classes": classes, "devices": devices, **sizes,
        **{f"plain {name}": size for name, size in plain_sizes.items()}, **harness.versus(times, "plain"),
    }  # fmt: skip


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """Three tables; each row in a process of its own."""
    million, some, repeats = (3_000, 2_000, 2) if quick else (MILLION, PLAIN, 5)
    devices = DEVICES if harness.on_cpu() else len(jax.devices())
    rows = [
        {"table": "class weights divided over the devices"} | harness.fresh(divided, million, devices, sample, repeats)
        for sample in (1.0, 0.1)
    ]
    rows += [
        {"table": "loss and gradient alone"} | harness.fresh(compiled, classes, devices, batch, sample)
        for classes, batch in (((30_000, 64),) if quick else ((million, 64), (million, 1024)))
        for sample in (1.0, 0.1)
    ]
    beside = harness.fresh(beside_plain, some, devices, repeats)
    return [*rows, {"table": "beside all rows on every device"} | beside]


if __name__ == "__main__":
    harness.main(run)

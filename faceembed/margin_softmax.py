"""Softmax over all training people with a margin on the angle: CosFace and ArcFace, class weights divided over devices.

Each training person has a row of the class kernel, the direction that embeddings of that person should have. A million
rows of 512 numbers, their gradient and the optimizer's two moments are 8 GB, so no device holds more than its share of
the rows: each multiplies the embeddings of all devices with its own rows, and the softmax is put together from one
maximum and one sum a photo. Embeddings travel, rows never do.

With `sample` < 1 a random share of the people serves as negatives in an update, beside those of the batch (Partial FC, An
et al. 2022). Which ones follows from the key and from the row's place among all rows, never from the device.

As in `losses`: differentiate OUTSIDE shard_map.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from faceembed import losses
from faceembed import mesh as meshes

ROWS = 768
"""Rows of the class kernel come in multiples of this (2⁸·3), and negatives are drawn in so many blocks of equal size: any
device count that divides it has whole blocks, and the shape is the same for all of them."""

EPSILON = 1e-12
"""Added to a squared length before the division by it."""


def cosface(cosine: Array, margin: float) -> Array:
    """cos θ - m (Wang et al. 2018, eq. 4)."""
    return cosine - margin


def arcface(cosine: Array, margin: float) -> Array:
    """cos(θ + m) as long as θ + m < π, else cos θ - m sin m (Deng et al. 2019, eq. 3; arcface_torch, no easy margin).

    Beyond π the cosine would rise again and reward a larger angle: there the target keeps falling with cos θ, with slope
    1, after a step down from -1 to -cos m - m sin m. The slope sin(θ + m) / sin θ of the first branch is infinite at
    θ = 0, where |∂cos θ/∂emb| = sin θ is 0: at |cos θ| ≥ 1, which rounding may reach, only its finite part cos m counts.
    """
    squared = 1 - cosine**2
    # The inner where keeps the infinite slope of the root at 0 out of the gradient; "not at 0": NaN must reach the loss.
    apart = ~(squared <= 0)
    sine = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)
    return jnp.where(
        cosine > math.cos(math.pi - margin),
        cosine * math.cos(margin) - sine * math.sin(margin),
        cosine - margin * math.sin(margin),
    )


MARGINS: dict[str, Callable[[Array, float], Array]] = {"cosface": cosface, "arcface": arcface}
"""(cosines to the own class, margin) → the cosines that the softmax sees instead."""


def padded_rows(classes: int) -> int:
    """How many rows the class kernel has, the same for any device count; those behind the last class never take part."""
    return -(-classes // ROWS) * ROWS


def check_devices(devices: int) -> None:
    """Raises ValueError, saying what to type, when class rows do not divide over so many devices."""
    if ROWS % devices:
        fitting = [count for count in range(1, devices) if ROWS % count == 0]
        raise ValueError(
            f"class weights come in multiples of {ROWS} rows, which do not divide over {devices} devices. Try --devices "
            f"{fitting[-1]}; powers of two up to 256, and three times as many, divide them."
        )


def init_class_kernel(classes: int, dim: int, *, seed: int, mesh: Mesh) -> Array:
    """[padded_rows(classes), dim] float32, each device with its own rows: normal with deviation 0.01, as arcface_torch's.

    A class's row follows from (seed, class) alone; rows behind the last class are 0. No device ever holds more than
    its share.

    Raises:
      ValueError: the rows do not divide over the mesh.
    """
    check_devices(mesh.shape[meshes.DATA])
    share = padded_rows(classes) // mesh.shape[meshes.DATA]
    divided = PartitionSpec(meshes.DATA)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec(), out_specs=divided)
    def draw(key: Array) -> Array:
        row = lax.axis_index(meshes.DATA) * share + jnp.arange(share, dtype=jnp.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)
        normal = jax.vmap(lambda key: jax.random.normal(key, (dim,), jnp.float32))(keys)
        return jnp.where((row < classes)[:, None], 0.01 * normal, 0)

    # The encoder's parameters, the updates and the photos' augmentation have other keys.
    return draw(jax.random.fold_in(jax.random.key(seed), 2**31 - 1))


def drawn_rows(key: Array, first: int | Array, rows: int, size: int, sample: float) -> Array:
    """Which rows serve as negatives: in each block of `size` rows, ⌈sample·size⌉ without repetition, all equally likely.

    Args:
      key: the same on all devices.
      first: number of this device's first row among all rows, a multiple of `size`.
      rows: how many it has, a multiple of `size`.
      size: rows a block.
      sample: share, 0 < sample ≤ 1.

    Returns:
      [rows / size · ⌈sample·size⌉] int32, counted from this device's first row.
    """
    block = jnp.arange(rows // size, dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first // size + block)
    ranks = jax.vmap(lambda key: jax.random.bits(key, (size,), jnp.uint32))(keys)
    # A share such as 0.07 of 100 is 7.000000000000001 in floating point.
    _, chosen = lax.top_k(ranks, math.ceil(sample * size - 1e-9))
    return (block[:, None] * size + chosen).reshape(-1)


def margin_softmax_loss(
    emb: Array,
    identity: Array,
    kernel: Array,
    *,
    classes: int,
    kind: str,
    scale: float,
    margin: float,
    sample: float = 1.0,
    key: Array | None = None,
    axis_name: losses.AxisName = None,
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of a photo's own class, whose cosine is lowered by a margin, among all classes.

    The mean over photos of log(1 + Σ_{j≠y} exp(s cos θ_j) / exp(s φ(cos θ_y))), with φ of `MARGINS`. Embeddings and rows
    are scaled to unit length here. Nothing is of size [B, classes] on one device, except where there is only one.

    With `sample` < 1 the sum runs over the classes of the batch and those of `drawn_rows`, each counted once. On a device
    with c rows that makes min(c, drawn + B) of them, since all B photos may be of people whose rows it has. The gradient of
    the others' rows is 0, but a dense optimizer still moves them: by weight decay and by what is left in its moments.
    (Partial FC's own does not touch them.)

    Args:
      emb: [b, d] float embeddings of this device, of any length.
      identity: [b] int class of each photo, 0 to classes - 1; the loss is NaN if one is outside.
      kernel: [c, d] float, this device's rows, those of device i behind those of device i - 1; all of them without
        `axis_name`. Rows behind `classes` never take part.
      classes: how many there are, 2 or more.
      kind: a name in `MARGINS`.
      scale: s > 0 by which cosines are multiplied.
      margin: m ≥ 0; radians for "arcface".
      sample: share of the classes that serve as negatives, 0 < sample ≤ 1, rounded up in blocks of 1/768 of the rows.
      key: JAX random key, the same on all devices; needed by `sample` < 1 alone.
      axis_name: axis of shard_map to gather over; None for one device or a global array under jit.

    Returns:
      (loss, metrics), those of the whole batch on every device. Metrics:
        accuracy: share of photos whose own class, without margin, is closer than every other one that is compared; a tie
          is a miss.
        cos_target: mean cosine to the own class.
        cos_other: mean cosine to the closest other class that is compared.
        classes: how many classes are compared.

    Raises:
      ValueError: shapes, dtypes, margin, sample or key do not fit.

    References:
      Wang et al. 2018, CosFace. Deng et al. 2019, ArcFace. An et al. 2022, Killing Two Birds with One Stone: Partial FC.
    """
    shards = 1 if axis_name is None else lax.axis_size(axis_name)
    rows = kernel.shape[0]
    _check(emb, identity, kernel, classes, shards * rows)
    if kind not in MARGINS:
        raise ValueError(f"kind is {kind!r}, which does not exist; try one of {', '.join(MARGINS)}.")
    if not (scale > 0 and margin >= 0 and 0 < sample <= 1):
        raise ValueError(
            f"scale is {scale}, margin {margin} and sample {sample}: expected scale > 0, margin ≥ 0, 0 < sample ≤ 1."
        )
    if sample < 1 and (key is None or (shards * rows) % ROWS or ROWS % shards):
        raise ValueError(
            f"sample is {sample} with key {'missing' if key is None else 'given'} and {shards} × {rows} rows: negatives "
            f"are drawn with a key=jax.random.key(seed) in {ROWS} blocks, each on one device. Pad the kernel to "
            f"padded_rows(classes) = {padded_rows(classes)} rows."
        )

    _, emb, _, identity = losses.gather(emb, identity, axis_name)
    first = jnp.int32(0) if axis_name is None else lax.axis_index(axis_name) * rows
    photos = _unit(emb)

    # ---- the own class: the device that has its row knows the cosine
    place = identity.astype(jnp.int32) - first
    mine = (place >= 0) & (place < rows) & (identity < classes)
    own = _unit(kernel[jnp.where(mine, place, 0)].astype(emb.dtype))
    to_own = jnp.where(mine, jnp.sum(photos * own, 1), 0)

    # ---- the classes that this device compares
    chosen = jnp.arange(rows, dtype=jnp.int32)
    compared = first + chosen < classes
    if sample < 1:
        assert key is not None
        drawn = drawn_rows(key, first, rows, shards * rows // ROWS, sample)
        wanted = jnp.zeros(rows, bool).at[jnp.where(mine, place, rows)].set(True, mode="drop").at[drawn].set(True)
        compared &= wanted
        if (most := len(drawn) + len(identity)) < rows:
            (chosen,) = jnp.nonzero(wanted, size=most, fill_value=rows)
            compared = compared.at[chosen].get(mode="fill", fill_value=False)
            kernel = kernel.at[chosen].get(mode="fill", fill_value=0)
    columns, column = _unit(kernel.astype(emb.dtype)), first + chosen

    # ---- the softmax over all devices
    cosine = jnp.matmul(photos, columns.T, precision=lax.Precision.HIGHEST)
    other = compared[None, :] & (column[None, :] != identity[:, None])
    # Stopped before pmax, which has no derivative; that of the whole does not depend on what is subtracted.
    closest = jnp.max(jnp.where(other, lax.stop_gradient(cosine), -jnp.inf), 1)
    counts = [mine.astype(emb.dtype), jnp.sum(compared, dtype=jnp.int32).astype(emb.dtype)]
    if axis_name is not None:
        closest = lax.pmax(closest, axis_name)
        to_own, counts = lax.psum((to_own, counts), axis_name)
    to_own = jnp.where(counts[0] > 0, to_own, jnp.nan)
    # Masked inside exp: a masked cosine far above the closest would overflow, and its gradient be 0 × ∞.
    total = jnp.sum(jnp.exp(jnp.where(other, scale * (cosine - closest[:, None]), -jnp.inf)), 1)
    total = total if axis_name is None else lax.psum(total, axis_name)
    loss = jnp.mean(jax.nn.softplus(scale * closest + jnp.log(total) - scale * MARGINS[kind](to_own, margin)))
    metrics = {
        "accuracy": jnp.mean((to_own > closest).astype(emb.dtype)),
        "cos_target": jnp.mean(to_own),
        "cos_other": jnp.mean(closest),
        "classes": counts[1],
    }
    return loss, lax.stop_gradient(metrics)


def _unit(x: Array) -> Array:
    return x * lax.rsqrt(jnp.sum(x**2, axis=1, keepdims=True) + EPSILON)


def _check(emb: Array, identity: Array, kernel: Array, classes: int, rows: int) -> None:
    losses.check_batch(emb, identity)
    if kernel.ndim != 2 or kernel.shape[1] != emb.shape[1] or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"kernel is {kernel.dtype}{list(kernel.shape)} beside emb {list(emb.shape)}; pass float class weights "
            f"[c, {emb.shape[1]}]."
        )
    if not 2 <= classes <= rows:
        raise ValueError(
            f"classes is {classes} and the kernel has {rows} rows on all devices: a photo is compared with one other "
            "class or more, and each class has a row. init_class_kernel(classes, dim, …) makes them."
        )

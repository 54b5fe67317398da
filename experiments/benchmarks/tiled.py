"""What does exact mining of a huge batch cost, beside the one product of all pairs that it cannot avoid?

    python -m experiments.benchmarks.tiled           # 12 min on 2 quiet cores
    python -m experiments.benchmarks.tiled --quick

Value and gradient of the triplet loss, float32, D=128, K photos a person in random order, margin 0.2, mined slab by slab
(`faceembed.tiled`, and `mining.hardest`, which always was). "product" is E @ E.T by slabs of 64 candidates, each result
written and forgotten: the quickest of the ways tried on two cores. A loss that uses all pairs needs three such products,
one for the distances and two for their derivative; `hardest` needs one.

Bars: hardest 2.5 times the product, the others 8 times at K=4 and 20 times at K=40, at B=16,384. At B=65,536, where a table
of distances is 17 GB: under 2 GB for each miner. MB is the most memory one call holds beyond its inputs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.benchmarks import harness
from faceembed import mining
from faceembed.losses import TABLE, triplet_loss

DIM, MARGIN = 128, 0.2
MINERS = tuple(mining.MINERS)
SIZE, LARGE = 16_384, 65_536
PHOTOS = (4, 40)
BARS = {4: 8.0, 40: 20.0}
HARDEST_BAR, LARGE_BAR = 2.5, 2000.0


def embeddings(size: int, photos: int) -> tuple[np.ndarray, np.ndarray]:
    """([size, DIM] float32 unit vectors around one centre a person, [size] int32 ids in random order).

    d(A,P) is about 1.7 and d(A,N) 2.0: as early in a training, so that hard, semi-hard and easy triplets are all many.
    """
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(size, dtype=np.int32) // photos)
    emb = 0.4 * rng.normal(size=(size // photos + 1, DIM))[ids] + rng.normal(size=(size, DIM))
    return (emb / np.linalg.norm(emb, axis=1, keepdims=True)).astype(np.float32), ids


def ours(miner: str, size: int, photos: int) -> Callable[[], object]:
    """() → (loss, gradient), the metrics computed as well; in slabs whatever the size."""
    emb, ids = map(jnp.asarray, embeddings(size, photos))
    tile = 256 if size**2 <= TABLE else None  # so few would not be taken in slabs
    loss = partial(triplet_loss, margin=MARGIN, miner=miner, key=jax.random.key(0), tile=tile)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda: jax.block_until_ready(step(emb, ids))


def product(size: int, photos: int) -> Callable[[], object]:
    """() → the last slab of E @ E.T; the others have been where it is."""
    emb = jnp.asarray(embeddings(size, photos)[0])
    width = min(size, 64)

    @jax.jit
    def run(emb: jax.Array) -> jax.Array:
        def slab(i: jax.Array, _: jax.Array) -> jax.Array:
            columns = lax.dynamic_slice_in_dim(emb, i * width, width)
            return jnp.matmul(emb, columns.T, precision=lax.Precision.HIGHEST)

        return lax.fori_loop(0, -(-size // width), slab, jnp.zeros((size, width)))

    return lambda: jax.block_until_ready(run(emb))


def beside_product(miner: str, size: int, photos: int, repeats: int) -> dict[str, Any]:
    """A row of the first table, timed in this process."""
    contestants = {"product": product(size, photos), "loss": ours(miner, size, photos)}
    times = harness.interleave(contestants, repeats=repeats)
    low, middle, high = harness.ratio(times, "loss", "product")
    return {
        "miner": miner, "B": size, "K": photos, **harness.threads(),
        "product s": harness.summary(times["product"]).median, "loss s": harness.summary(times["loss"]).median,
        "multiple": middle, "q10": low, "q90": high, "bar": HARDEST_BAR if miner == "hardest" else BARS[photos],
    }  # fmt: skip


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """Both tables; each row in a new process."""
    size, large = (512, 2048) if quick else (SIZE, LARGE)
    rows = []
    for photos in PHOTOS[:1] if quick else PHOTOS:
        for miner in MINERS:
            row = harness.fresh(beside_product, miner, size, photos, 1 if quick else 3)
            rows.append({"table": "value and gradient in multiples of E @ E.T by slabs", **row})
    for miner in MINERS:
        peak = harness.peak_bytes(ours, miner, large, PHOTOS[0])
        row = {"miner": miner, "B": large, "K": PHOTOS[0], "MB": None if peak is None else peak / 1e6, "bar": LARGE_BAR}
        rows.append({"table": "memory of value and gradient", **row})
    return rows


if __name__ == "__main__":
    harness.main(run)

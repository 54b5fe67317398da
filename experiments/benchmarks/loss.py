"""What does mining cost beside the one matrix product that it cannot do without?  (1 min on 2 cores.)

    python -m experiments.benchmarks.loss

Times value and gradient of `triplet_loss` in multiples of `E @ E.T` in the same process, interleaved, so that a busy
machine slows both. Bars: hardest at B=4096 at most 2.5×, FaceNet's semi-hard at B=1024, K=4 at most 8×.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from faceembed.losses import triplet_loss

DIM = 128
REPEATS = 25
CASES = {"hardest": (4096, 2.5), "semi_hard": (1024, 8.0)}
"""miner -> (B photos, 4 a person; the most multiples of the product that it may cost)."""


def embeddings(size: int, photos: int = 4) -> tuple[jax.Array, jax.Array]:
    """([size, DIM] float32 unit vectors around one centre a person, [size] int32 ids in random order)."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(size, dtype=np.int32) // photos)
    emb = rng.normal(size=(size // photos, DIM))[ids] + rng.normal(size=(size, DIM))
    return jnp.asarray(emb / np.linalg.norm(emb, axis=1, keepdims=True), jnp.float32), jnp.asarray(ids)


def interleaved(calls, repeats: int) -> np.ndarray:
    """[repeats, len(calls)] seconds, after one call of each that is not counted."""
    seconds = np.zeros((repeats + 1, len(calls)))
    for r in range(repeats + 1):
        for i, call in enumerate(calls):
            began = time.perf_counter()
            jax.block_until_ready(call())
            seconds[r, i] = time.perf_counter() - began
    return seconds[1:]


def main(repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """Prints one line a case and returns {miner: {size, product_ms, loss_ms, ratio, ratio_q10, ratio_q90, bar}}."""
    results = {}
    print(
        f"{jax.default_backend()}, {jax.device_count()} device(s), {psutil.cpu_count()} processors, "
        f"load {psutil.getloadavg()[0]:.1f}, D={DIM}, median of {repeats} (10 % … 90 %)"
    )
    print(f"{'miner':<10} {'B':>5} {'product ms':>11} {'loss+grad ms':>13} {'ratio':>20} {'bar':>5}")
    for miner, (size, bar) in CASES.items():
        emb, ids = embeddings(size)
        product = jax.jit(lambda e: e @ e.T)
        loss = jax.jit(jax.value_and_grad(partial(triplet_loss, margin=0.2, miner=miner), has_aux=True))
        seconds = interleaved([partial(product, emb), partial(loss, emb, ids)], repeats)
        low, ratio, high = np.quantile(seconds[:, 1] / seconds[:, 0], [0.1, 0.5, 0.9]).tolist()
        one, both = (1000 * np.median(seconds, 0)).tolist()
        results[miner] = {
            "size": size,
            "product_ms": one,
            "loss_ms": both,
            "ratio": ratio,
            "ratio_q10": low,
            "ratio_q90": high,
            "bar": bar,
        }
        spread = f"{ratio:.2f} ({low:.2f} … {high:.2f})"
        print(f"{miner:<10} {size:>5} {one:>11.2f} {both:>13.2f} {spread:>20} {bar:>5}{' OVER' if ratio > bar else ''}")
    return results


if __name__ == "__main__":
    main()

"""What does mining cost, beside pytorch-metric-learning on the SAME triplets and beside the one product it cannot avoid?

    python -m experiments.benchmarks.loss                     # 8 min on 2 cores: with 1 thread and with all
    python -m experiments.benchmarks.loss --threads 1 --quick

Value and gradient of the triplet loss on squared Euclidean distances, float32, D=128, 4 photos a person in random
order, margin 0.2. Loss and gradient of both sides are asserted to agree to 1e-5 before anything is timed.

faceembed         pytorch-metric-learning, everywhere with LpDistance(normalize_embeddings=False, p=2, power=2)
hardest           BatchHardMiner → TripletMarginLoss, MeanReducer
all               TripletMarginLoss(triplets_per_anchor="all"), AvgNonZeroReducer
semi_hard_all     TripletMarginMiner(type_of_triplets="semihard") → TripletMarginLoss, AvgNonZeroReducer

MB is the most memory one call holds beyond its inputs. Bars: 5 times as fast for hardest, 50 times for the other two.
pytorch-metric-learning lists all valid triplets, B² (K-1) of them; at B=4096 that is beyond a usual machine.

The second table has value and gradient in multiples of `E @ E.T`. Bars: hardest at B=4096 at most 2.5, FaceNet's
semi_hard at B=1024 at most 8.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import harness
from faceembed.losses import triplet_loss

DIM, PHOTOS, MARGIN = 128, 4, 0.2
PEER = "PML"
SIZES = {"hardest": (256, 1024, 4096), "all": (256, 1024), "semi_hard_all": (256, 1024)}
BARS = {"hardest": 5.0, "all": 50.0, "semi_hard_all": 50.0}
PRODUCT_BARS = {("hardest", 4096): 2.5, ("semi_hard", 1024): 8.0}
"""(miner, B) -> the most multiples of the product that value and gradient may cost."""
TOLERANCE = 1e-5


def embeddings(size: int) -> tuple[np.ndarray, np.ndarray]:
    """([size, DIM] float32 vectors of about unit length around one centre a person, [size] int32 ids in random order).

    d(A,P) is about 1.7 and d(A,N) 2.0: as early in a training, so that hard, semi-hard and easy triplets are all many.
    Numbers are multiples of 2⁻⁸: squared distances are then exact in float32, ties are ties on both sides, and no hinge is
    so close to 0 that rounding decides whether its triplet counts.
    """
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(size, dtype=np.int32) // PHOTOS)
    emb = 0.4 * rng.normal(size=(size // PHOTOS, DIM))[ids] + rng.normal(size=(size, DIM))
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    return (np.round(emb * 256) / 256).astype(np.float32), ids


def ours(miner: str, size: int) -> Callable[[], tuple[jax.Array, jax.Array]]:
    """faceembed's () → (loss, gradient [size, DIM])."""
    emb, ids = map(jnp.asarray, embeddings(size))
    step = jax.jit(jax.value_and_grad(partial(triplet_loss, margin=MARGIN, miner=miner), has_aux=True))

    def call() -> tuple[jax.Array, jax.Array]:
        # The metrics are computed as well: training reports them.
        (loss, _), gradient = jax.block_until_ready(step(emb, ids))
        return loss, gradient

    return call


def peers(miner: str, size: int) -> Callable[[], tuple[Any, Any]]:
    """pytorch-metric-learning's () → (loss, gradient [size, DIM])."""
    from pytorch_metric_learning import distances, losses, miners, reducers

    torch = harness.pytorch()
    device = harness.torch_device()
    distance = distances.LpDistance(normalize_embeddings=False, p=2, power=2)
    reducer = reducers.MeanReducer() if miner == "hardest" else reducers.AvgNonZeroReducer()
    loss_of = losses.TripletMarginLoss(margin=MARGIN, distance=distance, reducer=reducer, triplets_per_anchor="all")
    mine = {
        "hardest": miners.BatchHardMiner(distance=distance),
        "semi_hard_all": miners.TripletMarginMiner(margin=MARGIN, type_of_triplets="semihard", distance=distance),
        "all": lambda emb, ids: None,
    }[miner]
    photos, people = (torch.from_numpy(x).to(device) for x in embeddings(size))

    def call() -> tuple[Any, Any]:
        emb = photos.detach().requires_grad_()
        loss = loss_of(emb, people, mine(emb, people))
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.detach(), emb.grad

    return call


def check_equal(mine: tuple[Any, Any], other: tuple[Any, Any], *, where: str = "") -> None:
    """Raises AssertionError where (loss, gradient) differ by more than TOLERANCE, relative to their L2 norm.

    Most of the difference is the peer's: it adds a million terms of 1/n one by one in float32. At B=1024 its gradient of
    "all" is 7e-6 off the float64 one, ours 2e-7.
    """
    for name, value, expected in zip(("loss", "gradient"), mine, other, strict=True):
        expected = expected.cpu().numpy()
        error = np.linalg.norm(np.asarray(value) - expected) / np.linalg.norm(expected)
        if not error <= TOLERANCE:
            raise AssertionError(f"{where}: {name} is off by {error:.1e}; the two do not compare.")


def beside_peer(miner: str, size: int, repeats: int, peer: bool) -> dict[str, Any]:
    """A row of the first table but for memory, timed in this process."""
    contestants: dict[str, Callable[[], tuple[Any, Any]]] = {"faceembed": ours(miner, size)}
    if peer:
        contestants[PEER] = peers(miner, size)
        check_equal(*(call() for call in contestants.values()), where=f"{miner}, B={size}")
    times = harness.interleave(contestants, repeats=repeats)
    return {"miner": miner, "B": size, **harness.threads(), **harness.versus(times, PEER), "bar": BARS[miner]}


def beside_product(miner: str, size: int, repeats: int) -> dict[str, Any]:
    """A row of the second table, timed in this process."""
    emb = jnp.asarray(embeddings(size)[0])
    product = jax.jit(lambda e: e @ e.T)
    contestants: dict[str, Callable[[], object]] = {
        "product": lambda: jax.block_until_ready(product(emb)),
        "loss": ours(miner, size),
    }
    times = harness.interleave(contestants, repeats=repeats)
    low, middle, high = harness.ratio(times, "loss", "product")
    return {
        "miner": miner, "B": size, **harness.threads(),
        "product ms": 1e3 * harness.summary(times["product"]).median,
        "loss ms": 1e3 * harness.summary(times["loss"]).median,
        "multiple": middle, "q10": low, "q90": high, "bar": PRODUCT_BARS.get((miner, size)),
    }  # fmt: skip


def megabytes(make: Callable[..., Callable[[], object]], case: tuple[str, int], cpus: int) -> float | None:
    """Peak memory of one call of a contestant."""
    peak = harness.peak_bytes(make, *case, cpus=cpus, in_torch=make is peers)
    return None if peak is None else peak / 1e6


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """Both tables, with one thread and, unless quick, with all that this process may use; each row in a new process."""
    peer = harness.available("torch", "pytorch_metric_learning")
    cases = [(miner, size) for miner in SIZES for size in ((64,) if quick else SIZES[miner])]
    products = [(miner, 64) for miner, _ in PRODUCT_BARS] if quick else list(PRODUCT_BARS)
    rows = []
    for cpus in [1] if quick else sorted({1, harness.processors()}):
        for case in cases:
            row = harness.fresh(beside_peer, *case, 3 if quick else 15, peer, cpus=cpus)
            for name, make in (("faceembed", ours), (PEER, peers)):
                row[f"{name} MB"] = megabytes(make, case, cpus) if peer or make is ours else None
            rows.append({"table": f"value and gradient, faceembed and {PEER}", **row})
        for case in products:
            row = harness.fresh(beside_product, *case, 3 if quick else 25, cpus=cpus)
            rows.append({"table": "value and gradient in multiples of E @ E.T", **row})
    return rows


if __name__ == "__main__":
    harness.main(run)

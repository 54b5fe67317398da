"""Losses, metrics and gradients are equal however the batch is spread over 1, 2, 4 or 8 devices."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from faceembed import losses, mining
from faceembed.losses import contrastive_loss, pair_logistic_loss, triplet_loss

B, D = 16, 3
TILES = {
    **dict.fromkeys(mining.MINERS, 0),
    "all, slabs of 6": 6,
    "semi_hard_all, slabs of 3": 3,
    "semi_hard, slabs of 5": 5,
}
NAMES = (*TILES, "contrastive", "logistic")
MEMORY = 6
FAST = {"xla_backend_optimization_level": 0}
"""Halves the time to compile; what is tested here is which numbers meet, not how fast."""


def all_losses(embs, margins, params, ids, key, axis_name=None):
    """{loss: (value, metrics)}; each loss has its own copy of the embeddings and margin, hence its own gradient."""
    rng = np.random.default_rng(9)
    remembered = losses.Memory(
        rng.integers(0, 2, (MEMORY, D)) * 1.0, np.arange(MEMORY) * 1009 - 2000, np.arange(MEMORY) < 4
    )
    out = {}
    for name, tile in TILES.items():
        options = {
            "margin": margins[name],
            "miner": name.split(",")[0],
            "key": key,
            "axis_name": axis_name,
            "tile": tile,
        }
        # One with a memory, and without.
        out[name] = triplet_loss(embs[name], ids, memory=remembered if "semi" in name else None, **options)
    out["contrastive"] = contrastive_loss(embs["contrastive"], ids, margin=margins["contrastive"], axis_name=axis_name)
    out["logistic"] = pair_logistic_loss(embs["logistic"], ids, params, axis_name=axis_name)
    return out


def summed(*arguments, run=all_losses):
    """Its gradient is that of each loss by its own copies."""
    out = run(*arguments)
    return sum(value for value, _ in out.values()), out


def arguments(seed, people, points):
    """Embeddings are normal vectors, or few integer points that tie; one of `people` ids a photo."""
    rng = np.random.default_rng(seed)
    emb = rng.integers(0, points, (B, D)).astype(np.float64) if points else rng.normal(size=(B, D))
    ids = (rng.integers(0, people, B) * 1009 - 2000).astype(np.int32)
    params = {"weights": rng.normal(size=D), "bias": rng.normal()}
    embs = dict.fromkeys(NAMES, emb)
    margins = {name: np.float64(1) for name in NAMES if name != "logistic"}
    return embs, margins, params, ids, jax.random.key(5)


def mesh_of(n):
    return Mesh(jax.devices()[:n], ("data",), axis_types=(AxisType.Auto,))


def derived(run):
    return jax.jit(jax.value_and_grad(partial(summed, run=run), (0, 1, 2), has_aux=True), compiler_options=FAST)


def under_jit(n):
    """Of arrays that lie divided: of NumPy's, which jit places, a loss does not know on how many devices they will be."""
    shard, whole = NamedSharding(mesh_of(n), P("data")), NamedSharding(mesh_of(n), P())
    run, divided = derived(all_losses), []

    def call(*given):
        placed = jax.device_put(given, (shard, whole, whole, shard, whole))
        divided.extend([] if divided else [run.lower(*placed).as_text()])
        assert "manual_computation" in divided[0]
        return run(*placed)

    return call


def under_shard_map(n, check_vma):
    run = jax.shard_map(
        partial(all_losses, axis_name="data"),
        mesh=mesh_of(n),
        in_specs=(P("data"), P(), P(), P("data"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    return derived(run)


def split(n, x):
    return jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), x)


def under_pmap_differentiated_outside(n):
    run = jax.pmap(
        partial(all_losses, axis_name="data"),
        axis_name="data",
        in_axes=(0, None, None, 0, None),
        devices=jax.devices()[:n],
    )

    def first(embs, margins, params, ids, key):
        out = run(split(n, embs), margins, params, split(n, ids), key)
        return jax.tree.map(lambda leaf: leaf[0], out)

    return derived(first)


def under_pmap_differentiated_inside(n):
    """What a pmapped training step does: pmean for everything each device has a copy of, here the encoder too."""

    def step(tables, margins, params, ids, key):
        def loss(tables, margins, params):
            # The least encoder there is: a table of embeddings, of which each device reads its own rows.
            first = jax.lax.axis_index("data") * len(ids)
            mine = jax.tree.map(lambda table: jax.lax.dynamic_slice_in_dim(table, first, len(ids)), tables)
            return summed(mine, margins, params, ids, key, run=partial(all_losses, axis_name="data"))

        found, grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(tables, margins, params)
        return found, jax.lax.pmean(grads, "data")

    run = jax.pmap(step, axis_name="data", in_axes=(None, None, None, 0, None), devices=jax.devices()[:n])

    def last(embs, margins, params, ids, key):
        return jax.tree.map(lambda leaf: leaf[-1], run(embs, margins, params, split(n, ids), key))

    return jax.jit(last, compiler_options=FAST)


SPREADS = {
    **{f"jit on {n}": partial(under_jit, n) for n in (2, 4, 8)},
    **{f"shard_map on {n}": partial(under_shard_map, n, True) for n in (1, 2, 4, 8)},
    "shard_map on 8, unchecked": partial(under_shard_map, 8, False),
    **{f"pmap on {n}": partial(under_pmap_differentiated_inside, n) for n in (1, 2, 4, 8)},
    "pmap on 4, differentiated outside": partial(under_pmap_differentiated_outside, 4),
}
BATCHES = [(6, 0), (3, 2), (100, 0), (1, 0), (9, 0)]


@cache
def on_one_device():
    run = derived(all_losses)
    return [jax.device_get(run(*arguments(seed, *shape))) for seed, shape in enumerate(BATCHES)]


def marked(spread):
    """Each transformation at once on some number of devices; the other numbers are long checks."""
    quick = spread in ("jit on 8", "shard_map on 2", "pmap on 8") or "," in spread
    return spread if quick else pytest.param(spread, marks=pytest.mark.slow)


@pytest.mark.parametrize("spread", [marked(spread) for spread in SPREADS])
def test_any_spread_of_the_batch_gives_the_same_value_metrics_and_gradient(spread):
    with jax.enable_x64(True):
        run = SPREADS[spread]()
        for seed, (shape, expected) in enumerate(zip(BATCHES, on_one_device(), strict=True)):
            found = jax.device_get(run(*arguments(seed, *shape)))
            for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=jax.tree_util.keystr(path))

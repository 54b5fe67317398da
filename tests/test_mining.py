"""Miners against nested loops in float64, on batches that promise nothing about their layout."""

import math
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from faceembed import config, mining

B, D = 12, 3
PADDED = -1


def batch(seed: int, people: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """([B, D] float64, [B] int32): few integer points, so that distances are exact and tie; 0 for normal vectors.

    One of `people` ids a photo: 1 puts one person in the whole batch, 100 makes nearly all singletons.
    """
    rng = np.random.default_rng(seed)
    emb = rng.integers(0, points, (B, D)).astype(np.float64) if points else rng.normal(size=(B, D))
    return emb, (rng.integers(0, people, B) * 1009 - 2000).astype(np.int32)


def squared(emb: np.ndarray) -> np.ndarray:
    return ((emb[:, None] - emb[None, :]) ** 2).sum(-1)


def loop_hardest(emb, ids):
    d, out = squared(emb), []
    for a in range(B):
        positives = [p for p in range(B) if p != a and ids[p] == ids[a]]
        negatives = [n for n in range(B) if ids[n] != ids[a]]
        if positives and negatives:
            # max and min return the first of equals: the lowest index
            out.append((a, max(positives, key=lambda p: d[a, p]), min(negatives, key=lambda n: d[a, n])))
    return out


def loop_semi_hard(emb, ids):
    d, out = squared(emb), []
    for a in range(B):
        negatives = [n for n in range(B) if ids[n] != ids[a]]
        for p in range(B):
            if p == a or ids[p] != ids[a] or not negatives:
                continue
            farther = [n for n in negatives if d[a, n] > d[a, p]]
            best = min(farther, key=lambda n: d[a, n]) if farther else max(negatives, key=lambda n: d[a, n])
            out.append((a, p, best))
    return out


@partial(jax.jit, static_argnums=2)
def mine(emb, ids, miner, key=None):
    layout = mining.layout_of(jnp.arange(B, dtype=jnp.int32), ids)
    triplets = mining.INDEX_MINERS[miner](layout, emb, emb, key)
    filled = jnp.arange(triplets.positive.shape[0])[:, None] < triplets.rounds
    return jnp.where(filled, triplets.positive, PADDED), jnp.where(filled, triplets.negative, PADDED)


def listed(emb, ids, miner, key=None) -> list[tuple[int, int, int]]:
    positive, negative = jax.device_get(mine(emb, ids, miner, key))
    assert ((positive < 0) == (negative < 0)).all()
    return [
        (a, int(p), int(n))
        for round_p, round_n in zip(positive, negative, strict=True)
        for a, (p, n) in enumerate(zip(round_p, round_n, strict=True))
        if p >= 0
    ]


batches = given(seed=st.integers(0, 2**32 - 1), people=st.sampled_from([1, 2, 3, 5, 12, 100]), points=st.integers(0, 3))


@settings(deadline=None, max_examples=80)
@batches
@example(seed=0, people=1, points=2)
@example(seed=1, people=2, points=1)
@example(seed=2, people=10**6, points=0)
def test_index_miners_list_what_the_loop_lists(seed, people, points):
    emb, ids = batch(seed, people, points)
    with jax.enable_x64(True):
        assert sorted(listed(emb, ids, "hardest")) == loop_hardest(emb, ids)
        assert sorted(listed(emb, ids, "semi_hard")) == loop_semi_hard(emb, ids)


@pytest.mark.parametrize("block", [1, 5 * B, 12 * B])
def test_hardest_is_the_same_whatever_the_block(monkeypatch, block):
    monkeypatch.setattr(mining, "BLOCK", block)
    index = jnp.arange(B, dtype=jnp.int32)
    run = jax.jit(lambda emb, ids: mining.hardest(mining.layout_of(index, ids), emb, emb))
    for seed in range(20):
        emb, ids = batch(seed, 4, points=2 if seed % 2 else 0)
        triplets = jax.device_get(run(np.float32(emb), ids))
        found = [(a, p, n) for a, (p, n) in enumerate(zip(triplets.positive[0], triplets.negative[0], strict=True))]
        assert [t for t in found if t[1] >= 0] == loop_hardest(emb, ids)


@settings(deadline=None, max_examples=40)
@batches
def test_random_triplets_are_valid_and_do_not_look_at_the_embeddings(seed, people, points):
    emb, ids = batch(seed, people, points)
    key = jax.random.key(seed % 1000)
    found = listed(np.float32(emb), ids, "random", key)
    assert [a for a, _, _ in found] == [a for a, _, _ in loop_hardest(emb, ids)]
    for a, p, n in found:
        assert p != a
        assert ids[p] == ids[a]
        assert ids[n] != ids[a]
    assert found == listed(np.zeros((B, D), np.float32), ids, "random", key)


def test_random_draws_each_positive_and_each_negative_equally_often():
    ids = np.array([7, 3, 7, 7, 3, 9, 7, 5, 9, 5, 5, 1], np.int32)
    draws = 3000
    keys = jax.random.split(jax.random.key(0), draws)
    layout = mining.layout_of(jnp.arange(B, dtype=jnp.int32), jnp.asarray(ids))
    zeros = jnp.zeros((B, D))
    draw = jax.jit(jax.vmap(lambda key: mining.random(layout, zeros, zeros, key)))
    triplets = jax.device_get(draw(keys))
    for a in range(B - 1):
        for chosen, allowed in (
            (triplets.positive[:, 0, a], [j for j in range(B) if j != a and ids[j] == ids[a]]),
            (triplets.negative[:, 0, a], [j for j in range(B) if ids[j] != ids[a]]),
        ):
            counts = np.bincount(chosen, minlength=B)[allowed]
            assert counts.sum() == draws
            expected = draws / len(allowed)
            # 5 standard deviations of a binomial count: a correct draw fails once in a million, and the key is fixed.
            assert abs(counts - expected).max() <= 5 * math.sqrt(expected)
    # Two anchors of one person draw by themselves: a shared draw would agree always, not for 1 in 9 negatives.
    assert 0.02 < (triplets.negative[:, 0, 1] == triplets.negative[:, 0, 4]).mean() < 0.25


def test_random_differs_from_key_to_key():
    emb, ids = batch(0, 3, 0)
    first, second = (listed(np.float32(emb), ids, "random", jax.random.key(k)) for k in (0, 1))
    assert first != second


@settings(deadline=None, max_examples=40)
@batches
def test_distances_are_exact_on_integers_and_never_negative(seed, people, points):
    emb, _ = batch(seed, people, points)
    found = np.asarray(mining.squared_distances(jnp.asarray(emb, jnp.float32), jnp.asarray(emb, jnp.float32)))
    assert found.dtype == np.float32
    assert (found >= 0).all()
    np.testing.assert_allclose(found, squared(emb), rtol=0, atol=0 if points else 1e-5)


def test_a_distance_that_rounds_below_zero_is_zero_and_keeps_its_gradient():
    rng = np.random.default_rng(0)
    near = jnp.asarray(rng.normal(size=(64, 32)) * 100, jnp.float32)
    raw = jnp.sum(near**2, 1)[:, None] + jnp.sum(near**2, 1)[None, :] + jnp.matmul(-2 * near, near.T)
    assert (jnp.diagonal(raw) < 0).any()  # otherwise this test shows nothing
    assert (jnp.diagonal(mining.squared_distances(near, near)) >= 0).all()
    moved = near + 1e-3
    slope = jax.grad(lambda x: jnp.trace(mining.squared_distances(x, near)))(moved)
    np.testing.assert_allclose(slope, 2 * (moved - near), atol=1e-3 * 0.2, rtol=0)


def test_the_config_and_the_registry_name_the_same_miners():
    assert set(typing.get_args(typing.get_type_hints(config.Triplet)["miner"])) == set(mining.MINERS)
    assert not set(mining.INDEX_MINERS) & set(mining.REDUCERS)

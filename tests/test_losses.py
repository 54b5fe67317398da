"""Losses, metrics and gradients against nested loops in float64; what a lowered program may hold; bad input."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from faceembed import losses, mining
from faceembed.losses import contrastive_loss, init_pair_logistic, pair_logistic_loss, triplet_loss

B, D = 16, 3
KEY = 5


def batch(seed: int, people: int, points: int, size: int = B) -> tuple[np.ndarray, np.ndarray]:
    """([size, D] float64, [size] int32): few integer points, so that distances are exact and tie; 0: normal vectors."""
    rng = np.random.default_rng(seed)
    emb = rng.integers(0, points, (size, D)).astype(np.float64) if points else rng.normal(size=(size, D))
    return emb, (rng.integers(0, people, size) * 1009 - 2000).astype(np.int32)


# --- The loops: value, gradient and metrics, one triplet or pair after another


def loop_triplets(emb, ids, miner):
    """[(a, p, n)] that are valid, and those of them that enter the mean if their hinge is positive."""
    d = ((emb[:, None] - emb[None, :]) ** 2).sum(-1)
    if miner == "random":
        layout = mining.layout_of(jnp.arange(len(ids), dtype=jnp.int32), jnp.asarray(ids))
        triplets = jax.device_get(mining.random(layout, emb, emb, jax.random.key(KEY)))
        drawn = enumerate(zip(triplets.positive[0], triplets.negative[0], strict=True))
        valid = [(a, int(p), int(n)) for a, (p, n) in drawn if p >= 0]
        return valid, valid
    valid, used = [], []
    for a in range(len(ids)):
        positives = [p for p in range(len(ids)) if p != a and ids[p] == ids[a]]
        negatives = [n for n in range(len(ids)) if ids[n] != ids[a]]
        if not positives or not negatives:
            continue
        if miner == "hardest":
            valid.append((a, max(positives, key=lambda p: d[a, p]), min(negatives, key=lambda n: d[a, n])))
        for p in positives:
            farther = [n for n in negatives if d[a, n] > d[a, p]]
            if miner == "semi_hard":
                best = min(farther, key=lambda n: d[a, n]) if farther else max(negatives, key=lambda n: d[a, n])
                valid.append((a, p, best))
            if miner in ("all", "semi_hard_all"):
                valid += [(a, p, n) for n in negatives]
                used += [(a, p, n) for n in (farther if miner == "semi_hard_all" else negatives)]
    return valid, used if miner in ("all", "semi_hard_all") else valid


def loop_triplet_loss(emb, ids, margin, miner):
    valid, used = loop_triplets(emb, ids, miner)
    d = ((emb[:, None] - emb[None, :]) ** 2).sum(-1)
    hinges = {t: d[t[0], t[1]] - d[t[0], t[2]] + margin for t in used}
    active = [t for t in used if hinges[t] > 0]
    mean_over = len(active) if miner in ("all", "semi_hard_all") else len(valid)
    grad = np.zeros_like(emb)
    for a, p, n in active:
        grad[a] += 2 * (emb[n] - emb[p]) / mean_over
        grad[p] += 2 * (emb[p] - emb[a]) / mean_over
        grad[n] += 2 * (emb[a] - emb[n]) / mean_over
    metrics = {"triplets": len(valid), "active": len(active) / max(len(valid), 1)}
    for name, other in (("d_ap", 1), ("d_an", 2)):
        anchors = sorted({t[0] for t in valid})
        means = [np.mean([d[t[0], t[other]] for t in valid if t[0] == a]) for a in anchors] or [0.0]
        metrics[f"{name}_mean"] = np.mean(means)
        for label, q in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
            metrics[f"{name}_{label}"] = np.quantile(means, q)
    return sum(hinges[t] for t in active) / max(mean_over, 1), metrics, (grad, len(active) / max(mean_over, 1))


def loop_pairs(ids):
    pairs = [(a, b) for a in range(len(ids)) for b in range(a)]
    return [(a, b) for a, b in pairs if ids[a] == ids[b]], [(a, b) for a, b in pairs if ids[a] != ids[b]]


def mean(values):
    return np.mean(values) if len(values) else 0.0


def loop_contrastive_loss(emb, ids, margin):
    genuine, impostor = loop_pairs(ids)
    grad, slope = np.zeros_like(emb), 0.0
    apart = {(a, b): np.sqrt(((emb[a] - emb[b]) ** 2).sum()) for a, b in genuine + impostor}
    for a, b in genuine:
        grad[a] += (emb[a] - emb[b]) / len(genuine)
        grad[b] += (emb[b] - emb[a]) / len(genuine)
    for pair in impostor:
        lack = max(margin - apart[pair], 0)
        slope += lack / len(impostor)
        if apart[pair] > 0:
            a, b = pair
            push = lack / apart[pair] * (emb[a] - emb[b]) / len(impostor)
            grad[a] -= push
            grad[b] += push
    near = [apart[x] ** 2 / 2 for x in genuine]
    far = [max(margin - apart[x], 0) ** 2 / 2 for x in impostor]
    metrics = {
        "genuine": len(genuine),
        "impostor": len(impostor),
        "loss_genuine": mean(near),
        "loss_impostor": mean(far),
        "d_genuine": mean([apart[x] ** 2 for x in genuine]),
        "d_impostor": mean([apart[x] ** 2 for x in impostor]),
        "active": mean([apart[x] < margin for x in impostor]),
    }
    return mean(near) + mean(far), metrics, (grad, slope)


def loop_pair_logistic_loss(emb, ids, params):
    kinds = loop_pairs(ids)
    grad = np.zeros_like(emb)
    by_params = {"weights": np.zeros(D), "bias": 0.0}
    costs, right = ([], []), ([], [])
    for kind, sign in ((0, 1), (1, -1)):
        for a, b in kinds[kind]:
            difference = np.abs(emb[a] - emb[b])
            z = sign * (params["weights"] @ difference + params["bias"])
            costs[kind].append(np.log1p(np.exp(-z)))
            right[kind].append(z > 0 if kind == 0 else z >= 0)
            by_logit = -sign / (1 + np.exp(z)) / len(kinds[kind])
            by_params["weights"] += by_logit * difference
            by_params["bias"] += by_logit
            grad[a] += by_logit * params["weights"] * np.sign(emb[a] - emb[b])
            grad[b] += by_logit * params["weights"] * np.sign(emb[b] - emb[a])
    metrics = {
        "genuine": len(kinds[0]),
        "impostor": len(kinds[1]),
        "loss_genuine": mean(costs[0]),
        "loss_impostor": mean(costs[1]),
        "accuracy": mean([np.mean(r) for r in right if r]),
    }
    return mean(costs[0]) + mean(costs[1]), metrics, (grad, by_params)


IN_SLABS = tuple(f"{miner} in slabs" for miner in mining.MINERS if miner != "random")
LOOPS = {
    **{miner: partial(loop_triplet_loss, miner=miner) for miner in mining.MINERS},
    **{name: partial(loop_triplet_loss, miner=name.removesuffix(" in slabs")) for name in IN_SLABS},
    "contrastive": loop_contrastive_loss,
    "logistic": loop_pair_logistic_loss,
}


def loss_of(name, emb, other, ids):
    """(loss, metrics); `other` is what the loss has beside embeddings: a margin, or the parameters of the head."""
    if name == "logistic":
        return pair_logistic_loss(emb, ids, other)
    if name == "contrastive":
        return contrastive_loss(emb, ids, margin=other)
    # 6: slabs of two slices, and the last one has no more than four candidates.
    miner, tile = name.removesuffix(" in slabs"), 6 if name in IN_SLABS else 0
    return triplet_loss(emb, ids, margin=other, miner=miner, key=jax.random.key(KEY), tile=tile)


@cache
def value_and_gradients(name):
    return jax.jit(jax.value_and_grad(partial(loss_of, name), (0, 1), has_aux=True))


def other_of(name, seed, margin):
    rng = np.random.default_rng(seed)
    return {"weights": rng.normal(size=D), "bias": rng.normal()} if name == "logistic" else np.float64(margin)


def assert_close(found, expected, atol, rtol=None):
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=atol if rtol is None else rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
        ),
        jax.device_get(found),
        jax.device_get(expected),
    )


# --- Value, metrics and gradient


@pytest.mark.parametrize("name", LOOPS)
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    people=st.sampled_from([1, 2, 3, 5, 12, 100]),
    points=st.integers(0, 3),
    margin=st.sampled_from([0.0, 1.0, 2.0, 0.3, 5.5]),
)
@example(seed=0, people=1, points=2, margin=1.0)
@example(seed=1, people=2, points=1, margin=1.0)
@example(seed=2, people=10**6, points=0, margin=0.3)
def test_value_metrics_and_gradient_equal_the_loops(name, seed, people, points, margin):
    emb, ids = batch(seed, people, points)
    other = other_of(name, seed, margin)
    with jax.enable_x64(True):
        found, gradients = value_and_gradients(name)(emb, other, ids)
        assert found[0].dtype == np.float64
        value, metrics, expected = LOOPS[name](emb, ids, other)
        assert_close(found, (value, metrics), 1e-11)
        assert_close(gradients, expected, 1e-11)


@pytest.mark.parametrize("name", LOOPS)
def test_the_gradient_is_that_of_central_differences(name):
    emb, ids = batch(3, 4, 0)
    with jax.enable_x64(True):
        other, run = other_of(name, 3, 1.0), value_and_gradients(name)
        direction = np.random.default_rng(0).normal(size=(B, D))
        slope = float(np.sum(run(emb, other, ids)[1][0] * direction))
        step = 1e-6
        ahead, behind = (float(run(emb + s * direction, other, ids)[0][0]) for s in (step, -step))
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("name", LOOPS)
def test_bfloat16_embeddings_are_measured_in_float32(name):
    emb, ids = batch(4, 4, 0)
    rounded = jnp.asarray(emb, jnp.bfloat16)
    other = jax.tree.map(np.float32, other_of(name, 4, 1.0))
    (loss, metrics), (gradient, _) = value_and_gradients(name)(rounded, other, ids)
    assert {x.dtype for x in (loss, *metrics.values())} == {np.dtype("float32")}
    assert gradient.dtype == jnp.bfloat16
    # The oracle sees the rounded embeddings exactly: what is left is float32's rounding, not bfloat16's 0.4 %.
    value, expected, (expected_gradient, _) = LOOPS[name](np.float64(rounded), ids, jax.tree.map(np.float64, other))
    assert_close((loss, metrics), (value, expected), 1e-5)
    assert_close(np.float64(gradient), expected_gradient, 1e-3, rtol=2**-8)


@pytest.mark.parametrize("name", LOOPS)
def test_nan_embeddings_give_a_nan_loss(name):
    """A step that has diverged must not look like one without triplets."""
    # Pairs: impostors alone, which a NaN distance could leave through the hinge.
    ids = np.arange(B, dtype=np.int32) // (1 if name in ("contrastive", "logistic") else 4)
    other = jax.tree.map(np.float32, other_of(name, 0, 1.0))
    (loss, _), _ = value_and_gradients(name)(np.full((B, D), np.nan, jnp.bfloat16), other, ids)
    assert np.isnan(loss)


@pytest.mark.parametrize("size", [1, 2, 50])
def test_logistic_does_not_depend_on_the_chunk(monkeypatch, size):
    emb, ids = batch(1, 4, 0)
    other = other_of("logistic", 1, None)
    with jax.enable_x64(True):
        monkeypatch.setattr(losses, "CHUNK", size * B * D)
        found = jax.value_and_grad(pair_logistic_loss, (0, 2), has_aux=True)(emb, ids, other)
        value, metrics, gradients = loop_pair_logistic_loss(emb, ids, other)
        assert_close(found, ((value, metrics), gradients), 1e-11)


def test_a_new_head_is_undecided_at_distance_one_and_says_same_when_closer():
    head = init_pair_logistic(2)
    for gap, right in ((0.9, 1.0), (1.1, 0.0)):
        _, metrics = pair_logistic_loss(jnp.asarray([[0.0, 0.0], [gap, 0.0]]), jnp.asarray([1, 1]), head)
        assert metrics["accuracy"] == right


@pytest.mark.parametrize("name", LOOPS)
def test_one_photo_costs_nothing(name):
    other = jax.tree.map(np.float32, other_of(name, 0, 1.0))
    emb, ids = np.ones((1, D), np.float32), np.zeros(1, np.int32)
    (loss, metrics), (gradient, _) = value_and_gradients(name)(emb, other, ids)
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    np.testing.assert_array_equal(gradient, np.zeros((1, D)))


# --- Memory and work


def lowered_shapes(name, size, dim):
    emb, ids = jax.ShapeDtypeStruct((size, dim), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.int32)
    other = init_pair_logistic(dim) if name == "logistic" else 0.2
    text = value_and_gradients(name).lower(emb, other, ids).as_text()
    shapes = [[int(n) for n in shape.split("x")] for shape in re.findall(r"tensor<(\d+(?:x\d+)*)x[a-z]", text)]
    return text, max(int(np.prod(shape)) for shape in shapes)


@pytest.mark.parametrize("name", [name for name in LOOPS if name not in IN_SLABS])
def test_nothing_is_larger_than_a_matrix_of_distances(name):
    size, dim = 256, 128
    _, largest = lowered_shapes(name, size, dim)
    # Twice: two draws or sums may share an array. |f(a)-f(b)| comes in chunks, 4 times smaller than B·B·d here.
    assert largest <= (losses.CHUNK if name == "logistic" else 2 * size**2)


@pytest.mark.parametrize("name", mining.INDEX_MINERS)
def test_the_backward_pass_of_index_miners_has_no_matrix_product(name):
    text, _ = lowered_shapes(name, 64, 32)
    assert text.count("dot_general") == (0 if name == "random" else 1)


# --- What is refused


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"miner": "hard"}, "miner is 'hard'.*try one of random, hardest, semi_hard, all, semi_hard_all"),
        ({"miner": "random"}, r"needs a key; pass key=jax.random.key\(seed\)"),
        ({"tile": -1}, "tile is -1.*0 for a table of all distances, None to choose"),
        ({"margin": -0.1}, "margin is -0.1.*Pass a margin ≥ 0"),
        ({"emb": jnp.ones((4, 2, 1))}, r"emb is float32\[4, 2, 1\]; pass float embeddings \[b, d\] of"),
        ({"emb": jnp.ones((4, 2), jnp.int32)}, r"emb is int32\[4, 2\]"),
        ({"emb": jnp.ones((0, 2))}, r"emb is float32\[0, 2\].*at least one photo"),
        ({"identity": jnp.zeros(3, jnp.int32)}, r"identity is int32\[3\] beside emb \[4, 2\].*\[4\]"),
        ({"identity": jnp.zeros(4)}, r"identity is float32\[4\].*integer person id"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_pass(changed, said):
    good = {"emb": jnp.ones((4, 2)), "identity": jnp.zeros(4, jnp.int32), "margin": 0.2}
    with pytest.raises(ValueError, match=said):
        triplet_loss(**{**good, **changed})


def test_a_head_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"embeddings of 2 numbers need .*init_pair_logistic\(2\)"):
        pair_logistic_loss(jnp.ones((4, 2)), jnp.zeros(4, jnp.int32), init_pair_logistic(3))

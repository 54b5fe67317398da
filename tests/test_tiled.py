"""Mining slab by slab, and with a memory, against nested loops; and what a compiled update holds and sends."""

import itertools
import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from faceembed import config, losses, mining, tiled
from faceembed.losses import Memory, triplet_loss
from faceembed.margin_softmax import margin_softmax_loss

D = 3
FAST = {"xla_backend_optimization_level": 0}


def loop_loss(emb, ids, margin, miner, memory=None):
    """(loss, triplets, active, mean d(A,N), gradient), one triplet after another, float64."""
    size = len(emb)
    everyone, owner = emb, list(ids)
    if memory is not None:
        everyone, owner = np.concatenate([emb, memory.emb]), [*ids, *memory.identity]
    counts = [True] * size + ([] if memory is None else list(memory.filled))
    d = ((emb[:, None] - everyone[None]) ** 2).sum(-1)
    valid, used, d_an = 0, [], []
    for a in range(size):
        positives = [p for p in range(size) if p != a and ids[p] == ids[a]]
        negatives = [n for n in range(len(everyone)) if counts[n] and owner[n] != ids[a]]
        if not positives or not negatives:
            continue
        triplets = []
        for p in positives:
            farther = [n for n in negatives if d[a, n] > d[a, p]]
            best = min(farther, key=lambda n: d[a, n]) if farther else max(negatives, key=lambda n: d[a, n])
            chosen = {"all": negatives, "semi_hard_all": farther, "semi_hard": [best], "hardest": []}[miner]
            triplets += [(a, p, n) for n in chosen]
        if miner == "hardest":
            closest = min(negatives, key=lambda n: d[a, n])
            triplets = [(a, max(positives, key=lambda p: d[a, p]), closest)]
        listed = miner in ("semi_hard", "hardest")
        valid += len(triplets) if listed else len(positives) * len(negatives)
        d_an.append(np.mean([d[a, n] for _, _, n in triplets] if listed else [d[a, n] for n in negatives]))
        used += triplets
    hinges = [d[a, p] - d[a, n] + margin for a, p, n in used]
    active = [t for t, hinge in zip(used, hinges, strict=True) if hinge > 0]
    over = max(len(used) if miner in ("semi_hard", "hardest") else len(active), 1)
    grad = np.zeros_like(emb)
    for a, p, n in active:
        grad[a] += 2 * (everyone[n] - everyone[p]) / over
        grad[p] += 2 * (emb[p] - emb[a]) / over
        if n < size:  # what is remembered gets no gradient
            grad[n] += 2 * (emb[a] - emb[n]) / over
    return sum(h for h in hinges if h > 0) / over, valid, len(active) / max(valid, 1), np.mean(d_an or [0]), grad


def batch(seed, size, people, points, remembered=0):
    """Embeddings are normal vectors, or few integer points that tie; one of `people` ids a photo, the first most often."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, points, (n, D)) * 1.0 if points else rng.normal(size=(n, D))  # noqa: E731
    who = lambda n, of: np.minimum(rng.geometric(0.3, n), of).astype(np.int32) * 1009 - 2000  # noqa: E731
    memory = Memory(draw(remembered), who(remembered, people + 2), rng.random(remembered) < 0.6) if remembered else None
    return draw(size), who(size, people), memory


@cache
def compiled(miner, tile, sizes, thresholds):
    """Its constants are read when it is traced, hence in the key."""

    def run(emb, ids, margin, memory):
        return triplet_loss(emb, ids, margin=margin, miner=miner, tile=tile, memory=memory)

    return jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=FAST)


CASES = {
    "rows and candidates not whole": (37, 6, 0, 16, (5, 16), 64),
    "slabs of one": (10, 4, 0, 1, (10, 1), 64),
    "one slab": (21, 5, 0, 64, (21, 21), 64),
    "more photos a person than a sweep takes": (30, 2, 0, 7, (8, 7), 4),
    "a memory": (23, 5, 13, 9, (7, 9), 4),
    "a memory, and a table": (23, 5, 13, 0, None, 64),
    "one person alone": (9, 1, 0, 4, (9, 4), 4),
    "one person alone, and a memory of others": (9, 1, 6, 4, (9, 4), 4),
}


@pytest.mark.parametrize("miner", [m for m in mining.MINERS if m != "random"])
@pytest.mark.parametrize("case", CASES)
def test_slabs_give_what_the_loops_give(monkeypatch, case, miner):
    size, people, remembered, tile, sizes, thresholds = CASES[case]
    monkeypatch.setattr(tiled, "THRESHOLDS", thresholds)
    if sizes:
        monkeypatch.setattr(tiled, "sizes", lambda *_: tiled.Sizes(*sizes))
    with jax.enable_x64(True):
        run = compiled(miner, tile, sizes, thresholds)
        for seed in range(6):
            emb, ids, memory = batch(seed, size, people, points=seed % 3, remembered=remembered)
            margin = (1.0, 0.3, 0.0)[seed // 2]
            (loss, metrics), grad = jax.device_get(run(emb, ids, margin, memory))
            found = loss, metrics["triplets"], metrics["active"], metrics["d_an_mean"], grad
            for a, b in zip(found, loop_loss(emb, ids, margin, miner, memory), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("miner", ["all", "semi_hard_all", "semi_hard"])
def test_the_value_alone_is_that_which_comes_with_a_gradient(miner):
    emb, ids, memory = batch(3, 20, 4, 0, remembered=5)
    run = partial(triplet_loss, margin=0.5, miner=miner, tile=8, memory=memory)
    alone = jax.jit(run, compiler_options=FAST)(np.float32(emb), ids)
    both = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=FAST)(np.float32(emb), ids)[0]
    assert alone[0] > 0
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), alone, both)


@pytest.mark.parametrize("miner", ["all", "semi_hard_all", "semi_hard"])
def test_twins_whose_distance_rounding_puts_below_zero_are_at_zero(miner):
    """64 faces that two people share: with no margin no triplet of theirs is active, and nobody else's either."""
    emb = np.repeat(np.random.default_rng(0).normal(size=(64, 100)).astype(np.float32), 4, 0)
    ids = np.arange(256, dtype=np.int32) // 2
    run = partial(triplet_loss, margin=0.0, miner=miner, tile=64)
    (loss, metrics), grad = jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=FAST)(emb, ids)
    assert loss == metrics["active"] == 0
    np.testing.assert_array_equal(grad, 0)


def test_random_draws_from_a_memory_as_often_as_from_the_batch():
    ids = np.array([3, 1, 3, 1, 2], np.int32)
    remembered, filled = np.array([7, 3, 2, 9, 8], np.int32), np.array([True, True, True, False, True])
    layout = mining.layout_of(jnp.arange(5, dtype=jnp.int32), jnp.asarray(ids), remembered, filled)
    draws, zeros = 4000, jnp.zeros((5, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    found = np.asarray(jax.jit(jax.vmap(lambda key: mining.random(layout, zeros, zeros, key).negative[0]))(keys))
    # Of person 3: 1, 1, 2 of the batch, and 7, 2, 8 of the memory; its own photo and the empty slot never.
    share = np.bincount(found[:, 0], minlength=10) / draws
    expected = np.array([0, 1, 0, 1, 1, 1, 0, 1, 0, 1]) / 6
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(expected * (1 - expected) / draws).max())


def test_a_memory_holds_the_newest_and_forgets_the_oldest():
    memory = losses.init_memory(5, 1)
    for step in range(1, 4):
        emb = jnp.full((2, 1), step) + jnp.array([[0.0], [0.5]])
        memory = losses.remember(memory, emb, jnp.array([10 * step, 10 * step + 1]))
        if step == 1:
            assert memory.filled.tolist() == [True, True, False, False, False]
    assert memory.emb[:, 0].tolist() == [3.0, 3.5, 2.0, 2.5, 1.0]
    assert memory.identity.tolist() == [30, 31, 20, 21, 10]
    assert memory.filled.all()


# --- Memory and traffic


def mesh_of(n):
    return Mesh(np.array(jax.devices()[:n]).reshape(n, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def elements(shape):
    return math.prod(int(n) for n in shape.split(",") if n)


def collectives(text):
    """[(operation, elements of a result)] of a compiled program; one operation may have several results."""
    found = re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    return [(name, elements(shape)) for kind, name in found for shape in re.findall(r"\w+\[([\d,]*)\]", kind)]


@pytest.mark.parametrize("miner", ["hardest", "all", "semi_hard"])
def test_an_update_sends_embeddings_and_ids_once_and_holds_no_table(miner):
    """A linear encoder on 8 devices, under jit: two all-gathers, one reduce-scatter, and the gradient's all-reduce."""
    size, pixels, dim, devices = 1024, 7, 16, 8
    mesh = mesh_of(devices)
    data, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    @partial(jax.jit, out_shardings=whole)
    def update(kernel, images, ids):
        loss = jax.shard_map(
            partial(triplet_loss, margin=0.2, miner=miner, tile=64, axis_name="data", key=jax.random.key(0)),
            mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P(),
        )  # fmt: skip
        (value, metrics), grad = jax.value_and_grad(lambda k: loss(images @ k, ids), has_aux=True)(kernel)
        return kernel - 0.1 * grad, value, metrics

    shapes = (
        jax.ShapeDtypeStruct((pixels, dim), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((size, pixels), jnp.float32, sharding=data),
        jax.ShapeDtypeStruct((size,), jnp.int32, sharding=data),
    )
    text = update.lower(*shapes).compile().as_text()
    sent = collectives(text)
    gathers = sorted(count for name, count in sent if name == "all-gather")
    assert gathers == [size, size * dim]
    assert [count for name, count in sent if name == "reduce-scatter"] == [size // devices * dim]
    reduces = sorted(count for name, count in sent if name == "all-reduce")
    # The gradient; the loss, its counts, and the distances whose quantiles are logged: three numbers an anchor at most.
    assert reduces.count(pixels * dim) == 1
    assert max(count for count in reduces if count != pixels * dim) <= 3 * size
    assert {name for name, _ in sent} == {"all-gather", "all-reduce", "reduce-scatter"}
    # The largest array is that of all embeddings, or of a slab with its thresholds.
    largest = max(elements(shape) for shape in re.findall(r"(?:f32|s32|pred)\[([\d,]+)\]", text))
    assert largest < size * size // devices


@pytest.mark.parametrize("miner", ["all", "semi_hard"])
def test_jit_divides_the_slabs_of_a_divided_batch_by_itself(miner):
    mesh = mesh_of(4)
    emb, ids, _ = batch(0, 64, 9, 0)
    emb, ids = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (np.float32(emb), ids))
    run = jax.jit(jax.value_and_grad(partial(triplet_loss, margin=0.3, miner=miner, tile=16), has_aux=True))
    # Each device has the 16 anchors that are its own, and the program is one of shard_map.
    text = run.lower(emb, ids).as_text()
    assert "manual_computation" in text or "shmap_body" in text
    (loss, metrics), grad = run(emb, ids)
    here = jax.jit(jax.value_and_grad(partial(triplet_loss, margin=0.3, miner=miner, tile=0), has_aux=True))
    (expected, expected_metrics), expected_grad = here(*jax.device_get((emb, ids)))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("remembered", [0, 7])
def test_jit_divides_what_one_device_alone_would_take_in_slabs(monkeypatch, remembered):
    """Each of eight devices could make a table of its part: one of all of them cannot, of the batch or with its memory."""
    emb, ids, memory = batch(1, 64, 9, 0, remembered=remembered)
    emb, ids = (jax.device_put(x, NamedSharding(mesh_of(8), P("data"))) for x in (np.float32(emb), ids))
    run = partial(triplet_loss, margin=0.3, miner="semi_hard", memory=memory)
    monkeypatch.setattr(losses, "TABLE", 64 * (64 + remembered) - 1)
    divided = jax.jit(jax.value_and_grad(run, has_aux=True))
    assert "manual_computation" in divided.lower(emb, ids).as_text()
    alone = jax.jit(jax.value_and_grad(partial(run, tile=0), has_aux=True))(*jax.device_get((emb, ids)))
    check = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(check, jax.device_get(divided(emb, ids)), jax.device_get(alone))


@pytest.mark.parametrize("miner", ["hardest", "all", "semi_hard"])
def test_memory_grows_with_the_batch_and_not_with_its_square(miner):
    def temporary(size):
        shapes = jax.ShapeDtypeStruct((size, 32), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.int32)
        run = partial(triplet_loss, margin=0.2, miner=miner, key=jax.random.key(0))
        compiled = jax.jit(jax.grad(run, has_aux=True)).lower(*shapes).compile(FAST)
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(8192), temporary(32768)
    assert large < 5 * small
    assert large < 32768**2


@pytest.mark.parametrize("miner", ["all", "semi_hard"])
@pytest.mark.parametrize(("candidates", "tile"), [(4095, None), (5000, 1001), (5000, None), (3000, 15)])
def test_a_gpus_slabs_take_what_is_promised(monkeypatch, miner, candidates, tile):
    shapes = jax.ShapeDtypeStruct((candidates, 4), jnp.float32), jax.ShapeDtypeStruct((candidates,), jnp.int32)
    run = jax.jit(jax.grad(partial(triplet_loss, margin=0.2, miner=miner, tile=tile), has_aux=True))
    with monkeypatch.context() as patched:
        patched.setattr(tiled.jax, "default_backend", lambda: "gpu")
        lowered = run.lower(*shapes)
    # 24 × 16 MiB, and a MiB of what is linear in the batch.
    assert lowered.compile(FAST).memory_analysis().temp_size_in_bytes < 385 * 2**20


@pytest.mark.parametrize(
    ("loss", "tile"), [*itertools.product(mining.MINERS, (0, 16)), ("contrastive", None), ("arcface", None)]
)
def test_no_product_is_rounded_to_fewer_bits(loss, tile):
    """A GPU would round the factors to TF32's 10 bits."""
    emb, ids, memory = batch(0, 32, 5, 0, remembered=5)
    emb, kernel = np.float32(emb), np.ones((5, D), np.float32)
    if loss == "contrastive":
        run = lambda emb, kernel: losses.contrastive_loss(emb, ids, margin=1.0)  # noqa: E731
    elif loss == "arcface":
        run = lambda emb, kernel: margin_softmax_loss(  # noqa: E731
            emb, ids, kernel, classes=5, kind=loss, scale=8.0, margin=0.5
        )
    else:
        options = {"margin": 0.2, "miner": loss, "tile": tile, "memory": memory, "key": jax.random.key(0)}
        run = lambda emb, kernel: triplet_loss(emb, ids, **options)  # noqa: E731
    text = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True)).lower(emb, kernel).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 0 or loss == "random"
    for line in products:
        assert "precision = [HIGHEST, HIGHEST]" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": -1}, "loss.tile is -1.*--loss.tile 256"),
        ({"memory": -5}, "loss.memory is -5.*--loss.memory 4096"),
        ({"memory_after": -1}, "loss.memory_after is -1.*--loss.memory-after 1000"),
        ({"memory_after": 5}, "loss.memory_after is 5, and there is no memory.*--loss.memory 4096"),
    ],
)
def test_options_that_do_not_count_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        config.Triplet(**options)


def test_a_memory_that_no_update_would_use_is_refused():
    loss = config.Triplet(memory=8, memory_after=20)
    with pytest.raises(ValueError, match="loss.memory_after is 20 and steps 20.*Try --loss.memory-after 2\\."):
        config.Experiment(steps=20, loss=loss)
    config.Experiment(steps=21, loss=loss)

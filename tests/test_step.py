"""One update: the same on any number of devices, compiled once, donated, and never poisoned."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from faceembed import config, embed
from faceembed import mesh as meshes
from faceembed.training import loop
from faceembed.training import step as steps

SIZE, STEPS = 16, 20
TINY = config.Experiment(
    steps=STEPS,
    preprocess=config.Preprocess(size=SIZE),
    encoder=config.ConvNet(widths=(4, 8), blocks=(1, 1), dim=8),
    batch=config.Batch(people=6, photos=4),
    schedule=config.Schedule(learning_rate=5e-3, warmup=5, ema=0.9, weight_decay=1e-2),
)


def batches(count=STEPS, seed=0):
    """Photos with a trace of their person, random ids with singletons, in no order."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        identity = draw.integers(0, 7, 24).astype(np.int32)
        identity[:2] = [100, 101]
        image = draw.integers(0, 256, (24, 18, 18, 3)) // 2 + (identity[:, None, None, None] * 37 % 128)
        yield {"image": image.astype(np.uint8), "identity": identity, "slot": np.arange(24, dtype=np.int32)}


def build(experiment, devices, views=None, loss=None, shard_optimizer=False):
    mesh = meshes.make_mesh(devices)
    encoder = embed.build_encoder(experiment)
    chosen, loss_params = loop.make_loss(experiment, classes=102, mesh=mesh)
    schedule = experiment.schedule
    optimizer, _ = steps.make_optimizer(
        optax.scale_by_adam(), learning_rate=schedule.learning_rate, warmup=schedule.warmup, steps=experiment.steps,
        weight_decay=schedule.weight_decay, clip_norm=schedule.clip_norm,
    )  # fmt: skip
    dtype = jnp.float64 if experiment.precision == "float64" else jnp.float32
    state = steps.init_state(
        encoder, optimizer, seed=3, size=SIZE, loss_params=loss_params, dtype=dtype,
        memory=loop.make_memory(experiment, dtype),
    )  # fmt: skip
    shardings = meshes.state_sharding(mesh, state, shard_optimizer=shard_optimizer)
    state = jax.device_put(state, shardings)
    update = steps.make_train_step(
        encoder, loss or chosen, optimizer, views or loop.make_views(experiment), seed=3, ema=schedule.ema, mesh=mesh,
        shardings=shardings,
    )  # fmt: skip
    return mesh, state, update


def trajectory(experiment, devices, **options):
    mesh, state, update = build(experiment, devices, **options)
    measured = []
    for batch in meshes.to_devices(batches(), mesh):
        state, metrics = update(state, batch)
        measured.append(metrics)
    return jax.device_get(measured), jax.device_get(state)


def relative(tree, other):
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (tree, other))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def replace(experiment, **changes):
    import dataclasses

    return dataclasses.replace(experiment, **changes)


@pytest.mark.parametrize("loss", ["triplet", pytest.param("pair_logistic", marks=pytest.mark.slow), "arcface"])
def test_eight_devices_take_the_steps_of_one_float32(loss):
    experiment = replace(TINY, loss=config.CHOICES["loss"][loss])
    one, one_state = trajectory(experiment, 1)
    eight, eight_state = trajectory(experiment, 8)
    losses = np.array([[row["loss"] for row in rows] for rows in (one, eight)])
    assert losses.min() > 0
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)
    for part in ("params", "batch_stats", "ema"):
        assert relative(getattr(eight_state, part), getattr(one_state, part)) < 1e-3
    # It learned, or all of the above is the agreement of two fresh networks.
    assert relative(one_state.params, jax.device_get(build(experiment, 1)[1].params)) > 0.05


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_more_devices_take_the_steps_of_one_float64(devices):
    with jax.enable_x64(True):
        # In slabs, and with what was seen in earlier batches among the negatives.
        loss = replace(TINY.loss, memory=40, memory_after=2, tile=8)
        experiment = replace(TINY, precision="float64", loss=loss)
        one, one_state = trajectory(experiment, 1)
        many, many_state = trajectory(experiment, devices)
    assert jax.tree.leaves(one_state.params)[0].dtype == np.float64
    for row, other in zip(one, many, strict=True):
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=0, atol=1e-9, err_msg=name)
    for part in ("params", "batch_stats", "ema", "opt_state"):
        assert relative(getattr(many_state, part), getattr(one_state, part)) < 1e-9
    # B=24: the last batch whole, and of the one before the first 16.
    *_, before, last = (batch["identity"] for batch in batches())
    assert many_state.memory.identity.tolist() == [*last, *before[:16]]
    np.testing.assert_allclose(many_state.memory.emb, one_state.memory.emb, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(many_state.memory.emb, axis=1), 1, atol=1e-6)
    # More negatives from the update on that may use them.
    triplets = [row["triplets"] for row in one]
    with jax.enable_x64(True):
        without, _ = trajectory(replace(experiment, loss=replace(loss, memory=0, memory_after=0)), 1)
    assert [row["loss"] for row in without[:2]] == [row["loss"] for row in one[:2]]
    assert without[2]["loss"] != one[2]["loss"]
    assert min(triplets) > 0


def test_an_update_gathers_embeddings_and_ids_once_however_many_miners_look_at_them():
    experiment = replace(TINY, loss=config.Triplet(miner="semi_hard", last_miner="all", tile=8))
    mesh, state, update = build(experiment, 8)
    text = update.lower(state, next(meshes.to_devices(batches(1), mesh))).compile().as_text()
    sent = re.findall(r"= \w+\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
    dim = experiment.encoder.dim
    assert sorted(sent) == [("24", "all-gather"), (f"24,{dim}", "all-gather"), (f"3,{dim}", "reduce-scatter")]


def test_a_memory_gathers_embeddings_and_ids_once_more():
    def gathers_none(emb, identity, params, memory, key, step, axis):
        return jax.lax.pmean(emb.sum(), axis), {}

    experiment = replace(TINY, loss=config.Triplet(memory=40))
    mesh, state, update = build(experiment, 8, loss=gathers_none, views=lambda _, __, images: images[:, :16, :16] / 255)
    text = update.lower(state, next(meshes.to_devices(batches(1), mesh))).compile().as_text()
    sent = re.findall(r"= \w+\[([\d,]*)\]\S* (all-gather|reduce-scatter|all-to-all|collective-permute)\(", text)
    assert sorted(sent) == [("24", "all-gather"), (f"24,{experiment.encoder.dim}", "all-gather")]


def test_a_divided_optimizer_takes_the_same_steps_with_an_eighth_of_the_memory():
    """ZeRO stage 1 by shardings alone."""
    mesh, state, update = build(TINY, 8, shard_optimizer=True)

    measured = []
    for batch in meshes.to_devices(batches(), mesh):
        before, (state, metrics) = state, update(state, batch)
        measured.append(metrics)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    for part in ("opt_state", "ema", "params", "batch_stats"):
        leaves = jax.tree.leaves(getattr(state, part))
        divided = [leaf for leaf in leaves if part in ("opt_state", "ema") and any(n % 8 == 0 for n in leaf.shape)]
        assert len(divided) > 8 or part in ("params", "batch_stats")
        for leaf in leaves:
            share = 8 if any(leaf is other for other in divided) else 1
            assert leaf.addressable_shards[0].data.nbytes * share == leaf.nbytes
    assert update._cache_size() == 1
    whole, whole_state = trajectory(TINY, 8)
    for row, other in zip(jax.device_get(measured), whole, strict=True):
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for part in ("params", "batch_stats", "ema", "opt_state"):
        assert relative(getattr(jax.device_get(state), part), getattr(whole_state, part)) < 1e-5


def test_each_leaf_is_divided_along_its_longest_dimension_that_divides():
    mesh = meshes.make_mesh(4)
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    state = steps.TrainState(
        step=leaf(), skipped=leaf(), params={"k": leaf(8, 16)}, batch_stats={"m": leaf(16)},
        opt_state={"k": leaf(8, 16), "odd": leaf(3, 3, 6, 12), "small": leaf(2), "count": leaf()}, ema={"k": leaf(20, 6)},
    )  # fmt: skip
    spec = jax.tree.map(lambda sharding: tuple(sharding.spec), meshes.state_sharding(mesh, state, shard_optimizer=True))
    assert spec.opt_state == {
        "k": (None, "data"), "odd": (None, None, None, "data"), "small": (), "count": (),
    }  # fmt: skip
    assert spec.ema == {"k": ("data", None)}
    assert spec.params == {"k": ()}
    whole = meshes.state_sharding(mesh, state)
    assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(whole))


def test_one_compilation_and_a_donated_state():
    traces = []
    views = loop.make_views(TINY)

    def counted(*arguments):
        traces.append(1)
        return views(*arguments)

    mesh, state, update = build(TINY, 2, views=counted)
    for batch in meshes.to_devices(batches(4), mesh):
        before, (state, _) = state, update(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert len(traces) == 1


def test_an_update_that_is_not_finite_is_not_applied():
    chosen, _ = loop.make_loss(TINY)

    def spoiled(emb, identity, params, memory, key, step, axis):
        loss, metrics = chosen(emb, identity, params, memory, key, step, axis)
        bad = jax.lax.pmax((identity == -1).any().astype(jnp.float32), axis)
        return jnp.where(bad > 0, jnp.nan, loss), metrics

    mesh, state, update = build(TINY, 2, loss=spoiled)
    good, bad = list(batches(2))
    bad["identity"][5] = -1
    put = lambda batch: next(meshes.to_devices([batch], mesh))  # noqa: E731
    state, _ = update(state, put(good))
    before = jax.device_get(state)
    state, metrics = update(state, put(bad))
    after = jax.device_get(state)
    assert np.isnan(metrics["loss"])
    assert not metrics["finite"]
    assert metrics["statistics_finite"]
    assert (after.step, after.skipped, int(metrics["skipped"])) == (2, 1, 1)
    for part in ("params", "batch_stats", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    state, metrics = update(state, put(good))
    assert np.isfinite(metrics["loss"])
    assert relative(state.params, before.params) > 0


@pytest.mark.parametrize("name", list(config.CHOICES["encoder"]))
def test_weight_decay_spares_norms_biases_and_slopes(name):
    encoder = embed.build_encoder(replace(TINY, encoder=config.CHOICES["encoder"][name]))
    variables = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 112, 112, 3))))
    decayed = jax.tree_util.tree_map_with_path(steps.decays, variables["params"])
    for path, yes in jax.tree_util.tree_leaves_with_path(decayed):
        leaf = path[-1].key
        assert yes == (leaf == "kernel"), jax.tree_util.keystr(path)
        known = ("kernel", "bias", "scale", "slope", "conv2d_bias", "position")
        assert leaf in known, f"what is {jax.tree_util.keystr(path)}?"


def test_the_optimizer_is_optax_adamw_behind_clipping():
    optimizer, schedule = steps.make_optimizer(
        optax.scale_by_adam(), learning_rate=0.1, warmup=4, steps=20, weight_decay=0.02, clip_norm=0.5
    )
    # Peak at the end of the warm-up, a hundredth at the end.
    assert float(schedule(4)) == pytest.approx(0.1)
    assert float(schedule(20)) == pytest.approx(0.001)
    assert 0 < float(schedule(0)) < float(schedule(1)) < float(schedule(4))
    params = {"dense": {"kernel": jnp.full((2, 3), 0.7), "bias": jnp.full(3, 0.7)}}
    grads = jax.tree.map(lambda x: 3 * jnp.ones_like(x), params)
    mask = {"dense": {"kernel": True, "bias": False}}
    reference = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(schedule, weight_decay=0.02, mask=mask))
    ours, theirs = (o.update(grads, o.init(params), params)[0] for o in (optimizer, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_the_average_follows_with_its_decay():
    mesh, state, update = build(TINY, 1)
    start = jax.device_get(state.ema["params"])
    state, _ = update(state, next(meshes.to_devices(batches(1), mesh)))
    # At step 0 the decay is min(0.9, 1/10).
    expected = jax.tree.map(lambda old, new: 0.1 * old + 0.9 * np.asarray(new), start, state.params["encoder"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema["params"], expected)


def test_a_batch_that_does_not_divide_says_what_to_type():
    with pytest.raises(ValueError, match="--batch.people to a multiple of 4"):
        meshes.check_batch(meshes.make_mesh(8), 3, 2)
    with pytest.raises(ValueError, match="XLA_FLAGS"):
        meshes.make_mesh(9)

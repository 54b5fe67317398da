"""Batches in chunks: the numbers of the undivided batch, in less memory, without moving a photo between devices."""

import dataclasses
import re
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from faceembed import config, losses
from faceembed import mesh as meshes
from faceembed.data import augment
from faceembed.encoders import layers
from faceembed.training import chunks, loop, transfer
from faceembed.training import step as steps

BATCH, SIZE, DIM, CLASSES = 32, 8, 6, 8
FAST = {"xla_backend_optimization_level": 0}
"""Halves the time to compile; what is tested here is which numbers meet, not how fast."""


class Plain(nn.Module):
    """Without batch normalisation; some values are dropped of each photo, and all of them of some."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.tanh(nn.Dense(12, name="one")(images.reshape(len(images), -1) / 10))
        x = nn.Dropout(0.3, deterministic=not train, name="drop_values")(x)
        x = x + nn.Dropout(0.5, broadcast_dims=(1,), deterministic=not train, name="drop_path")(x)
        return layers.unit_length(nn.Dense(DIM, name="two")(x))


class Normed(nn.Module):
    """With batch normalisation, the second of what the first has normalised, and dropout."""

    width: int = 4

    @nn.compact
    def __call__(self, images, *, train):
        norm = partial(layers.batch_norm, train=train, dtype="float64", axis_name=None)
        x = layers.Conv3x3(self.width, 2, dtype="float64", name="conv")(images)
        x = nn.relu(norm(name="norm1")(x)).reshape(len(images), -1)
        x = nn.Dropout(0.2, deterministic=not train, name="dropout")(x)
        x = nn.Dense(DIM, dtype=jnp.float64, name="embedding")(x)
        return layers.unit_length(norm(name="norm2")(x))


def views(step, slot, images):
    """Normalised photos with noise that is drawn for each slot."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE, 3)))(augment.slot_keys(7, step, slot))
    return images / 64 - 2 + noise / 2


def batch(seed=0, count=BATCH, size=SIZE):
    """Photos with a trace of their person, random ids in no order, two of them alone."""
    draw = np.random.default_rng(seed)
    identity = draw.integers(0, 7, count).astype(np.int32)
    identity[[3, 8]] = [100, 101]
    image = draw.integers(0, 128, (count, size, size, 3)) + identity[:, None, None, None] % 8 * 16
    return {"image": image.astype(np.uint8), "identity": identity, "slot": np.arange(count, dtype=np.int32)}


def by_photo(emb, identity, params, axis):
    """A mean over photos, by kernels whose rows are divided over the devices."""
    emb, identity = (jax.lax.all_gather(x, axis, tiled=True) for x in (emb, identity))
    cost = jnp.tanh(emb @ params[meshes.CLASS_KERNEL].T).sum(1) * jnp.cos(identity)
    return jax.lax.psum(cost, axis).mean()


def pairs_and_classes(emb, identity, params, memory, key, step, axis):
    """All pairs with margins that are drawn, a loss by photo, and one by what is remembered; it has a parameter."""
    everyone, identities = (jax.lax.all_gather(x, axis, tiled=True) for x in (emb, identity))
    distance = jnp.square(emb[:, None] - everyone).sum(2) * params["scale"]
    hinge = nn.relu(3 * jax.random.uniform(key, identities.shape) - distance)
    cost = jnp.where(identity[:, None] == identities, distance, hinge)
    pairs, active = (jax.lax.psum(x.sum(), axis) / len(identities) for x in (cost, hinge > 0))
    value = pairs + by_photo(emb, identity, params, axis) + jnp.sum(memory.emb) * params["scale"]
    return value, {"active": active}


def photos_alone(emb, identity, params, memory, key, step, axis):
    value = by_photo(emb, identity, params, axis) * params["scale"]
    return value, {"cost": jax.lax.stop_gradient(value)}


def build(
    encoder, loss, devices, *, make_views=views, frozen=None, size=SIZE, ema=0.0, momentum=0.0, shard_optimizer=False,
    **chunked,
):  # fmt: skip
    """(mesh, state, update) in float64, whose optimizer takes the gradient off the parameters."""
    mesh = meshes.make_mesh(devices)
    optimizer = optax.chain(optax.trace(momentum) if momentum else optax.identity(), optax.scale(-1.0))
    draw = np.random.default_rng(1)
    params = {"scale": jnp.float64(1.3), meshes.CLASS_KERNEL: jnp.asarray(draw.normal(size=(CLASSES, DIM)))}
    state = steps.init_state(
        encoder, optimizer, seed=3, size=size, loss_params=params, dtype=jnp.float64,
        memory=losses.init_memory(BATCH + 4, DIM, jnp.float64),
    )  # fmt: skip
    shardings = meshes.state_sharding(mesh, state, shard_optimizer=shard_optimizer)
    update = steps.make_train_step(
        encoder, loss, optimizer, make_views, seed=3, ema=ema, mesh=mesh, shardings=shardings, frozen=frozen, **chunked
    )
    return mesh, jax.device_put(state, shardings), update


def compiled(encoder, loss, devices, **options):
    """(mesh, state, compiled update)."""
    mesh, state, update = build(encoder, loss, devices, **options)
    data = jax.device_put(batch(), meshes.batch_sharding(mesh))
    return mesh, state, update.lower(state, data).compile(compiler_options=FAST)


def two_steps(encoder, loss, devices, **options):
    """Per step: metrics and state; the second has other random numbers and a memory."""
    mesh, state, update = compiled(encoder, loss, devices, **options)
    found = []
    for seed in range(2):
        state, metrics = update(state, jax.device_put(batch(seed), meshes.batch_sharding(mesh)))
        found.append(jax.device_get((metrics, state)))
    return found


@cache
def undivided(loss):
    return two_steps(Plain(), loss, 1)


def assert_equal(found, expected):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(("devices", "count"), [(1, 2), (2, 4), (8, 4)])
def test_without_batch_norm_microbatches_take_the_steps_of_the_undivided_batch(devices, count):
    with jax.enable_x64(True):
        expected = undivided(pairs_and_classes)
        assert expected[1][0]["active"] > 0
        assert expected[1][0]["skipped"] == 0
        assert_equal(two_steps(Plain(), pairs_and_classes, devices, microbatches=count), expected)


@pytest.mark.parametrize(
    "chosen", [config.Triplet(memory=BATCH + 4, tile=8), config.Triplet(groups=4, miner="semi_hard_all", tile=0)]
)
def test_a_trainings_triplets_averages_and_divided_optimizer_are_those_of_the_undivided_batch(monkeypatch, chosen):
    monkeypatch.setattr(loop.diagnostics, "active_by_miner", lambda *_: {})  # three more miners to compile
    experiment = config.Experiment(loss=chosen, encoder=config.ConvNet(dim=DIM), batch=config.Batch(people=8, photos=4))
    loss, _ = loop.make_loss(experiment)
    options = {"ema": 0.9, "momentum": 0.5}
    with jax.enable_x64(True):
        expected = two_steps(Plain(), loss, 1, **options)
        assert_equal(two_steps(Plain(), loss, 8, microbatches=2, shard_optimizer=True, **options), expected)
    assert all(metrics["active"] > 0 for metrics, _ in expected)


@cache
def cosface():
    """A training's, for the kernel of `build`."""
    experiment = config.Experiment(loss=config.CosFace(scale=8.0), encoder=config.ConvNet(dim=DIM))
    loss, _ = loop.make_loss(experiment, classes=CLASSES, mesh=meshes.make_mesh(1))
    return lambda emb, identity, *others: loss(emb, identity % CLASSES, *others)


@pytest.mark.parametrize("make", [lambda: photos_alone, cosface])
def test_accumulation_takes_the_steps_of_the_undivided_batch_for_a_mean_over_photos(make):
    with jax.enable_x64(True):
        assert_equal(two_steps(Plain(), make(), 8, accumulate=4), undivided(make()))


def one_graph(state, data, count):
    """Loss, gradient and moments of one function that encodes chunk after chunk: what has to be computed at step 0."""
    dropout_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 1), 0))
    cost = jax.shard_map(
        lambda emb, identity, params: pairs_and_classes(
            emb, identity, params, state.memory, loss_key, state.step, meshes.DATA
        ),
        mesh=meshes.make_mesh(1), in_specs=(*2 * [PartitionSpec(meshes.DATA)], PartitionSpec()),
        out_specs=PartitionSpec(),
    )  # fmt: skip

    def objective(params):
        parts, moments = [], []
        for k in range(count):
            slot = data["slot"][k::count]
            variables = {"params": params["encoder"], "batch_stats": jax.tree.map(jnp.zeros_like, state.batch_stats)}
            with layers.dropout_by_slot(slot):
                emb, new = Normed().apply(
                    variables, views(0, slot, data["image"][k::count]), train=True, mutable=["batch_stats"],
                    rngs={"dropout": dropout_key},
                )  # fmt: skip
            parts.append(emb)
            moments.append(jax.tree.map(lambda x: x / 0.1, new["batch_stats"]))
        emb = jnp.stack(parts, 1).reshape(BATCH, DIM)
        return cost(emb, data["identity"], params["loss"])[0], moments

    (value, moments), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    return value, grads, moments


def updated(old, moments):
    """Statistics of a norm after one update, from the mean and the mean square of all photos."""
    means, variances = (np.stack([chunk[kind] for chunk in moments]) for kind in ("mean", "var"))
    variance = (variances + means**2).mean(0) - means.mean(0) ** 2
    return {"mean": 0.9 * old["mean"] + 0.1 * means.mean(0), "var": 0.9 * old["var"] + 0.1 * variance}


@cache
def in_four_chunks(devices):
    """Also what is read where photos stay."""
    return compiled(Normed(), pairs_and_classes, devices, microbatches=4)


def one_step(mesh, state, update):
    """(state before, state after, metrics); the state is given back as it was."""
    before = jax.device_get(state)
    after, metrics = update(jax.tree.map(jnp.copy, state), jax.device_put(batch(), meshes.batch_sharding(mesh)))
    return before, jax.device_get(after), jax.device_get(metrics)


def test_with_batch_norm_microbatches_are_the_chunked_graph_with_one_update_of_statistics():
    with jax.enable_x64(True):
        before, after, metrics = one_step(*in_four_chunks(8))
        oracle = jax.jit(partial(one_graph, count=4), compiler_options=FAST)
        value, grads, moments = jax.device_get(oracle(before, batch()))
        assert_equal(metrics["loss"], value)
        assert_equal(jax.tree.map(np.subtract, before.params, after.params), grads)
        for name, old in before.batch_stats.items():
            assert_equal(after.batch_stats[name], updated(old, [chunk[name] for chunk in moments]))


def test_frozen_norms_keep_their_statistics_and_their_layers_have_no_gradient():
    with jax.enable_x64(True):
        frozen = transfer.frozen_by(["conv", "norm1"], {"conv": {"kernel": 0}, "norm1": {"bias": 0}, "norm2": 0})
        before, after, metrics = one_step(*compiled(Normed(), photos_alone, 2, frozen=frozen, microbatches=2))
        assert metrics["grad_norm/conv"] == 0 < metrics["grad_norm/embedding"]
        jax.tree.map(np.testing.assert_array_equal, after.batch_stats["norm1"], before.batch_stats["norm1"])
        assert not np.array_equal(after.batch_stats["norm2"]["mean"], before.batch_stats["norm2"]["mean"])


def test_chunks_are_strided_and_the_same_on_any_number_of_devices():
    photos = {"a": np.arange(32), "b": np.arange(64.0).reshape(32, 2)}
    for devices in (1, 2, 8):
        mesh = meshes.make_mesh(devices)
        placed = jax.device_put(photos, meshes.batch_sharding(mesh))
        parts = [jax.jit(partial(chunks.take, chunks=4, mesh=mesh))(placed, k) for k in range(4)]
        for k, part in enumerate(parts):
            jax.tree.map(np.testing.assert_array_equal, part, jax.tree.map(lambda x, k=k: x[k::4], photos))
            assert len(part["b"].addressable_shards[0].data) == 8 // devices
        stacked = jax.device_put(
            np.stack([part["b"] for part in parts]), NamedSharding(mesh, PartitionSpec(None, "data"))
        )
        np.testing.assert_array_equal(chunks.join(stacked, mesh), photos["b"])


def test_photos_stay_on_their_devices():
    """What moves are embeddings, ids and keys, of which a photo has far less than of pixels."""
    with jax.enable_x64(True):
        program = in_four_chunks(8)[2].as_text()
    moved = re.findall(
        r"= (.*?) (?:all-gather|all-to-all|collective-permute|collective-broadcast)(?:-start)?\(", program
    )
    arrays = [array for results in moved for array in re.findall(r"(\w\d+)\[([\d,]*)\]", results)]
    assert ("f64", f"{BATCH},{DIM}") in arrays  # the embeddings, or this would not have read the program
    for dtype, shape in arrays:
        assert dtype != "u8"
        assert len(shape.split(",")) <= 2


def test_the_gradient_of_the_parameters_is_summed_over_devices_once_a_chunk():
    """As docs/scaling.md says: the sum over chunks is whole on every device, so each addend has to be."""
    with jax.enable_x64(True):
        program = in_four_chunks(8)[2].as_text()
    # [64, DIM] is the kernel of the embedding; XLA may turn it.
    kernel = rf"f64\[(?:64,{DIM}|{DIM},64)\]"
    summing = [part for part in program.split("\n\n") if re.search(rf"= .*{kernel}.* all-reduce(?:-start)?\(", part)]
    (body,) = (re.match(r"%(\S+)", part)[1] for part in summing)
    (loop,) = (line for line in program.splitlines() if f"body=%{body}," in line)
    assert '"known_trip_count":{"n":"4"}' in loop


@pytest.fixture(scope="module")
def counted():
    """(traces of the views, mesh, state, update) on two devices in chunks; pixels of 255 are not finite."""
    traces = []

    def spoiled(step, slot, images):
        traces.append(1)
        return jnp.where(images == 255, jnp.nan, views(step, slot, images))

    with jax.enable_x64(True):
        return traces, *build(Plain(), photos_alone, 2, make_views=spoiled, microbatches=2)


def test_one_compilation_a_donated_state_and_no_update_that_is_not_finite(counted):
    traces, mesh, state, update = counted
    bad = batch()
    bad["image"][BATCH - 1, 0, 0, 0] = 255
    with jax.enable_x64(True):
        for number, data in enumerate((batch(), bad, batch())):
            old, kept = state, jax.tree.map(jnp.copy, state)
            state, metrics = update(state, jax.device_put(data, meshes.batch_sharding(mesh)))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
            assert metrics["finite"] == (number != 1)
            if number == 1:
                for part in ("params", "ema", "memory"):
                    jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(kept, part))
        assert (int(state.step), int(state.skipped)) == (3, 1)
    assert len(traces) == 2  # each photo's view is drawn twice an update
    assert update._cache_size() == 1


def test_memory_falls_with_the_chunks():
    def temporary(**chunked):
        with jax.enable_x64(True):
            mesh, state, update = build(
                Normed(width=16), photos_alone, 1, make_views=lambda _, __, x: x / 64 - 2, **chunked
            )
            data = jax.device_put(batch(count=512), meshes.batch_sharding(mesh))
            return update.lower(state, data).compile(compiler_options=FAST).memory_analysis().temp_size_in_bytes

    whole = temporary()
    assert whole > 512 * 4 * 4 * 16 * 8  # one map of all photos, or there would be nothing to save
    assert temporary(microbatches=8) < whole / 4


# Dropout by slot -------------------------------------------------------------------------------------------------------


def test_what_is_dropped_depends_on_slot_and_step_alone():
    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x):
            a = nn.Dropout(0.25, deterministic=False, name="a")(x)
            b = nn.Dropout(0.5, broadcast_dims=(1,), deterministic=False, name="b")(x)
            return a, b, nn.Dropout(0.5, deterministic=True, name="c")(x)

    @partial(jax.jit, static_argnames="dtype")
    def dropped(slot, key, dtype):
        with layers.dropout_by_slot(slot):
            return Drop().apply({}, jnp.ones((len(slot), 200), dtype), rngs={"dropout": jax.random.key(key)})

    def drop(slot, key=0, dtype="float32"):
        return jax.device_get(dropped(np.asarray(slot), key, dtype))

    a, b, c = drop(np.arange(64))
    np.testing.assert_array_equal(np.unique(a), np.float32([0, 1 / 0.75]))
    assert abs(np.mean(a == 0) - 0.25) < 0.02
    assert all(len(np.unique(row)) == 1 for row in b)
    assert 16 < np.sum(b[:, 0] == 0) < 48
    np.testing.assert_array_equal(c, 1)
    assert not np.array_equal(a[0], a[1])
    some = [40, 3, 17]
    for whole, part in zip((a, b), drop(some), strict=False):
        np.testing.assert_array_equal(part, whole[some,])
    assert not np.array_equal(drop(np.arange(64), key=1)[0], a)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(drop(np.arange(64), dtype="float64")[0] == 0, a == 0)


# What is typed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config.Batch(microbatches=0), r"batch.microbatches is 0.*--batch.microbatches 1"),
        (lambda: config.Batch(accumulate=-1), r"batch.accumulate is -1.*--batch.accumulate 1"),
        (lambda: config.Batch(microbatches=2, accumulate=2), r"microbatches is 2 and batch.accumulate 2.*Leave one"),
        (lambda: config.Experiment(batch=config.Batch(accumulate=4)), r"Triplet compares.*Try --batch.microbatches 4"),
        (
            lambda: config.Experiment(batch=config.Batch(accumulate=2), loss=config.PairLogistic()),
            r"PairLogistic compares.*Try --batch.microbatches 2",
        ),
        *[
            (
                lambda loss=loss: config.Experiment(batch=config.Batch(accumulate=2), loss=loss(sample=0.5)),
                r"accumulate is 2 and loss.sample 0.5: .*its chunk.*Try --batch.microbatches 2, .*--loss.sample 1\.",
            )
            for loss in (config.CosFace, config.ArcFace)
        ],
        (
            lambda: meshes.check_batch(meshes.make_mesh(2), 6, 4, microbatches=8),
            r"microbatches is 8.*12 photos \(people=6 × photos=4\).*2 devices.*microbatches 6.*multiple of 4\.",
        ),
        (lambda: meshes.check_batch(meshes.make_mesh(1), 2, 2, accumulate=3), r"accumulate is 3.*accumulate 2"),
    ],
)
def test_chunks_that_cannot_be_say_what_to_type(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_chunks_that_can_be():
    config.Experiment(batch=config.Batch(microbatches=8))
    meshes.check_batch(meshes.make_mesh(2), 6, 4, microbatches=6)
    meshes.check_batch(meshes.make_mesh(8), 4, 4, accumulate=2)


@pytest.mark.parametrize("loss", [config.CosFace(), config.ArcFace()])
def test_losses_by_photo_may_be_accumulated(loss):
    config.Experiment(batch=config.Batch(accumulate=2), loss=loss)


@pytest.fixture
def starts(monkeypatch, tmp_path, noise_photos):
    """(experiment, devices) → the chunks that a training has when it makes its update, and ends."""

    class Reached(Exception):
        pass

    def make_train_step(*_, microbatches, accumulate, **__):
        raise Reached(microbatches, accumulate)

    monkeypatch.setattr(loop, "open_data", lambda *_, **__: noise_photos)
    monkeypatch.setattr(steps, "make_train_step", make_train_step)

    def start(experiment, devices):
        with pytest.raises(Reached) as reached:
            loop.train(experiment, tmp_path / "run", devices=devices, progress=False)
        return reached.value.args

    return start


TINY = config.Experiment(
    preprocess=config.Preprocess(size=16), encoder=config.ConvNet(widths=(4,), blocks=(1,), dim=8),
    batch=config.Batch(people=6, photos=4, microbatches=3),
)  # fmt: skip


def in_chunks(count, **changes):
    return dataclasses.replace(TINY, batch=config.Batch(people=6, photos=4, microbatches=count), **changes)


def test_a_training_passes_its_chunks_on_and_says_what_batch_norm_sees(starts, capsys):
    assert starts(TINY, 2) == (3, 1)
    assert "batch normalisation sees 8 photos at a time, and not the 24 of a batch" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--batch.microbatches 4"):
        starts(in_chunks(5), 2)


def test_batch_norm_sees_two_photos_or_its_running_statistics(starts, capsys):
    with pytest.raises(ValueError, match=r"microbatches is 24: .*one photo at a time.*Try --batch.microbatches 12,"):
        starts(in_chunks(24), 1)
    assert starts(in_chunks(12), 1) == (12, 1)  # two photos, as 24 chunks would be of two devices
    assert "sees 2 photos" in capsys.readouterr().out
    assert starts(in_chunks(24, freeze=("*bn*",)), 1) == (24, 1)
    assert "batch normalisation" not in capsys.readouterr().out
    assert starts(in_chunks(3, freeze=("stem_bn",)), 1) == (3, 1)  # some are left
    assert "sees 8 photos" in capsys.readouterr().out

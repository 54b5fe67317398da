"""A batch mined in groups equals a loop over groups that are mined alone, on any number of devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from faceembed import config
from faceembed.data import sampling
from faceembed.losses import grouped_triplet_loss, triplet_loss
from faceembed.training import loop

B, D, MARGIN = 48, 3, 1.0
FAST = {"xla_backend_optimization_level": 0}
KEY = 5
BATCHES = [(6, 0), (3, 2), (100, 0), (1, 0), (30, 0)]
"""(people, points): few integer points tie; of 100 people groups have hardly a triplet, of one person none."""


def arguments(seed, people, points):
    rng = np.random.default_rng(seed)
    emb = rng.integers(0, points, (B, D)).astype(np.float64) if points else rng.normal(size=(B, D))
    return emb, (rng.integers(0, people, B) * 1009 - 2000).astype(np.int32)


def loss_of(emb, ids, groups, miner, axis_name=None):
    key = jax.random.key(KEY)
    return grouped_triplet_loss(emb, ids, groups=groups, margin=MARGIN, miner=miner, key=key, axis_name=axis_name)


def loop_over_groups(emb, ids, groups, miner):
    """Each group's own loss, metrics and gradient, one after another, put together by NumPy."""
    loss, triplets, sums, gradient = 0.0, 0.0, {}, np.zeros_like(emb)
    for g in range(groups):
        part = slice(g * B // groups, (g + 1) * B // groups)
        key = jax.random.fold_in(jax.random.key(KEY), g)
        (value, metrics), by_emb = alone(miner)(emb[part], ids[part], key)
        loss += float(value) / groups
        gradient[part] = by_emb / groups
        triplets += float(metrics["triplets"])
        for name, x in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(metrics["triplets"]) * float(x)
    means = {name: x / max(triplets, 1) for name, x in sums.items()}
    return (loss, means | {"triplets": triplets}), gradient


@cache
def alone(miner):
    value = lambda emb, ids, key: triplet_loss(emb, ids, margin=MARGIN, miner=miner, key=key)  # noqa: E731
    return jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=FAST)


@cache
def expected(groups, miner):
    return [loop_over_groups(*arguments(seed, *shape), groups, miner) for seed, shape in enumerate(BATCHES)]


def mesh_of(n):
    return Mesh(jax.devices()[:n], ("data",), axis_types=(AxisType.Auto,))


def under_jit(n, **options):
    shard = NamedSharding(mesh_of(n), P("data"))
    run = jax.value_and_grad(partial(loss_of, **options), has_aux=True)
    return jax.jit(run, in_shardings=(shard, shard), compiler_options=FAST)


def under_shard_map(n, **options):
    run = partial(loss_of, axis_name="data", **options)
    run = jax.shard_map(run, mesh=mesh_of(n), in_specs=P("data"), out_specs=P())
    return jax.jit(jax.value_and_grad(run, has_aux=True), compiler_options=FAST)


# Miners that draw, that list and that sum take different ways; not every one is compiled for every spread.
SPREADS = [
    (under_jit, 2, 8, "semi_hard"),
    (under_shard_map, 1, 8, "semi_hard"),
    (under_shard_map, 2, 8, "all"),
    (under_shard_map, 4, 8, "semi_hard"),
    (under_shard_map, 8, 8, "semi_hard"),
    # Every device gathers, and the last finds no group left.
    (under_shard_map, 4, 6, "random"),
]


@pytest.mark.parametrize(("build", "devices", "groups", "miner"), SPREADS)
def test_groups_equal_a_loop_over_groups_on_any_number_of_devices(build, devices, groups, miner):
    with jax.enable_x64(True):
        run = build(devices, groups=groups, miner=miner)
        for seed, (shape, wanted) in enumerate(zip(BATCHES, expected(groups, miner), strict=True)):
            found = jax.device_get(run(*arguments(seed, *shape)))
            for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=f"{seed}{jax.tree_util.keystr(path)}")


def test_one_group_is_the_whole_batch(monkeypatch):
    passed = {}
    monkeypatch.setattr("faceembed.losses.triplet_loss", lambda *args, **options: passed.update(options) or args)
    emb, ids = arguments(0, 6, 0)
    returned = loss_of(emb, ids, 1, "random", axis_name="data")
    assert returned[0] is emb and returned[1] is ids  # noqa: PT018
    assert (passed["axis_name"], passed["miner"]) == ("data", "random")
    assert (jax.random.key_data(passed["key"]) == jax.random.key_data(jax.random.key(KEY))).all()


@pytest.mark.parametrize(("groups", "gathers"), [(8, False), (16, False), (4, True), (1, True)])
def test_a_device_with_whole_groups_gathers_no_embedding(groups, gathers):
    program = jax.make_jaxpr(
        jax.shard_map(
            partial(loss_of, axis_name="data", groups=groups, miner="semi_hard"),
            mesh=mesh_of(8), in_specs=P("data"), out_specs=P(),
        )
    )(*arguments(0, 6, 0))  # fmt: skip
    assert ("all_gather" in str(program)) == gathers


@pytest.mark.parametrize("groups", [0, 7])
def test_a_batch_that_does_not_divide_is_refused(groups):
    with pytest.raises(ValueError, match=f"groups is {groups}, and a batch of 48 .*divisor of 48, such as [16]\\."):
        loss_of(*arguments(0, 6, 0), groups, "hardest")


# --- The switch


@pytest.mark.parametrize("groups", [1, 4])
def test_a_training_mines_its_losses_and_its_shares_as_its_experiment_says(monkeypatch, groups):
    seen = []

    def record(batch, *_, miner, tile, groups=1, **__):
        seen.append((miner, tile, groups))
        value = jax.tree.leaves(batch)[0].sum()
        return value, {"active": value}

    monkeypatch.setattr("faceembed.losses.grouped_triplet_loss", record)
    monkeypatch.setattr("faceembed.losses.gathered_triplet_loss", record)
    experiment = config.Experiment(
        loss=config.Triplet(groups=groups, miner="semi_hard", last_miner="all", tile=48),
        batch=config.Batch(people=8, photos=2),
    )
    loss, _ = loop.make_loss(experiment)
    loss(jnp.ones((16, 2)), jnp.zeros(16, jnp.int32), {}, None, jax.random.key(0), jnp.int32(0), None)
    assert set(seen) == {(miner, 48, groups) for miner in ("semi_hard", "all", "hardest")}


def test_an_experiment_whose_batch_does_not_divide_says_what_to_type():
    with pytest.raises(ValueError, match="loss.groups is 0.*Try --loss.groups 1"):
        config.Triplet(groups=0)
    with pytest.raises(ValueError, match=r"loss.groups is 8, and a batch of 36 .*Try --batch.people 10\."):
        config.Experiment(loss=config.Triplet(groups=8), batch=config.Batch(people=9, photos=4))
    config.Experiment(loss=config.Triplet(groups=8), batch=config.Batch(people=10, photos=4))
    assert config.from_json(config.to_json(config.Triplet(groups=8))) == config.Triplet(groups=8)


@pytest.mark.parametrize("photos", [2, 4])
def test_groups_of_the_plan_hold_whole_people_where_everybody_has_as_many_photos(photos):
    identity = np.repeat(np.arange(101), np.random.default_rng(0).integers(photos, 9, 101))
    sampler = sampling.make_sampler(identity, people=16, photos=photos, seed=3, singletons=0)
    for step in range(3 * sampler.epoch_steps):
        groups = identity[sampler.batch(step)].reshape(8, -1)
        assert all((np.unique(group, return_counts=True)[1] == photos).all() for group in groups)

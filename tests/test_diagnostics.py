"""What is measured of a training's health, and what is said of it."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from faceembed import config, losses
from faceembed import mesh as meshes
from faceembed.training import diagnostics, loop


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("shape", [(40, 7), (5, 16)])
def test_effective_rank_is_the_participation_ratio_of_the_eigenvalues(shape):
    emb = unit(np.random.default_rng(0).normal(size=shape) + 0.3)
    values = np.linalg.eigvalsh(emb.T @ emb)
    expected = values.sum() ** 2 / (values**2).sum()
    assert 1.5 < expected < min(shape)
    assert float(diagnostics.effective_rank(jnp.asarray(emb, jnp.float32))) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_of_a_point_a_line_and_a_frame():
    x = unit(np.random.default_rng(1).normal(size=(1, 6)))
    sign = np.array([[1.0], [-1.0], [1.0], [1.0]])
    assert float(diagnostics.effective_rank(jnp.asarray(np.repeat(x, 9, 0)))) == pytest.approx(1, abs=1e-5)
    assert float(diagnostics.effective_rank(jnp.asarray(sign * x))) == pytest.approx(1, abs=1e-5)
    assert float(diagnostics.effective_rank(jnp.asarray(np.repeat(np.eye(6), 3, 0)))) == pytest.approx(6, abs=1e-5)


def test_effective_rank_of_a_divided_batch_is_that_of_the_whole():
    emb = unit(np.random.default_rng(2).normal(size=(24, 5)) + 0.5).astype(np.float32)
    mesh = meshes.make_mesh(8)
    divided = jax.device_put(emb, NamedSharding(mesh, PartitionSpec(meshes.DATA)))
    rank = jax.jit(diagnostics.effective_rank)
    np.testing.assert_allclose(rank(divided), rank(emb), rtol=1e-6)


def test_norms_by_group_of_layers():
    leaf = lambda *values: {"kernel": jnp.array(values)}  # noqa: E731
    grads = {
        "encoder": {
            "stem_conv": leaf(3.0),
            "stem_bn": leaf(4.0),
            "stage1_block1": leaf(1.0, 2.0),
            "embedding": leaf(2.0),
        },
        "loss": {},
    }
    norms = diagnostics.group_norms(grads)
    assert {name: float(value) for name, value in norms.items()} == pytest.approx(
        {"grad_norm/stem": 5, "grad_norm/stage1": math.sqrt(5), "grad_norm/embedding": 2}
    )
    with_head = diagnostics.group_norms({**grads, "loss": leaf(6.0, 8.0)})
    assert float(with_head["grad_norm/loss"]) == 10


def test_active_shares_by_miner_on_a_batch_done_by_hand():
    # On a line: person 0 at 0 and 1, person 1 at 1.5 and 4.5; squared distances, margin 1.
    emb, identity = jnp.array([[0.0], [1.0], [1.5], [4.5]]), jnp.array([0, 0, 1, 1])
    shares = diagnostics.active_by_miner(
        partial(losses.gathered_triplet_loss, margin=1.0), losses.gather(emb, identity, None)
    )
    # Anchor 0: d(A,P) 1, negatives 2.25 and 20.25: none active. Anchor 1: 1; 0.25 active, 12.25 not; semi-hard takes
    # 12.25. Anchor 2: 9; 2.25 and 0.25 active; nothing is farther than 9, so semi-hard takes 2.25, active. Anchor 3: 9;
    # 20.25 and 12.25: none.
    assert {name: float(value) for name, value in shares.items()} == pytest.approx(
        {"active_hardest": 2 / 4, "active_semi_hard": 1 / 4, "active_all": 3 / 8}
    )


def test_other_miners_are_measured_for_the_logged_update_alone_and_change_no_gradient():
    experiment = config.Experiment(loss=config.Triplet(margin=0.3), checkpoint=config.Checkpoint(log=5))
    loss, _ = loop.make_loss(experiment)
    draw = np.random.default_rng(3)
    emb, identity = jnp.asarray(unit(draw.normal(size=(12, 4)))), jnp.asarray(draw.integers(0, 4, 12))

    @jax.jit
    def at(step):
        return jax.value_and_grad(lambda e: loss(e, identity, {}, None, jax.random.key(0), step, None), has_aux=True)(
            emb
        )

    (value, quiet), by_emb = at(jnp.int32(3))
    (logged_value, logged), logged_by_emb = at(jnp.int32(4))
    expected = diagnostics.active_by_miner(
        partial(losses.gathered_triplet_loss, margin=0.3), losses.gather(emb, identity, None)
    )
    assert all(np.isnan(quiet[name]) for name in expected)
    assert {name: float(logged[name]) for name in expected} == pytest.approx({n: float(x) for n, x in expected.items()})
    assert 0 < float(value) == float(logged_value)
    np.testing.assert_array_equal(by_emb, logged_by_emb)


def test_the_last_part_of_a_training_has_its_own_miner():
    triplet = config.Triplet(margin=0.3, miner="semi_hard", last_miner="hardest", last_share=0.3)
    loss, _ = loop.make_loss(config.Experiment(steps=10, loss=triplet))
    draw = np.random.default_rng(4)
    emb, identity = jnp.asarray(unit(draw.normal(size=(12, 4)))), jnp.asarray(draw.integers(0, 4, 12))

    @jax.jit
    def scheduled(step):
        value = lambda e: loss(e, identity, {}, None, jax.random.key(0), step, None)[0]  # noqa: E731
        return jax.value_and_grad(value)(emb)

    def mined(miner):
        return jax.value_and_grad(lambda e: losses.triplet_loss(e, identity, margin=0.3, miner=miner)[0])(emb)

    first, last = mined("semi_hard"), mined("hardest")
    assert float(first[0]) < float(last[0])
    for step in range(10):
        value, by_emb = scheduled(jnp.int32(step))
        expected = first if step < 7 else last
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        np.testing.assert_allclose(by_emb, expected[1], atol=1e-6)


# ---- what is said ------------------------------------------------------------------------------------------------------


def rows(count, **changes):
    """Healthy updates, with some values changed: {name: {index: value}}."""
    healthy = {
        "loss": 0.15, "effective_rank": 20.0, "triplets": 96.0, "active": 0.8, "active_hardest": math.nan,
        "grad_norm/stem": 1.0, "grad_norm/stage1": 1.0, "collapsed": False, "starved": False, "finite": True,
        "statistics_finite": True, "skipped": 0,
    }  # fmt: skip
    return [
        {name: changes.get(name, {}).get(index, value) for name, value in healthy.items()} for index in range(count)
    ]


def watch(miner="semi_hard", **options):
    return diagnostics.Watch(dim=128, margin=0.2, miner=miner, **options)


def every(value, count=10, start=0):
    return dict.fromkeys(range(start, count), value)


def test_health_is_not_news():
    assert watch().read(1, rows(10), 1e-3) == []
    # Nor is one batch that happened to have no active triplet.
    assert watch().read(1, rows(10, starved={3: True}), 1e-3) == []


def test_collapse_is_told_once_with_its_step_its_cause_and_what_to_try():
    hard = watch("hardest")
    collapsed = rows(
        10, collapsed=every(True, start=4), effective_rank=every(1.02, start=4), loss=every(0.201, start=4)
    )
    (event,) = hard.read(21, collapsed, 0.02)
    assert (event.step, event.kind) == (25, "collapse")
    for part in (
        "rank 1.02 of 128",
        "loss 0.2010",
        "margin is 0.2",
        "--loss.miner semi_hard",
        "0.02",
        "--schedule.warmup",
    ):
        assert part in event.message
    assert hard.read(31, rows(10, collapsed=every(True)), 0.02) == []
    (over,) = hard.read(41, rows(10), 0.02)
    assert (over.step, over.kind) == (41, "collapse over")
    assert hard.read(51, rows(10), 0.02) == []
    # To one who mines semi-hard already, that is no advice.
    (event,) = watch().read(21, collapsed, 0.02)
    assert "--loss.miner semi_hard" not in event.message


def test_starvation_says_whether_a_harder_miner_would_still_find_something():
    starved = rows(10, starved=every(True), active=every(0.0), active_hardest={9: 0.25})
    (event,) = watch().read(1, starved, 1e-3)
    assert (event.step, event.kind) == (1, "starvation")
    assert "--loss.miner hardest" in event.message
    assert "25%" in event.message
    nothing = rows(10, starved=every(True), active=every(0.0), active_hardest={9: 0.0})
    (event,) = watch().read(1, nothing, 1e-3)
    assert "--loss.miner" not in event.message
    assert "--loss.margin (it is 0.2)" in event.message
    (event,) = watch().read(1, rows(10, starved=every(True), triplets=every(0.0)), 1e-3)
    assert "nobody in it has two photos" in event.message


def test_a_single_update_that_is_not_finite_is_told_with_what_was_not():
    bad = rows(10, finite={6: False}, loss={6: math.nan}, **{"grad_norm/stage1": {6: math.inf}})
    (event,) = watch().read(31, bad, 1e-3)
    assert (event.step, event.kind) == (37, "non-finite")
    assert "the loss and the gradient of stage1," in event.message
    assert "1 of 10 updates" in event.message
    (event,) = watch().read(31, rows(10, finite={0: False}, statistics_finite={0: False}), 1e-3)
    assert "batch statistics" in event.message
    assert "the loss" not in event.message.split(", in ")[0]


def test_what_an_earlier_command_told_is_not_told_again():
    again = watch(ongoing=["collapse"])
    assert again.read(11, rows(10, collapsed=every(True)), 1e-3) == []
    assert [event.kind for event in again.read(21, rows(10), 1e-3)] == ["collapse over"]


def test_a_row_of_the_log_averages_what_is_finite():
    means = diagnostics.means(rows(4, loss={1: math.nan, 2: 0.45}, active_hardest={3: 0.5}))
    assert means["loss"] == pytest.approx((0.15 + 0.45 + 0.15) / 3)
    assert means["active_hardest"] == 0.5
    assert not set(means) & set(diagnostics.FLAGS)
    assert math.isnan(diagnostics.means(rows(4))["active_hardest"])

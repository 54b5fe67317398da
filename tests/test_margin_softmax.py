"""CosFace and ArcFace against loops and arcface_torch's arithmetic; equal over devices; rows divided; negatives drawn."""

import dataclasses
import json
import math
import re
import shutil
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from faceembed import checkpoint, config, embed, margin_softmax
from faceembed import mesh as meshes
from faceembed.margin_softmax import MARGINS, ROWS, init_class_kernel, margin_softmax_loss
from faceembed.training import loop
from faceembed.training import step as steps

B, D, CLASSES = 16, 3, 1000
PADDED = 2 * ROWS
KEY = 5
FAST = {"xla_backend_optimization_level": 0}
MARGIN = {"cosface": 0.35, "arcface": 0.5}
draw = jax.jit(margin_softmax.drawn_rows, static_argnums=(2, 3, 4), compiler_options=FAST)


def arguments(seed, *, people=CLASSES, classes=CLASSES, rows=PADDED):
    """(emb [B, D], identity [B] with repetitions, kernel [rows, D] with rubbish behind the last class), float64."""
    rng = np.random.default_rng(seed)
    identity = rng.permutation(classes)[:people][rng.integers(0, people, B)].astype(np.int32)
    kernel = rng.normal(size=(rows, D))
    kernel[classes:] = 100
    return rng.normal(size=(B, D)), identity, kernel


def loop_loss(emb, identity, kernel, *, kind, scale, margin, compared):
    """Value and metrics, one photo and one class after another."""
    cosine = lambda a, b: a @ b / np.sqrt((a @ a + 1e-12) * (b @ b + 1e-12))  # noqa: E731
    losses, targets, others = [], [], []
    for x, y in zip(emb, identity, strict=True):
        target = cosine(x, kernel[y])
        rivals = [cosine(x, kernel[j]) for j in compared if j != y]
        if kind == "cosface":
            lowered = target - margin
        elif (angle := math.acos(target)) + margin < math.pi:
            lowered = math.cos(angle + margin)
        else:
            lowered = target - margin * math.sin(margin)
        logits = scale * np.array([lowered, *rivals])
        losses.append(logits.max() + math.log(np.exp(logits - logits.max()).sum()) - logits[0])
        targets.append(target)
        others.append(max(rivals))
    return np.mean(losses), {
        "accuracy": np.mean(np.array(targets) > others), "cos_target": np.mean(targets), "cos_other": np.mean(others),
        "classes": len(compared),
    }  # fmt: skip


def compared_classes(identity, sample):
    """Those of the batch and those drawn, from what one device draws."""
    if sample == 1:
        return list(range(CLASSES))
    drawn = draw(jax.random.key(KEY), 0, PADDED, PADDED // ROWS, sample)
    return sorted({int(row) for row in drawn if row < CLASSES} | {int(y) for y in identity})


def run(emb, identity, kernel, axis_name=None, *, kind="arcface", scale=8.0, margin=None, sample=1.0, classes=CLASSES):
    return margin_softmax_loss(
        emb, identity, kernel, classes=classes, kind=kind, scale=scale, margin=MARGIN[kind] if margin is None else margin,
        sample=sample, key=jax.random.key(KEY), axis_name=axis_name,
    )  # fmt: skip


def derived(function):
    return jax.jit(jax.value_and_grad(function, (0, 2), has_aux=True), compiler_options=FAST)


@pytest.mark.parametrize("sample", [1.0, 0.5])
@pytest.mark.parametrize("kind", MARGINS)
def test_value_metrics_and_gradient_equal_the_loops(kind, sample):
    with jax.enable_x64(True):
        emb, identity, kernel = (x[:8] if len(x) == B else x for x in arguments(1, people=5))
        emb[0] = -kernel[identity[0]]  # θ = π, beyond which the margin has a branch of its own
        emb[0, 0] += 0.1
        found = derived(partial(run, kind=kind, sample=sample))
        (value, metrics), grads = jax.device_get(found(emb, identity, kernel))
    compared = compared_classes(identity, sample)
    # Drawn without the batch's own, some are in both sets.
    assert sample == 1 or 500 < len(compared) < 600
    oracle = partial(loop_loss, kind=kind, scale=8.0, margin=MARGIN[kind], compared=compared)
    expected, expected_metrics = oracle(emb, identity, kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert metrics.keys() == expected_metrics.keys()
    for name, number in metrics.items():
        np.testing.assert_allclose(number, expected_metrics[name], rtol=1e-12, err_msg=name)
    # Numerical slopes along random directions, and along single rows: of the batch, another, not compared, padding.
    rng = np.random.default_rng(2)
    idle = next((j for j in range(CLASSES) if j not in compared), CLASSES + 3)
    directions = [(rng.normal(size=emb.shape), 0 * kernel), (0 * emb, rng.normal(size=kernel.shape))]
    for row in (identity[0], compared[7], idle, CLASSES + 1):
        directions.append((0 * emb, 0 * kernel))
        directions[-1][1][row] = rng.normal(size=D)
    for a, b in directions:
        h = 1e-6
        up, down = (oracle(emb + sign * h * a, identity, kernel + sign * h * b)[0] for sign in (1, -1))
        slope = np.sum(grads[0] * a) + np.sum(grads[1] * b)
        np.testing.assert_allclose(slope, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)
    for row in (idle, CLASSES, PADDED - 1):
        assert not grads[1][row].any()
    assert np.count_nonzero(grads[1].any(1)) == len(compared)


def arcface_torch(emb, identity, kernel, *, kind, scale, margin):
    """Value and gradients as arcface_torch's losses.py, partial_fc_v2.py and DistCrossEntropy compute them."""
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (emb, kernel)]
    x, w = emb / lengths[0], kernel / lengths[1]
    logits = (x @ w.T).clip(-1, 1)
    index = np.arange(len(emb)), identity
    target, slope = logits[index], 1.0
    if kind == "cosface":
        final = target - margin
    else:
        sine = np.sqrt(1 - target**2)
        inside = target > math.cos(math.pi - margin)
        final = np.where(
            inside, target * math.cos(margin) - sine * math.sin(margin), target - math.sin(math.pi - margin) * margin
        )
        slope = np.where(inside, math.cos(margin) + target / sine * math.sin(margin), 1.0)
    logits[index] = final
    logits *= scale
    logits = np.exp(logits - logits.max(1, keepdims=True))
    logits /= logits.sum(1, keepdims=True)
    value = -np.log(logits[index]).mean()
    logits[index] -= 1
    logits[index] *= slope
    by_cosine = scale * logits / len(emb)
    through = lambda g, unit, length: (g - unit * (g * unit).sum(1, keepdims=True)) / length  # noqa: E731
    return value, (through(by_cosine @ w, x, lengths[0]), through(by_cosine.T @ x, w, lengths[1]))


@pytest.mark.parametrize("kind", MARGINS)
def test_the_defaults_equal_arcface_torch(kind):
    defaults = dataclasses.asdict(config.CHOICES["loss"][kind])
    assert defaults == {"scale": 64.0, "margin": MARGIN[kind], "sample": 1.0}
    rng = np.random.default_rng(7)
    emb, kernel, identity = rng.normal(size=(B, D)), rng.normal(size=(30, D)), rng.integers(0, 30, B).astype(np.int32)
    emb[:3] = -kernel[identity[:3]] + 0.1
    emb[3:5] = kernel[identity[3:5]] + 0.1
    with jax.enable_x64(True):
        (value, _), grads = derived(partial(run, kind=kind, scale=64.0, classes=30))(emb, identity, kernel)
    expected, expected_grads = arcface_torch(emb, identity, kernel, kind=kind, scale=64.0, margin=MARGIN[kind])
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


# --- Devices


def mesh_of(n):
    return Mesh(jax.devices()[:n], ("data",), axis_types=(AxisType.Auto,))


def all_kinds(embs, identity, kernels, axis_name=None):
    """{(kind, sample): (value, metrics)}, each with arrays of its own, hence its own gradient."""
    return {name: run(embs[name], identity, kernels[name], axis_name, kind=name[0], sample=name[1]) for name in embs}


def summed(*arguments, run=all_kinds):
    out = run(*arguments)
    return sum(value for value, _ in out.values()), out


def under_shard_map(n, check_vma):
    data = P("data")
    mapped = jax.shard_map(
        partial(all_kinds, axis_name="data"), mesh=mesh_of(n), in_specs=(data, data, data), out_specs=P(),
        check_vma=check_vma,
    )  # fmt: skip
    return partial(summed, run=mapped)


def under_jit(n):
    shard = NamedSharding(mesh_of(n), P("data"))
    return partial(summed, run=jax.jit(all_kinds, in_shardings=shard))


SPREADS = {
    **{f"shard_map on {n}": partial(under_shard_map, n, True) for n in (1, 2, 4, 8)},
    "shard_map on 8, unchecked": partial(under_shard_map, 8, False),
    "jit on 4": partial(under_jit, 4),
}
BATCHES = (CLASSES, 9, 1)


def spread_arguments(seed, people):
    emb, identity, kernel = arguments(seed, people=people)
    names = [("cosface", 1.0), ("arcface", 1.0), ("arcface", 0.5)]
    return dict.fromkeys(names, emb), identity, dict.fromkeys(names, kernel)


@cache
def on_one_device():
    found = derived(summed)
    return [jax.device_get(found(*spread_arguments(seed, people))) for seed, people in enumerate(BATCHES)]


@pytest.mark.parametrize("spread", SPREADS)
def test_any_number_of_devices_gives_the_same_value_metrics_and_gradient(spread):
    with jax.enable_x64(True):
        found = derived(SPREADS[spread]())
        for seed, (people, expected) in enumerate(zip(BATCHES, on_one_device(), strict=True)):
            got = jax.device_get(found(*spread_arguments(seed, people)))
            for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=jax.tree_util.keystr(path))


def compiled(sample, n=8, classes=20_000, batch=32, dim=16):
    rows = margin_softmax.padded_rows(classes)
    data = P("data")
    loss = jax.shard_map(
        lambda emb, identity, kernel: run(emb, identity, kernel, "data", sample=sample, classes=classes)[0],
        mesh=mesh_of(n), in_specs=(data, data, data), out_specs=P(),
    )  # fmt: skip
    shapes = (((batch, dim), np.float32), ((batch,), np.int32), ((rows, dim), np.float32))
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh_of(n), data)) for shape in shapes]
    return jax.jit(jax.value_and_grad(loss, (0, 2))).lower(*arrays).compile()


def test_no_device_holds_the_rows_or_logits_of_another():
    program = compiled(1.0)
    text, rows = program.as_text(), margin_softmax.padded_rows(20_000)
    shapes = [[int(size) for size in shape.split(",")] for shape in re.findall(r"[a-z]\d+\[([\d,]+)\]", text)]
    assert max(size for shape in shapes for size in shape) == rows // 8
    assert max(math.prod(shape) for shape in shapes) == 32 * rows // 8
    gathered = re.findall(r"= \(?[a-z]\d+\[([\d,]+)\]\S* all-gather", text)
    assert gathered, "embeddings travel"
    assert set(gathered) <= {"32,16", "32"}, "and rows never do"


def test_a_sample_needs_that_much_less_memory_and_work():
    everything, tenth = compiled(1.0), compiled(0.1)
    memory = [program.memory_analysis().temp_size_in_bytes for program in (everything, tenth)]
    # The gradient of all rows of a device stays.
    gradient = 4 * 16 * margin_softmax.padded_rows(20_000) // 8
    assert memory[1] - gradient < 0.35 * (memory[0] - gradient)
    work = [program.cost_analysis()["flops"] for program in (everything, tenth)]
    assert work[1] < 0.35 * work[0]


@pytest.mark.parametrize(("batch", "columns"), [(64, 96 + 64), (512, 288)])
def test_a_sample_never_makes_more_columns_than_a_device_has_rows(batch, columns):
    """2,000 people are 288 rows a device, of which a third is drawn; all photos may be of people of one device."""
    text = compiled(0.1, classes=2000, batch=batch, dim=4).as_text()
    widths = {int(width) for width in re.findall(rf"f32\[{batch},(\d+)\]", text)}
    assert max(widths) == columns


# --- Which rows are drawn


def test_every_class_is_drawn_equally_often_and_at_most_once():
    size, draws = 5, 256
    rows = np.array([draw(key, 0, ROWS * size, size, 0.4) for key in jax.random.split(jax.random.key(0), draws)])
    assert rows.shape == (draws, 2 * ROWS)
    assert all(len(set(drawn)) == len(drawn) for drawn in rows.tolist())
    counts = np.bincount(rows.ravel(), minlength=ROWS * size)
    score = (counts - 0.4 * draws) / math.sqrt(draws * 0.4 * 0.6)
    assert np.abs(score).max() < 5
    # Each place in a block alone, too: a bias that is the same in all blocks.
    places = counts.reshape(ROWS, size).mean(0)
    assert np.abs(places - 0.4 * draws).max() < 5 * math.sqrt(draws * 0.4 * 0.6 / ROWS)
    # Blocks are drawn independently of each other.
    inside = (np.sort(rows[0].reshape(ROWS, 2) % size, 1) == [0, 1]).all(1).mean()
    assert 0.05 < inside < 0.15


@pytest.mark.parametrize(("sample", "of_hundred"), [(0.07, 7), (0.071, 8), (1.0, 100), (1e-9, 1)])
def test_a_share_is_rounded_up_in_each_block(sample, of_hundred):
    drawn = draw(jax.random.key(1), 0, 300, 100, sample)
    assert np.bincount(np.asarray(drawn) // 100).tolist() == [of_hundred] * 3


def test_what_is_drawn_follows_from_key_and_row_alone():
    key, size = jax.random.key(3), 4
    whole = np.asarray(draw(key, 0, ROWS * size, size, 0.5))
    share = ROWS * size // 8
    parts = [draw(key, i * share, share, size, 0.5) + i * share for i in range(8)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert (np.asarray(draw(jax.random.key(4), 0, ROWS * size, size, 0.5)) != whole).mean() > 0.3


# --- The edges


@pytest.mark.parametrize("angle", [0.0, 1e-4, math.pi - 1e-4, math.pi])
def test_the_gradient_is_finite_where_the_own_angle_is_0_or_pi(angle):
    kernel = np.eye(4, dtype=np.float32)[:, :2]
    kernel[2:] = [[0.6, 0.8], [-0.6, 0.8]]
    emb = np.array([[math.cos(angle), math.sin(angle)]], np.float32)
    (value, _), grads = derived(partial(run, classes=4, scale=64.0))(emb, np.zeros(1, np.int32), kernel)
    assert np.isfinite(value)
    for grad in grads:
        assert np.abs(grad).max() <= 64.001  # s sin(θ + m) for the target and s for the rival at most


def test_a_cosine_that_rounding_put_beyond_one_has_a_finite_slope():
    for cosine in (1.0, 1 + 1e-6, -1.0, -1 - 1e-6):
        value, slope = jax.value_and_grad(margin_softmax.arcface)(jnp.float32(cosine), 0.5)
        assert np.isfinite(value)
        assert slope == pytest.approx(math.cos(0.5) if cosine > 0 else 1)


def test_arcface_falls_with_the_angle_all_the_way():
    angle = np.linspace(0, math.pi, 1001)
    lowered = jax.jit(partial(margin_softmax.arcface, margin=0.5))(np.cos(angle).astype(np.float32))
    assert (np.diff(lowered) < 0).all()
    np.testing.assert_allclose(lowered[angle < math.pi - 0.51], np.cos(angle + 0.5)[angle < math.pi - 0.51], atol=1e-5)


def test_scales_and_lengths_do_not_overflow():
    kernel = np.array([[1, 0], [-1, 0], [0, 1e3]], np.float32)
    emb = np.array([[1e4, 0], [-1e-3, 0], [0, 0]], np.float32)
    ids = np.array([1, 1, 2], np.int32)
    (value, metrics), grads = derived(partial(run, classes=3, scale=500.0))(emb, ids, kernel)
    assert np.isfinite(value)
    # The first photo's own class is opposite: s (1 + cos(π) … ), all of it.
    assert value > 300
    assert all(np.isfinite(grad).all() for grad in grads)
    assert metrics["accuracy"] == pytest.approx(1 / 3)


def test_a_tie_is_a_miss_and_nan_and_unknown_people_reach_the_loss():
    kernel = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    emb = np.array([[1, 0], [0, 1]], np.float32)
    ids = np.array([0, 2], np.int32)
    found = derived(partial(run, classes=3))
    assert found(emb, ids, kernel)[0][1]["accuracy"] == 0.5
    for bad in (np.array([-1, 2], np.int32), np.array([0, 3], np.int32)):
        assert np.isnan(found(emb, bad, kernel)[0][0])
    for spoiled in ((emb * [[np.nan, 1]], kernel), (emb, kernel * [[1, 1], [np.inf, 1], [1, 1]])):
        value, metrics = found(spoiled[0].astype(np.float32), ids, spoiled[1].astype(np.float32))[0]
        assert np.isnan(value)
        assert np.isnan(metrics["cos_other"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sphereface"}, "try one of cosface, arcface"),
        ({"scale": 0.0}, "expected scale > 0"),
        ({"sample": 0.0}, "0 < sample ≤ 1"),
        ({"sample": 0.5, "key": None}, "key missing"),
        ({"sample": 0.5}, r"padded_rows\(classes\) = 768"),
        ({"classes": 5}, "classes is 5 and the kernel has 4 rows"),
        ({"classes": 1}, "compared with one other class"),
        ({"emb": np.zeros((2, 3), np.int32)}, "pass float embeddings"),
        ({"identity": np.zeros(3, np.int32)}, "one integer person id a row"),
        ({"kernel": np.zeros((4, 2), np.float32)}, r"\[c, 3\]"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    given = {
        "emb": np.zeros((2, 3), np.float32), "identity": np.zeros(2, np.int32), "kernel": np.ones((4, 3), np.float32),
        "classes": 4, "kind": "cosface", "scale": 8.0, "margin": 0.1, "key": jax.random.key(0),
    } | change  # fmt: skip
    arrays = [jnp.asarray(given.pop(name)) for name in ("emb", "identity", "kernel")]
    with pytest.raises(ValueError, match=message):
        margin_softmax_loss(*arrays, **given)


# --- The kernel, and training with it


def test_a_fresh_kernel_is_the_same_on_any_devices_and_none_holds_more_than_its_share():
    kernels = {n: init_class_kernel(1000, 8, seed=3, mesh=meshes.make_mesh(n)) for n in (1, 3, 8)}
    assert margin_softmax.padded_rows(1) == 768
    assert margin_softmax.padded_rows(768) == 768
    for n, kernel in kernels.items():
        assert kernel.shape == (1536, 8)
        assert [shard.data.shape for shard in kernel.addressable_shards] == [(1536 // n, 8)] * n
        np.testing.assert_array_equal(kernel, kernels[1])
    values = np.asarray(kernels[1])
    assert not values[1000:].any()
    assert values[:1000].std() == pytest.approx(0.01, rel=0.05)
    assert len(np.unique(values[:1000])) > 7900
    # A class keeps its row when there are more of them; another seed draws others.
    fewer, others = (np.asarray(init_class_kernel(700, 8, seed=seed, mesh=meshes.make_mesh(2))) for seed in (3, 4))
    np.testing.assert_array_equal(fewer[:700], values[:700])
    assert not (others[:700] == values[:700]).any(1).any()


def test_device_counts_that_do_not_divide_the_rows_say_what_to_type():
    for devices in (1, 2, 3, 4, 6, 8, 12, 64, 256):
        margin_softmax.check_devices(devices)
    with pytest.raises(ValueError, match="do not divide over 5 devices. Try --devices 4"):
        init_class_kernel(10, 2, seed=0, mesh=meshes.make_mesh(5))
    with pytest.raises(ValueError, match="Try --devices 6"):
        margin_softmax.check_devices(7)


EXPERIMENT = config.Experiment(
    steps=6,
    preprocess=config.Preprocess(size=16),
    encoder=config.ConvNet(widths=(4,), blocks=(1,), dim=8),
    batch=config.Batch(people=6, photos=4),
    loss=config.ArcFace(scale=16.0, margin=0.1, sample=0.5),
    schedule=config.Schedule(warmup=1, learning_rate=5e-3),
    checkpoint=config.Checkpoint(every=3, log=2, keep_best=2),
)


@pytest.mark.parametrize("kind", MARGINS)
def test_a_training_has_the_loss_that_is_named_and_draws_anew_in_each_update(monkeypatch, kind):
    seen = []
    monkeypatch.setattr(margin_softmax, "margin_softmax_loss", lambda *_, **options: seen.append(options))
    named = config.CHOICES["loss"][kind]
    loss, params = loop.make_loss(dataclasses.replace(EXPERIMENT, loss=named), classes=9, mesh=meshes.make_mesh(1))
    for key in (0, 1):
        loss(None, None, params, None, jax.random.key(key), None, "data")
        expected = {"kind": kind, "classes": 9, "axis_name": "data", "key": jax.random.key(key)}
        assert seen.pop() == expected | dataclasses.asdict(named)


def test_rows_of_people_decay_as_kernels_do():
    params = {
        "encoder": {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)},
        "loss": {meshes.CLASS_KERNEL: jnp.ones((2, 2))},
    }
    decayed = jax.tree_util.tree_map_with_path(steps.decays, params)
    assert decayed == {"encoder": {"kernel": True, "scale": False}, "loss": {meshes.CLASS_KERNEL: True}}


def state_on(devices, classes):
    """A fresh state of `EXPERIMENT` as the trainer lays it out."""
    mesh = meshes.make_mesh(devices)
    _, loss_params = loop.make_loss(EXPERIMENT, classes=classes, mesh=mesh)
    optimizer, _ = steps.make_optimizer(
        optax.scale_by_adam(), learning_rate=1e-3, warmup=1, steps=6, weight_decay=1e-4, clip_norm=1.0
    )
    encoder = embed.build_encoder(EXPERIMENT)
    state = steps.init_state(encoder, optimizer, seed=0, size=16, loss_params=loss_params, dtype=jnp.float32)
    return jax.device_put(state, meshes.state_sharding(mesh, state))


def kernels_of(state):
    """The rows and what else has their shape, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in leaves
        if any(getattr(part, "key", None) == meshes.CLASS_KERNEL for part in path)
    }


def test_a_run_saves_divided_rows_goes_on_with_other_devices_and_evaluation_never_reads_them(
    tmp_path, monkeypatch, noise_photos
):
    monkeypatch.setattr(loop, "open_data", lambda *_, **__: noise_photos)
    monkeypatch.setattr(loop.evaluate, "final_report", lambda *_, **__: {})
    # Augmentation is most of what would be compiled.
    monkeypatch.setattr(loop, "make_views", lambda _: lambda step, slot, images: images[:, :16, :16] / 127.5 - 1.0)
    five = dataclasses.replace(EXPERIMENT, batch=config.Batch(people=10, photos=4))
    with pytest.raises(ValueError, match="do not divide over 5 devices"):
        loop.train(five, tmp_path / "five", devices=5, progress=False)
    make = loop.steps.make_train_step

    def quickly_compiled(*arguments, **options):
        update, programs = make(*arguments, **options), []

        def call(state, batch):
            programs.extend([] if programs else [update.lower(state, batch).compile(compiler_options=FAST)])
            return programs[0](state, batch)

        return call

    monkeypatch.setattr(loop.steps, "make_train_step", quickly_compiled)

    run, states = tmp_path / "run", []
    save = checkpoint.Checkpoints.save
    monkeypatch.setattr(
        checkpoint.Checkpoints, "save", lambda self, state, *rest: states.append(state) or save(self, state, *rest)
    )
    loop.train(EXPERIMENT, run, devices=2, progress=False)
    measured = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [row for row in measured if "loss" in row]
    assert {"accuracy", "cos_target", "cos_other", "grad_norm/loss"} <= set(measured[0])
    assert all(row["skipped"] == 0 for row in measured)
    classes = json.loads(next((run / "checkpoints" / "6" / "data").glob("metadata")).read_text())["people"]
    assert measured[0]["classes"] == classes > 90
    final = kernels_of(states[-1])
    assert len(final) == 3, "the rows and their two moments"
    for kernel in final.values():
        assert kernel.shape == (768, 8)
        assert [shard.data.shape for shard in kernel.addressable_shards] == [(384, 8)] * 2
        assert np.asarray(kernel)[:classes].any(1).all()
        assert not np.asarray(kernel)[classes:].any()

    # ---- restored on one device and on four: the same numbers, laid out anew
    for devices in (1, 4):
        with checkpoint.Checkpoints(run) as checkpoints:
            restored = kernels_of(checkpoints.restore(state_on(devices, classes)))
        assert restored.keys() == final.keys()
        for name, kernel in restored.items():
            np.testing.assert_array_equal(kernel, final[name])
            assert [shard.data.shape for shard in kernel.addressable_shards] == [(768 // devices, 8)] * devices

    # ---- evaluation reads none of it
    read, original = [], ocp.type_handlers.NumpyHandler.deserialize

    async def spying(self, infos, args=None):
        read.extend(info.name for info in infos)
        return await original(self, infos, args)

    with monkeypatch.context() as patched:
        patched.setattr(ocp.type_handlers.NumpyHandler, "deserialize", spying)
        embedder = embed.load(run)
    assert [name for name in read if name.startswith("ema")]
    assert not [name for name in read if not name.startswith("ema")]

    # ---- nor does a training that starts from it
    fresh = state_on(2, classes)
    started, _ = loop.start_from(embedder, "run", fresh)
    np.testing.assert_array_equal(*(state.params["loss"][meshes.CLASS_KERNEL] for state in (started, fresh)))

    # ---- and four devices go on from step 3 as two did
    shutil.rmtree(run / "checkpoints" / "6")
    loop.train(EXPERIMENT, run, devices=4, progress=False)
    assert len(states) == 3
    for name, kernel in kernels_of(states[-1]).items():
        assert len(kernel.addressable_shards) == 4
        np.testing.assert_allclose(kernel, final[name], rtol=1e-3, atol=1e-3 * np.abs(final[name]).max())


def test_the_experiment_trains_its_losses_measures_strangers_and_does_not_train_again(
    tmp_path, monkeypatch, noise_photos, capsys
):
    from experiments import margin_softmax as experiment
    from faceembed import evaluate
    from faceembed.data import pairs

    monkeypatch.setattr(loop, "open_data", lambda *_, **__: noise_photos)
    monkeypatch.setattr(loop, "make_views", lambda _: lambda step, slot, images: images[:, :16, :16] / 127.5 - 1.0)
    people = {"all:lfw:dev_test": noise_photos}
    monkeypatch.setattr(pairs, "load_people", lambda spec: people[spec])
    monkeypatch.setattr(experiment, "_BASE", EXPERIMENT)
    monkeypatch.setattr(experiment, "LOSSES", {"arcface": experiment.LOSSES["arcface_gentle"]})
    monkeypatch.setattr(experiment, "REFERENCE", "arcface")
    monkeypatch.setattr(sys, "argv", ["margin_softmax", "--seeds", "3", "--steps", "2", "--runs", str(tmp_path)])
    experiment.main()
    ((row,), printed) = json.loads((tmp_path / "results.json").read_text())["rows"], capsys.readouterr().out
    emb, _ = evaluate.embed_photos(embed.load(tmp_path / "arcface-3"), noise_photos, progress=False)
    assert row["AUC"] == [experiment.measure(emb, noise_photos.identity).auc]
    table = printed[printed.rindex("loss ") :]
    assert f"{100 * row['AUC'][0]:.2f} %" in table

    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("it is trained already"))
    experiment.main()
    assert capsys.readouterr().out.strip() == table.strip()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "embed_photos", lambda *_, **__: pytest.fail("they are embedded already"))
        experiment.main()
        assert capsys.readouterr().out.strip() == table.strip()
    # Other photos of LFW are measured anew.
    couples = np.arange(480) // 8
    people["all:lfw:dev_test"] = dataclasses.replace(noise_photos, identity=couples, fingerprint="other")
    experiment.main()
    (other,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert other["AUC"] == [experiment.measure(emb, couples).auc]

    monkeypatch.setattr(sys, "argv", ["margin_softmax", "--seeds", "3", "--steps", "4", "--runs", str(tmp_path)])
    with pytest.raises(ValueError, match="(?s)arcface-3.*other settings:.*steps: 2 there, 4 now.*another --runs"):
        experiment.main()


def test_the_experiment_holds_each_loss_against_triplets_of_the_same_seeds():
    from experiments import margin_softmax as experiment

    auc = {("triplet", 0): 0.80, ("triplet", 1): 0.84, ("triplet", 2): 0.5, ("cosface", 1): 0.83, ("cosface", 0): 0.78,
           ("arcface", 0): 0.7}  # fmt: skip
    # What people weigh in both is no part of the difference.
    influence = {"triplet": [0.3, 0.0], "cosface": [0.31, 0.0], "arcface": [0.0, 0.0]}
    found = {
        run: {
            "auc": value,
            "tar": value / 2,
            "influence": [run[1] + x for x in influence[run[0]]],
            "loss": 1.0,
            "effective_rank": 2.0,
        }
        for run, value in auc.items()
    }
    triplet, cosface, arcface = experiment.summary(found)
    assert (triplet["loss"], triplet["AUC"]) == ("triplet", [0.80, 0.84, 0.5])
    assert cosface["seeds"] == [1, 0]
    # Means of -0.01 and -0.02; Student's t of one degree of freedom; and a variance of 0.01² over people.
    half = 12.7062 * np.sqrt(0.005**2)
    assert cosface["difference"]["value"] == pytest.approx(-0.015)
    np.testing.assert_allclose(cosface["difference"]["seeds"], (-0.015 - half, -0.015 + half), rtol=1e-4)
    half = 12.7062 * np.hypot(0.005, 0.01)
    np.testing.assert_allclose(cosface["difference"]["people"], (-0.015 - half, -0.015 + half), rtol=1e-4)
    assert cosface["difference of the TAR"]["value"] == pytest.approx(-0.0075)
    assert cosface["difference of the TAR"]["people"] is None
    assert "difference" not in arcface  # one seed tells nothing of others
    assert "-1.50 [" in experiment.table([triplet, cosface, arcface])

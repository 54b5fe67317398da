"""Starting from another network: what is taken over, what stays, and how fast the rest learns."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest
from test_step import SIZE, TINY, batches

from faceembed import checkpoint, config, embed, evaluate
from faceembed import mesh as meshes
from faceembed.training import loop, transfer
from faceembed.training import step as steps

NAMES = {"stem_conv": {"kernel": 0}, "stem_bn": {"scale": 0, "bias": 0}, "stage1_block1": {"conv1": {"kernel": 0}}}


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("stem_conv", {"stem_conv/kernel"}),
        ("stem*", {"stem_conv/kernel", "stem_bn/scale", "stem_bn/bias"}),
        ("stage[12]_block1/conv1", {"stage1_block1/conv1/kernel"}),
        ("*/bias", {"stem_bn/bias"}),
    ],
)
def test_patterns_name_layers_and_all_that_is_in_them(pattern, chosen):
    frozen = transfer.frozen_by([pattern], NAMES)
    assert {name for name in transfer.names_of(NAMES) if frozen(name)} == chosen


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: transfer.frozen_by(["stm*"], NAMES),
            "--freeze has the pattern 'stm\\*', which fits no layer; there are",
        ),
        (lambda: transfer.frozen_by(["*"], NAMES), "freezes every parameter"),
        (lambda: transfer.rates_by(["stem*"], NAMES), "expected PATTERN=FACTOR"),
        (lambda: transfer.rates_by(["stem*=0"], NAMES), "factor above 0"),
        (lambda: transfer.rates_by(["stem*=nan"], NAMES), "factor above 0"),
        (lambda: transfer.rates_by(["steam=0.1"], NAMES), "--layer-rates has the pattern 'steam'"),
    ],
)
def test_patterns_that_cannot_be_meant(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_last_rule_that_fits_counts():
    rate = transfer.rates_by(["*=0.5", "stem*=0.1", "stem_bn/bias=2"], NAMES)
    assert [rate(name) for name in ("stage1_block1/conv1/kernel", "stem_conv/kernel", "stem_bn/bias")] == [0.5, 0.1, 2]


def trained(experiment, count=6):
    """The encoder's parameters and statistics before and after some updates."""
    mesh = meshes.make_mesh(2)
    encoder = embed.build_encoder(experiment)
    loss, loss_params = loop.make_loss(experiment)
    shapes = jax.eval_shape(
        lambda: encoder.init(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.float32), train=False)
    )["params"]
    frozen = transfer.frozen_by(experiment.freeze, shapes) if experiment.freeze else None
    by_layer = transfer.scale_by_layer(
        transfer.rates_by(experiment.layer_rates, shapes), frozen or (lambda name: False)
    )
    optimizer, _ = steps.make_optimizer(
        optax.scale_by_adam(),
        learning_rate=1e-2,
        warmup=2,
        steps=20,
        weight_decay=0.1,
        clip_norm=0.5,
        by_layer=by_layer,
    )
    state = steps.init_state(encoder, optimizer, seed=3, size=SIZE, loss_params=loss_params, dtype=np.float32)
    shardings = meshes.state_sharding(mesh, state)
    state = jax.device_put(state, shardings)
    before = jax.device_get((state.params["encoder"], state.batch_stats))
    update = steps.make_train_step(
        encoder,
        loss,
        optimizer,
        loop.make_views(experiment),
        seed=3,
        ema=0.9,
        mesh=mesh,
        shardings=shardings,
        frozen=frozen,
    )
    for batch in meshes.to_devices(batches(count), mesh):
        state, measured = update(state, batch)
    assert int(measured["skipped"]) == 0
    after = jax.device_get((state.params["encoder"], state.batch_stats))
    return before, after, jax.device_get(state.ema), jax.device_get(measured)


def test_frozen_layers_keep_every_bit_statistics_and_averages_too_and_others_learn():
    frozen = ("stem*", "stage1_block1")
    before, after, ema, measured = trained(dataclasses.replace(TINY, freeze=frozen))
    # Not only is it not applied: the gradient of frozen layers is not part of the norm that clips the others'.
    assert measured["grad_norm/stem"] == 0 < measured["grad_norm/stage2"]
    for part, averaged in enumerate(("params", "batch_stats")):
        for name in before[part]:
            same = jax.tree.map(np.array_equal, before[part][name], after[part][name])
            kept = name.startswith("stem") or name == "stage1_block1"
            assert all(jax.tree.leaves(same)) if kept else not any(jax.tree.leaves(same)), name
            if kept:  # the averages, which are what is evaluated, too
                jax.tree.map(np.testing.assert_array_equal, before[part][name], ema[averaged][name])


@pytest.mark.parametrize("patterns", [("*bn*/*",), ("*bn*/scale", "*bn*/bias"), ("*_bn", "stage*")])
def test_a_norm_whose_parameters_are_all_frozen_keeps_its_statistics(patterns):
    before, after, *_ = trained(dataclasses.replace(TINY, freeze=patterns), count=2)
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
    assert not np.array_equal(before[0]["embedding"]["kernel"], after[0]["embedding"]["kernel"])


def test_frozen_updates_are_zero_whatever_they_were_and_the_losss_keep_their_rate():
    updates = {"encoder": {"a": np.full(2, np.nan), "b": np.ones(2)}, "loss": {"a": np.ones(2)}}
    rule = transfer.scale_by_layer(lambda name: 0.5, lambda name: name == "a")
    scaled, _ = rule.update(updates, rule.init(updates), updates)
    np.testing.assert_array_equal(scaled["encoder"]["a"], 0)
    np.testing.assert_array_equal(scaled["encoder"]["b"], 0.5)
    np.testing.assert_array_equal(scaled["loss"]["a"], 1)


def test_frozen_norms_read_their_running_statistics_in_training_too():
    """With all norms frozen, a photo's embedding in training does not depend on the others of its batch."""
    encoder = embed.build_encoder(TINY)
    images = np.random.default_rng(0).normal(size=(6, SIZE, SIZE, 3)).astype(np.float32)
    variables = encoder.init(jax.random.key(0), images)

    def embedded(photos):
        return np.asarray(encoder.apply(variables, photos, train=True, mutable=["batch_stats"])[0])

    assert np.abs(embedded(images)[:2] - embedded(images[:2])).max() > 1e-3
    with transfer.evaluate_frozen(lambda name: True):
        np.testing.assert_allclose(embedded(images)[:2], embedded(images[:2]), atol=1e-5)
        expected = np.asarray(encoder.apply(variables, images, train=False))
        np.testing.assert_allclose(embedded(images), expected, atol=1e-6)


def test_a_layers_rate_multiplies_its_first_step():
    """Adam's first steps do not depend on the gradient's size: the changes show the rates alone."""
    before, plain, *_ = trained(TINY, count=1)
    same, slowed, *_ = trained(dataclasses.replace(TINY, layer_rates=("stage*=0.25",)), count=1)
    jax.tree.map(np.testing.assert_array_equal, before, same)
    for name in before[0]:
        factor = 0.25 if name.startswith("stage") else 1.0
        change, slow = (
            np.concatenate(
                [leaf.ravel() for leaf in jax.tree.leaves(jax.tree.map(np.subtract, after[0][name], before[0][name]))]
            )
            for after in (plain, slowed)
        )
        np.testing.assert_allclose(slow, factor * change, rtol=2e-3, atol=1e-7)


def drawn(*, dim, seed):
    """Variables of the tiny encoder, every one random, running statistics too."""
    encoder = embed.build_encoder(dataclasses.replace(TINY, encoder=dataclasses.replace(TINY.encoder, dim=dim)))
    variables = encoder.init(jax.random.key(seed), np.zeros((1, SIZE, SIZE, 3), np.float32))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), jax.device_get(variables))


def test_what_has_another_shape_starts_afresh_and_is_told():
    fresh, found = drawn(dim=5, seed=0), drawn(dim=8, seed=1)
    variables, stayed = transfer.taken_over(fresh, found)
    assert {line.split("/")[0] for line in stayed} == {"embedding", "embedding_bn"}
    assert any(line.startswith("embedding/kernel [") and "there [" in line for line in stayed)
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["stem_conv"], found["params"]["stem_conv"])
    jax.tree.map(np.testing.assert_array_equal, variables["params"]["embedding"], fresh["params"]["embedding"])
    for name, origin in (("stem_bn", found), ("embedding_bn", fresh)):
        jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"][name], origin["batch_stats"][name])
    del found["params"]["stem_conv"]
    with pytest.raises(ValueError, match=r"another kind of encoder: 1 parameters .* stem_conv/kernel"):
        transfer.taken_over(fresh, found)


def shapes_of(experiment):
    """{"params", "batch_stats"} of an experiment's encoder, abstract."""
    encoder, side = embed.build_encoder(experiment), experiment.preprocess.size
    return jax.eval_shape(lambda: encoder.init(jax.random.key(0), np.zeros((1, side, side, 3), np.float32)))


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A checkpoint written from variables at hand."""
    run = tmp_path_factory.mktemp("origin") / "run"
    variables = drawn(dim=TINY.encoder.dim, seed=5)
    before = {"source": "lfw", "people": 0, "people_hashes": []}
    data = {"source": "elsewhere", "people": 1, "photos": 2, "people_hashes": ["abc"], "fingerprint": "f",
            "notes": ["from far away"], "init": before}  # fmt: skip
    checkpoint.write(run, TINY, variables, data)
    return run, variables


def test_written_variables_are_a_checkpoint_like_any_other(origin):
    run, variables = origin
    embedder = embed.load(run)
    assert checkpoint.fingerprint(embedder.variables) == checkpoint.fingerprint(
        {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    )
    assert embedder.data["people_hashes"] == ["abc"]
    assert embedder.config == TINY
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    assert np.isfinite(embedder(images)).all()
    with pytest.raises(FileExistsError, match="is not empty"):
        checkpoint.write(run, TINY, variables, {})


def test_a_start_takes_every_array_over_averages_too_and_tells_where_it_came_from(origin):
    run, variables = origin
    mesh_free = steps.init_state(
        embed.build_encoder(TINY), optax.identity(), seed=1, size=SIZE, loss_params={"w": np.ones(2)}, dtype=np.float32
    )
    opened = loop.open_origin(dataclasses.replace(TINY, init=str(run)), shapes_of(TINY))
    state, about = loop.start_from(opened, str(run), mesh_free)
    started = {"params": state.params["encoder"], "batch_stats": state.batch_stats}
    for tree in (started, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, variables)
    np.testing.assert_array_equal(state.params["loss"]["w"], np.ones(2))
    assert about == {
        "checkpoint": str(run), "fingerprint": checkpoint.fingerprint(variables), "source": "elsewhere", "people": 1,
        "people_hashes": ["abc"], "notes": ["from far away"], "afresh": [],
        "init": {"source": "lfw", "people": 0, "people_hashes": []},
    }  # fmt: skip


def test_the_first_network_of_a_line_counts(origin):
    """Somebody who saw LFW, then trained elsewhere, then again: its embeddings have still seen LFW."""
    third = {"source": "celeba", "people": 5, "init": {"source": "celeba", "people": 3, "init": {"source": "lfw"}}}
    assert [part["source"] for part in evaluate.lineage(third)] == ["celeba", "celeba", "lfw"]
    assert evaluate.saw_lfw(third)
    assert evaluate.saw_lfw({"source": "celeba_lfw"})
    assert not evaluate.saw_lfw(third["init"] | {"init": None})
    # Its own training people are known, those of the network before the last are not.
    (warning,) = evaluate.trained_on(embed.load(origin[0]), np.array(["Nobody"]))
    assert "does not say whom it was trained on" in warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"preprocess": config.Preprocess(size=SIZE, mean=100.0)},
            "preprocess.mean = 127.5.*Try --preprocess.mean 127.5",
        ),
        ({"preprocess": config.Preprocess(size=SIZE, colour="bgr", scale=128.0)},
         "--preprocess.scale 127.5 --preprocess.colour rgb"),
        ({"encoder": config.MobileFaceNet()}, "holds a convnet, and this experiment trains a mobilefacenet"),
        ({"encoder": dataclasses.replace(TINY.encoder, blocks=(1, 2))}, "are in one of both only, such as stage2_block2"),
    ],
)  # fmt: skip
def test_a_start_that_does_not_fit_says_what_to_type(origin, change, message):
    experiment = dataclasses.replace(TINY, init=str(origin[0]), **change)
    with pytest.raises(ValueError, match=message):
        loop.open_origin(experiment, shapes_of(experiment))


def test_another_depth_of_one_family_is_named(monkeypatch):
    """iresnet18 and iresnet50 are one class of config; told apart before anything is compared."""
    there = dataclasses.replace(TINY, encoder=config.IResNet(depth=18))
    opened = embed.Embedder(variables={}, preprocess=TINY.preprocess, config=there, data={}, policy=None, path=None,
                            embed=None)  # fmt: skip
    monkeypatch.setattr(embed, "load", lambda path: opened)
    with pytest.raises(
        ValueError, match="holds a iresnet18, and this experiment trains a iresnet50. Try --encoder iresnet18"
    ):
        loop.open_origin(dataclasses.replace(TINY, init="there", encoder=config.IResNet(depth=50)), {})


def test_typing_errors_in_patterns_are_told_before_photos_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_data", lambda *_, **__: pytest.fail("photos were read"))
    for change, message in (
        ({"freeze": ("typo",)}, "--freeze has the pattern 'typo'"),
        ({"layer_rates": ("typo=0.1",)}, "--layer-rates has the pattern 'typo'"),
        (
            {"preprocess": config.Preprocess(size=SIZE, template="arcface"), "data": config.Data(margin=1.9)},
            "Try --data.margin 1.5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            loop.train(dataclasses.replace(TINY, **change), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_imported_weights_are_trained_from_resumed_and_kept(origin, noise_photos, tmp_path, monkeypatch):
    """What `launch.py import-weights` writes: trained from elsewhere, resumed without it, and never trained over."""
    run, variables = origin
    copy = tmp_path / "imported"
    shutil.copytree(run, copy)
    with pytest.raises(ValueError, match=f"holds imported weights and no training .*--init {copy}"):
        loop.train(TINY, copy, devices=1, progress=False)
    assert embed.load(copy).fingerprint == checkpoint.fingerprint(variables)

    monkeypatch.setattr(loop, "open_data", lambda *_, **__: noise_photos)
    experiment = dataclasses.replace(
        TINY, steps=4, init=str(copy), freeze=("stem*",), checkpoint=config.Checkpoint(every=2, log=2)
    )
    loop.train(experiment, tmp_path / "whole", devices=1, progress=False)

    batches_of = loop.pipeline.batches

    def cut_off(*args, start_step, **options):
        for number, batch in enumerate(batches_of(*args, start_step=start_step, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(loop.pipeline, "batches", cut_off)
    with pytest.raises(KeyboardInterrupt):
        loop.train(experiment, tmp_path / "cut", devices=1, progress=False)
    monkeypatch.setattr(loop.pipeline, "batches", batches_of)
    shutil.rmtree(copy)  # a run that goes on asks nothing of where it started
    loop.train(experiment, tmp_path / "cut", devices=1, progress=False)
    whole, cut = (
        embed.load(tmp_path / "whole" / "checkpoints" / "4"),
        embed.load(tmp_path / "cut" / "checkpoints" / "4"),
    )
    assert cut.fingerprint == whole.fingerprint != checkpoint.fingerprint(variables)
    jax.tree.map(np.testing.assert_array_equal, cut.variables["params"]["stem_conv"], variables["params"]["stem_conv"])
    for embedder in (whole, cut):
        assert embedder.data["init"]["fingerprint"] == checkpoint.fingerprint(variables)
        assert "abc" in embedder.data["people_hashes"]

"""Encoders: published sizes, golden parameter trees, forms that agree, and what train=True may change."""

import difflib
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from faceembed.encoders import ENCODERS, layers, make_encoder

GOLDEN = pathlib.Path(__file__).parent / "golden"
PHOTO_SIZE = {"convnet": 64}
# Big enough for four halvings, small enough that the suite compiles each family in seconds.
SMALL = 32
FAMILIES = ("convnet", "mobilefacenet", "iresnet18")


def abstract_variables(name, **options):
    size = PHOTO_SIZE.get(name, 112)
    encoder = make_encoder(name, **options)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), images)


def count(params, without=()):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if path[-1].key not in without)


def random_images(b, size=SMALL, seed=0):
    return jax.random.normal(jax.random.key(seed), (b, size, size, 3), jnp.float32)


@functools.cache
def fresh(name, dtype="float32"):
    """An encoder with random parameters everywhere: the ones and zeros of a new batch norm hide what they multiply."""
    encoder = make_encoder(name, dim=32, dtype=dtype)
    rng = np.random.default_rng(7)
    centre = {"scale": 1.0, "slope": 0.25, "var": 1.0}

    def draw(path, leaf):
        key = path[-1].key
        if key == "mean" or key == "var":
            return np.full(leaf.shape, centre.get(key, 0.0), np.float32)
        spread = np.prod(leaf.shape[:-1]) ** -0.5 if key == "kernel" else 0.1
        return (centre.get(key, 0.0) + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), random_images(2))
    return encoder, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def trained(name):
    """(embeddings, updated collections, gradient) of one training batch of 8; one program, since compiling is slow."""
    encoder, variables = fresh(name)

    def loss(params, images):
        embeddings, update = encoder.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.sum(embeddings * jnp.arange(32.0)), (embeddings, update)

    (_, (embeddings, update)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"], random_images(8)
    )
    return embeddings, update, gradient


@functools.cache
def embedded(name, dtype="float32"):
    """Embeddings and features of 8 images with the statistics of a first batch."""
    encoder, variables = fresh(name, dtype)
    variables = {**variables, "batch_stats": trained(name)[1]["batch_stats"]}

    def both(variables, images):
        return (
            encoder.apply(variables, images, train=False),
            encoder.apply(variables, images, train=False, method="features"),
        )

    return jax.jit(both)(variables, random_images(8))


# Sizes ----------------------------------------------------------------------------------------------------------------


def iresnet_count(blocks, dim):
    """Parameters of arcface_torch's iresnet at 112 px, added up layer by layer as its definition reads."""
    total = 3 * 9 * 64 + 2 * 64 + 64
    inputs = 64
    for width, depth in zip((64, 128, 256, 512), blocks, strict=True):
        for block in range(depth):
            total += 2 * inputs + 9 * inputs * width + 2 * width + width + 9 * width * width + 2 * width
            if block == 0:
                total += inputs * width + 2 * width
            inputs = width
    return total + 2 * 512 + (512 * 7 * 7 * dim + dim) + 2 * dim


@pytest.mark.parametrize(
    ("name", "blocks", "published"),
    [
        ("iresnet18", (2, 2, 2, 2), "24.03"),
        ("iresnet34", (3, 4, 6, 3), "34.14"),
        ("iresnet50", (3, 4, 14, 3), "43.59"),
        ("iresnet100", (3, 13, 30, 3), "65.16"),
    ],
)
def test_iresnet_has_the_published_number_of_parameters(name, blocks, published):
    here = count(abstract_variables(name)["params"])
    frozen_scale = 512
    assert here + frozen_scale == iresnet_count(blocks, 512)
    assert f"{here / 1e6:.2f}" == published


def test_mobilefacenet_has_the_published_number_of_parameters():
    assert count(abstract_variables("mobilefacenet", dim=512)["params"]) == 1_200_512
    paper = abstract_variables("mobilefacenet", dim=128)["params"]
    assert count(paper) == 1_003_136
    assert f"{count(paper, without=['scale']) / 1e6:.2f}" == "0.99"


@pytest.mark.parametrize("name", ENCODERS)
def test_the_parameter_tree_is_the_golden_one(name):
    variables = abstract_variables(name)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    here = [
        f"{'/'.join(key.key for key in path)} {'x'.join(map(str, leaf.shape))} {leaf.dtype}\n"
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    ]
    golden = (GOLDEN / f"{name}.txt").read_text().splitlines(keepends=True)
    change = "".join(difflib.unified_diff(golden, sorted(here), "golden", "now"))
    assert not change, f"old checkpoints of {name} would no longer load:\n{change}"


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_leaves_parameters_and_statistics_in_float32(name):
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: a.dtype == b.dtype == jnp.float32,
            abstract_variables(name),
            abstract_variables(name, dtype="bfloat16"),
        )
    )


# Forms ----------------------------------------------------------------------------------------------------------------

FORMS = {
    "conv1x1": (functools.partial(layers.Conv1x1, 5), (2, 6, 7, 4)),
    "conv1x1_strided": (functools.partial(layers.Conv1x1, 5, 2), (2, 6, 7, 4)),
    "conv3x3": (functools.partial(layers.Conv3x3, 5), (2, 6, 7, 3)),
    "conv3x3_strided": (functools.partial(layers.Conv3x3, 5, 2), (2, 6, 7, 3)),
    "depthwise": (layers.DepthwiseConv, (2, 6, 7, 4)),
    "depthwise_strided": (functools.partial(layers.DepthwiseConv, 2), (2, 6, 7, 4)),
    "global_depthwise": (layers.GlobalDepthwise, (2, 6, 7, 4)),
}


@pytest.mark.parametrize("case", FORMS)
def test_both_forms_agree_in_value_and_gradient(case):
    layer, shape = FORMS[case]
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer(form="dots").init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, layer(form="conv").init(jax.random.key(1), x))

    def value_and_pullback(form):
        with jax.default_matmul_precision("highest"):
            y, pullback = jax.vjp(lambda params, x: layer(form=form).apply(params, x), params, x)
            return y, pullback(jax.random.normal(jax.random.key(2), y.shape))

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        value_and_pullback("dots"),
        value_and_pullback("conv"),
    )


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_back_end_chooses_the_form(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    for layer, shape in FORMS.values():
        x = jnp.ones(shape)
        params = layer().init(jax.random.key(1), x)
        program = str(jax.make_jaxpr(lambda params, x, layer=layer: layer().apply(params, x))(params, x))
        assert ("conv_general_dilated" in program) == (backend == "gpu"), layer


def test_prelu_is_the_papers_formula():
    x = jnp.array([[-2.0, 3.0], [4.0, -1.0]])
    y = layers.PReLU().apply({"params": {"slope": jnp.array([0.5, -0.25])}}, x)
    np.testing.assert_array_equal(y, [[-1.0, 3.0], [4.0, 0.25]])


def test_unit_length_of_a_zero_vector_is_finite_with_its_gradient():
    value, gradient = jax.value_and_grad(lambda x: layers.unit_length(x).sum())(jnp.zeros((1, 4)))
    assert value == 0
    assert np.isfinite(gradient).all()


# Contract -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_have_unit_length_and_tell_images_apart(name):
    embeddings, _ = embedded(name)
    assert embeddings.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    distances = np.sum(np.square(embeddings[:, None] - embeddings[None]), axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_non_negative_before_any_norm(name):
    _, features = embedded(name)
    assert features.dtype == jnp.float32
    assert features.shape == (8, {"convnet": 192}.get(name, 512))
    assert (features >= 0).all()
    lengths = np.linalg.norm(features, axis=1)
    assert lengths.std() > 1e-3, "the features seem to have been normalised"
    assert np.ptp(features, axis=0).max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_stays_close_to_float32(name):
    exact, rounded = embedded(name)[0], embedded(name, "bfloat16")[0]
    assert rounded.dtype == jnp.float32
    cosine = np.sum(exact * rounded, axis=1)
    assert cosine.min() > 0.995
    assert cosine.max() < 1 - 1e-7, "bfloat16 seems not to be used"


@pytest.mark.parametrize("name", FAMILIES)
def test_training_moves_every_statistic_by_the_momentum(name):
    before, after = fresh(name)[1]["batch_stats"], trained(name)[1]["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    still = jax.tree.map(lambda a, b: np.array_equal(a, b), before, after)
    assert not any(jax.tree.leaves(still)), still
    if name == "convnet":
        stem = make_encoder(name).widths[0]
        kernel = fresh(name)[1]["params"]["stem_conv"]["kernel"]
        y = layers.Conv3x3(stem, 2).apply({"params": {"kernel": kernel}}, random_images(8))
        np.testing.assert_allclose(after["stem_bn"]["mean"], 0.1 * np.mean(y, axis=(0, 1, 2)), atol=1e-5)
        np.testing.assert_allclose(after["stem_bn"]["var"], 0.9 + 0.1 * np.var(y, axis=(0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_embedding_is_normalised_by_its_batch(name):
    at_training = trained(name)[0]
    assert np.abs(at_training - embedded(name)[0]).max() > 1e-3


def test_evaluation_changes_no_statistics_and_ignores_the_batch():
    encoder, variables = fresh("convnet")
    variables = {**variables, "batch_stats": trained("convnet")[1]["batch_stats"]}
    images = random_images(8)
    embeddings, update = encoder.apply(variables, images, train=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, update["batch_stats"], variables["batch_stats"])
    alone = encoder.apply(variables, images[:2], train=False)
    np.testing.assert_allclose(alone, embeddings[:2], atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_receives_a_gradient(name):
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained(name)[2])
        if not (np.isfinite(leaf).all() and np.abs(leaf).max() > 0)
    ]
    # The dense layer's bias is published, and the batch norm behind it takes it away again.
    assert set(dead) <= {"['embedding']['bias']"}


def test_batch_statistics_are_global_under_jit_and_with_an_axis_name():
    images = random_images(8)
    _, variables = fresh("convnet")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    expected = trained("convnet")[:2]

    def train(encoder):
        return lambda v, x: encoder.apply(v, x, train=True, mutable=["batch_stats"])

    by_jit = jax.jit(train(make_encoder("convnet", dim=32)))(variables, sharded)
    by_shard_map = jax.jit(
        jax.shard_map(
            train(make_encoder("convnet", dim=32, axis_name="data")),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=(PartitionSpec("data"), PartitionSpec()),
        )
    )(variables, sharded)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, by_jit, expected)
    jax.tree.map(close, by_shard_map, expected)


def test_iresnet_drops_values_only_in_training():
    encoder = make_encoder("iresnet18", dim=8, dropout=0.5)
    plain = make_encoder("iresnet18", dim=8)
    images = random_images(2, 16)
    variables = jax.jit(functools.partial(plain.init, train=False))(jax.random.key(0), images)

    @functools.partial(jax.jit, static_argnames="train")
    def embed(key, train):
        return encoder.apply(variables, images, train=train, rngs={"dropout": key}, mutable=["batch_stats"])[0]

    one, two = jax.random.key(1), jax.random.key(2)
    assert np.abs(embed(one, True) - embed(two, True)).max() > 1e-3
    np.testing.assert_array_equal(embed(one, False), plain.apply(variables, images, train=False))


# Errors ---------------------------------------------------------------------------------------------------------------


def test_unknown_names_and_options_say_what_to_type():
    with pytest.raises(ValueError, match="'resnet50'; choose one of convnet, mobilefacenet, iresnet18"):
        make_encoder("resnet50")
    with pytest.raises(ValueError, match="float32 or bfloat16, not 'float16'"):
        make_encoder("convnet", dtype="float16")
    with pytest.raises(ValueError, match=r"dim 0.*dim=128"):
        make_encoder("convnet", dim=0)
    with pytest.raises(ValueError, match=r"mobilefacenet has no option 'widths'.*dim"):
        make_encoder("mobilefacenet", widths=(8, 8))
    with pytest.raises(ValueError, match="2 widths .* 1 counts of blocks"):
        make_encoder("convnet", widths=(8, 8), blocks=(1,)).init(jax.random.key(0), random_images(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_no_encoder_reads_are_refused(name):
    encoder, variables = fresh(name)
    with pytest.raises(ValueError, match="uint8.*normalize"):
        encoder.apply(variables, np.zeros((1, SMALL, SMALL, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(32, 32, 3\).*images\[None\]"):
        encoder.apply(variables, np.zeros((SMALL, SMALL, 3), np.float32))
    with pytest.raises(ValueError, match="grey"):
        encoder.apply(variables, np.zeros((1, SMALL, SMALL, 1), np.float32))


def test_modules_are_flax_modules_under_every_name():
    for name in ENCODERS:
        assert isinstance(make_encoder(name), nn.Module)

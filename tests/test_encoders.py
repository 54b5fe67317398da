"""Encoders: published sizes, golden parameter trees, forms that agree, and what train=True may change."""

import difflib
import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from faceembed.encoders import ENCODERS, layers, make_encoder
from faceembed.encoders.iresnet import IResNet

GOLDEN = pathlib.Path(__file__).parent / "golden"
PHOTO_SIZE = {"convnet": 64}
# Big enough for four halvings, small enough that the suite compiles each family in seconds.
SMALL = 32
# The suite runs each program once, so compiling it is nearly all of the cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Those of the paper's table 1 whose stride is 1 and whose channels stay: rows 1 (from its second), 3 and 5.
RESIDUAL_BOTTLENECKS = {
    f"stage{stage}_block{block}"
    for stage, first, last in ((1, 2, 5), (3, 1, 6), (5, 1, 2))
    for block in range(first, last + 1)
}
FAMILIES = ("convnet", "mobilefacenet", "iresnet")


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


def small(name, **options):
    """A family's member that compiles fast, with every kind of block."""
    if name == "iresnet":
        return IResNet((2, 1, 1, 1), dim=32, **options)
    if name == "convnet":
        options = {"blocks": (1, 1, 1, 1), **options}
    return make_encoder(name, dim=32, **options)


@functools.cache
def random_variables(name):
    """Random parameters everywhere: the ones and zeros of a new batch norm hide what they multiply."""
    rng = np.random.default_rng(7)
    centre = {"scale": 1.0, "slope": 0.25, "var": 1.0}

    def draw(path, leaf):
        key = path[-1].key
        spread = {"mean": 0.0, "var": 0.0, "kernel": np.prod(leaf.shape[:-1]) ** -0.5}.get(key, 0.1)
        return (centre.get(key, 0.0) + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(functools.partial(small(name).init, train=False), jax.random.key(0), random_images(2))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def trained(name):
    """(embeddings, updated collections, gradient) of one training batch of 8; one program, since compiling is slow."""
    variables = random_variables(name)

    def loss(params, images):
        variables_now = {**variables, "params": params}
        embeddings, update = small(name).apply(variables_now, images, train=True, mutable=["batch_stats"])
        return jnp.sum(embeddings * jnp.arange(32.0)), (embeddings, update)

    step = jit(jax.value_and_grad(loss, has_aux=True))
    (_, (embeddings, update)), gradient = step(variables["params"], random_images(8))
    return embeddings, update, gradient


def variables_after_a_batch(name):
    return {**random_variables(name), "batch_stats": trained(name)[1]["batch_stats"]}


@functools.cache
def evaluation(name, dtype="float32"):
    """(variables, images) → (embeddings, features, updated collections), compiled."""

    @jit
    def embed(variables, images):
        embeddings, update = small(name, dtype=dtype).apply(variables, images, train=False, mutable=["batch_stats"])
        return embeddings, small(name, dtype=dtype).apply(variables, images, train=False, method="features"), update

    return embed


@functools.cache
def embedded(name, dtype="float32"):
    """What `evaluation` gives for 8 images with the statistics of that batch."""
    return evaluation(name, dtype)(variables_after_a_batch(name), random_images(8))


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


def test_convnet_is_as_small_as_it_says():
    assert count(abstract_variables("convnet")["params"]) == 1_283_104


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
    by_conv = jax.eval_shape(layer(form="conv").init, jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, by_conv)

    @functools.partial(jit, static_argnums=0)
    def value_and_pullback(form):
        y, pullback = jax.vjp(lambda params, x: layer(form=form).apply(params, x), params, x)
        return y, pullback(jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

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
        params = jax.eval_shape(layer().init, jax.random.key(1), x)
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
    embeddings, _, _ = embedded(name)
    assert embeddings.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    distances = np.sum(np.square(embeddings[:, None] - embeddings[None]), axis=-1)
    assert distances[~np.eye(8, dtype=bool)].min() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_non_negative_before_any_norm(name):
    _, features, _ = embedded(name)
    assert features.dtype == jnp.float32
    assert features.shape == (8, {"convnet": 192}.get(name, 512))
    assert (features >= 0).all()
    lengths = np.linalg.norm(features, axis=1)
    assert lengths.std() > 1e-3, "the features seem to have been normalised"
    assert np.ptp(features, axis=0).max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_every_product_is_bfloat16_and_every_parameter_float32(name):
    shapes = functools.partial(jax.eval_shape, functools.partial(small(name, dtype="bfloat16").init, train=False))
    variables = shapes(jax.random.key(0), random_images(2))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    program = str(
        jax.make_jaxpr(functools.partial(small(name, dtype="bfloat16").apply, train=False))(variables, random_images(2))
    )
    products = re.findall(r"(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)", program)
    assert len(products) > 5
    assert set(products) == {"bf16"}


@pytest.mark.parametrize("name", ["convnet", "iresnet"])
def test_bfloat16_stays_close_to_float32(name):
    exact, rounded = embedded(name)[0], embedded(name, "bfloat16")[0]
    assert rounded.dtype == jnp.float32
    assert np.sum(exact * rounded, axis=1).min() > 0.995


@pytest.mark.parametrize("name", FAMILIES)
def test_training_moves_every_statistic(name):
    before, after = random_variables(name)["batch_stats"], trained(name)[1]["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    still = jax.tree.map(np.array_equal, before, after)
    assert not any(jax.tree.leaves(still)), still


def test_a_statistic_moves_a_tenth_of_the_way_to_its_batch():
    kernel = random_variables("convnet")["params"]["stem_conv"]["kernel"]
    y = layers.Conv3x3(kernel.shape[-1], 2).apply({"params": {"kernel": kernel}}, random_images(8))
    after = trained("convnet")[1]["batch_stats"]["stem_bn"]
    np.testing.assert_allclose(after["mean"], 0.1 * np.mean(y, axis=(0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 + 0.1 * np.var(y, axis=(0, 1, 2)), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_reads_the_statistics_and_changes_none(name):
    embeddings, _, update = embedded(name)
    jax.tree.map(np.testing.assert_array_equal, update, {"batch_stats": variables_after_a_batch(name)["batch_stats"]})
    assert np.abs(trained(name)[0] - embeddings).max() > 1e-3


def test_an_evaluated_photo_does_not_depend_on_its_batch():
    alone = jit(functools.partial(small("convnet").apply, train=False))(
        variables_after_a_batch("convnet"), random_images(8)[:2]
    )
    np.testing.assert_allclose(alone, embedded("convnet")[0][:2], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "last_norm"), [("convnet", "bn2"), ("mobilefacenet", "project_bn"), ("iresnet", "bn3")]
)
def test_an_image_passes_a_residual_block_that_adds_nothing(name, last_norm):
    def silence(path, leaf):
        block, *inner = (key.key for key in path)
        # Where a MobileFaceNet changes the image's size there is no way around the block.
        residual = block.startswith("stage") and (name != "mobilefacenet" or block in RESIDUAL_BOTTLENECKS)
        return np.zeros_like(leaf) if residual and inner[0] == last_norm else leaf

    variables = variables_after_a_batch(name)
    variables = {**variables, "params": jax.tree_util.tree_map_with_path(silence, variables["params"])}
    embeddings = np.asarray(evaluation(name)(variables, random_images(8))[0])
    assert np.ptp(embeddings, axis=0).max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_receives_a_gradient(name):
    gradient = trained(name)[2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    dead = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if np.abs(leaf).max() == 0
    }
    # The dense layer's bias is published, and the batch norm behind it takes it away again.
    assert dead <= {"['embedding']['bias']"}


def test_batch_statistics_are_global_under_jit_and_with_an_axis_name():
    images = random_images(8)
    variables = random_variables("convnet")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    expected = trained("convnet")[:2]

    def train(encoder):
        return lambda v, x: encoder.apply(v, x, train=True, mutable=["batch_stats"])

    by_jit = jit(train(small("convnet")))(variables, sharded)
    by_shard_map = jit(
        jax.shard_map(
            train(small("convnet", axis_name="data")),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=(PartitionSpec("data"), PartitionSpec()),
        )
    )(variables, sharded)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, by_jit, expected)
    jax.tree.map(close, by_shard_map, expected)


def test_iresnet_drops_values_only_in_training():
    encoder = small("iresnet", dropout=0.5)
    variables = variables_after_a_batch("iresnet")

    @functools.partial(jit, static_argnames="train")
    def embed(key, train):
        rngs = {"dropout": key}
        return encoder.apply(variables, random_images(8), train=train, rngs=rngs, mutable=["batch_stats"])[0]

    one, two = jax.random.key(1), jax.random.key(2)
    assert np.abs(embed(one, True) - embed(two, True)).max() > 1e-3
    np.testing.assert_allclose(embed(one, False), embedded("iresnet")[0], atol=1e-5)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_unknown_names_and_options_say_what_to_type():
    with pytest.raises(ValueError, match="'resnet50'; choose one of convnet, mobilefacenet, iresnet18"):
        make_encoder("resnet50")
    with pytest.raises(ValueError, match="float32, bfloat16 or float64, not 'float16'"):
        make_encoder("convnet", dtype="float16")
    with pytest.raises(ValueError, match=r"dim 0.*dim=128"):
        make_encoder("convnet", dim=0)
    with pytest.raises(ValueError, match=r"mobilefacenet has no option 'widths'.*dim"):
        make_encoder("mobilefacenet", widths=(8, 8))
    with pytest.raises(ValueError, match=r"2 widths .* 1 counts of blocks"):
        make_encoder("convnet", widths=(8, 8), blocks=(1,)).init(jax.random.key(0), random_images(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_no_encoder_reads_are_refused(name):
    encoder, variables = small(name), random_variables(name)
    with pytest.raises(ValueError, match=r"uint8.*normalize"):
        encoder.apply(variables, np.zeros((1, SMALL, SMALL, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(32, 32, 3\).*images\[None\]"):
        encoder.apply(variables, np.zeros((SMALL, SMALL, 3), np.float32))
    with pytest.raises(ValueError, match="grey"):
        encoder.apply(variables, np.zeros((1, SMALL, SMALL, 1), np.float32))


def test_modules_are_flax_modules_under_every_name():
    for name in ENCODERS:
        assert isinstance(make_encoder(name), nn.Module)

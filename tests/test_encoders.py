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

from experiments.benchmarks.encoders import WHEN, multiply_adds
from faceembed.encoders import ENCODERS, layers, make_encoder
from faceembed.encoders.inception_resnet_v1 import InceptionResNetV1
from faceembed.encoders.iresnet import IResNet
from faceembed.encoders.vit import ViT

GOLDEN = pathlib.Path(__file__).parent / "golden"
PHOTO_SIZE = {"convnet": 64, "inception_resnet_v1": 160}
# Big enough for four halvings, or for unpadded convolutions; small enough that the suite compiles each family in seconds.
SMALL = {"inception_resnet_v1": 75}
# The suite runs each program once, so compiling it is nearly all of the cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FAMILIES = ("convnet", "mobilefacenet", "iresnet", "inception_resnet_v1", "vit")
FEATURES = {"convnet": 48, "mobilefacenet": 512, "iresnet": 128, "inception_resnet_v1": 1792, "vit": 64}


def abstract_variables(name, **options):
    size = PHOTO_SIZE.get(name, 112)
    encoder = make_encoder(name, **options)
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), images)


def count(params, without=()):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in leaves if path[-1].key not in without)


def random_images(b, name="convnet"):
    size = SMALL.get(name, 32)
    return jax.random.normal(jax.random.key(0), (b, size, size, 3), jnp.float32)


def small(name, **options):
    """A family's member that compiles fast, with every kind of block."""
    match name:
        case "convnet":
            return make_encoder(name, dim=32, widths=(16, 48), blocks=(1, 1), **options)
        case "mobilefacenet":
            # Strided; residual; of stride 1 but with no way around, since the channels change.
            return make_encoder(name, dim=32, blocks=(2, 0, 1, 0, 0), **options)
        case "iresnet":
            return IResNet((2, 1, 0, 0), dim=32, **options)
        case "inception_resnet_v1":
            return InceptionResNetV1((1, 0, 0), dim=32, **options)
        case "vit":
            return ViT(dim=32, width=64, depth=2, heads=4, **options)
    raise ValueError(name)


@functools.cache
def random_variables(name):
    """Random parameters everywhere: the ones and zeros of a new batch norm hide what they multiply."""
    rng = np.random.default_rng(7)
    centre = {"scale": 1.0, "slope": 0.25, "var": 1.0}

    def draw(path, leaf):
        key = path[-1].key
        spread = {"mean": 0.0, "var": 0.0, "kernel": np.prod(leaf.shape[:-1]) ** -0.5}.get(key, 0.1)
        return (centre.get(key, 0.0) + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    shapes = jax.eval_shape(functools.partial(small(name).init, train=False), jax.random.key(0), random_images(2, name))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def trained(name, dtype="float32"):
    """(embeddings, updated collections, gradient) of one training batch of 8; one program, since compiling is slow."""
    variables = random_variables(name)
    encoder = small(name, dtype=dtype)

    def loss(params, images):
        variables_now = {**variables, "params": params}
        rngs = {"dropout": jax.random.key(1)}
        embeddings, update = encoder.apply(variables_now, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return jnp.sum(embeddings * jnp.arange(32.0)), (embeddings, update)

    step = jit(jax.value_and_grad(loss, has_aux=True))
    (_, (embeddings, update)), gradient = step(variables["params"], random_images(8, name))
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
    return evaluation(name, dtype)(variables_after_a_batch(name), random_images(8, name))


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


def test_inception_resnet_v1_has_the_published_number_of_parameters():
    # What facenet-pytorch 2.6 counts without its classifier.
    assert count(abstract_variables("inception_resnet_v1")["params"]) == 23_482_624


def vit_count(patches, patch=8, width=256, depth=12, dim=512):
    """Parameters of arcface_torch's vit_t without its mask token, added up layer by layer as its definition reads."""
    attention, mlp = 3 * width**2 + width**2 + width, 2 * 4 * width**2 + 4 * width + width
    blocks = depth * (2 * width + attention + 2 * width + mlp)
    embedding = 3 * patch**2 * width + width + patches * width
    return embedding + blocks + 2 * width + patches * width**2 + 2 * width + width * dim + 2 * dim


def test_vit_has_the_published_number_of_parameters():
    assert count(abstract_variables("vit")["params"]) == vit_count(patches=14 * 14) == 22_545_664


def test_convnet_is_as_small_as_it_says():
    assert count(abstract_variables("convnet")["params"]) == 1_283_104


@pytest.mark.parametrize(
    ("name", "options", "size", "published"),
    [
        ("mobilefacenet", {"dim": 128}, 112, "0.221"),  # Chen et al. 2018, table 2
        ("iresnet100", {}, 112, "12.1"),  # InsightFace's model zoo, as the next
        ("vit", {"patch": 9}, 108, "1.5"),
    ],
)
def test_the_benchmark_counts_the_published_multiply_adds(name, options, size, published):
    digits = len(published.partition(".")[2])
    assert f"{multiply_adds(make_encoder(name, **options), size) / 1e9:.{digits}f}" == published


def test_the_benchmark_says_of_every_encoder_when_to_choose_it():
    assert list(WHEN) == list(ENCODERS)


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


# Published networks ---------------------------------------------------------------------------------------------------


def eventful_variables(encoder, size):
    """Random parameters and running statistics from NumPy, so that other programs can draw the same."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(
        functools.partial(encoder.init, train=False), jax.random.key(0), jnp.zeros((2, size, size, 3))
    )

    def draw(path, leaf):
        key = path[-1].key
        if key in ("scale", "var"):
            return rng.uniform(0.3, 1.5, leaf.shape).astype(np.float32)
        spread = np.sqrt(2 / np.prod(leaf.shape[:-1])) if key == "kernel" else 0.2
        return (spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def facenet_state(variables):
    """The same numbers under facenet-pytorch's names and in PyTorch's order of axes."""
    kinds = {"35": "repeat_1", "17": "repeat_2", "8": "repeat_3"}
    leaves = {"scale": "weight", "mean": "running_mean", "var": "running_var", "kernel": "weight", "bias": "bias"}
    final = max(int(name.split("_")[1]) for name in variables["params"] if name.startswith("block8_"))
    state = {}
    for path, value in jax.tree_util.tree_leaves_with_path(variables):
        *modules, leaf = (key.key for key in path[1:])
        name = ".".join(modules).replace("embedding_bn", "last_bn").replace("embedding", "last_linear")
        name = re.sub(rf"^block8_{final}\b", "block8", name)
        name = re.sub(r"^block(\d+)_(\d+)", lambda match: f"{kinds[match[1]]}.{int(match[2]) - 1}", name)
        name = re.sub(r"(branch\d)_(\d)", r"\1.\2", name)
        leaf = "conv2d.bias" if leaf == "conv2d_bias" else leaves[leaf]
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
        state[f"{name}.{leaf}"] = np.ascontiguousarray(value.transpose(axes))
    return state


def test_inception_resnet_v1_gives_the_numbers_of_facenet_pytorch():
    # Written down from facenet-pytorch 2.6 with these parameters and as many blocks, for machines without it.
    images = np.random.default_rng(1).standard_normal((2, 75, 75, 3)).astype(np.float32)
    encoder = InceptionResNetV1((1, 1, 1), dim=32)
    embeddings = jit(encoder.apply)(eventful_variables(encoder, 75), images)
    published = [
        [0.39402, -0.27497, 0.16025, 0.50332, 0.09455, -0.09627],
        [0.39131, -0.21803, 0.16511, 0.48621, 0.07310, -0.07588],
    ]
    np.testing.assert_allclose(embeddings[:, :6], published, atol=1e-4)


def test_facenet_pytorchs_whole_network_agrees():
    torch = pytest.importorskip("torch", reason="compares with PyTorch: pip install torch torchvision facenet-pytorch")
    facenet = pytest.importorskip(
        "facenet_pytorch", reason="compares with facenet-pytorch: pip install --no-deps facenet-pytorch torchvision"
    )
    encoder = make_encoder("inception_resnet_v1")
    variables = eventful_variables(encoder, 160)
    network = facenet.InceptionResnetV1().eval()
    state = {name: torch.from_numpy(value) for name, value in facenet_state(variables).items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    for size in (160, 75, 98):
        images = np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)
        with torch.no_grad():
            published = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        np.testing.assert_allclose(jit(encoder.apply)(variables, images), published, atol=1e-4)


def vit_by_loops(variables, image, patch, heads):
    """arcface_torch's vit_t in evaluation, one patch and one head at a time, in float64."""
    wide = functools.partial(np.asarray, dtype=np.float64)
    params, statistics = jax.tree.map(wide, (variables["params"], variables["batch_stats"]))

    def layer_norm(x, p):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p["scale"] + p["bias"]

    def batch_norm(x, name):
        s, p = statistics[name], params[name]
        return (x - s["mean"]) / np.sqrt(s["var"] + 2e-5) * p["scale"] + p["bias"]

    patches = []
    for i in range(0, image.shape[0], patch):
        for j in range(0, image.shape[1], patch):
            window = image[i : i + patch, j : j + patch]
            patches.append(np.tensordot(window, params["patches"]["kernel"], 3) + params["patches"]["bias"])
    x = np.array(patches) + params["position"][0]
    for block in (params[f"block{i}"] for i in range(1, 100) if f"block{i}" in params):
        attention = block["attention"]
        qkv = [layer_norm(row, block["norm1"]) @ attention["qkv"]["kernel"] for row in x]
        q, k, v = np.split(np.array(qkv), 3, axis=1)
        mixed = np.zeros_like(x)
        for head in np.split(np.arange(x.shape[1]), heads):
            for place in range(len(x)):
                weights = np.exp(k[:, head] @ q[place, head] / np.sqrt(len(head)))
                mixed[place, head] = weights @ v[:, head] / weights.sum()
        x = x + mixed @ attention["proj"]["kernel"] + attention["proj"]["bias"]
        hidden = (
            np.array([layer_norm(row, block["norm2"]) for row in x]) @ block["mlp1"]["kernel"] + block["mlp1"]["bias"]
        )
        x = x + np.clip(hidden, 0, 6) @ block["mlp2"]["kernel"] + block["mlp2"]["bias"]
    x = np.array([layer_norm(row, params["norm"]) for row in x])
    features = np.maximum(x, 0).mean(axis=0)
    y = batch_norm(x.reshape(-1) @ params["reduce"]["kernel"], "reduce_bn")
    y = batch_norm(y @ params["embedding"]["kernel"], "embedding_bn")
    return y / np.linalg.norm(y), features


def test_vit_equals_the_loops():
    # A rectangle tells rows from columns.
    images = np.random.default_rng(1).standard_normal((2, 8, 12, 3)).astype(np.float32)
    encoder = ViT(dim=5, patch=4, width=8, depth=2, heads=2)
    shapes = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(3)
    # Large enough for some hidden units to pass the 6 of ReLU6.
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 2.0, leaf.shape) * rng.choice([-1, 1], leaf.shape), shapes)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    variables = jax.tree.map(np.float32, variables)
    embeddings = jit(encoder.apply)(variables, images)
    features = jit(functools.partial(encoder.apply, method="features"))(variables, images)
    for image, embedding, feature in zip(images, embeddings, features, strict=True):
        expected = vit_by_loops(variables, image, patch=4, heads=2)
        np.testing.assert_allclose(embedding, expected[0], atol=1e-5)
        np.testing.assert_allclose(feature, expected[1], atol=1e-5)


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
    assert features.shape == (8, FEATURES[name])
    assert (features >= 0).all()
    lengths = np.linalg.norm(features, axis=1)
    assert lengths.std() > 1e-3, "the features seem to have been normalised"
    assert np.ptp(features, axis=0).max() > 1e-2


def equations(jaxpr):
    """Every equation of a traced program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16_products_read_bfloat16_and_sums_roots_and_exponentials_float32(name):
    encoder, images = small(name, dtype="bfloat16"), random_images(2, name)
    variables = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), images)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    apply = functools.partial(encoder.apply, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    program = list(equations(jax.make_jaxpr(apply)(variables, images).jaxpr))

    def operands(*primitives):
        found = [equation for equation in program if equation.primitive.name in primitives]
        return {str(variable.aval.dtype) for equation in found for variable in equation.invars}

    assert operands("dot_general", "conv_general_dilated") == {"bfloat16"}
    wide = operands("reduce_sum", "reduce_max", "rsqrt", "sqrt", "exp", "log")
    assert "bfloat16" not in wide
    assert "float32" in wide


@pytest.mark.parametrize("name", [*FAMILIES, "dlib_resnet"])
def test_on_a_cpu_convolutions_and_their_gradients_have_the_layout_that_is_fast_in_loops(name):
    """XLA brings the others into it outside of loops only."""
    encoder, size = (make_encoder(name), 150) if name == "dlib_resnet" else (small(name), SMALL.get(name, 32))
    images = jnp.zeros((2, size, size, 3))
    variables = jax.eval_shape(functools.partial(encoder.init, train=False), jax.random.key(0), images)

    def total(params):
        rngs = {"dropout": jax.random.key(0)}
        emb, _ = encoder.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return jnp.sum(emb)

    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    program = equations(jax.make_jaxpr(jax.grad(total))(variables["params"]).jaxpr)
    found = [equation.params for equation in program if equation.primitive.name == "conv_general_dilated"]
    fast = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))
    assert all(options["dimension_numbers"] == fast for options in found)
    assert bool(found) == (name not in ("mobilefacenet", "vit"))


# About twice what was measured: 1 - cosine to float32 of the worst embedding, and of the gradient of a batch of eight.
DRIFT = {
    "convnet": (1e-4, 1.5e-3),
    "mobilefacenet": (1e-4, 1.5e-2),
    "iresnet": (1e-4, 1e-3),
    # At 75 px its last map has one place, so that its batch norms divide by the spread of eight numbers.
    "inception_resnet_v1": (1e-4, 2e-1),
    "vit": (1e-4, 1.5e-3),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_stays_close_to_float32(name):
    def drift(a, b):
        a, b = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64) for tree in (a, b)
        )
        return 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    exact, rounded = embedded(name)[0], embedded(name, "bfloat16")[0]
    assert rounded.dtype == jnp.float32
    # Length and division are float32's: a bfloat16 vector would be off by some 1e-3.
    np.testing.assert_allclose(np.linalg.norm(rounded, axis=1), 1, atol=1e-6)
    embedding, gradient = DRIFT[name]
    assert max(map(drift, exact, rounded)) < embedding
    assert drift(trained(name)[2], trained(name, "bfloat16")[2]) < gradient


def test_batch_statistics_of_bfloat16_maps_are_float32():
    # Far from zero, where bfloat16 sums leave nothing of a variance.
    x = (8 + jax.random.normal(jax.random.key(0), (4, 8, 8, 3))).astype(jnp.bfloat16)
    norm = layers.batch_norm(name="bn", train=True, dtype="bfloat16", axis_name=None)
    variables = jit(norm.init)(jax.random.key(1), x)
    _, update = jit(functools.partial(norm.apply, mutable=["batch_stats"]))(variables, x)
    flat = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(update["batch_stats"]["mean"], 0.1 * flat.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(update["batch_stats"]["var"], 0.9 + 0.1 * flat.var(axis=0), rtol=1e-3)


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
    ("name", "last"),
    [
        ("convnet", {"bn2"}),
        ("mobilefacenet", {"project_bn"}),
        ("iresnet", {"bn3"}),
        ("inception_resnet_v1", {"conv2d", "conv2d_bias"}),
        ("vit", {"proj", "mlp2"}),
    ],
)
def test_an_image_passes_a_residual_block_that_adds_nothing(name, last):
    def silence(path, leaf):
        block, *inner = (key.key for key in path)
        # Where a MobileFaceNet changes the image's size there is no way around the block.
        residual = block.startswith(("stage", "block")) and (name != "mobilefacenet" or block == "stage1_block2")
        return np.zeros_like(leaf) if residual and last & set(inner) else leaf

    variables = variables_after_a_batch(name)
    variables = {**variables, "params": jax.tree_util.tree_map_with_path(silence, variables["params"])}
    embeddings = np.asarray(evaluation(name)(variables, random_images(8, name))[0])
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


def test_inception_resnet_v1_drops_the_published_share_of_the_pooled_map():
    encoder, images = small("inception_resnet_v1"), random_images(8, "inception_resnet_v1")
    apply = functools.partial(
        encoder.apply, train=True, method="features", mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Dropout),
    )  # fmt: skip
    features, taps = jit(apply)(random_variables("inception_resnet_v1"), images, rngs={"dropout": jax.random.key(1)})
    (after,) = taps["intermediates"]["dropout"]["__call__"]
    np.testing.assert_allclose(np.mean(after != 0), 0.4, atol=0.02)
    kept = (after != 0) & (features > 0)
    np.testing.assert_allclose(after[kept], features[kept] / 0.4, rtol=1e-5)


def test_stochastic_depth_drops_whole_branches_more_often_in_deeper_blocks():
    # Huang et al. 2016, eq. 4: with three blocks 0, a half and all of the last one's share.
    photos = 512
    encoder = ViT(dim=4, patch=4, width=8, depth=3, heads=2, drop_path=0.6)
    images = jax.random.normal(jax.random.key(0), (photos, 8, 4, 3))
    variables = jit(encoder.init)(jax.random.key(1), images[:2])
    _, taps = jit(
        functools.partial(
            encoder.apply, train=True, mutable=["batch_stats", "intermediates"], capture_intermediates=True
        )
    )(variables, images, rngs={"dropout": jax.random.key(2)})
    for block, share in (("block1", 0.0), ("block2", 0.3), ("block3", 0.6)):
        tap = taps["intermediates"][block]
        for branch, dropped in ((tap["attention"], tap["drop_path1"]), (tap["mlp2"], tap["drop_path2"])):
            (before,), (after,) = branch["__call__"], dropped["__call__"]
            kept = np.any(np.asarray(after), axis=(1, 2))
            assert abs((1 - kept.mean()) - share) < 4 * np.sqrt(share * (1 - share) / photos) + 1e-9
            expected = np.where(kept[:, None, None], before / (1 - share), 0)
            np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)


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
    for height, width in ((60, 64), (64, 60)):
        with pytest.raises(ValueError, match=r"patches of 8 do not divide.*--preprocess.size 64"):
            make_encoder("vit").init(jax.random.key(0), np.zeros((1, height, width, 3), np.float32))
    with pytest.raises(ValueError, match=r"10 heads do not divide"):
        make_encoder("vit", heads=10).init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match=r"74×74 px.*at least 75.*--preprocess.size 160"):
        make_encoder("inception_resnet_v1").init(jax.random.key(0), np.zeros((1, 74, 74, 3), np.float32))


@pytest.mark.parametrize("name", FAMILIES)
def test_images_that_no_encoder_reads_are_refused(name):
    encoder, variables, size = small(name), random_variables(name), SMALL.get(name, 32)
    with pytest.raises(ValueError, match=r"uint8.*normalize"):
        encoder.apply(variables, np.zeros((1, size, size, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(\d\d, \d\d, 3\).*images\[None\]"):
        encoder.apply(variables, np.zeros((size, size, 3), np.float32))
    with pytest.raises(ValueError, match="grey"):
        encoder.apply(variables, np.zeros((1, size, size, 1), np.float32))


def test_modules_are_flax_modules_under_every_name():
    for name in ENCODERS:
        assert isinstance(make_encoder(name), nn.Module)

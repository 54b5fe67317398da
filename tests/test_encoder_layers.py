"""Gradients written by hand: those of the plain formulas in float64, on one device or eight, and what they keep."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from faceembed.encoders import layers

# The suite runs each program once, so compiling it is nearly all of the cost.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def by_hand_for_any_number_of_channels(monkeypatch):
    """The cases have a few channels, for which the layer itself would leave a 3×3 kernel's gradient to XLA."""
    monkeypatch.setattr(layers, "_GRADIENT_CHANNELS", 1)


class PlainPReLU(nn.Module):
    @nn.compact
    def __call__(self, x):
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x > 0, x, slope * x)


def batch_norm(dtype, axis_name=None, train=True, **options):
    return layers.batch_norm(name="bn", train=train, dtype=dtype, axis_name=axis_name, **options)


def flax_batch_norm(dtype, train=True, **options):
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=jnp.dtype(dtype), name="bn", **options
    )


# name: (ours in a compute dtype, the plain one, input shape). Odd and even sizes, since a stride of 2 treats them apart.
CASES = (
    {
        f"{kind}_s{strides}_{height}x{width}": (
            functools.partial(layer, strides=strides, form="dots"),
            functools.partial(layer, strides=strides, form="conv"),
            (8, height, width, 6),
        )
        for kind, layer in (("depthwise", layers.DepthwiseConv), ("conv3x3", functools.partial(layers.Conv3x3, 5)))
        for strides in (1, 2)
        for height, width in ((6, 5), (5, 8), (1, 1))
    }
    | {
        f"conv_{'x'.join(map(str, window))}_s{strides}_{padding}": (
            functools.partial(
                nn.Conv, 5, window, strides, padding, use_bias=False, conv_general_dilated=layers.conv_general_dilated
            ),
            functools.partial(nn.Conv, 5, window, strides, padding, use_bias=False),
            (8, 8, 7, 6),
        )
        for window, strides, padding in (((7, 7), 2, "VALID"), ((1, 5), 1, "SAME"), ((3, 2), 3, ((0, 2), (1, 0))))
    }
    | {
        "global_depthwise": (
            functools.partial(layers.GlobalDepthwise, form="dots"),
            functools.partial(layers.GlobalDepthwise, form="conv"),
            (8, 3, 4, 6),
        ),
        "prelu": (lambda dtype: layers.PReLU(), lambda dtype: PlainPReLU(), (8, 3, 4, 6)),
        "prelu_flat": (lambda dtype: layers.PReLU(), lambda dtype: PlainPReLU(), (8, 6)),
        "batch_norm": (batch_norm, flax_batch_norm, (8, 3, 4, 6)),
        "batch_norm_flat": (batch_norm, flax_batch_norm, (8, 6)),
        "batch_norm_without_scale": (
            functools.partial(batch_norm, use_scale=False),
            functools.partial(flax_batch_norm, use_scale=False),
            (8, 3, 4, 6),
        ),
    }
)


def example(case):
    """(variables, x) in float64: every number random, channels off centre, negative slopes and exact zeros among them."""
    _, plain, shape = CASES[case]
    rng = np.random.default_rng(5)
    shapes = jax.eval_shape(plain(dtype="float32").init, jax.random.key(0), jnp.ones(shape))
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    if "batch_stats" in variables:
        variables["batch_stats"]["var"] = np.square(variables["batch_stats"]["var"])
    x = rng.normal(size=shape) + rng.normal(size=shape[-1])
    x[0] *= rng.integers(0, 2, x[0].shape)
    return variables, x


def value_and_gradients(module, variables, x):
    """(y, changed collections, (gradient of the parameters, of x)) for a fixed cotangent of no symmetry."""

    def forward(params, x):
        return module.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    y, pullback, changed = jax.vjp(forward, variables["params"], x, has_aux=True)
    cotangent = jnp.sin(1 + jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
    return y, changed, pullback(cotangent)


def compare(result, expected, tolerance):
    def close(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.abs(b).max()))

    jax.tree.map(close, result, expected)


@functools.cache
def expected(case):
    """What the plain form gives in float64."""
    with jax.enable_x64(True):
        variables, x = jax.tree.map(jnp.asarray, example(case))
        return jax.device_get(
            jit(functools.partial(value_and_gradients, CASES[case][1](dtype="float64")))(variables, x)
        )


# One row a band, some, or all of them; only 3×3 convolutions without strides have bands.
BANDS = [(case, positions) for case in CASES for positions in ([1, 60, 10**6] if "conv3x3_s1" in case else [10**6])]


@pytest.mark.parametrize(("case", "positions"), BANDS)
def test_value_and_gradients_are_the_plain_forms_in_float64(case, positions, monkeypatch):
    monkeypatch.setattr(layers, "_POSITIONS", positions)
    with jax.enable_x64(True):
        variables, x = jax.tree.map(jnp.asarray, example(case))
        result = jit(functools.partial(value_and_gradients, CASES[case][0](dtype="float64")))(variables, x)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(result))
    compare(result, expected(case), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("case", [case for case in CASES if "1x1" not in case])
def test_gradients_keep_their_types_and_precision(case, dtype, tolerance):
    variables, x = example(case)
    variables, x = jax.tree.map(jnp.float32, variables), jnp.asarray(x, dtype)
    y, changed, (dparams, dx) = jit(functools.partial(value_and_gradients, CASES[case][0](dtype=dtype)))(variables, x)
    assert y.dtype == dx.dtype == dtype
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((changed, dparams)))
    compare((y, changed, (dparams, dx)), expected(case), tolerance)


@pytest.mark.parametrize(("channels", "features", "by_hand"), [(48, 48, True), (47, 64, False), (64, 47, False)])
def test_small_3x3_kernels_leave_their_gradient_to_xla(channels, features, by_hand, monkeypatch):
    monkeypatch.setattr(layers, "_GRADIENT_CHANNELS", 48)
    module, x = layers.Conv3x3(features, form="dots"), jnp.ones((2, 4, 4, channels))
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    program = str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(module.apply(p, x))))(params))
    assert ("dot_general" in program) == by_hand


def test_sums_over_many_places_are_taken_in_float32():
    # 4096 equal terms: a bfloat16 sum stands still at 256.
    x, one = jnp.ones((1, 64, 64, 4), jnp.bfloat16), jnp.ones((1, 64, 64, 4), jnp.bfloat16)
    params = layers.DepthwiseConv(form="dots").init(jax.random.key(0), x)
    for module, tree, sign in (
        (layers.DepthwiseConv(dtype="bfloat16", form="dots"), params, 1),
        (layers.PReLU(), {"params": {"slope": jnp.full(4, 0.25)}}, -1),
    ):
        gradient = jit(lambda tree, x, module=module: jax.vjp(lambda t: module.apply(t, x), tree)[1](one)[0])
        (leaf,) = jax.tree.leaves(gradient(tree, sign * x))
        assert np.abs(leaf).max() == 4096


# Devices --------------------------------------------------------------------------------------------------------------


def on_devices(case, transform, axis_name=None):
    """Value, changed collections and gradients with the batch of 8 on 8 devices; differentiated outside."""
    ours = CASES[case][0]
    module = ours(dtype="float32", axis_name=axis_name) if axis_name else ours(dtype="float32")
    variables, x = jax.tree.map(jnp.float32, example(case))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data, everywhere = PartitionSpec("data"), PartitionSpec()

    def forward(variables, x):
        return module.apply(variables, x, mutable=["batch_stats"])

    if transform == "jit":
        x = jax.device_put(x, NamedSharding(mesh, data))
    else:
        checked = transform == "shard_map"
        forward = jax.shard_map(
            forward, mesh=mesh, in_specs=(everywhere, data), out_specs=(data, everywhere), check_vma=checked
        )

    class Divided:
        def apply(self, variables, x, mutable):
            return forward(variables, x)

    return jit(functools.partial(value_and_gradients, Divided()))(variables, x)


@pytest.mark.parametrize("transform", ["jit", "shard_map", "shard_map unchecked"])
@pytest.mark.parametrize(
    "case", ["depthwise_s1_6x5", "depthwise_s2_6x5", "conv3x3_s1_6x5", "global_depthwise", "prelu", "batch_norm"]
)
def test_eight_devices_have_the_gradients_of_one(case, transform, monkeypatch):
    monkeypatch.setattr(layers, "_POSITIONS", 1)
    axis_name = "data" if case == "batch_norm" and transform != "jit" else None
    compare(on_devices(case, transform, axis_name), expected(case), 1e-5)


def test_no_device_holds_the_whole_batch():
    """Bands are of rows: bands of photos would be gathered from all devices, one by one."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((8, 16, 16, 8)), NamedSharding(mesh, PartitionSpec("data")))
    for module in (
        layers.Conv3x3(8, form="dots"),
        layers.DepthwiseConv(form="dots"),
        layers.DepthwiseConv(2, form="dots"),
    ):
        params = module.init(jax.random.key(0), x)
        gradient = jit(jax.grad(lambda p, x, module=module: jnp.sum(jnp.sin(module.apply(p, x)))))
        assert "all-gather" not in gradient.lower(params, x).compile().as_text()


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("depthwise", "conv3x3_s1", "prelu"))])
def test_only_the_input_is_kept_for_the_backward_pass(case):
    variables, x = jax.tree.map(jnp.float32, example(case))
    _, pullback = jax.vjp(CASES[case][0](dtype="float32").apply, variables, x)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
    assert kept <= x.size + sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_shifted_copies_do_not_add_up_over_layers():
    def loss(params, x):
        for kernel in params:
            x = jnp.tanh(layers.DepthwiseConv(form="dots").apply({"params": {"kernel": kernel}}, x))
        return jnp.sum(x)

    x, params = jnp.ones((8, 32, 32, 16)), [jnp.ones((3, 3, 1, 16))] * 9
    program = jit(jax.grad(loss)).lower(params, x).compile()
    # 30 times the input; 82 with nine copies a layer.
    assert program.memory_analysis().temp_size_in_bytes < 45 * x.nbytes


# Batch normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_scale", [True, False])
def test_batch_norm_is_flaxs_in_names_types_and_evaluation(use_scale):
    x = jnp.asarray(example("batch_norm")[1], jnp.float32)
    ours, flaxs = (make("float32", train=False, use_scale=use_scale) for make in (batch_norm, flax_batch_norm))
    first, second = (module.init(jax.random.key(0), x) for module in (ours, flaxs))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert jax.tree.map(lambda leaf: leaf.dtype, first) == jax.tree.map(lambda leaf: leaf.dtype, second)
    variables = jax.tree.map(lambda leaf: leaf + jnp.linspace(0.1, 0.9, 6), first)
    y, changed = ours.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, flaxs.apply(variables, x), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], variables["batch_stats"])


def test_initialising_moves_no_statistic():
    x = jnp.asarray(example("batch_norm")[1], jnp.float32)
    statistics = batch_norm("float32").init(jax.random.key(0), x)["batch_stats"]
    np.testing.assert_array_equal(statistics["mean"], 0)
    np.testing.assert_array_equal(statistics["var"], 1)


def test_a_constant_channel_has_variance_zero_and_a_finite_gradient():
    x = jnp.full((4, 3, 3, 6), 1e3 / 3)
    variables = batch_norm("float32").init(jax.random.key(0), x)
    y, changed, gradients = jit(functools.partial(value_and_gradients, batch_norm("float32")))(variables, x)
    assert np.min(changed["batch_stats"]["var"]) >= 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))

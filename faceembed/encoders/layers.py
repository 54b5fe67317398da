"""Layers that every encoder shares.

XLA's CPU back end is slow on 1×1 and depthwise convolutions and on the kernel gradient of 3×3 ones, so those layers have
two forms that hold the same parameter, in a convolution's shape, and compute the same function: `form="dots"` (flat
matrix products, nine shifted multiply-adds) and `form="conv"`. By default the back end chooses when the function is
traced: dots on CPU, conv elsewhere. A checkpoint does not know which form wrote it.

What the gradients below are written for is how that back end works: sums over all but the last dimension and matrix
products take elementwise operands in and run at the memory's speed; a slice or padding is a copy; and every array kept
for the backward pass costs more to write than to compute again. They are reverse-mode only, and hold no collective:
a gradient that has one inside a custom rule is off by the number of devices.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

Form = Literal["dots", "conv"]
Dtype = Literal["float32", "bfloat16", "float64"]
Sides = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]
Initializer = jax.nn.initializers.Initializer

_LAYOUT = ("NHWC", "HWIO", "NHWC")

BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5
MOMENTS = "batch_moments"
"""Collection in which a `BatchNorm` leaves what it saw, if it is mutable, in place of updating `batch_stats`."""
UNIT_LENGTH_EPSILON = 1e-12

fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# A depthwise kernel [k, k, 1, C] feeds each output from k·k inputs and nothing else, which is what fan_in counts.
depthwise_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """What is traced inside is meant for another back end ("cpu", "cuda", "tpu") than JAX's own here."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def default_form() -> Form:
    """The faster form on the back end of `compiled_for`, else JAX's own: "dots" on CPU, "conv" elsewhere."""
    return "dots" if (_target.get() or jax.default_backend()) == "cpu" else "conv"


def _convolve(x: jax.Array, kernel: jax.Array, strides: int, padding: int, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=_LAYOUT,
        feature_group_count=groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense_convolve(x: jax.Array, kernel: jax.Array, strides: Sides, padding: Padding) -> jax.Array:
    """A convolution [b, h, w, c] by [kh, kw, c, f] whose gradients are convolutions of that same layout.

    XLA's CPU back end has a fast routine for that layout only. It brings others into it by itself, but not inside a loop,
    where the kernel's gradient then takes 50 times as long.
    """
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_LAYOUT)


def _dense_convolve_forward(x, kernel, strides, padding):
    return _dense_convolve(x, kernel, strides, padding), (x, kernel)


def _dense_convolve_backward(strides, padding, saved, dy):
    x, kernel = saved
    # With strides s, both gradients read dy with s - 1 zeros between its places, s·(n - 1) + 1 of them.
    spread = [stride * (size - 1) + 1 for stride, size in zip(strides, dy.shape[1:3], strict=True)]
    sizes = list(zip(x.shape[1:3], kernel.shape[:2], spread, padding, strict=True))
    around = [(k - 1 - low, size + low - wide) for size, k, wide, (low, _) in sizes]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = jax.lax.conv_general_dilated(dy, turned, (1, 1), around, lhs_dilation=strides, dimension_numbers=_LAYOUT)
    # What the last window reads of x, which may end before x does.
    rows, columns = ((low, wide + k - 1 - size - low) for size, k, wide, (low, _) in sizes)
    x = _padded(x, (rows, columns))
    dkernel = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        dy.transpose(1, 2, 0, 3),
        (1, 1),
        "VALID",
        rhs_dilation=strides,
        dimension_numbers=_LAYOUT,
    )
    return dx, dkernel.transpose(1, 2, 0, 3)


_dense_convolve.defvjp(_dense_convolve_forward, _dense_convolve_backward)


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """What `nn.Conv(conv_general_dilated=…)` takes: the fast form on the back end that this is traced for."""
    dilated = {*options["lhs_dilation"], *options["rhs_dilation"]} != {1}
    if default_form() == "conv" or dilated or options["feature_group_count"] != 1:
        return jax.lax.conv_general_dilated(x, kernel, window_strides, padding, **options)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], window_strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    return _dense_convolve(x, _over_devices_of(x, kernel), tuple(window_strides), pads)


def _shifted(x: jax.Array, strides: int) -> list[jax.Array]:
    """The nine views of x [b, h, w, c] that a padded 3×3 window reads, row by row, [b, ceil(h/s), ceil(w/s), c]."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + height : strides, j : j + width : strides, :] for i in range(3) for j in range(3)]


def _wide(x: jax.Array) -> jax.Array:
    """x in float32 at least, for sums."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _over_devices_of(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Weights marked as varying over the mesh axes that x varies over, as shard_map's type check asks.

    What sums their gradient over the devices is then outside the custom rule that reads them.
    """
    axes = jax.typeof(x).manual_axis_type.varying - jax.typeof(weights).manual_axis_type.varying
    return jax.lax.pcast(weights, tuple(axes), to="varying") if axes else weights


def _shift_sum(x: jax.Array, weights: jax.Array, strides: int) -> jax.Array:
    """Depthwise 3×3 convolution of x [b, h, w, c] with weights [9, c]."""
    first, *others = (view * weight for view, weight in zip(_shifted(x, strides), weights, strict=True))
    return sum(others, start=first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: jax.Array, weights: jax.Array, strides: int) -> jax.Array:
    """`_shift_sum` that keeps x for its gradient, and not nine shifted copies of it."""
    return _shift_sum(x, weights, strides)


def _depthwise_forward(x, weights, strides):
    return _shift_sum(x, weights, strides), (x, weights)


def _depthwise_backward(strides, saved, dy):
    x, weights = saved
    _, height, width, _ = x.shape
    if strides == 1:
        # A window's rows are shifted in dy and its columns in x: four copies, where shifting x alone takes eight.
        rows = [_padded(dy, ((-i, i), (0, 0))) for i in (1, 0, -1)]
        columns = [_padded(x, ((0, 0), (-j, j))) for j in (-1, 0, 1)]
        pairs = [(row, column) for row in rows for column in columns]
    else:
        pairs = [(view, dy) for view in _shifted(x, strides)]
        # Zeros between the outputs: the gradient of x is the shifted sum with the window turned round, without strides.
        sizes = zip((height, width), dy.shape[1:3], strict=True)
        holes = [(0, size - 1 - strides * (outputs - 1), strides - 1) for size, outputs in sizes]
        dy = jax.lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *holes, (0, 0, 0)))
    dweights = jnp.stack([jnp.sum(_wide(a) * _wide(b), axis=(0, 1, 2)) for a, b in pairs])
    return _shift_sum(dy, weights[::-1], 1), dweights.astype(weights.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _padded(x: jax.Array, by: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    """x [b, h, w, c] with zeros before and after its rows and columns; a negative number takes away."""
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*ends, 0) for ends in by), (0, 0, 0)))


@jax.custom_vjp
def _conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3×3 convolution without strides whose kernel's gradient is a matrix product."""
    return _convolve(x, kernel, 1, padding=1)


def _conv3x3_forward(x, kernel):
    return _conv3x3(x, kernel), (x, kernel)


def _conv3x3_backward(saved, dy):
    x, kernel = saved
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _convolve(dy, turned, 1, padding=1), _kernel_gradient(x, dy).astype(kernel.dtype)


_conv3x3.defvjp(_conv3x3_forward, _conv3x3_backward)

_POSITIONS = 4096
"""Of a map, in one matrix product of `_kernel_gradient`: its operands stay in a core's cache."""


def _kernel_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Gradient [3, 3, c, f] of a 3×3 kernel from inputs [b, h, w, c] and cotangents [b, h, w, f], in float32 at least.

    All nine products of shifted maps are blocks of one, of the columns' shifts of x [n, 3·c] and the rows' shifts of dy
    [n, 3·f]. It is taken in bands of rows and never of photos, which may be divided over devices.
    """
    batch, height, width, channels = x.shape
    features = dy.shape[-1]
    band = next(n for n in range(1, height + 1) if height % n == 0 and (batch * n * width >= _POSITIONS or n == height))
    x, dy = _padded(x, ((0, 0), (1, 1))), _padded(dy, ((1, 1), (0, 0)))

    def products(start: jax.Array) -> jax.Array:
        x_band = jax.lax.dynamic_slice_in_dim(x, start, band, axis=1)
        dy_band = jax.lax.dynamic_slice_in_dim(dy, start, band + 2, axis=1)
        columns = jnp.concatenate([x_band[:, :, j : j + width] for j in range(3)], axis=-1)
        rows = jnp.concatenate([dy_band[:, 2 - i : 2 - i + band] for i in range(3)], axis=-1)
        return jax.lax.dot_general(
            columns.reshape(-1, 3 * channels),
            rows.reshape(-1, 3 * features),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )

    total = jnp.sum(jax.lax.map(products, jnp.arange(0, height, band)), axis=0)
    return total.reshape(3, channels, 3, features).transpose(2, 0, 1, 3)


_STEM_CHANNELS = 4
"""Up to so many, the copies of a window's nine places are cheap; from some 16 on XLA's convolution wins on CPU too."""
_GRADIENT_CHANNELS = 48
"""From so many on, in and out, `_kernel_gradient` takes 0.4 to 0.9 of XLA's time; at 16, 2.5 times as long."""


class Conv3x3(nn.Module):
    """3×3 convolution without bias, padded by 1 on each side (PyTorch's `padding=1`, not "SAME").

    Input [b, h, w, c]; output [b, ceil(h/strides), ceil(w/strides), features] in `dtype`. Parameter `kernel`
    [3, 3, c, features] float32.
    """

    features: int
    strides: int = 1
    dtype: Dtype = "float32"
    form: Form | None = None
    kernel_init: Initializer = fan_out_normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (3, 3, channels, self.features), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if (self.form or default_form()) == "conv":
            return _convolve(x, kernel, self.strides, padding=1)
        if channels > _STEM_CHANNELS:
            if self.strides == 1 and min(channels, self.features) >= _GRADIENT_CHANNELS:
                return _conv3x3(x, _over_devices_of(x, kernel))
            sides: Sides = (self.strides, self.strides)
            return _dense_convolve(x, _over_devices_of(x, kernel), sides, ((1, 1), (1, 1)))
        columns = jnp.concatenate(_shifted(x, self.strides), axis=-1)
        flat = columns.reshape(-1, 9 * channels) @ kernel.reshape(9 * channels, self.features)
        return flat.reshape(*columns.shape[:3], self.features)


class Conv1x1(nn.Module):
    """1×1 convolution without bias.

    Input [b, h, w, c]; output [b, ceil(h/strides), ceil(w/strides), features] in `dtype`. Parameter `kernel`
    [1, 1, c, features] float32, in both forms.
    """

    features: int
    strides: int = 1
    dtype: Dtype = "float32"
    form: Form | None = None
    kernel_init: Initializer = fan_out_normal

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (1, 1, channels, self.features), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if (self.form or default_form()) == "conv":
            return _convolve(x, kernel, self.strides, padding=0)
        x = x[:, :: self.strides, :: self.strides, :]
        # Flat, because XLA's CPU back end is three times slower on the same product of a 4-D array.
        flat = x.reshape(-1, channels) @ kernel.reshape(channels, self.features)
        return flat.reshape(*x.shape[:3], self.features)


class DepthwiseConv(nn.Module):
    """3×3 depthwise convolution without bias, padded by 1 on each side.

    Input [b, h, w, c]; output [b, ceil(h/strides), ceil(w/strides), c] in `dtype`. Parameter `kernel` [3, 3, 1, c]
    float32, in both forms.
    """

    strides: int = 1
    dtype: Dtype = "float32"
    form: Form | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        kernel = self.param("kernel", depthwise_normal, (3, 3, 1, channels), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if (self.form or default_form()) == "conv":
            return _convolve(x, kernel, self.strides, padding=1, groups=channels)
        return _depthwise(x, _over_devices_of(x, kernel.reshape(9, channels)), self.strides)


class GlobalDepthwise(nn.Module):
    """Global depthwise convolution (GDConv; Chen et al. 2018, eq. 2): one learned weight a place and channel.

    Input [b, h, w, c]; output [b, c] in `dtype`. Parameter `kernel` [h, w, 1, c] float32, so the image size is fixed
    when the parameters are made.
    """

    dtype: Dtype = "float32"
    form: Form | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        kernel = self.param("kernel", depthwise_normal, (height, width, 1, channels), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if (self.form or default_form()) == "conv":
            return _convolve(x, kernel, 1, padding=0, groups=channels)[:, 0, 0, :]
        # As a matrix product, with the channels as its batch, both operands would be transposed first.
        return jnp.sum(x * kernel[:, :, 0, :], axis=(1, 2))


class PReLU(nn.Module):
    """max(x, 0) + slope·min(x, 0) with one learned slope a channel, 0.25 at first (He et al. 2015, eq. 1).

    Input and output [..., c], same dtype. Parameter `slope` [c] float32.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],), jnp.float32)
        return _prelu(x, _over_devices_of(x, slope.astype(x.dtype)))


@jax.custom_vjp
def _prelu(x: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, slope * x)


def _prelu_forward(x, slope):
    return _prelu(x, slope), (x, slope)


def _prelu_backward(saved, dy):
    x, slope = saved
    # x - |x| is 2·min(x, 0) without a zero, which XLA's CPU back end would store as an array of x's shape.
    dslope = jnp.sum(_wide(dy) * _wide(x - jnp.abs(x)), axis=tuple(range(x.ndim - 1))) / 2
    return jnp.where(x > 0, dy, slope * dy), dslope.astype(slope.dtype)


_prelu.defvjp(_prelu_forward, _prelu_backward)


class BatchNorm(nn.Module):
    """Batch normalisation of [..., c] (Ioffe & Szegedy 2015) as one multiply-add a value; see `batch_norm`.

    Parameters, statistics and values are those of Flax's: `scale` and `bias` [c], `mean` and `var` [c] in `batch_stats`,
    all float32, var = max(E[x²] - E[x]², 0). Written as y = factor·x + (bias - factor·mean), factor = scale / √(var + ε),
    its gradient reads x, which the layer before has stored; Flax's (x - mean)·factor stores x - mean as well.

    With `mutable=["batch_moments"]` an application leaves `batch_stats` alone and returns the moments of its batch, under
    the same names: `after_chunks` makes one update of several.

    Attributes:
      use_running_average: normalise by the statistics in `batch_stats`, and change none.
      epsilon: ε, added to a variance.
      dtype: of the output; the arithmetic is in float32 at least.
      use_scale: whether there is a `scale`.
      scale_init: of `scale`.
      axis_name: mesh axis to average the moments over inside `shard_map` and `pmap`.
    """

    use_running_average: bool
    epsilon: float
    dtype: jnp.dtype
    use_scale: bool
    scale_init: Initializer
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = (x.shape[-1],)
        kept_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        kept_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        mean, var = kept_mean.value, kept_var.value
        wide_x = _wide(x)
        if not self.use_running_average:
            axes = tuple(range(x.ndim - 1))
            moments = jnp.stack([jnp.mean(wide_x, axes), jnp.mean(jnp.square(wide_x), axes)])
            if self.axis_name is not None and not self.is_initializing():
                moments = jax.lax.pmean(moments, self.axis_name)
            mean, var = moments[0], jnp.maximum(0, moments[1] - jnp.square(moments[0]))
            if self.is_mutable_collection(MOMENTS) and not self.is_initializing():
                self.put_variable(MOMENTS, "mean", mean)
                self.put_variable(MOMENTS, "var", var)
            elif not self.is_initializing():
                kept_mean.value = BATCH_NORM_MOMENTUM * kept_mean.value + (1 - BATCH_NORM_MOMENTUM) * mean
                kept_var.value = BATCH_NORM_MOMENTUM * kept_var.value + (1 - BATCH_NORM_MOMENTUM) * var
        factor = jax.lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            factor *= self.param("scale", self.scale_init, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        return (wide_x * factor + (bias - mean * factor)).astype(self.dtype)


def batch_norm(
    *,
    name: str,
    train: bool,
    dtype: Dtype,
    axis_name: str | None,
    use_scale: bool = True,
    zero_scale: bool = False,
    epsilon: float = BATCH_NORM_EPSILON,
) -> BatchNorm:
    """The batch normalisation of every encoder (Ioffe & Szegedy 2015): statistics in float32, momentum 0.9.

    Under `jax.jit` the statistics are those of the global batch, sharded or not; inside `shard_map` and `pmap` they are
    those of one device unless `axis_name` names the mesh axis to average over.
    """
    return BatchNorm(
        use_running_average=not train,
        epsilon=epsilon,
        dtype=jnp.dtype(dtype),
        use_scale=use_scale,
        scale_init=nn.initializers.zeros if zero_scale else nn.initializers.ones,
        axis_name=axis_name,
        name=name,
    )


def after_chunks(batch_stats: Mapping[str, Any], moments: Mapping[str, Any]) -> dict[str, Any]:
    """Batch statistics after ONE update by a batch that was seen in chunks of equal size.

    The batch's mean is the mean of the chunks' means; its variance is the mean of their variances plus the variance of
    their means.

    Args:
      batch_stats: {layer: {"mean": [c], "var": [c]}} before.
      moments: the same tree of [chunks, c], without layers that keep their statistics; see `MOMENTS`.
    """
    kept, seen = (flax.traverse_util.flatten_dict(tree) for tree in (batch_stats, moments))
    for (*layer, name), values in seen.items():
        batch = jnp.mean(values, 0)
        if name == "var":
            batch += jnp.var(seen[*layer, "mean"], 0)
        kept[*layer, name] = BATCH_NORM_MOMENTUM * kept[*layer, name] + (1 - BATCH_NORM_MOMENTUM) * batch
    return flax.traverse_util.unflatten_dict(kept)


def dropout_by_slot(slot: jax.Array) -> Any:
    """A context in which `nn.Dropout` draws each photo's mask from the photo's slot.

    By itself it draws one mask for all of [b, …]: what is dropped of a photo then depends on where in which chunk of a
    batch it stands.

    Args:
      slot: int [b], place in the global batch of each photo that the encoder is applied to.
    """

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module

        def masked(x: jax.Array, deterministic: bool | None = None, rng: jax.Array | None = None) -> jax.Array:
            deterministic = nn.merge_param("deterministic", module.deterministic, deterministic)
            # A mask that is the same for all photos is the same for all chunks, too.
            if deterministic or module.rate in (0, 1) or 0 in module.broadcast_dims:
                return call(*args, **kwargs)
            key = module.make_rng(module.rng_collection) if rng is None else rng
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slot)
            shape = [1 if axis in module.broadcast_dims else size for axis, size in enumerate(x.shape)][1:]
            # In float32 whatever the precision, so that all precisions drop the same.
            draw = jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys)
            return jnp.where(draw < 1 - module.rate, x / (1 - module.rate), jnp.zeros_like(x))

        if isinstance(module, nn.Dropout) and context.method_name == "__call__":
            return masked(*args, **kwargs)
        return call(*args, **kwargs)

    return nn.intercept_methods(interceptor)


def unit_length(x: jax.Array) -> jax.Array:
    """x [b, d] divided by its Euclidean norm, in float32 at least; a zero vector stays zero and has a finite gradient."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + UNIT_LENGTH_EPSILON)


def wide(dtype: Dtype) -> Dtype:
    """What embeddings and their normalisation are computed in: float32 under bfloat16, else the compute dtype itself."""
    return "float32" if dtype == "bfloat16" else dtype


def check_images(images: jax.Array) -> None:
    """Raises ValueError unless images are normalised floats [b, h, w, 3]."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, but an encoder reads [b, h, w, 3]; "
            "for one photo write images[None], for grey ones repeat the channel three times."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images are {images.dtype}, but an encoder reads floats that its Preprocess has normalised; "
            "pass them through faceembed.preprocess.normalize first."
        )

"""Layers that every encoder shares.

XLA's CPU back end is slow on 1×1 and depthwise convolutions, so those layers have two forms that hold the same
parameter, in a convolution's shape, and compute the same function: `form="dots"` (a flat matrix product, nine shifted
multiply-adds) and `form="conv"`. By default the back end chooses when the function is traced: dots on CPU, conv
elsewhere. A checkpoint does not know which form wrote it.
"""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

Form = Literal["dots", "conv"]
Dtype = Literal["float32", "bfloat16", "float64"]
Initializer = jax.nn.initializers.Initializer

BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5
UNIT_LENGTH_EPSILON = 1e-12

fan_out_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# A depthwise kernel [k, k, 1, C] feeds each output from k·k inputs and nothing else, which is what fan_in counts.
depthwise_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def default_form() -> Form:
    """The faster form on the back end that JAX will run on: "dots" on CPU, "conv" elsewhere."""
    return "dots" if jax.default_backend() == "cpu" else "conv"


def _convolve(x: jax.Array, kernel: jax.Array, strides: int, padding: int, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(strides, strides),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _shifted(x: jax.Array, strides: int) -> list[jax.Array]:
    """The nine views of x [b, h, w, c] that a padded 3×3 window reads, row by row, [b, ceil(h/s), ceil(w/s), c]."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + height : strides, j : j + width : strides, :] for i in range(3) for j in range(3)]


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
        # Only a stem's few channels make the columns cheap; from some 16 channels on XLA's convolution wins on CPU too.
        form = self.form or ("dots" if default_form() == "dots" and channels <= 4 else "conv")
        if form == "conv":
            return _convolve(x, kernel, self.strides, padding=1)
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
        weights = kernel.reshape(9, 1, 1, 1, channels)
        first, *others = (view * weight for view, weight in zip(_shifted(x, self.strides), weights, strict=True))
        return sum(others, start=first)


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
        return jnp.einsum("bhwc,hwc->bc", x, kernel[:, :, 0, :])


class PReLU(nn.Module):
    """max(x, 0) + slope·min(x, 0) with one learned slope a channel, 0.25 at first (He et al. 2015, eq. 1).

    Input and output [..., c], same dtype. Parameter `slope` [c] float32.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],), jnp.float32)
        slope = slope.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return jnp.where(x > 0, x, slope * x)


def batch_norm(
    *, name: str, train: bool, dtype: Dtype, axis_name: str | None, use_scale: bool = True, zero_scale: bool = False
) -> nn.BatchNorm:
    """The batch normalisation of every encoder (Ioffe & Szegedy 2015): statistics in float32, ε 1e-5, momentum 0.9.

    Under `jax.jit` the statistics are those of the global batch, sharded or not; inside `shard_map` and `pmap` they are
    those of one device unless `axis_name` names the mesh axis to average over.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=BATCH_NORM_MOMENTUM,
        epsilon=BATCH_NORM_EPSILON,
        dtype=jnp.dtype(dtype),
        use_scale=use_scale,
        scale_init=nn.initializers.zeros if zero_scale else nn.initializers.ones,
        axis_name=axis_name,
        name=name,
    )


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

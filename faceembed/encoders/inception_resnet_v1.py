"""Inception-ResNet-v1 (Szegedy et al. 2016, arXiv:1602.07261) as FaceNet's open implementations have it.

The layers are those of davidsandberg/facenet and of its PyTorch port facenet-pytorch, whose published weights fit in
place: "VALID" convolutions where the map shrinks, batch norms with ε 1e-3, and the port's names, except that its
`repeat_1.0` is `block35_1` here, `repeat_2.0` is `block17_1`, `repeat_3.0` is `block8_1`, its `block8` is `block8_6`,
`last_linear` is `embedding`, `last_bn` is `embedding_bn`, and inner numbers follow an underscore: `branch1.0` is
`branch1_0`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from faceembed.encoders import layers

MINIMUM_SIZE = 75
"""Smallest image in pixels: below it an unpadded convolution has no place left to stand on."""

_EPSILON = 1e-3

# tf.slim draws every kernel so.
_kernel_init = nn.initializers.xavier_uniform()

# A branch is a row of (channels, window height, window width).
_Branch = tuple[tuple[int, int, int], ...]
_BLOCK35: tuple[_Branch, ...] = (((32, 1, 1),), ((32, 1, 1), (32, 3, 3)), ((32, 1, 1), (32, 3, 3), (32, 3, 3)))
_MIXED_6A: tuple[_Branch, ...] = (((384, 3, 3),), ((192, 1, 1), (192, 3, 3), (256, 3, 3)))
_BLOCK17: tuple[_Branch, ...] = (((128, 1, 1),), ((128, 1, 1), (128, 1, 7), (128, 7, 1)))
_MIXED_7A: tuple[_Branch, ...] = (
    ((256, 1, 1), (384, 3, 3)),
    ((256, 1, 1), (256, 3, 3)),
    ((256, 1, 1), (256, 3, 3), (256, 3, 3)),
)
_BLOCK8: tuple[_Branch, ...] = (((192, 1, 1),), ((192, 1, 1), (192, 1, 3), (192, 3, 1)))


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")


class _Conv(nn.Module):
    """Convolution without bias - BN - ReLU."""

    features: int
    window: tuple[int, int]
    strides: int
    padding: str
    dtype: layers.Dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.window == (1, 1):
            x = layers.Conv1x1(self.features, self.strides, self.dtype, kernel_init=_kernel_init, name="conv")(x)
        else:
            x = nn.Conv(
                self.features,
                self.window,
                self.strides,
                self.padding,
                use_bias=False,
                dtype=jnp.dtype(self.dtype),
                kernel_init=_kernel_init,
                conv_general_dilated=layers.conv_general_dilated,
                name="conv",
            )(x)
        return nn.relu(
            layers.batch_norm(name="bn", train=train, dtype=self.dtype, axis_name=self.axis_name, epsilon=_EPSILON)(x)
        )


def _branches(
    x: jax.Array,
    branches: tuple[_Branch, ...],
    *,
    halve: bool = False,
    train: bool,
    dtype: layers.Dtype,
    axis_name: str | None,
) -> list[jax.Array]:
    """The ends of several rows of convolutions over one map; with `halve` the last of each row has strides of 2."""
    ends = []
    for number, branch in enumerate(branches):
        y = x
        for place, (features, height, width) in enumerate(branch):
            strides, padding = (2, "VALID") if halve and place == len(branch) - 1 else (1, "SAME")
            name = f"branch{number}" if len(branch) == 1 else f"branch{number}_{place}"
            y = _Conv(features, (height, width), strides, padding, dtype, axis_name, name=name)(y, train=train)
        ends.append(y)
    return ends


class _Residual(nn.Module):
    """x + scale · conv1x1(branches of x), then ReLU unless it is the last block (Szegedy et al. 2016, fig. 20)."""

    branches: tuple[_Branch, ...]
    scale: float
    relu: bool
    dtype: layers.Dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        channels = x.shape[-1]
        ends = _branches(x, self.branches, train=train, dtype=self.dtype, axis_name=self.axis_name)
        y = jnp.concatenate(ends, axis=-1)
        y = layers.Conv1x1(channels, 1, self.dtype, kernel_init=_kernel_init, name="conv2d")(y)
        bias = self.param("conv2d_bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = x + self.scale * (y + bias.astype(y.dtype))
        return nn.relu(x) if self.relu else x


class _Reduction(nn.Module):
    """Halves a map: branches that end in strides of 2, and a max pool, joined along the channels (figs. 7, 12)."""

    branches: tuple[_Branch, ...]
    dtype: layers.Dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        ends = _branches(x, self.branches, halve=True, train=train, dtype=self.dtype, axis_name=self.axis_name)
        return jnp.concatenate([*ends, _max_pool(x)], axis=-1)


class InceptionResNetV1(nn.Module):
    """Inception-ResNet-v1 for 160 px faces (Szegedy et al. 2016), the network of FaceNet's open implementations.

    23,482,624 trainable parameters at d=512, at any image size of 75 px or more.

    Attributes:
      blocks: residual blocks of the three kinds, the last one, which has no ReLU, not counted.
      dim: d, the length of an embedding.
      dropout: share of the pooled values that is dropped in training, in [0, 1), 0.6 in facenet-pytorch; when it is not
        0, `apply(..., train=True)` needs `rngs={"dropout": key}`.
      dtype: compute dtype, "float32", "bfloat16" (parameters, statistics and embeddings stay float32) or "float64".
      axis_name: mesh axis for batch statistics inside `shard_map` or `pmap`; None under `jit`.
    """

    blocks: tuple[int, int, int] = (5, 10, 5)
    dim: int = 512
    dropout: float = 0.6
    dtype: layers.Dtype = "float32"
    axis_name: str | None = None

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeds normalised images.

        Args:
          images: [b, h, w, 3] float, normalised by the encoder's Preprocess; h and w at least 75.
          train: normalise by the batch's statistics and update `batch_stats` (pass `mutable=["batch_stats"]`), and drop
            values.

        Returns:
          [b, dim] float32 of unit length.

        Raises:
          ValueError: images of another rank, channel count or an integer dtype, or smaller than 75 px.
        """
        return self._forward(images, train=train)[1]

    def features(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, 1792] float32 ≥ 0: ReLU of the last map's averages over places. Not of unit length.

        Call it as `encoder.apply(variables, images, method="features")`.
        """
        return self._forward(images, train=train)[0]

    @nn.compact
    def _forward(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        layers.check_images(images)
        height, width = images.shape[1:3]
        if min(height, width) < MINIMUM_SIZE:
            raise ValueError(
                f"images are {height}×{width} px, but inception_resnet_v1 halves them without padding and needs at least "
                f"{MINIMUM_SIZE}; it was published at 160: try --preprocess.size 160."
            )

        def conv(name: str, features: int, window: int, strides: int, padding: str) -> _Conv:
            return _Conv(features, (window, window), strides, padding, self.dtype, self.axis_name, name=name)

        def residual(
            x: jax.Array, name: str, branches: tuple[_Branch, ...], scale: float, relu: bool = True
        ) -> jax.Array:
            return _Residual(branches, scale, relu, self.dtype, self.axis_name, name=name)(x, train=train)

        x = conv("conv2d_1a", 32, 3, 2, "VALID")(images, train=train)
        x = conv("conv2d_2a", 32, 3, 1, "VALID")(x, train=train)
        x = conv("conv2d_2b", 64, 3, 1, "SAME")(x, train=train)
        x = _max_pool(x)
        x = conv("conv2d_3b", 80, 1, 1, "SAME")(x, train=train)
        x = conv("conv2d_4a", 192, 3, 1, "VALID")(x, train=train)
        x = conv("conv2d_4b", 256, 3, 2, "VALID")(x, train=train)
        for block in range(1, self.blocks[0] + 1):
            x = residual(x, f"block35_{block}", _BLOCK35, 0.17)
        x = _Reduction(_MIXED_6A, self.dtype, self.axis_name, name="mixed_6a")(x, train=train)
        for block in range(1, self.blocks[1] + 1):
            x = residual(x, f"block17_{block}", _BLOCK17, 0.10)
        x = _Reduction(_MIXED_7A, self.dtype, self.axis_name, name="mixed_7a")(x, train=train)
        for block in range(1, self.blocks[2] + 1):
            x = residual(x, f"block8_{block}", _BLOCK8, 0.20)
        x = residual(x, f"block8_{self.blocks[2] + 1}", _BLOCK8, 1.0, relu=False)

        x = jnp.mean(x.astype(layers.wide(self.dtype)), axis=(1, 2))
        features = nn.relu(x)
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        y = nn.Dense(self.dim, use_bias=False, dtype=jnp.dtype(self.dtype), kernel_init=_kernel_init, name="embedding")(
            x
        )
        y = layers.batch_norm(
            name="embedding_bn", train=train, dtype=layers.wide(self.dtype), axis_name=self.axis_name, epsilon=_EPSILON
        )(y)
        return features, layers.unit_length(y)

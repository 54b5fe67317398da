"""Improved residual networks for faces (ArcFace, Deng et al. 2019, §3.1), as InsightFace's arcface_torch has them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from faceembed.encoders import layers

_WIDTHS = (64, 128, 256, 512)

# arcface_torch draws every convolution from N(0, 0.1²) and leaves the dense layer at PyTorch's default.
_conv_init = nn.initializers.normal(0.1)
_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class _Block(nn.Module):
    """BN - conv3x3 - BN - PReLU - conv3x3 (strided) - BN, added to the input, with no activation after the sum."""

    features: int
    strides: int
    dtype: layers.Dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def norm(name: str) -> layers.BatchNorm:
            return layers.batch_norm(name=name, train=train, dtype=self.dtype, axis_name=self.axis_name)

        y = norm("bn1")(x)
        y = layers.Conv3x3(self.features, 1, self.dtype, kernel_init=_conv_init, name="conv1")(y)
        y = layers.PReLU(name="prelu")(norm("bn2")(y))
        y = layers.Conv3x3(self.features, self.strides, self.dtype, kernel_init=_conv_init, name="conv2")(y)
        y = norm("bn3")(y)
        if self.strides != 1:
            x = layers.Conv1x1(self.features, self.strides, self.dtype, kernel_init=_conv_init, name="shortcut")(x)
            x = norm("shortcut_bn")(x)
        return x + y


class IResNet(nn.Module):
    """Improved residual network for 112 px faces (Deng et al. 2019; Duta et al. 2020), arcface_torch's `iresnet`.

    Trainable parameters at 112 px and d=512: iresnet18 24,025,088; iresnet34 34,138,816; iresnet50 43,590,336;
    iresnet100 65,155,648. PyTorch prints 512 more, since it also counts the last batch norm's weight, which
    arcface_torch freezes at 1; here it does not exist.

    Attributes:
      blocks: residual blocks in each of the four stages, of 64, 128, 256 and 512 channels; each stage halves the image.
      dim: d, the length of an embedding.
      dropout: share of the last map's values that is dropped in training, in [0, 1); when it is not 0,
        `apply(..., train=True)` needs `rngs={"dropout": key}`.
      dtype: compute dtype, "float32", "bfloat16" (parameters, statistics and embeddings stay float32) or "float64".
      axis_name: mesh axis for batch statistics inside `shard_map` or `pmap`; None under `jit`.
    """

    blocks: tuple[int, int, int, int]
    dim: int = 512
    dropout: float = 0.0
    dtype: layers.Dtype = "float32"
    axis_name: str | None = None

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeds normalised images.

        Args:
          images: [b, h, w, 3] float, normalised by the encoder's Preprocess; h and w as they were in `init`.
          train: normalise by the batch's statistics and update `batch_stats` (pass `mutable=["batch_stats"]`).

        Returns:
          [b, dim] float32 of unit length.

        Raises:
          ValueError: images of another rank, channel count or an integer dtype.
        """
        return self._forward(images, train=train)[1]

    def features(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, 512] float32 ≥ 0: ReLU of the last normalised map (`final_bn`), averaged over places. Not of unit length.

        Call it as `encoder.apply(variables, images, method="features")`.
        """
        return self._forward(images, train=train)[0]

    @nn.compact
    def _forward(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        def norm(name: str, dtype: layers.Dtype, use_scale: bool = True) -> layers.BatchNorm:
            return layers.batch_norm(name=name, train=train, dtype=dtype, axis_name=self.axis_name, use_scale=use_scale)

        layers.check_images(images)
        x = layers.Conv3x3(64, 1, self.dtype, kernel_init=_conv_init, name="stem_conv")(images)
        x = layers.PReLU(name="stem_prelu")(norm("stem_bn", self.dtype)(x))
        for stage, (width, count) in enumerate(zip(_WIDTHS, self.blocks, strict=True), start=1):
            for block in range(1, count + 1):
                strides = 2 if block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = _Block(width, strides, self.dtype, self.axis_name, name=name)(x, train=train)
        x = norm("final_bn", self.dtype)(x)
        features = jnp.mean(nn.relu(x.astype(layers.wide(self.dtype))), axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train, name="dropout")(x)
        flat = x.reshape(x.shape[0], -1)
        y = nn.Dense(self.dim, dtype=jnp.dtype(self.dtype), kernel_init=_dense_init, name="embedding")(flat)
        y = norm("embedding_bn", layers.wide(self.dtype), use_scale=False)(y)
        return features, layers.unit_length(y)


iresnet18 = functools.partial(IResNet, (2, 2, 2, 2))
iresnet34 = functools.partial(IResNet, (3, 4, 6, 3))
iresnet50 = functools.partial(IResNet, (3, 4, 14, 3))
iresnet100 = functools.partial(IResNet, (3, 13, 30, 3))

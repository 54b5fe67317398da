"""A small residual network for 64 px faces, quick to train on a CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from faceembed.encoders import layers


class _Block(nn.Module):
    """conv3x3 - BN - PReLU - conv3x3 - BN, added to the input (He et al. 2016); a strided entry projects the input."""

    features: int
    strides: int
    dtype: layers.Dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def norm(name: str, zero_scale: bool = False) -> layers.BatchNorm:
            return layers.batch_norm(
                name=name, train=train, dtype=self.dtype, axis_name=self.axis_name, zero_scale=zero_scale
            )

        y = layers.Conv3x3(self.features, self.strides, self.dtype, name="conv1")(x)
        y = layers.PReLU(name="prelu1")(norm("bn1")(y))
        y = layers.Conv3x3(self.features, 1, self.dtype, name="conv2")(y)
        # Starting each block as the identity lets a fresh network train at a high rate from the first step.
        y = norm("bn2", zero_scale=True)(y)
        if x.shape != y.shape:
            if self.strides == 2:
                # Averaged rather than skipped, or the shortcut never sees three quarters of the map (ResNet-D,
                # He et al. 2019, fig. 2c).
                x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2), padding="SAME", count_include_pad=False)
            x = norm("shortcut_bn")(layers.Conv1x1(self.features, 1, self.dtype, name="shortcut")(x))
        return layers.PReLU(name="prelu2")(x + y)


class ConvNet(nn.Module):
    """Plain 3×3 residual network for small faces: a strided stem, then stages that halve the image.

    1,283,104 parameters by default at 64 px and d=128, a third of them in the dense layer that reads the last 4×4 map.

    Attributes:
      dim: d, the length of an embedding.
      widths: channels of each stage. The stem halves the image and every stage but the first halves it again, so 64 px
        become 32, 16, 8, 4. Multiples of 16 are fast on CPU: 24 channels at 32 px take longer than 32 do.
      blocks: residual blocks in each stage.
      dtype: compute dtype, "float32", "bfloat16" (parameters, statistics and embeddings stay float32) or "float64".
      axis_name: mesh axis for batch statistics inside `shard_map` or `pmap`; None under `jit`.
    """

    dim: int = 128
    widths: tuple[int, ...] = (16, 48, 96, 192)
    blocks: tuple[int, ...] = (1, 2, 2, 1)
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
          ValueError: images of another rank, channel count or an integer dtype; widths and blocks of unequal length.
        """
        return self._forward(images, train=train)[1]

    def features(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, widths[-1]] float32 ≥ 0: ReLU of the last map, averaged over places. Not of unit length.

        Call it as `encoder.apply(variables, images, method="features")`.
        """
        return self._forward(images, train=train)[0]

    @nn.compact
    def _forward(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        layers.check_images(images)
        if len(self.widths) != len(self.blocks):
            raise ValueError(
                f"convnet has {len(self.widths)} widths {self.widths} and {len(self.blocks)} counts of blocks "
                f"{self.blocks}; give one of each for every stage."
            )
        x = layers.Conv3x3(self.widths[0], 2, self.dtype, name="stem_conv")(images)
        x = layers.batch_norm(name="stem_bn", train=train, dtype=self.dtype, axis_name=self.axis_name)(x)
        x = layers.PReLU(name="stem_prelu")(x)
        for stage, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True), start=1):
            for block in range(1, count + 1):
                strides = 2 if stage > 1 and block == 1 else 1
                name = f"stage{stage}_block{block}"
                x = _Block(width, strides, self.dtype, self.axis_name, name=name)(x, train=train)
        features = jnp.mean(nn.relu(x.astype(layers.wide(self.dtype))), axis=(1, 2))
        flat = x.reshape(x.shape[0], -1)
        y = nn.Dense(self.dim, use_bias=False, dtype=jnp.dtype(self.dtype), name="embedding")(flat)
        y = layers.batch_norm(
            name="embedding_bn", train=train, dtype=layers.wide(self.dtype), axis_name=self.axis_name
        )(y)
        return features, layers.unit_length(y)

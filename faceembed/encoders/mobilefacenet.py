"""MobileFaceNets (Chen, Liu, Gao, Han 2018, arXiv:1804.07573, table 1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from faceembed.encoders import layers

# Table 1: (expanded channels, output channels, strides of the first bottleneck). `expanded` is the paper's expansion
# factor t times the input's channels.
_BOTTLENECKS = ((128, 64, 2), (256, 128, 2), (256, 128, 1), (512, 128, 2), (256, 128, 1))


class _Bottleneck(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection (Sandler et al. 2018), with PReLU in place of ReLU6."""

    expanded: int
    features: int
    strides: int
    residual: bool
    dtype: layers.Dtype
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def norm(name: str) -> layers.BatchNorm:
            return layers.batch_norm(name=name, train=train, dtype=self.dtype, axis_name=self.axis_name)

        y = layers.Conv1x1(self.expanded, 1, self.dtype, name="expand")(x)
        y = layers.PReLU(name="expand_prelu")(norm("expand_bn")(y))
        y = layers.DepthwiseConv(self.strides, self.dtype, name="depthwise")(y)
        y = layers.PReLU(name="depthwise_prelu")(norm("depthwise_bn")(y))
        y = layers.Conv1x1(self.features, 1, self.dtype, name="project")(y)
        y = norm("project_bn")(y)
        return x + y if self.residual else y


class MobileFaceNet(nn.Module):
    """MobileFaceNet for 112 px faces (Chen et al. 2018), made for phones.

    The layers are those of the paper's table 1 and of InsightFace's `MobileFaceNet(scale=1)`: a residual connection
    only where the strides are 1 and the channels agree, a batch norm after every layer, no bias anywhere.

    Trainable parameters at 112 px: 1,003,136 for d=128 and 1,200,512 for d=512, the count of the PyTorch
    implementations. The paper prints 0.99 M at d=128, which is 993,344: every batch norm's scale folded into the
    layer before it, as a deployed file has it.

    Attributes:
      dim: d, the length of an embedding.
      blocks: bottlenecks in each of the five rows of table 1.
      dtype: compute dtype, "float32", "bfloat16" (parameters, statistics and embeddings stay float32) or "float64".
      axis_name: mesh axis for batch statistics inside `shard_map` or `pmap`; None under `jit`.
    """

    dim: int = 128
    blocks: tuple[int, int, int, int, int] = (5, 1, 6, 1, 2)
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
        """[b, 512] float32 ≥ 0: ReLU of the normalised global depthwise convolution. Not of unit length.

        Call it as `encoder.apply(variables, images, method="features")`.
        """
        return self._forward(images, train=train)[0]

    @nn.compact
    def _forward(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        def norm(name: str, dtype: layers.Dtype) -> layers.BatchNorm:
            return layers.batch_norm(name=name, train=train, dtype=dtype, axis_name=self.axis_name)

        layers.check_images(images)
        x = layers.Conv3x3(64, 2, self.dtype, name="stem_conv")(images)
        x = layers.PReLU(name="stem_prelu")(norm("stem_bn", self.dtype)(x))
        x = layers.DepthwiseConv(1, self.dtype, name="stem_depthwise")(x)
        x = layers.PReLU(name="stem_depthwise_prelu")(norm("stem_depthwise_bn", self.dtype)(x))
        rows = zip(_BOTTLENECKS, self.blocks, strict=True)
        for stage, ((expanded, features, strides), count) in enumerate(rows, start=1):
            for block in range(1, count + 1):
                first = strides if block == 1 else 1
                residual = first == 1 and x.shape[-1] == features
                bottleneck = _Bottleneck(
                    expanded, features, first, residual, self.dtype, self.axis_name, name=f"stage{stage}_block{block}"
                )
                x = bottleneck(x, train=train)
        x = layers.Conv1x1(512, 1, self.dtype, name="separable")(x)
        x = layers.PReLU(name="separable_prelu")(norm("separable_bn", self.dtype)(x))
        x = norm("global_bn", self.dtype)(layers.GlobalDepthwise(self.dtype, name="global_depthwise")(x))
        y = nn.Dense(self.dim, use_bias=False, dtype=jnp.dtype(self.dtype), name="embedding")(x)
        y = norm("embedding_bn", layers.wide(self.dtype))(y)
        return nn.relu(x).astype(layers.wide(self.dtype)), layers.unit_length(y)

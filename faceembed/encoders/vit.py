"""A small vision transformer for faces: InsightFace's ViT-T (arcface_torch `vit_t`; Dosovitskiy et al. 2021).

Two things differ from arcface_torch. Patches are 8 px rather than 9, so that 64, 112 and 160 px divide without a rest
(it leaves out the last 4 of 112 px), and it also hides a random tenth of the patches from each photo in training.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from faceembed.encoders import layers

_LAYER_NORM_EPSILON = 1e-5
_BATCH_NORM_EPSILON = 2e-5
_MLP_RATIO = 4

_init = nn.initializers.truncated_normal(0.02)
# arcface_torch leaves the patches' convolution at PyTorch's default.
_patch_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _dense(x: jax.Array, features: int, dtype: layers.Dtype, name: str, use_bias: bool = True) -> jax.Array:
    return nn.Dense(features, use_bias=use_bias, dtype=jnp.dtype(dtype), kernel_init=_init, name=name)(x)


class _PatchEmbedding(nn.Module):
    """A convolution whose strides are its window: one vector for each patch.

    Input [b, h, w, c]; output [b, h·w/patch², features] in `dtype`, row by row. Parameters `kernel`
    [patch, patch, c, features] and `bias` [features] float32.
    """

    features: int
    patch: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        p = self.patch
        kernel = self.param("kernel", _patch_init, (p, p, c, self.features), jnp.float32).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        patches = x.astype(self.dtype).reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        flat = patches.reshape(-1, p * p * c) @ kernel.reshape(p * p * c, self.features) + bias
        return flat.reshape(b, -1, self.features)


class _Attention(nn.Module):
    """softmax(q·kᵀ/√e)·v over the patches, for each head of e channels (Vaswani et al. 2017, eq. 1)."""

    heads: int
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, c = x.shape
        e = c // self.heads
        qkv = _dense(x, 3 * c, self.dtype, "qkv", use_bias=False)
        # Heads go in front of the patches once, for all three: with einsum over [b, t, heads, e] XLA's CPU back end
        # takes 2.5 times as long.
        q, k, v = qkv.reshape(b, t, 3, self.heads, e).transpose(2, 0, 3, 1, 4)
        # Logits and softmax stay wide: bfloat16 has 8 bits for a logit, which the exponential turns into 3 % of a weight.
        logits = jnp.einsum("bhqe,bhke->bhqk", q, k, preferred_element_type=jnp.dtype(layers.wide(self.dtype)))
        weights = nn.softmax(logits * e**-0.5, axis=-1).astype(v.dtype)
        y = jnp.einsum("bhqk,bhke->bhqe", weights, v).transpose(0, 2, 1, 3).reshape(b, t, c)
        return _dense(y, c, self.dtype, "proj")


class _Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x)); in training each sum leaves its branch out for some photos."""

    heads: int
    drop_path: float
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=_LAYER_NORM_EPSILON, dtype=jnp.dtype(self.dtype), name=name)

        def drop_path(name: str) -> nn.Dropout:
            # One draw for a photo's whole branch, which is stochastic depth (Huang et al. 2016, eq. 2).
            return nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train, name=name)

        y = _Attention(self.heads, self.dtype, name="attention")(norm("norm1")(x))
        x = x + drop_path("drop_path1")(y)
        y = nn.relu6(_dense(norm("norm2")(x), _MLP_RATIO * x.shape[-1], self.dtype, "mlp1"))
        y = _dense(y, x.shape[-1], self.dtype, "mlp2")
        return x + drop_path("drop_path2")(y)


class ViT(nn.Module):
    """Vision transformer for 112 px faces, the size of arcface_torch's `vit_t`: no class token, all patches are read.

    Trainable parameters at 112 px and d=512: 22,545,664, 12.8 M of them in the dense layer that reads the 196 patches.

    Attributes:
      dim: d, the length of an embedding.
      patch: side of a patch in pixels; it divides the image's sides.
      width: channels of a patch; a multiple of `heads`.
      depth: blocks of attention and MLP.
      heads: attention heads.
      drop_path: stochastic depth: share of photos that skip a branch of the last block in training, in [0, 1); it grows
        linearly from 0 in the first block. When it is not 0, `apply(..., train=True)` needs `rngs={"dropout": key}`.
      dtype: compute dtype, "float32", "bfloat16" (parameters, statistics and embeddings stay float32) or "float64".
      axis_name: mesh axis for batch statistics inside `shard_map` or `pmap`; None under `jit`.
    """

    dim: int = 512
    patch: int = 8
    width: int = 256
    depth: int = 12
    heads: int = 8
    drop_path: float = 0.1
    dtype: layers.Dtype = "float32"
    axis_name: str | None = None

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeds normalised images.

        Args:
          images: [b, h, w, 3] float, normalised by the encoder's Preprocess; h and w as they were in `init`.
          train: normalise the embedding by the batch's statistics and update `batch_stats` (pass
            `mutable=["batch_stats"]`), and drop branches.

        Returns:
          [b, dim] float32 of unit length.

        Raises:
          ValueError: images of another rank, channel count or an integer dtype, or whose sides `patch` does not divide;
            a width that `heads` does not divide.
        """
        return self._forward(images, train=train)[1]

    def features(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, width] float32 ≥ 0: ReLU of the last normalised patches, averaged over places. Not of unit length.

        Call it as `encoder.apply(variables, images, method="features")`.
        """
        return self._forward(images, train=train)[0]

    @nn.compact
    def _forward(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        layers.check_images(images)
        height, width = images.shape[1:3]
        if height % self.patch or width % self.patch:
            near = max(1, round(height / self.patch)) * self.patch
            raise ValueError(
                f"images are {height}×{width} px, which patches of {self.patch} do not divide; "
                f"try --preprocess.size {near}, or another --encoder.patch."
            )
        if self.width % self.heads:
            raise ValueError(f"vit has a width of {self.width}, which {self.heads} heads do not divide; try width=256.")
        wide = layers.wide(self.dtype)

        def norm(name: str) -> layers.BatchNorm:
            return layers.batch_norm(
                name=name, train=train, dtype=wide, axis_name=self.axis_name, epsilon=_BATCH_NORM_EPSILON
            )

        x = _PatchEmbedding(self.width, self.patch, self.dtype, name="patches")(images)
        position = self.param("position", _init, (1, *x.shape[1:]), jnp.float32)
        x = x + position.astype(x.dtype)
        for block in range(1, self.depth + 1):
            share = self.drop_path * (block - 1) / max(1, self.depth - 1)
            x = _Block(self.heads, share, self.dtype, name=f"block{block}")(x, train=train)
        x = nn.LayerNorm(epsilon=_LAYER_NORM_EPSILON, dtype=jnp.dtype(wide), name="norm")(x)
        features = jnp.mean(nn.relu(x), axis=1)
        y = _dense(x.reshape(x.shape[0], -1), self.width, self.dtype, "reduce", use_bias=False)
        y = norm("reduce_bn")(y)
        y = norm("embedding_bn")(_dense(y, self.dim, self.dtype, "embedding", use_bias=False))
        return features, layers.unit_length(y)

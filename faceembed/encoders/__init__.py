"""Encoders: pure functions from normalised images [b, h, w, 3] to unit-length embeddings [b, d]."""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from faceembed.encoders.convnet import ConvNet
from faceembed.encoders.dlib_resnet import DlibResNet
from faceembed.encoders.inception_resnet_v1 import InceptionResNetV1
from faceembed.encoders.iresnet import iresnet18, iresnet34, iresnet50, iresnet100
from faceembed.encoders.mobilefacenet import MobileFaceNet
from faceembed.encoders.vit import ViT

ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "convnet": ConvNet,
    "mobilefacenet": MobileFaceNet,
    "iresnet18": iresnet18,
    "iresnet34": iresnet34,
    "iresnet50": iresnet50,
    "iresnet100": iresnet100,
    "inception_resnet_v1": InceptionResNetV1,
    "vit": ViT,
    "dlib_resnet": DlibResNet,
}


def make_encoder(name: str, *, dim: int | None = None, dtype: str = "float32", **options: Any) -> nn.Module:
    """Builds an encoder by name.

    Args:
      name: a key of `ENCODERS`.
      dim: d, the length of an embedding; None takes the family's published one.
      dtype: compute dtype, "float32", "bfloat16" (parameters and embeddings stay float32) or, for comparisons with 64-bit
        numbers switched on, "float64".
      **options: the family's own attributes, for example `widths` of "convnet".

    Returns:
      A Flax module: `variables = encoder.init(key, images)`, `emb = encoder.apply(variables, images, train=False)`.

    Raises:
      ValueError: an unknown name, dtype or option, or dim < 1.
    """
    if name not in ENCODERS:
        raise ValueError(f"no encoder is called {name!r}; choose one of {', '.join(ENCODERS)}.")
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"an encoder computes in float32, bfloat16 or float64, not {dtype!r}; try dtype='float32'.")
    known = inspect.signature(ENCODERS[name]).parameters.keys() - {"parent", "name"}
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"{name} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}.")
    if dim is not None:
        if dim < 1:
            raise ValueError(f"an embedding has dim {dim}, but it needs at least one number; try dim=128.")
        options["dim"] = dim
    return ENCODERS[name](dtype=dtype, **options)

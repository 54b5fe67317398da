"""A checkpoint as a file that runs without this code: photos in, embeddings out, in StableHLO."""

from typing import Any

import jax
import jax.export
import numpy as np

import faceembed
from faceembed.data.crops import LANDMARKS
from faceembed.embed import Embedder
from faceembed.encoders import layers

PLATFORMS = ("cpu", "cuda", "tpu")


def export(embedder: Embedder, platform: str) -> tuple[bytes, dict[str, Any]]:
    """Preprocessing, encoder and flip fusion as one function with its weights.

    Args:
      embedder: from `fe.load`.
      platform: where it will run; each has the forms of layers that are fast there.

    Returns:
      (what `jax.export.deserialize` reads, JSON-able facts: how crops are to be made, thresholds, where it comes from). The
      function takes uint8 RGB [b, size, size, 3] for any b and gives [b, d].

    Raises:
      ValueError: there is no such platform.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform is {platform!r}: a file is made for one of {', '.join(PLATFORMS)}.")
    (photos,) = jax.export.symbolic_shape("b")
    side, pre = embedder.size, embedder.preprocess

    def embed(images: jax.Array) -> jax.Array:
        return embedder.embed(embedder.variables, images)

    with layers.compiled_for(platform):
        exported = jax.export.export(jax.jit(embed), platforms=[platform])(
            jax.ShapeDtypeStruct((photos, side, side, 3), np.uint8)
        )
    card = {
        "platform": platform,
        "input": f"uint8 RGB [b, {side}, {side}, 3]",
        "output": f"{exported.out_avals[0].dtype} [b, {exported.out_avals[0].shape[1]}]",
        "template": pre.template,
        # Where landmarks lie in the square, which reaches from 0 to 1: enough to cut a crop without this code.
        "landmarks": {name: places[pre.template] for name, places in LANDMARKS.items() if pre.template in places},
        "fingerprint": embedder.fingerprint,
        "trained_on": {name: embedder.data.get(name) for name in ("source", "people", "photos", "step", "notes")},
        "policy": embedder.policy,
        "versions": {"faceembed": faceembed.__version__, "jax": jax.__version__},
        "use": "jax.export.deserialize(open(FILE, 'rb').read()).call(photos)",
    }
    return bytes(exported.serialize()), card

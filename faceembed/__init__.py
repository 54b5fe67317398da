"""faceembed: face embeddings in JAX. `import faceembed as fe`.

    embedder = fe.load("runs/celeba")                    # encoder, parameters, preprocessing, heads
    a, b = embedder(embedder.read(["a.jpg", "b.jpg"]))
    print(((a - b) ** 2).sum())                          # squared distance, 0 to 4

Names are loaded when they are first used, so that `fe.metrics` and `fe.verify` need no JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "load": ("faceembed.embed", "load"),
    "Embedder": ("faceembed.embed", "Embedder"),
    "Experiment": ("faceembed.config", "Experiment"),
    "Preprocess": ("faceembed.preprocess", "Preprocess"),
    "Square": ("faceembed.preprocess", "Square"),
    "make_encoder": ("faceembed.encoders", "make_encoder"),
    "triplet_loss": ("faceembed.losses", "triplet_loss"),
    "contrastive_loss": ("faceembed.losses", "contrastive_loss"),
    "pair_logistic_loss": ("faceembed.losses", "pair_logistic_loss"),
    "margin_softmax_loss": ("faceembed.margin_softmax", "margin_softmax_loss"),
    "train": ("faceembed.training.loop", "train"),
    "verify": ("faceembed.verification", None),
    "identify": ("faceembed.identification", None),
    "metrics": ("faceembed.metrics", None),
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'faceembed' has no attribute {name!r}; it has {', '.join(_NAMES)}")
    module, attribute = _NAMES[name]
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])

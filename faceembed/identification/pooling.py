"""Several photos of a person → the one template that they are searched by."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["pooled"]

Floats = NDArray[np.float64]

CANCELLED = 1e-3
"""A mean of directions shorter than this points where rounding says."""


def pooled(emb: ArrayLike, weight: ArrayLike | None = None) -> Floats:
    """Templates of several photos each: the weighted mean of their directions, at the weighted mean of their lengths.

    Args:
      emb: [..., n, d] embeddings of one person's photos along the last axis but one.
      weight: [..., n] > 0, such as qualities; None weighs equally.

    Returns:
      [..., d] float64, of unit length for embeddings of unit length; one photo is itself. It does not depend on the photos'
      order, up to rounding.

    Raises:
      ValueError: directions cancel out, so that their mean points nowhere.
    """
    x = np.asarray(emb, np.float64)
    w = np.ones(x.shape[:-1]) if weight is None else np.asarray(weight, np.float64)
    w = (w / w.sum(axis=-1, keepdims=True))[..., None]
    if x.shape[-2] == 1:
        return x[..., 0, :]
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    mean = (w * x / length).sum(axis=-2)
    size = np.linalg.norm(mean, axis=-1, keepdims=True)
    if size.min() < CANCELLED:
        raise ValueError(
            f"the directions of {x.shape[-2]} photos cancel out: their mean has length {size.min():.1e}, so it points "
            "nowhere. They are hardly of one person: enrol fewer of them."
        )
    return mean / size * (w * length).sum(axis=-2)

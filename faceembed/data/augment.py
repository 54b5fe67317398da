"""Augmentation on the device: pure, and keyed by (seed, step, slot), so that any topology draws the same."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def slot_keys(seed: int, step: jax.Array, slot: jax.Array) -> jax.Array:
    """One key for each slot of a global batch.

    Args:
      seed: of the run.
      step: int32 [], the update being made.
      slot: int32 [b], place in the GLOBAL batch of each photo on this device.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, slot)


def augment(
    keys: jax.Array,
    images: jax.Array,
    *,
    size: int,
    flip: bool = True,
    rotation: float = 0.0,
    scale: float = 0.0,
    shift: float = 0.0,
    colour: float = 0.0,
    grey: float = 0.0,
    erase: float = 0.0,
    degrade: float = 0.0,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Draws one augmented view of each photo.

    Args:
      keys: [b] keys, one a photo; see `slot_keys`.
      images: uint8 RGB [b, s, s, 3], s ≥ size; what exceeds `size` is room to move in.
      size: side of the result, in pixels.
      flip: mirror half of the photos.
      rotation: largest rotation, degrees either way.
      scale: largest relative change of size either way.
      shift: largest shift either way, as a share of `size`.
      colour: strength of brightness, contrast, saturation and channel-gain jitter, 0 to 1.
      grey: share of photos turned grey.
      erase: share of photos with a rectangle (2-20 % of the area, less what a border cuts off) replaced by noise
        (Zhong et al. 2020).
      degrade: share of photos blurred with a Gaussian of 0.5-2 px at size 64.
      dtype: of the arithmetic, float32 or float64. The draws are the same in both.

    Returns:
      [b, size, size, 3] in `dtype`, 0-255. With everything off: the central crop.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        # One draw for everything: a dozen separate ones would take longer to compile than the encoder.
        draw = jax.random.uniform(key, (16 + 8 * 8 * 3,), jnp.float32).astype(dtype)
        view = _warp(draw[0:5], image.astype(dtype), size, flip, rotation, scale, shift)
        if degrade:
            view = _degrade(draw[5:7], view, degrade)
        if colour or grey:
            view = _colour(draw[7:14], view, colour, grey)
        if erase:
            view = _erase(draw[14:16], draw[16:], view, erase)
        return jnp.clip(view, 0, 255)

    return jax.vmap(one)(keys, images)


def centre(images: jax.Array, size: int) -> jax.Array:
    """The central size × size pixels of [b, s, s, 3]: what evaluation sees of a training crop."""
    offset = (images.shape[1] - size) // 2
    return images[:, offset : offset + size, offset : offset + size]


def _warp(draw: jax.Array, image: jax.Array, size: int, flip: bool, rotation: float, scale: float, shift: float):
    """Rotation, scale, shift and mirror in one bilinear reading; outside the crop its edge repeats."""
    signed = 2 * draw - 1
    angle = signed[0] * math.radians(rotation)
    zoom = jnp.exp(signed[1] * math.log1p(scale))
    move = signed[2:4] * shift * size
    mirror = jnp.where(draw[4] < 0.5, -1, 1).astype(image.dtype) if flip else 1

    middle = (image.shape[0] - 1) / 2
    axis = jnp.arange(size, dtype=image.dtype) - (size - 1) / 2
    y, x = axis[:, None], axis[None, :] * mirror
    cos, sin = jnp.cos(angle) * zoom, jnp.sin(angle) * zoom
    last = image.shape[0] - 1
    source_y = jnp.clip(middle + move[0] + sin * x + cos * y, 0, last)
    source_x = jnp.clip(middle + move[1] + cos * x - sin * y, 0, last)
    top, left = jnp.floor(source_y).astype(jnp.int32), jnp.floor(source_x).astype(jnp.int32)
    bottom, right = jnp.minimum(top + 1, last), jnp.minimum(left + 1, last)
    down, along = (source_y - top)[..., None], (source_x - left)[..., None]
    upper = image[top, left] * (1 - along) + image[top, right] * along
    lower = image[bottom, left] * (1 - along) + image[bottom, right] * along
    return upper * (1 - down) + lower * down


def _colour(draw: jax.Array, view: jax.Array, strength: float, grey: float) -> jax.Array:
    """Brightness, contrast about the mean, saturation, channel gains and grey: one affine map of a pixel's channels."""
    brightness, contrast, saturation = 1 + (2 * draw[:3] - 1) * strength * jnp.array([0.7, 0.7, 1.0], view.dtype)
    gain = 1 + 0.3 * strength * (2 * draw[3:6] - 1)
    unit, third = jnp.eye(3, dtype=view.dtype), jnp.full((3, 3), 1 / 3, view.dtype)
    mix = brightness * contrast * (third + (unit - third) * saturation) * gain
    offset = brightness * view.mean() * (1 - contrast) * gain
    luma = jnp.broadcast_to(jnp.array([[0.299], [0.587], [0.114]], view.dtype), (3, 3))
    mix, offset = (jnp.where(draw[6] < grey, x @ luma, x) for x in (mix, offset))
    # In one go: XLA's CPU back end fuses stage after stage of channel sums, and computes all before it anew for each term.
    return sum(view[..., c, None] * mix[c] for c in range(3)) + offset


def _erase(draw: jax.Array, noise: jax.Array, view: jax.Array, share: float) -> jax.Array:
    size = view.shape[0]
    # What is left of a uniform draw below `share` is uniform again: it says how much is erased.
    area = 0.02 + 0.18 * draw[0] / share
    aspect = jnp.exp((2 * draw[1] - 1) * math.log(3))
    half = jnp.sqrt(area * jnp.stack([aspect, 1 / aspect])) * size / 2
    middle = noise[:2] * size
    axis = jnp.arange(size, dtype=view.dtype) + 0.5
    inside = (jnp.abs(axis - middle[0]) < half[0])[:, None] & (jnp.abs(axis - middle[1]) < half[1])[None, :]
    inside &= draw[0] < share
    # One coarse patch enlarged: per-pixel noise would cost more than the rest of the augmentation together.
    patch = 255 * noise.reshape(8, 8, 3)
    cell = jnp.arange(size) * 8 // size
    return jnp.where(inside[..., None], patch[cell][:, cell], view)


def _degrade(draw: jax.Array, view: jax.Array, share: float) -> jax.Array:
    size = view.shape[0]
    sigma = (0.5 + 1.5 * draw[0]) * size / 64
    axis = jnp.arange(size, dtype=view.dtype)
    kernel = jnp.exp(-0.5 * ((axis[:, None] - axis[None, :]) / sigma) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    # A separable blur as two small matrix products: cheaper on every back end than a convolution per photo.
    kernel = jnp.where(draw[1] < share, kernel, jnp.eye(size, dtype=view.dtype))
    return jnp.einsum("yh,hwc,xw->yxc", kernel, view, kernel)

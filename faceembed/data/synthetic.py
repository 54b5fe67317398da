"""Procedural faces: people who do not exist, rendered by JAX without a download.

What makes a person (bones, skin, eyes, brows, hair, beard, moles, ...) is drawn apart from what differs from photo to
photo of one person: pose, light, expression, glasses or not, hat, hand, mask, scarf, background, white balance, exposure,
crop, blur, noise and JPEG. `rendering.picture` turns the two into an image.

It demonstrates that training works. It is no evidence about real faces; `experiments/synthetic_baselines.py` prints
what trivial methods reach on it, which is the floor that any figure on this source has to be read against.

    images = render(0, person=np.repeat(np.arange(4), 6), photo=np.tile(np.arange(6), 4))   # [24, 64, 64, 3]

A photo of 64 px takes about two milliseconds of processor time, and the one compilation about ten seconds of it.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from faceembed.data import rendering

CHUNK = 8
"""Images a compiled call renders. Small, so that the fields of a chunk stay in the processor's cache, and fixed, so
that one compilation serves every request."""

# Lengths are in head radii (the head is about 1.4 wide and 1.9 high), places on the face in direction space (unit
# vectors; x to the image's right, y up, z out of the face), angles in radians, colours linear RGB in 0..1.
IDENTITY_RANGES: dict[str, tuple[float, float]] = {
    "masculinity": (0.0, 1.0),
    "head_width": (0.618, 0.752),
    "head_height": (0.9, 1.0),
    "head_depth": (0.82, 0.95),
    "jaw_taper": (-0.06, 0.32),
    "jaw_square": (-0.048, 0.148),
    "chin": (-0.033, 0.113),
    "forehead": (-0.03, 0.06),
    "cheekbone": (-0.01, 0.1),
    "cheek": (-0.08, 0.06),
    "brow_ridge": (0.01, 0.08),
    "socket": (-0.13, -0.05),
    "nose_length": (0.285, 0.455),
    "nose_bridge": (0.021, 0.119),
    "nose_tip": (0.059, 0.181),
    "nose_width": (0.077, 0.163),
    "nose_wings": (0.02, 0.07),
    "muzzle": (0.01, 0.08),
    "ear_size": (0.139, 0.261),
    "ear_flare": (0.15, 0.75),
    "ear_height": (-0.1, 0.06),
    "asymmetry": (-1.0, 1.0),
    "melanin": (0.0, 1.0),
    "ruddiness": (-1.0, 1.0),
    "freckles": (-0.8, 1.0),
    "shine": (0.02, 0.16),
    "age": (-0.5, 1.0),
    "eye_spacing": (0.289, 0.411),
    "eye_height": (0.02, 0.14),
    "eye_width": (0.144, 0.211),
    "eye_open": (0.065, 0.12),
    "lid_height": (0.015, 0.05),
    "eye_slant": (-0.135, 0.255),
    "iris_tone": (0.0, 1.0),
    "brow_height": (0.142, 0.228),
    "brow_thickness": (0.013, 0.045),
    "brow_slope": (-0.31, 0.361),
    "brow_arch": (0.11, 1.754),
    "brow_length": (0.178, 0.312),
    "brow_tone": (-0.15, 0.25),
    "mouth_height": (-0.609, -0.511),
    "mouth_width": (0.219, 0.341),
    "lip_upper": (0.017, 0.071),
    "lip_lower": (0.028, 0.094),
    "lip_bow": (0.0, 0.9),
    "lip_redness": (0.1, 1.0),
    "hair_tone": (-0.15, 0.9),
    "hair_line": (-0.22, 0.17),
    "hair_temples": (-0.25, 0.30),
    "hair_part": (-0.35, 0.35),
    "hair_peak": (-0.15, 0.75),
    "hair_volume": (0.03, 0.19),
    "hair_quiff": (-0.02, 0.14),
    "hair_frame": (-0.1, 0.4),
    "hair_length": (-0.75, 1.2),
    "hair_wave": (0.0, 1.0),
    "beard": (-1.0, 1.6),
    "beard_line": (-0.42, -0.12),
    "moustache": (-1.2, 1.0),
    "glasses_habit": (0.0, 1.0),
    "glasses_shape": (0.0, 1.0),
    "glasses_width": (0.17, 0.23),
    "glasses_height": (0.10, 0.17),
    "glasses_rim": (0.0, 1.0),
    "glasses_tone": (0.0, 1.0),
    "mole_strength": (-0.7, 1.0),
    "skin_pattern": (0.0, 1.0),
    "hair_pattern": (0.0, 1.0),
}

PHOTO_RANGES: dict[str, tuple[float, float]] = {
    "yaw": (-0.38, 0.38),
    "pitch": (-0.22, 0.22),
    "roll": (-0.16, 0.16),
    "shift_x": (-0.09, 0.09),
    "shift_y": (-0.09, 0.09),
    "zoom": (0.98, 1.18),
    "light_x": (-0.9, 0.9),
    "light_y": (-0.25, 0.9),
    "light_hardness": (0.35, 0.9),
    "ambient": (0.14, 0.4),
    "light_warmth": (-0.2, 0.2),
    "smile": (-0.35, 1.0),
    "mouth_open": (-0.9, 1.0),
    "blink": (-0.2, 0.45),
    "brow_raise": (-0.03, 0.045),
    "brow_tilt": (-0.18, 0.18),
    "gaze": (-0.5, 0.5),
    "glasses": (0.0, 1.0),
    "sunglasses": (0.0, 1.0),
    "hat": (0.0, 1.0),
    "occluder": (0.0, 1.0),
    "occluder_angle": (0.0, 2 * math.pi),
    "occluder_reach": (0.0, 1.0),
    "occluder_tone": (0.0, 1.0),
    "hair_dishevelled": (-0.06, 0.06),
    "collar": (0.0, 1.0),
    "clothes_r": (0.01, 0.6),
    "clothes_g": (0.01, 0.6),
    "clothes_b": (0.01, 0.6),
    "background_r": (0.01, 0.75),
    "background_g": (0.01, 0.75),
    "background_b": (0.01, 0.75),
    "background_angle": (0.0, 2 * math.pi),
    "background_edge": (-0.7, 0.7),
    "background_slope": (-0.6, 0.6),
    "background_clutter": (0.0, 1.0),
    "background_scale": (0.01, 0.06),
    "texture_u": (0.0, 1.0),
    "texture_v": (0.0, 1.0),
    "white_red": (-0.12, 0.12),
    "white_blue": (-0.12, 0.12),
    "exposure": (-0.35, 0.35),
    "contrast": (0.8, 1.2),
    "blur": (0.2, 0.6),
    "jpeg": (0.0, 1.0),
    "noise": (0, 0.018),
}

MOLES = 3

Pytree = dict[str, jax.Array]
"""Named parameters of n people or n photos."""


def identity_parameters(seed: int, person: np.ndarray) -> Pytree:
    """What makes a person: a dict of float32 numbers, so that two people can be interpolated leaf by leaf.

    Args:
      seed: which population, 0 ≤ seed < 2³².
      person: [n] int32 ids.

    Returns:
      Every key of `IDENTITY_RANGES` as [n] within its range, and `moles`: [n, MOLES, 2] places (x, y) in direction
      space.
    """
    return _named_identity(_identity_values(np.uint32(seed), np.asarray(person, np.int32)))


def photo_parameters(seed: int, person: np.ndarray, photo: np.ndarray) -> Pytree:
    """What differs between the photos of one person.

    Args:
      seed: which population, 0 ≤ seed < 2³².
      person: [n] int32 ids.
      photo: [n] int32, which photo of that person.

    Returns:
      Every key of `PHOTO_RANGES` as [n] float32 within its range, and `grain`: [n] uint32, the seed of the pixel noise.
    """
    return _named_photo(*_photo_values(np.uint32(seed), np.asarray(person, np.int32), np.asarray(photo, np.int32)))


def render(seed: int, person: np.ndarray, photo: np.ndarray, *, size: int = 64) -> np.ndarray:
    """Photos of procedural people. A photo depends on (seed, person, photo, size) alone, never on its batch.

    Args:
      seed: which population, 0 ≤ seed < 2³².
      person: [n] int32, any ids ≥ 0.
      photo: [n] int32, which photo of that person, ≥ 0.
      size: side in pixels, ≥ 16.

    Returns:
      [n, size, size, 3] uint8 RGB. Bit-identical from run to run on one jaxlib and kind of device.

    Raises:
      ValueError: the arrays differ in shape, an id is negative, or the seed or size is out of range.
    """
    person, photo = np.atleast_1d(np.asarray(person)), np.atleast_1d(np.asarray(photo))
    if person.ndim != 1 or person.shape != photo.shape:
        raise ValueError(
            f"person has shape {person.shape} and photo {photo.shape}: one number a photo is needed in each; "
            "give two arrays [n], e.g. np.repeat(np.arange(10), 4) and np.tile(np.arange(4), 10)."
        )
    if person.size and not 0 <= min(person.min(), photo.min()) <= max(person.max(), photo.max()) < 2**31:
        raise ValueError("an id in person or photo is below 0 or above 2³¹ - 1; number both from 0.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: it must fit in 32 bits; give 0 ≤ seed < {2**32}.")

    def chunk(index: np.ndarray) -> tuple[jax.Array, ...]:
        ids = person[index].astype(np.int32), photo[index].astype(np.int32)
        return _identity_values(np.uint32(seed), ids[0]), *_photo_values(np.uint32(seed), *ids)

    return _in_chunks(chunk, len(person), size)


def draw(who: Pytree, how: Pytree, *, size: int = 64) -> np.ndarray:
    """Photos of given people under given conditions, e.g. people half-way between two others.

    Args:
      who: as from `identity_parameters`, leaves [n, ...].
      how: as from `photo_parameters`, leaves [n].
      size: side in pixels, ≥ 16.

    Returns:
      [n, size, size, 3] uint8 RGB.

    Raises:
      ValueError: a parameter is missing or unknown, or the leaves differ in length.
    """
    for given, known in ((who, {*IDENTITY_RANGES, "moles"}), (how, {*PHOTO_RANGES, "grain"})):
        if set(given) != known:
            raise ValueError(
                f"missing parameters {sorted(known - set(given))}, unknown {sorted(set(given) - known)}; start from "
                "identity_parameters(...) and photo_parameters(...) and replace leaves."
            )
    lengths = {len(leaf) for part in (who, how) for leaf in part.values()}
    if len(lengths) != 1:
        raise ValueError(f"the parameters have lengths {sorted(lengths)}: every leaf needs one entry a photo.")
    n = lengths.pop()
    identity = [np.asarray(who[k], np.float32)[:, None] for k in IDENTITY_RANGES]
    identity.append(np.asarray(who["moles"], np.float32).reshape(n, 2 * MOLES))
    identity_values = np.concatenate(identity, axis=1)
    photo_values = np.stack([np.asarray(how[k], np.float32) for k in PHOTO_RANGES], axis=1)
    grain = np.asarray(how["grain"], np.uint32)
    return _in_chunks(lambda index: (identity_values[index], photo_values[index], grain[index]), n, size)


def _in_chunks(values: Callable[[np.ndarray], tuple[np.ndarray | jax.Array, ...]], n: int, size: int) -> np.ndarray:
    """Draws photos 0..n-1, given (identity values, photo values, grain) of any CHUNK of them."""
    if size < 16:
        raise ValueError(f"size is {size}: a face needs at least 16 pixels; try size=64.")
    out = np.empty((n, size, size, 3), np.uint8)
    texture = rendering.pink_noise()

    def chunk(start: int) -> None:
        # The last chunk repeats its last photo: a shorter array would be another compilation.
        chosen = values(np.minimum(np.arange(start, start + CHUNK), n - 1))
        out[start : start + CHUNK] = np.asarray(_draw_chunk(*chosen, texture, size=size))[: n - start]

    starts = range(0, n, CHUNK)
    for start in starts[:1]:
        chunk(start)  # compiles once, before threads could each do so
    # XLA leaves cores idle between the many small kernels of one chunk; chunks side by side fill them.
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        list(pool.map(chunk, starts[1:]))
    return out


def render_all(
    seed: int, people: int, photos: int, size: int = 64, *, progress: Callable[[int, int], None] | None = None
) -> np.ndarray:
    """Every photo of a population: person 0's photos first, then person 1's, and so on.

    Args:
      seed: which population, 0 ≤ seed < 2³².
      people: how many people, ≥ 1.
      photos: how many photos a person, ≥ 1.
      size: side in pixels.
      progress: called with (images done, images in all) about every 256 images and at the end.

    Returns:
      [people * photos, size, size, 3] uint8 RGB.
    """
    if people < 1 or photos < 1:
        raise ValueError(f"people is {people} and photos is {photos}: both must be at least 1, e.g. 400 and 12.")
    person, photo = np.repeat(np.arange(people), photos), np.tile(np.arange(photos), people)
    out = np.empty((len(person), size, size, 3), np.uint8)
    for start in range(0, len(person), 256):
        part = slice(start, start + 256)
        out[part] = render(seed, person[part], photo[part], size=size)
        if progress is not None:
            progress(min(start + 256, len(person)), len(person))
    return out


@jax.jit
def _identity_values(seed: jax.Array, person: jax.Array) -> jax.Array:
    """[n] ids → [n, len(IDENTITY_RANGES) + 2 * MOLES] float32, in the order of the table, the moles' places last."""
    root = jax.random.fold_in(jax.random.key(seed), 0)
    low, high = np.array([*IDENTITY_RANGES.values(), *[(-0.55, 0.55)] * 2 * MOLES], np.float32).T
    draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(root, i), low.shape, jnp.float32))(person)
    return low[None] + (high - low)[None] * draws


@jax.jit
def _photo_values(seed: jax.Array, person: jax.Array, photo: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[n] ids → [n, len(PHOTO_RANGES)] float32, in the order of the table, and [n] uint32 seeds of the pixel noise."""
    root = jax.random.fold_in(jax.random.key(seed), 1)
    low, high = np.array(list(PHOTO_RANGES.values()), np.float32).T

    def one(person: jax.Array, photo: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, person), photo)
        return jax.random.bits(key, (len(low) + 1,), jnp.uint32)

    bits = jax.vmap(one)(person, photo)
    draws = (bits[:, :-1] >> 8).astype(jnp.float32) * 2.0**-24
    return low[None] + (high - low)[None] * draws, bits[:, -1]


def _named_identity(values: jax.Array) -> Pytree:
    names = {name: values[..., i] for i, name in enumerate(IDENTITY_RANGES)}
    return names | {"moles": values[..., len(names) :].reshape(*values.shape[:-1], MOLES, 2)}


def _named_photo(values: jax.Array, grain: jax.Array) -> Pytree:
    return {name: values[..., i] for i, name in enumerate(PHOTO_RANGES)} | {"grain": grain}


@functools.partial(jax.jit, static_argnames="size")
def _draw_chunk(
    identity_values: jax.Array, photo_values: jax.Array, grain: jax.Array, texture: jax.Array, *, size: int
) -> jax.Array:
    def one(identity: jax.Array, photo: jax.Array, grain: jax.Array) -> jax.Array:
        return rendering.picture(_named_identity(identity), _named_photo(photo, grain), texture, size)

    return jax.vmap(one)(identity_values, photo_values, grain)

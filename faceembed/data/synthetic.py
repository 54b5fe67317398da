"""Procedural faces: people who do not exist, rendered by JAX without a download.

A face is a star-shaped solid: in direction d its radius is an ellipsoid × (1 + 18 spherical Gaussians), and the
Gaussians (nose, brows, cheekbones, jaw, ...) are drawn for the person. An orthographic ray is traced to it in a few
Newton steps, normals are differences of neighbouring depths, and eyes, brows, lips, beard, moles, glasses and hair are
painted as functions of d. What differs from photo to photo of one person is drawn apart from the person: pose, light,
expression, glasses, occluder, background, white balance, exposure, crop, blur and noise.

It demonstrates that training works. It is no evidence about real faces; `experiments/synthetic_baselines.py` prints
what trivial methods reach on it, which is the floor that any figure on this source has to be read against.

    images = render(0, person=np.repeat(np.arange(4), 6), photo=np.tile(np.arange(6), 4))   # [24, 64, 64, 3]

On two cores a photo of 64 px takes about a millisecond, and the one compilation about six seconds of processor time.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

CHUNK = 8
"""Images a compiled call renders. Small, so that the fields of a chunk stay in the processor's cache, and fixed, so
that one compilation serves every request."""

STEPS = 7
"""Newton steps from the ellipsoid to the surface."""

NOISE_SIDE = 256

# Lengths are in head radii (the head is about 1.4 wide and 1.9 high), places on the face in direction space (unit
# vectors; x to the image's right, y up, z out of the face), angles in radians, colours linear RGB in 0..1.
IDENTITY_RANGES: dict[str, tuple[float, float]] = {
    "head_width": (0.64, 0.76),
    "head_height": (0.90, 1.04),
    "head_depth": (0.82, 0.95),
    "jaw_taper": (0.08, 0.34),
    "jaw_square": (-0.02, 0.11),
    "chin": (-0.02, 0.10),
    "forehead": (-0.03, 0.06),
    "cheekbone": (0.0, 0.09),
    "cheek": (-0.07, 0.06),
    "brow_ridge": (0.01, 0.08),
    "socket": (-0.15, -0.05),
    "nose_length": (0.24, 0.40),
    "nose_bridge": (0.04, 0.15),
    "nose_tip": (0.12, 0.28),
    "nose_width": (0.06, 0.13),
    "nose_wings": (0.02, 0.10),
    "muzzle": (0.01, 0.08),
    "ear_size": (0.08, 0.18),
    "ear_height": (-0.12, 0.08),
    "asymmetry": (-1.0, 1.0),
    "melanin": (0.0, 1.0),
    "ruddiness": (-1.0, 1.0),
    "freckles": (-0.6, 1.0),
    "shine": (0.02, 0.16),
    "age": (-0.5, 1.0),
    "eye_spacing": (0.29, 0.41),
    "eye_height": (0.02, 0.14),
    "eye_width": (0.115, 0.178),
    "eye_open": (0.045, 0.092),
    "eye_slant": (-0.16, 0.30),
    "iris_tone": (0.0, 1.0),
    "brow_height": (0.115, 0.20),
    "brow_thickness": (0.012, 0.042),
    "brow_slope": (-0.25, 0.30),
    "brow_arch": (0.0, 0.9),
    "brow_length": (0.19, 0.30),
    "brow_tone": (-0.15, 0.25),
    "mouth_height": (-0.53, -0.42),
    "mouth_width": (0.2, 0.33),
    "lip_upper": (0.022, 0.066),
    "lip_lower": (0.034, 0.088),
    "lip_bow": (0.0, 0.9),
    "lip_redness": (0.1, 1.0),
    "hair_tone": (-0.15, 0.9),
    "hair_line": (-0.26, 0.1),
    "hair_temples": (-0.25, 0.30),
    "hair_part": (-0.35, 0.35),
    "hair_volume": (0.02, 0.17),
    "hair_length": (-0.9, 1.0),
    "hair_wave": (0.0, 1.0),
    "beard": (-2.2, 1.0),
    "beard_line": (-0.42, -0.12),
    "moustache": (-1.5, 1.0),
    "glasses_habit": (0.0, 1.0),
    "glasses_shape": (2.0, 6.0),
    "glasses_width": (0.17, 0.23),
    "glasses_height": (0.10, 0.17),
    "glasses_tone": (0.0, 1.0),
    "mole_strength": (-0.4, 1.0),
    "skin_u": (0.0, 1.0),
    "skin_v": (0.0, 1.0),
}

PHOTO_RANGES: dict[str, tuple[float, float]] = {
    "yaw": (-0.5, 0.5),
    "pitch": (-0.28, 0.28),
    "roll": (-0.20, 0.20),
    "shift_x": (-0.12, 0.12),
    "shift_y": (-0.12, 0.12),
    "zoom": (0.96, 1.22),
    "light_x": (-1.0, 1.0),
    "light_y": (-0.25, 0.9),
    "light_hardness": (0.35, 1.0),
    "ambient": (0.16, 0.44),
    "light_warmth": (-0.28, 0.28),
    "smile": (-0.35, 1.0),
    "mouth_open": (-0.9, 1.0),
    "blink": (-0.2, 0.45),
    "brow_raise": (-0.03, 0.045),
    "gaze": (-0.5, 0.5),
    "glasses": (0.0, 1.0),
    "occluder": (0.0, 1.0),
    "occluder_angle": (0.0, 2 * math.pi),
    "occluder_reach": (0.30, 0.75),
    "occluder_tone": (0.0, 1.0),
    "hair_dishevelled": (-0.06, 0.06),
    "clothes_r": (0.01, 0.6),
    "clothes_g": (0.01, 0.6),
    "clothes_b": (0.01, 0.6),
    "background_r": (0.01, 0.75),
    "background_g": (0.01, 0.75),
    "background_b": (0.01, 0.75),
    "background_slope": (-0.6, 0.6),
    "background_clutter": (0.0, 1.0),
    "background_scale": (0.02, 0.16),
    "texture_u": (0.0, 1.0),
    "texture_v": (0.0, 1.0),
    "white_red": (-0.30, 0.30),
    "white_blue": (-0.30, 0.30),
    "exposure": (-0.5, 0.5),
    "contrast": (0.8, 1.2),
    "blur": (0.2, 0.95),
    "noise": (0.0, 0.03),
}

MOLES = 3

# Linear RGB, from light to dark; a person's place on the ramp is `melanin`, `hair_tone` or `iris_tone`.
SKIN = ((0.84, 0.56, 0.43), (0.74, 0.46, 0.31), (0.56, 0.31, 0.18), (0.33, 0.165, 0.085), (0.13, 0.062, 0.036))
HAIR = (
    (0.55, 0.52, 0.48),
    (0.58, 0.38, 0.17),
    (0.30, 0.115, 0.04),
    (0.15, 0.072, 0.032),
    (0.05, 0.028, 0.018),
    (0.014, 0.011, 0.010),
)
IRIS = ((0.22, 0.36, 0.46), (0.17, 0.27, 0.17), (0.22, 0.12, 0.045), (0.055, 0.028, 0.014))

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
    texture = _pink_noise()

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


@functools.cache
def _pink_noise() -> np.ndarray:
    """[NOISE_SIDE², 4] float32: a periodic 1/f field of unit variance; a row holds a texel and its three neighbours
    to the right, below and diagonally, so that a bilinear look-up is one gather."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(NOISE_SIDE)[:, None], np.fft.fftfreq(NOISE_SIDE)[None])
    frequency[0, 0] = np.inf
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((NOISE_SIDE, NOISE_SIDE))) / frequency).real
    field = ((field - field.mean()) / field.std()).astype(np.float32)
    down = np.roll(field, -1, 0)
    return np.stack([field, np.roll(field, -1, 1), down, np.roll(down, -1, 1)], -1).reshape(-1, 4)


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
        return _picture(_named_identity(identity), _named_photo(photo, grain), texture, size)

    return jax.vmap(one)(identity_values, photo_values, grain)


def _ramp(colours: tuple[tuple[float, float, float], ...], place: jax.Array) -> list[jax.Array]:
    """The colour at `place` in 0..1 along the ramp, as three [] arrays."""
    knots = jnp.linspace(0.0, 1.0, len(colours), dtype=jnp.float32)
    return [jnp.interp(place, knots, jnp.array([c[i] for c in colours], jnp.float32)) for i in range(3)]


def _step(x: jax.Array, width: jax.Array | float) -> jax.Array:
    """0 below -width, 1 above width, smooth between."""
    t = jnp.clip(x / (2 * width) + 0.5, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _muted(how: Pytree, what: str) -> list[jax.Array]:
    """The drawn colour of `what`, nearer to its own grey: few walls and shirts are fully saturated."""
    drawn = [how[f"{what}_{c}"] for c in "rgb"]
    grey = (drawn[0] + drawn[1] + drawn[2]) / 3.0
    return [grey + 0.55 * (c - grey) for c in drawn]


def _mix(below: list[jax.Array], above: list[jax.Array], cover: jax.Array) -> list[jax.Array]:
    return [a + (b - a) * cover for a, b in zip(below, above, strict=True)]


def _gaussians(who: Pytree, how: Pytree) -> list[tuple[jax.Array | float, ...]]:
    """The 18 spherical Gaussians: (amplitude, concentration, x, y, z) with (x, y, z) a unit vector."""
    w = who
    tip_y = w["eye_height"] - w["nose_length"]
    lopsided = 0.012 * w["asymmetry"]
    smile = jnp.clip(how["smile"], 0.0, 1.0)
    placed: list[tuple[jax.Array | float, float, jax.Array | float, jax.Array | float, float]] = [
        (w["nose_tip"], 75.0, lopsided, tip_y, 1.0),
        (w["nose_bridge"], 60.0, lopsided * 0.5, 0.45 * tip_y + 0.55 * w["eye_height"], 1.0),
        (0.6 * w["nose_bridge"], 70.0, 0.0, 0.15 * tip_y + 0.85 * w["eye_height"], 1.0),
        (w["muzzle"], 14.0, 0.0, w["mouth_height"], 0.9),
        (w["chin"], 22.0, lopsided, -0.86, 0.62),
        (w["forehead"], 5.0, 0.0, 0.62, 0.75),
    ]
    pairs: list[tuple[jax.Array | float, float, jax.Array | float, jax.Array | float, float]] = [
        (w["nose_wings"], 160.0, w["nose_width"], tip_y - 0.02, 1.0),
        (w["brow_ridge"], 35.0, 0.30, w["eye_height"] + 0.17, 0.9),
        (w["socket"], 45.0, w["eye_spacing"] * 0.92, w["eye_height"] + 0.01, 0.9),
        (w["cheekbone"] + 0.03 * smile, 18.0, 0.52, -0.10, 0.75),
        (w["cheek"], 12.0, 0.50, -0.42, 0.65),
        (w["jaw_square"], 14.0, 0.62, -0.66, 0.42),
    ]
    for amplitude, concentration, x, y, z in pairs:
        placed += [(amplitude, concentration, x + lopsided, y, z), (amplitude, concentration, lopsided - x, y, z)]
    out: list[tuple[jax.Array | float, ...]] = []
    for amplitude, concentration, x, y, z in placed:
        scale = 1.0 / jnp.sqrt(jnp.asarray(x * x + y * y + z * z, jnp.float32))
        out.append((amplitude, concentration, x * scale, y * scale, z * scale))
    return out


def _hair(who: Pytree, how: Pytree, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """How far direction (x, y, z) lies inside the hair: > 0 is hair. The line runs over the forehead and before the
    ears, the part bends it, receding temples lift it."""
    height = 0.78 * y - 0.62 * z
    bald = jnp.clip(-5.6 - 8.0 * who["hair_length"], 0.0, 1.1)
    line = who["hair_line"] + bald + who["hair_temples"] * (x * x - 0.25) * z + 0.25 * who["hair_part"] * x * z
    return height - line - how["hair_dishevelled"]


def _picture(who: Pytree, how: Pytree, texture: jax.Array, size: int) -> jax.Array:
    """One photo [size, size, 3] uint8 of the person `who` under the conditions `how`; `texture` is `_pink_noise()`.

    Every field is its own [size, size] array (structure of arrays): XLA's CPU back end vectorises those, and not a
    trailing axis of 3.
    """
    pixel = 2.0 * how["zoom"] / size
    axis = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (2.0 / size) - 1.0
    screen_x, screen_y = jnp.meshgrid(axis, -axis)
    shifted_x = screen_x * how["zoom"] + how["shift_x"]
    shifted_y = screen_y * how["zoom"] + how["shift_y"]
    cos, sin = jnp.cos(how["roll"]), jnp.sin(how["roll"])
    px, py = cos * shifted_x + sin * shifted_y, cos * shifted_y - sin * shifted_x

    # --- the solid -------------------------------------------------------------------------------------------------
    gaussians = _gaussians(who, how)
    cos_yaw, sin_yaw = jnp.cos(how["yaw"]), jnp.sin(how["yaw"])
    cos_pitch, sin_pitch = jnp.cos(how["pitch"]), jnp.sin(how["pitch"])

    def direction(depth: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        x = px * cos_yaw - depth * sin_yaw
        turned = px * sin_yaw + depth * cos_yaw
        y, z = py * cos_pitch + turned * sin_pitch, turned * cos_pitch - py * sin_pitch
        inverse = jax.lax.rsqrt(x * x + y * y + z * z + 1e-6)
        return x * inverse, y * inverse, z * inverse, 1.0 / inverse

    def ellipsoid(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        low = jnp.clip(-y, 0.0, 1.0)
        wide = x / (who["head_width"] * (1.0 - who["jaw_taper"] * low * low))
        high, deep = y / who["head_height"], z / who["head_depth"]
        return jax.lax.rsqrt(wide * wide + high * high + deep * deep)

    def surface(x: jax.Array, y: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        bumps = jnp.zeros_like(x)
        for a, k, mx, my, mz in gaussians:
            bumps = bumps + a * jnp.exp(k * (x * mx + y * my + z * mz - 1.0))
        across, along = z + 0.08, y - who["ear_height"]
        ear = who["ear_size"] * _step(jnp.abs(x) - 0.91, 0.06) * jnp.exp(-55.0 * across * across - 28.0 * along * along)
        shell = who["hair_volume"] * _step(_hair(who, how, x, y, z) - 0.10, 0.11)
        return ellipsoid(x, y, z) * (1.0 + bumps + ear + shell), bumps

    def newton(i: int, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        depth, least, _ = carry
        x, y, z, radius = direction(depth)
        reach, bumps = surface(x, y, z)
        gap = radius - reach
        least = jnp.minimum(least, gap)
        # d(radius)/d(depth) is depth/radius on a sphere; its floor keeps grazing rays from leaping.
        return jnp.maximum(depth - gap / jnp.maximum(depth / radius, 0.4), -0.15), least, bumps

    start = jnp.sqrt(jnp.maximum(0.75 - (px / 0.75) ** 2 * 0.72 - (py / 0.97) ** 2 * 0.72, 0.01))
    # A ray that ever came to the surface hits (an ear is thin enough to be stepped over); the least gap of one that
    # missed fades the outline.
    depth, least, bumps = jax.lax.fori_loop(0, STEPS, newton, (start, jnp.full_like(start, 9.0), jnp.zeros_like(start)))
    x, y, z, _ = direction(depth)

    # --- normals from neighbouring depths --------------------------------------------------------------------------
    padded = jnp.pad(depth, 1, mode="edge")
    slope_x = jnp.clip((padded[1:-1, 2:] - padded[1:-1, :-2]) / (2 * pixel), -2.5, 2.5)
    slope_y = jnp.clip((padded[:-2, 1:-1] - padded[2:, 1:-1]) / (2 * pixel), -2.5, 2.5)
    normal_z = jax.lax.rsqrt(slope_x * slope_x + slope_y * slope_y + 1.0)
    normal_x, normal_y = -slope_x * normal_z, -slope_y * normal_z

    # --- texture: one look-up a pixel, with hair, skin or background coordinates -----------------------------------
    hair_inside = _hair(who, how, x, y, z)
    in_hair = hair_inside > 0.0
    near = least < 0.8 * pixel
    strand = x * 1.6 + 0.25 * who["hair_wave"] * jnp.sin(9.0 * y + 4.0 * x)
    u = jnp.where(near, jnp.where(in_hair, strand * 0.55 + 0.3 * x * z, 0.33 * x), how["background_scale"] * px)
    v = jnp.where(near, jnp.where(in_hair, 0.07 * (y - z), 0.33 * y), how["background_scale"] * py)
    u = u + jnp.where(near, who["skin_u"], how["texture_u"])
    v = v + jnp.where(near, who["skin_v"], how["texture_v"])
    grain = _look_up(texture, u, v)
    # Loose strands: the outline of the hair, not its inside, is ragged.
    outlying = jnp.where(in_hair, jnp.clip(1.0 - depth / 0.25, 0.0, 1.0), 0.0)
    ragged = outlying * (0.03 * grain - 0.02) * who["hair_volume"] / 0.17
    head = _step(0.8 * pixel - least + ragged, 0.8 * pixel)

    # --- skin and the features painted on it -----------------------------------------------------------------------
    soft = 1.1 * pixel
    front = _step(z - 0.15, 0.15)
    side = jnp.sign(x)  # features are painted on |x|, so `side` turns what is not symmetric
    melanin = jnp.clip(who["melanin"], 0.0, 1.0)
    skin = _ramp(SKIN, melanin)
    skin = [skin[0] * (1.0 + 0.06 * who["ruddiness"]), skin[1], skin[2] * (1.0 - 0.08 * who["ruddiness"])]
    # Dark skin comes with dark hair, fair skin with any.
    hair_tone = jnp.clip(who["hair_tone"] + 0.7 * melanin * (1.0 - who["hair_tone"]), 0.0, 1.0)
    hair = _ramp(HAIR, hair_tone)
    iris = _ramp(IRIS, jnp.clip(who["iris_tone"] + 0.5 * melanin, 0.0, 1.0))

    flush = jnp.exp(-14.0 * ((jnp.abs(x) - 0.42) ** 2 + (y + 0.18) ** 2)) + jnp.exp(
        -60.0 * (x * x + (y - who["eye_height"] + who["nose_length"]) ** 2)
    )
    flush = flush * front * (0.5 + 0.5 * who["ruddiness"])
    freckles = jnp.clip(who["freckles"], 0.0, 1.0) * _step(grain - 0.9, 0.4) * jnp.exp(-9.0 * (y + 0.12) ** 2)
    tone = 1.0 + 0.05 * grain - 0.22 * freckles * front
    albedo = [
        skin[0] * tone * (1.0 + 0.06 * flush),
        skin[1] * tone * (1.0 - 0.10 * flush),
        skin[2] * tone * (1.0 - 0.10 * flush),
    ]

    moles = jnp.zeros_like(x)
    for i in range(MOLES):
        away = jnp.hypot(x - who["moles"][i, 0], y - who["moles"][i, 1] + 0.15)
        moles = jnp.maximum(moles, _step(0.028 + 0.008 * i - away, soft))
    albedo = _mix(albedo, [0.3 * c for c in skin], moles * front * jnp.clip(who["mole_strength"], 0.0, 1.0))

    # Both eyes at once: everything left of the nose is mirrored.
    eye_x = jnp.abs(x) - who["eye_spacing"]
    eye_y = y - who["eye_height"] - who["eye_slant"] * eye_x
    bow = jnp.maximum(1.0 - (eye_x / who["eye_width"]) ** 2, 0.0)
    squint = 1.0 - 0.25 * jnp.clip(how["smile"], 0.0, 1.0)
    opening = who["eye_open"] * (1.0 - jnp.clip(how["blink"], 0.0, 1.0)) * squint
    upper, lower = opening * bow, -0.6 * opening * bow
    within = jnp.minimum(jnp.minimum(upper - eye_y, eye_y - lower), who["eye_width"] - jnp.abs(eye_x))
    eye = _step(within, 0.7 * soft) * front
    ball = jnp.hypot(eye_x - 0.07 * how["gaze"] * side, eye_y - 0.2 * opening)
    in_iris = _step(0.062 - ball, 0.7 * soft)
    white = 0.60 - 0.1 * melanin - 0.25 * jnp.abs(eye_x) / who["eye_width"]
    eyeball = _mix([white, white * 0.95, white * 0.92], iris, in_iris)
    pupil = _step(0.028 - ball, 0.7 * soft)
    glint = _step(0.018 - jnp.hypot(eye_x - 0.07 * how["gaze"] * side - 0.025 * how["light_x"], eye_y - 0.03), soft)
    eyeball = [c * (1.0 - 0.9 * pupil) + 0.7 * glint for c in eyeball]
    beside = _step(who["eye_width"] * 1.05 - jnp.abs(eye_x), soft)
    lash = _step(0.011 - jnp.abs(eye_y - upper - 0.004), 0.8 * soft) * beside
    crease = _step(0.009 - jnp.abs(eye_y - upper - 0.045), soft) * beside
    bag = jnp.exp(-250.0 * (eye_y + 0.085) ** 2 - 60.0 * eye_x * eye_x) * jnp.clip(who["age"], 0.0, 1.0)
    albedo = [c * (1.0 - front * (0.30 * crease + 0.22 * bag)) for c in albedo]
    albedo = _mix(albedo, eyeball, eye)
    albedo = [c * (1.0 - 0.8 * lash * front) for c in albedo]

    brow_x = (eye_x + 0.6 * who["brow_length"]) / (1.3 * who["brow_length"])
    brow_y = eye_y + who["eye_slant"] * eye_x - who["brow_height"] - how["brow_raise"] - who["brow_slope"] * eye_x
    brow_y = brow_y + who["brow_arch"] * (eye_x - 0.03) ** 2
    brow = _step(who["brow_thickness"] * (1.15 - 0.75 * brow_x) - jnp.abs(brow_y), soft)
    brow = brow * _step(brow_x, 0.15) * _step(1.0 - brow_x, 0.15) * front * (0.75 + 0.12 * grain)
    brow_colour = _ramp(HAIR, jnp.clip(hair_tone + 0.12 + who["brow_tone"], 0.0, 1.0))
    albedo = _mix(albedo, brow_colour, jnp.clip(brow, 0.0, 1.0))

    nose_y = y - who["eye_height"] + who["nose_length"] + 0.065
    nostril = jnp.exp(-(((jnp.abs(x) - 0.65 * who["nose_width"]) / 0.035) ** 2) - (nose_y / 0.022) ** 2)
    wing = jnp.exp(-(((jnp.abs(x) - 1.75 * who["nose_width"]) / 0.02) ** 2) - ((nose_y - 0.05) / 0.06) ** 2)
    fold_x = jnp.abs(x) - 0.17 - 0.55 * (who["eye_height"] - who["nose_length"] - y)
    fold = jnp.exp(-((fold_x / 0.025) ** 2) - ((y + 0.36) / 0.12) ** 2)
    fold = fold * (0.5 * jnp.clip(who["age"], 0.0, 1.0) + 0.5 * jnp.clip(how["smile"], 0.0, 1.0))
    albedo = [c * (1.0 - front * (0.75 * nostril + 0.25 * wing + 0.30 * fold)) for c in albedo]

    smile, gape = how["smile"], jnp.clip(how["mouth_open"], 0.0, 1.0)
    mouth_x = x / (who["mouth_width"] * (1.0 + 0.22 * jnp.clip(smile, 0.0, 1.0)))
    mouth_y = y - who["mouth_height"] - 0.07 * smile * (mouth_x * mouth_x - 0.3)
    arch = jnp.maximum(1.0 - mouth_x * mouth_x, 0.0)
    notch = 1.0 - who["lip_bow"] * jnp.exp(-18.0 * mouth_x * mouth_x)
    gap = 0.075 * gape * arch
    top, bottom = gap * 0.4, -gap
    lip_top = top + who["lip_upper"] * arch * notch
    lip_bottom = bottom - who["lip_lower"] * jnp.sqrt(arch)
    lips = _step(jnp.minimum(lip_top - mouth_y, mouth_y - lip_bottom), soft)
    lips = lips * _step(1.0 - jnp.abs(mouth_x), 0.06) * front
    inside = _step(jnp.minimum(top - mouth_y, mouth_y - bottom), 0.6 * soft) * _step(gape, 0.05) * lips
    seam = jnp.exp(-((mouth_y / 0.02) ** 2)) * lips * (1.0 - _step(gape - 0.1, 0.1))
    red = 0.42 + 0.4 * who["lip_redness"]
    lip_colour = [skin[0] * 0.84, skin[1] * (1.0 - 0.75 * red), skin[2] * (1.0 - 0.55 * red)]
    teeth = _step(mouth_y - bottom - 0.25 * gap, soft)
    beard_noise = jnp.clip(0.9 + 0.12 * grain, 0.0, 1.1)
    cheek_line = who["beard_line"] - 0.35 * (0.6 - jnp.abs(x)) * (jnp.abs(x) < 0.6)
    beard = _step(cheek_line - y, 0.14) * _step(0.75 - jnp.abs(x) * 0.5, 0.3) * jnp.clip(who["beard"], 0.0, 1.0)
    moustache = jnp.exp(-(((y - who["mouth_height"] - 0.10) / 0.045) ** 4) - (x / (1.25 * who["mouth_width"])) ** 4)
    moustache = moustache * jnp.clip(who["moustache"] + 0.6 * jnp.clip(who["beard"], 0.0, 1.0), 0.0, 1.0)
    whiskers = jnp.clip(jnp.maximum(beard, moustache) * 0.9 * beard_noise, 0.0, 0.95) * _step(z, 0.1)
    albedo = _mix(albedo, [0.8 * c for c in brow_colour], whiskers * (1.0 - lips))
    albedo = _mix(albedo, lip_colour, 0.85 * lips)
    albedo = _mix(albedo, [0.05 + 0.5 * teeth, 0.02 + 0.5 * teeth, 0.02 + 0.45 * teeth], inside)
    albedo = [c * (1.0 - 0.75 * seam) for c in albedo]

    # The strands cross the line at different heights, so its edge is soft and uneven.
    hairy = _step(hair_inside - 0.03 + 0.035 * grain, 0.07)
    shine = jnp.exp(-18.0 * (normal_y - 0.45 - 0.2 * how["light_y"]) ** 2)
    strands = jnp.clip(0.85 + 0.28 * grain, 0.2, 1.7) * (1.0 + 0.6 * shine)
    albedo = _mix(albedo, [c * strands for c in hair], hairy)

    # --- glasses ---------------------------------------------------------------------------------------------------
    wears = _step(0.35 * who["glasses_habit"] + 0.45 * (who["glasses_habit"] > 0.7) - how["glasses"], 0.01)
    lens_x = (jnp.abs(x) - who["eye_spacing"]) / who["glasses_width"]
    lens_y = (y - who["eye_height"] + 0.02) / who["glasses_height"]
    lens = (jnp.abs(lens_x) ** who["glasses_shape"] + jnp.abs(lens_y) ** who["glasses_shape"] + 1e-6) ** (
        1.0 / who["glasses_shape"]
    )
    frame = _step(0.018 - jnp.abs(lens - 1.0) * who["glasses_height"], soft)
    bridge = _step(0.012 - jnp.abs(lens_y * who["glasses_height"] - 0.03), soft) * (
        jnp.abs(x) < who["eye_spacing"] - who["glasses_width"]
    )
    temple = _step(0.014 - jnp.abs(lens_y * who["glasses_height"] - 0.04), soft) * _step(lens_x - 1.0, 0.05)
    frame = jnp.maximum(frame * front, jnp.maximum(bridge * front, temple)) * wears * _step(z + 0.05, 0.1)
    metal = 0.03 + 0.35 * jnp.maximum(who["glasses_tone"] - 0.5, 0.0)
    albedo = _mix(albedo, [metal * 1.1, metal, metal * 0.9], 0.9 * frame)
    reflection = 0.10 * wears * front * _step(1.0 - lens, 0.1) * _step(lens_x * side + lens_y, 0.5)

    # --- light -----------------------------------------------------------------------------------------------------
    light_x, light_y = how["light_x"], how["light_y"]
    scale = 1.0 / jnp.sqrt(light_x * light_x + light_y * light_y + 1.0)
    facing = (normal_x * light_x + normal_y * light_y + normal_z) * scale
    crevice = jnp.clip(1.0 + 2.2 * jnp.minimum(bumps, 0.0), 0.4, 1.0)
    # What the nose and the brows would shade if light were traced: below, and away from the light.
    under_x = x + 0.10 * light_x
    under_y = y - who["eye_height"] + who["nose_length"] + 0.13
    nose_shade = jnp.exp(-((under_x / 0.13) ** 2) - (under_y / 0.055) ** 2) * front
    flank = jnp.exp(-(((x + jnp.sign(light_x) * 0.16) / 0.06) ** 2) - ((under_y - 0.2) / 0.13) ** 2) * front
    shaded = 0.45 * nose_shade * jnp.clip(0.3 + light_y, 0.0, 1.0) + 0.5 * flank * jnp.abs(light_x)
    crevice = crevice * (1.0 - shaded * how["light_hardness"])
    ambient = how["ambient"] * (0.75 + 0.25 * normal_y) * crevice
    half = 1.0 / jnp.sqrt(light_x * light_x + light_y * light_y + (1.0 / scale + 1.0) ** 2)
    mirror = (normal_x * light_x + normal_y * light_y + normal_z * (1.0 / scale + 1.0)) * half
    gloss = who["shine"] * jnp.maximum(mirror, 0.0) ** 24 * (1.0 - 0.8 * hairy) + reflection
    warmth = how["light_warmth"]
    tint = (1.0 + warmth, 1.0, 1.0 - warmth)
    # Light bleeds through skin, red the farthest: the wrap softens the shadow's edge by colour.
    wraps = (0.38, 0.24, 0.18)
    face = []
    for channel in range(3):
        lit = jnp.maximum(facing + wraps[channel], 0.0) / (1.0 + wraps[channel])
        lit = how["light_hardness"] * lit * crevice * tint[channel] + ambient * (2.0 - tint[channel])
        face.append(albedo[channel] * lit * 1.25 + gloss * how["light_hardness"])

    # --- what is behind the head -----------------------------------------------------------------------------------
    clutter = how["background_clutter"] * 0.45 * grain
    fall = 1.0 + how["background_slope"] * screen_y + clutter
    picture = [jnp.clip(c * fall, 0.005, 1.0) for c in _muted(how, "background")]
    centre = px + 0.12 * sin_yaw
    locks = jnp.clip(who["hair_length"], 0.0, 1.0)
    curtain = 1.15 * who["head_width"] + who["hair_volume"] + 0.03 * jnp.sin(7.0 * py) * who["hair_wave"]
    crown = jnp.maximum(py - 0.1, 0.0) / (0.75 * who["head_height"])
    outline = curtain * (1.0 - jnp.sqrt((centre / curtain) ** 2 + crown * crown + 1e-6))
    behind = _step(outline + 0.02 * jnp.sin(23.0 * py), 0.05)
    behind = behind * _step(py + 0.35 + 1.1 * locks + 0.06 * jnp.sin(17.0 * centre + 9.0 * who["skin_u"]), 0.06)
    behind = behind * _step(locks - 0.15, 0.05)
    shade = jnp.clip(0.45 + 0.12 * jnp.sin(38.0 * centre + 3.0 * jnp.sin(3.0 * py)), 0.2, 0.8)
    picture = _mix(picture, [c * shade for c in hair], behind)
    neck_x = centre / (0.62 * who["head_width"] + 0.05 * (py < -1.0))
    neck = _step(1.0 - jnp.abs(neck_x), 0.05) * _step(-0.55 - py, 0.05)
    round_ = jnp.sqrt(jnp.maximum(1.0 - neck_x * neck_x, 0.02))
    neck_light = (0.30 + 0.45 * round_ + 0.25 * neck_x * light_x) * how["light_hardness"] * 0.75 + 0.6 * how["ambient"]
    neck_light = neck_light * (0.55 + 0.45 * _step(-0.98 - 0.1 * light_y - py, 0.25))
    picture = _mix(picture, [c * neck_light for c in skin], neck)
    shoulders = _step(-0.94 - 0.22 * centre * centre - 0.22 * jnp.exp(-6.0 * centre * centre) - py, 0.03)
    cloth = jnp.clip(0.8 - 0.3 * jnp.abs(centre) + 0.2 * light_x * centre, 0.1, 1.2)
    picture = _mix(picture, [c * cloth for c in _muted(how, "clothes")], shoulders)
    picture = _mix(picture, face, head)

    # --- something in front: a hand, a microphone, somebody's shoulder ---------------------------------------------
    there = _step(0.16 - how["occluder"], 0.005)
    toward = screen_x * jnp.cos(how["occluder_angle"]) + screen_y * jnp.sin(how["occluder_angle"])
    past = screen_y * jnp.cos(how["occluder_angle"]) - screen_x * jnp.sin(how["occluder_angle"])
    block = _step(toward - how["occluder_reach"] - 0.5 * (past - how["texture_u"] + 0.5) ** 2, 0.04) * there
    block_tone = 0.02 + 0.45 * how["occluder_tone"] * (1.0 + 0.3 * past)
    picture = _mix(
        picture, [block_tone, block_tone * (0.5 + how["texture_u"]), block_tone * (0.5 + how["texture_v"])], block
    )

    # --- the camera ------------------------------------------------------------------------------------------------
    gain = jnp.exp(how["exposure"])
    gains = (gain * (1.0 + how["white_red"]), gain, gain * (1.0 + how["white_blue"]))
    image = _blur(
        jnp.stack([jnp.maximum(c * g, 0.0) for c, g in zip(picture, gains, strict=True)]), how["blur"] * (size / 64.0)
    )
    image = jnp.sqrt(image / (1.0 + 0.25 * image * image))
    image = (image - 0.45) * how["contrast"] + 0.45
    bits = jax.random.bits(jax.random.key(how["grain"]), (size, size), jnp.uint32)
    speckle = jnp.stack([((bits >> shift) & 0x3FF).astype(jnp.float32) / 1023.0 - 0.5 for shift in (0, 10, 20)])
    image = image + how["noise"] * 3.4 * speckle
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.uint8).transpose(1, 2, 0)


def _look_up(texture: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Bilinear look-up in the periodic noise table; u and v in periods."""
    u, v = u * NOISE_SIDE, v * NOISE_SIDE
    column, row = jnp.floor(u), jnp.floor(v)
    along, down = u - column, v - row
    index = jnp.mod(row.astype(jnp.int32), NOISE_SIDE) * NOISE_SIDE + jnp.mod(column.astype(jnp.int32), NOISE_SIDE)
    taps = texture[index]
    upper = taps[..., 0] + (taps[..., 1] - taps[..., 0]) * along
    lower = taps[..., 2] + (taps[..., 3] - taps[..., 2]) * along
    return upper + (lower - upper) * down


def _blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
    """[3, h, w] blurred by a Gaussian of `sigma` pixels, cut off at ±3 pixels."""
    weights = [jnp.exp(-0.5 * (k / jnp.maximum(sigma, 0.05)) ** 2) for k in range(4)]
    total = weights[0] + 2.0 * (weights[1] + weights[2] + weights[3])
    height, width = image.shape[1:]
    for axis, side in ((1, height), (2, width)):
        padded = jnp.pad(image, [(3, 3) if i == axis else (0, 0) for i in range(3)], mode="edge")
        image = jnp.zeros_like(image)
        for k in range(7):
            image = image + weights[abs(k - 3)] / total * jax.lax.slice_in_dim(padded, k, k + side, axis=axis)
    return image

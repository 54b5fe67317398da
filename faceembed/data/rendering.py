"""One picture of one procedural person: shape, paint, light and camera, as a pure function of parameters.

The head is a star-shaped solid: in direction d its radius is an ellipsoid × (1 + bumps), and the bumps (nose, brows,
lids, lips, cheeks, jaw) are Gaussians of the person. The hair is a second such shell, of other thickness and length,
and an ear is a thin ellipsoid. Orthographic rays meet the shells in a few Newton steps and the ellipsoid in closed
form; normals are differences of neighbouring depths. Eyes, brows, lips, beard, moles and wrinkles are painted as
functions of d. Every edge is a soft step of about a pixel, so that a part moves by fractions of a pixel without pops.

Every field is its own [size, size] array (structure of arrays): XLA's CPU back end vectorises those, and not a trailing
axis of 3. A colour is a list of three such arrays, linear RGB.

Lengths are in head radii (the head is about 1.4 wide and 1.9 high), places on the face in direction space (unit
vectors; x to the image's right, y up, z out of the face), angles in radians.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

Parameters = dict[str, jax.Array]
"""Named numbers of one person or one photo, each []."""

Colour = list[jax.Array]
"""Red, green and blue, linear."""

Number = jax.Array | float

Normal = tuple[jax.Array, jax.Array, jax.Array]
"""Unit vectors in the camera's frame: x to the right, y up, z towards the camera."""

Fields = SimpleNamespace
"""Named fields and numbers that one stage hands to the next."""

HEAD_STEPS = 6
"""Newton steps from a guess to the skin."""

HAIR_FRONT, HAIR_STRIDE, HAIR_STEPS = 1.2, 0.17, 9
"""Where the march to the hair begins, how far a step goes, and how many there are."""

NOISE_SIDE = 256

# Linear RGB, from light to dark; a person's place on the ramp is `melanin`, `hair_tone` or `iris_tone`.
SKIN = ((0.86, 0.60, 0.48), (0.76, 0.49, 0.35), (0.58, 0.33, 0.20), (0.34, 0.17, 0.09), (0.15, 0.072, 0.042))
HAIR = (
    (0.66, 0.50, 0.27),
    (0.45, 0.25, 0.085),
    (0.30, 0.10, 0.03),
    (0.14, 0.065, 0.028),
    (0.05, 0.028, 0.018),
    (0.016, 0.012, 0.011),
)
GREY = (0.50, 0.49, 0.47)
FRAMES = ((0.012, 0.011, 0.012), (0.14, 0.06, 0.02), (0.45, 0.36, 0.20), (0.30, 0.31, 0.34), (0.25, 0.02, 0.03))
IRIS = ((0.20, 0.38, 0.52), (0.16, 0.30, 0.17), (0.24, 0.125, 0.045), (0.06, 0.03, 0.015))


SKIN_WRAP = (0.42, 0.26, 0.20)
"""How far light reaches past the terminator in red, green and blue: it bleeds through skin, red the farthest."""
CLOTH_WRAP = (0.15, 0.15, 0.15)


def picture(who: Parameters, how: Parameters, texture: jax.Array, size: int) -> jax.Array:
    """One photo of the person `who` under the conditions `how`.

    Args:
      who: one person of `synthetic.identity_parameters`.
      how: one photo of `synthetic.photo_parameters`.
      texture: `pink_noise()`.
      size: side in pixels.

    Returns:
      [size, size, 3] uint8 RGB.
    """
    view = _settled(_view(how, size))
    form = _settled(_form(who, how))
    backdrop = _background(how, view, texture)
    head = _settled(_trace_head(who, form, view))
    hair = _settled(_trace_hair(who, how, form, view, head, texture))
    skin, gloss = jax.lax.optimization_barrier(_paint_skin(who, how, form, view, head, texture))
    skin, gloss = _paint_features(who, how, form, view, head, skin, gloss)

    # --- from back to front ----------------------------------------------------------------------------------------
    scene = _body(how, form, view, head, backdrop)
    ear, ear_cover, ear_depth = _ear(who, how, form, view)
    # What lies under the hair's edge is in its shade.
    below = _hair_line(who, how, form, head.x, head.y, head.z)
    shade = 1.0 - (0.05 + 0.9 * form.volume) * jnp.exp(-((jnp.minimum(below, 0.0) / 0.08) ** 2)) * form.tufts
    shade = shade * (1.0 - 0.45 * form.hat * _step(head.y - 0.27 + 0.20 * form.brim, 0.02 + 0.15 * form.brim))
    face = _shade(how, [c * shade for c in skin], head.normal, head.open * shade, SKIN_WRAP, gloss)
    scene = _mix(scene, ear, ear_cover * (1.0 - head.cover * _step(head.depth - ear_depth, 0.02)))
    scene = _mix(scene, face, head.cover * (1.0 - ear_cover * _step(ear_depth - head.depth, 0.02)))
    front = jnp.maximum(
        jnp.where(head.cover > 0.5, head.depth, _neck_depth(form, view)), jnp.where(ear_cover > 0.5, ear_depth, -9.0)
    )
    scene = _mix(scene, hair.colour, hair.cover * _step(hair.depth - front + 0.01, 0.02))
    scene = _glasses(who, how, view, head, scene)
    scene = _occluders(who, how, form, view, head, scene)
    return _camera(how, scene, size)


def _settled(part: Fields) -> Fields:
    """The same, computed once: XLA would else fuse a person's numbers into every pixel's loop."""
    return Fields(**jax.lax.optimization_barrier(vars(part)))


# ---- shape -----------------------------------------------------------------------------------------------------------


def _view(how: Parameters, size: int) -> Fields:
    """Rays in the head's frame: a point at depth t is (ox, oy, oz) + t·(dx, dy, dz), t towards the camera."""
    axis = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (2.0 / size) - 1.0
    screen_x, screen_y = jnp.meshgrid(axis, -axis)
    shifted_x = screen_x * how["zoom"] + how["shift_x"]
    shifted_y = screen_y * how["zoom"] + how["shift_y"]
    cos, sin = jnp.cos(how["roll"]), jnp.sin(how["roll"])
    px, py = cos * shifted_x + sin * shifted_y, cos * shifted_y - sin * shifted_x
    cos_yaw, sin_yaw = jnp.cos(how["yaw"]), jnp.sin(how["yaw"])
    cos_pitch, sin_pitch = jnp.cos(how["pitch"]), jnp.sin(how["pitch"])
    return Fields(
        screen_x=screen_x, screen_y=screen_y, px=px, py=py, pixel=2.0 * how["zoom"] / size,
        ox=px * cos_yaw, oy=py * cos_pitch + px * sin_yaw * sin_pitch, oz=px * sin_yaw * cos_pitch - py * sin_pitch,
        dx=-sin_yaw, dy=cos_yaw * sin_pitch, dz=cos_yaw * cos_pitch, sin_yaw=sin_yaw, sin_pitch=sin_pitch,
    )  # fmt: skip


def _form(who: Parameters, how: Parameters) -> Fields:
    """Numbers of this face in this photo that several parts need."""
    male = _step(who["masculinity"] - 0.5, 0.22)
    age = jnp.clip(who["age"], 0.0, 1.0)
    smile, gape = how["smile"], jnp.clip(how["mouth_open"], 0.0, 1.0)
    length = jnp.clip(who["hair_length"] + 0.25 - 0.75 * male, -1.0, 1.0)
    curls = _step(who["hair_wave"] - 0.7, 0.2)
    melanin = jnp.clip(who["melanin"], 0.0, 1.0)
    # Dark skin comes with dark hair, fair skin with any; grey comes with age.
    tone = jnp.clip(who["hair_tone"] + 0.75 * melanin * (1.0 - who["hair_tone"]), 0.0, 1.0)
    grey = _step(age - 0.72, 0.22)
    hair = [c + (g - c) * 0.85 * grey for c, g in zip(_ramp(HAIR, tone), GREY, strict=True)]
    ruddy = who["ruddiness"]
    skin = _ramp(SKIN, melanin)
    skin = [skin[0] * (1.0 + 0.05 * ruddy), skin[1] * (1.0 - 0.02 * ruddy), skin[2] * (1.0 - 0.08 * ruddy)]
    neck = 0.37 + 0.09 * male + 0.10 * (who["head_width"] - 0.7)

    stuff = [0.02 + 0.5 * how["occluder_tone"] * (0.5 + how[f"texture_{c}"]) for c in "uv"]

    return Fields(
        male=male, age=age, smile=smile, happy=jnp.clip(smile, 0.0, 1.0), gape=gape, melanin=melanin,
        tip_y=who["eye_height"] - who["nose_length"], mouth_y=who["mouth_height"], lopsided=0.014 * who["asymmetry"],
        skin=skin, hair=hair, grey=grey, neck=neck,
        length=length, curls=curls, cloth=[stuff[0], 0.5 * (stuff[0] + stuff[1]), stuff[1]],
        hat=_between(how["hat"], -1.0, 0.03), brim=_between(how["hat"], -1.0, 0.018),
        locks=_step(length - 0.12, 0.22),
        # Closely cropped hair lets the skin through, and thins out on top before it is gone.
        tufts=0.6 + 0.4 * _step(length + 0.62, 0.2), bald=_step(-0.70 - length, 0.16),
        volume=who["hair_volume"] * (0.2 + 0.8 * _step(length + 0.55, 0.25)) + 0.20 * curls * _step(length + 0.1, 0.6),
        quiff=who["hair_quiff"] * _step(length + 0.45, 0.2), beard=jnp.clip(who["beard"], 0.0, 1.0) * male,
        moustache=jnp.clip(who["moustache"], 0.0, 1.0) * male,
    )  # fmt: skip


def _ellipsoid(who: Parameters, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """The skull's radius in direction (x, y, z), narrower towards the jaw."""
    low = jnp.clip(-y, 0.0, 1.0)
    wide = x / (who["head_width"] * (1.0 - who["jaw_taper"] * low * low))
    high, deep = y / who["head_height"], z / who["head_depth"]
    return jax.lax.rsqrt(wide * wide + high * high + deep * deep)


def _trace(
    view: Fields, reach: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], start: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Depth at which each ray meets radius = reach(x, y, z), and the least gap it came to on its way."""

    def newton(i: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        depth, least = carry
        x, y, z, radius = _direction(view, depth)
        gap = radius - reach(x, y, z)
        # d(radius)/d(depth) is depth/radius; its floor keeps grazing rays from leaping.
        return jnp.maximum(depth - gap / jnp.maximum(depth / radius, 0.4), -0.25), jnp.minimum(least, gap)

    return jax.lax.fori_loop(0, steps, newton, (start, jnp.full_like(start, 9.0)))


def _direction(view: Fields, depth: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Unit vector and length of the point at `depth` on each ray."""
    x, y, z = view.ox + depth * view.dx, view.oy + depth * view.dy, view.oz + depth * view.dz
    inverse = jax.lax.rsqrt(x * x + y * y + z * z + 1e-6)
    return x * inverse, y * inverse, z * inverse, 1.0 / inverse


def _meet_sphere(origin: Sequence[jax.Array], direction: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Rays origin + t·direction against the unit sphere: the larger t that meets it (of the nearest point where none
    does), and how far the nearest point is outside it."""
    a = sum(d * d for d in direction)
    b = sum(o * d for o, d in zip(origin, direction, strict=True))
    c = sum(o * o for o in origin)
    t = (jnp.sqrt(jnp.maximum(b * b - a * (c - 1.0), 0.0)) - b) / a
    return t, jnp.sqrt(jnp.maximum(c - b * b / a, 0.0)) - 1.0


def _normal(depth: jax.Array, pixel: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unit normals in the camera's frame from the depths of neighbouring pixels."""
    padded = jnp.pad(depth, 1, mode="edge")
    slope_x = jnp.clip((padded[1:-1, 2:] - padded[1:-1, :-2]) / (2 * pixel), -2.5, 2.5)
    slope_y = jnp.clip((padded[:-2, 1:-1] - padded[2:, 1:-1]) / (2 * pixel), -2.5, 2.5)
    z = jax.lax.rsqrt(slope_x * slope_x + slope_y * slope_y + 1.0)
    return -slope_x * z, -slope_y * z, z


def _trace_head(who: Parameters, form: Fields, view: Fields) -> Fields:
    """Where rays meet the head: x, y, z (direction), depth, normal, cover in 0..1, least gap, and `open` (0..1): how
    much of the sky a hollow sees."""
    nasion = who["eye_height"] + 0.05
    bridge_length = nasion - form.tip_y
    width = 0.045 + 0.35 * who["nose_width"]
    jaw = who["jaw_square"] + 0.05 * form.male
    drop = 0.05 * form.gape

    def bumps(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        ax = jnp.sqrt(x * x + 0.0012)

        def at(amplitude: Number, cx: Number, cy: Number, wide: Number, high: Number) -> jax.Array:
            across, along = (ax - cx) * (1.0 / wide), (y - cy) * (1.0 / high)
            return amplitude * jnp.exp(-across * across - along * along)

        def around(amplitude: Number, concentration: float, mx: Number, my: Number, mz: Number) -> jax.Array:
            scale = jax.lax.rsqrt(jnp.asarray(mx * mx + my * my + mz * mz, jnp.float32))
            return amplitude * jnp.exp(concentration * ((ax * mx + y * my + z * mz) * scale - 1.0))

        t = (nasion - y) / bridge_length
        rise = who["nose_bridge"] * _ramp01(t + 0.25, 0.55) + who["nose_tip"] * jnp.clip(t, 0.0, 1.0) ** 2
        fall = 1.0 - _ramp01(t - 0.90, 0.42)
        spread = (x - form.lopsided * jnp.clip(t, 0.0, 1.0)) / (width * (0.75 + 0.45 * jnp.clip(t, 0.0, 1.2)))
        nose = rise * fall * jnp.exp(-spread * spread)
        return (
            nose
            + at(0.35 * who["nose_tip"], 0.0, form.tip_y + 0.02, 0.075, 0.075)
            + at(who["nose_wings"], who["nose_width"], form.tip_y + 0.005, 0.055, 0.06)
            + at(who["brow_ridge"] + 0.02 * form.male, 0.27, who["eye_height"] + 0.17, 0.24, 0.08)
            + at(who["socket"], who["eye_spacing"] * 0.95, who["eye_height"] + 0.02, 0.19, 0.12)
            + at(0.055, who["eye_spacing"], who["eye_height"], 0.13, 0.075)
            + around(who["cheekbone"] + 0.035 * form.happy, 20.0, 0.46, -0.16, 0.80)
            + around(who["cheek"], 12.0, 0.50, -0.46, 0.65)
            + around(jaw, 14.0, 0.58, -0.66, 0.42)
            + at(who["muzzle"], 0.0, form.mouth_y + 0.02, 0.26, 0.22)
            + at(0.5 * who["lip_upper"], 0.0, form.mouth_y + 0.035, 0.6 * who["mouth_width"], 0.035)
            + at(0.6 * who["lip_lower"], 0.0, form.mouth_y - 0.05 - drop, 0.5 * who["mouth_width"], 0.045)
            + at(-0.025, 0.0, form.mouth_y - 0.145 - drop, 0.16, 0.05)
            + around(who["chin"] + 0.05, 26.0, 0.0, -0.80 - drop, 0.62)
            + around(who["forehead"], 6.0, 0.0, 0.58, 0.78)
        )

    def reach(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        return _ellipsoid(who, x, y, z) * (1.0 + bumps(x, y, z))

    start = jnp.sqrt(jnp.maximum(0.75 - (view.px / 0.75) ** 2 * 0.72 - (view.py / 0.97) ** 2 * 0.72, 0.01))
    depth, least = _trace(view, reach, start, HEAD_STEPS)
    x, y, z, _ = _direction(view, depth)
    hollow = jnp.exp(-(((jnp.abs(x) - 0.95 * who["eye_spacing"]) / 0.17) ** 2) - ((y - who["eye_height"]) / 0.11) ** 2)
    corner = jnp.exp(-(((jnp.abs(x) - 0.16) / 0.05) ** 2) - ((y - who["eye_height"] - 0.01) / 0.09) ** 2)
    return Fields(
        x=x, y=y, z=z, depth=depth, least=least, normal=_normal(depth, view.pixel),
        cover=_step(0.6 * view.pixel - least, 0.8 * view.pixel), front=_step(z - 0.15, 0.15),
        open=1.0 + 2.2 * who["socket"] * hollow - 0.15 * corner,
    )  # fmt: skip


# ---- hair ------------------------------------------------------------------------------------------------------------


def _hair_line(who: Parameters, how: Parameters, form: Fields, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """How far direction (x, y, z) lies inside the hair: > 0 is hair. The line runs over the forehead and before the
    ears, the part bends it, receding temples lift it; long hair also falls beside the face."""
    fringe = who["hair_line"] + who["hair_temples"] * (x * x - 0.25) * z + 0.9 * who["hair_part"] * x * z
    fringe = fringe + who["hair_peak"] * (0.26 - jnp.sqrt((x - 0.6 * who["hair_part"]) ** 2 + 0.003)) * z
    fringe = fringe + form.bald * 0.9 * jnp.exp(-((x / 0.62) ** 4)) + 0.08 * form.bald
    crown = 0.80 * y - 0.60 * z - fringe - how["hair_dishevelled"] * (0.4 + jnp.abs(x))
    beside = who["hair_frame"] + 0.75 * (form.locks - 1.0) - z + 0.15 * y
    return jnp.maximum(crown, beside)


def _hat_line(y: jax.Array, z: jax.Array) -> jax.Array:
    """How far a direction (·, y, z) lies inside a hat's dome."""
    return 0.97 * y - 0.10 * z - 0.30


def _trace_hair(
    who: Parameters, how: Parameters, form: Fields, view: Fields, head: Fields, texture: jax.Array
) -> Fields:
    """The shell of hair: lit colour, cover and depth."""
    ends = 0.30 + 1.25 * jnp.clip(form.length, 0.0, 1.0) * form.locks + 0.5 * (1.0 - form.locks)
    flare = 1.0 + (0.06 + 0.22 * form.curls + 0.6 * form.volume) * form.locks

    def reach(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        low = jnp.clip(-y, 0.0, 1.0)
        wide = x / (who["head_width"] * (1.0 + (flare - 1.0) * low))
        high = y / (who["head_height"] * (1.0 + 1.3 * form.locks * _ramp01(low, 0.6)))
        deep = z / (who["head_depth"] + 0.03)
        base = jax.lax.rsqrt(wide * wide + high * high + deep * deep)
        base = jnp.minimum(base, ends / jnp.maximum(low, 0.05))
        inside = _step(_hair_line(who, how, form, x, y, z) - 0.02, 0.09)
        swell = form.volume * (0.85 + 0.20 * y) + 0.05 * jnp.clip(z, 0.0, 1.0)
        swell = swell + form.quiff * jnp.clip(1.6 * y - 0.6, 0.0, 1.0) * jnp.clip(1.5 * z + 0.2, 0.0, 1.0)
        skull = _ellipsoid(who, x, y, z)
        tuft = 0.75 * skull + (base * (1.02 + swell) - 0.75 * skull) * inside
        hat = skull * (1.09 + 0.06 * _ramp01(y - 0.3, 0.5))
        return jnp.where((_hat_line(y, z) > 0.0) & (form.hat > 0.5), hat, tuft)

    # The shell ends in steep rims, which Newton steps leap over: march, then refine where the gap changes its sign.
    def gap(depth: jax.Array) -> jax.Array:
        x, y, z, radius = _direction(view, depth)
        return radius - reach(x, y, z)

    def march(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        outer, outer_gap, inner, inner_gap, least = carry
        here = HAIR_FRONT - (i + 1.0) * HAIR_STRIDE
        now = gap(jnp.full_like(outer, here))
        still, found = outer_gap > 0.0, inner_gap <= 0.0
        inner, inner_gap = jnp.where(found, inner, here), jnp.where(found, inner_gap, now)
        advance = ~found & (now > 0.0) & still
        return (
            jnp.where(advance, here, outer),
            jnp.where(advance, now, outer_gap),
            inner,
            inner_gap,
            jnp.minimum(least, now),
        )

    outside = jnp.full_like(view.px, HAIR_FRONT)
    first = outside, jnp.full_like(outside, 0.5), outside, jnp.full_like(outside, 0.5), jnp.full_like(outside, 9.0)
    outer, outer_gap, inner, inner_gap, least = jax.lax.fori_loop(0, HAIR_STEPS, march, first)

    def refine(i: int, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        outer, outer_gap, inner, inner_gap = carry
        share = jnp.clip(outer_gap / (outer_gap - inner_gap + 1e-6), 0.05, 0.95)
        here = outer + (inner - outer) * share
        now = gap(here)
        out = now > 0.0
        return (
            jnp.where(out, here, outer), jnp.where(out, now, outer_gap),
            jnp.where(out, inner, here), jnp.where(out, inner_gap, now),
        )  # fmt: skip

    outer, outer_gap, inner, inner_gap = jax.lax.fori_loop(0, 2, refine, (outer, outer_gap, inner, inner_gap))
    share = jnp.clip(outer_gap / (outer_gap - inner_gap + 1e-6), 0.0, 1.0)
    depth = jnp.where(inner_gap <= 0.0, outer + (inner - outer) * share, 0.0)
    x, y, z, _ = _direction(view, depth)

    # Strands run from the crown like meridians; curls break them up.
    lean = 0.5 * who["hair_part"]
    norm = jax.lax.rsqrt(lean * lean + 0.85 * 0.85 + 0.45 * 0.45)
    along = (x * lean + 0.85 * y - 0.45 * z) * norm
    right, forward = x - 0.6 * lean * along, 0.9 * z + 0.47 * y
    turn = right / (jnp.abs(right) + jnp.abs(forward) + 1e-6)
    turn = 0.25 * jnp.where(forward > 0.0, turn, 2.0 * jnp.sign(right) - turn)  # -0.5..0.5, as good as an angle
    wave = who["hair_wave"] * (0.012 * _wave(2.2 * along + turn))
    grain = _look_up(
        texture,
        turn + wave,
        along * (0.05 + 0.10 * who["hair_wave"] + 0.30 * form.curls),
        who["hair_pattern"],
    )
    hatted = _step(_hat_line(y, z), 0.6 * view.pixel) * form.hat
    depth = depth + grain * (0.006 + 0.025 * form.curls) * (1.0 - hatted)
    normal = _normal(depth, view.pixel)

    # Strands end unevenly over the forehead; beside the face they fall past.
    above = _ramp01(y - 0.1, 0.2)
    edge = _hair_line(who, how, form, x, y, z) + 0.06 + above * (grain * (0.040 + 0.02 * who["hair_wave"]) - 0.06)
    cover = _step(0.9 * view.pixel - least + 0.012 * grain * (1.0 + form.curls), 0.9 * view.pixel + 0.012)
    # The uneven ends are seen against the face; beyond its outline there is hair or nothing.
    cover = cover * (1.0 - head.cover * (1.0 - _step(edge - 0.02, 0.045) * form.tufts))
    # Anisotropic highlight: a band where the strands lie across the half-way vector (Kajiya and Kay 1989).
    band = jnp.exp(-14.0 * (normal[1] - 0.35 - 0.25 * how["light_y"]) ** 2)
    roots = 0.85 + 0.15 * _ramp01(edge, 0.25)
    tone = jnp.clip(1.0 + 0.30 * grain, 0.25, 1.9) * roots * (1.0 + 0.75 * band * (1.0 - 0.6 * form.curls))
    tone = tone * (1.0 - 0.35 * form.locks * _ramp01(0.1 - depth, 0.3))
    cover = jnp.maximum(cover, hatted * _step(0.9 * view.pixel - least, 0.9 * view.pixel))
    knit = (
        1.0 + 0.10 * _wave(24.0 * turn) * (1.0 - form.brim) - 0.15 * jnp.exp(-(((_hat_line(y, z) - 0.10) / 0.02) ** 2))
    )
    albedo = _mix([c * tone for c in form.hair], [c * knit for c in form.cloth], hatted)
    colour = _shade(how, albedo, normal, jnp.ones_like(x), (0.3, 0.3, 0.3), 0.012 * band * (1.0 - hatted))
    return Fields(colour=colour, cover=cover, depth=depth)


# ---- ears, neck, clothes, background ---------------------------------------------------------------------------------


def _ear(who: Parameters, how: Parameters, form: Fields, view: Fields) -> tuple[Colour, jax.Array, jax.Array]:
    """Both ears at once (lit colour, cover, depth): a thin ellipsoid, turned out by `ear_flare`, met in closed form."""
    side = jnp.where(view.px > 0.0, 1.0, -1.0)
    tall, deep, thin = who["ear_size"], 0.58 * who["ear_size"], 0.045
    cos, sin = jnp.cos(who["ear_flare"]), jnp.sin(who["ear_flare"])
    # In the ear's frame u points out of its flat side, v up, w to its rear edge.
    x, z = view.ox * side - who["head_width"] * 0.97 - 0.75 * deep * sin, view.oz + 0.10
    u, v, w = (x * cos + z * sin) / thin, (view.oy - who["ear_height"]) / tall, (x * sin - z * cos) / deep
    dx = view.dx * side
    du, dv, dw = (dx * cos + view.dz * sin) / thin, view.dy / tall, (dx * sin - view.dz * cos) / deep
    depth, outside = _meet_sphere((u, v, w), (du, dv, dw))
    cover = _step(-outside * 0.5 * deep, 0.7 * view.pixel)
    v, w = v + depth * dv, w + depth * dw
    rim = _length(v, w + 0.1)
    bowl = jnp.exp(-((rim - 0.55) ** 2) * 12.0) * (u + depth * du > 0.0)
    albedo = [c * (1.0 - d * bowl) for c, d in zip(form.skin, (0.30, 0.45, 0.45), strict=True)]
    albedo = [albedo[0] * 1.02, albedo[1] * 0.90, albedo[2] * 0.88]
    return _shade(how, albedo, _normal(depth, view.pixel), 0.9 - 0.2 * bowl, SKIN_WRAP, 0.0), cover, depth


def _body(how: Parameters, form: Fields, view: Fields, head: Fields, scene: Colour) -> Colour:
    """Neck and clothes over the background."""
    centre = view.px - 0.10 * view.sin_yaw
    wide = form.neck + 0.5 * jnp.maximum(-0.90 - view.py, 0.0) ** 2
    across = jnp.clip(centre / wide, -1.0, 1.0)
    round_ = jnp.sqrt(jnp.maximum(1.0 - across * across, 0.02))
    neck = _step((wide - jnp.abs(centre)), 0.8 * view.pixel) * _step(-0.45 - view.py, 0.05)
    near = 0.42 + 0.58 * _ramp01(head.least, 0.5)  # the chin keeps the sky from the neck
    zero = jnp.zeros_like(across)
    lit = _shade(how, form.skin, (0.9 * across, zero, round_), near, SKIN_WRAP, 0.0)
    scene = _mix(scene, lit, neck)
    line = -0.88 - 0.16 * centre * centre + 0.10 * _step(jnp.abs(centre) - 0.5, 0.3)
    shoulders = _step(line - view.py, 0.02)
    neckline = -0.95 - 0.10 * how["collar"] - (0.5 - 0.3 * how["collar"]) * (0.55 - jnp.abs(centre))
    cloth = shoulders * _step(neckline - view.py, 0.8 * view.pixel)
    fold = 1.0 + 0.08 * _wave(1.4 * centre + 0.6 * view.py) - 0.25 * jnp.exp(-(((neckline - view.py) / 0.03) ** 2))
    bulge = jnp.clip(0.8 * centre, -0.8, 0.8)
    lit = _shade(
        how,
        [c * fold for c in _muted(how, "clothes")],
        (bulge, 0.45 + zero, jnp.sqrt(1.0 - bulge * bulge)),
        0.9,
        CLOTH_WRAP,
        0.0,
    )
    return _mix(scene, lit, cloth)


def _neck_depth(form: Fields, view: Fields) -> jax.Array:
    """Depth of the neck, of the shoulders below it, and far behind them of the air."""
    across = (view.px - 0.10 * view.sin_yaw) / form.neck
    round_ = jnp.sqrt(jnp.maximum(1.0 - across * across, 0.0)) * form.neck - 0.12
    return jnp.where((jnp.abs(across) < 1.0) & (view.py < -0.4), round_, jnp.where(view.py < -0.9, -0.25, -9.0))


def _background(how: Parameters, view: Fields, texture: jax.Array) -> Colour:
    """A wall out of focus: two tones with a soft border, and clutter."""
    angle = how["background_angle"]
    toward = view.screen_x * jnp.cos(angle) + view.screen_y * jnp.sin(angle) - how["background_edge"]
    other = 1.0 + how["background_slope"] * _step(toward, 0.04 + 0.5 * how["texture_u"])
    grain = _look_up(
        texture,
        how["background_scale"] * view.screen_x + how["texture_u"],
        how["background_scale"] * view.screen_y + how["texture_v"],
        jnp.zeros(()),
    )
    fall = other * (1.0 + 0.30 * how["background_clutter"] * grain)
    return [jnp.clip(c * fall, 0.005, 1.0) for c in _muted(how, "background")]


# ---- skin and the features painted on it -----------------------------------------------------------------------------


def _paint_skin(
    who: Parameters, how: Parameters, form: Fields, view: Fields, head: Fields, texture: jax.Array
) -> tuple[Colour, jax.Array]:
    """Albedo and gloss of bare skin: 1/f mottle, flush, freckles, moles, wrinkles, beard."""
    x, y, front = head.x, head.y, head.front
    ax = jnp.abs(x)
    grain = _look_up(texture, 0.30 * x, 0.30 * y, who["skin_pattern"])
    soft = 1.1 * view.pixel
    eye_y, tip_y = y - who["eye_height"], y - form.tip_y
    flush = jnp.exp(-13.0 * ((ax - 0.44) ** 2 + (y + 0.20) ** 2)) + 0.8 * jnp.exp(-70.0 * (x * x + tip_y * tip_y))
    flush = flush * front * (0.65 + 0.35 * who["ruddiness"] + 0.4 * form.happy)
    freckles = jnp.clip(who["freckles"], 0.0, 1.0) * _step(grain - 0.7, 0.35) * jnp.exp(-7.0 * (y + 0.10) ** 2)
    tone = 1.0 + 0.045 * grain - 0.28 * freckles * front
    skin = form.skin
    albedo = [c * tone * (1.0 + d * flush) for c, d in zip(skin, (0.04, -0.15, -0.14), strict=True)]

    moles = jnp.zeros_like(x)
    for i in range(who["moles"].shape[0]):
        away = _length(x - who["moles"][i, 0], y - who["moles"][i, 1] + 0.15)
        moles = jnp.maximum(moles, _step(0.032 + 0.006 * i - away, soft))
    albedo = _mix(albedo, [0.28 * c for c in skin], moles * front * jnp.clip(who["mole_strength"], 0.0, 1.0))

    # --- lines ---
    fold_x = ax - 0.15 - 0.42 * (form.tip_y + 0.03 - y)
    fold = jnp.exp(-((fold_x / 0.022) ** 2) - ((y - 0.5 * (form.tip_y + form.mouth_y) - 0.01) / 0.12) ** 2)
    fold = fold * (0.55 * form.age + 0.45 * form.happy)
    waves = jnp.exp(-8.0 * _wave(4.5 * (y - 0.25 * x * x) + 0.19) ** 2) * jnp.exp(
        -((ax / 0.42) ** 4) - ((eye_y - 0.42) / 0.14) ** 2
    )
    wrinkles = waves * (0.75 * form.age + 0.5 * jnp.clip(how["brow_raise"] / 0.045, 0.0, 1.0) * (0.3 + form.age))
    eye_x = ax - who["eye_spacing"]
    bag = jnp.exp(-(((eye_y + 0.105) / 0.03) ** 2) - (eye_x / 0.12) ** 2) * (0.25 + 0.75 * form.age)
    feet_x, feet_y = eye_x - who["eye_width"] - 0.06, eye_y + 0.01
    feet = jnp.exp(-6.0 * _wave(6.0 * feet_y) ** 2 - (feet_x / 0.05) ** 2 - (feet_y / 0.09) ** 2)
    lines = 0.30 * fold + 0.16 * wrinkles + 0.16 * bag + 0.22 * feet * form.age * (0.4 + 0.6 * form.happy)

    # --- nose ---
    nostril_x, nostril_y = (ax - 0.68 * who["nose_width"]) / 0.036, (tip_y + 0.062) / 0.022
    nostril = jnp.exp(-nostril_x * nostril_x - nostril_y * nostril_y)
    wing = jnp.exp(-(((ax - who["nose_width"] - 0.055) / 0.02) ** 2) - ((tip_y - 0.0) / 0.05) ** 2)
    lines = lines + 0.72 * nostril + 0.28 * wing
    albedo = [c * (1.0 - front * jnp.clip(d * lines, 0.0, 0.9)) for c, d in zip(albedo, (0.8, 1.0, 1.0), strict=True)]

    # --- beard ---
    stubble = jnp.clip(0.85 + 0.15 * grain, 0.0, 1.1)
    cheek_line = who["beard_line"] - 0.35 * (0.6 - ax) * (ax < 0.6)
    beard = _step(cheek_line - y, 0.10) * form.beard
    moustache = jnp.exp(-(((y - form.mouth_y - 0.095) / 0.05) ** 4) - (ax / (1.1 * who["mouth_width"])) ** 4)
    moustache = moustache * jnp.clip(form.moustache + 0.8 * form.beard, 0.0, 1.0)
    whiskers = jnp.clip(jnp.maximum(beard, moustache) * stubble, 0.0, 0.95) * _step(head.z, 0.1)
    shadow = 0.16 * form.male * _step(-0.20 - y, 0.15) * (1.0 - form.grey)
    albedo = [c * (1.0 - shadow * d * (1.0 - whiskers)) for c, d in zip(albedo, (1.0, 0.75, 0.55), strict=True)]
    albedo = _mix(albedo, [0.75 * c for c in form.hair], whiskers)
    gloss = who["shine"] * (1.0 - 0.8 * whiskers) * (1.0 + 0.15 * grain)
    return albedo, gloss


def _paint_features(
    who: Parameters, how: Parameters, form: Fields, view: Fields, head: Fields,
    albedo: Colour, gloss: jax.Array,
) -> tuple[Colour, jax.Array]:  # fmt: skip
    """Eyes, brows and mouth over the skin: albedo and gloss."""
    x, y, front = head.x, head.y, head.front
    soft = 1.1 * view.pixel
    side = jnp.clip(8.0 * x, -1.0, 1.0)
    ax = jnp.abs(x)

    # --- eyes: both at once, everything left of the nose is mirrored ---
    eye_x = ax - who["eye_spacing"]
    eye_y = y - who["eye_height"] - who["eye_slant"] * eye_x - 0.5 * form.lopsided * side
    across = eye_x / who["eye_width"]
    arch = jnp.maximum(1.0 - across * across, 0.0)
    opening = (
        who["eye_open"]
        * (1.0 - jnp.clip(how["blink"], 0.0, 1.0))
        * (1.0 - 0.22 * form.happy)
        * (1.06 - 0.12 * form.male)
    )
    upper, lower = opening * arch * (1.0 - 0.22 * across), -0.55 * opening * arch * (1.0 + 0.3 * across)
    within = jnp.minimum(jnp.minimum(upper - eye_y, eye_y - lower), (1.0 - jnp.abs(across)) * who["eye_width"])
    eye = _step(within, 0.6 * soft) * front
    look_x, look_y = eye_x - 0.06 * how["gaze"] * side, eye_y - 0.18 * opening
    ball = _length(look_x, look_y)
    radius = 0.066
    ring = 1.0 - 0.55 * _step(ball - 0.8 * radius, 0.3 * radius + 0.3 * soft)
    iris = [
        c * ring * (1.0 - 4.0 * look_y) for c in _ramp(IRIS, jnp.clip(who["iris_tone"] + 0.6 * form.melanin, 0.0, 1.0))
    ]
    lid_shade = 1.0 - 0.45 * _ramp01(0.045 - (upper - eye_y), 0.045)
    white = (0.74 - 0.12 * form.melanin) * (1.0 - 0.25 * jnp.abs(across)) * lid_shade
    eyeball = _mix([white, white * 0.94, white * 0.91], iris, _step(radius - ball, 0.6 * soft))
    pupil = _step(0.030 - ball, 0.6 * soft)
    glint = _step(0.020 - _length(look_x * side - 0.022 - 0.012 * how["light_x"], look_y - 0.026), 0.6 * soft)
    eyeball = [c * (1.0 - 0.92 * pupil) + 0.85 * glint for c in eyeball]
    beside = _step(1.06 - jnp.abs(across), soft / who["eye_width"])
    lash_width = (0.010 + 0.006 * (1.0 - form.male)) * (0.75 + 0.5 * jnp.clip(across, -1.0, 1.0))
    lash = _step(lash_width - jnp.abs(eye_y - upper - 0.006), 0.7 * soft) * beside
    lash_low = 0.4 * _step(0.005 - jnp.abs(eye_y - lower + 0.004), 0.8 * soft) * beside
    lid_y = eye_y - who["eye_open"] * arch * (1.0 - 0.22 * across) - who["lid_height"]
    crease = jnp.exp(-((lid_y / 0.016) ** 2)) * beside
    lid = _step(eye_y - upper, soft) * _step(-lid_y, soft) * beside
    darker = front * (0.34 * crease + 0.10 * lid)
    albedo = [c * (1.0 - darker * d) for c, d in zip(albedo, (0.75, 1.0, 1.0), strict=True)]
    albedo = _mix(albedo, eyeball, eye)
    albedo = [c * (1.0 - front * jnp.clip(0.88 * lash + lash_low, 0.0, 0.9)) for c in albedo]

    # --- brows ---
    brow_x = (eye_x + 0.62 * who["brow_length"]) / (1.25 * who["brow_length"])
    brow_y = (
        y - who["eye_height"] - who["brow_height"] - how["brow_raise"] - (who["brow_slope"] + how["brow_tilt"]) * eye_x
    )
    brow_y = brow_y + who["brow_arch"] * (eye_x - 0.05) ** 2 - 0.8 * form.lopsided * side
    thick = who["brow_thickness"] * (0.8 + 0.4 * form.male) * (1.15 - 0.8 * jnp.clip(brow_x, 0.0, 1.0))
    bristle = 0.88 + 0.12 * _wave(11.0 * (eye_x + 0.6 * brow_y))
    brow = _step(thick - jnp.abs(brow_y), 0.8 * soft + 0.006) * _step(brow_x - 0.04, 0.10) * _step(1.0 - brow_x, 0.12)
    brow_colour = [c * (0.55 - 0.25 * who["brow_tone"]) for c in form.hair]
    albedo = _mix(albedo, brow_colour, jnp.clip(0.85 * brow * bristle, 0.0, 1.0) * front)

    # --- mouth ---
    smile, gape = form.smile, form.gape
    mouth_x = x / (who["mouth_width"] * (1.0 + 0.24 * form.happy - 0.10 * gape * (1.0 - form.happy)))
    mouth_y = y - form.mouth_y - 0.075 * smile * (mouth_x * mouth_x - 0.3) - 0.6 * form.lopsided * mouth_x
    arch = jnp.maximum(1.0 - mouth_x * mouth_x, 0.0)
    notch = 1.0 - who["lip_bow"] * jnp.exp(-22.0 * mouth_x * mouth_x)
    gap = 0.10 * gape * arch
    top, bottom = gap * 0.25, -gap
    lip_top = top + who["lip_upper"] * arch * (1.0 - 0.3 * form.happy) * notch
    lip_bottom = bottom - who["lip_lower"] * jnp.sqrt(arch) * (1.0 - 0.2 * form.happy)
    corner = _step(1.0 - jnp.abs(mouth_x), 0.05) * front
    lips = _step(jnp.minimum(lip_top - mouth_y, mouth_y - lip_bottom), 0.8 * soft) * corner
    inside = _step(jnp.minimum(top - mouth_y, mouth_y - bottom), 0.6 * soft) * _step(gape - 0.04, 0.04) * corner
    seam = jnp.exp(-((mouth_y / 0.014) ** 2)) * corner * (1.0 - _step(gape - 0.08, 0.08))
    red = (0.25 + 0.5 * who["lip_redness"]) * (1.0 - 0.35 * form.male)
    skin = form.skin
    lip_colour = [skin[0] * (0.90 - 0.08 * red), skin[1] * (0.86 - 0.50 * red), skin[2] * (0.86 - 0.38 * red)]
    # The upper lip faces down and is darker; the lower catches the light.
    lip_colour = [c * (1.0 - 0.18 * _step(mouth_y - 0.5 * (top + bottom), 0.02)) for c in lip_colour]
    albedo = _mix(albedo, lip_colour, 0.9 * lips)
    teeth_low = bottom + gap * (0.10 + 0.45 * (1.0 - form.happy))
    gaps = 1.0 - 0.12 * jnp.exp(-40.0 * _wave(2.25 * (mouth_x + 0.111)) ** 2)
    teeth = _step(mouth_y - teeth_low, 0.8 * soft) * (0.72 - 0.35 * jnp.abs(mouth_x)) * gaps
    albedo = _mix(albedo, [0.045 + teeth, 0.014 + 0.96 * teeth, 0.014 + 0.88 * teeth], inside)
    albedo = [c * (1.0 - 0.72 * seam) for c in albedo]
    dimple = jnp.exp(-(((jnp.abs(mouth_x) - 1.05) / 0.07) ** 2) - (mouth_y / 0.035) ** 2) * front
    albedo = [c * (1.0 - 0.25 * dimple) for c in albedo]
    gloss = gloss * (1.0 - eye) * (1.0 - inside) + 0.05 * lips * (1.0 - inside)
    return albedo, gloss


# ---- glasses and what is in front of the face ------------------------------------------------------------------------


def _glasses(who: Parameters, how: Parameters, view: Fields, head: Fields, scene: Colour) -> Colour:
    """Glasses or sunglasses, on a curved plane before the face so that they shift against it when the head turns."""
    wears = _step(0.62 * who["glasses_habit"] ** 2 + 0.02 - how["glasses"], 0.06)
    plane = 0.88 * who["head_depth"] + 0.08

    def at(depth: jax.Array) -> tuple[jax.Array, jax.Array]:
        return view.ox + depth * view.dx, view.oy + depth * view.dy

    x, y = at((plane - view.oz) / view.dz)
    x, y = at((plane - 0.35 * x * x - view.oz) / view.dz)
    centre = 0.86 * who["eye_spacing"] + 0.02
    lens_x = (jnp.abs(x) - centre) / who["glasses_width"]
    lens_y = (y - 0.86 * who["eye_height"] + 0.03 + 0.02 * lens_x) / who["glasses_height"]
    # Between an ellipse and a rounded rectangle.
    lens = jnp.sqrt(lens_x**2 + lens_y**2 + 1e-6)
    lens = lens + who["glasses_shape"] * (jnp.sqrt(jnp.sqrt(jnp.sqrt(lens_x**8 + lens_y**8 + 1e-9))) - lens)
    soft = 0.8 * view.pixel
    thick = 0.010 + 0.016 * who["glasses_rim"]
    frame = _step(thick - jnp.abs(lens - 1.0) * who["glasses_height"], soft)
    bridge_y = y - 0.86 * who["eye_height"] - 0.02 + 0.8 * x * x
    bridge = _step(thick - jnp.abs(bridge_y), soft) * _step(centre - who["glasses_width"] - jnp.abs(x), soft)
    arm = _step(thick - jnp.abs(head.y - who["eye_height"] - 0.03), soft) * _step(jnp.abs(head.x) - 0.62, 0.02)
    arm = arm * _step(head.z - 0.08, 0.08) * head.cover * _step(lens - 1.0, 0.02)
    frame = jnp.maximum(jnp.maximum(frame, bridge), arm)
    dark = _between(how["sunglasses"], -1.0, 0.10)
    glass = _step(1.0 - lens, soft / who["glasses_height"])
    sheen = 0.06 + 0.22 * _step(0.3 - jnp.abs(lens_x * jnp.sign(x) + 0.8 * lens_y - 0.2), 0.15) * _ramp01(
        how["light_y"], 1.0
    )
    scene = [
        c * (1.0 - wears * glass * (0.05 + 0.87 * dark)) + wears * glass * sheen * (0.25 + 0.4 * dark) for c in scene
    ]
    tone = _ramp(FRAMES, who["glasses_tone"])
    light = 0.5 + 0.6 * how["ambient"] + 0.2 * jnp.clip(lens_y, -1.0, 1.0)
    return _mix(scene, [c * light for c in tone], 0.95 * frame * wears)


def _occluders(who: Parameters, how: Parameters, form: Fields, view: Fields, head: Fields, scene: Colour) -> Colour:
    """The brim of a cap; and in some photos a mask, a scarf, a hand, or something out of focus at the border."""
    kind, px, py = how["occluder"], view.px, view.py
    soft = 0.8 * view.pixel

    # --- brim ---
    axes = (0.56, 0.035, 0.50)
    centre = (0.0, 0.37 * who["head_height"], 0.72 * who["head_depth"])
    origin = (
        (view.ox - centre[0]) / axes[0],
        (view.oy - centre[1] + 0.25 * (view.oz - centre[2])) / axes[1],
        (view.oz - centre[2]) / axes[2],
    )
    direction = (view.dx / axes[0], (view.dy + 0.25 * view.dz) / axes[1], view.dz / axes[2])
    depth, outside = _meet_sphere(origin, direction)
    brim = _step(-outside * 0.1, soft) * form.brim * _step(depth - jnp.where(head.cover > 0.5, head.depth, -9.0), 0.02)
    lit = _shade(how, [0.8 * c for c in form.cloth], _normal(depth, view.pixel), 0.8, CLOTH_WRAP, 0.01)
    scene = _mix(scene, lit, brim)

    # --- mask, fixed to the face ---
    masked = _between(kind, 0.02, 0.03)
    upper = form.tip_y + 0.14 - 0.9 * head.x * head.x
    mask = (
        _step(upper - head.y, soft)
        * _step(0.80 - jnp.abs(head.x), soft)
        * _step(head.y + 0.93, 0.03)
        * head.cover
        * masked
    )
    round_x, round_y = jnp.clip(1.1 * (px - 0.5 * view.sin_yaw), -0.85, 0.85), jnp.clip(0.9 * (py + 0.45), -0.5, 0.5)
    round_z = jnp.sqrt(jnp.maximum(1.0 - round_x * round_x - round_y * round_y, 0.03))
    pleats = 1.0 - 0.12 * jnp.exp(-8.0 * _wave(2.5 * (head.y - 0.1 * head.x * head.x)) ** 2)
    fabric = [(0.15 + 0.6 * how["occluder_tone"]) * w * pleats for w in (0.85, 0.97, 1.05)]
    scene = _mix(scene, _shade(how, fabric, (round_x, round_y, round_z), 1.0, CLOTH_WRAP, 0.0), mask)

    # --- scarf ---
    wound = _between(kind, 0.01, 0.02)
    height = py + 0.85 - 0.45 * how["occluder_reach"] - 0.18 * px * px + 0.05 * _wave(0.5 * px + how["texture_u"])
    scarf = _step(-height, soft) * wound
    folds = 0.5 * _wave(2.5 * height + 0.3 * px)
    knit = 1.0 + 0.18 * _wave(5.4 * (px + 0.6 * py)) * _wave(5.4 * (px - 0.6 * py))
    bend = jnp.clip(0.8 * px, -0.7, 0.7)
    normal = bend, folds, jnp.sqrt(1.0 - bend * bend - folds * folds)
    scene = _mix(scene, _shade(how, [c * knit for c in form.cloth], normal, 0.8 + 0.2 * folds, CLOTH_WRAP, 0.0), scarf)

    # --- hand: capsules in the picture's plane, a palm, four fingers and a thumb ---
    held = _between(kind, -1.0, 0.01)
    lean = 0.9 * jnp.sin(how["occluder_angle"])
    cos, sin = jnp.cos(lean), jnp.sin(lean)
    hx, hy = px - 0.75 * sin, py + 0.95 - 0.55 * how["occluder_reach"]
    along, across = hy * cos - hx * sin, hx * cos + hy * sin
    thickness = jnp.full_like(px, -1.0)
    for place, base, reach, radius in (
        (0.0, -1.4, -0.05, 0.27), (-0.20, -0.1, 0.40, 0.072), (-0.065, -0.1, 0.50, 0.076), (0.07, -0.1, 0.46, 0.075),
        (0.20, -0.1, 0.32, 0.064),
    ):  # fmt: skip
        nearest = jnp.clip(along, base, reach)
        spread = across - place * (1.0 + 0.25 * jnp.maximum(nearest, 0.0))
        thickness = jnp.maximum(thickness, radius - jnp.sqrt(spread * spread + (along - nearest) ** 2 + 1e-6))
    round_ = _ramp01(thickness + 0.01, 0.06)
    fingers = [c * (0.45 + 0.55 * round_) for c in form.skin]
    normal = 0.3 * (1.0 - round_), 0.2 + 0.0 * px, 0.95 + 0.0 * px
    scene = _mix(scene, _shade(how, fingers, normal, 0.9, SKIN_WRAP, 0.0), _step(thickness, soft) * held)

    # --- somebody's shoulder, a microphone ---
    there = _between(kind, 0.03, 0.05)
    cos, sin = jnp.cos(how["occluder_angle"]), jnp.sin(how["occluder_angle"])
    toward, past = view.screen_x * cos + view.screen_y * sin, view.screen_y * cos - view.screen_x * sin
    block = (
        _step(toward - 0.25 - 0.6 * how["occluder_reach"] - 0.5 * (past - how["texture_u"] + 0.5) ** 2, 0.06) * there
    )
    return _mix(scene, [c * (1.0 + 0.3 * past) for c in form.cloth], block)


# ---- light and camera ------------------------------------------------------------------------------------------------


def _shade(
    how: Parameters, albedo: Colour, normal: Normal, sky: Number, wraps: tuple[float, float, float], gloss: Number
) -> Colour:
    """Colour of a lit surface: one lamp with wrapped Lambert and Blinn-Phong, and light from everywhere.

    Args:
      how: the photo's light.
      albedo: the surface's colour.
      normal: unit vector in the camera's frame.
      sky: 0..1, how much of the surroundings a point sees.
      wraps: how far the lamp reaches past the terminator, a number a channel.
      gloss: strength of the highlight.
    """
    light_x, light_y = how["light_x"], how["light_y"]
    scale = jax.lax.rsqrt(light_x * light_x + light_y * light_y + 1.0)
    facing = (normal[0] * light_x + normal[1] * light_y + normal[2]) * scale
    half = jax.lax.rsqrt(light_x * light_x + light_y * light_y + (1.0 / scale + 1.0) ** 2)
    mirror = jnp.maximum((normal[0] * light_x + normal[1] * light_y + normal[2] * (1.0 / scale + 1.0)) * half, 0.0)
    squared = mirror * mirror
    sharp = (squared * squared) ** 2
    shine = gloss * sharp * sharp * sharp * how["light_hardness"]
    ambient = how["ambient"] * (0.75 + 0.25 * normal[1]) * sky
    warmth = how["light_warmth"]
    tints: tuple[Number, ...] = (1.0 + warmth, 1.0, 1.0 - warmth)
    out = []
    for channel, tint in enumerate(tints):
        lit = jnp.maximum(facing + wraps[channel], 0.0) / (1.0 + wraps[channel])
        lit = how["light_hardness"] * lit * (0.35 + 0.65 * sky) * tint + ambient * (2.0 - tint)
        out.append(albedo[channel] * lit * 1.5 + shine)
    return out


def _camera(how: Parameters, scene: Colour, size: int) -> jax.Array:
    """Exposure, white balance, lens blur, tone curve, pixel noise and JPEG: [size, size, 3] uint8."""
    gain = jnp.exp(how["exposure"])
    gains = (gain * (1.0 + how["white_red"]), gain, gain * (1.0 + how["white_blue"]))
    image = jnp.stack([jnp.maximum(c * g, 0.0) for c, g in zip(scene, gains, strict=True)])
    image = _blur(image, how["blur"] * (size / 64.0))
    image = jnp.sqrt(image / (1.0 + 0.25 * image * image))
    image = (image - 0.45) * how["contrast"] + 0.45
    bits = jax.random.bits(jax.random.key(how["grain"]), (size, size), jnp.uint32)
    speckle = jnp.stack([((bits >> shift) & 0x3FF).astype(jnp.float32) / 1023.0 - 0.5 for shift in (0, 10, 20)])
    image = image + how["noise"] * 3.4 * speckle
    image = _jpeg(jnp.clip(image, 0.0, 1.0), how["jpeg"])
    return jnp.round(jnp.clip(image, 0.0, 1.0) * 255.0).astype(jnp.uint8).transpose(1, 2, 0)


def _jpeg(image: jax.Array, strength: jax.Array) -> jax.Array:
    """[3, h, w] in 0..1 with the loss of a JPEG: 8×8 blocks, cosine coefficients rounded, chroma at half resolution.

    At `strength` 1 the steps are about those of quality 50; at 0 nothing is lost but the chroma's fine detail.
    """
    size = image.shape[1]
    pad = -size % 8
    rows = jnp.pad(image, [(0, 0), (0, pad), (0, pad)], mode="edge")
    blocks = (size + pad) // 8
    to_ycc = np.array([[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]], np.float32)
    from_ycc = np.array([[1.0, 0.0, 1.402], [1.0, -0.3441, -0.7141], [1.0, 1.772, 0.0]], np.float32)
    k = np.arange(8)
    basis = np.cos((2 * k[None] + 1) * k[:, None] * np.pi / 16) * np.where(k[:, None], 0.5, 8**-0.5)
    basis = basis.astype(np.float32)
    order = (k[:, None] + k[None]).astype(np.float32)
    luma, chroma = (12.0 + 5.0 * order) / 255.0, (16.0 + 12.0 * order) / 255.0
    kept = ((k[:, None] < 4) & (k[None] < 4)).astype(np.float32)

    steps = jnp.maximum(strength * strength, 0.02) * np.stack([luma, chroma, chroma])[:, None, :, None, :]
    kept = np.stack([np.ones_like(kept), kept, kept])[:, None, :, None, :]

    ycc = jnp.einsum("yc,chw->yhw", to_ycc, rows, precision="highest")
    tiles = ycc.reshape(3, blocks, 8, blocks, 8)
    coefficients = jnp.einsum("ui,yaibj,vj->yaubv", basis, tiles, basis, precision="highest")
    coefficients = jnp.round(coefficients / steps) * steps * kept
    tiles = jnp.einsum("ui,yaubv,vj->yaibj", basis, coefficients, basis, precision="highest")
    out = tiles.reshape(3, size + pad, size + pad)[:, :size, :size]
    return jnp.einsum("cy,yhw->chw", from_ycc, out, precision="highest")


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


# ---- small things ----------------------------------------------------------------------------------------------------


@functools.cache
def pink_noise() -> np.ndarray:
    """[NOISE_SIDE², 8] float32: two periodic 1/f fields of unit variance; a row holds a texel of one and its three
    neighbours to the right, below and diagonally, then those of the other, so that a bilinear look-up is one gather."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(NOISE_SIDE)[:, None], np.fft.fftfreq(NOISE_SIDE)[None])
    frequency[0, 0] = np.inf
    taps = []
    for _ in range(2):
        field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((NOISE_SIDE, NOISE_SIDE))) / frequency).real
        field = ((field - field.mean()) / field.std()).astype(np.float32)
        down = np.roll(field, -1, 0)
        taps += [field, np.roll(field, -1, 1), down, np.roll(down, -1, 1)]
    return np.stack(taps, -1).reshape(-1, 8)


def _look_up(texture: jax.Array, u: jax.Array, v: jax.Array, blend: jax.Array) -> jax.Array:
    """Bilinear look-up in the periodic noise; u and v in periods.

    `blend`, in turns, mixes the two fields into one of as much variance. It makes a person's own pattern: another place
    in one field would as well, but the pattern would slide when two people are interpolated.
    """
    u, v = u * NOISE_SIDE, v * NOISE_SIDE
    column, row = jnp.floor(u), jnp.floor(v)
    along, down = u - column, v - row
    index = jnp.mod(row.astype(jnp.int32), NOISE_SIDE) * NOISE_SIDE + jnp.mod(column.astype(jnp.int32), NOISE_SIDE)
    both = texture[index]
    taps = jnp.cos(math.tau * blend) * both[..., :4] + jnp.sin(math.tau * blend) * both[..., 4:]
    upper = taps[..., 0] + (taps[..., 1] - taps[..., 0]) * along
    lower = taps[..., 2] + (taps[..., 3] - taps[..., 2]) * along
    return upper + (lower - upper) * down


def _ramp(colours: tuple[tuple[float, float, float], ...], place: jax.Array) -> Colour:
    """The colour at `place` in 0..1 along the ramp, as three [] arrays."""
    knots = np.arange(len(colours), dtype=np.float32)
    share = jnp.maximum(1.0 - jnp.abs(place * knots[-1] - knots), 0.0)
    return [jnp.sum(share * np.array([c[i] for c in colours], np.float32)) for i in range(3)]


def _length(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sqrt(x * x + y * y + 1e-12)


def _wave(x: jax.Array) -> jax.Array:
    """Near enough a sine of period 1, from parabolas: painted stripes need no more, and XLA compiles it far sooner."""
    t = 2.0 * (x - jnp.floor(x)) - 1.0
    return 4.0 * t * (jnp.abs(t) - 1.0)


def _step(x: jax.Array, width: jax.Array | float) -> jax.Array:
    """0 below -width, 1 above width, smooth between."""
    t = jnp.clip(x / (2 * width) + 0.5, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _between(x: jax.Array, low: float, high: float) -> jax.Array:
    """1 from low to high, 0 elsewhere: whether a photo's draw picks this case."""
    return ((x >= low) & (x < high)).astype(jnp.float32)


def _ramp01(x: jax.Array, width: jax.Array | float) -> jax.Array:
    """0 below 0, 1 above width, smooth between."""
    t = jnp.clip(x / width, 0.0, 1.0)
    return t * t * (3 - 2 * t)


def _muted(how: Parameters, what: str) -> Colour:
    """The drawn colour of `what`, nearer to its own grey: few walls and shirts are fully saturated."""
    drawn = [how[f"{what}_{c}"] for c in "rgb"]
    grey = (drawn[0] + drawn[1] + drawn[2]) / 3.0
    return [grey + 0.35 * (c - grey) for c in drawn]


def _mix(below: Colour, above: Colour, cover: jax.Array) -> Colour:
    return [a + (b - a) * cover for a, b in zip(below, above, strict=True)]

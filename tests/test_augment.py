"""Augmentation: what each option may do to a photo, how often, and that only (seed, step, slot) decide."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from faceembed.data import augment

EVERYTHING = {
    "flip": True, "rotation": 20.0, "scale": 0.2, "shift": 0.1, "colour": 0.5, "grey": 0.3, "erase": 0.5, "degrade": 0.5,
}  # fmt: skip
# 512 draws: a share of 1/4 has a standard deviation of 0.02, a correlation of 0 one of 0.045.
MANY = 512


@functools.cache
def viewer(size, dtype="float32", **options):
    """(seed, step, slot [b], images) → [b, size, size, 3], jitted; made once for each set of options."""

    def view(seed, step, slot, images):
        return augment.augment(augment.slot_keys(seed, step, slot), images, size=size, dtype=dtype, **options)

    return jax.jit(view, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


def views(images, size, *, seed=0, step=0, slot=None, dtype="float32", **options):
    slot = np.arange(len(images)) if slot is None else slot
    return np.asarray(viewer(size, dtype, **options)(seed, np.int32(step), np.asarray(slot, np.int32), images))


def repeated(image, count=MANY):
    return np.broadcast_to(image, (count, *image.shape))


def noise(count, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def blobs(count, side):
    """Photos whose neighbouring pixels differ by at most 13: a rounded position hardly changes what is read there."""
    axis = np.arange(side)
    phase = np.random.default_rng(0).uniform(0, 6, (count, 2, 3))
    waves = np.sin(axis[:, None] / 9 + phase[:, :1, None]) * np.cos(axis[:, None] / 9 + phase[:, 1:, None])
    other = np.sin(axis[:, None] / 7 + phase[:, 1:, None])
    return np.asarray(128 + 90 * waves * other.swapaxes(1, 2), np.uint8)


def ramp(side, step):
    """A photo that says where it was read: channels (x · step, y · step, 0). Bilinear reading keeps it exact."""
    y, x = np.mgrid[:side, :side] * step
    assert x.max() <= 255
    return np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)


def test_everything_off_is_the_central_crop():
    images = noise(5, 20)
    got = views(images, 16, flip=False)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, images[:, 2:18, 2:18])
    np.testing.assert_array_equal(augment.centre(images, 16), images[:, 2:18, 2:18])
    np.testing.assert_array_equal(views(images[:, :16, :16], 16, flip=False), images[:, :16, :16])


def test_a_view_follows_from_seed_step_and_slot_alone():
    images = noise(12, 36)
    whole = views(images, 32, seed=7, step=5, **EVERYTHING)
    order = np.random.default_rng(1).permutation(12)
    shuffled = views(images[order], 32, seed=7, step=5, slot=order, **EVERYTHING)
    np.testing.assert_array_equal(shuffled, whole[order])
    # Another batch size is another program, whose sums may round differently: 1e-3 of 255.
    some = np.array([9, 2, 4])
    np.testing.assert_allclose(views(images[some], 32, seed=7, step=5, slot=some, **EVERYTHING), whole[some], atol=1e-3)


def test_eight_devices_draw_what_one_draws():
    images, slot = noise(16, 36), np.arange(16, dtype=np.int32)
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:8]), "data"), PartitionSpec("data"))
    sharded = viewer(32, "float32", **EVERYTHING)(7, np.int32(5), *jax.device_put((slot, images), sharding))
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, views(images, 32, seed=7, step=5, **EVERYTHING), atol=1e-3)


def test_other_slots_steps_and_seeds_draw_other_views():
    image = repeated(noise(1, 36)[0], 12)
    drawn = [views(image, 32, seed=seed, step=step, **EVERYTHING) for seed, step in ((7, 5), (7, 6), (8, 5))]
    flat = np.concatenate(drawn).reshape(36, -1)
    distance = np.abs(flat[:, None] - flat[None, :]).mean(-1)
    assert distance[~np.eye(36, dtype=bool)].min() > 1


def test_the_range_is_that_of_a_photo():
    loud = {**EVERYTHING, "colour": 1.0, "rotation": 180.0, "shift": 1.0}
    drawn = views(noise(12, 36) // 128 * 255, 32, **loud)
    assert np.isfinite(drawn).all()
    assert drawn.min() == 0
    assert drawn.max() == 255


def test_one_compilation_for_all_steps_and_batches():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def view(step, slot, images):
        return augment.augment(augment.slot_keys(3, step, slot), images, size=16, **EVERYTHING)

    for step in range(4):
        view(jnp.int32(step), np.arange(step, step + 2, dtype=np.int32), noise(2, 18, step))


def test_float64_draws_what_float32_draws():
    images = blobs(24, 36)
    single = views(images, 32, seed=7, step=5, **EVERYTHING)
    with jax.enable_x64(True):
        double = views(images, 32, seed=7, step=5, dtype="float64", **EVERYTHING)
    assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, atol=1e-3)
    # And is no float32 result in disguise.
    assert np.abs(single - double).max() > 0


def test_flip_mirrors_left_and_right_of_half_the_photos():
    images = noise(MANY, 10)
    crop = images[:, 1:9, 1:9]
    drawn = views(images, 8, flip=True)
    mirrored = (drawn == crop[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored ^ (drawn == crop).all((1, 2, 3))).all()
    assert 0.4 < mirrored.mean() < 0.6


def motions(**options):
    """What a warp did to each of many photos, read off a ramp with room on all sides.

    Returns:
      (matrix [b, 2, 2], moved [b, 2]): source (y, x) from result (y, x), both from their middles, in pixels.
    """
    side, size, step = 51, 17, 5
    got = views(repeated(ramp(side, step)), size, **options)[..., 1::-1].astype(np.float64) / step - (side - 1) / 2
    half = (size - 1) // 2
    down, right = (got[:, -1, half] - got[:, 0, half]) / (2 * half), (got[:, half, -1] - got[:, half, 0]) / (2 * half)
    matrix, moved = np.stack([down, right], -1), got[:, half, half]
    axis = np.arange(size) - half
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    # Straight lines stay straight: three readings tell all others.
    np.testing.assert_allclose(got, grid @ matrix.swapaxes(1, 2)[:, None] + moved[:, None, None], atol=1e-3)
    return matrix, moved


def spread_over(values, low, high):
    """Whether draws fill an interval evenly: none outside, some in each tenth at the ends, their mean in the middle."""
    width = high - low
    return (
        values.min() > low - 1e-3 * width
        and values.max() < high + 1e-3 * width
        and values.min() < low + 0.1 * width
        and values.max() > high - 0.1 * width
        and abs(values.mean() - (low + high) / 2) < 0.06 * width
    )


def test_rotation_turns_about_the_middle_by_at_most_so_many_degrees():
    matrix, moved = motions(flip=False, rotation=40.0)
    np.testing.assert_allclose(moved, 0, atol=1e-3)
    np.testing.assert_allclose(matrix @ matrix.swapaxes(1, 2), repeated(np.eye(2)), atol=1e-4)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, atol=1e-4)
    assert spread_over(np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])), -40, 40)


def test_scale_enlarges_as_often_as_it_shrinks():
    matrix, moved = motions(flip=False, scale=0.5)
    np.testing.assert_allclose(moved, 0, atol=1e-3)
    zoom = matrix[:, 0, 0]
    np.testing.assert_allclose(matrix, zoom[:, None, None] * np.eye(2), atol=1e-3)
    assert spread_over(np.log(zoom), -np.log(1.5), np.log(1.5))


def test_shift_moves_each_way_by_a_share_of_the_side():
    matrix, moved = motions(flip=False, shift=0.4)
    np.testing.assert_allclose(matrix, repeated(np.eye(2)), atol=1e-4)
    assert spread_over(moved[:, 0], -0.4 * 17, 0.4 * 17)
    assert spread_over(moved[:, 1], -0.4 * 17, 0.4 * 17)


def test_the_parts_of_a_warp_are_drawn_independently():
    matrix, moved = motions(flip=True, rotation=40.0, scale=0.5, shift=0.2)
    zoom = np.sqrt(np.abs(np.linalg.det(matrix)))
    angle = np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])
    mirror = np.sign(np.linalg.det(matrix))
    shifts = moved.T
    assert spread_over(np.degrees(angle), -40, 40)
    between = np.corrcoef([np.log(zoom), angle, mirror, *shifts]) - np.eye(5)
    assert np.abs(between).max() < 0.2


def test_outside_the_crop_its_edge_repeats():
    side = 16
    image = ramp(side, 17)
    drawn = views(repeated(image, 64), side, flip=False, shift=0.4).astype(np.float64)
    middle = side // 2
    moved = drawn[:, middle, middle] / 17 - middle
    axis = np.arange(side)
    expected_x = np.clip(axis + moved[:, :1], 0, side - 1) * 17
    expected_y = np.clip(axis + moved[:, 1:2], 0, side - 1) * 17
    np.testing.assert_allclose(drawn[..., 0], np.repeat(expected_x[:, None], side, 1), atol=1e-2)
    np.testing.assert_allclose(drawn[..., 1], np.repeat(expected_y[:, :, None], side, 2), atol=1e-2)


def test_a_dot_moves_as_the_ramp_says():
    """One bright pixel: the same keys move a dot's weight to where the ramp was read from the dot's place."""
    side, size = 51, 17
    options = {"flip": True, "rotation": 30.0, "shift": 0.1}
    image = np.zeros((side, side, 3), np.uint8)
    image[side // 2 - 3 : side // 2, side // 2 + 2 : side // 2 + 5] = 255  # middle at (-2, +3) from the photo's
    dot = views(repeated(image), size, **options)[..., 0].astype(np.float64)
    matrix, moved = motions(**options)
    axis = np.arange(size) - size // 2
    weight = dot.sum((1, 2))
    found = np.stack([(dot.sum(2) * axis).sum(1), (dot.sum(1) * axis).sum(1)], -1) / weight[:, None]
    expected = np.linalg.solve(matrix, (np.array([-2.0, 3.0]) - moved)[..., None])[..., 0]
    np.testing.assert_allclose(found, expected, atol=0.15)


def test_colour_is_brightness_contrast_saturation_and_gains_within_its_strength():
    strength, size = 0.3, 8
    # No draw at this strength takes these numbers out of 0-255, where clipping would hide what was done.
    image = np.random.default_rng(2).integers(90, 151, (size, size, 3), dtype=np.uint8)
    drawn = views(repeated(image), size, flip=False, colour=strength).astype(np.float64)
    pixels = np.c_[image.reshape(-1, 3), np.ones(size * size)].astype(np.float64)
    flat = drawn.reshape(MANY, -1, 3)
    fitted = np.stack([np.linalg.lstsq(pixels, one, rcond=None)[0] for one in flat])
    # Pixels mix by one 3×3 matrix and an offset, whatever their place.
    np.testing.assert_allclose(pixels @ fitted, flat, atol=1e-2)
    matrix, offset = fitted[:, :3].swapaxes(1, 2), fitted[:, 3]

    total = matrix.sum(2)  # brightness · contrast · gain of each channel
    diagonal = np.einsum("bii->bi", matrix)
    saturation = ((diagonal - (total - diagonal) / 2) / total).mean(1)
    contrast = (image.mean() / (image.mean() + offset / total)).mean(1)
    lit = total / contrast[:, None]  # brightness · gain
    ratio = np.log(lit[:, 0] / lit[:, 1])

    assert spread_over(saturation, 1 - strength, 1 + strength)
    for drawn_values in (contrast, lit[:, 0], lit[:, 1], lit[:, 2]):
        assert 1 - 1.3 * strength < drawn_values.min() < 1 - 0.5 * strength
        assert 1 + 0.5 * strength < drawn_values.max() < 1 + 1.3 * strength
        assert abs(drawn_values.mean() - 1) < 0.05
    # Channels get gains of their own, smaller than the brightness they share.
    assert 0.1 * strength < np.abs(ratio).max() < strength
    between = np.corrcoef([saturation, contrast, np.log(lit).mean(1), ratio]) - np.eye(4)
    assert np.abs(between).max() < 0.2


def test_grey_takes_the_colour_from_a_share_and_leaves_the_others():
    images = noise(MANY, 8)
    drawn = views(images, 8, flip=False, grey=0.25)
    grey = (drawn == drawn[..., :1]).all((1, 2, 3))
    assert 0.25 - 0.08 < grey.mean() < 0.25 + 0.08
    np.testing.assert_array_equal(drawn[~grey], images[~grey])
    luma = images[grey].astype(np.float64) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(drawn[grey][..., 0], luma, atol=1e-3)


def test_erase_puts_noise_into_a_rectangle_of_a_share_of_the_photos():
    size = 32
    image = np.full((size, size, 3), 77, np.uint8)
    drawn = views(repeated(image, 2 * MANY), size, flip=False, erase=0.4)
    touched = (drawn != 77).any(-1)
    erased = touched.any((1, 2))
    assert 0.4 - 0.06 < erased.mean() < 0.4 + 0.06

    whole = []
    for mask in touched[erased]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert mask.sum() == height * width, "a rectangle, whole"
        assert (height - 1) * (width - 1) <= 0.2 * size**2
        if rows[0] > 0 and columns[0] > 0 and rows[-1] < size - 1 and columns[-1] < size - 1:
            whole.append((height, width))
    # Those that no border cuts show what was drawn, to a pixel a side.
    height, width = np.array(whole).T
    assert len(whole) > 50
    assert ((height + 1) * (width + 1) >= 0.02 * size**2).all()
    assert (height * width).min() < 0.05 * size**2
    assert (height * width).max() > 0.13 * size**2
    assert ((height - 1) / (width + 1)).max() < 3
    assert ((width - 1) / (height + 1)).max() < 3
    assert (height / width).max() > 1.8
    assert (width / height).max() > 1.8

    values = drawn[erased][touched[erased]]
    assert values.min() < 3
    assert values.max() > 252
    assert abs(values.mean() - 127.5) < 5
    assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.1


def test_grey_erase_and_blur_are_drawn_independently():
    size = 32
    # Left half plain, right half striped: colour, noise and blur each show, whatever the others did.
    image = np.zeros((size, size, 3), np.uint8)
    image[...] = (200, 120, 40)
    image[:, 1::2] = (20, 80, 90)
    drawn = views(repeated(image), size, flip=False, grey=0.5, erase=0.5, degrade=0.5)
    apart = np.abs(drawn[..., 0] - drawn[..., 2]) > 1e-3
    grey = apart.mean((1, 2)) < 0.5
    # Noise is the only thing that makes rows differ.
    erased = (np.abs(drawn - np.median(drawn, 1, keepdims=True)) > 1).any((1, 2, 3))
    stripe = np.median(np.median(np.abs(np.diff(drawn[..., 0], axis=2)), 2), 1)
    blurred = np.where(grey, stripe < 63, stripe < 179)
    happened = np.stack([grey, erased, blurred])
    assert (np.abs(happened.mean(1) - 0.5) < 0.1).all()
    assert np.abs(np.corrcoef(happened) - np.eye(3)).max() < 0.2


@pytest.mark.parametrize("size", [32, 64])
def test_degrade_blurs_a_share_of_the_photos_alike_in_all_directions(size):
    image = np.zeros((size, size, 3), np.uint8)
    image[size // 2, size // 2] = 255
    drawn = views(repeated(image, 256), size, flip=False, degrade=0.4).astype(np.float64)
    blurred = (drawn != image).any((1, 2, 3))
    assert 0.4 - 0.12 < blurred.mean() < 0.4 + 0.12
    np.testing.assert_array_equal(drawn[..., 0], drawn[..., 2])
    share = drawn[blurred][..., 0] / 255
    np.testing.assert_allclose(share.sum((1, 2)), 1, atol=1e-3)
    axis = np.arange(size) - size // 2
    down, along = (np.sqrt((share.sum(other) * axis**2).sum(1)) for other in (2, 1))
    np.testing.assert_allclose(down, along, atol=1e-3)
    at_64 = down * 64 / size
    assert 1.85 < at_64.max() <= 2.01
    # A Gaussian much narrower than a pixel is no longer sampled faithfully: its lower end is read at size 64.
    assert size == 32 or 0.45 < at_64.min() < 0.65

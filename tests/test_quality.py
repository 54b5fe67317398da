"""Is a photo of a face good enough: a number that falls with blur, and with nothing else that is harmless."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from faceembed.data.align import Face
from faceembed.identification import quality
from faceembed.identification.quality import LIMITS, Limits, Quality, measure


def head(seed, side=150):
    """Something with the outlines, shading and fine texture of a head: blobs of all sizes, weaker the finer (1/f)."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    f[0, 0] = np.inf
    planes = []
    for _ in range(3):
        spectrum = np.fft.fft2(rng.normal(size=(side, side))) / (f * side) ** 1.2
        plane = np.fft.ifft2(spectrum).real
        planes.append(110 + 32 * (plane - plane.mean()) / plane.std())
    return np.stack(planes, axis=-1).clip(0, 255).round().astype(np.uint8)


def blurred(crop, radius):
    return np.asarray(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(radius)))


def resized(crop, side):
    return np.asarray(Image.fromarray(crop).resize((side, side), Image.Resampling.BICUBIC))


def sharpness(crop):
    return measure(crop).sharpness


HEADS = [head(seed) for seed in range(6)]


def test_blur_lowers_it_step_by_step_and_every_sharp_one_is_above_every_blurred_one():
    found = np.array([[sharpness(blurred(crop, radius)) for radius in (0, 2, 3, 4, 6)] for crop in HEADS])
    assert (np.diff(found, axis=1) < 0).all()
    assert found[:, 0].min() > 1.3 * found[:, 1].max()
    assert found[:, 0].min() > LIMITS.sharpness > found[:, 2].max()
    assert ((found >= 0) & (found <= 1)).all()


def test_a_movement_in_any_direction_is_seen():
    for crop in HEADS:
        for axis in (0, 1):
            moved = np.mean([np.roll(crop, step, axis=axis) for step in range(-7, 8)], axis=0).astype(np.uint8)
            assert sharpness(moved) < 0.6 * sharpness(crop)


def test_what_was_small_and_is_enlarged_is_not_sharp():
    for crop in HEADS:
        far = [sharpness(resized(resized(crop, side), 150)) for side in (64, 32, 20, 12)]
        assert (np.diff(far) < 0).all()
        assert far[2] < LIMITS.sharpness
        assert sharpness(resized(crop, 16)) < LIMITS.sharpness  # though it comes as a crop of 16 px


@pytest.mark.parametrize("contrast", [0.5, 0.75])
@pytest.mark.parametrize("brightness", [-25, 0, 40])
def test_contrast_and_brightness_do_not_count(contrast, brightness):
    for crop in HEADS:
        other = ((crop.astype(float) - 110) * contrast + 110 + brightness).round().astype(np.uint8)
        assert sharpness(other) == pytest.approx(sharpness(crop), rel=0.04)


def test_the_size_of_the_crop_and_turning_it_do_not_count():
    for crop in HEADS:
        for side in (64, 112, 250):
            assert sharpness(resized(crop, side)) == pytest.approx(sharpness(crop), rel=0.04)
        for other in (crop[:, ::-1], crop[::-1], crop.transpose(1, 0, 2)):
            assert sharpness(np.ascontiguousarray(other)) == pytest.approx(sharpness(crop), rel=0.02)


def test_background_at_the_rim_does_not_count():
    for crop in HEADS:
        framed = blurred(crop, 5).copy()
        framed[18:-18, 18:-18] = crop[18:-18, 18:-18]
        assert sharpness(framed) == pytest.approx(sharpness(crop), rel=0.03)


def loops(crop):
    """Crété et al. 2007 in loops over the pixels of a crop of 64 px."""
    grey = np.asarray(Image.fromarray(crop).convert("L"), float)[8:56, 8:56]
    least = 1.0
    for lines in (grey.tolist(), grey.T.tolist()):
        before = lost = 0.0
        for line in lines:
            mirrored = [line[1], line[0], *line, line[-1], line[-2]]
            smooth = [sum(mirrored[i : i + 5]) / 5 for i in range(len(line))]
            for i in range(len(line) - 1):
                step = abs(line[i + 1] - line[i])
                before += step
                lost += max(0.0, step - abs(smooth[i + 1] - smooth[i]))
        least = min(least, lost / before)
    return least


def test_it_is_the_formula():
    for seed in range(3):
        crop = head(seed, 64)
        assert sharpness(crop) == pytest.approx(loops(crop), abs=1e-9)


def test_an_even_crop_has_no_sharpness():
    assert sharpness(np.full((64, 64, 3), 90, np.uint8)) == 0.0


def face(height, score=0.8):
    return Face(box=np.array([10.0, 20, 90, 20 + height]), landmarks=np.zeros((5, 2)), score=score)


def test_the_face_is_the_boxs_height_and_the_crops_side_without_one():
    found = measure(HEADS[0], face=face(57.5))
    assert (found.face, found.confidence) == (57.5, 0.8)
    alone = measure(HEADS[0])
    assert (alone.face, alone.confidence) == (150, 1.0)
    assert found.sharpness == alone.sharpness


def of(face=100.0, sharpness=0.5):
    return Quality(face=face, sharpness=sharpness, confidence=1.0)


def test_what_is_wrong_is_said_with_what_is_needed():
    limits = Limits(face=24, sharpness=0.3)
    assert of().trouble(limits) is None
    assert of(face=24, sharpness=0.3).trouble(limits) is None
    assert of(face=17.2).trouble(limits) == "the face is 17 px high, at least 24 are needed"
    assert of(sharpness=0.114).trouble(limits) == "the face is too blurred: sharpness 0.11, at least 0.3 is needed"
    assert of(face=17, sharpness=0.1).trouble(limits).startswith("the face is 17 px high")
    # What rounds to the limit is shown to be below it.
    assert of(face=23.7).trouble(limits) == "the face is 23.7 px high, at least 24 are needed"
    assert "sharpness 0.2996, at least 0.3" in of(sharpness=0.2996).trouble(limits)
    assert of(face=LIMITS.face - 1).trouble() is not None
    assert of(sharpness=LIMITS.sharpness - 0.01).trouble() is not None
    assert of(face=LIMITS.face, sharpness=LIMITS.sharpness).trouble() is None


def test_the_score_is_a_weight_that_grows_with_sharpness_and_is_never_nothing():
    scores = [of(sharpness=value).score for value in np.linspace(0, 1, 41)]
    assert (np.diff(scores) >= 0).all()
    assert 0 < scores[0] < 0.05
    assert scores[-1] == 1.0
    assert of(sharpness=0.4).score == pytest.approx(0.4 / quality.SHARP)
    assert of(sharpness=LIMITS.sharpness).score < 1


@pytest.mark.parametrize(
    "crop",
    [np.zeros((64, 60, 3), np.uint8), np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32),
     np.zeros((64, 64, 4), np.uint8), np.zeros((0, 0, 3), np.uint8)],
)  # fmt: skip
def test_what_is_no_crop_is_refused(crop):
    with pytest.raises(ValueError, match=r"uint8 RGB \[s, s, 3\]"):
        measure(crop)


def test_photos_of_people_pass_and_the_same_out_of_focus_do_not(real_data):
    """The first photos of LFW, by its own framing: no detector."""
    import tarfile

    from faceembed.data import sources
    from faceembed.preprocess import crop_square, framed_square

    found = []
    with tarfile.open(real_data / "lfw" / "lfw-deepfunneled.tgz") as archive:
        files = (archive.extractfile(member).read() for member in archive if member.name.endswith(".jpg"))
        for _ in range(60):
            photo = sources.decode(next(files))
            square = framed_square("lfw", photo.shape[1])
            # The face is some 125 px high.
            poor = [blurred(photo, 0.03 * 125), resized(resized(photo, 25), 250)]
            found.append([measure(crop_square(one, square, 64)) for one in (photo, *poor)])
    troubled = np.array([[one.trouble() is not None for one in row] for row in found])
    assert troubled[:, 0].mean() <= 0.02
    assert troubled[:, 1:].mean() >= 0.98

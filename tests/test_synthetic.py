"""The procedural faces: the same photo every time, different people, every condition visible, no trivial give-away."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from faceembed.data import synthetic
from faceembed.data.synthetic import IDENTITY_RANGES, PHOTO_RANGES

SIZE = 64  # one size throughout: every other one is another compilation


def _load_experiment():
    path = Path(__file__).parents[1] / "experiments" / "synthetic_baselines.py"
    spec = importlib.util.spec_from_file_location("synthetic_baselines", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


baselines = _load_experiment()
GOLDEN = Path(__file__).parent / "golden" / "synthetic.txt"


def _plain(n):
    """A plain person n times, seen from the front in even light: the middle of most ranges, nothing in front."""
    who = {k: np.full(n, (low + high) / 2, np.float32) for k, (low, high) in IDENTITY_RANGES.items()}
    how = {k: np.full(n, (low + high) / 2, np.float32) for k, (low, high) in PHOTO_RANGES.items()}
    who |= {"asymmetry": np.zeros(n), "moles": np.tile([[0.3, -0.1], [-0.3, -0.1], [0.0, 0.3]], (n, 1, 1))}
    who |= {k: np.full(n, -0.5) for k in ("beard", "moustache", "mole_strength", "freckles")}
    who |= {"hair_length": np.zeros(n), "hair_wave": np.full(n, 0.3), "age": np.zeros(n)}
    how |= {k: np.zeros(n) for k in ("yaw", "pitch", "roll", "shift_x", "shift_y", "light_x", "gaze", "smile")}
    how |= {k: np.zeros(n) for k in ("background_slope", "background_clutter", "noise", "blink", "mouth_open")}
    how |= {"glasses": np.ones(n), "sunglasses": np.ones(n), "occluder": np.ones(n), "hat": np.ones(n)}
    how |= {"jpeg": np.zeros(n), "grain": np.arange(n, dtype=np.uint32)}
    how |= {k: np.full(n, 0.3) for k in ("background_r", "background_g", "background_b")}
    return who, how


def _vary(key, values, **base):
    """float32 pictures of the plain person in which only `key` takes `values`, after `base` is set."""
    who, how = _plain(len(values))
    for name, value in {**base, key: values}.items():
        part = who if name in who else how
        part[name] = np.broadcast_to(value, part[name].shape).astype(part[name].dtype)
    return synthetic.draw(who, how, size=SIZE).astype(np.float32)


def test_a_photo_is_the_same_whatever_its_batch():
    person, photo = np.arange(11) % 4, np.arange(11)
    together = synthetic.render(3, person, photo, size=SIZE)
    order = np.random.default_rng(0).permutation(11)
    np.testing.assert_array_equal(synthetic.render(3, person[order], photo[order], size=SIZE), together[order])
    np.testing.assert_array_equal(synthetic.render(3, person[9:10], photo[9:10], size=SIZE)[0], together[9])
    assert together.dtype == np.uint8
    assert together.shape == (11, SIZE, SIZE, 3)


def test_seed_person_and_photo_each_make_another_picture():
    base = synthetic.render(0, [5], [7], size=SIZE)[0].astype(int)
    for other in (
        synthetic.render(1, [5], [7], size=SIZE),
        synthetic.render(0, [6], [7], size=SIZE),
        synthetic.render(0, [5], [8], size=SIZE),
    ):
        assert np.abs(other[0] - base).mean() > 10


def test_drawing_the_parameters_is_rendering():
    person, photo = np.array([1, 8, 2]), np.array([0, 3, 11])
    drawn = synthetic.draw(
        synthetic.identity_parameters(4, person), synthetic.photo_parameters(4, person, photo), size=SIZE
    )
    np.testing.assert_array_equal(drawn, synthetic.render(4, person, photo, size=SIZE))


def test_photos_of_a_person_share_the_person_and_nothing_else():
    person, photo = np.repeat([3, 4], 50), np.tile(np.arange(50), 2)
    who, how = synthetic.identity_parameters(0, person), synthetic.photo_parameters(0, person, photo)
    for name, values in who.items():
        values = np.asarray(values)
        assert (values[:50] == values[0]).all(), name
        assert (values[0] != values[50]).all(), name
    for name, (low, high) in PHOTO_RANGES.items():
        values = np.asarray(how[name])
        assert len(np.unique(values)) == 100, name
        assert low <= values.min() < low + 0.2 * (high - low), name
        assert high - 0.2 * (high - low) < values.max() <= high, name


def test_two_people_differ_more_than_two_photos_under_the_same_conditions():
    n = 12
    person = np.arange(2 * n) // 2
    who = synthetic.identity_parameters(0, person)
    _, how = _plain(2 * n)
    how["noise"] = np.full(2 * n, PHOTO_RANGES["noise"][1])
    images = synthetic.draw(who, how, size=SIZE).astype(np.float32)
    apart = np.abs(images[:, None] - images[None]).mean(axis=(2, 3, 4))
    retaken = apart[np.arange(0, 2 * n, 2), np.arange(1, 2 * n, 2)]
    strangers = apart[person[:, None] != person[None]]
    assert strangers.min() > retaken.max()
    assert np.median(strangers) > 2.5 * np.median(retaken)


def test_the_shape_of_the_face_tells_people_apart_without_any_colour():
    n = 6
    who = synthetic.identity_parameters(0, np.arange(n))
    plain, how = _plain(n)
    coloured = ("melanin", "ruddiness", "hair_tone", "iris_tone", "brow_tone", "skin_pattern", "shine")
    images = synthetic.draw({**who, **{k: plain[k] for k in coloured}}, how, size=SIZE).astype(np.float32)
    apart = np.abs(images[:, None] - images[None]).mean(axis=(2, 3, 4))
    assert apart[~np.eye(n, dtype=bool)].min() > 3


# What must hold besides, for a parameter to show at all.
SHOWS_WITH = {
    "glasses_habit": {"glasses": 0.2},
    "glasses_shape": {"glasses": 0.2, "glasses_habit": 0.9},
    "glasses_width": {"glasses": 0.2, "glasses_habit": 0.9},
    "glasses_height": {"glasses": 0.2, "glasses_habit": 0.9},
    "glasses_tone": {"glasses": 0.2, "glasses_habit": 0.9},
    "glasses_rim": {"glasses": 0.2, "glasses_habit": 0.9},
    "glasses": {"glasses_habit": 0.9},
    "sunglasses": {"glasses": 0.2, "glasses_habit": 0.9},
    "beard_line": {"beard": 1.0},
    "occluder_angle": {"occluder": 0.0},
    "occluder_reach": {"occluder": 0.0},
    "occluder_tone": {"occluder": 0.0, "hat": 0.0},
    "background_scale": {"background_clutter": 1.0},
    "background_angle": {"background_slope": 0.6},
    "background_edge": {"background_slope": 0.6},
    "texture_u": {"background_clutter": 1.0},
    "texture_v": {"background_clutter": 1.0},
    "hair_frame": {"hair_length": 0.9},
    "hair_pattern": {"hair_tone": 0.0, "melanin": 0.0},
    "hair_wave": {"hair_length": 0.9},
    "brow_tone": {"hair_tone": 0.0, "melanin": 0.0, "masculinity": 1.0},
    "beard": {"masculinity": 1.0},
    "moustache": {"masculinity": 1.0},
    "lip_bow": {"lip_upper": 0.066, "blur": 0.2},
    "collar": {"zoom": 1.22, "shift_y": -0.12},
    **{f"clothes_{c}": {"zoom": 1.22, "shift_y": -0.12} for c in "rgb"},
}
SHOWS_WITH["beard_line"]["masculinity"] = 1.0
# From 0 to 2π an angle comes back to where it was, and so does a pattern from 0 to 1.
VALUES = {"occluder_angle": (0.0, 3.0), "background_angle": (0.0, 3.0), "skin_pattern": (0.0, 0.5),
          "hair_pattern": (0.0, 0.5), "texture_u": (0.0, 0.4), "texture_v": (0.0, 0.4)}  # fmt: skip


def test_every_parameter_shows_in_the_picture():
    keys = [*IDENTITY_RANGES, *PHOTO_RANGES]
    who, how = _plain(2 * len(keys))
    how["grain"] = np.zeros(2 * len(keys), np.uint32)
    for i, key in enumerate(keys):
        low, high = VALUES.get(key, (IDENTITY_RANGES | PHOTO_RANGES)[key])
        for j, value in enumerate((low, high)):
            for name, setting in {**SHOWS_WITH.get(key, {}), key: value}.items():
                (who if name in who else how)[name][2 * i + j] = setting
    images = synthetic.draw(who, how, size=SIZE).astype(np.float32)
    change = np.abs(images[::2] - images[1::2]).max(axis=3)
    visible = (change >= 6).sum(axis=(1, 2))
    assert {k: int(v) for k, v in zip(keys, visible, strict=True) if v < 5} == {}


def test_moles_are_where_they_were_put():
    with_mole = _vary("mole_strength", [0.0, 1.0])
    rows, columns = np.nonzero(np.abs(with_mole[0] - with_mole[1]).max(axis=2) > 20)
    assert len(rows) > 0
    # The plain person has one on each cheek and one on the brow, and looks straight ahead.
    assert {*(np.sign(columns - SIZE / 2 + 0.5) * (np.abs(columns - SIZE / 2 + 0.5) > 4)).astype(int)} == {-1, 0, 1}


def test_light_comes_from_the_side_it_is_said_to():
    images = _vary("light_x", [-1.0, 1.0]).mean(axis=3)
    left, right = images[:, 28:40, 20:30].mean(axis=(1, 2)), images[:, 28:40, 34:44].mean(axis=(1, 2))
    assert left[0] > right[0] + 10
    assert right[1] > left[1] + 10


def test_crop_jitter_moves_the_picture_by_what_it_says():
    pixels = 8  # the side of JPEG's blocks, which stay where they are
    zoom = 1.0
    still, moved = _vary("shift_x", [0.0, 2 * zoom * pixels / SIZE], zoom=zoom)
    np.testing.assert_allclose(moved[:, 8:-16], still[:, 16:-8], atol=3)
    still, moved = _vary("shift_y", [0.0, 2 * zoom * pixels / SIZE], zoom=zoom)
    np.testing.assert_allclose(moved[16:-8], still[8:-16], atol=3)


def test_roll_turns_the_whole_picture():
    # The light stays where it is when the head turns, so it has to shine straight ahead here.
    upright, half, quarter = _vary("roll", [0.0, np.pi, np.pi / 2], light_y=0.0, ambient=0.0)
    assert np.abs(half - upright).mean() > 15
    assert np.abs(half - upright[::-1, ::-1]).mean() < 1.5
    assert np.abs(quarter - np.rot90(upright, 1)).mean() < 1.5


def test_turning_left_and_right_mirror_each_other():
    left, ahead, right = _vary("yaw", [-0.5, 0.0, 0.5], hair_part=0.0)
    assert np.abs(left - right[:, ::-1]).mean() < 6
    assert np.abs(left - ahead).mean() > 8


def test_camera():
    dark, bright = _vary("exposure", [-0.5, 0.5]).mean(axis=(1, 2, 3))
    assert bright > 1.3 * dark
    blue, red = _vary("white_red", [-0.3, 0.3])
    assert (red - blue)[..., 0].mean() > 10 * np.abs((red - blue)[..., 1:]).mean()
    sharp, soft = _vary("blur", [0.2, 0.95])
    assert np.abs(np.diff(sharp, axis=1)).mean() > 1.2 * np.abs(np.diff(soft, axis=1)).mean()
    near, far = (np.abs(i - i[0, 0]).max(axis=2) > 12 for i in _vary("zoom", [0.96, 1.22]))
    assert near.mean() > 1.2 * far.mean()


def test_noise_has_the_spread_it_says_and_comes_from_its_seed():
    strength = 0.03
    clean, noisy, other, again = _vary("noise", [0.0, strength, strength, strength], grain=[0, 1, 2, 1])
    np.testing.assert_array_equal(noisy, again)
    # Of the luma: JPEG keeps little of the noise in colours. Three independent channels add up in squares.
    luma = np.array([0.299, 0.587, 0.114])
    unsaturated = ((clean > 40) & (clean < 215)).all(axis=2)
    residual, another = ((noisy - clean) @ luma)[unsaturated], ((other - clean) @ luma)[unsaturated]
    assert residual.std() == pytest.approx(255 * strength * 3.4 / 12**0.5 * np.linalg.norm(luma), rel=0.05)
    assert abs(residual.mean()) < 0.3
    assert abs(np.corrcoef(residual, another)[0, 1]) < 0.05


def thumbnails(images):
    """Mean of each 8×8 square of pixels: [n, 64, 64, 3] → [n, 8, 8, 3]."""
    n, side = len(images), SIZE // 8
    return images.reshape(n, side, 8, side, 8, 3).mean(axis=(2, 4))


def test_the_same_seed_draws_the_same_faces_on_every_version():
    # Thumbnails, not a hash: the last bit of a pixel differs between processors and versions of XLA.
    images = synthetic.render(0, [0, 0, 1, 2, 40, 41], [0, 1, 0, 5, 3, 7], size=SIZE)
    drawn = np.round(thumbnails(images)).astype(int).reshape(len(images) * SIZE // 8, -1)
    if not GOLDEN.exists():  # made anew: delete the file, run this test, and look at the pictures
        np.savetxt(GOLDEN, drawn, fmt="%d")
        pytest.fail(f"{GOLDEN} was missing and has been written")
    np.testing.assert_allclose(drawn, np.loadtxt(GOLDEN, dtype=int), atol=2)


def test_a_head_turned_by_a_millionth_is_the_same_picture():
    # A ray that meets the hair exactly is a hit: taken for a miss, it left a dark speck in one photo of seven.
    who = synthetic.identity_parameters(0, np.arange(100))
    how = synthetic.photo_parameters(0, np.arange(100), np.zeros(100, int))
    picture, turned = (
        synthetic.draw(who, how | {"yaw": np.asarray(how["yaw"]) + np.float32(by)}, size=SIZE).astype(int)
        for by in (0, 1e-6)
    )
    assert 0 < np.abs(turned - picture).max() <= 12


def _walk(start, end, steps):
    """float32 pictures [steps, 64, 64, 3] on the way from one person to another, in one condition."""
    ends = synthetic.identity_parameters(0, np.array([start, end]))
    way = np.linspace(0, 1, steps, dtype=np.float32)
    who = {
        name: (1 - way.reshape(-1, *[1] * (leaf.ndim - 1))) * leaf[:1]
        + way.reshape(-1, *[1] * (leaf.ndim - 1)) * leaf[1:]
        for name, leaf in ((name, np.asarray(leaf)) for name, leaf in ends.items())
    }
    _, how = _plain(steps)
    how |= {"yaw": np.full(steps, 0.25), "glasses": np.full(steps, 0.3), "grain": np.zeros(steps, np.uint32)}
    return synthetic.draw(who, how, size=SIZE).astype(np.float32)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (5, 8), (4, 6), (14, 19)])
def test_walking_from_one_person_to_another_moves_the_picture_smoothly(start, end):
    coarse, fine = _walk(start, end, 33), _walk(start, end, 129)
    small = thumbnails(fine)
    far = np.linalg.norm((small - small[0]).reshape(len(small), -1), axis=1)
    assert (np.maximum.accumulate(far) - far).max() < 0.1 * far.max()  # ever farther from the start
    # A pop is as large however small the steps are; a movement shrinks with them, here to a quarter.
    largest, fourth = (np.abs(np.diff(thumbnails(f), axis=0)).max(axis=(1, 2, 3)).max() for f in (coarse, fine))
    assert fourth < 0.62 * largest
    mean, mean_fourth = (np.abs(np.diff(f, axis=0)).mean(axis=(1, 2, 3)).max() for f in (coarse, fine))
    assert mean_fourth < 0.5 * mean
    assert mean_fourth < 3


@pytest.mark.parametrize("case", [{"occluder": 0.005}, {"occluder": 0.015}, {"occluder": 0.025}, {"occluder": 0.04},
                                  {"hat": 0.01}, {"hat": 0.025}])  # fmt: skip
def test_each_occluder_hides_a_part_and_never_all(case):
    ((name, value),) = case.items()
    bare, covered = _vary(name, [1.0, value], occluder_reach=0.5)
    hidden = (np.abs(covered - bare).max(axis=2) > 12).mean()
    assert 0.03 < hidden < 0.5
    # Just past its share of the draws it is gone.
    np.testing.assert_array_equal(_vary(name, [1.0, 0.06])[0], bare)


def test_jpeg_quantises_blocks_of_eight():
    clean, lossy = _vary("jpeg", [0.0, 1.0], noise=0.02, grain=0)
    assert np.abs(lossy - clean).mean() > 1
    luma = lossy @ np.array([0.299, 0.587, 0.114])
    basis = np.array([[np.cos((2 * i + 1) * u * np.pi / 16) for i in range(8)] for u in range(8)])
    basis *= np.where(np.arange(8)[:, None], 0.5, 8**-0.5)

    def vanishing(offset):
        """Share of the finest cosine coefficients that are nearly zero, over blocks that begin at `offset`."""
        part = luma[offset : offset + 48, offset : offset + 48].reshape(6, 8, 6, 8)
        coefficients = np.einsum("ui,aibj,vj->aubv", basis, part, basis)[:, 4:, :, 4:]
        return (np.abs(coefficients) < 4).mean()

    assert vanishing(8) > 0.97
    assert vanishing(8) > vanishing(4) + 0.02


def test_render_all_goes_person_by_person_and_tells_how_far_it_is():
    told = []
    images = synthetic.render_all(0, 3, 2, SIZE, progress=lambda done, total: told.append((done, total)))
    np.testing.assert_array_equal(images, synthetic.render(0, [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], size=SIZE))
    assert told == [(6, 6)]


def test_nothing_to_render():
    assert synthetic.render(0, [], [], size=SIZE).shape == (0, SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: synthetic.render(0, [0, 1], [0]), "one number a photo"),
        (lambda: synthetic.render(0, [-1], [0]), "number both from 0"),
        (lambda: synthetic.render(0, [2**31], [0]), "number both from 0"),
        (lambda: synthetic.render(-1, [0], [0]), "give 0 ≤ seed"),
        (lambda: synthetic.render(2**32, [0], [0]), "give 0 ≤ seed"),
        (lambda: synthetic.render(0, [0], [0], size=8), "try size=64"),
        (lambda: synthetic.render_all(0, 0, 4), "both must be at least 1"),
        (lambda: synthetic.draw({}, {}), "start from identity_parameters"),
        (lambda: synthetic.draw(_plain(2)[0], _plain(3)[1]), r"lengths \[2, 3\]"),
    ],
)
def test_bad_arguments_are_answered_with_what_to_type(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_no_trivial_method_tells_strangers_apart():
    table = baselines.run(people=240, photos=4, size=SIZE, seed=0)
    assert len(table) == 5
    for name, (accuracy, error) in table.items():
        assert 0.5 < accuracy <= 0.75, (name, accuracy, error)


def test_pairs_are_balanced_and_blocks_share_no_person():
    a, b, same = baselines.pairs_in_blocks(people=9, photos=5, seed=0)
    assert a.shape == (4, 8)
    np.testing.assert_array_equal(a // 5 == b // 5, same)
    assert (same.sum(axis=1) == 4).all()
    assert (a != b).all()
    owners = [{*row // 5} for row in np.concatenate([a, b], axis=1)]
    assert all(len(people) == 2 for people in owners)
    assert len(set.union(*owners)) == 8
    # No pair twice.
    assert len({frozenset(pair) for pair in zip(a.ravel(), b.ravel(), strict=True)}) == a.size


def test_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(50):
        distance, same = rng.integers(0, 6, 12).astype(float), rng.random(12) < 0.5
        found = ((distance <= baselines.best_threshold(distance, same)) == same).sum()
        assert found == max(((distance <= t) == same).sum() for t in np.unique(distance))


def test_verify_knows_perfect_from_blind():
    people, photos = 60, 4
    label = np.repeat(np.arange(people, dtype=np.float32), photos)[:, None]
    assert baselines.verify(lambda x: x, label, label, photos) == (1.0, 0.0)
    noise = np.random.default_rng(0).standard_normal((people * photos, 3))
    accuracy, error = baselines.verify(lambda x: x, noise, noise + 0.0, photos)
    assert abs(accuracy - 0.5) < 4 * error
    assert error == pytest.approx((0.25 / (people // 2 * 8)) ** 0.5, rel=0.4)

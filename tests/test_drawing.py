"""Names in a picture: inside it, apart from each other, readable on any ground, and never of letters that no font has."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed.identification import drawing
from faceembed.identification.drawing import GOOD, INK, NOT_GOOD, legend, named


def ground(shape, kind):
    if kind == "noise":
        return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    colour = {"black": (0, 0, 0), "white": (255, 255, 255), "good": GOOD, "not good": NOT_GOOD}[kind]
    return np.broadcast_to(np.array(colour, np.uint8), (*shape, 3)).copy()


GROUNDS = ("black", "white", "good", "not good", "noise")


def brightness(pixels):
    return np.asarray(pixels, float) @ [0.2126, 0.7152, 0.0722]


def is_colour(picture, colour):
    return (picture == np.array(colour, np.uint8)).all(axis=-1)


def test_a_copy_in_which_all_but_boxes_and_names_is_untouched():
    photo = ground((200, 300), "noise")
    before = photo.copy()
    picture = named(photo, [[100, 80, 150, 140]], ["Ann"], [True])
    np.testing.assert_array_equal(photo, before)
    assert picture.dtype == np.uint8
    changed = (picture != photo).any(axis=-1)
    y, x = np.nonzero(changed)
    assert (y.max(), x.min()) == (140, 99)  # one pixel of rim around the box
    assert 55 < y.min() < 70  # the name stands above it
    assert x.max() < 160
    assert not changed[90:130, 110:140].any()
    assert named(photo, [], [], []) is not photo
    np.testing.assert_array_equal(named(photo, [], [], []), photo)


@pytest.mark.parametrize("fine", [True, False])
def test_the_name_is_the_same_on_every_ground_and_readable(fine):
    colour, box = GOOD if fine else NOT_GOOD, np.array([[100.0, 80, 150, 140]])
    left, top, right, bottom = drawing._laid_out((200, 300), box, ["Ann"])[0].box
    plates = []
    for kind in GROUNDS:
        picture = named(ground((200, 300), kind), box, ["Ann"], [fine])
        plates.append(picture[top:bottom, left:right])
    for plate in plates[1:]:
        np.testing.assert_array_equal(plate, plates[0])
    assert is_colour(plates[0], colour).sum() > 100
    assert (np.abs(plates[0].astype(int) - INK[colour]).max(axis=-1) < 60).sum() > 12

    def light(rgb):  # WCAG 2: relative luminance
        c = np.array(rgb) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722] + 0.05

    lights = sorted([light(colour), light(INK[colour])])
    assert lights[1] / lights[0] > 4.5  # what WCAG asks of text
    other = named(ground((200, 300), "black"), box, ["Amm"], [fine])
    assert (other[top:bottom, left:right] != plates[0]).any()


@pytest.mark.parametrize("kind", GROUNDS[:4])
@pytest.mark.parametrize("side", [60, 300, 1800])
def test_the_box_is_seen_on_every_ground_and_solid_or_dashed(kind, side):
    unit = side // 60
    box = [20 * unit, 20 * unit, 45 * unit, 50 * unit]
    for fine, colour in ((True, GOOD), (False, NOT_GOOD)):
        picture = named(ground((side, side), kind), [box], [""], [fine])
        across = brightness(picture[25 * unit : 45 * unit, 10 * unit : 30 * unit])  # the left line
        seen = np.ptp(across, axis=1) > 70
        assert seen.all() if fine else seen.mean() > 0.4
        line = is_colour(picture[box[1] + 1 : box[3] - 1, box[0]], colour)  # along it
        assert line.all() == fine or kind == "not good"
        assert line.mean() > 0.4
        if not fine:
            assert is_colour(picture[box[1] : box[3], box[0]], INK[colour]).mean() > 0.2


def test_a_box_that_reaches_out_of_the_picture_ends_at_its_border():
    picture = named(ground((200, 300), "black"), [[250, -40, 340, 60]], [""], [True])
    assert is_colour(picture[10:50, 299], GOOD).all()
    assert is_colour(picture[0, 260:290], GOOD).all()


def test_lines_are_as_thick_as_the_picture_is_large_and_the_face_allows():
    boxes = [[600, 600, 1000, 1200], [100, 100, 120, 130]]
    picture = named(ground((1750, 1400), "black"), boxes, ["", ""], [True, True])
    assert is_colour(picture[900, 590:620], GOOD).sum() == 5
    assert is_colour(picture[115, 95:110], GOOD).sum() == 2


def test_a_name_hides_no_face():
    """Where a face leaves no room beside it, its name stands in its box if most of it remains to be seen."""
    assert legend((480, 600, 3), [[40, 10, 560, 470]], ["Ann"]) == {}
    assert legend((48, 60, 3), [[4, 1, 56, 47]], ["Ann"]) == {1: "Ann"}


def overlap(one, other):
    return bool(((one[:2] < other[2:]) & (one[2:] > other[:2])).all())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31 - 1), faces=st.integers(1, 25), side=st.integers(8, 500), size=st.floats(0.01, 0.6),
    tall=st.floats(0.3, 3),
)  # fmt: skip
def test_texts_lie_inside_apart_and_off_other_faces(seed, faces, side, size, tall):
    rng = np.random.default_rng(seed)
    shape = (side, max(1, round(side * tall)), 3)
    corner = rng.uniform(-0.1, 1, (faces, 2)) * [shape[1], shape[0]]
    boxes = np.concatenate([corner, corner + rng.uniform(0.3, 1, (faces, 2)) * size * side], axis=1)
    labels = ["".join(rng.choice(list("Abcdefgh "), rng.integers(1, 16))).strip() for _ in range(faces)]
    inside = drawing._checked(shape, boxes, labels)
    plates = drawing._laid_out(shape, inside, labels)
    for number, plate in enumerate(plates):
        if plate is None:
            continue
        assert (plate.box >= 0).all()
        assert plate.box[2] <= shape[1]
        assert plate.box[3] <= shape[0]
        assert not any(overlap(plate.box, other.box) for other in plates[:number] if other is not None)
        if plate.text == drawing._clean(labels[number]):
            assert not any(overlap(plate.box, box) for box in np.delete(inside, number, axis=0))
        else:
            assert plate.text == str(number + 1)
    unwritten = {
        number: label
        for number, (plate, label) in enumerate(zip(plates, labels, strict=True), 1)
        if label and (plate is None or plate.text != drawing._clean(label))
    }
    assert legend(shape, boxes, labels) == unwritten
    assert named(np.zeros(shape, np.uint8), boxes, labels, [True] * faces).shape == shape


def test_letters_lie_within_their_plate():
    """Text drawn on a plate of its own, larger canvas changes nothing outside the plate; stacked accents included."""
    for text in ("gjpqy", "ÅÉ", "a\u0301\u0302\u0303\u0304\u0305", "f", "W"):
        plate = drawing._plate(text, 24)
        if plate is None:
            continue
        from PIL import Image, ImageDraw

        canvas = Image.new("L", (plate.width + 80, plate.height + 80))
        at = (40 + plate.start[0], 40 + plate.start[1])
        ImageDraw.Draw(canvas).text(at, text, fill=255, font=plate.font, anchor="ls")
        left, top, right, bottom = canvas.getbbox()
        assert left > 40, text
        assert top >= 40, text
        assert right < 40 + plate.width, text
        assert bottom <= 40 + plate.height, text


def test_faces_close_together_get_numbers_and_a_legend():
    boxes = [[10 + 22 * i, 30 + 26 * j, 30 + 22 * i, 54 + 26 * j] for j in range(6) for i in range(8)]
    labels = [f"Somebody {i}" for i in range(48)]
    listed = legend((200, 190, 3), boxes, labels)
    assert 20 < len(listed) < 48
    assert all(label == labels[number - 1] for number, label in listed.items())
    apart = [[10 + 150 * i, 30 + 126 * j, 30 + 150 * i, 54 + 126 * j] for j in range(6) for i in range(8)]
    assert legend((800, 1300, 3), apart, labels) == {}


def test_letters_that_no_font_has_become_a_number(monkeypatch):
    shape, boxes = (200, 300, 3), [[100, 80, 150, 140], [200, 80, 240, 140]]
    monkeypatch.setattr(drawing, "FONTS", ())
    assert legend(shape, boxes, ["王小明", "Ann"]) == {1: "王小明"}
    one = named(ground(shape[:2], "black"), boxes, ["王小明", "Ann"], [True, True])
    same = named(ground(shape[:2], "black"), boxes, ["1", "Ann"], [True, True])
    np.testing.assert_array_equal(one, same)
    # Pillow's own font draws é as it draws what it lacks.
    assert legend(shape, boxes, ["José", "Ann"]) == {1: "José"}


def test_another_font_writes_what_pillows_own_lacks():
    font = drawing._font("Łukasz Жанна", 16)
    if font is None:
        pytest.skip("none of drawing.FONTS is on this machine")
    assert font.getname()[0] != drawing._font("Lukasz", 16).getname()[0]
    assert legend((200, 300, 3), [[100, 80, 150, 140]], ["Łukasz Жанна"]) == {}


def test_scripts_that_join_are_not_written_apart(monkeypatch):
    for text in ("محمد", "שלום", "अमित"):
        assert drawing._needs_shaping(text)
    assert not drawing._needs_shaping("Zoë Łukasz 王小明 Жанна")
    monkeypatch.setattr(drawing.features, "check", lambda name: False)
    assert legend((200, 300, 3), [[100, 80, 150, 140]], ["محمد"]) == {1: "محمد"}
    assert legend((200, 300, 3), [[100, 80, 150, 140]], ["Ann"]) == {}


def test_lines_and_controls_in_a_name_do_no_harm():
    assert drawing._clean(" Ann\n\tLee\u202e\x07 ") == "Ann Lee"
    assert legend((200, 300, 3), [[100, 80, 150, 140]], ["Ann\nLee\u202e"]) == {}
    assert legend((200, 300, 3), [[100, 80, 150, 140]], [" \n"]) == {}


def test_a_name_too_long_for_the_picture_is_in_the_legend():
    name = "Jean-Baptiste Maximilian von Hohenlohe-Langenburg"
    assert legend((90, 80, 3), [[20, 30, 60, 80]], [name]) == {1: name}
    assert legend((400, 600, 3), [[20, 60, 60, 110]], [name]) == {}


@pytest.mark.parametrize("side", [500, 4000])
def test_letters_grow_with_the_picture(side):
    small, large = (
        drawing._laid_out((side, side, 3), np.array([[side / 2, side / 2, side / 2 + face, side / 2 + face]]), ["Ann"])[
            0
        ]
        for face in (side / 100, side / 3)
    )
    assert small.height >= side / 80
    assert 1.2 * small.height < large.height < side / 15


def test_what_cannot_be_meant():
    photo = np.zeros((50, 60, 3), np.uint8)
    with pytest.raises(ValueError, match="uint8 RGB"):
        named(photo[..., 0], [[1, 1, 5, 5]], ["a"], [True])
    with pytest.raises(ValueError, match="1 boxes and 2 labels"):
        named(photo, [[1, 1, 5, 5]], ["a", "b"], [True])
    with pytest.raises(ValueError, match="1 boxes and 2 of `good`"):
        named(photo, [[1, 1, 5, 5]], ["a"], [True, False])
    with pytest.raises(ValueError, match="finite"):
        named(photo, [[1, 1, np.nan, 5]], ["a"], [True])
    with pytest.raises(ValueError, match="not below"):
        named(photo, [[9, 1, 5, 5]], ["a"], [True])

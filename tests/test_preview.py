"""`data preview`: every photo stands where it should, cropped as the encoder sees it, under the right name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceembed.cli import data as cli
from faceembed.data import sources
from faceembed.preprocess import FRAMINGS, crop_square

ROOT = Path(__file__).parents[1]
SIZE = 24


@pytest.fixture
def album(tmp_path):
    """Zoe has 5 photos, anna 3, Bob 1, 李 4; photos differ in content and in shape."""
    rng = np.random.default_rng(0)
    root = tmp_path / "album"
    for person, number in (("Zoe", 5), ("anna", 3), ("Bob", 1), ("李", 4)):
        for photo in range(number):
            (root / person).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40 + 7 * photo, 50, 3), np.uint8)
            Image.fromarray(pixels).save(root / person / f"{photo}.png")
    return root


@pytest.fixture
def preview(album, tmp_path):
    """The command: flags → (the picture as an array, the report)."""

    def run(*flags, out="sheet.png"):
        out, report = tmp_path / out, tmp_path / "report.json"
        fixed = ["--size", str(SIZE), "--out", str(out), "--json", str(report), "--data-dir", str(tmp_path / "cache")]
        cli.run(["preview", f"folder:{album}", *fixed, *flags])
        with Image.open(out) as image:
            return np.asarray(image.convert("RGB")), json.loads(report.read_text(encoding="utf-8"))

    return run


def tile(sheet, row, column):
    top, left = cli.GAP + row * (SIZE + cli.CAPTION + cli.GAP), cli.GAP + column * (SIZE + cli.GAP)
    return sheet[top : top + SIZE, left : left + SIZE]


def crop(album, key, square=None):
    return crop_square(np.asarray(Image.open(album / f"{key}.png")), square, SIZE)


def test_each_photo_is_where_the_report_says(preview, album):
    sheet, report = preview("--photos", "4")
    assert [(row["name"], row["photos"], len(row["shown"])) for row in report["people"]] == [
        ("Bob", 1, 1), ("Zoe", 5, 4), ("anna", 3, 3), ("李", 4, 4),
    ]  # fmt: skip
    for r, row in enumerate(report["people"]):
        assert row["shown"] == sorted(row["shown"])
        for c, key in enumerate(row["shown"]):
            assert key.startswith(row["name"] + "/")
            np.testing.assert_array_equal(tile(sheet, r, c), crop(album, key))
    assert (tile(sheet, 0, 1) == 255).all()  # Bob has one photo
    assert sheet.shape[0] == cli.GAP + 4 * (SIZE + cli.CAPTION + cli.GAP)


def test_the_framing_is_the_one_of_embed(preview, album):
    sheet, report = preview("--framing", "lfw")
    native, square = FRAMINGS["lfw"]
    factor = 50 / native
    scaled = type(square)(x=square.x * factor, y=square.y * factor, side=square.side * factor)
    key = report["people"][1]["shown"][2]
    np.testing.assert_array_equal(tile(sheet, 1, 2), crop(album, key, scaled))
    assert report["framing"] == "lfw"


def test_captions_name_the_people_and_stand_under_their_rows(preview, capsys):
    sheet, _ = preview("--photos", "4")
    told = capsys.readouterr().out
    assert "  Bob: 1 photo\n  Zoe: 4 of 5 photos\n  anna: 3 photos\n  李: 4 photos\n" in told
    lone = [np.zeros((1, SIZE, SIZE, 3), np.uint8)] * 2
    for r, name in enumerate(("Bob: 1 photo", "Zoe: 4 of 5 photos")):
        # The same words drawn alone give the same pixels, and other words do not.
        expected = np.asarray(cli.contact_sheet([lone[0]], [name]))[cli.GAP + SIZE :, :120]
        top = cli.GAP + r * (SIZE + cli.CAPTION + cli.GAP) + SIZE
        found = sheet[top : top + len(expected), :120]
        rows = min(len(found), cli.CAPTION)
        np.testing.assert_array_equal(found[:rows], expected[:rows])
        assert (found[:rows] < 100).sum() > 30
    one, other = (np.asarray(cli.contact_sheet([lone[0]], [text])) for text in ("Bob", "Zoe"))
    assert (one != other).any()


def test_a_long_name_is_cut_and_an_unprintable_one_shown(tmp_path):
    photo = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    sheet = np.asarray(cli.contact_sheet([photo], ["W" * 300]))
    assert (sheet[:, -4:] == 255).all()
    assert (sheet[cli.GAP + SIZE :, sheet.shape[1] // 2 :] < 100).any()
    assert cli._printable("a\nb\udcff") == "a�b�"
    np.testing.assert_array_equal(np.asarray(cli.contact_sheet([photo], [""]))[cli.GAP + SIZE :], 255)


def test_the_seed_draws_people_and_photos():
    identity = np.repeat(np.arange(60), np.tile([2, 5, 9], 20))
    count = np.bincount(identity)

    def draw(**flags):
        rows = cli.draw_rows(identity, 60, **{"rows": 10, "columns": 4, "choose": "random", "seed": 0, **flags})
        return rows, [int(identity[row[0]]) for row in rows]

    rows, people = draw()
    assert len(set(people)) == 10
    assert people == sorted(people)
    assert (count[people] >= 4).all()
    for row, person in zip(rows, people, strict=True):
        assert (identity[row] == person).all()
        assert len(set(row)) == 4
    again, _ = draw()
    assert [row.tolist() for row in again] == [row.tolist() for row in rows]
    assert draw(seed=1)[1] != people
    # Both draws are fair: everyone who may come does, and so does every photo.
    came = [draw(seed=seed) for seed in range(60)]
    assert {person for _, those in came for person in those} == set(np.flatnonzero(count >= 4).tolist())
    assert {int(index) for rows, _ in came for row in rows for index in row} == set(
        np.flatnonzero(np.isin(identity, np.flatnonzero(count >= 4))).tolist()
    )
    # Too few with so many photos: those with the most join.
    _, people = draw(rows=30, columns=8)
    assert (count[people] == 9).sum() == 20
    assert (count[people] == 5).sum() == 10
    _, people = draw(choose="most", rows=25)
    assert count[people].tolist() == [9] * 20 + [5] * 5
    assert people[:20] != sorted(people[:20])
    assert len(draw(rows=100)[0]) == 60


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--people", "0"), "--people is 0.*Try --people 8"),
        (("--photos", "-1"), "--photos is -1"),
        (("--size", "8"), "--size is 8: it must be at least 16"),
        (("--seed", "-1"), "--seed is -1"),
        (("--out", "sheet.gif"), r"Try --out sheet\.png"),
    ],
)
def test_bad_flags_are_answered(preview, flags, message):
    with pytest.raises(ValueError, match=message):
        preview(*flags)


@pytest.mark.parametrize("out", ["a_folder.png", "a_file.txt/x.png"])
def test_out_that_cannot_be_written(preview, tmp_path, out):
    (tmp_path / "a_folder.png").mkdir()
    (tmp_path / "a_file.txt").write_text("")
    with pytest.raises(ValueError, match=r"a file cannot be written there. Name one"):
        preview(out=out)


def test_no_folder_and_no_photos(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        cli.preview(f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no photo found"):
        cli.preview(f"folder:{tmp_path / 'empty'}", data_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="synthetic brings its own square"):
        cli.preview("synthetic", people=1, photos=1, framing="lfw", out=tmp_path / "x.png")


def test_problems_are_told_and_formats_written(preview, album, tmp_path, capsys):
    (album / "anna" / "broken.jpg").write_text("not an image")
    for name, kind in (("a.jpg", "JPEG"), ("b.webp", "WEBP"), ("new/folder/c.PNG", "PNG")):
        preview(out=name)
        with Image.open(tmp_path / name) as image:
            assert image.format == kind
    told = capsys.readouterr().out
    assert "1 × corrupt image" in told
    assert "has 4 people; --people asked for 8" in told


def test_a_failed_write_leaves_the_old_picture(preview, tmp_path, monkeypatch):
    sheet, _ = preview()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        preview("--seed", "5", "--photos", "1")
    monkeypatch.undo()
    with Image.open(tmp_path / "sheet.png") as image:
        np.testing.assert_array_equal(np.asarray(image), sheet)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_synthetic_people_are_those_of_the_source(tmp_path, monkeypatch):
    drawn = np.random.default_rng(0).integers(0, 255, (6, SIZE, SIZE, 3), np.uint8)
    asked = {}

    def open_source(name, **options):
        asked.update(options)
        return sources.Photos(
            source=name, keys=np.array([f"s{i // 3}/{i % 3}" for i in range(6)]), people=np.array(["s0", "s1"]),
            identity=np.repeat(np.arange(2, dtype=np.int32), 3), read=lambda i: drawn[i], square=None, problems=(),
            fingerprint="f",
        )  # fmt: skip

    monkeypatch.setattr(sources, "open_source", open_source)
    monkeypatch.setattr("faceembed.cli.train.use_compilation_cache", lambda: None)
    cli.preview("synthetic", people=2, photos=3, size=SIZE, seed=7, out=tmp_path / "s.png")
    assert [asked[key] for key in ("people", "photos", "seed", "size")] == [2, 3, 7, SIZE]
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    for index in range(6):
        np.testing.assert_array_equal(tile(sheet, index // 3, index % 3), drawn[index])


def test_photographs_need_no_jax(album, tmp_path):
    code = (
        "import sys; from faceembed.cli import data\n"
        f"data.run(['preview', 'folder:{album}', '--out', '{tmp_path}/x.png', '--data-dir', '{tmp_path}/c'])\n"
        "print('imported:', *[m for m in ('jax', 'flax', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported:"

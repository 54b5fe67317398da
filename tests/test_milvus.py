"""A gallery on Milvus Lite: the interface of `test_store.py`, and what Milvus needs beside it."""

import contextlib
import logging
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pymilvus = pytest.importorskip("pymilvus", reason="the extra `milvus` is not installed")
pytest.importorskip("milvus_lite", reason="the extra `milvus` is not installed")

from faceembed.identification import milvus  # noqa: E402
from faceembed.identification import store as stores  # noqa: E402
from faceembed.identification.store import Entry, Origin, Template, open_store  # noqa: E402

ROOT = Path(__file__).parents[1]
DIM = 16
ORIGIN = Origin(checkpoint="a" * 64, aligner='centerface, "dlib" é', dim=DIM)
WHEN = "2026-11-25T07:00:00+00:00"


def person(name, seed=0, photos=1, dim=DIM):
    rng = np.random.default_rng([seed, *name.encode()])
    templates = [
        Template(
            photo=f"{i} é'\".jpg", quality=float(rng.uniform(0.1, 1)), vector=rng.normal(size=dim).astype(np.float32)
        )
        for i in range(photos)
    ]
    return Entry(name=name, templates=tuple(templates), enrolled=WHEN)


def same(found, expected):
    content = lambda e: (e.name, e.enrolled, [(t.photo, t.quality, t.vector.tobytes()) for t in e.templates])  # noqa: E731
    return [content(entry) for entry in found] == [content(entry) for entry in expected]


def check_search(store, entries, seed=0, k=5):
    entries = list(entries)
    probes = np.random.default_rng(seed).normal(size=(3, DIM)).astype(np.float32)
    names, distances = store.search(probes, k)
    exact = np.array([[np.sum((p - e.pooled.astype(np.float64)) ** 2) for e in entries] for p in probes])
    order = np.argsort(exact, axis=1)[:, :k]
    assert names == [[entries[i].name for i in row] for row in order]
    assert distances.dtype == np.float32
    # Squared, and not the distances themselves.
    np.testing.assert_allclose(distances, np.take_along_axis(exact, order, 1), rtol=1e-4)


@pytest.fixture
def where(tmp_path):
    return f"milvus:{tmp_path}/people.db"


def test_what_is_written_is_read_back_bit_for_bit(where):
    people = [person("Anna"), person('O\'Brien "x" \\', photos=3), person("Zoë"), person("山田", photos=2)]
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        assert isinstance(store, milvus.MilvusStore)
        assert len(store) == 0
        assert store.search(np.ones((2, DIM), np.float32), 3)[0] == [[], []]
        store.write(people)
    with contextlib.closing(open_store(where, None)) as store:
        assert store.origin == ORIGIN
        assert len(store) == 4
        assert store.names() == [p.name for p in people]
        assert same(store.entries(), people)
        assert same([store.get(people[1].name)], [people[1]])
        with pytest.raises(ValueError, match="Ana is not among the 4 people. Did you mean Anna"):
            store.get("Ana")
        check_search(store, people, k=2)
        assert store.search(np.ones((2, DIM), np.float32), 50)[1].shape == (2, 4)
        with pytest.raises(ValueError, match="shape"):
            store.search(np.ones((2, 3), np.float32), 1)


def test_random_work_equals_a_dictionary(where):
    chance, there = random.Random(0), {}
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        for step in range(60):
            what = chance.choice(["error", "error", "add", "replace", "rename", "remove"])
            some = chance.sample(list(there), min(len(there), chance.choice([1, 1, 5])))
            if what == "error":
                new = [person(f"person {step} '{i}'", photos=1 + i % 2) for i in range(chance.choice([1, 10]))]
                store.write(new)
                there |= {entry.name: entry for entry in new}
            elif what == "add":
                new = [person(name, seed=step) for name in some]
                store.write(new, if_there="add")
                for entry in new:
                    old = there[entry.name]
                    there[entry.name] = Entry(name=old.name, templates=old.templates + entry.templates, enrolled=WHEN)
            elif what == "replace":
                new = [person(name, seed=step) for name in [*some, f"replacing {step}"]]
                store.write(new, if_there="replace")
                there |= {entry.name: entry for entry in new}
            elif what == "rename" and some:
                store.rename(some[0], f"renamed {step}")
                templates = there.pop(some[0]).templates
                there[f"renamed {step}"] = Entry(name=f"renamed {step}", templates=templates, enrolled=WHEN)
            elif what == "remove":
                store.remove(some)
                for name in some:
                    del there[name]
            assert len(store) == len(there)
            if step % 5 == 0 and len(there) > 5:
                check_search(store, there.values(), seed=step)
        assert same(store.entries(), [there[name] for name in sorted(there)])


def test_refusals_change_nothing(where):
    people = [person("Anna"), person("Bert")]
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        store.write(people)
        for call, message in (
            (lambda: store.write([person("Cleo"), person("Bert", seed=1)]), "Bert is in the gallery already"),
            (lambda: store.write([person("Cleo", dim=8)]), "have 8 numbers"),
            (lambda: store.write([person("Cleo"), person("Cleo")]), "Cleo is given twice"),
            (lambda: store.write([person("Cleo", photos=900)]), "900 templates of 16 numbers.*keep the gallery in a"),
            (lambda: store.remove(["Anna", "Cleo"]), "Cleo is not among"),
            (lambda: store.rename("Anna", "Bert"), "Bert is in the gallery already"),
            (lambda: store.rename("Cleo", "Dora"), "Cleo is not among"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        store.rename("Anna", "Anna")
        assert same(store.entries(), people)
        check_search(store, people, k=2)


def test_more_people_than_a_request_holds(where, monkeypatch):
    monkeypatch.setattr(milvus, "ROWS", 7)
    people = [person(f"person {i:02d}") for i in range(40)]
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        store.write(people)
        assert same(store.entries(), people)
        probes = np.stack([p.pooled for p in people])
        names, distances = store.search(probes, 1)
        assert names == [[p.name] for p in people]
        np.testing.assert_allclose(distances, 0, atol=1e-4)
        store.write([person(p.name, seed=1) for p in people], if_there="add")
        assert {len(entry.templates) for entry in store.entries()} == {2}
        store.remove([p.name for p in people[:30]])
        assert store.names() == [p.name for p in people[30:]]


def test_another_origin_is_refused(where, monkeypatch):
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        store.write([person("Anna")])
    close, closed = pymilvus.MilvusClient.close, []
    monkeypatch.setattr(pymilvus.MilvusClient, "close", lambda self: closed.append(close(self)))
    with pytest.raises(ValueError, match="checkpoint: aaaaaaaaaaaa there, bbbbbbbbbbbb now"):
        open_store(where, Origin(checkpoint="b" * 64, aligner=ORIGIN.aligner, dim=DIM), create=True)
    assert len(closed) == 1  # other processes may have it again
    open_store(where, ORIGIN).close()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dim", [8, DIM])
def test_an_empty_gallery_takes_the_origin_of_the_first_that_enrols(where, monkeypatch, first, dim):
    other = Origin(checkpoint="b" * 64, aligner="dlib", dim=dim)
    one = open_store(where, ORIGIN, create=True)
    with pytest.raises(ValueError, match="bbbbbbbbbbbb now"):
        open_store(where, other)  # whoever only reads changes nothing
    with contextlib.closing(open_store(where, None)) as store:
        assert store.origin == ORIGIN
    two = open_store(where, other, create=True)
    with contextlib.closing(open_store(where, None)) as store:
        assert store.origin == other
    opened = [(one, DIM), (two, dim)]
    (winner, its), (loser, of_loser) = opened[first], opened[1 - first]
    with contextlib.closing(one), contextlib.closing(two):
        winner.write([person("Anna", dim=its)])
        for call in (
            lambda: loser.write([person("Bert", dim=of_loser)]),
            lambda: loser.search(np.ones((1, of_loser), np.float32), 1),
            lambda: list(loser.entries()),
        ):
            with pytest.raises(ValueError, match="of another origin"):
                call()
        winner.write([person("Cleo", dim=its)])
        assert winner.names() == ["Anna", "Cleo"]
    with contextlib.closing(open_store(where, None)) as store:
        assert store.origin == winner.origin


def test_template_counts_are_told_to_ten(where):
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        assert store.template_counts() == []
        store.write([person("Anna", photos=12), person("Bert", photos=2), person("Cleo", photos=2)])
        assert store.template_counts() == [2, 10]


def test_a_server_is_asked_for_strong_reads_and_for_one_row_a_key(where, monkeypatch):
    # Milvus Lite reads its own writes at any level, and takes an insert for an upsert: only the calls can be tried here.
    client, asked, upserts = pymilvus.MilvusClient, {}, []
    make, upsert = client.create_collection, client.upsert
    monkeypatch.setattr(client, "create_collection", lambda *a, **k: asked.update(k) or make(*a, **k))
    monkeypatch.setattr(client, "upsert", lambda *a, **k: upserts.append(a[1:]) or upsert(*a, **k))
    monkeypatch.delattr(client, "insert")
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        assert asked["consistency_level"] == "Strong"
        store.write([person("Anna")])
        store.rename("Anna", "Bert")
        assert len(upserts) == 2
        assert same(store.entries(), [Entry(name="Bert", templates=person("Anna").templates, enrolled=WHEN)])


def test_milvus_lite_logs_no_stack_traces_over_a_success(where, tmp_path):
    script = """
import contextlib, logging, sys
logging.basicConfig()
from faceembed.identification.store import Origin, open_store
with contextlib.closing(open_store(sys.argv[1], Origin(checkpoint="a", aligner="", dim=4), create=True)) as store:
    print(store.names(), len(store))
"""
    done = subprocess.run([sys.executable, "-c", script, where], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] 0\n", "")


def test_other_logs_are_left_as_they_are(where, caplog):
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        store.names()
    for name in milvus.LOGS:
        logging.getLogger(name).error("heard")
    assert [record.message for record in caplog.records] == ["heard"] * len(milvus.LOGS)


def test_a_closed_store_says_so(where):
    store = open_store(where, ORIGIN, create=True)
    store.close()
    store.close()
    for call in (store.names, store.__len__, lambda: store.write([person("Anna")]), lambda: store.remove(["Anna"])):
        with pytest.raises(ValueError, match="was closed: open it once more"):
            call()


def test_a_foreign_collection_or_another_schema_is_refused(where, monkeypatch):
    (Path(where.removeprefix("milvus:"))).mkdir()
    client = pymilvus.MilvusClient(where.removeprefix("milvus:"))
    client.create_collection(milvus.COLLECTION, dimension=4)
    client.close()
    with pytest.raises(ValueError, match="is no gallery of faceembed"):
        open_store(where, ORIGIN, create=True)
    client = pymilvus.MilvusClient(where.removeprefix("milvus:"))
    client.drop_collection(milvus.COLLECTION)
    client.close()
    with monkeypatch.context() as patch:
        patch.setattr(milvus, "SCHEMA", 3)
        open_store(where, ORIGIN, create=True).close()
    with pytest.raises(ValueError, match="has schema 3, and this version of faceembed reads 2"):
        open_store(where, ORIGIN)


def test_where_nothing_is_nothing_is_made(where, tmp_path):
    for origin, create in ((None, False), (ORIGIN, False), (None, True)):
        with pytest.raises(FileNotFoundError, match="launch.py enroll CHECKPOINT --gallery milvus:"):
            open_store(where, origin, create=create)
    with pytest.raises(ValueError, match="ends in .db: give .*people.db"):
        open_store(where.removesuffix(".db"), ORIGIN, create=True)
    assert os.listdir(tmp_path) == []
    (tmp_path / "people.db").touch()
    with pytest.raises(ValueError, match="is a file"):
        open_store(where, ORIGIN, create=True)


def test_only_the_owner_may_look_into_the_folder(where, tmp_path):
    before = os.umask(0)
    try:
        open_store(where, ORIGIN, create=True).close()
        open_store(f"milvus:{tmp_path}/a/b/people.db", ORIGIN, create=True).close()
        for made in ("a", "a/b", "a/b/people.db"):
            assert stat.S_IMODE((tmp_path / made).stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / "people.db").stat().st_mode) == 0o700
        (tmp_path / "people.db").chmod(0o755)
        open_store(where, None).close()
        assert stat.S_IMODE((tmp_path / "people.db").stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_a_gallery_that_another_process_holds_is_told_of(where):
    script = "import sys; from faceembed.identification.store import open_store; open_store(sys.argv[1], None)"
    with contextlib.closing(open_store(where, ORIGIN, create=True)):
        done = subprocess.run([sys.executable, "-c", script, where], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TimeoutError" in done.stderr
    assert "Failed to start" not in done.stderr  # Milvus Lite's own words, and its stack traces
    assert "Milvus Lite serves one process at a time" in done.stderr


def test_a_server_that_does_not_answer_is_told_of(monkeypatch):
    monkeypatch.setattr(milvus, "TIMEOUT", 0.5)
    with pytest.raises(ConnectionError, match="no Milvus answers at http://127.0.0.1:9"):
        open_store("milvus:http://127.0.0.1:9", ORIGIN)


def test_the_token_comes_from_the_environment(monkeypatch):
    seen = {}

    def client(uri, **kwargs):
        seen.update(kwargs, uri=uri)
        raise pymilvus.MilvusException(message="stop")

    monkeypatch.setenv("MILVUS_TOKEN", "user:secret")
    monkeypatch.setattr(pymilvus, "MilvusClient", client)
    with pytest.raises(ConnectionError, match="stop"):
        open_store("milvus:http://host:19530/people", None)
    assert seen["uri"] == "http://host:19530/people"
    assert seen["token"] == "user:secret"


def test_the_missing_extra_is_named(where, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=r"pip install 'faceembed\[milvus\]'.*pip install -e '.\[milvus\]'"):
        open_store(where, ORIGIN, create=True)


def test_galleries_move_between_a_folder_and_milvus(where, tmp_path):
    people = [person("Anna", photos=2), person("Zoë")]
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        store.write(people)
        stores.export_npz(store, tmp_path / "out.npz")
    origin, entries = stores.import_npz(tmp_path / "out.npz")
    with contextlib.closing(open_store(tmp_path / "gallery", origin, create=True)) as store:
        store.write(entries)
        assert same(store.entries(), people)


def test_milvus_lite_is_flushed_after_every_change_and_a_server_never(tmp_path, monkeypatch):
    """Unflushed rows are searched one by one: 0.6 s instead of 0.03 for 20,000 people."""
    told = []
    monkeypatch.setattr(pymilvus.MilvusClient, "flush", lambda self, name, **options: told.append(name))
    with contextlib.closing(open_store(f"milvus:{tmp_path / 'g.db'}", ORIGIN, create=True)) as store:
        store.write([person("ann"), person("bob")])
        store.rename("ann", "cid")
        store.remove(["bob"])
        assert told == [milvus.COLLECTION] * 3
        store._lite = False
        store.write([person("dan")])
        assert len(told) == 3

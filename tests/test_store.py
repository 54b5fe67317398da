"""Galleries on disk: what is written is there, what is removed is gone, and nobody is lost in between."""

import contextlib
import datetime
import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceembed.identification import store as stores
from faceembed.identification.store import Entry, Origin, Template, open_store, pool

ROOT = Path(__file__).parents[1]
DIM = 32
ORIGIN = Origin(checkpoint="a" * 64, aligner="centerface, dlib 150 px", dim=DIM)
WHEN = "2026-11-25T07:00:00+00:00"


def template(rng, photo="photo.jpg", quality=None, dim=DIM):
    vector = rng.normal(size=dim).astype(np.float32)
    return Template(photo=photo, quality=quality or float(rng.uniform(0.1, 1)), vector=vector)


def person(name, seed=0, photos=1, dim=DIM):
    rng = np.random.default_rng([seed, *name.encode()])
    return Entry(name=name, templates=tuple(template(rng, f"{i}.jpg", dim=dim) for i in range(photos)), enrolled=WHEN)


def started(folder, *entries):
    store = open_store(folder, ORIGIN, create=True)
    store.write(entries)
    return store


def content(entry):
    return entry.name, entry.enrolled, [(t.photo, t.quality, t.vector.tobytes()) for t in entry.templates]


def same(found, expected):
    return [content(entry) for entry in found] == [content(entry) for entry in expected]


def nearest_loop(entries, probes, k):
    """(names, squared distances) of the k nearest, by a loop."""
    names = [entry.name for entry in entries]
    distances = np.array([[np.sum((p - e.pooled.astype(np.float64)) ** 2) for e in entries] for p in probes])
    order = np.argsort(distances, axis=1)[:, :k]
    return [[names[i] for i in row] for row in order], np.take_along_axis(distances, order, 1)


def check_search(store, entries, seed=0, k=5):
    entries = list(entries)
    probes = np.random.default_rng(seed).normal(size=(3, DIM)).astype(np.float32)
    names, distances = store.search(probes, k)
    expected, exact = nearest_loop(entries, probes, k)
    assert names == expected
    assert distances.dtype == np.float32
    np.testing.assert_allclose(distances, exact, rtol=1e-4)


def remains(folder, entries=(), texts=()):
    """What of these templates, pooled vectors and texts is in any file of the folder, to eight bytes of a vector."""
    data = b"".join(path.read_bytes() for path in sorted(Path(folder).iterdir()))
    vectors = [t.vector for e in entries for t in e.templates] + [e.pooled for e in entries]
    # Every window of eight bytes; any 15 bytes in a row of a vector hold a pair of its numbers.
    windows = [np.frombuffer(data, np.uint64, (len(data) - i) // 8, i) for i in range(8)]
    pieces = np.unique(np.concatenate([vector.view(np.uint64) for vector in vectors])) if vectors else np.zeros(0)
    found = [hex(piece) for piece in pieces[np.isin(pieces, np.concatenate(windows))]]
    return found + [text for text in texts if text.encode() in data]


def python(script, *args, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *map(str, args)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def finished(process, timeout=60):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


# --------------------------------------------------------------------------------------------------------- what is kept


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31 - 1), n=st.integers(1, 6), dim=st.integers(1, 9), unit=st.booleans())
def test_pool_equals_the_loop(seed, n, dim, unit):
    rng = np.random.default_rng(seed)
    templates = []
    for _ in range(n):
        t = template(rng, dim=dim)
        vector = t.vector + np.float32(3)  # on one side, so that directions do not cancel out
        templates.append(
            Template(photo="", quality=t.quality, vector=vector / np.linalg.norm(vector) if unit else vector)
        )
    total = sum(t.quality for t in templates)
    mean = sum(t.quality * t.vector.astype(float) / np.linalg.norm(t.vector.astype(float)) for t in templates) / total
    length = sum(t.quality * np.linalg.norm(t.vector.astype(float)) for t in templates) / total
    pooled = pool(templates)
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, mean / np.linalg.norm(mean) * length, rtol=1e-5, atol=1e-6)
    if unit:
        np.testing.assert_allclose(np.linalg.norm(pooled), 1, rtol=1e-6)
    np.testing.assert_allclose(pool(templates[::-1]), pooled, rtol=1e-5, atol=1e-6)
    assert pool(templates[:1]).tobytes() == templates[0].vector.tobytes()
    np.testing.assert_allclose(pool([templates[0]] * 3), templates[0].vector, rtol=1e-6)


def test_a_better_photo_counts_more():
    east, north = np.eye(2, dtype=np.float32)
    x, y = pool([Template(photo="", quality=0.9, vector=east), Template(photo="", quality=0.3, vector=north)])
    np.testing.assert_allclose([x / y, np.hypot(x, y)], [3, 1], rtol=1e-6)


def test_templates_that_cancel_out_are_refused(tmp_path):
    there = person("Anna")
    against = Entry(
        name="Anna",
        templates=[Template(photo="", quality=there.templates[0].quality, vector=-there.templates[0].vector)],
        enrolled=WHEN,
    )
    with pytest.raises(ValueError, match="directions of 2 photos cancel out"):
        pool(there.templates + against.templates)
    with pytest.raises(ValueError, match="no template"):
        pool([])
    with contextlib.closing(started(tmp_path, there)) as store:
        with pytest.raises(ValueError, match="cancel out"):
            store.write([person("Bert"), against], if_there="add")
        assert same(store.entries(), [there])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quality": 0.0}, "quality 0.0"),
        ({"quality": 1.01}, "quality 1.01"),
        ({"quality": float("nan")}, "quality nan"),
        ({"vector": np.ones(3)}, r"float64\[3\], not a float32"),
        ({"vector": np.ones((1, 3), np.float32)}, r"float32\[1, 3\]"),
        ({"vector": [1.0]}, "is list"),
        ({"vector": np.zeros(3, np.float32)}, "no direction"),
        ({"vector": np.float32([1, np.nan])}, "NaN"),
        ({"photo": "caf\udce9.jpg"}, "rename the file"),
    ],
)
def test_a_template_says_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        Template(**{"photo": "a.jpg", "quality": 0.5, "vector": np.ones(3, np.float32), **values})


def test_an_entry_says_what_is_wrong():
    good = person("Anna")
    assert good.quality == good.templates[0].quality
    assert person("Anna", photos=4).quality == max(t.quality for t in person("Anna", photos=4).templates)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    assert Entry(name=" Anna ", templates=list(good.templates), enrolled=now).name == "Anna"
    for values, message in (
        ({"templates": ()}, "has no template"),
        ({"templates": good.templates + person("Anna", dim=8).templates}, r"\[8, 32\] numbers"),
        ({"enrolled": "yesterday"}, "'yesterday', which is no time"),
        ({"enrolled": "2026-11-25T07:00:00"}, "no time in UTC"),
        ({"enrolled": "2026-11-25T07:00:00+01:00"}, "no time in UTC"),
        ({"enrolled": None}, "no time"),
    ):
        with pytest.raises(ValueError, match=message):
            Entry(**{"name": "Anna", "templates": good.templates, "enrolled": WHEN, **values})
    with pytest.raises(ValueError, match="0 dimensions"):
        Origin(checkpoint="a", aligner="", dim=0)


def test_names_are_normalised_and_checked(tmp_path):
    composed, apart = "Zoë", unicodedata.normalize("NFD", "Zoë")
    assert composed != apart
    assert stores.checked_name(f"\n {apart} ") == composed
    assert stores.checked_name("क\u094d\u200dष")  # and a zero-width joiner there
    assert stores.checked_name("می\u200cخواهم")  # a zero-width non-joiner belongs there
    for name, message in (
        (" \n", "is empty"),
        ("x" * 201, "201 characters"),
        ("a\tb", "U\\+0009"),
        ("a\u202eb", "U\\+202E"),
        ("a\u2028b", "U\\+2028"),
        ("a\u2029b", "U\\+2029"),
        ("a\u00adb", "invisible character U\\+00AD"),
        ("Anna\u200b", "U\\+200B"),
        ("Anna\u2060", "U\\+2060"),
        ("\ufeffAnna", "U\\+FEFF"),
        *((f"Anna{filler}", f"U\\+{ord(filler):04X}") for filler in "\u3164\u115f\u1160\uffa0"),
        ("a\udce9", "U\\+DCE9"),
        (7, "not int"),
    ):
        with pytest.raises(ValueError, match=message):
            stores.checked_name(name)
    with contextlib.closing(started(tmp_path, person(composed))) as store:
        assert store.get(apart).name == composed
        with pytest.raises(ValueError, match="in the gallery already"):
            store.write([person(apart)])
        store.remove([apart])
        assert store.names() == []


# ----------------------------------------------------------------------------------------------------- reading, writing


def test_what_is_written_is_read_back_bit_for_bit_by_another_process(tmp_path):
    people = [person("Émile", photos=3), person("Anna"), person("山田"), person('O\'Brien "x"', photos=2)]
    with contextlib.closing(started(tmp_path / "deep" / "gallery", *people)) as store:
        assert len(store) == 4
        assert store.names() == sorted(p.name for p in people)
    with contextlib.closing(open_store(tmp_path / "deep" / "gallery", None)) as store:
        assert store.origin == ORIGIN
        assert same(store.entries(), sorted(people, key=lambda p: p.name))
        assert same([store.get("Émile")], people[:1])


def test_who_is_there_is_refused_added_to_or_replaced(tmp_path):
    anna, bert, more = person("Anna"), person("Bert"), person("Anna", seed=1, photos=2)
    later = Entry(name="Anna", templates=more.templates, enrolled="2027-01-01T00:00:00+00:00")
    with contextlib.closing(started(tmp_path, anna)) as store:
        with pytest.raises(ValueError, match="Anna is in the gallery already: .*--if-there add.*--if-there replace"):
            store.write([bert, later])
        assert same(store.entries(), [anna])
        with pytest.raises(ValueError, match="Bert is given twice"):
            store.write([bert, bert], if_there="replace")
        with pytest.raises(ValueError, match="have 8 numbers, and the gallery's have 32"):
            store.write([bert, person("Cleo", dim=8)])
        with pytest.raises(ValueError, match="if_there is 'ignore': choose from error, add, replace"):
            store.write([bert], if_there="ignore")
        assert same(store.entries(), [anna])

        store.write([bert, later], if_there="add")
        both = Entry(name="Anna", templates=anna.templates + more.templates, enrolled=WHEN)
        assert same(store.entries(), [both, bert])
        check_search(store, [both, bert])
        store.write([later], if_there="replace")
        assert same(store.entries(), [later, bert])
        check_search(store, [later, bert])
        store.write([], if_there="add")


def test_removing_and_renaming(tmp_path):
    people = [person(f"person {i:02d}", photos=1 + i % 2) for i in range(12)]
    with contextlib.closing(started(tmp_path, *people)) as store:
        with pytest.raises(ValueError, match="Persn 03 is not among the 12 people. Did you mean person 03"):
            store.get("Persn 03")
        with pytest.raises(ValueError, match="nobody 1, nobody 2 are not among"):
            store.remove(["person 01", "nobody 1", "nobody 2"])
        with pytest.raises(ValueError, match="is one name"):
            store.remove("person 01")
        assert len(store) == 12
        check_search(store, people, k=12)
        store.remove(["person 01", "person 01", "person 07"])
        del people[7], people[1]
        assert same(store.entries(), people)
        check_search(store, people, k=12)
        for old, new, message in (
            ("x", "y", "x is not among"),
            ("person 02", "person 03", "person 03 is in the gallery"),
        ):
            with pytest.raises(ValueError, match=message):
                store.rename(old, new)
        store.rename("person 02", "person 02")
        store.rename("person 02", "Zoë")
        people.insert(0, Entry(name="Zoë", templates=people.pop(1).templates, enrolled=WHEN))
        assert same(store.entries(), people)
        check_search(store, people, k=12)
        store.write([person("passing"), person("staying")])
        store.remove(["passing"])  # who was never in the matrix
        people.append(person("staying"))
        check_search(store, people, k=12)
        store.remove([p.name for p in people])
        assert len(store) == 0
        assert store.search(np.ones((1, DIM), np.float32), 1)[0] == [[]]
        with pytest.raises(ValueError, match="Anna is not in the gallery: nobody is"):
            store.remove(["Anna"])


def test_who_is_there_is_listed_where_they_are_few(tmp_path):
    with contextlib.closing(started(tmp_path, person("Anna"))) as store:
        with pytest.raises(ValueError, match=r"bob is not among the 1 person\. Enrolled is Anna\.$"):
            store.get("bob")
        store.write([person(name) for name in "cdef"])
        with pytest.raises(ValueError, match=r"bob is not among the 5 people\. Enrolled are Anna, c, d, e, f\.$"):
            store.remove(["bob"])
        store.write([person("g")])
        with pytest.raises(ValueError, match=r"bob is not among the 6 people\.$"):
            store.remove(["bob"])
        with pytest.raises(ValueError, match="c is in the gallery already, and.*delete c first"):
            store.rename("d", "c")


def test_template_counts_are_those_that_occur_and_follow_other_processes(tmp_path):
    with contextlib.closing(started(tmp_path)) as store, contextlib.closing(open_store(tmp_path, None)) as other:
        assert store.template_counts() == []
        store.write([person("Anna", photos=2), person("Bert"), person("Cleo", photos=2)])
        assert store.template_counts() == [1, 2]
        other.write([person("Dora", photos=5)])
        assert store.template_counts() == [1, 2, 5]
        store.remove(["Bert"])
        assert store.template_counts() == [2, 5]


def test_a_closed_store_says_so(tmp_path):
    store = started(tmp_path, person("Anna"))
    store.search(np.ones((1, DIM), np.float32), 1)
    store.close()
    store.close()
    calls = (
        store.names, store.entries, store.template_counts, store.__len__, lambda: store.get("Anna"),
        lambda: store.write([person("Bert")]), lambda: store.remove(["Anna"]), lambda: store.rename("Anna", "Bert"),
        lambda: store.search(np.ones((1, DIM), np.float32), 1),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="was closed: open it once more"):
            call()


def test_a_place_without_a_name_is_refused():
    for where in ("", " ", "milvus:", "milvus: "):
        with pytest.raises(ValueError, match="names no place: give a folder, or milvus:URI"):
            open_store(where, ORIGIN, create=True)


def test_what_is_printed_moves_no_cursor():
    assert stores.shown("Zoë 山田 می\u200cخواهم") == "Zoë 山田 می\u200cخواهم"
    assert stores.shown("a\x1b[2J\r\n\u202eb\udce9") == "a\\x1b[2J\\r\\n\\u202eb\\udce9"


def test_a_misspelt_name_is_found_in_a_large_gallery(tmp_path):
    there = sorted(f"{i:06d} Person" for i in range(40_000))
    message = str(stores.not_there(["030000 persom"], there))
    assert "among the 40,000 people. Did you mean 030000 Person" in message


def test_searches_are_exact_and_refuse_what_is_no_probe(tmp_path):
    people = [person(f"person {i:02d}", photos=1 + i % 3) for i in range(40)]
    with contextlib.closing(open_store(tmp_path, ORIGIN, create=True)) as store:
        names, distances = store.search(np.ones((2, DIM), np.float32), 5)
        assert names == [[], []]
        assert distances.shape == (2, 0)
        store.write(people[:3])
        check_search(store, people[:3], k=3)
        names, distances = store.search(np.ones((2, DIM), np.float32), 50)
        assert [len(row) for row in names] == [3, 3]
        assert distances.shape == (2, 3)
        assert store.search(np.zeros((0, DIM), np.float32), 2)[1].shape == (0, 2)
        store.write(people[3:])
        check_search(store, people)
        for probes, k, message in (
            (np.ones(DIM), 1, r"shape \[32\]"),
            (np.ones((1, 31)), 1, r"needs \[n, 32\]"),
            (np.full((1, DIM), np.nan), 1, "NaN"),
            (np.ones((1, DIM)), 0, "k is 0"),
        ):
            with pytest.raises(ValueError, match=message):
                store.search(probes, k)


@pytest.mark.parametrize("seed", [0, 1])
def test_random_work_equals_a_dictionary_and_leaves_nothing_of_the_removed(tmp_path, seed):
    """Enrols, adds, replaces, renames and removes at random, and holds every search and the files' bytes against it."""
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    token = lambda: f"{chance.getrandbits(64):016x}"  # noqa: E731
    fresh = lambda name=None: Entry(  # noqa: E731
        name=name or token() + "-" * chance.randrange(60),
        templates=tuple(template(rng, token()) for _ in range(chance.choice([1, 1, 2, 5]))),
        enrolled=WHEN,
    )
    there, gone, texts = {}, [], set()
    with contextlib.closing(started(tmp_path)) as store, contextlib.closing(open_store(tmp_path, None)) as other:
        for each in (store, other):
            each._db.execute("PRAGMA synchronous=OFF")  # a disk's pace is not what is tried here
        for step in range(120):
            writer = chance.choice([store, store, store, other])
            what = chance.choice(["error", "error", "add", "replace", "rename", "remove", "remove"])
            some = chance.sample(list(there), min(len(there), chance.choice([1, 1, 1, 10])))
            if what == "error":
                entries = [fresh() for _ in range(chance.choice([1, 3, 30]))]
                writer.write(entries)
                there |= {entry.name: entry for entry in entries}
            elif what == "add":
                new = [fresh(name) for name in some]
                writer.write(new, if_there="add")
                for entry in new:
                    old = there[entry.name]
                    there[entry.name] = Entry(name=old.name, templates=old.templates + entry.templates, enrolled=WHEN)
            elif what == "replace":
                new = [fresh(name) for name in some] + [fresh()]
                writer.write(new, if_there="replace")
                gone += [there[name] for name in some]
                there |= {entry.name: entry for entry in new}
            elif what == "rename" and some:
                new = fresh().name
                writer.rename(some[0], new)
                texts.add(some[0])
                there[new] = Entry(name=new, templates=there.pop(some[0]).templates, enrolled=WHEN)
            elif what == "remove":
                writer.remove(some)
                texts |= set(some)
                gone += [there.pop(name) for name in some]
            if step % 6 == 0 and len(there) > 5:
                check_search(store, there.values(), seed=step)
                check_search(other, there.values(), seed=step)
        if some := list(there)[:1]:
            store.remove(some)
            texts |= set(some)
            gone.append(there.pop(some[0]))
        assert same(store.entries(), [there[name] for name in sorted(there)])
        texts |= {t.photo for entry in gone for t in entry.templates}
        assert len(gone) > 30
        assert remains(tmp_path, gone, texts) == []
        # The search for bytes finds those who are there.
        assert len(remains(tmp_path, [next(iter(there.values()))], list(there))) > len(there)


def test_threads_share_a_store(tmp_path):
    with contextlib.closing(started(tmp_path, person("first"))) as store:
        failures = []

        def work(who):
            try:
                for i in range(15):
                    store.write([person(f"{who} {i}")])
                    assert f"{who} {i}" in store.names()
                    store.search(np.ones((1, DIM), np.float32), 3)
                store.remove([f"{who} 0"])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(who,)) for who in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(store) == 1 + 4 * 14
        check_search(store, store.entries())


def test_a_failure_of_the_search_leaves_the_written_and_a_search_that_knows_it(tmp_path, monkeypatch):
    from faceembed.identification import search

    people = [person(f"person {i}") for i in range(9)]
    with contextlib.closing(started(tmp_path, *people)) as store:
        check_search(store, people)
        store.remove(["person 3"])
        store.write([person("Zoë")])
        with monkeypatch.context() as patch:
            patch.setattr(search, "write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                check_search(store, people)
        check_search(store, store.entries())
        assert "Zoë" in store.names()


# ----------------------------------------------------------------------------------------------- origins, foreign files


def test_another_origin_is_refused_and_told(tmp_path):
    started(tmp_path, person("Anna")).close()
    for changes, message in (
        ({"checkpoint": "b" * 64}, "checkpoint: aaaaaaaaaaaa there, bbbbbbbbbbbb now"),
        ({"aligner": "dlib"}, "aligner: 'centerface, dlib 150 px' there, 'dlib' now"),
        ({"dim": 64}, "dimensions: 32 there, 64 now"),
    ):
        other = Origin(**{"checkpoint": ORIGIN.checkpoint, "aligner": ORIGIN.aligner, "dim": DIM, **changes})
        for create in (False, True):
            with pytest.raises(ValueError, match=message) as refused:
                open_store(tmp_path, other, create=create)
            assert str(refused.value).count(" there, ") == 1
            assert "enrol the photos again into another gallery" in str(refused.value)
            assert ("give the same --framing" in str(refused.value)) == ("aligner" in changes)
    for origin in (ORIGIN, None):
        with contextlib.closing(open_store(tmp_path, origin)) as store:
            assert store.names() == ["Anna"]


OTHER = Origin(checkpoint="b" * 64, aligner="dlib", dim=8)


def test_an_empty_gallery_takes_another_origin(tmp_path):
    started(tmp_path).close()
    with pytest.raises(ValueError, match="bbbbbbbbbbbb now"):
        open_store(tmp_path, OTHER)  # whoever only reads changes nothing
    with contextlib.closing(open_store(tmp_path, OTHER, create=True)) as store:
        assert store.origin == OTHER
        assert store.search(np.ones((1, 8), np.float32), 1)[0] == [[]]
    with contextlib.closing(open_store(tmp_path, None)) as store:
        assert store.origin == OTHER
        store.write([person("Anna", dim=8)])
        store.remove(["Anna"])
    with contextlib.closing(open_store(tmp_path, ORIGIN, create=True)) as store:
        store.write([person("Bert")])
        check_search(store, [person("Bert")])
    with pytest.raises(ValueError, match="aaaaaaaaaaaa there, bbbbbbbbbbbb now"):
        open_store(tmp_path, OTHER, create=True)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dim", [8, DIM])
def test_of_two_origins_in_an_empty_gallery_the_first_that_enrols_wins(tmp_path, first, dim):
    other = Origin(checkpoint=OTHER.checkpoint, aligner=OTHER.aligner, dim=dim)
    one, two = open_store(tmp_path, ORIGIN, create=True), open_store(tmp_path, other, create=True)
    onlooker = open_store(tmp_path, None)
    with contextlib.closing(one), contextlib.closing(two), contextlib.closing(onlooker):
        opened = [(one, DIM), (two, dim)]
        (winner, its), (loser, of_loser) = opened[first], opened[1 - first]
        assert loser.search(np.ones((1, of_loser), np.float32), 1)[0] == [[]]
        winner.write([person("Anna", dim=its)])
        refused = (
            lambda: loser.write([person("Bert", dim=of_loser)]),
            lambda: loser.search(np.ones((1, of_loser), np.float32), 1),  # those are no distances
            lambda: list(loser.entries()),
            lambda: stores.export_npz(loser, tmp_path / "out.npz"),
        )
        for call in refused:
            with pytest.raises(ValueError, match="of another origin"):
                call()
        winner.write([person("Cleo", dim=its)])
        assert winner.names() == ["Anna", "Cleo"]
        assert len(list(winner.entries())) == 2
        if first == 0:  # it was opened after the other had been
            with pytest.raises(ValueError, match="of another origin"):
                onlooker.write([person("Dora", dim=dim)])
    with contextlib.closing(open_store(tmp_path, None)) as store:
        assert store.origin == winner.origin


def test_where_nothing_is_the_error_says_how_to_enrol_and_leaves_nothing_behind(tmp_path):
    for origin, create in ((None, False), (ORIGIN, False), (None, True)):
        with pytest.raises(FileNotFoundError, match="launch.py enroll CHECKPOINT --gallery .*none PHOTOS"):
            open_store(tmp_path / "none", origin, create=create)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file: a gallery is a folder"):
        open_store(tmp_path / "file", ORIGIN, create=True)


def test_a_file_that_is_no_gallery_is_refused_and_stays_as_it_is(tmp_path):
    started(tmp_path / "good", *[person(f"person {i}") for i in range(50)]).close()
    good = (tmp_path / "good" / stores.FILE).read_bytes()
    app = sqlite3.connect(tmp_path / "app.sqlite")
    app.execute("CREATE TABLE people (name)")
    app.commit()
    app.close()
    newer = tmp_path / "newer.sqlite"
    newer.write_bytes(good)
    app = sqlite3.connect(newer)
    app.execute("UPDATE meta SET value = 2 WHERE key = 'schema'")
    app.commit()
    app.close()
    cases = {
        "text": (b"these are notes about people\n" * 400, "damaged, or no gallery"),
        "short": (good[:50], "damaged, or no gallery"),
        "half": (good[: len(good) // 2], "damaged, or no gallery"),
        "less": (good[:-8192], "damaged, or no gallery"),
        "app": ((tmp_path / "app.sqlite").read_bytes(), "another program's database"),
        "newer": (newer.read_bytes(), "has schema 2, and this version of faceembed reads 1"),
    }
    for name, (data, message) in cases.items():
        file = tmp_path / name / stores.FILE
        file.parent.mkdir()
        file.write_bytes(data)
        for create in (False, True):
            with pytest.raises(ValueError, match=message):
                open_store(file.parent, ORIGIN, create=create)
        assert file.read_bytes() == data, name


def test_damage_inside_is_told_when_it_is_read(tmp_path):
    started(tmp_path, person("Anna"), person("Bert")).close()
    with contextlib.closing(sqlite3.connect(tmp_path / stores.FILE)) as raw:
        raw.execute("UPDATE templates SET vector = x'0000' WHERE id = 1")
        raw.execute("UPDATE people SET pooled = ? WHERE id = 1", [np.full(DIM, np.nan, np.float32).tobytes()])
        raw.commit()
    with contextlib.closing(open_store(tmp_path, None)) as store:
        with pytest.raises(ValueError, match="damaged: Anna has templates of another length"):
            store.get("Anna")
        with pytest.raises(ValueError, match="damaged: somebody has templates with NaN"):
            store.search(np.ones((1, DIM), np.float32), 1)
        store.remove(["Anna"])
        check_search(store, [person("Bert")])


def test_a_kill_before_the_first_person_leaves_a_folder_to_start_in(tmp_path):
    for wal in (False, True):
        folder = tmp_path / str(wal)
        folder.mkdir()
        (folder / stores.FILE).touch()
        if wal:
            with contextlib.closing(sqlite3.connect(folder / stores.FILE)) as raw:
                raw.execute("PRAGMA journal_mode=WAL")
        with pytest.raises(FileNotFoundError, match="no gallery"):
            open_store(folder, None)
        with contextlib.closing(started(folder, person("Anna"))) as store:
            assert store.names() == ["Anna"]


# --------------------------------------------------------------------------------------------------------- who may read


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_only_the_owner_may_read_whatever_the_umask(tmp_path, umask):
    (tmp_path / "mine").mkdir(mode=0o755)
    before = os.umask(umask)
    try:
        for name in ("new", "mine", "deep/below"):
            with contextlib.closing(started(tmp_path / name, person("Anna"))) as store:
                files = [stores.FILE, f"{stores.FILE}-shm", f"{stores.FILE}-wal"]
                assert modes(tmp_path / name) == dict.fromkeys(files, 0o600)
                stores.export_npz(store, tmp_path / name / "out.npz")
                assert modes(tmp_path / name)["out.npz"] == 0o600
                stores.export_npz(store, tmp_path / name / "a" / "b" / "out.npz")
                assert modes(tmp_path / name)["a"] == modes(tmp_path / name / "a")["b"] == 0o700
    finally:
        os.umask(before)
    assert modes(tmp_path) == {"mine": 0o755, "new": 0o700, "deep": 0o700}
    assert modes(tmp_path / "deep") == {"below": 0o700}


def test_a_gallery_that_was_copied_is_closed_to_others(tmp_path):
    started(tmp_path / "old", person("Anna")).close()
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    (tmp_path / "copy" / stores.FILE).chmod(0o644)
    with contextlib.closing(open_store(tmp_path / "copy", None)) as store:
        assert store.names() == ["Anna"]
        assert set(modes(tmp_path / "copy").values()) == {0o600}


# -------------------------------------------------------------------------------------------------------------- erasing


@pytest.fixture
def careless_sqlite(monkeypatch):
    """SQLite as most build it. Debian's erases what it deletes without being asked."""
    connect = sqlite3.connect

    def careless(*args, **kwargs):
        db = connect(*args, **kwargs)
        db.execute("PRAGMA secure_delete=OFF")
        return db

    monkeypatch.setattr(sqlite3, "connect", careless)


@pytest.mark.usefixtures("careless_sqlite")
def test_the_file_is_set_up_to_lose_nothing_and_to_keep_nothing(tmp_path):
    with contextlib.closing(started(tmp_path)) as store:
        pragmas = ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "temp_store", "busy_timeout")
        found = {name: store._db.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas}
    expected = {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "foreign_keys": 1, "temp_store": 2}
    assert found == {**expected, "busy_timeout": 30_000}


@pytest.mark.usefixtures("careless_sqlite")
def test_deleting_alone_zeroes_what_it_frees(tmp_path, monkeypatch):
    monkeypatch.setattr(stores.SqliteStore, "_purge", lambda self, **_: None)
    people = [person(f"person number {i}") for i in range(20)]
    with contextlib.closing(started(tmp_path, *people)) as store:
        store.remove([p.name for p in people[:5]])
    assert remains(tmp_path, people[:5], [p.name + "x" for p in people[:5]]) == []
    assert remains(tmp_path, people[5:]) != []


def test_bytes_are_gone_when_the_call_returns(tmp_path):
    people = [person(f"person number {i:03d}", photos=2) for i in range(200)]
    random.Random(3).shuffle(people)
    with contextlib.closing(started(tmp_path, *people)) as store:
        store.remove([p.name for p in people[:150]])
        assert remains(tmp_path, people[:150], [p.name for p in people[:150]]) == []
        replaced, renamed = people[150], people[151]
        store.write([person(replaced.name, seed=1)], if_there="replace")
        assert remains(tmp_path, [replaced]) == []
        store.rename(renamed.name, "Zoë")
        assert remains(tmp_path, [], [renamed.name]) == []
        assert remains(tmp_path, [renamed], ["Zoë"]) != []


def test_a_reader_in_the_way_is_told_of_and_the_next_write_erases(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "PURGE_SECONDS", 0.05)
    people = [person(f"person number {i}") for i in range(50)]
    with contextlib.closing(started(tmp_path, *people)) as store:
        with contextlib.closing(sqlite3.connect(tmp_path / stores.FILE, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM people").fetchone()
            with pytest.warns(UserWarning, match="another process is reading it.*The next write erases") as warned:
                store.remove([people[0].name])
            assert warned[0].filename == __file__
            assert len(store) == 49
            assert remains(tmp_path, people[:1]) != []
        store.write([person("Zoë")])
        assert remains(tmp_path, people[:1], [people[0].name + "x"]) == []


def test_erasing_is_finished_by_the_next_process_when_this_one_is_killed(tmp_path):
    people = [person(f"person number {i:02d}") for i in range(50)]
    started(tmp_path, *people).close()
    script = """
import os, sys
from faceembed.identification import store as stores
store = stores.open_store(sys.argv[1], None)
store._purge = lambda: os.kill(os.getpid(), 9)
store.remove(["person number 00"])
"""
    process = python(script, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert remains(tmp_path, people[:1], [people[0].name]) != []
    with contextlib.closing(open_store(tmp_path, None)) as store:
        assert len(store) == 49
        assert remains(tmp_path, people[:1], [people[0].name]) == []


def test_another_process_that_writes_for_long_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "BUSY_SECONDS", 0.1)
    with contextlib.closing(started(tmp_path, person("Anna"))) as store:
        with contextlib.closing(sqlite3.connect(tmp_path / stores.FILE, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            with pytest.raises(TimeoutError, match="another process has been writing"):
                store.write([person("Bert")])
            assert store.names() == ["Anna"]
        store.write([person("Bert")])


def test_who_reads_waits_for_no_writer(tmp_path):
    people = [person(f"person number {i}") for i in range(20)]
    with contextlib.closing(started(tmp_path, *people)) as store:
        check_search(store, people)  # JAX is loaded, and the search compiled
        store._purge = lambda **_: None
        store.remove(["person number 0"])  # and killed: its bytes are there
    with contextlib.closing(sqlite3.connect(tmp_path / stores.FILE, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        start = time.perf_counter()
        for origin, create in ((None, False), (ORIGIN, False), (ORIGIN, True)):
            with contextlib.closing(open_store(tmp_path, origin, create=create)) as store:
                assert len(store.names()) == len(list(store.entries())) == 19
                check_search(store, people[1:])
        assert time.perf_counter() - start < 2
        writer.execute("ROLLBACK")
        facts = "SELECT value FROM meta WHERE key IN ('removals', 'purged') ORDER BY key"
        assert writer.execute(facts).fetchall() == [(0,), (1,)]  # it was tried, and is still to be done
    with contextlib.closing(open_store(tmp_path, None)) as store:
        assert store._db.execute(facts).fetchall() == [(1,), (1,)]
        assert store._db.execute("PRAGMA busy_timeout").fetchone()[0] == 30_000


# ------------------------------------------------------------------------------------------------------------ processes

FULL = """
import resource, signal, sys
from faceembed.identification.store import Entry, import_npz, open_store
store = open_store(sys.argv[1], None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
(anna,) = import_npz(sys.argv[2])[1]
new = [Entry(name=f"person {i}", templates=anna.templates, enrolled=anna.enrolled) for i in range(4000)]
try:
    store.write(new)
except OSError as error:
    print(error)
print(*store.names(), len(store.get("Anna").templates))
"""


def test_a_full_disk_leaves_the_gallery_as_it_was(tmp_path):
    with contextlib.closing(started(tmp_path / "a", person("Anna"))) as store:
        stores.export_npz(store, tmp_path / "out.npz")
    message, names = finished(python(FULL, tmp_path / "a", tmp_path / "out.npz")).splitlines()
    assert "gallery.sqlite cannot be read or written" in message
    assert names == "Anna 1"
    with contextlib.closing(open_store(tmp_path / "a", None)) as store:
        assert same(store.entries(), [person("Anna")])


KILLS = """
# Replaces 400 people by 400 others in a child that is killed at a random moment, again and again.
import os, random, sys, time
from pathlib import Path
import numpy as np
from faceembed.identification.store import Entry, Origin, Template, open_store

folder, rounds, chance = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
origin = Origin(checkpoint="a" * 64, aligner="", dim=64)

def people(salt):
    vectors = np.random.default_rng(salt).normal(size=(400, 64)).astype(np.float32)
    return [
        Entry(
            name=f"person {i:03d}", enrolled="2026-11-25T07:00:00+00:00",
            templates=(Template(photo=f"salt {salt:04d}", quality=0.5, vector=vector),),
        )
        for i, vector in enumerate(vectors)
    ]

def replace(salt, report=None):
    store, new = open_store(folder, None), people(salt)
    if report:
        os.write(report, b"a")
    start = time.perf_counter()
    store.write(new, if_there="replace")
    if report:
        os.write(report, b"b")
    took = time.perf_counter() - start
    store.close()
    return took

store = open_store(folder, origin, create=True)
store.write(people(0))
store.close()
took, there, outcomes = sorted(replace(0) for _ in range(3))[1], 0, []
for salt in range(1, rounds + 1):
    heard, report = os.pipe()
    child = os.fork()
    if not child:
        replace(salt, report)
        os._exit(0)
    os.close(report)
    os.read(heard, 1)
    time.sleep(chance.uniform(0, 1.1 * took))
    os.kill(child, 9)
    os.waitpid(child, 0)
    returned = os.read(heard, 1) == b"b"
    os.close(heard)
    store = open_store(folder, origin)
    salts = [t.photo for entry in store.entries() for t in entry.templates]
    assert salts in ([f"salt {there:04d}"] * 400, [f"salt {salt:04d}"] * 400), set(salts)
    new = salts[0] == f"salt {salt:04d}"
    assert new or not returned, "a write that returned is lost"
    expected = people(salt if new else there)
    assert all(
        found.pooled.tobytes() == entry.pooled.tobytes() for found, entry in zip(store.entries(), expected, strict=True)
    )
    store.close()
    loser = there if new else salt
    data = b"".join(path.read_bytes() for path in folder.iterdir())
    assert f"salt {loser:04d}".encode() not in data
    assert not any(entry.pooled.tobytes() in data for entry in people(loser)[::20])
    there = salt if new else there
    outcomes.append("returned" if returned else "new" if new else "old")
print(*outcomes)
"""


def test_a_kill_at_any_moment_leaves_all_of_a_write_or_nothing(tmp_path):
    outcomes = finished(python(KILLS, tmp_path, 40, 0)).split()
    assert len(outcomes) == 40
    assert {"old", "new"} <= set(outcomes)  # killed before the commit, and between it and the return


WRITER = """
import sys, warnings
import numpy as np
from faceembed.identification.store import Entry, Origin, Template, open_store
warnings.filterwarnings("ignore", "what was removed")  # the other one may be reading
folder, who = sys.argv[1:]
store = open_store(folder, Origin(checkpoint="a" * 64, aligner="", dim=16), create=True)
rng = np.random.default_rng(ord(who))
def entry(name):
    vector = rng.normal(size=16).astype(np.float32)
    return Entry(
        name=name, enrolled="2026-11-25T07:00:00+00:00", templates=(Template(photo=who, quality=0.5, vector=vector),)
    )
for i in range(60):
    store.write([entry(f"{who} {i}")])
    store.write([entry("both")], if_there="add")
    if i % 10 == 9:
        store.remove([f"{who} {i - 1}"])
    assert f"{who} {i}" in store.names()
store.close()
"""


def test_two_processes_that_write_at_once_lose_nobody(tmp_path):
    for process in [python(WRITER, tmp_path / "gallery", who) for who in "ab"]:
        finished(process)
    with contextlib.closing(open_store(tmp_path / "gallery", None)) as store:
        expected = {f"{who} {i}" for who in "ab" for i in range(60) if i % 10 != 8} | {"both"}
        assert set(store.names()) == expected
        both = store.get("both")
        assert sorted(t.photo for t in both.templates) == ["a"] * 60 + ["b"] * 60
        pooled = store._db.execute("SELECT pooled FROM people WHERE name = 'both'").fetchone()[0]
        assert pooled == pool(both.templates).tobytes()


def test_a_reader_sees_what_another_process_writes_at_its_next_call(tmp_path):
    people = [person(f"person {i}") for i in range(10)]
    script = """
import sys
from faceembed.identification.store import import_npz, open_store
store = open_store(sys.argv[1], None)
store.write(import_npz(sys.argv[2])[1], if_there="replace")
store.remove(["person 1"])
store.rename("person 2", "Zoë")
store.close()
"""
    with contextlib.closing(started(tmp_path / "a", *people)) as store:
        check_search(store, people)
        store.write([person("mine")])  # noted, and not in the matrix yet
        news = [person("person 3", seed=1), person("theirs")]
        with contextlib.closing(started(tmp_path / "b", *news)) as source:
            stores.export_npz(source, tmp_path / "news.npz")
        finished(python(script, tmp_path / "a", tmp_path / "news.npz"))
        kept = [p for p in people if p.name not in ("person 1", "person 2", "person 3")]
        kept += [*news, person("mine"), Entry(name="Zoë", templates=people[2].templates, enrolled=WHEN)]
        check_search(store, kept)
        assert store.names() == sorted(p.name for p in kept)
        assert same(store.entries(), sorted(kept, key=lambda p: p.name))
        # And goes on following its own writes.
        store.write([person("person 1")])
        check_search(store, [*kept, person("person 1")])


def test_listing_and_removing_need_no_jax(tmp_path):
    started(tmp_path, person("Anna"), person("Bert")).close()
    script = """
import sys
from faceembed.identification.store import export_npz, open_store
store = open_store(sys.argv[1], None)
store.remove(["Anna"])
store.rename("Bert", "Zoë")
export_npz(store, sys.argv[1] + "/out.npz")
print(*store.names(), [m for m in ("jax", "pymilvus") if m in sys.modules])
store.close()
"""
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    assert finished(python(script, tmp_path, env=env)).split() == ["Zoë", "[]"]


# --------------------------------------------------------------------------------------------------------------- export


def test_an_export_comes_back_bit_for_bit(tmp_path):
    people = [person("Anna", photos=3), person("Zoë"), person("山田", photos=2)]
    with contextlib.closing(started(tmp_path / "a", *people)) as store:
        stores.export_npz(store, tmp_path / "new" / "out.npz")
    assert os.listdir(tmp_path / "new") == ["out.npz"]
    origin, entries = stores.import_npz(tmp_path / "new" / "out.npz")
    assert origin == ORIGIN
    assert same(entries, people)
    with contextlib.closing(open_store(tmp_path / "b", origin, create=True)) as store:
        store.write(entries)
        assert same(store.entries(), people)
    with np.load(tmp_path / "new" / "out.npz", allow_pickle=False) as arrays:
        assert arrays["owner"].tolist() == [0, 0, 0, 1, 2, 2]
        assert json.loads(str(arrays["origin"]))["dim"] == DIM
        assert {name: arrays[name].dtype.kind for name in arrays} == {
            "format": "U", "origin": "U", "names": "U", "enrolled": "U", "photos": "U",
            "owner": "i", "qualities": "f", "vectors": "f",
        }  # fmt: skip


def test_an_empty_gallery_is_exported_too(tmp_path):
    with contextlib.closing(started(tmp_path)) as store:
        stores.export_npz(store, tmp_path / "out.npz")
    assert stores.import_npz(tmp_path / "out.npz") == (ORIGIN, [])


def test_a_failed_export_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    with contextlib.closing(started(tmp_path / "a", person("Anna"))) as store:
        stores.export_npz(store, tmp_path / "out.npz")
        before = (tmp_path / "out.npz").read_bytes()
        store.write([person("Bert")])
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            stores.export_npz(store, tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a", "out.npz"]


@pytest.fixture(params=["nameless", "named"])
def files(request, monkeypatch):
    """Both kinds of file systems: with files that have no name, and without."""
    if request.param == "named":
        monkeypatch.setattr(os, "O_TMPFILE", os.O_EXCL | os.O_CREAT)  # fails on a folder
    return request.param


EXPORTER = """
import os, sys
import numpy as np
from faceembed.identification import store as stores
if sys.argv[3] == "named":
    os.O_TMPFILE = os.O_EXCL | os.O_CREAT
save = np.savez
def killed(file, **arrays):
    save(file, **arrays)
    file.flush()
    os.kill(os.getpid(), 9)
np.savez = killed
stores.export_npz(stores.open_store(sys.argv[1], None), sys.argv[2])
"""


def test_a_killed_export_leaves_no_templates_for_long(tmp_path, files):
    out = tmp_path / "out [1].npz"
    with contextlib.closing(started(tmp_path / "a", person("Anna"))) as store:
        process = python(EXPORTER, tmp_path / "a", out, files)
        process.communicate(timeout=60)
        assert process.returncode == -9
        left = [name for name in os.listdir(tmp_path) if name != "a"]
        assert len(left) == (files == "named")
        assert remains(tmp_path / "a", [person("Anna")])  # where they belong
        others = tmp_path / ".other.npz.12345678.tmp"
        others.touch()
        stores.export_npz(store, out)
    assert sorted(os.listdir(tmp_path)) == [others.name, "a", out.name]
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert same(stores.import_npz(out)[1], [person("Anna")])


def test_an_export_leaves_one_that_is_running_alone(tmp_path, files, monkeypatch):
    save = np.savez
    with contextlib.closing(started(tmp_path / "a", person("Anna"))) as store:

        def meanwhile(file, **arrays):
            monkeypatch.setattr(np, "savez", save)
            stores.export_npz(store, tmp_path / "out.npz")
            save(file, **arrays)

        monkeypatch.setattr(np, "savez", meanwhile)
        stores.export_npz(store, tmp_path / "out.npz")
    assert sorted(os.listdir(tmp_path)) == ["a", "out.npz"]
    assert same(stores.import_npz(tmp_path / "out.npz")[1], [person("Anna")])


FULL_EXPORT = """
import resource, signal, sys
from faceembed.identification.store import export_npz, open_store
store = open_store(sys.argv[1], None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    export_npz(store, sys.argv[2])
except OSError as error:
    print(type(error).__name__, error)
"""


def test_an_export_that_cannot_be_written_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    with contextlib.closing(started(tmp_path / "a", person("Anna", photos=20))) as store:
        out = finished(python(FULL_EXPORT, tmp_path / "a", tmp_path / "out.npz"))
        assert out.startswith(f"OSError {tmp_path}/out.npz cannot be written (File too large): give a file")
        (tmp_path / "folder.npz").mkdir()
        with pytest.raises(IsADirectoryError, match=r"/folder\.npz cannot be written \(Is a directory\)"):
            stores.export_npz(store, tmp_path / "folder.npz")
        (tmp_path / "file").touch()
        with pytest.raises(NotADirectoryError, match=r"/file/out\.npz cannot be written \(Not a directory\)"):
            stores.export_npz(store, tmp_path / "file" / "out.npz")
        # As for anybody but root in a folder that may be read only.
        monkeypatch.setattr(os, "open", lambda path, *_: (_ for _ in ()).throw(PermissionError(13, "No", path)))
        with pytest.raises(PermissionError, match=r"/out\.npz cannot be written \(No\)") as refused:
            stores.export_npz(store, tmp_path / "out.npz")
        assert ".tmp" not in str(refused.value)
    assert sorted(os.listdir(tmp_path)) == ["a", "file", "folder.npz"]


def test_a_damaged_or_foreign_export_is_refused(tmp_path):
    people = [person(f"person {i}", photos=2) for i in range(5)]
    with contextlib.closing(started(tmp_path / "a", *people)) as store:
        stores.export_npz(store, tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    with np.load(tmp_path / "good.npz") as file:
        arrays = dict(file)
    bad = tmp_path / "bad.npz"

    def refused(message="damaged, or no export"):
        with pytest.raises(ValueError, match=message):
            stores.import_npz(bad)

    for end in (0, 1, 100, len(good) // 2, len(good) - 1):
        bad.write_bytes(good[:end])
        refused()
    chance = random.Random(0)
    for _ in range(60):  # each changes an array's bytes, its header, or the zip's book-keeping
        flipped = bytearray(good)
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        bad.write_bytes(flipped)
        entries = people  # a time stamp, or another byte without a meaning here
        with contextlib.suppress(ValueError):
            entries = stores.import_npz(bad)[1]
        assert same(entries, people)
    bad.write_text("notes")
    refused("no export of a gallery \\(it is no .npz file\\)")
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(bad)
    refused()
    for changes, message in (
        ({"format": np.array("gallery 9")}, "'gallery 9', not 'faceembed gallery 1'"),
        ({"names": np.array([["a", {}]] * 5, object)}, "holds pickled objects"),
        ({"owner": arrays["owner"][::-1]}, "not there"),
        ({"owner": arrays["owner"] + 1}, "not there"),
        ({"owner": arrays["owner"] * 0}, "not there|no template"),
        ({"qualities": arrays["qualities"][:-1]}, "belong together"),
        ({"names": arrays["names"][[0, 0, 1, 2, 3]]}, "belong together"),
        ({"vectors": arrays["vectors"].astype(np.float64)}, "float64"),
        ({"vectors": arrays["vectors"] * np.float32(np.nan)}, "NaN"),
        ({"origin": np.array("{}")}, "checkpoint"),
        ({"photos": None}, "photos"),
    ):
        np.savez(bad, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
        refused(message)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.npz: give one that .*gallery export"):
        stores.import_npz(tmp_path / "none.npz")
    with pytest.raises(IsADirectoryError, match=r"/a cannot be read \(Is a directory\)"):
        stores.import_npz(tmp_path / "a")


# ----------------------------------------------------------------------------------------------------------------- size


@pytest.mark.slow
def test_a_hundred_thousand_people_are_searchable_in_three_seconds(tmp_path):
    n, dim = 100_000, 128
    vectors = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
    origin = Origin(checkpoint="a" * 64, aligner="", dim=dim)
    entries = [
        Entry(name=f"person {i}", templates=(Template(photo="", quality=0.5, vector=vector),), enrolled=WHEN)
        for i, vector in enumerate(vectors)
    ]
    with contextlib.closing(open_store(tmp_path, origin, create=True)) as store:
        store.write(entries)
    start = time.perf_counter()
    with contextlib.closing(open_store(tmp_path, origin)) as store:
        names, distances = store.search(vectors[:3], 1)
        took = time.perf_counter() - start
    assert names == [["person 0"], ["person 1"], ["person 2"]]
    np.testing.assert_allclose(distances, 0, atol=1e-3)
    assert took < 3, f"{took:.1f} s"

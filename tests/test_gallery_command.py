"""`launch.py gallery`: what it prints, what it writes for programs, and what it says when it cannot."""

import contextlib
import json
import sqlite3

import numpy as np
import pytest

from faceembed import cli
from faceembed.identification import store as stores
from faceembed.identification.store import Entry, Origin, Template, open_store

ORIGIN = Origin(checkpoint="a" * 64, aligner="centerface, dlib 150 px", dim=4)


def person(name, seed=0, photo="photo.jpg"):
    vector = np.random.default_rng([seed, *name.encode()]).normal(size=4).astype(np.float32)
    return Entry(
        name=name,
        templates=(Template(photo=photo, quality=0.5, vector=vector),),
        enrolled="2026-11-25T07:00:00+00:00",
    )


@pytest.fixture
def gallery(tmp_path):
    with contextlib.closing(open_store(tmp_path / "g", ORIGIN, create=True)) as store:
        store.write([person("ann"), person("cleo")])
    return tmp_path / "g"


@pytest.fixture
def launch(capsys):
    def run(*arguments):
        status = cli.main(["gallery", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def stores_opened(monkeypatch):
    """Those that a command opened."""
    opened, start = [], stores.SqliteStore.__init__

    def noted(self, *args, **kwargs):
        opened.append(self)
        start(self, *args, **kwargs)

    monkeypatch.setattr(stores.SqliteStore, "__init__", noted)
    return opened


def test_each_command_writes_what_it_did(gallery, tmp_path, launch):
    report, out = tmp_path / "report.json", tmp_path / "out.npz"
    shared = ("--gallery", gallery, "--json", report)
    told = lambda: json.loads(report.read_text())  # noqa: E731
    assert launch("rename", "cleo", " Cleo ", *shared) == (0, "cleo is Cleo now\n", "")
    assert told() == {"gallery": str(gallery), "old": "cleo", "new": "Cleo", "bytes_erased": True, "people": 2}
    assert launch("delete", "ann", *shared) == (0, "ann: deleted; 1 person is left\n", "")
    assert told() == {"gallery": str(gallery), "deleted": ["ann"], "bytes_erased": True, "people": 1}
    assert launch("export", out, *shared) == (0, f"{out}: 1 person; readable by you alone\n", "")
    assert told()["people"] == 1
    assert told()["file"] == str(out)
    assert told()["origin"]["checkpoint"] == ORIGIN.checkpoint
    status, text, err = launch("import", out, "--gallery", tmp_path / "h", "--json", report)
    assert (status, text, err) == (0, f"{tmp_path}/h: 1 person imported; 1 in all\n", "")
    assert told()["imported"] == ["Cleo"]
    assert told()["if_there"] == "error"
    status, text, _ = launch("list", *shared)
    assert text.splitlines()[-1].startswith("1 person, 1 template of 4 numbers, by checkpoint aaaaaaaaaaaa…")
    assert told()["people"][0]["name"] == "Cleo"
    assert launch("delete", "Cleo", *shared)[1] == "Cleo: deleted; 0 people are left\n"


def test_errors_say_what_to_type(gallery, tmp_path, launch):
    out, photo = tmp_path / "out.npz", tmp_path / "x.jpg"
    photo.write_bytes(b"\xff\xd8\xff\xe0 no zip")
    launch("export", out, "--gallery", gallery)
    for arguments, message in (
        (("import", out, "--gallery", gallery), "--if-there add"),
        (("import", out, "--gallery", gallery), "--if-there replace"),
        (("import", photo, "--gallery", gallery), "x.jpg is damaged, or no export of a gallery (it is no .npz file)"),
        (("import", tmp_path / "nope.npz", "--gallery", gallery), "there is no file"),
        (("delete", "bob", "--gallery", gallery), "bob is not among the 2 people. Enrolled are ann, cleo."),
        (("rename", "ann", "cleo", "--gallery", gallery), "cleo is in the gallery already"),
        (("list", "--gallery", ""), "names no place: give a folder"),
        (("export", out, "--gallery", ""), "names no place"),
        (("export", tmp_path / "out", "--gallery", gallery), "Try "),
        (("export", ".", "--gallery", gallery), "Give FILE.npz"),
        (("export", photo / "out.npz", "--gallery", gallery), "x.jpg/out.npz cannot be written"),
    ):
        status, printed, err = launch(*arguments)
        assert (status, printed) == (1, ""), arguments
        assert err.startswith("error: ")
        assert message in err
        assert "allow_pickle" not in err
    assert launch("import", out, "--gallery", gallery, "--if-there", "replace")[0] == 0


def test_what_the_store_warns_of_is_a_note(gallery, tmp_path, launch, monkeypatch):
    monkeypatch.setattr(stores, "PURGE_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(gallery / stores.FILE, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM people").fetchone()
        status, out, err = launch("delete", "ann", "--gallery", gallery, "--json", tmp_path / "report.json")
    assert (status, out) == (0, "ann: deleted; 1 person is left\n")
    assert err.startswith("note: what was removed from ")
    assert len(err.splitlines()) == 1  # no source line of ours below it
    assert not json.loads((tmp_path / "report.json").read_text())["bytes_erased"]


def test_stores_are_closed_after_errors_too(gallery, tmp_path, launch, stores_opened, monkeypatch):
    launch("export", tmp_path / "out.npz", "--gallery", gallery)
    assert launch("delete", "bob", "--gallery", gallery)[0] == 1
    assert launch("rename", "bob", "rob", "--gallery", gallery)[0] == 1
    assert launch("import", tmp_path / "out.npz", "--gallery", gallery)[0] == 1
    (tmp_path / "folder.npz").mkdir()
    assert launch("export", tmp_path / "folder.npz", "--gallery", gallery)[0] == 1
    assert len(stores_opened) == 5
    for store in stores_opened:
        with pytest.raises(ValueError, match="was closed"):
            store.names()


def test_no_name_moves_the_cursor(gallery, tmp_path, launch):
    evil = tmp_path / "a\x1b[2J.npz"
    for arguments in (
        ("export", evil, "--gallery", gallery),
        ("import", evil, "--gallery", tmp_path / "h\x1b[2J"),
        ("import", tmp_path / "b\x1b[2J.npz", "--gallery", gallery),
        ("list", "--gallery", tmp_path / "none\x1b[2J"),
        ("delete", "bob\x1b[2J", "--gallery", gallery),
        ("delete", "ann", "--gallery", gallery),
    ):
        _, out, err = launch(*arguments)
        assert "\x1b" not in out + err
        assert "\\x1b[2J" in out + err or arguments[1] == "ann"


def test_milvus_says_when_the_bytes_go(tmp_path, launch):
    pytest.importorskip("milvus_lite", reason="the extra `milvus` is not installed")
    where = f"milvus:{tmp_path}/people.db"
    with contextlib.closing(open_store(where, ORIGIN, create=True)) as store:
        store.write([person("ann")])
    status, out, err = launch("delete", "ann", "--gallery", where, "--json", tmp_path / "report.json")
    assert (status, err) == (0, "")
    assert "their bytes stay in Milvus' files until the server compacts them" in out.splitlines()[1]
    assert not json.loads((tmp_path / "report.json").read_text())["bytes_erased"]

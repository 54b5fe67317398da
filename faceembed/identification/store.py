"""Where a gallery of enrolled people is kept: a folder with one SQLite file, or a Milvus server.

    GALLERY/gallery.sqlite     names, templates, photos' names, dates; and -wal and -shm beside it while it is in use

Templates are biometric data. The file is readable by its owner alone, and whoever is removed is gone from its bytes and
not only from its tables. That holds for the file: backups, snapshots and the spare blocks of an SSD are beyond it.

A write is one transaction: it is on the disk when it returns, and a kill at any moment leaves all of it or nothing.
Several processes of one machine may read and write at once. A network file system will not do: SQLite's log needs
memory that its processes share.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import datetime
import difflib
import fcntl
import functools
import glob
import json
import os
import secrets
import sqlite3
import stat
import threading
import unicodedata
import urllib.parse
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np

from faceembed.identification.pooling import pooled

__all__ = [
    "Entry",
    "IfThere",
    "Origin",
    "SqliteStore",
    "Store",
    "Template",
    "checked_name",
    "export_npz",
    "import_npz",
    "open_store",
    "pool",
    "shown",
]

T = TypeVar("T")

IfThere = Literal["error", "add", "replace"]
"""What `Store.write` does with a person who is there: refuse everything, add the templates, or put them in place of
those that are there."""

FILE = "gallery.sqlite"
SCHEMA = 1
APPLICATION = 0x46634764  # "FcGd", in the file's header: tells a gallery from other programs' databases
EXPORT = "faceembed gallery 1"
BUSY_SECONDS = 30.0  # how long to wait for another process's write
PURGE_SECONDS = 2.0  # how long to wait for readers that still need the old bytes
OPENING_SECONDS = 0.1  # the same, and for writers, while a gallery is opened: whoever only reads must not wait
INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories: controls, formats, halves of characters, line ends
JOINERS = {"\u200c", "\u200d"}  # of category Cf; Persian and Hindi names need them
FILLERS = {"\u115f", "\u1160", "\u3164", "\uffa0"}  # Hangul letters that are drawn as nothing


# --------------------------------------------------------------------------------------------------------------------
# What is kept
# --------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What made the templates of a gallery: only embeddings of one origin can be compared."""

    checkpoint: str
    """Fingerprint (SHA-256, hex) of the encoder's parameters."""
    aligner: str
    """How faces were found and framed, such as "centerface, dlib 150 px"."""
    dim: int
    """Numbers an embedding has."""

    def __post_init__(self) -> None:
        if not self.checkpoint or not isinstance(self.dim, int) or self.dim < 1:
            raise ValueError(
                f"an origin of checkpoint {self.checkpoint!r} and {self.dim!r} dimensions: give the fingerprint of the "
                "encoder's parameters and the length of its embeddings."
            )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """The embedding of one photo of one person.

    Raises:
      ValueError: the vector is not a finite [d] float32 of some length, the quality is not in (0, 1], or the photo's
        name cannot be written as UTF-8.
    """

    photo: str
    """What it was made from: a file's name, or ""."""
    quality: float
    """In (0, 1]: its weight beside the person's other templates."""
    vector: np.ndarray
    """[d] float32."""

    def __post_init__(self) -> None:
        vector = self.vector
        if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype != np.float32 or not len(vector):
            found = f"{vector.dtype}{list(vector.shape)}" if isinstance(vector, np.ndarray) else type(vector).__name__
            raise ValueError(
                f"the template of {self.photo!r} is {found}, not a float32 [d]: give one row of embeddings."
            )
        if not np.isfinite(vector).all() or not vector.any():
            raise ValueError(
                f"the template of {self.photo!r} is zero, or holds NaN or infinity: it has no direction to compare. "
                "Leave that photo out."
            )
        if not 0 < self.quality <= 1:
            raise ValueError(f"the template of {self.photo!r} has quality {self.quality}: give one in (0, 1].")
        if not _storable(self.photo):
            raise ValueError(f"the photo's name {self.photo!r} is not Unicode text: rename the file.")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One enrolled person.

    Raises:
      ValueError: as `checked_name` and `pool`; there is no template, their lengths differ, or the date is not one.
    """

    name: str
    """As `checked_name` gives it."""
    templates: tuple[Template, ...]
    """At least one, in order of enrolment."""
    enrolled: str
    """When the person was first enrolled: ISO 8601, UTC, to the second, such as "2026-11-25T07:00:00+00:00"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", checked_name(self.name))
        object.__setattr__(self, "templates", tuple(self.templates))
        if not self.templates:
            raise ValueError(f"{self.name} has no template: a person is enrolled with one photo or more.")
        if len(dims := sorted({len(template.vector) for template in self.templates})) > 1:
            raise ValueError(f"the templates of {self.name} have {dims} numbers: make them with one encoder.")
        try:
            when = datetime.datetime.fromisoformat(self.enrolled)
        except (TypeError, ValueError):
            when = None
        if when is None or when.utcoffset() != datetime.timedelta(0) or when.microsecond:
            raise ValueError(
                f"{self.name} was enrolled {self.enrolled!r}, which is no time in UTC to the second: give "
                'datetime.now(UTC).isoformat(timespec="seconds").'
            )

    @functools.cached_property
    def pooled(self) -> np.ndarray:
        """[d] float32: what a search compares with."""
        return pool(self.templates)

    @property
    def quality(self) -> float:
        """Of the best template."""
        return max(template.quality for template in self.templates)


def pool(templates: Sequence[Template]) -> np.ndarray:
    """The one vector that a person's templates are searched by.

    The quality-weighted mean of their directions (unit vectors), brought to unit length and then to their
    quality-weighted mean length, which is 1 for encoders of unit length. One template is itself, bit for bit.

    Args:
      templates: one or more, of one dimension.

    Returns:
      [d] float32. It does not depend on the templates' order, up to rounding.

    Raises:
      ValueError: there are none, or their directions cancel out, so that their mean points nowhere.

    >>> east, north = np.float32([1, 0]), np.float32([0, 3])
    >>> pool([Template(photo="", quality=0.5, vector=east), Template(photo="", quality=0.5, vector=north)])
    array([1.4142135, 1.4142135], dtype=float32)
    """
    if not templates:
        raise ValueError("there is no template to pool: a person is enrolled with one photo or more.")
    if len(templates) == 1:
        return templates[0].vector
    vectors = np.stack([template.vector for template in templates])
    return pooled(vectors, [template.quality for template in templates]).astype(np.float32)


def checked_name(name: str) -> str:
    """A person's name as it is stored and compared: NFC, without spaces around it.

    Two spellings that look alike because one composes its accents and the other does not are one name. What is not seen
    is refused, so that nobody is enrolled beside a twin whose name looks the same; but zero-width joiners and
    non-joiners are letters of some scripts, and stay.

    Raises:
      ValueError: nothing is left, it is longer than 200 characters, or it holds control or invisible characters.

    >>> checked_name(" Zoe\\u0308 ") == "Zo\\u00eb"
    True
    """
    if not isinstance(name, str):
        raise ValueError(f"a name is text, not {type(name).__name__}: {name!r}.")
    checked = unicodedata.normalize("NFC", name).strip()
    if not checked:
        raise ValueError(f"the name {name!r} is empty: give one of 1 to 200 characters.")
    if len(checked) > 200:
        raise ValueError(f"the name {checked[:20]!r}... has {len(checked)} characters: give one of at most 200.")
    for char in checked:
        if _hidden(char) or char in FILLERS:
            kind = "control" if unicodedata.category(char) == "Cc" else "invisible"
            raise ValueError(f"the name {checked!r} holds the {kind} character U+{ord(char):04X}: leave it out.")
    return checked


def _hidden(char: str) -> bool:
    return unicodedata.category(char) in INVISIBLE and char not in JOINERS


def shown(text: object) -> str:
    """A name or a path as it may be printed: what would move the cursor, or hide, is written as its escape.

    >>> print(shown("a\u001b[2Jb"))
    a\\x1b[2Jb
    """
    return "".join(repr(char)[1:-1] if _hidden(char) else char for char in str(text))


def _storable(text: object) -> bool:
    if not isinstance(text, str) or "\0" in text:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:  # a file's name that was not UTF-8
        return False
    return True


# --------------------------------------------------------------------------------------------------------------------
# The interface, and what its implementations share
# --------------------------------------------------------------------------------------------------------------------


class Store(Protocol):
    """A gallery: people by name, and the search over their pooled templates. Safe to share between threads."""

    origin: Origin

    erases: bool
    """Whether the bytes of what was removed are gone when `remove`, `rename` or `write` returns (a UserWarning tells of
    an exception); else they are gone when the server says so."""

    def __len__(self) -> int:
        """How many people are enrolled."""

    def names(self) -> list[str]:
        """Everybody's name, sorted."""

    def get(self, name: str) -> Entry:
        """One person.

        Raises:
          ValueError: nobody has that name; the message names those that come nearest.
        """

    def entries(self) -> Iterator[Entry]:
        """Everybody, sorted by name, as they were when it was called."""

    def template_counts(self) -> list[int]:
        """How many templates people have: each number that occurs, once, ascending."""

    def write(self, entries: Sequence[Entry], *, if_there: IfThere = "error") -> None:
        """Enrols people, all of them or none.

        Args:
          entries: each person once.
          if_there: what happens to those who are there. "add" keeps the date of the first enrolment.

        Raises:
          ValueError: somebody is there and `if_there` is "error"; a person is given twice; templates have another
            dimension than the gallery's; old and new templates of a person cancel out; or another process has enrolled
            people of another origin since this store was opened. Nothing is written then.
        """

    def remove(self, names: Sequence[str]) -> None:
        """Removes people and all that was kept of them, all of them or none.

        Raises:
          ValueError: somebody is not there; nobody is removed then.
        """

    def rename(self, old: str, new: str) -> None:
        """Gives a person another name.

        Raises:
          ValueError: the old one is not there, or the new one is.
        """

    def search(self, probes: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """The nearest people.

        Args:
          probes: [n, d] float32.
          k: how many a probe, at least 1.

        Returns:
          (names, distances): names of min(k, people) a probe, nearest first, and [n, min(k, people)] float32 squared
          Euclidean distances to their pooled templates. The order of people at equal distance is not promised.

        Raises:
          ValueError: the probes are not finite numbers of that shape, or k is below 1.
        """

    def close(self) -> None:
        """Lets go of the files or the connection; may be called twice."""


def open_store(where: str | os.PathLike[str], origin: Origin | None, *, create: bool = False) -> Store:
    """Opens a gallery.

    Args:
      where: a folder, or "milvus:URI" with the URI of a server ("milvus:http://localhost:19530") or a path for Milvus
        Lite ("milvus:people.db").
      origin: what makes the templates now; None opens a gallery whatever made it, to list, rename, remove or export.
      create: whether a gallery is started where there is none. Its folder is made, for its owner alone. A gallery with
        nobody in it, such as a failed first enrolment leaves, is given the new origin: of two processes that start one,
        the first that enrols somebody decides, and the other's writes are refused.

    Raises:
      FileNotFoundError: there is no gallery, and `create` is False.
      ValueError: the gallery is of another origin, or what is there is no gallery, or a damaged one.
      PermissionError, TimeoutError, OSError: it cannot be opened, another process holds it, or the disk is full.
      ImportError: it is on Milvus, and pymilvus is not installed.
    """
    if isinstance(where, str) and not where.removeprefix("milvus:").strip():
        raise ValueError(
            f"the gallery is given as {where!r}, which names no place: give a folder, or milvus:URI such as "
            "milvus:http://localhost:19530."
        )
    if isinstance(where, str) and where.startswith("milvus:"):
        from faceembed.identification.milvus import MilvusStore

        return MilvusStore(where.removeprefix("milvus:"), origin, create=create)
    return SqliteStore(where, origin, create=create)


def check_origin(where: object, there: Origin, now: Origin | None) -> None:
    """Refuses to mix templates that cannot be compared.

    Raises:
      ValueError: the origins differ; the message says in what.
    """
    if now is None or there == now:
        return
    lines = []
    if there.checkpoint != now.checkpoint:
        lines.append(f"checkpoint: {there.checkpoint[:12]} there, {now.checkpoint[:12]} now")
    if there.aligner != now.aligner:
        lines.append(
            f"aligner: {there.aligner!r} there, {now.aligner!r} now (photos were framed in the first way at enrolment: "
            "give the same --framing)"
        )
    if there.dim != now.dim:
        lines.append(f"dimensions: {there.dim} there, {now.dim} now")
    raise ValueError(
        f"{shown(where)} holds templates of another origin, which cannot be compared with these:\n  "
        + "\n  ".join(lines)
        + "\nA gallery holds embeddings of one checkpoint only: take the one it was made with, or enrol the photos again "
        "into another gallery."
    )


def nothing_there(where: object) -> FileNotFoundError:
    """Of `open_store` where there is no gallery."""
    return FileNotFoundError(
        f"there is no gallery at {shown(where)}. Enrol people to start one: "
        f"python launch.py enroll CHECKPOINT --gallery {shown(where)} PHOTOS."
    )


def closed(where: object) -> ValueError:
    """Of every call of a store after `Store.close`."""
    return ValueError(f"the gallery at {shown(where)} was closed: open it once more with open_store.")


def check_entries(entries: Sequence[Entry], if_there: str, dim: int) -> None:
    """What `Store.write` refuses whoever is there.

    Raises:
      ValueError: as `Store.write`.
    """
    if if_there not in get_args(IfThere):
        raise ValueError(f"if_there is {if_there!r}: choose from {', '.join(get_args(IfThere))}.")
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"{entry.name} is given twice: put all of a person's templates into one entry.")
        seen.add(entry.name)
        if (found := len(entry.templates[0].vector)) != dim:
            raise ValueError(f"the templates of {entry.name} have {found} numbers, and the gallery's have {dim}.")


def check_probes(probes: np.ndarray, k: int, dim: int) -> np.ndarray:
    """Probes as [n, d] float32.

    Raises:
      ValueError: as `Store.search`.
    """
    probes = np.asarray(probes, np.float32)
    if probes.ndim != 2 or probes.shape[1] != dim:
        raise ValueError(f"probes have shape {list(probes.shape)}, and the gallery needs [n, {dim}].")
    if not np.isfinite(probes).all():
        raise ValueError("probes hold NaN or infinity: leave those photos out.")
    if k < 1:
        raise ValueError(f"k is {k}: ask for one candidate or more.")
    return probes


def check_names(names: Sequence[str]) -> list[str]:
    """Names as stored, each once.

    Raises:
      ValueError: as `checked_name`, or `names` is one string instead of several.
    """
    if isinstance(names, str):
        raise ValueError(f"{names!r} is one name: give a list of names.")
    return list(dict.fromkeys(checked_name(name) for name in names))


def not_there(names: Sequence[str], there: Sequence[str]) -> ValueError:
    """Of a name that nobody has.

    Args:
      names: one or more that are not there.
      there: all that are, sorted.
    """
    if not there:
        return ValueError(f"{_listed(names)} is not in the gallery: nobody is.")
    # difflib takes microseconds a name: in a large gallery only the alphabetical neighbourhood is looked at.
    middle = bisect.bisect(there, names[0])
    folded = {name.casefold(): name for name in there[max(0, middle - 10_000) : middle + 10_000]}
    near = [folded[match] for match in difflib.get_close_matches(names[0].casefold(), folded, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    if len(there) <= 5:
        hint += f" Enrolled {'is' if len(there) == 1 else 'are'} {', '.join(there)}."
    people = "1 person" if len(there) == 1 else f"{len(there):,} people"
    return ValueError(f"{_listed(names)} {'is' if len(names) == 1 else 'are'} not among the {people}.{hint}")


def already_there(names: Sequence[str]) -> ValueError:
    """Of `Store.write`, for names that somebody has."""
    return ValueError(
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} in the gallery already: add the photos to the person "
        "who is there (--if-there add), replace that person (--if-there replace), or choose another name."
    )


def name_taken(name: str) -> ValueError:
    """Of `Store.rename`, for a new name that somebody has."""
    return ValueError(
        f"{name} is in the gallery already, and a name has one person: choose another name, or delete {name} first."
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    # SQLite takes 999 variables a statement in its older builds.
    return (items[start : start + 500] for start in range(0, len(items), 500))


# --------------------------------------------------------------------------------------------------------------------
# SQLite
# --------------------------------------------------------------------------------------------------------------------

TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE people (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, enrolled TEXT NOT NULL, pooled BLOB NOT NULL);
CREATE TABLE templates (
  id INTEGER PRIMARY KEY, person INTEGER NOT NULL REFERENCES people(id) ON DELETE CASCADE,
  photo TEXT NOT NULL, quality REAL NOT NULL, vector BLOB NOT NULL
);
CREATE INDEX templates_person ON templates (person);
"""


@dataclasses.dataclass(kw_only=True)
class _Index:
    """The search matrix of one state of the file, and who is in its rows."""

    version: int  # SQLite's data_version: changes when another connection has written
    rows: list[str | None]  # row → name; None: nobody
    row_of: dict[str, int]
    free: list[int]
    matrix: Any  # `search.Matrix`; None while nobody was ever there
    changes: dict[str, np.ndarray | None] = dataclasses.field(default_factory=dict)  # written since; None: gone


class SqliteStore:
    """A gallery in one SQLite file of a folder.

    The search matrix is loaded at the first search, follows this store's own writes, and is loaded again when another
    process has written. Searches therefore see whatever was written before them, by whomever.

    Removing, replacing and renaming rewrite the file, so that nothing of the old is left in it. That takes a second or
    so for each 100,000 people, however many are removed at once, and as much memory as the file is large. A process
    that is killed in between leaves a mark, and the next that opens or writes the gallery finishes the work. When
    another process is in the middle of reading, the old bytes stay until the next write, and a UserWarning says so.

    Whoever only reads waits for nobody, and opening a gallery that is there takes no lock either: work that a killed
    process has left is done then only if no other process is writing, which will do it after its write.
    """

    erases = True

    def __init__(self, where: str | os.PathLike[str], origin: Origin | None, *, create: bool = False) -> None:
        """Opens a gallery; use `open_store`, which says what is raised."""
        self._where = Path(where)
        self._lock = threading.RLock()
        self._closed = False
        self._may_start = create and origin is not None
        self._index: _Index | None = None
        self._counts: tuple[tuple[int, int], list[int]] | None = None  # of one state of the file
        path = self._where / FILE
        if self._where.exists() and not self._where.is_dir():
            raise ValueError(f"{shown(self._where)} is a file: a gallery is a folder. Give the folder, or another.")
        if self._may_start:
            _make_file(path)
        if not path.exists():
            raise nothing_there(self._where)
        _only_for_owner(path)
        with self._explained():
            # "rw" and not "rwc": SQLite would create a missing file for everybody to read.
            uri = f"file:{urllib.parse.quote(os.fsencode(path.absolute()))}?mode=rw"
            self._db = sqlite3.connect(
                uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self.origin = self._start(origin)
                check_origin(self._where, self.origin, origin)
                _only_for_owner(path)
                self._purge(opening=True)
        except BaseException:
            self._db.close()
            raise

    def _start(self, origin: Origin | None) -> Origin:
        # Whose database it is comes first: nothing may change in another program's.
        if new := not self._is_ours():
            if not self._may_start:
                raise nothing_there(self._where)
            # A page holds several templates of up to 512 numbers; SQLite's 4096 bytes hold one.
            self._db.execute("PRAGMA page_size=8192")
        self._db.execute("PRAGMA secure_delete=ON")
        self._db.execute("PRAGMA foreign_keys=ON")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA temp_store=MEMORY")  # VACUUM's copy of everybody must not go to /tmp
        self._db.execute("PRAGMA cache_size=-65536")  # KiB; SQLite's 2 MiB make large enrolments crawl
        mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise OSError(f"the file system of {self._where} cannot hold a gallery (no WAL): use a local disk.")
        if new:
            with self._transaction():
                if not self._is_ours():  # nor has another process made it one meanwhile
                    assert origin is not None
                    for statement in TABLES.split(";"):
                        self._db.execute(statement)
                    facts = {**dataclasses.asdict(origin), "schema": SCHEMA, "removals": 0, "purged": 0}
                    self._db.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())
                    self._db.execute(f"PRAGMA application_id={APPLICATION}")
        there = self._stored_origin()
        if self._may_start and origin is not None and there != origin:
            with self._transaction():
                self._take_over_if_empty(origin)
                there = self._stored_origin()
        return there

    def _stored_origin(self) -> Origin:
        there = dict(self._db.execute("SELECT key, value FROM meta").fetchall())
        return Origin(checkpoint=there["checkpoint"], aligner=there["aligner"], dim=there["dim"])

    def _take_over_if_empty(self, origin: Origin) -> None:
        """In a transaction: a gallery without people holds nothing of its origin, and may have another."""
        if self._db.execute("SELECT 1 FROM people LIMIT 1").fetchone() is None:
            facts = dataclasses.asdict(origin).items()
            self._db.executemany("UPDATE meta SET value = ? WHERE key = ?", [(value, key) for key, value in facts])

    def _check_origin(self) -> None:
        """In a transaction: another process may have taken over the gallery while it was empty, and enrolled people."""
        check_origin(self._where, self._stored_origin(), self.origin)

    def _is_ours(self) -> bool:
        """False for a database with nothing in it: what a kill during the first enrolment leaves."""
        # In this order: another process may put down both in between.
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        if application == 0 and tables == 0:
            return False
        if application != APPLICATION:
            raise ValueError(
                f"{shown(self._where / FILE)} is another program's database, and not a gallery: nothing was changed in it. "
                "Give another folder."
            )
        schema = self._db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone()[0]
        if schema != SCHEMA:
            raise ValueError(
                f"{shown(self._where)} has schema {schema}, and this version of faceembed reads {SCHEMA}: use the version "
                "that wrote it, or export it there and import it here."
            )
        return True

    # Transactions and errors ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Holds the lock, and gives SQLite's errors the words and the types that callers know."""
        try:
            with self._lock:
                if self._closed:
                    raise closed(self._where)
                yield
        except sqlite3.DatabaseError as error:
            file, code = shown(self._where / FILE), getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise ValueError(
                    f"{file} is damaged, or no gallery ({error}). It was left as it is: restore it from a backup, or "
                    "give another folder."
                ) from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise TimeoutError(
                    f"another process has been writing {file} for {BUSY_SECONDS:.0f} s: wait for it, or stop it."
                ) from error
            if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
                raise PermissionError(
                    f"{file} cannot be opened for writing ({error}), which reading needs too: check who owns the folder."
                ) from error
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                raise OSError(f"{file} cannot be read or written ({error}): nothing was changed in it.") from error
            raise

    @contextlib.contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        # IMMEDIATE: whoever reads in order to write must keep others from writing in between.
        with self._explained():
            self._db.execute(f"BEGIN {kind}")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        """One state of the file for several reads; the lock is held."""
        with contextlib.nullcontext() if self._db.in_transaction else self._transaction("DEFERRED"):
            yield

    def _version(self) -> int:
        return self._db.execute("PRAGMA data_version").fetchone()[0]

    def _ids(self, names: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for some in _chunks(names):
            marks = ", ".join("?" * len(some))
            found |= self._db.execute(f"SELECT name, id FROM people WHERE name IN ({marks})", some).fetchall()
        return found

    # Reading ----------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        with self._explained():
            return self._db.execute("SELECT count(*) FROM people").fetchone()[0]

    def names(self) -> list[str]:
        """See `Store.names`."""
        with self._explained():
            return [name for (name,) in self._db.execute("SELECT name FROM people ORDER BY name").fetchall()]

    def get(self, name: str) -> Entry:
        """See `Store.get`."""
        name = checked_name(name)
        with self._explained():
            found = list(self._read("WHERE people.name = ?", [name]))
            if not found:
                raise not_there([name], self.names())
        return found[0]

    def entries(self) -> Iterator[Entry]:
        """See `Store.entries`."""
        return self._read("", [])

    def template_counts(self) -> list[int]:
        """See `Store.template_counts`."""
        with self._explained():
            state = (self._version(), self._db.total_changes)
            if self._counts is None or self._counts[0] != state:  # a scan of all templates: not for each search
                found = self._db.execute(
                    "SELECT DISTINCT n FROM (SELECT count(*) AS n FROM templates GROUP BY person) ORDER BY n"
                )
                self._counts = state, [count for (count,) in found.fetchall()]
            return self._counts[1]

    def _read(self, where: str, values: Sequence[object]) -> Iterator[Entry]:
        # Everything is fetched at once: a cursor that stays open would keep removed people's bytes in the log.
        with self._explained(), self._snapshot():
            rows = self._db.execute(
                "SELECT name, enrolled, photo, quality, vector FROM people JOIN templates ON templates.person = people.id "
                f"{where} ORDER BY people.name, templates.id",
                values,
            ).fetchall()
            if rows:
                self._check_origin()
        return self._entries(rows)

    def _entries(self, rows: list[tuple[str, str, str, float, bytes]]) -> Iterator[Entry]:
        start = 0
        for end in range(1, len(rows) + 1):
            if end < len(rows) and rows[end][0] == rows[start][0]:
                continue
            name, enrolled = rows[start][:2]
            templates = tuple(
                Template(photo=photo, quality=quality, vector=self._vectors([vector], name)[0])
                for _, _, photo, quality, vector in rows[start:end]
            )
            yield Entry(name=name, templates=templates, enrolled=enrolled)
            start = end

    def _vectors(self, blobs: Sequence[bytes], whose: str) -> np.ndarray:
        if any(len(blob) != 4 * self.origin.dim for blob in blobs):
            raise ValueError(f"{shown(self._where / FILE)} is damaged: {whose} has templates of another length.")
        vectors = np.frombuffer(b"".join(blobs), "<f4").astype(np.float32, copy=False).reshape(-1, self.origin.dim)
        if not np.isfinite(vectors).all():
            raise ValueError(f"{shown(self._where / FILE)} is damaged: {whose} has templates with NaN or infinity.")
        return vectors

    # Writing ----------------------------------------------------------------------------------------------------------

    def write(self, entries: Sequence[Entry], *, if_there: IfThere = "error") -> None:
        """See `Store.write`."""
        check_entries(entries, if_there, self.origin.dim)
        with self._explained():
            with self._transaction():
                if self._may_start and self._stored_origin() != self.origin:
                    self._take_over_if_empty(self.origin)  # as another process has, which enrolled nobody so far
                self._check_origin()
                known = self._ids([entry.name for entry in entries])
                if known and if_there == "error":
                    raise already_there(sorted(known))
                if known and if_there == "replace":
                    self._delete(known)
                    known = {}
                pooled = self._insert(entries, known)
            self._follow(pooled)
            self._purge()

    def _insert(self, entries: Sequence[Entry], known: dict[str, int]) -> dict[str, np.ndarray | None]:
        """Puts people down, and further templates of those who are known; what each of them pools to now."""
        first = self._db.execute("SELECT coalesce(max(id), 0) + 1 FROM people").fetchone()[0]
        new = [entry for entry in entries if entry.name not in known]
        ids = known | {entry.name: first + i for i, entry in enumerate(new)}
        pooled: dict[str, np.ndarray | None] = {}
        for entry in entries:
            if entry.name in known:
                (old,) = self._read("WHERE people.id = ?", [ids[entry.name]])
                pooled[entry.name] = pool(old.templates + entry.templates)
            else:
                pooled[entry.name] = entry.pooled
        self._db.executemany(
            "INSERT INTO people VALUES (?, ?, ?, ?)",
            ((ids[entry.name], entry.name, entry.enrolled, _bytes(entry.pooled)) for entry in new),
        )
        self._db.executemany(
            "UPDATE people SET pooled = ? WHERE id = ?", ((_bytes(pooled[name]), id) for name, id in known.items())
        )
        self._db.executemany(
            "INSERT INTO templates (person, photo, quality, vector) VALUES (?, ?, ?, ?)",
            (
                (ids[entry.name], template.photo, template.quality, _bytes(template.vector))
                for entry in entries
                for template in entry.templates
            ),
        )
        return pooled

    def remove(self, names: Sequence[str]) -> None:
        """See `Store.remove`."""
        names = check_names(names)
        with self._explained():
            with self._transaction():
                known = self._ids(names)
                if missing := [name for name in names if name not in known]:
                    raise not_there(missing, self.names())
                self._delete(known)
            self._follow(dict.fromkeys(names))
            self._purge()

    def rename(self, old: str, new: str) -> None:
        """See `Store.rename`."""
        old, new = checked_name(old), checked_name(new)
        with self._explained():
            with self._transaction():
                known = self._ids([old, new])
                if old not in known:
                    raise not_there([old], self.names())
                if old == new:
                    return
                if new in known:
                    raise name_taken(new)
                self._db.execute("UPDATE people SET name = ? WHERE id = ?", [new, known[old]])
                (pooled,) = self._db.execute("SELECT pooled FROM people WHERE id = ?", [known[old]]).fetchone()
                self._mark()
            self._follow({old: None, new: self._vectors([pooled], new)[0]})
            self._purge()

    def _delete(self, known: dict[str, int]) -> None:
        self._db.executemany("DELETE FROM people WHERE id = ?", [(id,) for id in known.values()])
        if known:
            self._mark()

    # Erasing ----------------------------------------------------------------------------------------------------------

    def _mark(self) -> None:
        """Writes down, in the transaction that removes something, that its bytes are still to be erased."""
        self._db.execute("UPDATE meta SET value = value + 1 WHERE key = 'removals'")

    def _purge(self, *, opening: bool = False) -> None:
        """Erases the bytes of what was removed, if anything was.

        secure_delete zeroes what a deletion frees, but not the copies that SQLite leaves behind when it moves rows
        between pages: only a file written anew is free of them. The log still holds the old pages: it is emptied last.
        """
        facts = dict(self._db.execute("SELECT key, value FROM meta WHERE key IN ('removals', 'purged')").fetchall())
        if facts["purged"] >= facts["removals"]:
            return
        try:
            if opening:
                self._wait_at_most(OPENING_SECONDS)
            self._db.execute("VACUUM")
            if not opening:
                self._wait_at_most(PURGE_SECONDS)
            busy = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            why = "another process is reading it"
            if not busy:
                # Not simply "done": another process may have removed somebody since. Without the mark, all that
                # happens is that the next process erases once more.
                with contextlib.suppress(sqlite3.OperationalError):
                    self._db.execute("UPDATE meta SET value = max(value, ?) WHERE key = 'purged'", [facts["removals"]])
        except sqlite3.OperationalError as error:  # the removal itself stands
            if opening and getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                return  # who is writing now erases when it is done
            busy, why = True, str(error)
        finally:
            self._wait_at_most(BUSY_SECONDS)
        if busy:
            warnings.warn(
                f"what was removed from {shown(self._where)} cannot be found any more, but its bytes are still in {FILE} "
                f"or {FILE}-wal ({why}). The next write erases them, and so does opening the gallery.",
                UserWarning,
                stacklevel=4 if opening else 3,
            )

    def _wait_at_most(self, seconds: float) -> None:
        self._db.execute(f"PRAGMA busy_timeout={int(1000 * seconds)}")

    # Searching --------------------------------------------------------------------------------------------------------

    def search(self, probes: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """See `Store.search`."""
        from faceembed.identification import search

        probes = check_probes(probes, k, self.origin.dim)
        # The lock is held throughout: a write may reuse the matrix's memory.
        with self._explained():
            if self._index is None or self._index.version != self._version():
                self._index = None  # its memory goes before the next one's comes
                self._index = self._load()
            index, self._index = self._index, None  # an error in between must not leave half of the changes
            self._catch_up(index)
            self._index = index
            k = min(k, len(index.row_of))
            if not len(probes) or not k:
                return [[] for _ in probes], np.zeros((len(probes), k), np.float32)
            rows, distances = search.nearest(index.matrix, probes, k)
            return [[str(index.rows[row]) for row in of_probe] for of_probe in rows], distances

    def _load(self) -> _Index:
        from faceembed.identification import search

        with self._transaction("DEFERRED"):  # one state of the file for both
            version = self._version()
            people = self._db.execute("SELECT name, pooled FROM people ORDER BY id").fetchall()
            if people:
                self._check_origin()
        names: list[str | None] = [name for name, _ in people]
        vectors = self._vectors([pooled for _, pooled in people], "somebody")
        return _Index(
            version=version,
            rows=names,
            row_of={name: row for row, (name, _) in enumerate(people)},
            free=[],
            matrix=search.place(vectors) if people else None,
        )

    def _follow(self, changes: dict[str, np.ndarray | None]) -> None:
        """Notes what this store has just written: name → what the person pools to now, or None for who is gone."""
        if self._index is not None:
            self._index.changes |= changes

    def _catch_up(self, index: _Index) -> None:
        """Brings the matrix to what this store wrote since it was made."""
        from faceembed.identification import search

        gone = [name for name, vector in index.changes.items() if vector is None and name in index.row_of]
        kept = {name: vector for name, vector in index.changes.items() if vector is not None}
        index.changes = {}
        if gone:
            freed = [index.row_of.pop(name) for name in gone]
            for row in freed:
                index.rows[row] = None
            index.free += freed
            index.matrix = search.write(index.matrix, np.array(freed), None)
        if kept:
            for name in [name for name in kept if name not in index.row_of]:
                if not index.free:
                    index.free.append(len(index.rows))
                    index.rows.append(None)
                index.row_of[name] = row = index.free.pop()
                index.rows[row] = name
            rows, vectors = np.array([index.row_of[name] for name in kept]), np.stack(list(kept.values()))
            if index.matrix is None:
                index.matrix = search.place(vectors)  # nobody was there: these are rows 0 to n - 1
            else:
                index.matrix = search.write(index.matrix, rows, vectors)

    def close(self) -> None:
        """See `Store.close`."""
        with self._lock:
            self._closed = True
            self._index = None
            self._db.close()


def _bytes(vector: np.ndarray | None) -> bytes:
    assert vector is not None
    return vector.astype("<f4", copy=False).tobytes()


def _make_file(path: Path) -> None:
    """An empty file for its owner alone, whatever the umask, unless there is one."""
    make_folders(path.parent)
    # Closing a file drops all locks that the process has on it: no other thread may have opened it by then.
    with _MAKING, contextlib.suppress(FileExistsError):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(file, 0o600)
        os.close(file)


_MAKING = threading.Lock()


def make_folders(folder: Path) -> None:
    """A folder and what is missing above it, for their owner alone, whatever the umask; others keep their modes."""
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        with contextlib.suppress(FileExistsError):  # another process was faster
            missing.mkdir(0o700)
            missing.chmod(0o700)


def _only_for_owner(path: Path) -> None:
    # A file that was copied here is as readable as its copy was made. SQLite gives -wal and -shm the mode of the file.
    for name in (path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            if stat.S_IMODE(name.stat().st_mode) & 0o077:
                name.chmod(0o600)


# --------------------------------------------------------------------------------------------------------------------
# Export and import
# --------------------------------------------------------------------------------------------------------------------


def export_npz(store: Store, path: str | os.PathLike[str]) -> int:
    """Writes a whole gallery as one .npz, atomically and for its owner alone.

    Its arrays, n people with t templates among them: `names` [n], `enrolled` [n], `owner` [t] (row of `names`,
    ascending), `vectors` [t, d] float32, `qualities` [t] float64, `photos` [t], `origin` (JSON) and `format`.
    No pickles: `np.load(path)` reads it anywhere.

    A process that is killed in the middle leaves nothing behind where the file system has files without a name (ext4,
    XFS, Btrfs, tmpfs). Elsewhere, such as on NFS, it leaves everybody's templates in a hidden file ".NAME.*.tmp" beside
    `path`, until the next export of that NAME removes it.

    Returns:
      How many people are in it.

    Raises:
      OSError: the file cannot be written; an old one stands.
    """
    entries = list(store.entries())
    templates = [template for entry in entries for template in entry.templates]
    arrays = {
        "format": np.array(EXPORT),
        "origin": np.array(json.dumps(dataclasses.asdict(store.origin))),
        "names": np.array([entry.name for entry in entries], np.str_),
        "enrolled": np.array([entry.enrolled for entry in entries], np.str_),
        "owner": np.repeat(np.arange(len(entries)), [len(entry.templates) for entry in entries]).astype(np.int64),
        "photos": np.array([template.photo for template in templates], np.str_),
        "qualities": np.array([template.quality for template in templates], np.float64),
        "vectors": np.array([template.vector for template in templates], np.float32).reshape(-1, store.origin.dim),
    }
    path = Path(path)
    try:
        make_folders(path.parent)
        _remove_stale(path)
        _save(path, arrays)
    except OSError as error:  # whose own words name the temporary file, or none
        raise type(error)(
            f"{shown(path)} cannot be written ({error.strerror or error}): give a file in a folder that you may write "
            "to and that has space. If there was one of that name, it is as it was."
        ) from error
    return len(entries)


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    nameless = True
    try:
        handle = os.open(path.parent, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:  # not every file system has such files
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        nameless = False
    try:
        with open(handle, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # tells `_remove_stale` that somebody is at work
            os.fchmod(file.fileno(), 0o600)
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
            if nameless:  # a link cannot take the place of an old file: it takes two steps
                # With a directory's handle given, Python follows the link in /proc to the file itself.
                os.link(f"/proc/self/fd/{handle}", temporary, src_dir_fd=handle)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # there only after a failure


def _remove_stale(path: Path) -> None:
    """Exports of that name that were killed; those of processes that are still at it stay."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another user's, or a running export's: it is locked
            if old.is_file():
                with open(old, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    old.unlink()


def import_npz(path: str | os.PathLike[str]) -> tuple[Origin, list[Entry]]:
    """Reads what `export_npz` wrote, bit for bit.

    Returns:
      (origin, entries) for `open_store(where, origin, create=True).write(entries)`.

    Raises:
      ValueError: the file is damaged, or no such export.
      OSError: it cannot be read.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"there is no file {shown(path)}: give one that python launch.py gallery export FILE.npz has written."
        ) from error
    except OSError as error:
        raise type(error)(
            f"{shown(path)} cannot be read ({error.strerror}): give a file that gallery export has written, and that you "
            "may read."
        ) from error
    with file:
        # A damaged zip of damaged arrays fails in a dozen ways, from zlib.error to a SyntaxError in an array's header.
        try:
            if not zipfile.is_zipfile(file):  # NumPy would take it for a pickle, and say how to load it unsafely
                raise ValueError("it is no .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                if str(arrays["format"]) != EXPORT:
                    raise ValueError(f"its format is {str(arrays['format'])!r}, not {EXPORT!r}")
                origin = Origin(**json.loads(str(arrays["origin"])))
                return origin, list(_imported(origin, arrays))
        except Exception as error:
            why = "it holds pickled objects, which no export does" if "allow_pickle" in str(error) else error
            raise ValueError(
                f"{shown(path)} is damaged, or no export of a gallery ({why}). Export the gallery once more."
            ) from error


def _imported(origin: Origin, arrays: Any) -> Iterable[Entry]:
    names, enrolled, owner = arrays["names"], arrays["enrolled"], arrays["owner"]
    vectors, qualities, photos = arrays["vectors"], arrays["qualities"], arrays["photos"]
    if vectors.dtype != np.float32 or vectors.shape != (len(owner), origin.dim):
        raise ValueError(f"vectors are {vectors.dtype}{list(vectors.shape)}")
    if not len(names) == len(enrolled) == len(set(names.tolist())) or not len(owner) == len(qualities) == len(photos):
        raise ValueError("its arrays do not belong together")
    ends = np.searchsorted(owner, np.arange(len(names) + 1))
    if not np.array_equal(np.repeat(np.arange(len(names)), np.diff(ends)), owner):
        raise ValueError("templates are of people who are not there")
    for row, name in enumerate(names):
        templates = tuple(
            Template(photo=str(photos[i]), quality=float(qualities[i]), vector=vectors[i])
            for i in range(ends[row], ends[row + 1])
        )
        yield Entry(name=str(name), templates=templates, enrolled=str(enrolled[row]))

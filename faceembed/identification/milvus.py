"""A gallery on Milvus: for many machines that share one, or for more people than one machine's memory holds.

    milvus:http://host:19530         a server; a database of it: http://host:19530/DATABASE
    milvus:people.db                 Milvus Lite: a folder on this machine, for one process at a time

A server that asks who is there gets the environment variable MILVUS_TOKEN ("user:password" or a token).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from faceembed.identification.store import (
    Entry,
    IfThere,
    Origin,
    Template,
    already_there,
    check_entries,
    check_names,
    check_origin,
    check_probes,
    checked_name,
    closed,
    make_folders,
    name_taken,
    not_there,
    nothing_there,
    shown,
)

__all__ = ["MilvusStore"]

COLLECTION = "faceembed_gallery"
PROPERTY = "faceembed.origin"
SCHEMA = 2  # 1 had a field `revision` too
ROWS = 1000  # a request; servers refuse those of more than some 64 MB
MOST = 16384  # candidates and probes that a server gives and takes in one search
TEMPLATES_BYTES = 65535  # what a text field holds
TIMEOUT = 10.0  # seconds to reach a server
# Milvus Lite lacks some of a server's calls: it logs a stack trace for each, and its client goes on without. A gallery
# that another process holds gets one too. Whatever does fail is raised, and told in our words.
LOGS = ("grpc._server", "milvus_lite.server_manager", "pymilvus.client.iterator.query_iterator")


class MilvusStore:
    """A gallery in one collection of Milvus, a row a person; the interface of `store.Store`.

    The search is exact here too (index FLAT, squared Euclidean distances), and reads see all writes that were finished
    before them (consistency level "Strong").

    What differs from a gallery in a folder:

    - A person is written as a whole, but a batch is not: when a write of many people fails or is killed, some are there
      and others are not. Write them again with `if_there="replace"`. Renaming writes the new name and then removes the
      old one; a kill in between leaves the person under both.
    - Two processes that write one person at once: the last one wins, and templates that the other has added meanwhile
      are lost. "error" does not see a person whom another process enrols at the same moment either.
    - What is removed is not found from then on, but its bytes stay in the server's files until it compacts them; when
      that is depends on the server. Milvus Lite keeps them in its log as well.
    - A person's templates take 64 KB at most: some 80 of 128 numbers, 20 of 512.
    - `entries` reads page by page: people who are written meanwhile may be among them or not.
    - At most 16,384 candidates a probe.
    - An empty gallery that is given another origin is made anew. That looks first and acts then: where two processes
      start one gallery with two checkpoints, whoever is enrolled by the one in the very moment in which the other makes
      it anew is lost, or mixed in.
    """

    erases = False

    def __init__(self, uri: str, origin: Origin | None, *, create: bool = False) -> None:
        """Opens a gallery; use `store.open_store`, which says what is raised."""
        try:
            import pymilvus
        except ImportError as error:
            raise ImportError(
                "a gallery on Milvus needs pymilvus: pip install 'faceembed[milvus]', in a checkout "
                "pip install -e '.[milvus]'."
            ) from error
        self._where = f"milvus:{uri}"
        self._lite = "://" not in uri
        self._lock = threading.RLock()
        self._closed = False
        self._may_start = create and origin is not None
        self._milvus = pymilvus
        if "://" not in uri:
            _prepare_folder(self._where, Path(uri), self._may_start)
        try:
            with _quiet():
                self._client = pymilvus.MilvusClient(uri, token=os.environ.get("MILVUS_TOKEN", ""), timeout=TIMEOUT)
        except pymilvus.MilvusException as error:
            if "://" in uri:
                raise ConnectionError(f"no Milvus answers at {shown(uri)} ({error.message}): is it running?") from error
            raise TimeoutError(
                f"{shown(uri)} cannot be opened ({error.message}). Milvus Lite serves one process at a time: close the "
                "other, or run a Milvus server for several."
            ) from error
        try:
            with self._explained():
                if not self._client.has_collection(COLLECTION):
                    if not create or origin is None:
                        raise nothing_there(self._where)
                    self._create(origin)
                self.origin = self._read_origin()
                if self._may_start and origin is not None and self.origin != origin:
                    self._take_over_if_empty(origin)
                    self.origin = self._read_origin()
                check_origin(self._where, self.origin, origin)
                self._client.load_collection(COLLECTION)
        except BaseException:
            self._client.close()
            raise

    def _create(self, origin: Origin) -> None:
        types = self._milvus.DataType
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        # Names would have to be quoted in Milvus' expressions; a hash of them need not be.
        schema.add_field("key", types.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("name", types.VARCHAR, max_length=800)  # bytes: 200 characters of up to four
        schema.add_field("pooled", types.FLOAT_VECTOR, dim=origin.dim)
        schema.add_field("templates", types.VARCHAR, max_length=TEMPLATES_BYTES)
        schema.add_field("photos", types.INT64)  # templates of this person
        schema.add_field("enrolled", types.VARCHAR, max_length=40)
        index = self._client.prepare_index_params()
        index.add_index("pooled", index_type="FLAT", metric_type="L2")
        self._client.create_collection(
            COLLECTION,
            schema=schema,
            index_params=index,
            consistency_level="Strong",
            properties={PROPERTY: json.dumps({"schema": SCHEMA, **dataclasses.asdict(origin)})},
        )

    def _take_over_if_empty(self, origin: Origin) -> None:
        """A gallery without people holds nothing of its origin, and may have another."""
        self._client.load_collection(COLLECTION)
        if not len(self):
            self._client.drop_collection(COLLECTION)
            self._create(origin)
            self._client.load_collection(COLLECTION)

    def _check_origin(self) -> None:
        """Another process may have taken over the gallery while it was empty, and enrolled people."""
        check_origin(self._where, self._read_origin(), self.origin)

    def _read_origin(self) -> Origin:
        stored = self._client.describe_collection(COLLECTION).get("properties", {}).get(PROPERTY)
        try:
            facts = json.loads(stored)
            schema = facts.pop("schema")
            if schema == SCHEMA:
                return Origin(**facts)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{shown(self._where)} has a collection {COLLECTION} that is no gallery of faceembed: nothing was changed "
                "in it. Give another database."
            ) from error
        raise ValueError(
            f"{self._where} has schema {schema}, and this version of faceembed reads {SCHEMA}: use the version that "
            "wrote it, or export it there and import it here."
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Holds the lock, and gives Milvus' errors a type that callers know."""
        try:
            with self._lock, _quiet():
                if self._closed:
                    raise closed(self._where)
                yield
        except self._milvus.MilvusException as error:
            raise OSError(
                f"{self._where} failed: {error.message}. Is the server running, and its disk full?"
            ) from error

    # Reading ----------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many people are enrolled."""
        with self._explained():
            return int(self._client.query(COLLECTION, filter="", output_fields=["count(*)"])[0]["count(*)"])

    def names(self) -> list[str]:
        """See `Store.names`."""
        return sorted(row["name"] for row in self._all(["name"]))

    def get(self, name: str) -> Entry:
        """See `Store.get`."""
        name = checked_name(name)
        if not (found := self._some([name])):
            raise not_there([name], self.names())
        return self._entry(found[name])

    def entries(self) -> Iterator[Entry]:
        """See `Store.entries`."""
        rows = self._all(["name", "templates", "enrolled"])
        return map(self._entry, sorted(rows, key=lambda row: row["name"]))

    def template_counts(self) -> list[int]:
        """See `Store.template_counts`; from ten on they are told as ten."""
        wanted = {n: f"photos == {n}" for n in range(1, 10)} | {10: "photos >= 10"}
        with self._explained():
            return [
                n
                for n, condition in wanted.items()
                if self._client.query(COLLECTION, filter=condition, output_fields=["count(*)"])[0]["count(*)"]
            ]

    def _all(self, fields: list[str]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with self._explained():
            pages = self._client.query_iterator(COLLECTION, batch_size=ROWS, output_fields=fields)
            while page := pages.next():
                rows += page
            pages.close()
            if rows:
                self._check_origin()
        return rows

    def _some(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The rows of those names that are there."""
        found: dict[str, dict[str, Any]] = {}
        for some in _pages(names):
            with self._explained():
                rows = self._client.get(
                    COLLECTION,
                    ids=[_key(name) for name in some],
                    output_fields=["name", "templates", "enrolled"],
                )
            found |= {row["name"]: row for row in rows}
        return found

    def _entry(self, row: dict[str, Any]) -> Entry:
        try:
            templates = tuple(
                Template(
                    photo=photo,
                    quality=quality,
                    vector=np.frombuffer(base64.b64decode(vector, validate=True), "<f4").astype(np.float32, copy=False),
                )
                for photo, quality, vector in json.loads(row["templates"])
            )
            return Entry(name=row["name"], templates=templates, enrolled=row["enrolled"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self._where} is damaged: {row['name']} cannot be read ({error}).") from error

    # Writing ----------------------------------------------------------------------------------------------------------

    def write(self, entries: Sequence[Entry], *, if_there: IfThere = "error") -> None:
        """See `Store.write`; a batch is not all or none here."""
        check_entries(entries, if_there, self.origin.dim)
        with self._explained():
            if self._may_start and self._read_origin() != self.origin:
                self._take_over_if_empty(self.origin)  # as another process has, which enrolled nobody so far
            self._check_origin()
            known = self._some([entry.name for entry in entries])
            if known and if_there == "error":
                raise already_there(sorted(known))
            rows = []
            for entry in entries:
                if entry.name in known and if_there == "add":
                    old = self._entry(known[entry.name])
                    entry = dataclasses.replace(old, templates=old.templates + entry.templates)
                rows.append(_row(entry))
            # Not insert: where two enrol one person at once, it would leave two rows of one key.
            for some in _pages(rows):
                self._client.upsert(COLLECTION, list(some))
            self._settle()

    def _settle(self) -> None:
        """Milvus Lite searches what it has not flushed row by row: seconds for 100,000 people instead of a tenth of one.
        A server flushes by itself, and refuses to be told too often."""
        if self._lite:
            self._client.flush(COLLECTION)

    def remove(self, names: Sequence[str]) -> None:
        """See `Store.remove`; the bytes go when the server compacts."""
        names = check_names(names)
        with self._explained():
            known = self._some(names)
            if missing := [name for name in names if name not in known]:
                raise not_there(missing, self.names())
            for some in _pages(names):
                self._client.delete(COLLECTION, ids=[_key(name) for name in some])
            self._settle()

    def rename(self, old: str, new: str) -> None:
        """See `Store.rename`."""
        old, new = checked_name(old), checked_name(new)
        with self._explained():
            known = self._some([old, new])
            if old not in known:
                raise not_there([old], self.names())
            if old == new:
                return
            if new in known:
                raise name_taken(new)
            entry = dataclasses.replace(self._entry(known[old]), name=new)
            self._client.upsert(COLLECTION, [_row(entry)])
            self._client.delete(COLLECTION, ids=[_key(old)])
            self._settle()

    # Searching --------------------------------------------------------------------------------------------------------

    def search(self, probes: np.ndarray, k: int) -> tuple[list[list[str]], np.ndarray]:
        """See `Store.search`."""
        probes = check_probes(probes, k, self.origin.dim)
        if (k := min(k, len(self))) > MOST:
            raise ValueError(f"k is {k:,}: a Milvus server gives at most {MOST:,} candidates a probe.")
        if not len(probes) or not k:
            return [[] for _ in probes], np.zeros((len(probes), k), np.float32)
        with self._explained():
            self._check_origin()
        found: list[Any] = []
        for some in _pages(probes):
            with self._explained():
                found += self._client.search(
                    COLLECTION,
                    data=list(some),
                    anns_field="pooled",
                    limit=k,
                    output_fields=["name"],
                )
        # Somebody may have been removed since they were counted.
        k = min(len(hits) for hits in found)
        names = [[hit["entity"]["name"] for hit in hits[:k]] for hits in found]
        distances = np.array([[hit["distance"] for hit in hits[:k]] for hits in found], np.float32)
        return names, distances.reshape(len(found), k)

    def close(self) -> None:
        """See `Store.close`."""
        with self._lock:
            self._closed = True
            self._client.close()


def _row(entry: Entry) -> dict[str, Any]:
    templates = json.dumps(
        [
            [template.photo, template.quality, base64.b64encode(template.vector.astype("<f4").tobytes()).decode()]
            for template in entry.templates
        ]
    )
    if len(templates) > TEMPLATES_BYTES:
        raise ValueError(
            f"{entry.name} has {len(entry.templates)} templates of {len(entry.pooled)} numbers, which is more than the "
            f"{TEMPLATES_BYTES:,} bytes that Milvus keeps of a person: enrol fewer photos, or keep the gallery in a folder."
        )
    return {
        "key": _key(entry.name),
        "name": entry.name,
        "pooled": entry.pooled,
        "templates": templates,
        "photos": len(entry.templates),
        "enrolled": entry.enrolled,
    }


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _pages(items: Any) -> Iterable[Any]:
    return (items[start : start + ROWS] for start in range(0, len(items), ROWS))


def _prepare_folder(where: str, path: Path, create: bool) -> None:
    """Milvus Lite makes its folder for everybody to read, and makes one where none is asked for."""
    if path.suffix != ".db":
        raise ValueError(f"{where}: Milvus Lite keeps a gallery in a folder whose name ends in .db: give {where}.db.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{where} is a file: a gallery of Milvus Lite is a folder. Give another name.")
    if not path.exists():
        if not create:
            raise nothing_there(where)
        make_folders(path)
    with contextlib.suppress(PermissionError):
        path.chmod(0o700)  # whatever the umask, and for a folder that was copied here


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # A filter, and not a level that is put back: several threads may be in here at once, in any order.
    nothing = _Nothing()
    for name in LOGS:
        logging.getLogger(name).addFilter(nothing)
    try:
        yield
    finally:
        for name in LOGS:
            logging.getLogger(name).removeFilter(nothing)


class _Nothing(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return False

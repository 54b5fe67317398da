"""`launch.py gallery list|delete|rename|export|import`: the people of a gallery, without a checkpoint."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from faceembed.cli.enroll import notes_for_warnings

if TYPE_CHECKING:
    from faceembed.identification.store import Origin, Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """Who is enrolled, from how many photos, when, and what made the templates."""

    gallery: str
    """A folder, or milvus:URI."""
    json: Path | None = None
    """Write the list there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delete:
    """Removes people, and every byte that was kept of them; on Milvus the bytes go when the server compacts its files."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Whom; all of them or, where one is not there, nobody."""
    gallery: str
    """A folder, or milvus:URI."""
    json: Path | None = None
    """Write what was done there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rename:
    """Gives a person another name."""

    old: Annotated[str, tyro.conf.Positional]
    """The name now."""
    new: Annotated[str, tyro.conf.Positional]
    """The name from now on."""
    gallery: str
    """A folder, or milvus:URI."""
    json: Path | None = None
    """Write what was done there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes everybody into one .npz that only you can read: biometric data, to be kept as such."""

    file: Annotated[Path, tyro.conf.Positional]
    """The .npz file to write."""
    gallery: str
    """A folder, or milvus:URI."""
    json: Path | None = None
    """Write what was done there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Enrols everybody of an export, all of them or none; a gallery is started where there is none."""

    file: Annotated[Path, tyro.conf.Positional]
    """An .npz of `gallery export`."""
    gallery: str
    """A folder, or milvus:URI."""
    if_there: Literal["error", "add", "replace"] = "error"
    """What happens to people who are there: an error, the templates are added, or they replace the old ones."""
    json: Path | None = None
    """Write what was done there."""


def run(arguments: list[str]) -> None:
    """See the module."""
    kinds: dict[str, Any] = {"list": List, "delete": Delete, "rename": Rename, "export": Export, "import": Import}
    chosen = tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, prog="launch.py gallery")
    actions: dict[type, Any] = {List: show, Delete: delete, Rename: rename, Export: export, Import: bring}
    actions[type(chosen)](chosen)


@contextlib.contextmanager
def _opened(where: str, origin: "Origin | None" = None) -> "Iterator[tuple[Store, list[str]]]":
    """A gallery, closed in any case; started if an origin is given. And what it warned of so far."""
    from faceembed.identification.store import open_store

    with (
        notes_for_warnings() as notes,
        contextlib.closing(open_store(where, origin, create=origin is not None)) as store,
    ):
        yield store, notes


def _people(n: int) -> str:
    return "1 person" if n == 1 else f"{n:,} people"


def _write_json(file: Path | None, facts: dict[str, Any]) -> None:
    from faceembed import report

    if file:
        report.write_json(file, facts)


def show(options: List) -> None:
    """Prints the list."""
    from faceembed import report
    from faceembed.identification.store import shown

    with _opened(options.gallery) as (store, _):
        entries, origin = list(store.entries()), store.origin
    rows = [
        {"name": e.name, "photos": len(e.templates), "quality": round(e.quality, 2), "enrolled": e.enrolled}
        for e in entries
    ]
    if rows:
        print(report.table([row | {"name": shown(row["name"])} for row in rows]))
    templates = sum(len(e.templates) for e in entries)
    print(
        f"{_people(len(rows))}, {templates:,} template{'' if templates == 1 else 's'} of {origin.dim} numbers, by "
        f"checkpoint {shown(origin.checkpoint[:12])}… ({shown(origin.aligner)})"
    )
    _write_json(options.json, {
        "gallery": options.gallery, "origin": origin,
        "people": [row | {"from": [t.photo for t in e.templates]} for row, e in zip(rows, entries, strict=True)],
    })  # fmt: skip


def delete(options: Delete) -> None:
    """Removes people."""
    from faceembed.identification.store import check_names, shown

    if not options.names:
        raise ValueError("name the people to delete; python launch.py gallery list --gallery DIR lists them.")
    names = check_names(options.names)
    with _opened(options.gallery) as (store, warned):
        store.remove(names)
        left, erased = len(store), store.erases and not warned
        print(f"{', '.join(map(shown, names))}: deleted; {_people(left)} {'is' if left == 1 else 'are'} left")
        if not store.erases:
            print("nobody finds them any more, but their bytes stay in Milvus' files until the server compacts them")
    _write_json(
        options.json,
        {"gallery": options.gallery, "deleted": names, "bytes_erased": erased, "people": left},
    )


def rename(options: Rename) -> None:
    """Renames a person."""
    from faceembed.identification.store import checked_name, shown

    old, new = checked_name(options.old), checked_name(options.new)
    with _opened(options.gallery) as (store, warned):
        store.rename(old, new)
        people, erased = len(store), store.erases and not warned
    print(f"{shown(old)} is {shown(new)} now")
    _write_json(
        options.json,
        {"gallery": options.gallery, "old": old, "new": new, "bytes_erased": erased, "people": people},
    )


def export(options: Export) -> None:
    """Writes an export."""
    from faceembed.identification.store import export_npz, shown

    if options.file.suffix != ".npz":
        try:
            better = f"Try {shown(options.file.with_suffix('.npz'))}."
        except ValueError:  # no name at all, such as "."
            better = "Give FILE.npz."
        raise ValueError(f"{shown(options.file)}: an export is an .npz file. {better}")
    with _opened(options.gallery) as (store, _):
        people = export_npz(store, options.file)
        origin = store.origin
    print(f"{shown(options.file)}: {_people(people)}; readable by you alone")
    _write_json(
        options.json, {"gallery": options.gallery, "file": str(options.file), "origin": origin, "people": people}
    )


def bring(options: Import) -> None:
    """Reads an export."""
    from faceembed.identification.store import import_npz, shown

    origin, entries = import_npz(options.file)
    with _opened(options.gallery, origin) as (store, _):
        store.write(entries, if_there=options.if_there)
        total = len(store)
    print(f"{shown(options.gallery)}: {_people(len(entries))} imported; {total:,} in all")
    _write_json(options.json, {
        "gallery": options.gallery, "file": str(options.file), "origin": origin, "if_there": options.if_there,
        "imported": [entry.name for entry in entries], "people": total,
    })  # fmt: skip

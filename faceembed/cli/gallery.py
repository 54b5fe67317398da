"""`launch.py gallery list|delete|rename|export|import`: the people of a gallery, without a checkpoint."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from faceembed.identification.store import Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class List:
    """Who is enrolled, from how many photos, when, and what made the templates."""

    gallery: str
    """A folder, or milvus:URI."""
    json: Path | None = None
    """Write the list there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delete:
    """Removes people, and every byte that was kept of them."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Whom; all of them or, where one is not there, nobody."""
    gallery: str
    """A folder, or milvus:URI."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rename:
    """Gives a person another name."""

    old: Annotated[str, tyro.conf.Positional]
    """The name now."""
    new: Annotated[str, tyro.conf.Positional]
    """The name from now on."""
    gallery: str
    """A folder, or milvus:URI."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Writes everybody into one .npz that only you can read: biometric data, to be kept as such."""

    file: Annotated[Path, tyro.conf.Positional]
    """The .npz file to write."""
    gallery: str
    """A folder, or milvus:URI."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Enrols everybody of an export, all of them or none; a gallery is started where there is none."""

    file: Annotated[Path, tyro.conf.Positional]
    """An .npz of `gallery export`."""
    gallery: str
    """A folder, or milvus:URI."""
    if_there: Literal["error", "add", "replace"] = "error"
    """What happens to people who are there."""


def run(arguments: list[str]) -> None:
    """See the module."""
    kinds: dict[str, Any] = {"list": List, "delete": Delete, "rename": Rename, "export": Export, "import": Import}
    chosen = tyro.extras.subcommand_cli_from_dict(kinds, args=arguments, prog="launch.py gallery")
    actions: dict[type, Any] = {List: show, Delete: delete, Rename: rename, Export: export, Import: bring}
    actions[type(chosen)](chosen)


def _open(where: str) -> "Store":
    from faceembed.identification.store import open_store

    return open_store(where, None)


def show(options: List) -> None:
    """Prints the list."""
    from faceembed import report

    store = _open(options.gallery)
    entries = list(store.entries())
    rows = [
        {"name": e.name, "photos": len(e.templates), "quality": round(e.quality, 2), "enrolled": e.enrolled}
        for e in entries
    ]
    if rows:
        print(report.table(rows))
    origin = store.origin
    print(
        f"{len(rows):,} people, {sum(len(e.templates) for e in entries):,} templates of {origin.dim} numbers, by "
        f"checkpoint {origin.checkpoint[:12]}… ({origin.aligner})"
    )
    if options.json:
        report.write_json(options.json, {
            "gallery": options.gallery, "origin": origin,
            "people": [row | {"from": [t.photo for t in e.templates]} for row, e in zip(rows, entries, strict=True)],
        })  # fmt: skip
    store.close()


def delete(options: Delete) -> None:
    """Removes people."""
    if not options.names:
        raise ValueError("name the people to delete; python launch.py gallery list --gallery DIR lists them.")
    store = _open(options.gallery)
    store.remove(options.names)
    print(f"{', '.join(options.names)}: deleted; {len(store):,} people are left")
    store.close()


def rename(options: Rename) -> None:
    """Renames a person."""
    store = _open(options.gallery)
    store.rename(options.old, options.new)
    print(f"{options.old} is {options.new} now")
    store.close()


def export(options: Export) -> None:
    """Writes an export."""
    from faceembed.identification.store import export_npz

    if options.file.suffix != ".npz":
        raise ValueError(f"{options.file}: an export is an .npz file. Try {options.file.with_suffix('.npz')}.")
    store = _open(options.gallery)
    export_npz(store, options.file)
    print(f"{options.file}: {len(store):,} people; readable by you alone")
    store.close()


def bring(options: Import) -> None:
    """Reads an export."""
    from faceembed.identification.store import import_npz, open_store

    origin, entries = import_npz(options.file)
    store = open_store(options.gallery, origin, create=True)
    store.write(entries, if_there=options.if_there)
    print(f"{options.gallery}: {len(entries):,} people imported; {len(store):,} in all")
    store.close()

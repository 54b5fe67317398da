"""`launch.py enroll CHECKPOINT --gallery DIR PHOTOS…`: people into a gallery, from one photo each or several."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from faceembed.cli.embed import load

GALLERY_HELP = "A folder, made when missing; or milvus:URI (extra milvus)."
FRAMINGS = Literal["detect", "tight", "celeba", "lfw"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Enrols people; nothing is trained. A gallery holds embeddings of one checkpoint only."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run directory (its best step is taken), a step directory, or dlib."""
    photos: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Photos and folders. Without --name each file NAME.jpg is the person NAME, and each folder NAME in a folder given
    holds that person's photos."""
    gallery: str
    """A folder, made when missing; or milvus:URI (extra milvus)."""
    name: str | None = None
    """All photos are of this person."""
    if_there: Literal["error", "add", "replace"] = "error"
    """What happens to a person who is there: an error, the photos are added, or they replace the old ones."""
    face: Literal["only", "largest"] = "only"
    """only: a photo must show one face (those less than half as high are behind it); largest: the largest is taken."""
    framing: FRAMINGS = "detect"
    """Where the face is: it is looked for (extra align); tight crops; or as in aligned CelebA or deep-funneled LFW."""
    json: Path | None = None
    """Write what was enrolled and refused there."""
    progress: bool = True
    """Show progress bars."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py enroll")
    people = people_of(options.photos, options.name)
    from faceembed import report
    from faceembed.identification.gallery import Gallery

    with Gallery(options.gallery, load(options.checkpoint), framing=options.framing) as gallery:
        enrolled, refused = gallery.enroll_people(
            people, if_there=options.if_there, which=options.face, progress=options.progress
        )
        total = len(gallery)
    for name, photo, why in refused:
        print(f"refused: {name}: {photo}: {why}")
    several = sum(len(entry.templates) > 1 for entry in enrolled)
    words = f", {several:,} of them from several photos" if several else ""
    print(f"{options.gallery}: {len(enrolled):,} enrolled{words}; {total:,} people in all")
    for entry in enrolled[:10]:
        print(f"  {entry.name}  ({len(entry.templates)} photo{'s' if len(entry.templates) > 1 else ''}, "
              f"quality {entry.quality:.2f})")  # fmt: skip
    if len(enrolled) > 10:
        print(f"  … and {len(enrolled) - 10:,} more")
    if options.json:
        report.write_json(options.json, {
            "gallery": options.gallery, "people": total,
            "enrolled": [
                {"name": entry.name, "photos": [t.photo for t in entry.templates], "quality": entry.quality}
                for entry in enrolled
            ],
            "refused": [{"name": name, "photo": photo, "why": why} for name, photo, why in refused],
        })  # fmt: skip
    if not enrolled:
        raise ValueError(f"nobody was enrolled: none of {sum(map(len, people.values())):,} photos will do, see above.")


def people_of(photos: tuple[Path, ...], name: str | None) -> dict[str, list[Path]]:
    """Name → photos, by the names of files and folders.

    Raises:
      FileNotFoundError: a path is not there.
      ValueError: there is no photo, or two files give one name.
    """
    from faceembed.identification.faces import photos_in

    if not photos:
        raise ValueError("give photos to enrol, or a folder of them: NAME.jpg a person, or a folder NAME a person.")
    people: dict[str, list[Path]] = {}
    given_by: dict[str, set[Path]] = {}  # name → the files and folders that bear it
    for path in photos:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: give a photo, or a folder of them.")
        inside = list(photos_in(path)) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"there is no photo in {path}: expected files NAME.jpg, or a folder a person.")
        for photo in inside:
            parts = photo.relative_to(path).parts
            bearer = path / parts[0] if len(parts) > 1 else photo
            owner = name if name is not None else parts[0] if len(parts) > 1 else photo.stem
            people.setdefault(owner, []).append(photo)
            given_by.setdefault(owner, set()).add(bearer)
    twice = [owner for owner, bearers in given_by.items() if name is None and len(bearers) > 1]
    if twice:
        first, second = sorted(given_by[twice[0]])[:2]
        raise ValueError(
            f"{first} and {second} give one name, {twice[0]!r}: put a person's photos into one folder of that name, or "
            f"name the person: --name {twice[0]!r}."
        )
    return people

"""`launch.py enroll CHECKPOINT --gallery DIR PHOTOS…`: people into a gallery, from one photo each or several."""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from faceembed.cli.embed import load

if TYPE_CHECKING:
    from faceembed.identification.faces import Listing
    from faceembed.identification.gallery import Gallery
    from faceembed.identification.store import Entry

FRAMINGS = Literal["detect", "tight", "celeba", "lfw"]

SHOWN = 10
"""People, and folders that cannot be read, that are listed on the terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Enrols people; nothing is trained. A gallery holds embeddings of one checkpoint only.

    Ends with exit status 0 when somebody was enrolled, even where photos were refused, and 1 when nobody was."""

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
    check_places(options.gallery, options.json)
    people, listings = people_of(options.photos, options.name)
    from faceembed import report
    from faceembed.identification.gallery import Gallery

    with notes_for_warnings(), Gallery(options.gallery, load(options.checkpoint), framing=options.framing) as gallery:
        before = gallery.names()
        try:
            enrolled, refused = gallery.enroll_people(
                people, if_there=options.if_there, which=options.face, progress=options.progress
            )
        except KeyboardInterrupt:
            if gallery.names() == before:  # and not in the moment after they were written
                print("\nnobody was enrolled: the gallery is as it was.", file=sys.stderr)
            raise
        total = len(gallery)
        notes = notes_on(gallery, enrolled, before)
    left = left_out(listings)
    for line in left:
        print(line)
    for name, photo, why in refused:
        hint = "; crop it, or take the largest: --face largest" if "faces were found" in why else ""
        print(f"refused: {name}: {photo}: {why}{hint}")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    several = sum(len(entry.templates) > 1 for entry in enrolled)
    words = f", {several:,} of them from several photos" if several else ""
    print(f"{options.gallery}: {len(enrolled):,} enrolled{words}; {total:,} {_people(total)} in all")
    for entry in enrolled[:SHOWN]:
        print(f"  {entry.name}  ({len(entry.templates)} photo{'s' if len(entry.templates) > 1 else ''}, "
              f"quality {entry.quality:.2f})")  # fmt: skip
    if len(enrolled) > SHOWN:
        print(f"  … and {len(enrolled) - SHOWN:,} more")
    if options.json:
        report.write_json(options.json, {
            "gallery": options.gallery, "people": total,
            "enrolled": [
                {"name": entry.name, "photos": [t.photo for t in entry.templates], "quality": entry.quality}
                for entry in enrolled
            ],
            "refused": [{"name": name, "photo": photo, "why": why} for name, photo, why in refused],
            "left_out": left, "notes": notes,
        })  # fmt: skip
    if not enrolled:
        count = sum(map(len, people.values()))
        found = "the photo will not do" if count == 1 else f"none of {count:,} photos will do"
        raise ValueError(f"nobody was enrolled: {found}, see above.")


def _people(count: int) -> str:
    return "person" if count == 1 else "people"


def people_of(photos: Sequence[Path], name: str | None) -> tuple[dict[str, list[Path]], list["Listing"]]:
    """(name → photos, by the names of files and folders; what the folders given hold).

    Raises:
      FileNotFoundError: a path is not there.
      ValueError: there is no photo, two files give one name, or a photo lies so deep that it is not told whose it is.
    """
    from faceembed.identification.store import checked_name, shown

    if not photos:
        raise ValueError("give photos to enrol, or a folder of them: NAME.jpg a person, or a folder NAME a person.")
    if name is not None:
        checked_name(name)
    people: dict[str, list[Path]] = {}
    given_by: dict[str, dict[Path, str]] = {}  # name as it is stored → the files and folders that bear it → as spelled
    listings = []
    for path in photos:
        listings.append(listing := listed(path))
        for photo in listing.photos:
            parts = photo.relative_to(path).parts
            if name is None and len(parts) > 2:
                raise ValueError(
                    f"{shown(photo)} lies deeper than {shown(path)}/PERSON/PHOTO: is it of {shown(parts[0])!r} "
                    f"or of {shown(parts[-2])!r}? Give the folder that holds the people's folders, such as "
                    f"{shown(path / parts[0])}; or move the photo up."
                )
            bearer = path / parts[0] if len(parts) > 1 else photo
            owner = name if name is not None else parts[0] if len(parts) > 1 else photo.stem
            people.setdefault(owner, []).append(photo)
            try:
                given_by.setdefault(checked_name(owner), {})[bearer] = owner
            except ValueError:  # refused later, and told
                continue
    twice = [owner for owner, bearers in given_by.items() if name is None and len(bearers) > 1]
    if twice:
        bearers = given_by[twice[0]]
        first, second = sorted(bearers)[:2]
        alike = bearers[first] != bearers[second]  # they would be printed as the same
        places = [ascii(str(path)) if alike else shown(path) for path in (first, second)]
        raise ValueError(
            f"{places[0]} and {places[1]} give one name, {twice[0]!r}: put a person's photos into one folder of that name, "
            f"or name the person: --name {twice[0]!r}. Where they are two people, rename one."
        )
    return people, listings


# ---- shared by the commands of galleries -------------------------------------------------------------------------------


def listed(path: Path) -> "Listing":
    """The photos of a path that was given: itself, or those of a folder.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is a folder without a photo.
    """
    from faceembed.identification.faces import Listing, photos_in
    from faceembed.identification.store import shown

    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no {shown(path)}: give a photo, or a folder of them.")
    if not path.is_dir():
        return Listing(photos=(path,))
    listing = photos_in(path)
    if not listing.photos:
        found = "".join(f" {line[0].upper()}{line[1:]}." for line in left_out([listing]))
        raise ValueError(f"there is no photo in {shown(path)}: expected files such as NAME.jpg or NAME.png.{found}")
    return listing


def left_out(listings: Sequence["Listing"]) -> list[str]:
    """A line for all files of folders that are no photos, and one for each folder that could not be read."""
    from faceembed.identification.store import shown

    others: Counter[str] = sum((listing.others for listing in listings), Counter())
    lines = []
    if total := others.total():
        kinds = ", ".join(shown(suffix) or "no suffix" for suffix in sorted(others))
        what = (
            "1 file that is no photo by its name"
            if total == 1
            else f"{total:,} files that are no photos by their names"
        )
        lines.append(f"left out: {what} ({kinds})")
    unreadable = [row for listing in listings for row in listing.unreadable]
    lines += [f"left out: {shown(path)}: {why}" for path, why in unreadable[:SHOWN]]
    if len(unreadable) > SHOWN:
        lines.append(f"left out: {len(unreadable) - SHOWN:,} more that cannot be read")
    return lines


def check_places(gallery: str, json: Path | None) -> None:
    """Tells what would fail at the end of the work, before it begins.

    Raises:
      ValueError: no gallery is named, or the JSON file cannot be written.
    """
    from faceembed import report

    if not gallery.strip():
        raise ValueError("--gallery is empty: name a folder, such as --gallery people.")
    if json is not None and (json.is_dir() or not report.can_write(json.parent)):
        found = "is a folder" if json.is_dir() else "lies where files cannot be written"
        raise ValueError(f"--json {json} {found}: name a file in a folder of yours, such as --json answers.json.")


@contextlib.contextmanager
def notes_for_warnings() -> Iterator[list[str]]:
    """Shows `UserWarning`s as lines to read: where in the source they were raised helps nobody at a terminal.

    Yields:
      What was shown so far.
    """
    usual = warnings.showwarning
    notes: list[str] = []

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            notes.append(str(message))
            print(f"note: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield notes


def notes_on(gallery: "Gallery", enrolled: Sequence["Entry"], before: Sequence[str]) -> list[str]:
    """What somebody should look at: photos unlike the person's others, and names that differ in case alone.

    Args:
      gallery: after the enrolment.
      enrolled: who were enrolled now.
      before: names that were there.
    """
    from faceembed.identification.store import shown

    notes = []
    there: dict[str, str] = {name.casefold(): name for name in before}
    known = set(before)
    for entry in enrolled:
        other = there.setdefault(entry.name.casefold(), entry.name)
        if entry.name not in known and other != entry.name:
            notes.append(f"{entry.name} differs from {other} by upper and lower case alone: are they one person?")
        for doubt in gallery.doubts(entry):
            measured = (
                f"(squared distance {doubt.distance:.2f}, at most {doubt.cut.distance:.2f} for a false match rate of "
                f"{100 * doubt.cut.fpir:g} %)"
            )
            photo = shown(doubt.photo)
            if len(doubt.others) == 1:
                alone = f"{shown(doubt.others[0])} and {photo} do not look alike {measured}: are both of {entry.name}?"
                notes.append(f"{entry.name}: {alone}")
            else:
                notes.append(
                    f"{entry.name}: {photo} does not look like {entry.name}'s other photos {measured}: is it somebody else?"
                )
    return notes

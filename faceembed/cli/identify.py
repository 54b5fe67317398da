"""`launch.py identify CHECKPOINT --gallery DIR PHOTOS…`: who is this, of the people enrolled, or "not recognized"."""

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from faceembed.cli.embed import load
from faceembed.cli.enroll import FRAMINGS, check_places, left_out, listed, notes_for_warnings

if TYPE_CHECKING:
    from faceembed.identification.gallery import Identification

WHY = 80
"""Characters of a reason that the table shows; the JSON has all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Who is this, of the people enrolled?  Every face of a photo is named, or "not recognized".

    Ends with exit status 0 whatever the answers are, and 1 where there could be none, as of an empty gallery."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The one that the gallery was made with."""
    photos: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Photos and folders of photos."""
    gallery: str
    """A folder, or milvus:URI."""
    fpir: float = 0.01
    """Share of strangers who may be taken for anybody in this gallery, whatever its size."""
    threshold: float | None = None
    """A squared distance of your own, in the place of the one for --fpir."""
    face: Literal["all", "largest"] = "all"
    """Which faces of a photo are named."""
    candidates: int = 5
    """People ranked for each face, in the JSON and, for a single face, on the terminal."""
    out: Path | None = None
    """Folder for copies of the photos with boxes and names drawn in; nothing that is there is overwritten."""
    framing: FRAMINGS = "detect"
    """Where the face is; the same as at enrolment."""
    json: Path | None = None
    """Write all answers there, with their candidates."""
    progress: bool = True
    """Show progress bars."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py identify")
    from faceembed import report
    from faceembed.identification.gallery import Gallery
    from faceembed.identification.store import shown

    if options.candidates < 1:
        raise ValueError(f"--candidates is {options.candidates}: at least one is ranked. Try --candidates 5.")
    check_places(options.gallery, options.json)
    if not options.photos:
        raise ValueError("give photos to identify, or folders of them.")
    listings = [listed(path) for path in options.photos]
    files = [file for listing in listings for file in listing.photos]
    if options.out:
        check_out(files, options.out)
    which: Any = "largest" if options.framing != "detect" else options.face
    embedder = load(options.checkpoint)
    with notes_for_warnings(), Gallery(options.gallery, embedder, framing=options.framing, create=False) as gallery:
        answers = gallery.identify_photos(
            files, fpir=options.fpir, candidates=options.candidates, distance=options.threshold, which=which,
            progress=options.progress,
        )  # fmt: skip
        first = answers[0][0]
        llr = gallery.llr(first.cut.distance)
    for line in left_out(listings):
        print(line)
    show(labels_of(options.photos, [listing.photos for listing in listings]), answers, llr)
    if options.json:  # before pictures are drawn, which may fail
        report.write_json(options.json, {
            "gallery": options.gallery, "enrolled": first.enrolled, "cut": first.cut,
            "photos": [
                # A name that is no text cannot stand in JSON.
                {
                    "photo": str(file).encode("utf-8", "backslashreplace").decode(),
                    "faces": [_face(answer) for answer in found],
                }
                for file, found in zip(files, answers, strict=True)
            ],
        })  # fmt: skip
        print(f"written: {options.json}")
    if options.out:
        for target in draw(files, answers, options.out):
            print(f"drawn: {shown(target)}")


def check_out(files: Sequence[Path], out: Path) -> None:
    """Whether copies can be written.

    Raises:
      ValueError: the folder cannot be written, or a copy would bear the name of a photo that was given.
    """
    from faceembed import report
    from faceembed.identification.store import shown

    if not report.can_write(out):
        raise ValueError(f"--out is {shown(out)}: files cannot be written there. Name a folder of yours.")
    originals = {file.resolve() for file in files}
    for file in files:
        target = out / f"{file.stem}.png"
        if target.resolve() in originals:
            raise ValueError(
                f"--out is {shown(out)}: the copy of {shown(file)} would be {shown(target)}, one of the photos "
                "themselves. Name another folder, such as --out named."
            )


def labels_of(given: Sequence[Path], found: Sequence[Sequence[Path]]) -> list[str]:
    """Names for the table: as short as tells them apart.

    Args:
      given: paths of the command line.
      found: the photos of each.
    """
    from faceembed.identification.store import shown

    files = [file for photos in found for file in photos]
    short = [
        file.name if file == path else str(file.relative_to(path))
        for path, photos in zip(given, found, strict=True)
        for file in photos
    ]
    bearers: dict[str, set[Path]] = {}
    for label, file in zip(short, files, strict=True):
        bearers.setdefault(label, set()).add(file)
    return [
        shown(label if len(bearers[label]) == 1 else file) for label, file in zip(short, files, strict=True)
    ]  # fmt: skip


def _face(answer: "Identification") -> dict[str, Any]:
    return {
        "answer": answer.answer, "name": answer.name, "also": answer.also, "box": answer.box, "reason": answer.reason,
        "candidates": answer.candidates,
    }  # fmt: skip


def _middle(box: tuple[float, float, float, float] | None) -> str | None:
    return None if box is None else f"{(box[0] + box[2]) / 2:.0f}, {(box[1] + box[3]) / 2:.0f}"


def _why(answer: "Identification", found: Sequence["Identification"]) -> str:
    """What is to be said of an answer beside its name."""
    words = [answer.reason] if answer.reason else []
    if answer.also:
        words.append(f"also {' and '.join(answer.also)}, as near")
    times = sum(other.name == answer.name for other in found)
    if answer.name and times > 1:
        words.append(f"{answer.name} is named {times} times in this photo")
    return "; ".join(words)


def show(labels: Sequence[str], answers: Sequence[Sequence["Identification"]], llr: float | None) -> None:
    """A table of all faces; for a single one its candidates.

    Args:
      labels: [n] names of the photos.
      answers: [n] as of `identify_photos`.
      llr: log-likelihood ratio at the threshold; None where the checkpoint has none.
    """
    from faceembed import report

    first = answers[0][0]
    cut = first.cut
    alone = len(labels) == 1 and len(answers[0]) == 1
    if alone:
        why = _why(first, answers[0])
        print(first.answer + (f": {why}" if why else ""))
        if first.candidates:
            print(report.table([
                {"": i, "candidate": c.name, "squared distance": c.distance, "log-likelihood ratio": c.llr}
                for i, c in enumerate(first.candidates, start=1)
            ]))  # fmt: skip
    else:
        rows: list[dict[str, Any]] = []
        for label, found in zip(labels, answers, strict=True):
            for number, answer in enumerate(found, start=1):
                best = answer.candidates[0] if answer.candidates else None
                why = _why(answer, found)
                rows.append({
                    "photo": label, "face": number, "at": _middle(answer.box), "answer": answer.answer,
                    "nearest": best.name if best and answer.name is None else "",
                    "squared distance": None if best is None else best.distance,
                    "log-likelihood ratio": None if best is None else best.llr,
                    "why": why if len(why) <= WHY else why[: WHY - 1] + "…",
                })  # fmt: skip
        columns = [column for column in rows[0] if column != "why" or any(row["why"] for row in rows)]
        print(report.table(rows, columns=columns))
        counts = Counter("recognised" if a.name else a.answer for found in answers for a in found)
        print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    stands_for = (
        "your threshold" if cut.status == "given"
        else f"set for {100 * cut.fpir:g} % of strangers in a gallery of {cut.k:,}"
        + ("" if alone else ", for each face")
        + (" (extrapolated)" if cut.status == "extrapolated" else "")
    )  # fmt: skip
    people = "1 person" if first.enrolled == 1 else f"{first.enrolled:,} people"
    as_ratio = "" if llr is None else f" (log-likelihood ratio {llr:+.2f})"
    print(f"{people} enrolled; threshold {cut.distance:.4f}{as_ratio}, {stands_for}")


def draw(files: Sequence[Path], answers: Sequence[Sequence["Identification"]], out: Path) -> list[Path]:
    """Copies of the photos in which a face was found, with names: OUT/STEM.png, or STEM-2.png where that is taken."""
    import io

    from PIL import Image

    from faceembed import report
    from faceembed.data import sources
    from faceembed.identification import drawing
    from faceembed.identification.store import shown

    written: list[Path] = []
    taken = {name.casefold() for name in os.listdir(out)}  # a.png and A.png are one file on some disks
    for file, found in zip(files, answers, strict=True):
        boxes = [answer.box for answer in found if answer.box is not None]
        if not boxes:
            continue
        labels = [answer.answer for answer in found if answer.box is not None]
        good = [answer.name is not None for answer in found if answer.box is not None]
        try:
            pixels = sources.decode(file.read_bytes())
        except (OSError, ValueError) as error:  # it was there a moment ago
            print(f"not drawn: {shown(file)}: {error}", file=sys.stderr)
            continue
        picture = drawing.named(pixels, boxes, labels, good)
        number, target = 1, out / f"{file.stem}.png"
        while target.name.casefold() in taken:
            number += 1
            target = out / f"{file.stem}-{number}.png"
        taken.add(target.name.casefold())
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        report.write_bytes(target, data.getvalue())
        written.append(target)
        for number, label in drawing.legend(pixels.shape, np.array(boxes), labels).items():
            print(f"{shown(target.name)}: face {number}: {label}")
    return written

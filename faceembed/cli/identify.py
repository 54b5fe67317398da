"""`launch.py identify CHECKPOINT --gallery DIR PHOTOS…`: who is this, of the people enrolled, or "not recognized"."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from faceembed.cli.embed import load
from faceembed.cli.enroll import FRAMINGS

if TYPE_CHECKING:
    from faceembed.identification.gallery import Identification


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Who is this, of the people enrolled?  Every face of a photo is named, or "not recognized"."""

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
    """Folder for copies of the photos with boxes and names drawn in."""
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
    from faceembed.identification import faces
    from faceembed.identification.gallery import Gallery

    if options.candidates < 1:
        raise ValueError(f"--candidates is {options.candidates}: at least one is ranked. Try --candidates 5.")
    files: list[Path] = []
    for path in options.photos:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}: give a photo, or a folder of them.")
        inside = list(faces.photos_in(path)) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"there is no photo in {path}.")
        files += inside
    if not files:
        raise ValueError("give photos to identify, or folders of them.")
    if options.out and not report.can_write(options.out):
        raise ValueError(f"--out is {options.out}: files cannot be written there. Name a folder of yours.")
    which: Any = "largest" if options.framing != "detect" else options.face
    with Gallery(options.gallery, load(options.checkpoint), framing=options.framing, create=False) as gallery:
        answers = gallery.identify_photos(
            files, fpir=options.fpir, candidates=options.candidates, distance=options.threshold, which=which,
            progress=options.progress,
        )  # fmt: skip
    show(files, answers)
    if options.out:
        for target in draw(files, answers, options.out):
            print(f"drawn: {target}")
    if options.json:
        first = answers[0][0]
        report.write_json(options.json, {
            "gallery": options.gallery, "enrolled": first.enrolled, "cut": first.cut,
            "photos": [
                {"photo": str(file), "faces": [_face(answer) for answer in found]}
                for file, found in zip(files, answers, strict=True)
            ],
        })  # fmt: skip
        print(f"written: {options.json}")


def _face(answer: "Identification") -> dict[str, Any]:
    return {
        "answer": answer.answer, "name": answer.name, "box": answer.box, "reason": answer.reason,
        "candidates": answer.candidates,
    }  # fmt: skip


def _middle(box: tuple[float, float, float, float] | None) -> str | None:
    return None if box is None else f"{(box[0] + box[2]) / 2:.0f}, {(box[1] + box[3]) / 2:.0f}"


def show(files: list[Path], answers: list[list["Identification"]]) -> None:
    """A table of all faces; for a single one its candidates."""
    from faceembed import report

    first = answers[0][0]
    cut = first.cut
    if len(files) == 1 and len(answers[0]) == 1:
        print(first.answer + (f": {first.reason}" if first.reason else ""))
        if first.candidates:
            print(report.table([
                {"": i, "candidate": c.name, "squared distance": c.distance, "log-likelihood ratio": c.llr}
                for i, c in enumerate(first.candidates, start=1)
            ]))  # fmt: skip
    else:
        rows = []
        for file, found in zip(files, answers, strict=True):
            for number, answer in enumerate(found, start=1):
                best = answer.candidates[0] if answer.candidates else None
                rows.append({
                    "photo": file.name, "face": number, "at": _middle(answer.box), "answer": answer.answer,
                    "nearest": answer.reason if best is None else best.name if answer.name is None else "",
                    "squared distance": None if best is None else best.distance,
                    "log-likelihood ratio": None if best is None else best.llr,
                })  # fmt: skip
            names = Counter(answer.name for answer in found if answer.name)
            for name in [name for name, times in names.items() if times > 1]:
                rows[-1]["nearest"] = (
                    f"{rows[-1]['nearest']} ({name} is named {names[name]} times in this photo)".strip()
                )
        print(report.table(rows))
        counts = Counter("recognised" if a.name else a.answer for found in answers for a in found)
        print(", ".join(f"{count:,} {what}" for what, count in counts.items()))
    stands_for = (
        "your threshold" if cut.status == "given"
        else f"set for {100 * cut.fpir:g} % of strangers in a gallery of {cut.k:,}"
        + (" (extrapolated)" if cut.status == "extrapolated" else "")
    )  # fmt: skip
    print(f"{first.enrolled:,} people enrolled; threshold {cut.distance:.4f}, {stands_for}")


def draw(files: list[Path], answers: list[list["Identification"]], out: Path) -> list[Path]:
    """Copies of the photos in which a face was found, with names; written as OUT/STEM.png."""
    import io

    from PIL import Image

    from faceembed import report
    from faceembed.data import sources
    from faceembed.identification import drawing

    written: list[Path] = []
    for file, found in zip(files, answers, strict=True):
        boxes = [answer.box for answer in found if answer.box is not None]
        if not boxes:
            continue
        labels = [answer.answer for answer in found if answer.box is not None]
        good = [answer.name is not None for answer in found if answer.box is not None]
        pixels = sources.decode(file.read_bytes())
        picture = drawing.named(pixels, boxes, labels, good)
        target = out / f"{file.stem}.png"
        for i in range(2, len(files) + 2):  # two folders may hold files of one name
            if target not in written:
                break
            target = out / f"{file.stem}-{i}.png"
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        report.write_bytes(target, data.getvalue())
        written.append(target)
        for number, label in drawing.legend(pixels.shape, np.array(boxes), labels).items():
            print(f"{target.name}: face {number} is {label}")
    return written

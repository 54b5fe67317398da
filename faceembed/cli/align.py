"""`launch.py align SOURCE OUT`: finds the face in each photo, and writes crops in an encoder's template."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from faceembed.preprocess import PUBLISHED, Template

SIZES = {"portrait": 64, "arcface": 112, "facenet": 160, "dlib": PUBLISHED["dlib"].size}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Finds the face in each photo and writes its crop; the same command goes on where it was stopped.

    OUT/align.json holds the settings and counts, OUT/align.jsonl what was found in each photo. As `folder:OUT` the crops
    are read as they are by checkpoints of the same template.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A folder that holds one folder a person, or a source: folder:PATH | celeba | lfw."""
    out: Annotated[Path, tyro.conf.Positional]
    """Where the crops go: OUT/PERSON/PHOTO.png."""
    template: Template = "arcface"
    """Which part of the head fills a crop: arcface (InsightFace's 112 px), dlib (its chip), facenet (the face's box and a
    margin), portrait (this project's own encoders)."""
    size: int | None = None
    """Side of a crop, pixels; arcface 112, dlib 150, facenet 160, portrait 64 when not given."""
    detector: Literal["centerface", "dlib"] = "centerface"
    """What finds faces: CenterFace (extra align), or dlib's HOG detector (extra dlib)."""
    face: Literal["central", "largest"] = "central"
    """Which of several faces is taken: the one nearest to the middle of the photo, or the largest."""
    missed: Literal["skip", "centre", "error"] = "skip"
    """What becomes of a photo without a face: it is left out, its middle is taken, or the command ends."""
    format: Literal["png", "jpg"] = "png"
    """png loses nothing; jpg (quality 95) takes a third of the room."""
    threads: int | None = None
    """Photos at once; two a core when not given."""
    data_dir: Path | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    json: Path | None = None
    """Write the counts there too."""
    progress: bool = True
    """Show progress bars."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py align")
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads is {options.threads}: at least one photo at once. Try --threads 4.")
    from faceembed import report
    from faceembed.data import crops, sources

    size = SIZES[options.template] if options.size is None else options.size
    aligner = crops.Aligner(
        template=options.template, size=size, detector=options.detector, face=options.face, missed=options.missed
    )
    crops.require(options.detector)
    name = options.source
    if name not in sources.SOURCES and not name.startswith(("folder:", "insightface:", "prepared:")):
        name = f"folder:{name}"
    photos = sources.open_source(name, data_dir=options.data_dir, progress=options.progress)
    if photos.template is not None:
        raise ValueError(f"{name} is aligned already, to the template {photos.template!r}: give the original photos.")
    for line in sources.problem_lines(photos):
        print(line)
    started = time.perf_counter()
    before = crops.finished(options.out)
    card = crops.align_folder(
        photos, options.out, aligner, format=options.format, threads=options.threads, progress=options.progress
    )
    seconds, new = time.perf_counter() - started, card["photos"] - before
    print(
        f"{options.out}: {card['written']:,} crops of {card['photos']:,} photos ({before:,} were there already)\n"
        f"no face in {card['missed']:,} ({options.missed}), several in {card['several']:,} ({options.face} taken), "
        f"unreadable {card['unreadable']:,}\n"
        f"{seconds:.1f} s, {new / max(seconds, 1e-9):,.0f} photos/s"
    )
    if options.json:
        report.write_json(options.json, card)

"""`launch.py claim CHECKPOINT --gallery DIR --name NAME IMAGE`: is this the person they say?"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from faceembed.cli.embed import load
from faceembed.cli.enroll import FRAMINGS, check_places, notes_for_warnings

EXIT = {"yes": 0, "no": 3, "cannot tell": 4}
"""Exit status by answer, for scripts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Is this the person they say?

    Ends with exit status 0 for yes, 3 for no, 4 for cannot tell (no face, or one too small or blurred), and 1 where the
    question could not be put: the photo is missing or no image, or nobody of that name is enrolled."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """The one that the gallery was made with."""
    image: Annotated[Path, tyro.conf.Positional]
    """A photo; its largest face counts."""
    gallery: str
    """A folder, or milvus:URI."""
    name: str
    """Who is claimed to be."""
    fmr: float = 0.001
    """Share of others who may pass as this person."""
    threshold: float | None = None
    """A squared distance of your own, in the place of the one for --fmr."""
    framing: FRAMINGS = "detect"
    """Where the face is; the same as at enrolment."""
    json: Path | None = None
    """Write the answer there."""


def run(arguments: list[str]) -> int:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py claim")
    check_places(options.gallery, options.json)
    from faceembed import report
    from faceembed.identification.gallery import Gallery
    from faceembed.identification.store import shown

    if options.image.is_dir():
        raise ValueError(f"{shown(options.image)} is a folder: a claim is decided by one photo. Give that.")
    if not options.image.is_file():
        raise FileNotFoundError(f"there is no photo {shown(options.image)}.")
    embedder = load(options.checkpoint)
    with notes_for_warnings(), Gallery(options.gallery, embedder, framing=options.framing, create=False) as gallery:
        claim = gallery.verify(options.name, options.image, fmr=options.fmr, distance=options.threshold)
    cut = claim.cut
    stands_for = "your threshold" if cut.status == "given" else f"for a false match rate of {100 * cut.fpir:g} %"
    if claim.distance is None:
        print(f"cannot tell: {claim.reason}")
    else:
        llr = "" if claim.llr is None else f", log-likelihood ratio {claim.llr:+.2f}"
        words = f"this is {claim.name}" if claim else f"this is not shown to be {claim.name}"
        print(
            f"{claim.answer}: {words} (squared distance {claim.distance:.4f}{llr}; threshold {cut.distance:.4f}, "
            f"{stands_for}{', extrapolated' if cut.status == 'extrapolated' else ''})"
        )
    if options.json:
        report.write_json(options.json, claim)
    return EXIT[claim.answer]

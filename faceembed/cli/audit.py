"""`launch.py data audit SOURCE`: photos in the wrong folder, people in two folders, two in one, copies."""

import csv
import dataclasses
import io
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from faceembed.audit.copies import Copies
    from faceembed.audit.labels import Ints, Labels
    from faceembed.data.sources import Photos
    from faceembed.embed import Embedder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Ranks probable label errors and copies by embedding, for a person to look at; nothing is changed.

    OUT/audit.html shows them, the surest first; OUT/audit.csv lists all; OUT/exclude.txt names photos that a training can
    do without, for `train --data.exclude OUT/exclude.txt`: look first, and take out lines that are wrong. A file of that
    name that is there already is left as it is.
    """

    name: Annotated[str, tyro.conf.Positional]
    """celeba | lfw | celeba_lfw | folder:PATH | insightface:PATH | prepared:NAME."""
    checkpoint: Path = Path("dlib")
    """Whose embeddings judge: a run directory, a step of one, or dlib. It should not have learned from these labels."""
    embeddings: Path | None = None
    """What `launch.py embed CHECKPOINT SOURCE --out FILE` wrote; photos are embedded now when not given."""
    out: Path = Path("audit")
    """The folder to write."""
    shown: int = 40
    """Findings of each kind on the page."""
    pairs: int = 10_000
    """Pairs with nearly equal embeddings whose photos are read and compared by pixels, the nearest first."""
    framing: Literal["celeba", "lfw"] | None = None
    """folder:PATH: the photos are framed like CelebA's aligned ones or like deep-funneled LFW, at any size. When not
    given, they are cropped tightly already: the largest centred square is taken."""
    data_dir: Path | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    batch: int = 256
    """Photos at once on the device."""
    json: Path | None = None
    """Write the counts, what was measured and all findings there, too."""
    progress: bool = True
    """Show progress bars."""


def run(options: Options) -> None:
    """Audits a source, writes the three files, and prints the counts.

    Raises:
      ValueError: a flag or the embeddings do not fit, or the source has too few people with two photos.
    """
    if options.shown < 1:
        raise ValueError(f"--shown is {options.shown}: a page shows at least one finding. Try --shown 40.")
    if options.pairs < 0:
        raise ValueError(f"--pairs is {options.pairs}: 0 compares no pixels, more finds copies. Try --pairs 10000.")
    if options.batch < 1:
        raise ValueError(f"--batch is {options.batch}: at least one photo at once. Try --batch 256.")
    if options.name == "synthetic":
        raise ValueError("synthetic has no label errors: its photos are drawn. Try folder:PATH.")
    from faceembed import report
    from faceembed.data import sources

    sources.require_outside(options.name, options.out)
    photos = sources.open_source(options.name, data_dir=options.data_dir, progress=options.progress)
    if not report.can_write(options.out):  # told now, and not after a large source has been embedded
        raise ValueError(f"--out is {options.out}: files cannot be written there. Name a folder of yours.")
    if options.framing:
        photos = sources.framed(photos, options.framing)
    for line in sources.problem_lines(photos):
        print(line)
    from faceembed.audit import copies, labels
    from faceembed.cli.embed import load
    from faceembed.data import crops, pairs

    embedder = load(options.checkpoint)
    photos = crops.framed_for(photos, embedder.preprocess)

    def embeddings() -> "NDArray[np.floating]":
        if options.embeddings:
            return pairs.read_embeddings(options.embeddings, photos, checkpoint=embedder.fingerprint)
        from faceembed import evaluate

        return evaluate.embed_photos(embedder, photos, batch=options.batch, progress=options.progress)[0]

    # Without a name here, embeddings are let go as soon as their directions are known.
    x, middle = labels.centred(embeddings(), photos.identity, names=photos.keys)
    found = labels.audit(x, photos.identity)
    twice = copies.find(
        x, photos.identity, found.near, read=lambda chosen: crops_of(embedder, photos, chosen),
        embed=lambda images: embedder(images, options.batch), middle=middle, most=options.pairs,
    )  # fmt: skip
    write(options, photos, embedder, found, twice)


def crops_of(embedder: "Embedder", photos: "Photos", chosen: "Ints") -> "NDArray[np.uint8]":
    """[k, s, s, 3] what the network sees of some photos; their numbers ascend."""
    from faceembed.data import pipeline, sources

    return pipeline.decode_all(sources.select(photos, chosen), embedder.size, progress=False)


def write(options: Options, photos: "Photos", embedder: "Embedder", found: "Labels", copies: "Copies") -> None:
    """The files and the lines on the terminal."""
    from faceembed import evaluate, report
    from faceembed.audit import findings, page

    rows = list(findings.findings(found, copies, photos))
    keys = [str(photos.keys[photo]) for photo in findings.excluded(found, copies)]
    names = [key for key in keys if "\n" not in key]
    parts = findings.parts_of(found, copies, photos, options.shown)
    measured = dataclasses.asdict(found.thresholds) | {
        "copy_candidates": copies.candidates, "copy_cosine": copies.cosine, "copy_pixels": copies.pixels,
    }  # fmt: skip
    drawn = sorted({photo for part in parts for case in part.cases for group in case.groups for photo in group.photos})
    pictures = crops_of(embedder, photos, np.array(drawn, np.int64)) if drawn else ()
    warnings = []
    known = evaluate.training_people(embedder, photos.people)
    if known:
        warnings.append(
            f"{embedder.path} was trained on {len(known):,} of these {len(photos.people):,} people, with these "
            "labels: it fits the errors that it was trained on, and shows fewer. Audit with another, such as dlib."
        )
    if copies.unseen:
        warnings.append(
            f"{copies.unseen:,} more pairs have nearly equal embeddings; their pixels were not compared, and copies among "
            f"them are not listed. Try --pairs {options.pairs + copies.unseen}."
        )
    if len(names) < len(keys):
        warnings.append(f"{len(keys) - len(names):,} photos have line breaks in their names and cannot be excluded.")
    audited = f"{len(photos):,} photos of {len(photos.people):,} people, by the embeddings of {embedder.path}."
    if photos.tally and not options.embeddings:
        told = str(photos.tally)
        audited += f" {told[0].upper()}{told[1:]}."
    target = options.out / "exclude.txt"
    text = "".join(f"{name}\n" for name in names)
    if target.exists() and target.read_bytes() != text.encode():
        target = options.out / "exclude.new.txt"
        warnings.append(f"{options.out / 'exclude.txt'} was there and is left as it is; {target} is today's.")
    command = "python launch.py " + " ".join(map(shlex.quote, sys.argv[1:]))
    shown = page.AuditPage(
        title=photos.source,
        audited=audited,
        parts=parts,
        crops=dict(zip(drawn, pictures, strict=True)),
        keys=photos.keys,
        warnings=warnings,
        facts={name.replace("_", " "): f"{value:.4g}" for name, value in measured.items()},
        commands={
            "Audit again": command,
            "Train without the surest": f"python launch.py train EXPERIMENT --data.source {shlex.quote(photos.source)} "
            f"--data.exclude {shlex.quote(str(target))}",
        },
    )
    page.write_page(options.out / "audit.html", shown)
    table = io.StringIO()
    writer = csv.DictWriter(table, findings.COLUMNS)
    writer.writeheader()
    writer.writerows(
        {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()} for row in rows
    )
    report.write_text(options.out / "audit.csv", table.getvalue())
    report.write_text(target, text)

    print(audited)
    for part in parts:
        print(f"  {part.total:>7,}  {part.title}")
    for warning in warnings:
        print(f"warning: {warning}")
    print(
        f"{options.out / 'audit.html'}: look at it. All findings: {options.out / 'audit.csv'}; {len(names):,} photos to "
        f"train without: {target}"
    )
    if options.json:
        content = {
            "source": photos.source, "fingerprint": photos.fingerprint, "photos": len(photos),
            "people": len(photos.people), "checkpoint": str(embedder.path), "warnings": warnings, "measured": measured,
            "alignment": photos.tally.to_dict() if photos.tally and not options.embeddings else None,
            "found": {part.which: part.total for part in parts}, "exclude": names, "findings": rows,
        }  # fmt: skip
        report.write_json(options.json, content)

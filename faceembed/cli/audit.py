"""`launch.py data audit SOURCE`: photos in the wrong folder, people in two folders, two in one, copies."""

import csv
import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from faceembed import audit, audit_page
    from faceembed.data.sources import Photos
    from faceembed.embed import Embedder

SIDE = 32
"""Pixels of a side in which copies are compared: as many as a recompressed, smaller copy still has."""

SAMPLE = 128
"""Photos that are degraded to measure what copies look like."""

CHUNK = 1024
"""Pairs whose photos are decoded at once."""

BESIDE = 4
"""Photos of a folder that are shown beside a doubtful one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Ranks probable label errors and copies by embedding, for a person to look at; nothing is changed.

    OUT/audit.html shows them, the surest first; OUT/audit.csv lists all; OUT/exclude.txt names photos that a training can
    do without, for `train --data.exclude OUT/exclude.txt`: look first, and take out lines that are wrong. A file of that
    name that is there already is left as it is.
    """

    name: Annotated[str, tyro.conf.Positional]
    """celeba | lfw | celeba_lfw | folder:PATH."""
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
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out is {options.out}, which is a file: name a folder.")
    kind, _, root = options.name.partition(":")
    if kind == "folder" and options.out.resolve().is_relative_to(Path(root).expanduser().resolve()):
        raise ValueError(f"--out is {options.out}, which lies in {root}: it would be taken for a person. Name another.")
    from faceembed.data import sources

    photos = sources.open_source(options.name, data_dir=options.data_dir, progress=options.progress)
    try:  # told now, and not after a large source has been embedded
        options.out.mkdir(parents=True, exist_ok=True)
        writable = os.access(options.out, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"--out is {options.out}: files cannot be written there. Name a folder of yours.")
    if options.framing:
        photos = sources.framed(photos, options.framing)
    for line in sources.problem_lines(photos):
        print(line)
    from faceembed.cli.embed import load
    from faceembed.data import crops, pairs

    embedder = load(options.checkpoint)
    photos = crops.framed_for(photos, embedder.preprocess)

    def embeddings() -> "NDArray[np.floating]":
        if options.embeddings:
            return pairs.read_embeddings(options.embeddings, photos, checkpoint=embedder.fingerprint)
        from faceembed import evaluate

        return evaluate.embed_photos(embedder, photos, batch=options.batch, progress=options.progress)[0]

    # Handed on without a name here, so that they can be let go as soon as their directions are known.
    found, copies, measured = examine(embedder, photos, embeddings(), batch=options.batch, most=options.pairs)
    write(options, photos, embedder, found, copies, measured)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """Pairs of photos that are one photograph by their pixels too, the most alike first."""

    first: "NDArray[np.int64]"
    second: "NDArray[np.int64]"
    alike: "NDArray[np.float32]"
    """Cosine of the two crops' edges, 1 = the same pixels."""
    mirrored: "NDArray[np.bool_]"
    across: "NDArray[np.bool_]"
    """The photos are in two folders."""
    unseen: int
    """Pairs with nearly equal embeddings whose pixels were not compared."""


def examine(
    embedder: "Embedder", photos: "Photos", emb: "NDArray[np.floating]", *, batch: int = 256, most: int = 10_000
) -> "tuple[audit.Audit, Copies, dict[str, float]]":
    """Audits embeddings, and compares the pixels of photos whose embeddings are nearly equal.

    What copies look like is measured: some photos are made smaller, compressed and cropped anew, and the level lies where
    19 of 20 of them pass.

    Args:
      emb: [n, d] of the photos.
      batch: photos at once on the device.
      most: pairs whose pixels are compared.

    Returns:
      (what embeddings tell, copies, what was measured: name → value).

    Raises:
      ValueError: as `audit.centred`.
    """
    from faceembed import audit

    wrong = np.flatnonzero(~np.isfinite(emb).all(axis=1) | ~emb.any(axis=1))
    if len(wrong):
        raise ValueError(
            f"the embedding of {photos.keys[wrong[0]]} is 0 or not finite, as are {len(wrong) - 1} more: embed the photos "
            "again, or leave them out."
        )
    x, middle = audit.centred(emb, photos.identity)
    del emb
    sample = np.unique(np.linspace(0, len(photos) - 1, SAMPLE).round().astype(np.int64))
    crops = crops_of(embedder, photos, sample)
    worse = np.stack([degraded(crop) for crop in crops])
    # Both sides are embedded here and now: the crops read above, not those that a file's embeddings were made of.
    one, other = (audit.directions(embedder(side, batch), middle) for side in (crops, worse))
    level = float(np.quantile(np.einsum("nd,nd->n", one, other), 0.05))
    small, small_worse = shrunk(crops), shrunk(worse)
    alike, _ = audit.correlation(small, small_worse)
    # Neighbours of the sample may be photos of one person, and then copies.
    shift = len(sample) // 2
    strangers = photos.identity[sample] != np.roll(photos.identity[sample], shift)
    others, _ = audit.correlation(small[strangers], np.roll(small, shift, axis=0)[strangers])
    # 19 of 20 such copies pass, and no more than one in a hundred pairs of different photographs.
    pixels = float(max(np.quantile(alike, 0.05), np.quantile(others, 0.99)))

    found = audit.audit(x, photos.identity, copy=min(max(level, 0.0), 1.0))
    pairs = found.duplicates
    first, second = pairs.first[:most], pairs.second[:most]
    value, mirrored = np.zeros(len(first), np.float32), np.zeros(len(first), bool)
    for start in range(0, len(first), CHUNK):
        part = slice(start, start + CHUNK)
        used, place = np.unique(np.concatenate([first[part], second[part]]), return_inverse=True)
        tiny = shrunk(crops_of(embedder, photos, used))
        value[part], mirrored[part] = audit.correlation(*np.split(tiny[place], 2))
    kept = np.flatnonzero(value >= pixels)
    kept = kept[np.argsort(-value[kept], kind="stable")]
    copies = Copies(
        first=first[kept],
        second=second[kept],
        alike=value[kept],
        mirrored=mirrored[kept],
        across=pairs.across[:most][kept],
        unseen=len(pairs) - len(first),
    )
    measured = {field.name: getattr(found.thresholds, field.name) for field in dataclasses.fields(found.thresholds)}
    return found, copies, measured | {"copy_pixels": pixels, "copy_candidates": float(len(pairs))}


def crops_of(embedder: "Embedder", photos: "Photos", chosen: "NDArray[np.int64]") -> "NDArray[np.uint8]":
    """[k, s, s, 3] what the network sees of some photos, in ascending order of their numbers."""
    from faceembed.data import pipeline, sources

    mask = np.zeros(len(photos), bool)
    mask[chosen] = True
    return pipeline.decode_all(sources.select(photos, mask), embedder.size, progress=False)


def degraded(crop: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
    """A copy as they are met: cut a little tighter, at 60 % of the size, compressed as JPEG of quality 50."""
    from PIL import Image

    size = crop.shape[0]
    edge = 0.015 * size
    small = Image.fromarray(crop).resize(
        (round(0.6 * size),) * 2, Image.Resampling.BILINEAR, box=(edge, edge, size - edge, size - edge)
    )
    file = io.BytesIO()
    small.save(file, "JPEG", quality=50)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def shrunk(crops: "NDArray[np.uint8]") -> "NDArray[np.uint8]":
    """[k, SIDE, SIDE, 3] of crops of any size."""
    from PIL import Image

    small = [Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BOX) for crop in crops]
    return np.stack([np.asarray(image) for image in small])


def findings(found: "audit.Audit", copies: Copies, photos: "Photos") -> Iterator[dict[str, Any]]:
    """All findings as rows of a table: kind, rank in its kind, score, the photos and people concerned."""
    keys, people = photos.keys, photos.people
    errors, splits, merges = found.label_errors, found.splits, found.merges
    for kind, chosen in by_kind(errors):
        # Both photos of a folder of two share a rank: either may be the wrong one.
        _, first, folder = np.unique(errors.person[chosen], return_index=True, return_inverse=True)
        ranks = np.argsort(np.argsort(first))[folder] if kind == PAIRS else np.arange(len(chosen))
        for rank, i in zip((ranks + 1).tolist(), chosen, strict=True):
            yield {
                "kind": kind, "rank": rank, "score": float(errors.margin[i]), "photo": str(keys[errors.photo[i]]),
                "person": str(people[errors.person[i]]), "other_photo": "",
                "other_person": str(people[errors.looks_like[i]]), "cosine": float(errors.own[i]),
                "other_cosine": float(errors.other[i]),
            }  # fmt: skip
    for rank, i in enumerate(range(len(splits)), start=1):
        yield {
            "kind": "one person in two folders", "rank": rank, "score": float(splits.score[i]), "photo": "",
            "person": str(people[splits.first[i]]), "other_photo": "", "other_person": str(people[splits.second[i]]),
            "cosine": float(splits.cosine[i]), "other_cosine": None,
        }  # fmt: skip
    for rank, i in enumerate(range(len(merges)), start=1):
        for photo in smaller_cluster(merges, photos.identity, i):
            yield {
                "kind": "two people in one folder", "rank": rank, "score": float(merges.score[i]),
                "photo": str(keys[photo]), "person": str(people[merges.person[i]]), "other_photo": "",
                "other_person": "", "cosine": float(merges.cosine[i]), "other_cosine": None,
            }  # fmt: skip
    for kind, across in (("copy in two folders", True), ("copy in one folder", False)):
        for rank, i in enumerate(np.flatnonzero(copies.across == across), start=1):
            one, other = copies.first[i], copies.second[i]
            yield {
                "kind": kind, "rank": rank, "score": float(copies.alike[i]), "photo": str(keys[one]),
                "person": str(people[photos.identity[one]]), "other_photo": str(keys[other]),
                "other_person": str(people[photos.identity[other]]), "cosine": None, "other_cosine": None,
            }  # fmt: skip


def by_kind(errors: "audit.LabelErrors") -> "list[tuple[str, NDArray[np.int64]]]":
    """Label errors in the order of what can be said of them: whose photo it is, nobody's of the folder, one of two."""
    return [
        ("looks like somebody else", np.flatnonzero(errors.sure & errors.somebody)),
        ("like nobody in its folder", np.flatnonzero(errors.sure & ~errors.somebody)),
        (PAIRS, np.flatnonzero(~errors.sure)),
    ]


def smaller_cluster(merges: "audit.MergedPeople", identity: "NDArray[np.integer]", i: int) -> "NDArray[np.int64]":
    """The photos of folder i's smaller cluster; of two equal ones the second."""
    which = 1 if merges.size[i, 1] <= merges.size[i, 0] else 0
    return np.flatnonzero((identity == merges.person[i]) & (merges.side == which))


PAIRS = "two photos, not one person"


def excluded(found: "audit.Audit", copies: Copies) -> "NDArray[np.int64]":
    """Photos that a training can do without, ascending: those in the wrong folder, and of copies in one folder all but one.

    Of each group of photos that are linked as copies the first stays. What needs a person's decision is left in: folders of
    two photos, people in two folders, two in one, copies in two.
    """
    from scipy.sparse import coo_array, csgraph

    errors = found.label_errors
    one, other = copies.first[~copies.across], copies.second[~copies.across]
    photos, place = np.unique(np.concatenate([one, other]), return_inverse=True)
    a, b = np.split(place, 2)
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(photos),) * 2)
    _, group = csgraph.connected_components(graph, directed=False)
    _, first = np.unique(group, return_index=True)
    return np.unique(np.concatenate([errors.photo[errors.sure], np.delete(photos, first)]))


def write(
    options: Options,
    photos: "Photos",
    embedder: "Embedder",
    found: "audit.Audit",
    copies: Copies,
    measured: dict[str, float],
) -> None:
    """The files and the lines on the terminal."""
    from faceembed import audit_page, evaluate, report

    rows = list(findings(found, copies, photos))
    keys = [str(photos.keys[photo]) for photo in excluded(found, copies)]
    names = [key for key in keys if "\n" not in key]
    parts = parts_of(found, copies, photos, options.shown)
    drawn = sorted({photo for part in parts for case in part.cases for group in case.groups for photo in group.photos})
    pictures = crops_of(embedder, photos, np.array(drawn, np.int64)) if drawn else ()
    warnings = []
    known = evaluate.training_people(embedder, photos.people)
    if known:
        warnings.append(
            f"{options.checkpoint} was trained on {len(known):,} of these {len(photos.people):,} people, with these "
            "labels: it fits the errors that it was trained on, and shows fewer. Audit with another, such as dlib."
        )
    if copies.unseen:
        warnings.append(
            f"{copies.unseen:,} more pairs have nearly equal embeddings; their pixels were not compared, and copies among "
            f"them are not listed. Try --pairs {options.pairs + copies.unseen}."
        )
    if len(names) < len(keys):
        warnings.append(f"{len(keys) - len(names):,} photos have line breaks in their names and cannot be excluded.")
    audited = f"{len(photos):,} photos of {len(photos.people):,} people, by the embeddings of {options.checkpoint}."
    if photos.tally and not options.embeddings:
        told = str(photos.tally)
        audited += f" {told[0].upper()}{told[1:]}."
    target = options.out / "exclude.txt"
    text = "".join(f"{name}\n" for name in names)
    if target.exists() and target.read_bytes() != text.encode():
        target = options.out / "exclude.new.txt"
        warnings.append(f"{options.out / 'exclude.txt'} was there and is left as it is; {target} is today's.")
    command = "python launch.py " + " ".join(map(shlex.quote, sys.argv[1:]))
    shown = audit_page.AuditPage(
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
    audit_page.write_page(options.out / "audit.html", shown)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["kind", "rank", "score", "photo", "person", "other_photo", "other_person", "cosine",
                                    "other_cosine"])  # fmt: skip
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
            "people": len(photos.people), "checkpoint": str(options.checkpoint), "warnings": warnings, "measured": measured,
            "alignment": photos.tally.to_dict() if photos.tally and not options.embeddings else None,
            "found": {part.which: part.total for part in parts}, "exclude": names, "findings": rows,
        }  # fmt: skip
        report.write_json(options.json, content)


def parts_of(found: "audit.Audit", copies: Copies, photos: "Photos", most: int) -> "list[audit_page.Part]":
    """The page's sections: every kind of finding, its first `most` with the photos to judge it by."""
    from faceembed.audit_page import Case, Group, Part

    errors, splits, merges = found.label_errors, found.splits, found.merges
    keys, people, identity = photos.keys, photos.people, photos.identity
    starts = np.searchsorted(identity, np.arange(len(people)))
    count = np.bincount(identity, minlength=len(people))

    def some(person: int, without: int = -1) -> tuple[int, ...]:
        """A few photos of a folder, evenly."""
        inside = np.setdiff1d(np.arange(starts[person], starts[person] + count[person]), [without])
        return tuple(inside[np.unique(np.linspace(0, len(inside) - 1, BESIDE).round().astype(int))].tolist())

    def folder(person: int, without: int = -1) -> Group:
        beside = some(person, without)
        total = count[person] - (without >= 0 and identity[without] == person)
        words = "the other" if without >= 0 and identity[without] == person else f"{people[person]}:"
        return Group(caption=f"{words} {_photos(total)}" if len(beside) == total else
                     f"{words} {len(beside)} of {_photos(total)}", photos=beside)  # fmt: skip

    def error(i: int) -> Case:
        photo, person, other = int(errors.photo[i]), int(errors.person[i]), int(errors.looks_like[i])
        words = f"margin {errors.margin[i]:+.3f}; cosine to its folder {errors.own[i]:.2f}"
        groups = [Group(caption=str(people[person]), photos=(photo,), suspect=True), folder(person, photo)]
        if errors.margin[i] > 0:  # the nearest other person is a hint, at least
            words += f", to {people[other]} {errors.other[i]:.2f}"
            groups.append(folder(other))
        return Case(title=str(keys[photo]), words=words, groups=tuple(groups))

    kinds = dict(by_kind(errors))
    explained = {
        "looks like somebody else": "The marked photo fits its folder worse than nearly all photos do, and another "
        "person's better. To the left what is doubted, then its folder, then whom it looks like.",
        "like nobody in its folder": "The marked photo is as far from its folder as a stranger would be. A wrong label, or "
        "a profile, a child's photo, a face that was not found. To the right the nearest other person, if that is nearer.",
        PAIRS: "Folders of two photos that show two people by their embeddings: either may be the wrong one.",
    }
    parts = [
        Part(
            which=kind.replace(" ", "-").replace(",", ""), title=kind.capitalize(), words=explained[kind],
            total=len(chosen), cases=tuple(error(int(i)) for i in chosen[:most]),
        )
        for kind, chosen in kinds.items()
    ]  # fmt: skip
    parts[2] = dataclasses.replace(parts[2], **_one_a_folder(errors, kinds[PAIRS], error, most))
    parts.append(
        Part(
            which="one-person-in-two-folders", title="One person in two folders", total=len(splits),
            words="Pairs of people whose photos look as alike as the two halves of one person's do. People whom the "
            "network tells apart badly come here too.",
            cases=tuple(
                Case(
                    title=f"{people[splits.first[i]]} and {people[splits.second[i]]}",
                    words=f"log-likelihood ratio {splits.score[i]:+.3f}; cosine {splits.cosine[i]:.2f}",
                    groups=(folder(int(splits.first[i])), folder(int(splits.second[i]))),
                )
                for i in range(min(most, len(splits)))
            ),
        )
    )  # fmt: skip

    def cluster(i: int, which: int) -> Group:
        inside = np.flatnonzero((identity == merges.person[i]) & (merges.side == which))
        return Group(caption=_photos(len(inside)), photos=tuple(inside[:BESIDE].tolist()))

    parts.append(
        Part(
            which="two-people-in-one-folder", title="Two people in one folder", total=len(merges),
            words="Folders whose photos fall into two groups that look like two people.",
            cases=tuple(
                Case(
                    title=str(people[merges.person[i]]),
                    words=f"log-likelihood ratio {merges.score[i]:+.3f}; cosine {merges.cosine[i]:.2f}",
                    groups=(cluster(i, 0), cluster(i, 1)),
                )
                for i in range(min(most, len(merges)))
            ),
        )
    )  # fmt: skip
    for across, title, words in (
        (True, "Copies in two folders", "One photograph under two names: one of the labels is wrong."),
        (False, "Copies in one folder", "One photograph twice, larger, smaller, cut or compressed otherwise."),
    ):
        chosen = np.flatnonzero(copies.across == across)
        parts.append(
            Part(
                which=title.lower().replace(" ", "-"), title=title, words=words, total=len(chosen),
                cases=tuple(
                    Case(
                        title=f"{keys[copies.first[i]]} and {keys[copies.second[i]]}",
                        words=f"pixels alike {copies.alike[i]:.3f}" + (", mirrored" if copies.mirrored[i] else ""),
                        groups=tuple(
                            Group(caption=str(people[identity[photo]]), photos=(int(photo),), suspect=True)
                            for photo in (copies.first[i], copies.second[i])
                        ),
                    )
                    for i in chosen[:most]
                ),
            )
        )  # fmt: skip
    return parts


def _one_a_folder(errors: Any, chosen: Any, error: Any, most: int) -> dict[str, Any]:
    """Both photos of a folder of two are listed; a case shows the folder once."""
    _, first = np.unique(errors.person[chosen], return_index=True)
    kept = chosen[np.sort(first)]
    return {"total": len(kept), "cases": tuple(error(int(i)) for i in kept[:most])}


def _photos(number: int) -> str:
    return "1 photo" if number == 1 else f"{number} photos"

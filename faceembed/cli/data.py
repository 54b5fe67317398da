"""`launch.py data prepare NAME`, `data info NAME`, `data preview NAME` and `data audit NAME`: build a set of photos once;
what is in one; look at it; what is probably wrong in it."""

import dataclasses
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from faceembed.cli import audit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Build a set of photos once, from its archives."""

    name: Annotated[Literal["celeba", "lfw", "insightface"], tyro.conf.Positional]
    """celeba | lfw | insightface (a train.rec, such as MS1MV3's)."""
    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """tar, tar.gz, zip or an unpacked folder; several for celeba. lfw is downloaded when none is given. insightface:
    PATH/train.rec."""
    identities: str | None = None
    """celeba: identity_CelebA.txt, an image name and the person's number a line."""
    pairs_dir: str | None = None
    """lfw: folder of pairsDevTrain.txt and the like, if not beside the archive."""
    align: bool = False
    """celeba: find and align the faces in archives that are not aligned."""
    save_as: str | None = None
    """insightface: NAME of the source prepared:NAME; the name of the folder that holds the .rec when not given."""
    data_dir: str | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    overwrite: bool = False
    """Build anew what is there."""
    json: str | None = None
    """File for the machine-readable report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What is in a source of photos."""

    name: Annotated[str, tyro.conf.Positional]
    """celeba | lfw | synthetic | folder:PATH | insightface:PATH | prepared:NAME."""
    data_dir: str | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    json: str | None = None
    """File for the machine-readable report."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """Draws a contact sheet: a person a row, every photo cropped as the encoder sees it."""

    name: Annotated[str, tyro.conf.Positional]
    """celeba | lfw | synthetic | folder:PATH | insightface:PATH | prepared:NAME."""
    people: int = 8
    """Rows."""
    photos: int = 8
    """Photos of each person, drawn by the seed where there are more."""
    size: int = 96
    """Side of a photo, in pixels; the encoder's own is preprocess.size."""
    out: Path = Path("preview.png")
    """The picture to write: .png, .jpg or .webp."""
    choose: Literal["random", "most"] = "random"
    """random: people drawn by the seed among those with at least --photos photos, filled up with whoever has most.
    most: the people with the most photos."""
    seed: int = 0
    """Of the draw; for synthetic, the population. The same seed gives the same picture."""
    framing: Literal["celeba", "lfw"] | None = None
    """folder:PATH: the photos are framed like CelebA's aligned ones or like deep-funneled LFW, at any size. When not
    given, they are cropped tightly already: the largest centred square is taken."""
    data_dir: str | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    json: str | None = None
    """File for who and what was drawn."""
    progress: bool = True
    """Show progress bars."""


def run(arguments: list[str]) -> None:
    """See the module."""
    commands: dict[str, Any] = {"prepare": Prepare, "info": Info, "preview": Preview, "audit": audit.Options}
    chosen = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="launch.py data")
    if isinstance(chosen, audit.Options):
        audit.run(chosen)
        return
    actions: dict[type, Any] = {Prepare: prepare, Info: info, Preview: preview}
    actions[type(chosen)](**vars(chosen))


def prepare(
    name: str,
    *,
    archive: Sequence[str] = (),
    identities: str | None = None,
    pairs_dir: str | None = None,
    align: bool = False,
    save_as: str | None = None,
    data_dir: str | None = None,
    overwrite: bool = False,
    json: str | None = None,
) -> dict[str, Any]:
    """Builds a set, prints what is in it, and returns the report; see `faceembed.data.builders.prepare`."""
    from faceembed.data import builders

    built = builders.prepare(
        name,
        archives=archive,
        identities=identities,
        pairs_dir=pairs_dir,
        data_dir=data_dir,
        align=align,
        save_as=save_as,
        overwrite=overwrite,
    )
    print(f"{built['name']} is ready in {built['folder']}: {built['bytes'] / 1e6:.1f} MB, {built['seconds']:.0f} s.\n")
    report = info(built["name"], data_dir=data_dir)
    report |= {key: built[key] for key in ("folder", "bytes", "seconds")}
    _write(json, report)
    return report


def info(name: str, *, data_dir: str | None = None, json: str | None = None) -> dict[str, Any]:
    """Prints people, photos, how many photos people have, the split of people, and every kind of problem.

    Returns:
      {"source", "people", "photos", "photos_per_person", "splits", "problems", "fingerprint"}.
    """
    from faceembed.data import sources, splits

    photos = sources.open_source(name, data_dir=data_dir)
    count = np.bincount(photos.identity, minlength=len(photos.people))
    part = splits.split_of(photos.people)
    kinds: dict[str, list[str]] = {}
    for problem in photos.problems:
        kinds.setdefault(problem.reason.partition(":")[0], []).append(f"{problem.path}: {problem.reason}")
    report: dict[str, Any] = {
        "source": photos.source,
        "people": len(photos.people),
        "photos": len(photos),
        "photos_per_person": _histogram(count),
        "splits": {
            split: {"people": int((part == split).sum()), "photos": int(count[part == split].sum())}
            for split in splits.SHARES
        },
        "problems": [dataclasses.asdict(problem) for problem in photos.problems],
        "fingerprint": photos.fingerprint,
    }

    print(f"{photos.source}: {report['people']:,} people, {report['photos']:,} photos")
    print("\nphotos of a person      people      photos")
    for bucket in report["photos_per_person"]:
        print(f"{bucket['from_to']:>18} {bucket['people']:>11,} {bucket['photos']:>11,}")
    print("\nsplit of people         people      photos")
    for split, numbers in report["splits"].items():
        print(f"{split:>18} {numbers['people']:>11,} {numbers['photos']:>11,}")
    print(f"\n{len(photos.problems):,} problems" + (":" if kinds else ""))
    for kind, told in sorted(kinds.items(), key=lambda item: len(item[1])):
        print(f"  {len(told):,} × {kind}")
        for line in told[:3]:
            print(f"      {line}")
        if len(told) > 3:
            print(f"      and {len(told) - 3:,} more; --json FILE lists all")
    _write(json, report)
    return report


def preview(
    name: str,
    *,
    people: int = 8,
    photos: int = 8,
    size: int = 96,
    out: Path = Path("preview.png"),
    choose: Literal["random", "most"] = "random",
    seed: int = 0,
    framing: str | None = None,
    data_dir: str | None = None,
    json: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes a contact sheet of a source, prints who is on it, and returns that; see `Preview`.

    Returns:
      {"source", "framing", "fingerprint", "size", "out", "people"}; "people" is one {"name", "photos" (how many there
      are), "shown" (keys of those drawn, from left to right)} a row, from the top.
    """
    for flag, value, least in (("people", people, 1), ("photos", photos, 1), ("size", size, 16), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"--{flag} is {value}: it must be at least {least}. Try --{flag} {max(least, 8)}.")
    if out.suffix.lower() not in PICTURES:
        raise ValueError(
            f"--out is {out}: a picture ends in {', '.join(PICTURES)}. Try --out {out.with_suffix('.png')}."
        )
    from faceembed import report as reports

    if out.is_dir() or not reports.can_write(out.parent):  # told now, and not after a large source has been read
        raise ValueError(f"--out is {out}: a file cannot be written there. Name one in a folder of yours.")
    from faceembed.data import pipeline, sources

    options: dict[str, int] = {}
    if name == "synthetic":
        from faceembed.cli.train import use_compilation_cache

        use_compilation_cache()
        options = {"people": people, "photos": photos, "size": size, "seed": seed}
    source = sources.open_source(name, data_dir=data_dir, progress=progress, **options)
    if framing:
        source = sources.framed(source, framing)
    for line in sources.problem_lines(source):
        print(line)

    rows = draw_rows(source.identity, len(source.people), people, photos, choose=choose, seed=seed)
    drawn = np.sort(np.concatenate(rows))
    crops = pipeline.decode_all(sources.select(source, drawn), size, progress=progress)
    count = np.bincount(source.identity)
    shown: list[dict[str, Any]] = [
        {
            "name": _printable(source.people[source.identity[row[0]]]),
            "photos": int(count[source.identity[row[0]]]),
            "shown": [_printable(source.keys[index]) for index in row],
        }
        for row in rows
    ]
    captions = [f"{person['name']}: {_of(len(person['shown']), person['photos'])}" for person in shown]
    sheet = contact_sheet([crops[np.searchsorted(drawn, row)] for row in rows], captions)
    encoded = io.BytesIO()
    sheet.save(encoded, PICTURES[out.suffix.lower()], quality=92)
    reports.write_bytes(out, encoded.getvalue())

    for caption in captions:
        print(f"  {caption}")
    if len(rows) < people:
        print(f"{name} has {len(rows)} people; --people asked for {people}")
    print(f"written: {out}, {sheet.width} × {sheet.height} px")
    report = {
        "source": name, "framing": framing, "fingerprint": source.fingerprint, "size": size, "out": str(out),
        "people": shown,
    }  # fmt: skip
    _write(json, report)
    return report


PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Endings of files that a contact sheet can be written to, and Pillow's names of the formats."""

GAP, CAPTION = 2, 20
"""Pixels between the photos of a contact sheet, and for the line of text under a row."""


def draw_rows(
    identity: np.ndarray, people: int, rows: int, columns: int, *, choose: Literal["random", "most"], seed: int
) -> list[np.ndarray]:
    """Which photos stand where on a contact sheet.

    Args:
      identity: [n] int, ascending, the person 0..people-1 of each photo.
      people: how many there are.
      rows: people wanted; fewer where there are fewer.
      columns: photos wanted of each; fewer where a person has fewer.
      choose: "random": people with at least `columns` photos are drawn, and if they are too few, those with the most
        photos join them; rows are in the order of `people`. "most": those with the most photos come first.
      seed: of both draws; equal counts are drawn as well.

    Returns:
      For each row the photos' places in `identity`, ascending.
    """
    rng = np.random.default_rng(seed)
    count = np.bincount(identity, minlength=people)
    drawn = rng.permutation(people)
    enough = np.minimum(count, columns) if choose == "random" else count
    chosen = drawn[np.argsort(-enough[drawn], kind="stable")][:rows]
    if choose == "random":
        chosen = np.sort(chosen)
    first = np.searchsorted(identity, chosen)
    return [
        start + np.sort(rng.permutation(count[person])[:columns]) for person, start in zip(chosen, first, strict=True)
    ]


def contact_sheet(rows: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """Rows of photos, a line of text under each.

    Args:
      rows: uint8 RGB [k, s, s, 3], k may differ from row to row. Photo c of row r has its top left corner at
        x = GAP + c·(s + GAP), y = GAP + r·(s + CAPTION + GAP).
      captions: one a row; what does not fit in the width is cut off.
    """
    size = rows[0].shape[1]
    width = GAP + max(len(row) for row in rows) * (size + GAP)
    sheet = Image.new("RGB", (max(width, 160), GAP + len(rows) * (size + CAPTION + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for r, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = GAP + r * (size + CAPTION + GAP)
        for c, photo in enumerate(row):
            sheet.paste(Image.fromarray(photo), (GAP + c * (size + GAP), top))
        text = caption
        while pen.textlength(text, font) > sheet.width - 8 and len(text) > 1:
            text = text.removesuffix("…")[:-1] + "…"
        pen.text((4, top + size + 2), text, fill=(30, 30, 30), font=font)
    return sheet


def _of(shown: int, photos: int) -> str:
    if shown == photos:
        return "1 photo" if photos == 1 else f"{photos} photos"
    return f"{shown} of {photos:,} photos"


def _printable(text: str) -> str:
    """The text with a sign for what neither a terminal nor a font can show: line breaks, bytes that are no UTF-8."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(text))


def _histogram(count: np.ndarray) -> list[dict[str, Any]]:
    """How many people have 1, 2, 3-4, 5-9, … photos; [m] int → rows, empty buckets left out."""
    edges = [1, 2, 3, 5, 10, 20, 50, 100, 1000]
    bucket = np.searchsorted(edges, count, side="right") - 1
    people, photos = Counter(bucket.tolist()), np.bincount(bucket, weights=count, minlength=len(edges))
    rows = []
    for place in sorted(people):
        low, high = edges[place], edges[place + 1] - 1 if place + 1 < len(edges) else None
        name = f"{low}" if high == low else f"{low}-{high}" if high else f"{low} or more"
        rows.append({"from_to": name, "people": people[place], "photos": int(photos[place])})
    return rows


def _write(path: str | None, report: dict[str, Any]) -> None:
    if path is not None:
        from faceembed.report import write_json

        write_json(Path(path), report)

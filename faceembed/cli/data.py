"""`launch.py data prepare NAME` and `launch.py data info NAME`: build a set of photos once; what is in one."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Build a set of photos once, from its archives."""

    name: Annotated[Literal["celeba", "lfw"], tyro.conf.Positional]
    """celeba | lfw."""
    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """tar, tar.gz, zip or an unpacked folder; several for celeba. lfw is downloaded when none is given."""
    identities: str | None = None
    """celeba: identity_CelebA.txt, an image name and the person's number a line."""
    pairs_dir: str | None = None
    """lfw: folder of pairsDevTrain.txt and the like, if not beside the archive."""
    align: bool = False
    """celeba: find and align the faces in archives that are not aligned."""
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
    """celeba | lfw | synthetic | folder:PATH."""
    data_dir: str | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    json: str | None = None
    """File for the machine-readable report."""


def run(arguments: list[str]) -> None:
    """See the module."""
    commands: dict[str, Any] = {"prepare": Prepare, "info": Info}
    chosen = tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="launch.py data")
    action = prepare if isinstance(chosen, Prepare) else info
    action(**vars(chosen))


def prepare(
    name: str,
    *,
    archive: Sequence[str] = (),
    identities: str | None = None,
    pairs_dir: str | None = None,
    align: bool = False,
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
        overwrite=overwrite,
    )
    print(f"{built['name']} is ready in {built['folder']}: {built['bytes'] / 1e6:.1f} MB, {built['seconds']:.0f} s.\n")
    report = info(name, data_dir=data_dir)
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

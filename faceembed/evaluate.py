"""A checkpoint and lists of pairs → heads side by side; the end of every training, and `launch.py verify`."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from faceembed import checkpoint, embed, metrics, report
from faceembed.data import pairs as pair_lists
from faceembed.data import pipeline, sources, splits
from faceembed.verification import HEADS, EmbeddedPairs, HeadResult, Results, compare


def split_photos(photos: sources.Photos) -> dict[str, sources.Photos]:
    """The photos of train, select, calibrate and report people; nobody is in two.

    Raises:
      ValueError: if a part has nobody, or too few people with two photos to make a genuine and an impostor pair.
    """
    part = splits.split_of(photos.people)[photos.identity]
    parts = {name: sources.select(photos, part == name) for name in splits.SHARES}
    for name, chosen in parts.items():
        several = int((np.bincount(chosen.identity) > 1).sum())
        if several < 2:
            raise ValueError(
                f"{photos.source} has {len(photos.people)} people, of whom {len(chosen.people)} fall to {name!r} and "
                f"{several} of these have two photos or more; 2 are needed. Of all people 5 % select, 5 % calibrate and "
                "5 % report, so a few hundred are needed in all."
            )
    return parts


def person_hash(person: str) -> str:
    """12 hex digits that stand for a person's name in a checkpoint."""
    return hashlib.sha256(str(person).encode()).hexdigest()[:12]


def training_people(embedder: embed.Embedder, people: Sequence[str] | np.ndarray) -> list[str]:
    """Those of `people` whose names were among the checkpoint's training people."""
    known = set(embedder.data.get("people_hashes", ()))
    return [str(person) for person in people if person_hash(person) in known]


def embed_pairs(
    embedder: embed.Embedder, photos: sources.Photos, pairs: pair_lists.Pairs, *, progress: bool = True
) -> EmbeddedPairs:
    """Embeds both sides of each pair; a photo in several pairs is embedded once.

    Raises:
      ValueError: if a pair names a photo that the source does not have, or one that does not decode.
    """
    first, second = pair_lists.resolve(pairs, photos)
    used, place = np.unique(np.concatenate([first, second]), return_inverse=True)
    mask = np.zeros(len(photos), bool)
    mask[used] = True
    crops = pipeline.decode_all(sources.select(photos, mask), embedder.size, progress=progress)
    emb = embedder(crops)
    who = photos.people[photos.identity]
    one, other = place[: len(first)], place[len(first) :]
    return EmbeddedPairs(emb[one], emb[other], pairs.same, who[first], who[second])


def compare_pairs(
    embedder: embed.Embedder,
    test: EmbeddedPairs,
    *,
    fit: EmbeddedPairs | None = None,
    folds: np.ndarray | None = None,
    heads: Sequence[str] = tuple(HEADS),
) -> Results:
    """Heads on tested pairs, with a warning when tested people are among the checkpoint's training people."""
    results = compare(test.a, test.b, test.same, test.people_a, test.people_b, train=fit, folds=folds, heads=heads)
    people = np.unique(np.concatenate([test.people_a, test.people_b]))
    shared = training_people(embedder, people)
    if not shared:
        return results
    warning = (
        f"{len(shared)} of {len(people)} tested people have names that are among the training people of "
        f"{embedder.path} (such as {', '.join(shared[:3])}): the figures are not those of strangers."
    )
    return dataclasses.replace(results, warnings=(*results.warnings, warning))


def _operating_points(result: HeadResult) -> list[dict[str, Any]]:
    """Thresholds with the FMR each was set for on calibrate people; an FMR that their pairs cannot resolve has none."""
    points = []
    for point in result.tar.values():
        resolution = metrics.resolvable(point.target, point.n_impostor_train)
        if resolution:
            points.append(
                {
                    "fmr": point.target,
                    "threshold": point.threshold,
                    "impostor_pairs": point.n_impostor_train,
                    "resolution": resolution.status,
                }
            )
    return points


def final_report(run: Path, people_of: dict[str, sources.Photos], *, progress: bool = True) -> dict[str, Any]:
    """Verification of report people by the best checkpoint, heads fitted on calibrate people; prints the table.

    Writes `results.json` and `policy.json` (the heads, bound to the parameters' fingerprint) into the run directory.

    Returns:
      What `results.json` holds.
    """
    embedder = embed.load(run)
    listed = {part: pair_lists.heldout(people_of[part], part) for part in ("calibrate", "report")}
    fit, test = (embed_pairs(embedder, people_of[part], listed[part], progress=progress) for part in listed)
    results = compare_pairs(embedder, test, fit=fit)
    print(f"\nverification of {len(people_of['report'].people)} report people by {embedder.path}")
    print(f"heads fitted on {len(people_of['calibrate'].people)} calibrate people\n\n{results}\n")
    content = {"checkpoint": str(embedder.path), "source": people_of["report"].source, "results": results.to_dict()}
    report.write_json(run / "results.json", content)
    policy = {
        "fingerprint": checkpoint.fingerprint(embedder.variables),
        "fitted_on": {"source": people_of["calibrate"].source, "people": len(people_of["calibrate"].people)},
        "heads": {name: result.fitted[0].to_dict() for name, result in results.heads.items()},
        "operating_points": {name: _operating_points(result) for name, result in results.heads.items()},
    }
    report.write_json(run / "policy.json", policy)
    return content

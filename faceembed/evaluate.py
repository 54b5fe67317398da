"""A checkpoint and lists of pairs → heads side by side; the end of every training, and `launch.py verify`."""

import dataclasses
import hashlib
import importlib.metadata
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import faceembed
from faceembed import checkpoint, embed, page, report
from faceembed.data import crops, pipeline, sources, splits
from faceembed.data import pairs as pair_lists
from faceembed.identification import policy
from faceembed.verification import EmbeddedPairs, Head, HeadResult, Results, compare, dense
from faceembed.verification.dense import DenseResults
from faceembed.verification.heads import layers_of
from faceembed.verification.slices import Slice

CHUNK = 4096
"""Photos decoded at once: bounds memory whatever the size of the source."""

SHOWN = 12
"""Of the hardest genuine pairs, and of the hardest impostor pairs, as many are in a report."""


def split_photos(photos: sources.Photos) -> dict[str, sources.Photos]:
    """The photos of train, select, calibrate and report people; nobody is in two.

    Raises:
      ValueError: if a part has nobody, or too few people with two photos to make a genuine and an impostor pair.
    """
    part = splits.split_of(photos.people)
    parts = {name: sources.select(photos, (part == name)[photos.identity]) for name in splits.SHARES}
    for name, chosen in parts.items():
        several = int((np.bincount(chosen.identity) > 1).sum())
        if several < 2:
            raise ValueError(
                f"{photos.source} has {len(photos.people)} people, of whom {len(chosen.people)} fall to {name!r} and "
                f"{several} of these have two photos or more; 2 are needed. Of all people 5 % select, 5 % calibrate and "
                "5 % report, so a few hundred are needed in all."
            )
    return parts


def leave_out_bad(
    people_of: Mapping[str, sources.Photos], limit: int, *, progress: bool = True
) -> tuple[dict[str, sources.Photos], list[str]]:
    """The parts without the photos of held-out people that do not decode: what is compared is drawn from the others.

    Nothing stands in for them, as it does in training: a pair of another photo would be another pair. Looked at is what
    `_Select` and `final_report` compare, which is some thousands of ten million photos.

    Args:
      people_of: as `split_photos` gives them; photos that are aligned as they are read may be given before that.
      limit: more such photos than this are an error.
      progress: show bars.

    Returns:
      (the parts, the keys of what was left out); these are printed with what is wrong with them.

    Raises:
      ValueError: they are too many, or a part without them makes no pairs.
    """
    kept, bad = dict(people_of), dict[str, str]()
    drawn = kept["select"].source == "synthetic"  # nothing to read, and slow to draw
    for part in () if drawn else ("select", "calibrate", "report"):
        while failed := pipeline.undecodable(_compared(kept[part], part), progress=progress):
            bad |= failed
            if len(bad) > limit:
                raise ValueError(
                    f"{len(bad)} photos of {kept[part].source}, of people who are held out, do not decode, more than "
                    f"--skip-bad-photos {limit}:{pipeline.listed(list(bad.values()))}\n"
                    "Bring them back; or give a larger --skip-bad-photos, and they are left out of what is compared."
                )
            good = np.ones(len(kept[part]), bool)
            good[list(sources.located(failed, kept[part]).values())] = False
            kept[part] = sources.select(kept[part], good)
    if bad:
        print(f"photos of held-out people that do not decode, and are left out:{pipeline.listed(list(bad.values()))}")
    return kept, list(bad)


def _compared(photos: sources.Photos, part: str) -> sources.Photos:
    """Those of a part that are in pairs or, of calibrate and report people, compared all with all."""
    chosen = pair_lists.used(pair_lists.heldout(photos, part), photos)
    return sources.select(photos, chosen if part == "select" else chosen | _within_bounds(photos))


def person_hash(person: str) -> str:
    """12 hex digits that stand for a person's name in a checkpoint."""
    return hashlib.sha256(str(person).encode()).hexdigest()[:12]


def training_people(embedder: embed.Embedder, people: Sequence[str] | np.ndarray) -> list[str]:
    """Those of `people` whose names were among the checkpoint's training people."""
    known = set(embedder.data.get("people_hashes", ()))
    return [str(person) for person in people if person_hash(person) in known]


def embed_photos(
    embedder: embed.Embedder,
    photos: sources.Photos,
    *,
    layers: Sequence[str] = (),
    batch: int = 256,
    progress: bool = True,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Embeddings [n, d] of photos, and the features [n, k] of the layers named.

    Raises:
      ValueError: if a photo does not decode, or the encoder has no such layer.
    """
    photos = crops.framed_for(photos, embedder.preprocess)
    embeddings, features = [], []
    with sources.progress_bar(None, len(photos), "embedding", shown=progress) as bar:
        for start in range(0, len(photos), CHUNK):
            chunk = sources.select(photos, np.arange(start, min(start + CHUNK, len(photos))))
            images = pipeline.decode_all(chunk, embedder.size, progress=False)
            embeddings.append(embedder(images, batch))
            if layers:
                features.append(embedder.layers(images, layers, batch))
            bar.update(len(images))
    return np.concatenate(embeddings), {name: np.concatenate([part[name] for part in features]) for name in layers}


def embed_pairs(
    embedder: embed.Embedder,
    photos: sources.Photos,
    pairs: pair_lists.Pairs,
    *,
    layers: Sequence[str] = (),
    progress: bool = True,
) -> EmbeddedPairs:
    """Embeds both sides of each pair; a photo in several pairs is embedded once.

    Raises:
      ValueError: if a pair names a photo that the source does not have, or one that does not decode.
    """
    first, second = pair_lists.resolve(pairs, photos)
    used, place = np.unique(np.concatenate([first, second]), return_inverse=True)
    emb, inner = embed_photos(embedder, sources.select(photos, used), layers=layers, progress=progress)
    who = photos.people[photos.identity]
    one, other = place[: len(first)], place[len(first) :]
    features = {name: (value[one], value[other]) for name, value in inner.items()}
    return EmbeddedPairs(emb[one], emb[other], pairs.same, who[first], who[second], features)


def bounded(photos: sources.Photos, *, most: int = 15_000, each: int = 50) -> sources.Photos:
    """Few enough photos to compare all with all: at most `each` of a person, of people in the order of their hashes.

    15,000 photos are 112 million pairs: seconds a head. A set's every twentieth person can be a hundred times that.
    """
    return sources.select(photos, _within_bounds(photos, most=most, each=each))


def _within_bounds(photos: sources.Photos, *, most: int = 15_000, each: int = 50) -> np.ndarray:
    """[n] bool, which photos `bounded` takes."""
    place = np.arange(len(photos)) - np.searchsorted(photos.identity, photos.identity)
    kept = place < each
    count = np.bincount(photos.identity[kept], minlength=len(photos.people))
    order = sorted(range(len(photos.people)), key=lambda person: person_hash(str(photos.people[person])))
    inside = np.zeros(len(photos.people), bool)
    inside[[person for person, total in zip(order, np.cumsum(count[order]), strict=True) if total <= most]] = True
    return kept & inside[photos.identity]


def compare_photos(
    embedder: embed.Embedder,
    photos: sources.Photos,
    heads: Mapping[str, Head],
    *,
    thresholds: Mapping[str, Mapping[float, float]] | None = None,
    progress: bool = True,
    **options: Any,
) -> DenseResults:
    """Every photo against every other, by fitted heads; `options` are those of `verification.compare_all`.

    Raises:
      ValueError: as `embed_photos` and `verification.compare_all`.
    """
    emb, layers = embed_photos(embedder, photos, layers=layers_of(heads), progress=progress)
    who = photos.people[photos.identity]
    return dense.compare_all(emb, who, heads, thresholds=thresholds, layers=layers, **options)


def thresholds_of(results: DenseResults) -> dict[str, dict[float, float]]:
    """Head → FMR → threshold, for the FMRs that these photos resolve."""
    return {
        name: {fmr: point.threshold for fmr, point in head.tar.items() if point.resolution}
        for name, head in results.heads.items()
    }


def compare_pairs(
    embedder: embed.Embedder,
    test: EmbeddedPairs,
    *,
    fit: EmbeddedPairs | None = None,
    folds: np.ndarray | None = None,
    **options: Any,
) -> Results:
    """Heads on tested pairs, with a warning when tested people are among the checkpoint's training people.

    `options` are those of `verification.compare`.
    """
    results = compare(
        test.a, test.b, test.same, test.people_a, test.people_b, train=fit, folds=folds, layers=test.layers, **options
    )
    warning = trained_on(embedder, np.unique(np.concatenate([test.people_a, test.people_b])))
    return dataclasses.replace(results, warnings=(*results.warnings, *warning))


def lineage(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a checkpoint was trained on, then what the one that it started from was, and so on to the first."""
    found = [data]
    while before := found[-1].get("init"):
        found.append(before)
    return found


def saw_lfw(data: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, or one before it, was trained on LFW's photos."""
    return any(part.get("source") in ("lfw", "celeba_lfw") for part in lineage(data))


def trained_on(embedder: embed.Embedder, people: np.ndarray) -> tuple[str, ...]:
    """A warning if some of these people are among those that the checkpoint, or one before it, was trained on."""
    if any(part.get("people") == 0 for part in lineage(embedder.data)):
        return (f"{embedder.path} does not say whom it was trained on: tested people may be among them.",)
    shared = training_people(embedder, people)
    if not shared:
        return ()
    return (
        f"{len(shared)} of {len(people)} tested people have names that are among the training people of "
        f"{embedder.path} (such as {', '.join(shared[:3])}): the figures are not those of strangers.",
    )


POLICY_FMRS = (0.1, 0.01, 0.001, 0.0001, 0.00001)
"""For which a checkpoint's policy holds thresholds, as far as the calibrate people resolve them."""


def make_policy(
    embedder: embed.Embedder,
    photos: sources.Photos,
    heads: Mapping[str, Head],
    calibrated: DenseResults,
    searching: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """What `policy.json` holds, for these parameters: fitted heads, the thresholds that all pairs of `photos` set for false
    match rates, and those that searches of everybody among all others set for identification.

    Args:
      embedder: whose policy it is.
      photos: of calibrate people.
      heads, calibrated: fitted on them, and compared on all their pairs.
      searching: embeddings [n, d] and identity [n] of such people's photos.
    """
    return {
        "fingerprint": checkpoint.fingerprint(embedder.variables),
        "fitted_on": {"source": photos.source, "people": len(photos.people)},
        "heads": {name: head.to_dict() for name, head in heads.items()},
        "operating_points": {name: _operating_points(calibrated, name) for name in heads},
        "identification": policy.thresholds(*searching),
    }


def _operating_points(results: DenseResults, name: str) -> list[dict[str, Any]]:
    """A head's thresholds with the FMR each was set for; an FMR that the photos cannot resolve has none."""
    return [
        {
            "fmr": point.fmr,
            "threshold": point.threshold,
            "threshold_interval": [point.threshold_low, point.threshold_high],
            "impostor_pairs": results.n_impostor,
            "people": results.n_people,
            "resolution": point.resolution.status,
        }
        for point in results[name].tar.values()
        if point.resolution
    ]


def hardest(
    margin: np.ndarray, same: np.ndarray, people_a: np.ndarray, people_b: np.ndarray, *, most: int = SHOWN
) -> np.ndarray:
    """Pairs furthest on the wrong side of their threshold, or nearest to it, so varied that nobody comes twice.

    Args:
      margin: [n] score minus threshold.
      same: [n] bool.
      people_a, people_b: [n] ids.
      most: pairs of each kind.

    Returns:
      [m] int: genuine pairs from the lowest margin up, then impostor pairs from the highest down; in each kind a person
      is in one pair at most.
    """
    chosen: list[int] = []
    for genuine in (True, False):
        order = np.argsort(margin if genuine else -margin, kind="stable")
        seen: set[Any] = set()
        kept: list[int] = []
        for i in order[same[order] == genuine]:
            people = {people_a[i], people_b[i]}
            if len(kept) < most and not seen & people:
                kept.append(int(i))
                seen |= people
        chosen += kept
    return np.array(chosen, np.int64)


def hardest_pairs(
    result: HeadResult, pairs: pair_lists.Pairs, photos: sources.Photos, *, size: int, progress: bool = True
) -> list[page.Pair]:
    """The pairs of a list that a head finds hardest, with their crops, which are read again: no others are kept in memory.

    Args:
      result: of these pairs, in their order.
      pairs, photos: what was compared.
      size: side of the crops, pixels.
      progress: show a bar.
    """
    first, second = pair_lists.resolve(pairs, photos)
    who = photos.people[photos.identity]
    chosen = hardest(result.scores - result.cuts, pairs.same, who[first], who[second])
    accepted = result.scores >= result.cuts
    return _with_crops(
        photos, first[chosen], second[chosen], result.scores[chosen], accepted[chosen], size=size, progress=progress
    )


def hardest_of_all(
    results: DenseResults, name: str, photos: sources.Photos, *, size: int, progress: bool = True
) -> list[page.Pair]:
    """Of all pairs of photos the genuine ones with the lowest scores and the impostor ones with the highest, with crops.

    Whether they were accepted is told at the strictest FMR that these photos resolve.
    """
    head = results[name]
    first, second, score = (
        np.array(column) for column in zip(*head.false_non_matches, *head.false_matches, strict=True)
    )
    who = photos.people[photos.identity]
    chosen = hardest(score, who[first] == who[second], who[first], who[second])
    first, second, score = first[chosen], second[chosen], score[chosen]
    point = min((p for p in head.tar.values() if p.resolution), key=lambda p: p.fmr, default=None)
    cut = point.threshold if point else np.inf
    return _with_crops(photos, first, second, score, score >= cut, size=size, progress=progress)


def _with_crops(
    photos: sources.Photos,
    first: np.ndarray,
    second: np.ndarray,
    scores: np.ndarray,
    accepted: np.ndarray,
    *,
    size: int,
    progress: bool,
) -> list[page.Pair]:
    used = np.unique(np.concatenate([first, second]))
    images = pipeline.decode_all(sources.select(photos, used), size, progress=progress)
    who = photos.people[photos.identity]
    return [
        page.Pair(
            same=bool(who[i] == who[j]),
            accepted=bool(yes),
            score=float(score),
            crops=(images[np.searchsorted(used, i)], images[np.searchsorted(used, j)]),
            people=(str(who[i]), str(who[j])),
            photos=(str(photos.keys[i]), str(photos.keys[j])),
        )
        for i, j, score, yes in zip(first, second, scores, accepted, strict=True)
    ]


def make_page(
    embedder: embed.Embedder,
    photos: sources.Photos,
    *,
    title: str,
    tested: str,
    commands: Mapping[str, str],
    results: Results | None = None,
    pairs: pair_lists.Pairs | None = None,
    everyone: DenseResults | None = None,
    slices: Sequence[Slice] = (),
    warnings: Sequence[str] = (),
    run: Path | None = None,
    progress: bool = True,
) -> page.Page:
    """What `report.html` shows of a verification.

    Args:
      embedder: what was tested.
      photos: what was compared.
      title, tested, commands: see `page.Page`.
      results, pairs: of a list of pairs, in its order; both or neither.
      everyone: of all photos against each other.
      slices: of the list, by the head of `page.headline`.
      warnings: shown beside those of the results.
      run: the run directory whose training curves, events and versions are shown, too.
      progress: show a bar.
    """
    trained = {
        name: embedder.data.get(name) for name in ("source", "people", "photos", "problems", "step", "fingerprint")
    }
    pre = embedder.config.preprocess
    facts: dict[str, dict[str, Any]] = {
        "Trained on": trained,
        "Tested on": {"source": photos.source, "photos": len(photos), "fingerprint": photos.fingerprint},
        "How photos are read": {
            "template": pre.template,
            "size": pre.size,
            "mean, scale": f"{pre.mean}, {pre.scale:g}",
            "colour": pre.colour,
            "flip": pre.flip,
            "detector": str(photos.tally) if photos.tally else "none: photos are taken as they are framed",
        },
        "Versions": {
            # A clone that was never installed has no metadata of its own.
            "faceembed": faceembed.__version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "scikit-learn")},
        },
    }
    environment = run / "environment.json" if run else None
    if environment and environment.exists():
        facts["Versions and processor of the training"] = json.loads(environment.read_text())
    if results is not None and pairs is not None:
        head = results[page.headline(results)]
        hard = hardest_pairs(head, pairs, photos, size=embedder.size, progress=progress)
    elif everyone is not None:
        hard = hardest_of_all(everyone, page.headline(everyone), photos, size=embedder.size, progress=progress)
    else:
        hard = []
    listed = {} if results is None else results.to_dict()
    dense = {} if everyone is None else everyone.to_dict()
    return page.Page(
        title=title,
        tested=tested,
        results=listed,
        scores={} if results is None else {name: result.scores for name, result in results.heads.items()},
        same=np.zeros(0, bool) if pairs is None else pairs.same,
        everyone=dense,
        slices=[part.row() for part in slices],
        warnings=warnings,
        hardest=hard,
        rows=_json_lines(run / "metrics.jsonl") if run else (),
        events=_json_lines(run / "events.jsonl") if run else (),
        settings=page.settings(embedder.config),
        facts=facts,
        commands=commands,
    )


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a log; none where a run of an older version has no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def final_report(
    run: Path, people_of: Mapping[str, sources.Photos], *, bad_photos: Sequence[str] = (), skip_bad_photos: int = 0,
    progress: bool = True, command: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Verification of report people by the best checkpoint, heads fitted on calibrate people; prints the table.

    Writes `results.json`, `policy.json` (the heads, bound to the parameters' fingerprint) and `report.html` into the run
    directory.

    Args:
      run: the run directory.
      people_of: photos of the people of each part, as `split_photos` gives them.
      bad_photos: keys of those that did not decode in training, where others stood in for them.
      skip_bad_photos: as many photos of held-out people may not decode and be left out.
      progress: show progress bars.
      command: what was typed to train, for the report.

    Returns:
      What `results.json` holds.
    """
    embedder = embed.load(run)
    people_of, left_out = leave_out_bad(people_of, skip_bad_photos, progress=progress)
    people_of = {part: crops.framed_for(photos, embedder.preprocess) for part, photos in people_of.items()}
    listed = {part: pair_lists.heldout(people_of[part], part) for part in ("calibrate", "report")}
    fit, test = (embed_pairs(embedder, people_of[part], listed[part], progress=progress) for part in listed)
    results = compare_pairs(embedder, test, fit=fit)
    print(f"\nverification of {len(people_of['report'].people)} report people by {embedder.path}")
    print(f"heads fitted on {len(people_of['calibrate'].people)} calibrate people\n\n{results}\n")
    heads = {name: result.fitted[0] for name, result in results.heads.items()}
    some = {part: bounded(people_of[part]) for part in ("calibrate", "report")}
    emb, layers = embed_photos(embedder, some["calibrate"], layers=layers_of(heads), progress=progress)
    who = some["calibrate"].people[some["calibrate"].identity]
    calibrated = dense.compare_all(emb, who, heads, fmrs=POLICY_FMRS, layers=layers)
    everyone = compare_photos(embedder, some["report"], heads, thresholds=thresholds_of(calibrated), progress=progress)
    if len(some["report"]) < len(people_of["report"]):
        print(f"of {len(people_of['report']):,} photos {len(some['report']):,}: at most 50 of a person, 15,000 in all")
    print(f"{everyone.summary}\n")
    if bad_photos:
        print(
            f"{len(bad_photos)} photos did not decode in training; others stood in for them: {', '.join(bad_photos)}\n"
        )
    content = {
        "schema": report.SCHEMA,
        "checkpoint": str(embedder.path),
        "source": people_of["report"].source,
        "bad_photos": list(bad_photos),
        "left_out_photos": left_out,
        "results": results.to_dict(),
        "all_pairs": everyone.to_dict(),
    }
    report.write_json(run / "results.json", content)
    searching = (emb, some["calibrate"].identity)
    report.write_json(run / "policy.json", make_policy(embedder, people_of["calibrate"], heads, calibrated, searching))
    photos = people_of["report"]
    again = ["python", "launch.py", "verify", str(run), "--pairs", f"heldout:{photos.source}"]
    if embedder.config.data.data_dir:
        again += ["--data-dir", embedder.config.data.data_dir]
    commands = {"Train again": command} if command else {}
    commands["Verify again"] = shlex.join(again)
    warnings = []
    if left_out:
        warnings.append(
            f"{len(left_out)} photos of held-out people do not decode and are left out of what is compared: "
            f"{', '.join(left_out)}"
        )
    shown = make_page(
        embedder, photos, results=results, pairs=listed["report"], everyone=everyone, title=run.name or str(run),
        commands=commands, run=run, progress=progress, warnings=warnings,
        tested=f"{len(photos.people)} people of {photos.source} who were set aside: neither the training, nor the choice "
        f"of the checkpoint (step {embedder.path.name} of {embedder.config.steps}), nor a head or threshold has seen them. "
        f"Heads were fitted on {len(people_of['calibrate'].people)} others.",
    )  # fmt: skip
    page.write_page(run / "report.html", shown)
    print(f"report: {run / 'report.html'}")
    return content

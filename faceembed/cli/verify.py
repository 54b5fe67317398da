"""`launch.py verify CHECKPOINT --pairs PAIRS`: heads against the threshold, fitted on one list and tested on another."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from faceembed.cli.embed import load, synthetic_options

if TYPE_CHECKING:
    from faceembed.data.pairs import Pairs
    from faceembed.data.sources import Photos
    from faceembed.embed import Embedder

SPLITS = ("train", "select", "calibrate", "report")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compares verification heads on pairs of photos. Heads are fitted on other pairs than those tested."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run directory (its best step is taken) or a step directory."""
    pairs: str
    """Tested pairs: lfw:view1_train | lfw:view1_test | lfw:view2 | csv:FILE | bin:FILE (InsightFace) | heldout:SOURCE |
    hard:FILE.npz@heldout:SOURCE (nearest impostors by another encoder's `launch.py embed` file; or @lfw:dev_test).
    Every photo against every other: all:lfw:dev_test | all:heldout:SOURCE | all:SOURCE."""
    fit: str | None = None
    """Pairs that heads are fitted on, named likewise, or SOURCE:calibrate (train, select, report) for those people of a
    source. When not given: view1_train for view1_test, dev_test and hard pairs of it, the other nine folds for view2,
    calibrate people for heldout:SOURCE (which tests report people), and the folds of a csv or bin."""
    framing: Literal["celeba", "lfw"] | None = None
    """csv:FILE and heldout:folder:PATH: the photos are framed like CelebA's aligned ones or like deep-funneled LFW, at
    any size. When not given, they are cropped tightly already: the largest centred square is taken."""
    heads: tuple[str, ...] = ("threshold", "logistic_distance", "logistic_abs")
    """Which heads, or `all`; HEAD@LAYER reads an inner layer of the encoder, such as logistic_chi2@features."""
    primary: str = "accuracy"
    """What heads are compared by, declared before looking: accuracy | auc | tar@FAR."""
    fars: tuple[float, ...] | None = None
    """False accept rates. When not given: 0.1 0.01 0.001 for lists, 0.01 0.001 0.0001 for all pairs."""
    draws: int = 1000
    """Draws of people for bands, and for the intervals of all pairs."""
    refit: int = 0
    """Fit heads again on N draws of training people, and add how figures vary to the intervals. 0: heads are given."""
    slices: Path | None = None
    """A csv with a column `key` or `person` and columns of attributes: error rates for each of their values."""
    clusters: int = 0
    """Error rates within so many clusters of photos that look alike to the encoder."""
    allow_missing: bool = False
    """Leave out photos that are not there or do not decode, and their pairs, and say how many, instead of ending."""
    allow_shared: bool = False
    """Go on, with a warning, where tested people are among those that heads are fitted on, or folds share people."""
    parity: bool = False
    """Print what the field's own scripts (facenet, InsightFace) would print for the same embeddings, beside ours."""
    out: Path | None = None
    """Folder for results.json and report.html, a page with plots and the hardest pairs; made when missing."""
    data_dir: Path | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    json: Path | None = None
    """Write the results there too."""
    progress: bool = True
    """Show progress bars."""


@dataclasses.dataclass(frozen=True)
class _Listed:
    """What a name stands for: photos, and pairs of them unless every photo meets every other."""

    photos: "Photos"
    pairs: "Pairs | None"
    lost: tuple[int, int] = (0, 0)
    """Genuine and impostor pairs that were left out, their photos missing or broken."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py verify")
    from faceembed import report
    from faceembed.data import pipeline
    from faceembed.verification import HEADS
    from faceembed.verification.heads import named

    heads = tuple(HEADS) if options.heads == ("all",) else options.heads
    for name in heads:
        named(name)
    everyone = options.pairs.startswith("all:")
    fit_spec = options.fit or _usual_fit(options.pairs)
    # What is wrong with the lists is told before JAX is imported; only synthetic photos depend on the checkpoint.
    drawn = any("synthetic" in (spec or "").split(":") for spec in (options.pairs, fit_spec))
    embedder = load(options.checkpoint) if drawn else None
    test = _listed(options.pairs, "report", options, embedder)
    fit = None
    if fit_spec:
        fit = _listed(fit_spec, "calibrate" if fit_spec.startswith("heldout:") else "report", options, embedder)
        if fit.pairs is None:
            raise ValueError(f"--fit {fit_spec}: heads are fitted on lists of pairs. Try --fit lfw:view1_train.")
    elif everyone or (test.pairs is not None and test.pairs.fold is None):
        raise ValueError(
            f"{options.pairs} has no folds, so nothing is left to fit heads on. Name other pairs: --fit lfw:view1_train, "
            "--fit heldout:SOURCE, or give a csv a column `fold`."
        )
    _tell(test, fit, options)

    started = time.perf_counter()
    embedder = embedder or load(options.checkpoint)
    if options.pairs == "lfw:view2":
        _refuse_lfw(embedder)
    if options.allow_missing:
        test, fit = _decodable(test, options), fit and _decodable(fit, options)
    unframed = [part for part in (test, fit) if part]
    test, fit = _framed(test, embedder), fit and _framed(fit, embedder)
    do = _everyone if everyone else _pairs
    try:
        content, page_of = do(embedder, test, fit, heads, fit_spec, options)
    except pipeline.Undecodable as error:
        if options.allow_missing:
            raise
        # The error names those that were to be embedded together; somebody is about to bring all of them back.
        told = [_told(part.photos, bad) for part in unframed if (bad := _undecodable(part, options))] or [str(error)]
        hint = "Bring them back; or go on without them and their pairs: --allow-missing."
        raise ValueError("\n".join([*told, hint])) from error
    print(f"\n{time.perf_counter() - started:.1f} s")
    # By what they are for: the tested photos and those that heads are fitted on are often of one source.
    parts = {"tested": test, "fitted on": fit}
    found = {name: part.photos.tally for name, part in parts.items() if part and part.photos.tally}
    for line in (f"{name}: {tally}" for name, tally in found.items()):
        print(line)
    content = {
        "schema": report.SCHEMA,
        "checkpoint": str(embedder.path),
        "pairs": options.pairs,
        "fit": fit_spec or "other folds",
        "framing": options.framing,
        "alignment": {name: tally.to_dict() for name, tally in found.items()},
        "lost": list(test.lost),
        "fit_lost": list(fit.lost) if fit else [0, 0],
        "trained_on": {name: embedder.data.get(name) for name in ("source", "fingerprint", "people", "photos", "step")},
        **content,
    }
    targets = [options.json] if options.json else []
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        targets.append(options.out / "results.json")
    for target in targets:
        report.write_json(target, content)
        print(f"written: {target}")
    if options.out:
        from faceembed import evaluate, page

        again = {"Verify again": shlex.join(["python", "launch.py", "verify", *arguments])}
        shown = evaluate.make_page(
            embedder, test.photos, title=options.pairs, progress=options.progress, commands=again,
            tested=f"The checkpoint {embedder.path}; heads fitted on {fit_spec or 'the other folds'}.", **page_of,
        )  # fmt: skip
        page.write_page(options.out / "report.html", shown)
        print(f"report: {options.out / 'report.html'}")


def _listed(spec: str, split: str, options: Options, embedder: "Embedder | None") -> _Listed:
    from faceembed.data import pairs as pair_lists
    from faceembed.data import sources

    source, _, part = spec.rpartition(":")
    if part in SPLITS and source and not spec.startswith(("lfw:view", "heldout:", "all:", "hard:", "csv:", "bin:")):
        spec, split = f"heldout:{source}", part
    drawn = synthetic_options(embedder) if embedder and "synthetic" in spec.split(":") else {}
    shared: dict[str, Any] = {"data_dir": options.data_dir, "split": split, "progress": options.progress, **drawn}
    if spec.startswith("all:"):
        photos, pairs = pair_lists.load_people(spec, allow_missing=options.allow_missing, **shared), None
    else:
        pairs, photos = pair_lists.load_pairs(spec, allow_missing=options.allow_missing, **shared)
    if options.framing and photos.source.startswith(sources.UNFRAMED):
        photos = sources.framed(photos, options.framing)
    return _Listed(photos, pairs, (0, 0) if pairs is None else pairs.lost)


def _refuse_lfw(embedder: "Embedder") -> None:
    from faceembed import evaluate

    if evaluate.saw_lfw(embedder.data):
        raise ValueError(
            f"{embedder.path} was trained on LFW images, and View 2's people are LFW's: its figure would not be one of "
            "strangers. Use a checkpoint trained on other photos, such as python launch.py train celeba."
        )


def _framed(part: _Listed, embedder: "Embedder") -> _Listed:
    from faceembed.data import crops

    return dataclasses.replace(part, photos=crops.framed_for(part.photos, embedder.preprocess))


def _undecodable(part: _Listed, options: Options) -> dict[str, str]:
    """Key → what is wrong, of the photos that are compared and do not decode."""
    from faceembed.data import pairs as pair_lists
    from faceembed.data import pipeline, sources

    photos, pairs = part.photos, part.pairs
    if photos.source == "synthetic":  # nothing to read, and slow to draw
        return {}
    asked = photos if pairs is None else sources.select(photos, pair_lists.used(pairs, photos))
    return pipeline.undecodable(asked, progress=options.progress)


def _told(photos: "Photos", bad: dict[str, str], after: str = "") -> str:
    from faceembed.data import pipeline

    what = "1 photo" if len(bad) == 1 else f"{len(bad):,} photos"
    return f"{what} of {photos.source} that cannot be decoded{after}:{pipeline.listed(list(bad.values()))}"


def _decodable(part: _Listed, options: Options) -> _Listed:
    """Without the photos that do not decode, which are named."""
    import numpy as np

    from faceembed.data import pairs as pair_lists
    from faceembed.data import sources

    bad = _undecodable(part, options)
    if not bad:
        return part
    print(_told(part.photos, bad, ", left out"))
    photos = sources.select(part.photos, ~np.isin(part.photos.keys, list(bad)))
    if part.pairs is not None:
        pairs = pair_lists.present(part.pairs, photos, allow_missing=True)
        return _Listed(photos, pairs, pairs.lost)
    # Of all pairs there is no list.
    before, after = (pair_lists.number_of_pairs(np.bincount(of.identity)) for of in (part.photos, photos))
    return _Listed(photos, None, (before[0] - after[0], before[1] - after[1]))


def _lost(test: _Listed, fit: _Listed | None) -> list[str]:
    """Warnings of pairs that were left out."""
    of = {"": test.lost, "that heads are fitted on ": fit.lost if fit else (0, 0)}
    return [
        f"{genuine:,} genuine and {impostor:,} impostor pairs {which}were left out: photos of theirs are missing or broken."
        for which, (genuine, impostor) in of.items()
        if genuine or impostor
    ]


def _tell(test: _Listed, fit: _Listed | None, options: Options) -> None:
    """What is odd about the photos, and a framing that suits none of them."""
    from faceembed.data import sources

    opened = {part.photos.source: part.photos for part in (test, fit) if part is not None}
    if options.framing and not any(source.startswith(sources.UNFRAMED) for source in opened):
        sources.framed(test.photos, options.framing)  # raises
    for photos in opened.values():
        for line in sources.problem_lines(photos):
            print(line)


def _pairs(
    embedder: "Embedder",
    test: _Listed,
    fit: _Listed | None,
    heads: tuple[str, ...],
    fit_spec: str | None,
    options: Options,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A list of pairs: what results.json holds of it, and what `make_page` takes."""
    from faceembed import evaluate, page, report
    from faceembed.data import pairs as pair_lists
    from faceembed.verification import by_cluster, slice_report
    from faceembed.verification.heads import layers_of
    from faceembed.verification.parity import parity

    assert test.pairs is not None
    layers = layers_of(heads)
    tested = evaluate.embed_pairs(embedder, test.photos, test.pairs, layers=layers, progress=options.progress)
    fitted = None
    if fit is not None and fit.pairs is not None:
        fitted = evaluate.embed_pairs(embedder, fit.photos, fit.pairs, layers=layers, progress=options.progress)
    more: dict[str, Any] = {} if options.fars is None else {"fars": options.fars}
    results = evaluate.compare_pairs(
        embedder, tested, fit=fitted, folds=test.pairs.fold if fitted is None else None, heads=heads,
        primary=options.primary, draws=options.draws, refit=options.refit, allow_shared=options.allow_shared, **more,
    )  # fmt: skip
    warnings = list(results.warnings)
    warnings += _lost(test, fit)
    if not test.photos.named and options.pairs.startswith(("bin:", "csv:")):
        warnings.append(
            "the list names no people: nobody could check that none was trained on. A csv's columns person_a and person_b "
            "name them."
        )
    elif not test.photos.named and test.photos.source != embedder.data.get("source"):
        warnings.append(
            f"{test.photos.source} has labels and no names: nobody could check that none of its people was trained on as "
            "another source's."
        )
    results = dataclasses.replace(results, warnings=tuple(warnings))
    print(f"{options.pairs} by {embedder.path}, heads fitted on {fit_spec or 'the other folds'}\n\n{results}")
    masks: dict[str, Any] = {}
    if options.slices:
        masks |= pair_lists.slices(test.pairs, test.photos, pair_lists.read_metadata(options.slices))
    if options.clusters:
        masks |= by_cluster(tested, options.clusters)
    slices = []
    if masks:
        head = page.headline(results)
        slices = slice_report(results[head], tested.same, masks, tested.people_a, tested.people_b)
        print(
            f"\nby {head}, at the thresholds that decided all pairs:\n{report.table([part.row() for part in slices])}"
        )
    content: dict[str, Any] = {"results": results.to_dict(), "slices": report.jsonable(slices)}
    if options.parity:
        theirs = parity(tested.a, tested.b, tested.same)
        print(f"\n{theirs}")
        content["parity"] = theirs.to_dict()
    return content, {"results": results, "pairs": test.pairs, "slices": slices}


def _everyone(
    embedder: "Embedder",
    test: _Listed,
    fit: _Listed | None,
    heads: tuple[str, ...],
    fit_spec: str | None,
    options: Options,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every photo against every other: what results.json holds of it, and what `make_page` takes."""
    from faceembed import evaluate
    from faceembed.data import pairs as pair_lists
    from faceembed.data import sources
    from faceembed.verification.heads import fit_pairs, layers_of

    for flag in ("refit", "slices", "clusters", "parity"):
        if getattr(options, flag):
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} is for lists of pairs, and {options.pairs} is all pairs. Leave it out.")
    assert fit is not None
    assert fit.pairs is not None
    pairs = evaluate.embed_pairs(embedder, fit.photos, fit.pairs, layers=layers_of(heads), progress=options.progress)
    fitted = {name: fit_pairs(name, pairs) for name in heads}
    # Thresholds for small rates need more comparisons than the list has: all pairs of the photos that it names.
    used = sources.select(fit.photos, pair_lists.used(fit.pairs, fit.photos))
    fars: dict[str, Any] = {} if options.fars is None else {"fmrs": options.fars}
    own = evaluate.compare_photos(embedder, used, fitted, progress=options.progress, draws=100, **fars)
    results = evaluate.compare_photos(
        embedder, test.photos, fitted, thresholds=evaluate.thresholds_of(own), draws=options.draws,
        progress=options.progress, **fars,
    )  # fmt: skip
    warnings = [*evaluate.trained_on(embedder, test.photos.people), *_lost(test, fit)]
    both = sorted(set(map(str, used.people)) & set(map(str, test.photos.people)))
    if both and used.source == test.photos.source:
        leak = f"{len(both)} tested people are among those the heads were fitted on, such as {both[0]}"
        if not options.allow_shared:
            raise ValueError(f"{leak}. Name other pairs: --fit; or go on with a warning: --allow-shared.")
        warnings.append(f"{leak}: the figures flatter the heads.")
    print(
        f"{options.pairs} by {embedder.path}; heads fitted on {fit_spec}, thresholds set on all pairs of its photos\n"
    )
    print(results)
    for warning in warnings:
        print(f"WARNING: {warning}")
    content = {"all_pairs": results.to_dict(), "warnings": warnings}
    return content, {"everyone": results, "warnings": warnings}


def _usual_fit(pairs: str) -> str | None:
    """What heads are fitted on unless told."""
    if pairs == "lfw:view1_test" or pairs.endswith(("all:lfw:dev_test", "@lfw:dev_test")):
        return "lfw:view1_train"
    for kind in ("all:", "hard:"):
        if pairs.startswith(kind):
            _, at, source = pairs.partition("heldout:")
            return f"heldout:{source}" if at else None
    return pairs if pairs.startswith("heldout:") else None

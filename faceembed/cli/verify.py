"""`launch.py verify CHECKPOINT --pairs PAIRS`: heads against the threshold, fitted on one list and tested on another."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from faceembed.cli.embed import load, synthetic_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compares verification heads on pairs of photos. Heads are fitted on other pairs than those tested."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run directory (its best step is taken) or a step directory."""
    pairs: str
    """Tested pairs: lfw:view1_train | lfw:view1_test | lfw:view2 | csv:FILE | heldout:SOURCE."""
    fit: str | None = None
    """Pairs that heads are fitted on, named likewise. When not given: view1_train for view1_test, the other nine folds
    for view2, calibrate people for heldout:SOURCE (which tests report people), and the folds of a csv."""
    framing: Literal["celeba", "lfw"] | None = None
    """csv:FILE and heldout:folder:PATH: the photos are framed like CelebA's aligned ones or like deep-funneled LFW, at
    any size. When not given, they are cropped tightly already: the largest centred square is taken."""
    heads: tuple[str, ...] = ("threshold", "logistic_distance", "logistic_abs")
    """Which heads."""
    out: Path | None = None
    """Folder for results.json and report.html, a page with plots and the hardest pairs; made when missing."""
    data_dir: Path | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    json: Path | None = None
    """Write the results there too."""
    progress: bool = True
    """Show progress bars."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py verify")
    from faceembed import report
    from faceembed.data import pairs as pair_lists
    from faceembed.data import sources
    from faceembed.verification import HEADS

    unknown = [name for name in options.heads if name not in HEADS]
    if unknown:
        raise ValueError(f"--heads names {', '.join(unknown)}; there are {', '.join(HEADS)}.")
    fit_spec = options.fit or _usual_fit(options.pairs)
    # What is wrong with the lists is told before JAX is imported; only synthetic photos depend on the checkpoint.
    embedder = load(options.checkpoint) if "heldout:synthetic" in (options.pairs, fit_spec) else None

    def listed(spec: str, split: str) -> tuple[pair_lists.Pairs, sources.Photos]:
        drawn = synthetic_options(embedder) if embedder and spec == "heldout:synthetic" else {}
        found, photos = pair_lists.load_pairs(
            spec, data_dir=options.data_dir, split=split, progress=options.progress, **drawn
        )
        if options.framing and photos.source.startswith(sources.UNFRAMED):
            photos = sources.framed(photos, options.framing)
        return found, photos

    test_pairs, test_photos = listed(options.pairs, "report")
    fit_pairs = fit_photos = None
    if fit_spec:
        split = "calibrate" if fit_spec.startswith("heldout:") else "report"
        fit_pairs, fit_photos = listed(fit_spec, split)
    elif test_pairs.fold is None:
        raise ValueError(
            f"{options.pairs} has no folds, so nothing is left to fit heads on. Name other pairs: --fit lfw:view1_train, "
            "--fit heldout:SOURCE, or give the csv a column `fold`."
        )
    opened = {photos.source: photos for photos in (test_photos, fit_photos) if photos is not None}
    if options.framing and not any(source.startswith(sources.UNFRAMED) for source in opened):
        sources.framed(test_photos, options.framing)  # raises
    for photos in opened.values():
        for line in sources.problem_lines(photos):
            print(line)

    started = time.perf_counter()
    embedder = embedder or load(options.checkpoint)
    from faceembed import evaluate, page

    if options.pairs == "lfw:view2" and embedder.data.get("source") == "lfw":
        raise ValueError(
            f"{embedder.path} was trained on LFW images, and View 2's people are LFW's: its figure would not be one of "
            "strangers. Use a checkpoint trained on other photos, such as python launch.py train celeba."
        )
    test = evaluate.embed_pairs(embedder, test_photos, test_pairs, progress=options.progress)
    fit = None
    if fit_pairs is not None and fit_photos is not None:
        fit = evaluate.embed_pairs(embedder, fit_photos, fit_pairs, progress=options.progress)
    folds = test_pairs.fold if fit is None else None
    results = evaluate.compare_pairs(embedder, test, fit=fit, folds=folds, heads=options.heads)
    if not test_photos.named:
        unnamed = (
            "the list names no people: nobody could check that none was trained on. Columns person_a and person_b name "
            "them."
        )
        results = dataclasses.replace(results, warnings=(*results.warnings, unnamed))
    print(f"{options.pairs} by {embedder.path}, heads fitted on {fit_spec or 'the other folds'}\n\n{results}")
    print(f"\n{time.perf_counter() - started:.1f} s")
    content: dict[str, Any] = {
        "checkpoint": str(embedder.path),
        "pairs": options.pairs,
        "fit": fit_spec or "other folds",
        "framing": options.framing,
        "trained_on": {name: embedder.data.get(name) for name in ("source", "fingerprint", "people", "photos", "step")},
        "results": results.to_dict(),
    }
    targets = [options.json] if options.json else []
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        targets.append(options.out / "results.json")
    for target in targets:
        report.write_json(target, content)
        print(f"written: {target}")
    if options.out:
        shown = evaluate.make_page(
            embedder, results, test_pairs, test_photos, title=options.pairs, progress=options.progress,
            tested=f"The checkpoint {embedder.path}; heads fitted on {fit_spec or 'the other folds'}.",
            commands={"Verify again": shlex.join(["python", "launch.py", "verify", *arguments])},
        )  # fmt: skip
        page.write_page(options.out / "report.html", shown)
        print(f"report: {options.out / 'report.html'}")


def _usual_fit(pairs: str) -> str | None:
    """What heads are fitted on unless told."""
    if pairs == "lfw:view1_test":
        return "lfw:view1_train"
    return pairs if pairs.startswith("heldout:") else None

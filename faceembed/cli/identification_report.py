"""`launch.py identification-report CHECKPOINT --source S`: how many can be enrolled, who is found, who is let in."""

import dataclasses
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from faceembed.cli.embed import load, synthetic_options

if TYPE_CHECKING:
    from faceembed.data.sources import Photos
    from faceembed.embed import Embedder
    from faceembed.identification.protocol import IdentificationResults


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Identification from one photo each: people enrolled and strangers, at thresholds set on other people.

    People with one photo are strangers, and where they are fewer than the others, so many of those that half of all
    are. The
    others are enrolled with 1, 2 and 5 photos and searched for with another one. Rates are exact over all galleries of
    a
    size; FPIR is the share of strangers who are taken for anybody.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run directory (its best step is taken), a step directory, or dlib."""
    source: str
    """Whose photos: lfw:dev_test | heldout:SOURCE (report people) | celeba | lfw | synthetic | folder:PATH |
    insightface:PATH | prepared:NAME."""
    calibrate: str | None = None
    """People who set the thresholds, likewise. When not given: lfw:dev_train for lfw:dev_test, calibrate people for
    heldout:SOURCE; of any other source half of the people, by a hash of their names, who are then not tested."""
    sizes: tuple[int, ...] = ()
    """Gallery sizes to report; when not given 10, 100, 1000, … and everybody who can be enrolled."""
    fpirs: tuple[float, ...] = (0.1, 0.01, 0.001)
    """Shares of strangers who may be let in."""
    draws: int = 5
    """How often the photos of each person are drawn."""
    rivals: bool = True
    """Compare with nearest template, k-NN, logistic and softmax classifiers that are trained on the gallery."""
    set_policy: bool = False
    """Write the thresholds into the policy.json of the run, where `identify` reads them."""
    embeddings: Path | None = None
    """A file of `launch.py embed CHECKPOINT SOURCE` that holds these photos, instead of embedding them again."""
    out: Path | None = None
    """Folder for results.json and report.html; made when missing."""
    data_dir: Path | None = None
    """Where prepared sets are kept; $FACEEMBED_DATA or ~/.cache/faceembed/data when not given."""
    json: Path | None = None
    """Write the results there too."""
    progress: bool = True
    """Show progress bars."""


def run(arguments: list[str]) -> None:
    """See the module."""
    options = tyro.cli(Options, args=arguments, prog="launch.py identification-report")
    from faceembed import report
    from faceembed.data import sources

    if options.draws < 1:
        raise ValueError(f"--draws is {options.draws}: photos are drawn at least once. Try --draws 5.")
    if not options.fpirs or not all(0 < fpir <= 0.5 for fpir in options.fpirs):
        raise ValueError(f"--fpirs are {options.fpirs}: shares of strangers, above 0 and at most 0.5. Try 0.1 0.01.")
    if options.out and options.out.resolve() == options.checkpoint.resolve():
        raise ValueError(
            f"--out is {options.out}, as the checkpoint: a folder of that name would be taken for it from now on. Name "
            f"another, such as --out reports/{options.out.name}."
        )
    if options.out and not report.can_write(options.out):
        raise ValueError(f"--out is {options.out}: files cannot be written there. Name a folder of yours.")
    embedder = load(options.checkpoint) if "synthetic" in options.source else None
    test, calibrate, set_by = _photos(options, embedder)
    for line in sources.problem_lines(test):
        print(line)
    embedder = embedder or load(options.checkpoint)
    from faceembed import evaluate
    from faceembed.data import crops
    from faceembed.identification import protocol, rivals

    if options.set_policy:
        policy_file = _policy_file(embedder)
    test, calibrate = (crops.framed_for(photos, embedder.preprocess) for photos in (test, calibrate))
    parts = [_embeddings(embedder, photos, options) for photos in (test, calibrate)]
    started = time.perf_counter()
    results = protocol.evaluate(
        parts[0], test.identity, test.people, (parts[1], calibrate.identity), sizes=options.sizes, fpirs=options.fpirs,
        draws=options.draws,
    )  # fmt: skip
    warnings = [*results.warnings, *evaluate.trained_on(embedder, np.concatenate([test.people, calibrate.people]))]
    compared = []
    if options.rivals:
        compared = rivals.compare(
            parts[0], test.identity, test.people, (parts[1], calibrate.identity, calibrate.people),
            fpir=min((f for f in options.fpirs if f * results.strangers >= 10), default=max(options.fpirs)),
        )  # fmt: skip
    results = dataclasses.replace(results, rivals=compared, warnings=tuple(warnings))
    print(f"identification by {embedder.path}\n\n{results}\n")
    if compared:
        print(f"{rivals.table(compared)}\n")
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"{time.perf_counter() - started:.1f} s")
    if options.set_policy:
        _set_policy(policy_file, embedder, parts[1], calibrate, set_by, options)
    _write(options, arguments, embedder, test, calibrate, set_by, results)


def _photos(options: Options, embedder: "Embedder | None") -> tuple["Photos", "Photos", str]:
    """The tested people, those who set thresholds, and who these are in words: nobody is in both."""
    from faceembed.data import sources, splits

    source = options.source
    test = _people(source, "report", options, embedder)
    if options.calibrate:
        calibrate = _people(options.calibrate, "calibrate", options, embedder)
        if test.named and calibrate.named:
            shared = np.intersect1d(test.people, calibrate.people)
            if len(shared):
                raise ValueError(
                    f"{len(shared):,} people of {options.calibrate} are also among those tested, such as "
                    f"{str(shared[0])!r}: thresholds must come from others. Leave --calibrate out, and half of the people "
                    "set them."
                )
        return test, calibrate, options.calibrate
    if source in ("lfw:dev_test", "lfw:dev_train"):
        other = {"lfw:dev_test": "lfw:dev_train", "lfw:dev_train": "lfw:dev_test"}[source]
        return test, _people(other, "calibrate", options, embedder), other
    if source.startswith("heldout:"):
        return test, _people(source, "calibrate", options, embedder), f"calibrate people of {source.partition(':')[2]}"
    half = splits.halves_of(test.people)
    if min(half.sum(), (~half).sum()) < 3:
        raise ValueError(
            f"{source} has {len(half)} people: one half of them is tested and the other sets thresholds, so a dozen at the "
            "least are needed. Name others for the thresholds: --calibrate SOURCE."
        )
    set_by = f"half of the people of {source}, who are not tested"
    return sources.select(test, half[test.identity]), sources.select(test, ~half[test.identity]), set_by


def _people(source: str, split: str, options: Options, embedder: "Embedder | None") -> "Photos":
    from faceembed.data import pairs

    drawn = synthetic_options(embedder) if embedder and "synthetic" in source.split(":") else {}
    name = source if source.startswith("all:") else f"all:{source}"
    return pairs.load_people(name, data_dir=options.data_dir, split=split, progress=options.progress, **drawn)


def _embeddings(embedder: "Embedder", photos: "Photos", options: Options) -> np.ndarray:
    from faceembed import evaluate
    from faceembed.data import pairs

    if options.embeddings:
        return pairs.read_embeddings(options.embeddings, photos, checkpoint=embedder.fingerprint)
    return evaluate.embed_photos(embedder, photos, progress=options.progress)[0]


def _policy_file(embedder: "Embedder") -> Path:
    """Where the checkpoint keeps its policy; told before the work where it has none of its own."""
    if len(embedder.path.parents) < 2 or not embedder.path.is_dir():
        raise ValueError(
            f"{embedder.path} is no run directory: its thresholds cannot be written. Give them to identify instead: "
            "--threshold."
        )
    file = embedder.path.parents[1] / "policy.json"
    if file.exists() and embedder.policy is None:
        raise ValueError(
            f"{file} belongs to another step of the run. Give the run directory, and its best step is taken."
        )
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: make it writable, or leave --set-policy out.")
    return file


def _set_policy(
    file: Path, embedder: "Embedder", emb: np.ndarray, calibrate: "Photos", set_by: str, options: Options
) -> None:
    from faceembed import report
    from faceembed.identification import policy

    content = dict(embedder.policy or {"fingerprint": embedder.fingerprint, "heads": {}, "operating_points": {}})
    fpirs = sorted({*options.fpirs, *policy.FPIRS}, reverse=True)
    content["identification"] = policy.thresholds(emb, calibrate.identity, fpirs=fpirs) | {"source": set_by}
    report.write_json(file, content)
    print(f"thresholds written: {file}")


def _write(
    options: Options, arguments: list[str], embedder: "Embedder", test: "Photos", calibrate: "Photos",
    set_by: str, results: "IdentificationResults",
) -> None:  # fmt: skip
    from faceembed import report
    from faceembed.data import pipeline, sources
    from faceembed.identification import page

    content = {
        "schema": report.SCHEMA, "checkpoint": str(embedder.path), "source": options.source,
        "fingerprint": test.fingerprint,
        "calibrate": {"source": set_by, "people": len(calibrate.people)},
        "results": results.to_dict(),
    }  # fmt: skip
    targets = [options.json] if options.json else []
    targets += [options.out / "results.json"] if options.out else []
    for target in targets:
        report.write_json(target, content)
        print(f"written: {target}")
    if not options.out:
        return
    drawn = np.unique([photo for row in results.let_in[: page.SHOWN] for photo in (row.probe, row.template)])
    pictures: Any = ()
    if len(drawn):
        pictures = pipeline.decode_all(sources.select(test, drawn.astype(np.int64)), embedder.size, progress=False)
    data = embedder.data
    shown = page.IdentificationPage(
        title=options.source,
        tested=f"{len(test):,} photos of {len(test.people):,} people, by the embeddings of {embedder.path}; thresholds "
        f"from {len(calibrate):,} photos of {len(calibrate.people):,} other people ({set_by}).",
        results=results,
        crops=dict(zip(drawn.tolist(), pictures, strict=True)),
        keys=test.keys,
        facts={"Trained on": {name: data.get(name) for name in ("source", "people", "photos", "step")}},
        commands={"Report again": shlex.join(["python", "launch.py", "identification-report", *arguments])},
    )
    page.write_page(options.out / "report.html", shown)
    print(f"report: {options.out / 'report.html'}")

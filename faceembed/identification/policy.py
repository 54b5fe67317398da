"""Thresholds for a target FPIR and a gallery's size, set on calibrate people; they travel in a checkpoint's policy.json.

Everybody searches among all others, with photos of their own: the scores are exact for every gallery size up to the
people
there are (`openset`). Where they do not resolve the FPIR, a tail is fitted (`tails`); beyond the people there are, the
threshold is that of FPIR · M/K in a gallery of M, which FPIR(K, T) cannot exceed in expectation: K people are K/M
galleries
of M. Such thresholds are marked "extrapolated".

A threshold is a squared Euclidean distance: a search is answered with whoever is at most so far.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faceembed import metrics
from faceembed.identification import openset, tails
from faceembed.identification.openset import NonMated, Ranked
from faceembed.identification.pooling import pooled

__all__ = ["FPIRS", "Cut", "cut_for", "everybody", "set_cut", "thresholds"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Status = Literal["printed", "flagged", "extrapolated", "given"]

FPIRS = (0.1, 0.01, 0.001, 0.0001)
"""For which a policy holds thresholds; among one person enrolled they are false match rates."""

PHOTOS = (1, 2, 3, 5)
"""Photos an enrolled person may have: a mean of several is nearer to its person, and its thresholds are others."""

LEAST_PEOPLE = 20
"""With so many photos, for a threshold of their own."""

LARGEST = 1_000_000
"""People in the largest gallery that a policy has thresholds for."""

LEAST_EXPECTED = 3.0
"""Strangers expected at the rate that a tail is asked for, at least. Of rarer ones it is a guess: with one expected, half
as many again to twice as many as asked for come in the mean (`python -m experiments.extrapolated_thresholds`)."""

LEAST_EXCESSES = 20
"""Searches above the start of a tail, at least."""

MOST_SCORES = 20_000_000
"""Of one table of scores: bounds memory (a gigabyte while it is ranked) whatever the number of people."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """A threshold with what it stands for.

    Attributes:
      distance: squared Euclidean; whoever is at most so far is a candidate.
      fpir: share of the searches by strangers that are answered with somebody, at most.
      k: people enrolled that it was set for.
      photos: photos of each.
      status: "printed" and "flagged" as `metrics.resolvable` says of the searches behind it; "extrapolated" by a model
      or
        beyond the people there were; "given" by the caller, and then `fpir` is NaN.
    """

    distance: float
    fpir: float
    k: int
    photos: int
    status: Status


def everybody(emb: ArrayLike, identity: ArrayLike, *, photos: int = 1, seed: int = 0) -> NonMated:
    """Everybody searches among all others: non-mated searches of people who have a photo or more.

    Args:
      emb: [n, d] embeddings.
      identity: [n] int person of each.
      photos: in each template; who has fewer is not in the pool, and searches all the same.
      seed: of which photos stand for a person. They are drawn anew up to five times, as far as `MOST_SCORES` allow; of
        more people than that allows, so many are drawn, those who can be enrolled first.

    Returns:
      `NonMated` with scores = -squared distance.

    Raises:
      ValueError: fewer than two people have so many photos.
    """
    x, who = np.asarray(emb, np.float64), np.asarray(identity)
    rng = np.random.default_rng(seed)
    people, start, count = _groups(who)
    order = np.argsort(who, kind="stable")
    able = np.flatnonzero(count >= photos)
    if len(able) < 2 or len(people) < 3:
        raise ValueError(
            f"{len(able)} of {len(people)} people have {photos} photos or more: galleries of others than oneself need "
            "two "
            "of them, and somebody else who searches."
        )
    able = np.sort(rng.permutation(able)[: int(MOST_SCORES**0.5)])
    others = np.setdiff1d(np.arange(len(people)), able)
    searching = np.sort(np.concatenate([able, rng.permutation(others)[: max(0, MOST_SCORES // len(able) - len(able))]]))
    same_again = photos == 1 and count[searching].max() == 1  # another draw would draw the same photos
    draws = 1 if same_again else int(np.clip(MOST_SCORES // (len(searching) * len(able)), 1, 5))
    own = np.searchsorted(searching, able)  # the rows of those who are in the pool
    parts = []
    for _ in range(draws):
        shuffled = order[np.lexsort((rng.random(len(who)), who[order]))]  # of each person, in a random order
        templates = pooled(x[shuffled[start[able][:, None] + np.arange(photos)]])
        scores = -squared_distances(x[shuffled[start[searching] + rng.integers(0, count[searching])]], templates)
        scores[own, np.arange(len(able))] = -np.inf  # nobody searches for themself
        parts.append(scores)
    return NonMated(scores=np.concatenate(parts), who=np.tile(people[searching], draws), pool=people[able])


def squared_distances(a: Floats, b: Floats) -> Floats:
    """[p, q] of every row of a to every row of b."""
    return np.maximum(np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T, 0.0)


def _groups(identity: NDArray) -> tuple[NDArray, Ints, Ints]:
    """(people, the place of each one's first photo in the order of people, photos of each)."""
    people, count = np.unique(identity, return_counts=True)
    return people, np.cumsum(count) - count, count


def set_cut(
    best: Ranked, fpir: float, k: int, *, photos: int = 1, drawn: Callable[[], Sequence[tails.Tail]] | None = None
) -> Cut | None:
    """The threshold for an FPIR in a gallery of k, as exact as these searches allow.

    Args:
      best: searches by calibrate people.
      fpir: target, at most `best.share`.
      k: people enrolled; may lie beyond the pool.
      photos: photos in each of the templates.
      drawn: gives `tails.resampled` of galleries of k, or of the pool where that is smaller, where they are kept.

    Returns:
      None where even a tail would be a guess: it must rest on `LEAST_EXCESSES` searches, and on `LEAST_EXPECTED` at
      the rate
      asked for. And where nobody could be recognised at such a threshold.
    """
    inside = min(k, best.pool)
    target = fpir if k == inside else fpir * inside / k
    searches = best.searches(inside)
    resolution = metrics.resolvable(target, searches)
    if resolution:
        score = openset.threshold_at_fpir(best, inside, target)
    elif target * searches < LEAST_EXPECTED * (1 - 1e-9) or not has_tail(best, inside):
        return None
    else:
        score = tails.cautious_threshold(drawn() if drawn else tails.resampled(best, inside), target)
    if score >= 0:
        return None  # not even a copy of the photo would pass
    extrapolated = k > inside or not resolution
    status: Status = "extrapolated" if extrapolated else "printed" if resolution.status == "printed" else "flagged"
    return Cut(distance=-score, fpir=fpir, k=k, photos=photos, status=status)


def has_tail(best: Ranked, k: int) -> bool:
    """Whether enough searches lie above the start of a tail of galleries of k."""
    return best.searches(k) * tails.SHARE >= LEAST_EXCESSES


def sizes(pool: int) -> list[int]:
    """Gallery sizes that a policy has thresholds for: ten a decade, and the pool itself."""
    grid = {round(10 ** (i / 10)) for i in range(round(10 * np.log10(LARGEST)) + 1)}
    return sorted(grid | {pool})


def thresholds(
    emb: ArrayLike,
    identity: ArrayLike,
    *,
    fpirs: Sequence[float] = FPIRS,
    photos: Sequence[int] = PHOTOS,
    seed: int = 0,
) -> dict[str, Any]:
    """What `policy.json` holds as "identification": thresholds per FPIR, gallery size and photos of a person.

    Args:
      emb: [n, d] embeddings of calibrate people.
      identity: [n] int.
      fpirs: targets.
      photos: photos in a template; a number that fewer than `LEAST_PEOPLE` have is left out, but for the first.
      seed: as `everybody`.

    Returns:
      JSON's types: "people", and "cuts", a list of {"photos", "fpir", "pool", "k": […], "distance": […], "printed_to",
      "flagged_to"}: sizes with their thresholds, as far as `set_cut` gives some, and the largest k of those statuses,
      or
      0. Distances never rise with k, nor as the FPIR falls.
    """
    count = _groups(np.asarray(identity))[2]
    cuts: list[dict[str, Any]] = []
    people = 0
    for number in photos:
        enough = int((count >= number).sum())
        if len(count) < 3 or enough < 2 or (number > min(photos) and enough < LEAST_PEOPLE):
            continue
        searches = everybody(emb, identity, photos=number, seed=seed)
        people = max(people, searches.strangers)
        best = openset.ranked(searches, share=max(*fpirs, tails.SHARE))
        pool = best.pool
        found: dict[float, list[Cut]] = {fpir: [] for fpir in sorted(set(fpirs), reverse=True)}
        going = set(found)
        drawn = _kept(best, pool)
        for k in sizes(pool):
            if k <= pool:
                best = best.from_size(k)
                drawn = _kept(best, k)
            for fpir, row in found.items():
                cut = set_cut(best, fpir, k, photos=number, drawn=drawn) if fpir in going else None
                if cut is None:
                    going.discard(fpir)  # larger galleries are further away still
                else:
                    row.append(cut)
        ceiling: dict[int, float] = {}
        for fpir, row in found.items():
            # A tail may cross the counts beside it in the last digits: the stricter one goes on.
            strictest = np.minimum.accumulate([min(cut.distance, ceiling.get(cut.k, np.inf)) for cut in row])
            ceiling |= dict(zip([cut.k for cut in row], strictest.tolist(), strict=True))
            if row:
                cuts.append({
                    "photos": number, "fpir": fpir, "pool": pool, "k": [cut.k for cut in row],
                    "distance": [_rounded_down(distance) for distance in strictest.tolist()],
                    "printed_to": max((cut.k for cut in row if cut.status == "printed"), default=0),
                    "flagged_to": max((cut.k for cut in row if cut.status != "extrapolated"), default=0),
                })  # fmt: skip
    return {"people": people or len(count), "cuts": cuts}


def _kept(best: Ranked, k: int) -> Callable[[], Sequence[tails.Tail]]:
    """Resampled tails of galleries of k, fitted when they are first asked for."""
    return functools.cache(lambda: tails.resampled(best, k))


def _rounded_down(distance: float) -> float:
    """To six digits, to the stricter side."""
    unit = 10.0 ** (np.floor(np.log10(distance)) - 5)
    return float(f"{np.floor(distance / unit * (1 - 1e-12)) * unit:.6g}")


def cut_for(policy: Mapping[str, Any] | None, *, fpir: float, k: int, photos: Iterable[int] = (1,)) -> Cut:
    """The threshold of a checkpoint's policy for a gallery.

    Args:
      policy: of `Embedder.policy`.
      fpir: one of those that thresholds were set for.
      k: people enrolled; the next larger size that has a threshold is taken.
      photos: how many photos the people enrolled have; the strictest of their thresholds is taken.

    Raises:
      ValueError: the policy has no thresholds for identification, or none for that FPIR or size.
    """
    found = (policy or {}).get("identification")
    if not found:
        raise ValueError(
            "the checkpoint has no thresholds for identification. Set them on people whom it was not trained on: "
            "python "
            "launch.py identification-report CHECKPOINT --source SOURCE --set-policy; or give a distance: --threshold "
            "0.9."
        )
    targets = sorted({cut["fpir"] for cut in found["cuts"]}, reverse=True)
    if fpir not in targets:
        there = ", ".join(f"{target:g}" for target in targets) or "none"
        raise ValueError(
            f"the checkpoint has no threshold for a rate of {fpir:g} of strangers; it has them for {there}. More "
            "calibrate "
            f"people resolve smaller ones: {found['people']:,} set these."
        )
    known = sorted({cut["photos"] for cut in found["cuts"]})
    numbers = set(photos) or {known[0]}
    # Between two numbers of photos that have thresholds the stricter one holds; beyond the last it is an extrapolation.
    classes = {n for number in numbers for n in (_last(known, number), _next(known, number)) if n is not None}
    beyond = max(numbers) > known[-1] and known[-1] < max(PHOTOS)
    chosen = []
    for cut in found["cuts"]:
        if cut["fpir"] == fpir and cut["photos"] in classes:
            place = int(np.searchsorted(cut["k"], k))
            if place == len(cut["k"]):
                raise ValueError(
                    f"{k:,} people are enrolled, and for {fpir:g} of strangers there are thresholds for "
                    f"{cut['k'][-1]:,} "
                    f"at most: {found['people']:,} people set them, who say nothing of more. Allow more strangers, or "
                    "set "
                    "thresholds on more people."
                )
            size = cut["k"][place]
            status: Status = "printed"
            if beyond or size > cut["flagged_to"]:
                status = "extrapolated"
            elif size > cut["printed_to"]:
                status = "flagged"
            chosen.append(Cut(distance=cut["distance"][place], fpir=fpir, k=size, photos=cut["photos"], status=status))
    if len(chosen) < len(classes):
        missing = sorted(classes - {cut.photos for cut in chosen})
        raise ValueError(
            f"for {fpir:g} of strangers there is no threshold for templates of {missing[0]} photos: "
            f"{found['people']:,} people "
            "set them, too few of whom have so many. Allow more strangers, or set thresholds on more people."
        )
    return min(chosen, key=lambda cut: cut.distance)


def _last(known: Sequence[int], number: int) -> int | None:
    """The largest that is not above a number."""
    return max((n for n in known if n <= number), default=None)


def _next(known: Sequence[int], number: int) -> int | None:
    """The smallest that is not below a number."""
    return min((n for n in known if n >= number), default=None)

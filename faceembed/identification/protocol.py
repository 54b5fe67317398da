"""How well does an encoder identify people from one photo, among how many, and whom does it let in?

    embeddings → who is enrolled, who is a stranger → searches → rates with intervals, at thresholds set on other people

People with one photo are strangers. Where they are fewer than the others, so many of those join them that half of all
are
strangers. Everybody else is enrolled with n photos and searched for with another one; which photos those are is drawn
several times. Nothing is drawn of galleries: `openset` counts all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faceembed import metrics, report
from faceembed.identification import openset, tails
from faceembed.identification.openset import Mated, NonMated, Ranked, Rate, Searches
from faceembed.identification.policy import MOST_SCORES, Cut, everybody, has_tail, set_cut, squared_distances
from faceembed.identification.pooling import pooled

__all__ = ["ClosedSet", "IdentificationResults", "LetIn", "OpenSet", "Planned", "draw", "evaluate", "roles"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PHOTOS = (1, 2, 5)
RANKS = (1, 5, 20)
MOST_ENROLLED, MOST_STRANGERS = 3000, 5000
"""People who are tested at most, and of more as many at random: bounds memory, with `policy.MOST_SCORES`."""

PLANNED = tuple(round(10 ** (i / 4)) for i in range(2, 25))
"""Gallery sizes of the planner: four a decade, from 3 to a million."""


def roles(names: Sequence[str] | NDArray, count: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Who is enrolled and who is a stranger, by the number of their photos and, where that leaves a choice, by a hash.

    Args:
      names: [m] of people.
      count: [m] photos of each.

    Returns:
      (enrolled, stranger), [m] bool each; everybody with a photo is one of them.

    Raises:
      ValueError: fewer than two people would be enrolled, or nobody a stranger.
    """
    photos = np.asarray(count)
    stranger = photos == 1
    several = np.flatnonzero(photos > 1)
    missing = (len(several) + int(stranger.sum())) // 2 - int(stranger.sum())
    if missing > 0:
        digest = [hashlib.sha256(f"stranger {names[int(person)]}".encode()).digest() for person in several]
        stranger[several[sorted(range(len(several)), key=lambda i: digest[i])[:missing]]] = True
    enrolled = (photos > 1) & ~stranger
    if enrolled.sum() < 2 or not stranger.any():
        raise ValueError(
            f"{len(photos)} people, {len(several)} of them with two photos or more: at least two people must be "
            "enrolled, with a photo left to search with, and one must be a stranger."
        )
    return enrolled, stranger


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """Searches with the rows of the photos behind them.

    Attributes:
      searches: scores are -squared distances.
      templates: [draws, m, n] photos enrolled.
      probes: [draws · m] photos that enrolled people search with.
      visitors: [draws · s] photos that strangers search with.
    """

    searches: Searches
    templates: Ints
    probes: Ints
    visitors: Ints


def draw(
    emb: ArrayLike, identity: ArrayLike, enrolled: NDArray[np.bool_], stranger: NDArray[np.bool_], *,
    photos: int = 1, draws: int = 5, seed: int = 0,
) -> Drawn:  # fmt: skip
    """Photos for templates, for searches by the same people, and for searches by strangers, drawn several times.

    Args:
      emb: [n, d] embeddings.
      identity: [n] int person of each, 0 to m - 1.
      enrolled, stranger: [m] bool; of the enrolled those with more than `photos` photos are in the pool.
      photos: in each template; their pooled embedding is the template.
      draws: how often, at most: fewer where there are so many people that memory would not do.
      seed: of the draws.

    Raises:
      ValueError: fewer than two people have more photos than that.
    """
    x, who = np.asarray(emb, np.float64), np.asarray(identity)
    count = np.bincount(who, minlength=len(enrolled))
    order = np.argsort(who, kind="stable")
    start = np.cumsum(count) - count
    pool = np.flatnonzero(enrolled & (count > photos))
    outside = np.flatnonzero(stranger & (count > 0))
    if len(pool) < 2:
        raise ValueError(
            f"{len(pool)} people have more than {photos} photos: a pool of two or more of them is needed, who are "
            f"enrolled with {photos} and searched for with another."
        )
    rng = np.random.default_rng(seed)
    pool = np.sort(rng.permutation(pool)[:MOST_ENROLLED])
    outside = np.sort(rng.permutation(outside)[:MOST_STRANGERS])
    draws = int(np.clip(MOST_SCORES // (len(pool) * (len(pool) + len(outside))), 1, draws))
    templates, probes, visitors, mated, non_mated = [], [], [], [], []
    for _ in range(draws):
        shuffled = order[np.lexsort((rng.random(len(who)), who[order]))]
        templates.append(shuffled[start[pool][:, None] + np.arange(photos)])
        probes.append(shuffled[start[pool] + photos])
        visitors.append(shuffled[start[outside]])
        gallery = pooled(x[templates[-1]])
        mated.append(-squared_distances(x[probes[-1]], gallery))
        non_mated.append(-squared_distances(x[visitors[-1]], gallery))
    searches = Searches(
        mated=Mated(scores=np.concatenate(mated), mate=np.tile(np.arange(len(pool)), draws), pool=pool),
        non_mated=NonMated(scores=np.concatenate(non_mated), who=np.tile(outside, draws), pool=pool),
    )
    return Drawn(
        searches=searches,
        templates=np.array(templates),
        probes=np.concatenate(probes),
        visitors=np.concatenate(visitors),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenSet:
    """What happens at a threshold that other people set.

    Attributes:
      k: people enrolled.
      photos: of each.
      cut: the threshold and the FPIR it was set for.
      fpir: realised by these strangers.
      tpir: enrolled people found: their own name first, and at or above the threshold; 1 - FNIR(K, R=1, T).
      strangers, people: who searched.
      status: whether so many strangers resolve the target: "printed", "flagged", "unresolvable".
      needs: strangers from which it would be printed.
    """

    k: int
    photos: int
    cut: Cut
    fpir: Rate
    tpir: Rate
    strangers: int
    people: int
    status: str
    needs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedSet:
    """Who searches is enrolled, and somebody is always named.

    Attributes:
      k: people enrolled.
      photos: of each.
      people: who searched.
      ranks: R → share of searches whose mate is among the first R.
      cmc: rank-R rates from R = 1 on.
    """

    k: int
    photos: int
    people: int
    ranks: dict[int, Rate]
    cmc: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """How many of those enrolled are turned away, when so many are, at a threshold for an FPIR.

    Attributes:
      k: people enrolled.
      cut: the threshold.
      fnir: 1 - TPIR.
      extrapolated: the threshold or the rate lies beyond the people or strangers there were.
    """

    k: int
    cut: Cut
    fnir: Rate
    extrapolated: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class LetIn:
    """A stranger who was taken for somebody.

    Attributes:
      probe, template: photos, by their row.
      distance: squared, between them.
      fpir: of the strictest threshold that accepts them, of those that the strangers resolve.
    """

    probe: int
    template: int
    distance: float
    fpir: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class IdentificationResults:
    """Everything that `identification-report` shows; docs/identification.md says what the fields mean.

    Attributes:
      people, strangers: tested, enrolled with one photo and not enrolled.
      calibrated_on: people who set the thresholds.
      open_set, closed_set: rows.
      det: "k, photos" → FPIR and FNIR along thresholds of these people themselves, for the plot.
      learning: rows of `open_set` and rank-1 rates on the same people, by photos enrolled.
      planned: FPIR → rows.
      growth: at fixed thresholds, FPIR by gallery size: exact, low, high, naive.
      tail: of the calibrate people, in a gallery of all of them; `seen` has their best scores with FPIRs, and
      `stability`
        and `backtests` show how far to believe it; None where too few people search.
      let_in: strangers who were taken for somebody in one of the draws, nearest first.
      rivals: other ways to decide, or nothing.
      draws: of photos.
      warnings: what a reader must know.
    """

    people: int
    strangers: int
    calibrated_on: int
    open_set: list[OpenSet]
    closed_set: list[ClosedSet]
    det: dict[str, tuple[list[float], list[float]]]
    learning: list[dict[str, Any]]
    planned: dict[float, list[Planned]]
    growth: list[dict[str, Any]]
    tail: tails.Tail | None
    seen: tuple[list[float], list[float]]
    stability: tails.Stability | None
    backtests: list[tails.Backtest]
    let_in: list[LetIn]
    draws: int
    rivals: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON's types."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        lines = [
            f"{self.people:,} people enrolled, {self.strangers:,} strangers, thresholds set on {self.calibrated_on:,} "
            f"others; photos drawn {self.draws} times, 95 % intervals over people",
            "",
            report.table([self._row(row) for row in self.open_set])
            if self.open_set
            else "too few people set thresholds for these galleries and rates",
            "",
            "closed set: who searches is enrolled, and somebody is always named",
            report.table([
                {"K": row.k, "photos": row.photos, **{f"rank {r}": _shown(rate) for r, rate in row.ranks.items()}}
                for row in self.closed_set
            ]),
            *(["", self.plan()] if any(self.planned.values()) else []),
        ]  # fmt: skip
        return "\n".join(lines)

    @staticmethod
    def _row(row: OpenSet) -> dict[str, Any]:
        resolved = report.resolved(_shown(row.fpir), row.status, row.needs)
        found = _shown(row.tpir) if row.status != "unresolvable" else "-"
        return {
            "K": row.k, "photos": row.photos, "FPIR asked": report.format_percent(row.cut.fpir, digits=1),
            "FPIR here": resolved, "TPIR": found, "distance": row.cut.distance,
            "threshold": "exact" if row.cut.status != "extrapolated" else "extrapolated",
        }  # fmt: skip

    def plan(self) -> str:
        """The planner's table: how many can be enrolled, and how many of them are then turned away."""
        rows = []
        for k in (10, 32, 100, 316, 1000, 3162, 10_000, 100_000, 1_000_000):
            row: dict[str, Any] = {"enrolled": f"{k:,}"}
            for fpir, planned in self.planned.items():
                there = [p for p in planned if p.k == k]
                if there:
                    mark = "~" if there[0].extrapolated else ""
                    row[f"turned away at FPIR {100 * fpir:g} %"] = (
                        f"{mark}{report.format_percent(there[0].fnir.value, digits=1)}"
                    )
            rows.append(row)
        return (
            "how many people can be enrolled before so many strangers are let in, and how many of those enrolled are "
            "then "
            "turned away\n(one photo each; ~ extrapolated)\n" + report.table(rows)
        )


def _shown(rate: Rate) -> str:
    return f"{report.format_percent(rate.value, digits=1)} {report.format_interval(rate.low, rate.high, digits=1)}"


def evaluate(
    emb: ArrayLike, identity: ArrayLike, names: Sequence[str] | NDArray, calibrate: tuple[ArrayLike, ArrayLike], *,
    sizes: Sequence[int] = (), photos: Sequence[int] = PHOTOS, fpirs: Sequence[float] = (0.1, 0.01, 0.001), draws: int = 5,
    seed: int = 0,
) -> IdentificationResults:  # fmt: skip
    """Identification of these people at thresholds that were set on others.

    Args:
      emb: [n, d] embeddings of the tested people.
      identity: [n] int, 0 to m - 1.
      names: [m] of people: they decide who is a stranger where there is a choice.
      calibrate: (embeddings, identity) of the people who set thresholds.
      sizes: galleries to report; by default 10, 100, 1,000 … and all who are enrolled.
      photos: photos of an enrolled person to report.
      fpirs: targets.
      draws: of photos.
      seed: of the draws.

    Raises:
      ValueError: too few people, or a gallery that is larger than the pool.
    """
    who = np.asarray(identity)
    count = np.bincount(who, minlength=len(names))
    warnings: list[str] = []
    enrolled, stranger = roles(names, count)
    first = draw(emb, who, enrolled, stranger, draws=draws, seed=seed)
    most, strangers = len(first.searches.mated.pool), first.searches.non_mated.strangers
    if most == MOST_ENROLLED or strangers == MOST_STRANGERS:
        warnings.append(f"of more people {most:,} were drawn to be enrolled, and {strangers:,} strangers.")
    wanted = list(sizes) or [k for k in (10, 100, 1000, 10_000) if k < most] + [most]
    if max(wanted) > most or min(wanted) < 1:
        raise ValueError(
            f"galleries of {', '.join(map(str, wanted))} people are asked for, and {most} can be enrolled: they have "
            "two photos or more, and are no strangers. Give smaller ones."
        )
    thresholds = _Thresholds(*calibrate, share=max(*fpirs, tails.SHARE), seed=seed)
    open_set, closed_set, det = [], [], {}
    for number in photos:
        if number > 1 and int((enrolled & (count > number)).sum()) < 10:
            warnings.append(f"fewer than 10 enrolled people have more than {number} photos: that gallery is left out.")
            continue
        if not thresholds.enough(number):
            warnings.append(f"too few calibrate people have {number} photos to set a threshold for such galleries.")
        drawn = first if number == 1 else draw(emb, who, enrolled, stranger, photos=number, draws=draws, seed=seed)
        searches = drawn.searches
        there = len(searches.mated.pool)
        for k in _galleries(wanted, there):
            for fpir in sorted(fpirs, reverse=True):
                if thresholds.enough(number) and (cut := thresholds.cut(fpir, k, number)):
                    open_set.append(_open(searches, cut, k, number))
            closed_set.append(_closed(searches.mated, k, number))
            det[f"K = {k}, {number} photo{'s' if number > 1 else ''}"] = _det(searches, k)
    best = thresholds.largest() if thresholds.enough(1) else None
    tail = thresholds.tail(1, best.pool) if best and has_tail(best, best.pool) else None
    largest = [row.cut for row in open_set if row.photos == 1 and row.k == max(wanted) and row.status != "unresolvable"]
    return IdentificationResults(
        people=most,
        strangers=first.searches.non_mated.strangers,
        calibrated_on=thresholds.people,
        open_set=open_set,
        closed_set=closed_set,
        det=det,
        learning=_learning(emb, who, enrolled, stranger, thresholds, draws=draws, seed=seed, fpirs=fpirs),
        planned={fpir: _planned(first.searches, thresholds, fpir) for fpir in sorted(fpirs, reverse=True)},
        growth=[_growth(first.searches, cut) for cut in largest[:2]],
        tail=tail,
        seen=_seen(best, best.pool) if best else ([], []),
        stability=tails.stability(best, best.pool, min(fpirs), seed=seed) if best and tail else None,
        backtests=_backtests(*calibrate, max(wanted), seed=seed) if tail else [],
        let_in=_let_in(first, largest),
        draws=len(first.templates),
        warnings=tuple(warnings),
    )  # fmt: skip


def _galleries(wanted: Sequence[int], there: int) -> list[int]:
    """Those that so many people can fill; and all of them, where the largest that they fill is much smaller."""
    sizes = [k for k in sorted(wanted) if k <= there]
    if not sizes or (max(wanted) > there and sizes[-1] < 0.8 * there):
        sizes.append(there)
    return sizes


class _Thresholds:
    """Thresholds of the calibrate people; what is ranked and fitted once is kept."""

    def __init__(self, emb: ArrayLike, identity: ArrayLike, *, share: float, seed: int) -> None:
        self._emb, self._identity = np.asarray(emb, np.float64), np.asarray(identity)
        self._share, self._seed = share, seed
        self._count = np.unique(self._identity, return_counts=True)[1]
        self._ranked: dict[tuple[int, int], Ranked] = {}
        self._drawn: dict[tuple[int, int], list[tails.Tail]] = {}

    @property
    def people(self) -> int:
        """Who set thresholds: all, or as many as memory allows."""
        return len(np.unique(self._ranked[1, 1].who)) if (1, 1) in self._ranked else len(self._count)

    def enough(self, photos: int) -> bool:
        return int((self._count >= photos).sum()) >= 10

    def ranked(self, photos: int, k: int) -> Ranked:
        """Enough scores for galleries of k and more."""
        if (photos, 1) not in self._ranked:
            searches = everybody(self._emb, self._identity, photos=photos, seed=self._seed)
            self._ranked[photos, 1] = openset.ranked(searches, share=self._share)
        all_of_them = self._ranked[photos, 1]
        size = min(4 ** int(np.log2(max(1, k)) / 2), all_of_them.pool)  # one for each fourfold size
        if (photos, size) not in self._ranked:
            self._ranked[photos, size] = all_of_them.from_size(size)
        return self._ranked[photos, size]

    def largest(self) -> Ranked:
        """Of one photo, in galleries of everybody."""
        return self.ranked(1, self.ranked(1, 1).pool)

    def tail(self, photos: int, k: int) -> tails.Tail:
        """Of galleries of k."""
        return tails.fit(self.ranked(photos, k), k)

    def cut(self, fpir: float, k: int, photos: int) -> Cut | None:
        best = self.ranked(photos, k)
        size = min(k, best.pool)

        def drawn() -> list[tails.Tail]:
            if (photos, size) not in self._drawn:
                self._drawn[photos, size] = tails.resampled(best, size)
            return self._drawn[photos, size]

        return set_cut(best, fpir, k, photos=photos, drawn=drawn)


def _backtests(emb: ArrayLike, identity: ArrayLike, k: int, *, seed: int) -> list[tails.Backtest]:
    """Of calibrate people, half of whom are the pool and half strangers: at a rate that so few of the strangers are shown
    that ten, or three, are expected."""
    x, who = np.asarray(emb, np.float64), np.asarray(identity)
    people, first = np.unique(who, return_index=True)
    mixed = np.random.default_rng(seed).permutation(len(people))[: int((2 * MOST_SCORES) ** 0.5)]
    pool, strangers = np.array_split(mixed, 2)
    k = min(k, len(pool))
    scores = -squared_distances(x[first[strangers]], x[first[pool]])
    best = openset.ranked(NonMated(scores=scores, who=people[strangers], pool=people[pool])).from_size(k)
    found = []
    for target in (0.01, 0.003):
        for expected in (10, 3):
            shown = round(expected / target)
            if (
                shown * tails.SHARE >= 10
                and shown < len(strangers)
                and metrics.resolvable(target, len(strangers) - shown)
            ):
                found.append(tails.backtest(best, k, target, shown=shown, seed=seed))
    return found


def _seen(best: Ranked, k: int) -> tuple[list[float], list[float]]:
    """Scores and the FPIR at each, up to a hundred of each decade."""
    fpir = best.fpir(k)
    there = np.flatnonzero(np.diff(fpir, prepend=0.0) > 0)
    there = there[
        np.unique(np.searchsorted(fpir[there], np.geomspace(fpir[there[0]], best.share, 300)).clip(0, len(there) - 1))
    ]
    return best.score[there].tolist(), fpir[there].tolist()


def _open(searches: Searches, cut: Cut, k: int, photos: int) -> OpenSet:
    resolution = metrics.resolvable(cut.fpir, searches.non_mated.strangers)
    return OpenSet(
        k=k, photos=photos, cut=cut, fpir=openset.fpir(searches.non_mated, k, -cut.distance),
        tpir=openset.tpir(searches.mated, k, -cut.distance), strangers=searches.non_mated.strangers,
        people=len(searches.mated.pool), status=resolution.status, needs=resolution.needs,
    )  # fmt: skip


def _closed(mated: Mated, k: int, photos: int) -> ClosedSet:
    return ClosedSet(
        k=k, photos=photos, people=len(mated.pool),
        ranks={rank: openset.tpir(mated, k, rank=rank) for rank in RANKS if rank <= k},
        cmc=tuple(openset.cmc(mated, k, range(1, min(k, 50) + 1)).tolist()),
    )  # fmt: skip


def _det(searches: Searches, k: int) -> tuple[list[float], list[float]]:
    """As far as ten strangers support it."""
    least = 10 / searches.non_mated.strangers
    if least >= 0.4:
        return [], []
    fpir, fnir = openset.det(searches, k, least=least)
    return fpir.tolist(), fnir.tolist()


def _learning(
    emb: ArrayLike, who: NDArray, enrolled: NDArray[np.bool_], stranger: NDArray[np.bool_], thresholds: _Thresholds, *,
    draws: int, seed: int, fpirs: Sequence[float],
) -> list[dict[str, Any]]:  # fmt: skip
    """The same people, enrolled with 1 to 5 photos."""
    count = np.bincount(who, minlength=len(enrolled))
    able = enrolled & (count > max(PHOTOS))
    k = int(able.sum())
    if k < 10:
        return []
    fpir = sorted(fpirs, reverse=True)[min(1, len(fpirs) - 1)]
    rows = []
    for number in range(1, max(PHOTOS) + 1):
        if not thresholds.enough(number):
            break
        searches = draw(emb, who, able, stranger, photos=number, draws=draws, seed=seed).searches
        cut = thresholds.cut(fpir, k, number)
        if cut is None:
            break
        found = _open(searches, cut, k, number)
        rows.append({"photos": number, "k": k, "open": found, "rank1": openset.tpir(searches.mated, k)})
    return rows


def _planned(searches: Searches, thresholds: _Thresholds, fpir: float) -> list[Planned]:
    rows = []
    for k in PLANNED:
        cut = thresholds.cut(fpir, k, 1)
        if cut is None:
            break
        found = openset.tpir(searches.mated, k, -cut.distance)
        rows.append(
            Planned(
                k=k, cut=cut, fnir=Rate(value=1 - found.value, low=1 - found.high, high=1 - found.low),
                extrapolated=cut.status == "extrapolated" or k > len(searches.mated.pool),
            )
        )  # fmt: skip
    return rows


def _growth(searches: Searches, cut: Cut) -> dict[str, Any]:
    """FPIR by gallery size at one threshold."""
    ks = [k for k in PLANNED if k <= 100_000]
    ends = [openset.bracket(searches.non_mated, k, -cut.distance) for k in ks]
    return {
        "cut": cut, "k": ks, "pool": len(searches.mated.pool), "low": [end[0] for end in ends],
        "high": [end[1] for end in ends], "naive": [openset.naive(searches.non_mated, k, -cut.distance) for k in ks],
    }  # fmt: skip


def _let_in(drawn: Drawn, cuts: Sequence[Cut]) -> list[LetIn]:
    """Each stranger once, with the person nearest to them in any draw; in the order of distance."""
    if not cuts:
        return []
    scores = drawn.searches.non_mated.scores
    pool = scores.shape[1]
    strangers = len(drawn.visitors) // len(drawn.templates)
    column = scores.argmax(axis=1)
    distance = -scores[np.arange(len(column)), column]
    seen: set[int] = set()
    rows = []
    for i in np.argsort(distance, kind="stable").tolist():
        accepting = [cut for cut in cuts if distance[i] <= cut.distance]
        if not accepting:
            break
        who = int(drawn.searches.non_mated.who[i])
        if who in seen:
            continue
        seen.add(who)
        template = int(drawn.templates[i // strangers, column[i] % pool, 0])
        rows.append(
            LetIn(
                probe=int(drawn.visitors[i]), template=template, distance=float(distance[i]),
                fpir=min(cut.fpir for cut in accepting),
            )
        )  # fmt: skip
    return rows

"""What a search among K enrolled people does: exact over all galleries of K people that a pool holds.

A search by somebody who is not enrolled is a false positive when anybody in the gallery scores at or above the threshold.
With m of a pool's M people at or above it for one stranger, the share of the galleries of K people that hold none of them
is C(M - m, K) / C(M, K): no gallery is drawn, and nothing is taken for independent. 1 - (1 - FMR)^K, which takes all
comparisons for independent, is `naive`, and only to be shown beside the others.

Scores are higher for more alike; a search is answered when a score is >= the threshold. A score of -inf marks somebody who
is not in the pool for that search: the stranger themself, where everybody searches among all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, hypergeom, t

from faceembed import metrics

__all__ = [
    "Mated",
    "NonMated",
    "Rate",
    "Searches",
    "bracket",
    "cmc",
    "det",
    "fpir",
    "naive",
    "none_drawn",
    "ranked",
    "threshold_at_fpir",
    "tpir",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of searches.

    Attributes:
      value: in [0, 1].
      low, high: 95 % interval over people, strangers and enrolled ones; the threshold and the encoder are given.
    """

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NonMated:
    """Searches by people who are not enrolled, each against everybody in the pool.

    Attributes:
      scores: [s, m] float; -inf where the pool's person is not there for that search.
      who: [s] the stranger behind each search; strangers weigh equally however many searches they have.
      pool: [m] the pool's people; one who is also in `who` counts as one person.
    """

    scores: NDArray[np.floating]
    who: NDArray
    pool: NDArray

    def __post_init__(self) -> None:
        _require(self.scores, self.who, self.pool)

    @property
    def sizes(self) -> Ints:
        """[s] how many of the pool each search meets."""
        return np.asarray((self.scores > -np.inf).sum(axis=1), np.int64)

    @property
    def weight(self) -> Floats:
        """[s] of each search, summing to 1; strangers weigh equally."""
        return _equal_people(self.who)

    @property
    def strangers(self) -> int:
        """Distinct people who search."""
        return len(np.unique(self.who))

    def searches(self, k: int) -> int:
        """Searches that share no comparison: strangers times the disjoint galleries of k in the pool, at least 1.

        Half of them where those who search are the pool: each pair of people meets twice.
        """
        both = len(np.intersect1d(self.who, self.pool)) / self.strangers
        return round(self.strangers * max(1, int(self.sizes.min()) // k) * (1 - both / 2))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mated:
    """Searches by people of the pool with another photo of themselves, each against everybody in it.

    Attributes:
      scores: [p, m] float, the mate among them.
      mate: [p] int column of the person who searches; people weigh equally however many searches they have.
      pool: [m] the pool's people.
    """

    scores: NDArray[np.floating]
    mate: Ints
    pool: NDArray

    def __post_init__(self) -> None:
        _require(self.scores, self.mate, self.pool)
        if self.mate.size and not (self.mate.min() >= 0 and self.mate.max() < len(self.pool)):
            raise ValueError(f"mates are columns {self.mate.min()} to {self.mate.max()} of a pool of {len(self.pool)}.")

    @property
    def own(self) -> NDArray[np.floating]:
        """[p] score of the mate."""
        return self.scores[np.arange(len(self.mate)), self.mate]

    @property
    def ahead(self) -> Ints:
        """[p] others of the pool who score at least as high as the mate: a tie counts against."""
        return np.asarray((self.scores >= self.own[:, None]).sum(axis=1) - 1, np.int64)

    @property
    def weight(self) -> Floats:
        """[p] of each search, summing to 1; people weigh equally."""
        return _equal_people(self.mate)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Searches:
    """One pool, searched by its own people and by strangers."""

    mated: Mated
    non_mated: NonMated


def _require(scores: NDArray, who: NDArray, pool: NDArray) -> None:
    if scores.ndim != 2 or scores.shape != (len(who), len(pool)) or not scores.size:
        raise ValueError(
            f"scores {scores.shape} for {len(who)} searches of a pool of {len(pool)}: give [searches, pool]."
        )
    if np.isnan(scores).any() or (scores == np.inf).any():
        raise ValueError("scores hold NaN or +inf: a search cannot be ranked by them. Were all photos embedded?")


def _equal_people(who: ArrayLike) -> Floats:
    _, index, count = np.unique(np.asarray(who), return_inverse=True, return_counts=True)
    return 1.0 / (len(count) * count[index])


# ---- over all galleries ------------------------------------------------------------------------------------------------


def none_drawn(m: ArrayLike, pool: int, k: int) -> Floats:
    """Chance that none of m given people is among k drawn from a pool: C(pool - m, k) / C(pool, k).

    For k beyond the pool the draw is with replacement, (1 - m/pool)^k: the chance under the shares seen in the pool, an
    extrapolation.

    Args:
      m: int, any shape, 0 to pool.
      pool: people to draw from, at least 1.
      k: people drawn, at least 0.

    Returns:
      float64 of m's shape.

    >>> none_drawn([0, 1, 2], pool=4, k=2).round(4).tolist()
    [1.0, 0.5, 0.1667]
    """
    if pool < 1 or k < 0:
        raise ValueError(f"{k} people of a pool of {pool}: a pool has one person or more, and a gallery none or more.")
    m = np.asarray(m, np.int64)
    if k > pool:
        return (1 - m / pool) ** k
    # A product of ratios and not of binomials: exact to rounding whatever the size of the pool.
    ratios = (pool - k - np.arange(pool)) / (pool - np.arange(pool))
    return np.concatenate([[1.0], np.cumprod(np.maximum(ratios, 0.0))])[m]


def _reached(scores: NDArray[np.floating], threshold: float) -> NDArray[np.bool_]:
    # In float64: NumPy would round a Python float to float32 beside float32 scores, and a threshold just above a score is
    # then that score.
    return scores >= np.float64(threshold)


def _found(non_mated: NonMated, k: int, threshold: float) -> tuple[Ints, Floats]:
    """([s] people at or above the threshold, [s] chance that a gallery of k holds one of them)."""
    m = np.asarray(_reached(non_mated.scores, threshold).sum(axis=1), np.int64)
    sizes = non_mated.sizes
    chance = np.empty(len(m))
    for size in np.unique(sizes).tolist():  # one size, or two where some of the strangers are in the pool themselves
        rows = sizes == size
        chance[rows] = 1 - none_drawn(m[rows], size, k)
    return m, chance


def fpir(non_mated: NonMated, k: int, threshold: float) -> Rate:
    """FPIR(K, T): share of the searches by strangers that are answered with somebody.

    The mean over strangers of 1 - C(M - m_i, K) / C(M, K), m_i the people of the pool who score at or above T for
    stranger i. Beyond the pool it is what `bracket` calls the lower end.

    Args:
      non_mated: the searches.
      k: people enrolled, at least 1.
      threshold: a score.

    Returns:
      `Rate`. The interval adds up what each person moves the rate by, as a stranger and as one who is enrolled (the
      first-order projection of the U-statistic), so that it holds for other strangers and other people enrolled.
    """
    pool = int(non_mated.sizes.min())
    if not 1 <= k <= pool:
        raise ValueError(
            f"k is {k}: galleries of one person or more, up to the {pool} that every search meets, can be drawn. `bracket` "
            "says what is known beyond."
        )
    m, chance = _found(non_mated, k, threshold)
    weight, sizes = non_mated.weight, non_mated.sizes
    value = float(weight @ chance)
    # Somebody at or above the threshold decides where none of the m - 1 others who are is among the k - 1 others enrolled.
    alone = np.zeros(len(m))
    for size in np.unique(sizes).tolist():
        rows = (sizes == size) & (m > 0)
        alone[rows] = none_drawn(m[rows] - 1, size - 1, k - 1) if size > 1 else 1.0
    pulls = (weight * alone) @ _reached(non_mated.scores, threshold)
    columns = k / len(non_mated.pool) * (pulls - pulls.mean())
    return _rate(value, non_mated.who, weight * (chance - value), non_mated.pool, columns)


def tpir(mated: Mated, k: int, threshold: float = -np.inf, *, rank: int = 1) -> Rate:
    """TPIR(K, R, T): share of the searches by enrolled people whose mate is among the first R and at or above T.

    With r_i of the M - 1 others ahead of the mate, the mate is among the first R of a gallery of K with the chance that
    fewer than R of those r_i are among its K - 1 others (hypergeometric; C(M-1-r_i, K-1) / C(M-1, K-1) for R = 1).
    1 - TPIR is FNIR(K, R, T); with T = -inf it is the closed set's rank-R rate.

    Args:
      mated: the searches.
      k: people enrolled, at least 1. Beyond the pool the others are drawn with replacement, and it is at most what the
        pool shows: an extrapolation, and too high in expectation, since nobody is ahead who was not seen.
      threshold: a score.
      rank: R.

    Returns:
      `Rate`, its interval as `fpir`'s.
    """
    if k < 1 or rank < 1:
        raise ValueError(f"k is {k} and rank {rank}: both are 1 or more.")
    others = len(mated.pool) - 1
    ahead, weight = mated.ahead, mated.weight
    accepted = _reached(mated.own, threshold)
    share = ahead / max(1, others)
    if k - 1 <= others:
        among = hypergeom.cdf(rank - 1, others, ahead, k - 1) if others else np.ones(len(ahead))
    else:
        among = binom.cdf(rank - 1, k - 1, share)
    if k - 1 > others:
        # Drawing somebody twice must not make a larger gallery look like a smaller one.
        among = np.minimum(among, hypergeom.cdf(rank - 1, others, ahead, others) if others else 1.0)
    hit = accepted * among
    value = float(weight @ hit)
    columns = np.zeros(len(mated.pool))
    if k > 1 and others:
        # Each of those ahead of the mate costs the chance that R - 1 of the others ahead are among the k - 2 others.
        before = np.maximum(ahead - 1, 0)
        if k > others + 1:
            just = binom.pmf(rank - 1, k - 2, before / max(1, others - 1))
        else:
            just = hypergeom.pmf(rank - 1, others - 1, before, k - 2)
        cost = weight * accepted * just
        beaten = mated.scores >= mated.own[:, None]
        beaten[np.arange(len(mated.mate)), mated.mate] = False
        pulls = cost @ beaten
        columns = -(k - 1) / others * (pulls - pulls.mean())
    return _rate(value, mated.pool[mated.mate], weight * (hit - value), mated.pool, columns)


def cmc(mated: Mated, k: int, ranks: Sequence[int]) -> Floats:
    """Cumulative match characteristic of the closed set: [r] share of searches whose mate is among the first R of K."""
    return np.array([tpir(mated, k, rank=rank).value for rank in ranks])


def det(searches: Searches, k: int, *, least: float, most: float = 0.5, points: int = 120) -> tuple[Floats, Floats]:
    """(FPIR, FNIR) along thresholds of these people themselves, in galleries of k: a curve to look at, no figure to quote.

    Args:
      searches: of one pool.
      k: people enrolled, at most the pool.
      least, most: ends of the FPIRs.
      points: between them, at equal ratios.

    Returns:
      [points] each; FNIR(K, R=1, T) as `tpir` counts it.
    """
    mated, best = searches.mated, ranked(searches.non_mated, share=most)
    others = len(mated.pool) - 1
    first = hypergeom.cdf(0, others, mated.ahead, k - 1) if others else np.ones(len(mated.mate))
    order = np.argsort(mated.own, kind="stable")
    above = np.concatenate([np.cumsum((mated.weight * first)[order][::-1])[::-1], [0.0]])
    targets = np.geomspace(least, most * (1 - 1e-9), points)
    curve = best.fpir(k)
    past = np.minimum(np.searchsorted(curve, targets * (1 + 1e-9), side="right"), len(curve) - 1)
    cuts = np.nextafter(best.score[past], np.inf)
    return targets, 1 - above[np.searchsorted(mated.own[order].astype(np.float64), cuts)]


def _rate(value: float, rows: NDArray, of_rows: Floats, columns: NDArray, of_columns: Floats) -> Rate:
    """An interval from what each search and each enrolled person adds to the deviation; one person's parts are added up."""
    names, index = np.unique(np.concatenate([np.asarray(rows), np.asarray(columns)]), return_inverse=True)
    moves = np.bincount(index, np.concatenate([of_rows, of_columns]), len(names))
    searching = len(np.unique(index[: len(rows)]))
    variance = float(np.square(moves).sum()) * searching / max(1, searching - 1)
    if searching == 1 or variance < 1e-18 or not 1e-9 < value < 1 - 1e-9:
        # Nothing varies, in these data: as many trials as people who searched.
        low, high = metrics.wilson(min(1.0, max(0.0, value)), searching)
    else:
        # Where few people move it most, their number is what the variance rests on: Student's quantile, with the effective
        # number of people as degrees of freedom.
        few = np.square(moves).sum() ** 2 / (moves**4).sum()
        degrees = max(1.0, min(float(few), searching - 1.0))
        level = min(2 * NormalDist().cdf(float(t.ppf(0.975, degrees))) - 1, 1 - 1e-9)
        low, high = metrics.wilson(value, value * (1 - value) / variance, level=level)
    return Rate(value=value, low=min(low, value), high=max(high, value))


# ---- thresholds --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """The highest scores of non-mated searches: the distribution of the best score in a gallery of K, for any K.

    The j-th best score of a search is the best of a gallery with the chance C(M - j, K - 1) / C(M, K): that the person is
    in it, and none of the j - 1 better ones.

    Attributes:
      score: [n] descending.
      search: [n] int row of each.
      place: [n] int, 1 for the best score of its search.
      weight: [s] of each search.
      who: [s] the stranger behind it.
      sizes: [s] people each search meets.
      share: FPIRs up to this are covered, for every K.
      single: searches of one person that share no comparison, as `NonMated.searches(pool)` counts them.
    """

    score: Floats
    search: Ints
    place: Ints
    weight: Floats
    who: NDArray
    sizes: Ints
    share: float
    single: int

    @property
    def pool(self) -> int:
        """People that every search meets at least: larger galleries are extrapolations."""
        return int(self.sizes.min())

    def searches(self, k: int) -> int:
        """As `NonMated.searches`."""
        return self.single * max(1, self.pool // k)

    def weights(self, k: int) -> Floats:
        """[n] share of searches in galleries of k whose best score is this one.

        Raises:
          ValueError: k lies beyond the pool.
        """
        if not 1 <= k <= self.pool:
            raise ValueError(f"k is {k}: galleries of 1 to {self.pool} people can be drawn from this pool.")
        found = np.empty(len(self.score))
        sizes = self.sizes[self.search]
        for size in np.unique(sizes).tolist():
            here = sizes == size
            before = none_drawn(np.arange(size), size, k)  # none of the j - 1 better ones
            place = self.place[here]
            found[here] = before[place - 1] * np.minimum(1.0, k / (size - place + 1))
        return found * self.weight[self.search]

    def fpir(self, k: int) -> Floats:
        """[n] FPIR when the threshold is this score, in galleries of k: never falling."""
        return np.cumsum(self.weights(k))

    def from_size(self, k: int) -> Ranked:
        """The scores that galleries of k people and more need: FPIR rises with the size, so fewer reach its share."""
        enough = int(np.searchsorted(self.fpir(k), self.share * (1 + 1e-9), side="right")) + 1
        last = int(np.searchsorted(-self.score, -self.score[min(enough, len(self.score)) - 1], side="right"))
        return dataclasses.replace(
            self, score=self.score[:last], search=self.search[:last], place=self.place[:last],
        )  # fmt: skip


def ranked(non_mated: NonMated, *, share: float = 0.1) -> Ranked:
    """Prepares thresholds for FPIRs up to `share`, for every gallery size.

    FPIR(K, T) >= FPIR(1, T) = FMR(T), so nothing below the threshold of that FMR is ever needed.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}: give the largest FPIR that a threshold is wanted for, such as 0.1.")
    scores, weight, sizes = non_mated.scores, non_mated.weight, non_mated.sizes
    if not sizes.all():
        raise ValueError(f"search {int(np.argmin(sizes))} meets nobody: a pool of two people or more is needed.")
    flat = scores.ravel()
    few = max(1, int(2 * share * flat.size))
    while True:  # most scores are far below, and need not be sorted
        few = min(few, flat.size)
        least = np.partition(flat, flat.size - few)[flat.size - few]
        high = np.flatnonzero(flat >= max(least, np.nextafter(-np.inf, 0)))
        order = high[np.argsort(-flat[high], kind="stable")]
        rows = order // scores.shape[1]
        # The share is of each search's weight, whatever the number of people it meets.
        fmr = np.cumsum(weight[rows] / sizes[rows])
        # One score more than the share covers, and all that equal it: the threshold lies above them.
        last = int(np.searchsorted(fmr, share * (1 + 1e-12), side="right"))
        if last < len(order) or few == flat.size:
            break
        few *= 2
    floor = flat[order[min(last, len(order) - 1)]]
    kept = order[: int(np.searchsorted(-flat[order], -floor, side="right"))]
    search = np.asarray(kept // scores.shape[1], np.int64)
    by_search = np.argsort(search, kind="stable")  # descending scores within each search
    start = np.searchsorted(search[by_search], search[by_search])
    place = np.empty(len(kept), np.int64)
    place[by_search] = np.arange(len(kept)) - start + 1
    return Ranked(
        score=flat[kept].astype(np.float64), search=search, place=place, weight=weight, who=np.asarray(non_mated.who),
        sizes=sizes, share=share, single=non_mated.searches(int(sizes.min())),
    )  # fmt: skip


def threshold_at_fpir(best: Ranked, k: int, target: float) -> float:
    """The lowest threshold whose FPIR in galleries of k of these searches is at most `target`: an order statistic.

    Args:
      best: of `ranked`.
      k: people enrolled, at most the pool.
      target: FPIR in (0, `best.share`].

    Returns:
      A score, the next float64 above the first one that may not be answered; scores tied with it are all refused.

    Raises:
      ValueError: k or the target is out of range.
    """
    if not 0 < target <= best.share:
        raise ValueError(f"the target FPIR is {target}: give one above 0 and at most {best.share:g}.")
    curve = best.fpir(k)
    past = int(np.searchsorted(curve, target * (1 + 1e-9), side="right"))
    if past == len(curve):  # only where the highest share of all scores is asked for, and all are kept
        return float(best.score[-1])
    return float(np.nextafter(best.score[past], np.inf))


# ---- beyond the pool ---------------------------------------------------------------------------------------------------


def bracket(non_mated: NonMated, k: int, threshold: float) -> tuple[float, float]:
    """(low, high) between which FPIR(K, T) lies in expectation, for K beyond the pool; equal to `fpir` within it.

    Low: 1 - mean (1 - m_i/M)^K, or FPIR(M) where that is more. As 1 - (1 - p)^K is concave in p, the shares m_i/M in the
    place of the true ones make it too low: strangers with no match in the pool are taken to have none anywhere.

    High: FPIR(M) + (K - M)/M · (share of strangers with exactly one match). FPIR is concave in K, so the last step, from
    M - 1 to M people, bounds all that follow; it is the estimate of Good and Turing for what was not seen.

    References:
      Good, "The population frequencies of species and the estimation of population parameters" (1953).
    """
    m, chance = _found(non_mated, k, threshold)
    weight, sizes = non_mated.weight, non_mated.sizes
    least = int(sizes.min())
    if k <= least:
        return float(weight @ chance), float(weight @ chance)
    seen = float(weight @ (m > 0))  # in a gallery of the whole pool, which a larger one may hold
    last = float(weight @ ((m == 1) / sizes))
    return max(seen, float(weight @ chance)), min(1.0, seen + (k - least) * last)


def naive(non_mated: NonMated, k: int, threshold: float) -> float:
    """1 - (1 - FMR)^K: what FPIR would be if all comparisons were independent. They are not: to be shown, not used."""
    m, _ = _found(non_mated, 1, threshold)
    fmr = float(non_mated.weight @ (m / non_mated.sizes))
    return 1 - (1 - fmr) ** k

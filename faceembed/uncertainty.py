"""Intervals for figures over pairs that share people: such pairs are not independent trials.

Two comparisons of one person's photos tend to fail together. Treating 1,000 pairs as 1,000 coin tosses then gives an
interval that is too narrow. For lists of pairs the covariance of every two pairs that share a person is added up (the
sandwich of `dyadic_covariance`); a figure enters by its influence values: what each pair moves it by, times n. For all
pairs of a set of photos, people are given random weights (the vertex bootstrap, `verification.dense`).

`python -m experiments.coverage` simulates how often each of these intervals holds what it should.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, rankdata, t

from faceembed import metrics

__all__ = [
    "Difference",
    "Interval",
    "McNemar",
    "auc_influence",
    "detectable",
    "differences",
    "dyadic_covariance",
    "dyadic_interval",
    "dyadic_variance",
    "effective_number",
    "matched_tar_influence",
    "mcnemar",
    "pair_weights",
    "rate_interval",
    "roc_band",
    "vertex_weights",
    "wilson_interval",
]

Floats = NDArray[np.float64]

POWER = 0.8
"""With which `Difference.detectable` would be found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """An interval and what it takes for granted.

    Attributes:
      low, high: the limits.
      level: coverage aimed at, such as 0.95.
      n: pairs.
      n_effective: independent pairs that would say as much; at most n.
      assumes: in words, what must hold for the coverage to be right.
    """

    low: float
    high: float
    level: float
    n: int
    n_effective: float
    assumes: str


def _people(person_a: ArrayLike, person_b: ArrayLike, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    a, b = np.asarray(person_a), np.asarray(person_b)
    if a.shape != (n,) or b.shape != (n,):
        raise ValueError(f"people {a.shape} and {b.shape} for {n} pairs: give one person a side and pair.")
    names, index = np.unique(np.concatenate([a, b]), return_inverse=True)
    return index[:n].astype(np.int64), index[n:].astype(np.int64), len(names)


def dyadic_variance(residual: ArrayLike, person_a: ArrayLike, person_b: ArrayLike) -> float:
    """Variance of a mean over pairs, robust to any dependence between pairs that share a person.

    Var = (1/N²) Σ r_p r_q over all ordered (p, q), p = q included, whose pairs have a person in common. It takes
    O(N log N): the squared sums of each person's residuals count two pairs once for each person they share, and the
    squared sums of each couple's residuals take off what was counted twice.

    Args:
      residual: [n] float: each pair's value less the mean.
      person_a, person_b: [n] person ids of any comparable type; equal in a genuine pair. Their order does not matter.

    Returns:
      The variance. The estimator is not positive semi-definite: with few people it can come out at or below 0, which
      the caller must handle (`dyadic_interval` does).

    Raises:
      ValueError: lengths differ, there are no pairs, or a residual is not finite.

    References:
      Aronow, Samii & Assenova, "Cluster-robust variance estimation for dyadic data", Political Analysis 23 (2015),
      eq. 6; Fogliato, Patil & Perona, "Confidence intervals for error rates in 1:1 matching tasks" (2024).

    >>> dyadic_variance([1.0, -1.0], ["ann", "bob"], ["cid", "dan"])
    0.5
    >>> dyadic_variance([1.0, 1.0], ["ann", "ann"], ["cid", "dan"])
    1.0
    """
    r = np.asarray(residual, np.float64)
    if r.ndim != 1 or not len(r):
        raise ValueError(f"residual has shape {r.shape}: give one number a pair, and at least one pair.")
    return float(dyadic_covariance(r[None], person_a, person_b)[0, 0])


def dyadic_covariance(
    residuals: ArrayLike, person_a: ArrayLike, person_b: ArrayLike, *, leverage: bool = False
) -> Floats:
    """Covariances of several means over the same pairs, robust to any dependence between pairs that share a person.

    `dyadic_variance` for each, and what they have in common: Cov = (1/N²) Σ r_kp r_lq over the same (p, q).

    Args:
      residuals: [k, n] float: influence values of each figure, whose mean is 0.
      person_a, person_b: [n] person ids of any comparable type; equal in a genuine pair. Their order does not matter.
      leverage: correct for people who pull the figure towards themselves, and so leave small residuals: a person's share
        h of the genuine (impostor) pairs scales their residuals in those by 1/(1 - h). For a figure that is a mean over
        one kind of pair, or over each, that makes their sum what the figure moves by when they are left out (the
        jackknife, HC3); for a share of all pairs, as accuracy, it is more. It changes little unless somebody has many
        pairs.

    Returns:
      [k, k], symmetric; not positive semi-definite for certain.

    Raises:
      ValueError: lengths differ, there are no pairs, or a residual is not finite.

    >>> dyadic_covariance([[1.0, -1.0], [1.0, 1.0]], ["ann", "ann"], ["cid", "dan"]).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    r = np.asarray(residuals, np.float64)
    if r.ndim != 2 or not r.size:
        raise ValueError(f"residuals have shape {r.shape}: give [k, n], a row a figure, and at least one pair.")
    bad = np.flatnonzero(~np.isfinite(r).all(axis=0))
    if len(bad):
        raise ValueError(f"residuals are not finite, first at rows {bad[:5].tolist()}.")
    n = r.shape[1]
    a, b, m = _people(person_a, person_b, n)
    different = a != b
    couple = np.minimum(a, b)[different] * m + np.maximum(a, b)[different]
    _, which = np.unique(couple, return_inverse=True)
    pulls_a, pulls_b = _pull(a, b, m) if leverage else (np.ones(n), np.ones(n))
    both = np.sqrt(pulls_a * pulls_b)[different]
    first, second = r * pulls_a, (r * pulls_b)[:, different]
    by_person = np.stack(
        [np.bincount(a, one, m) + np.bincount(b[different], other, m) for one, other in zip(first, second, strict=True)]
    )
    by_couple = np.stack([np.bincount(which, row * both) for row in r[:, different]])
    return (by_person @ by_person.T - by_couple @ by_couple.T) / n**2


def _pull(a: NDArray[np.int64], b: NDArray[np.int64], m: int) -> tuple[Floats, Floats]:
    """[n] 1/(1 - h) for the person on each side, h their share of the pairs of that kind."""
    factors = np.empty((2, len(a)))
    for kind in (a == b, a != b):
        total = int(kind.sum())
        own = np.bincount(a[kind], minlength=m) + np.bincount(b[kind & (a != b)], minlength=m)
        # Somebody who has all pairs of a kind cannot be left out: as if one more pair were somebody else's.
        factor = total / np.maximum(total - own, 1)
        for side, people in zip(factors, (a, b), strict=True):
            side[kind] = factor[people[kind]]
    return factors[0], factors[1]


def dyadic_interval(
    correct: ArrayLike, person_a: ArrayLike, person_b: ArrayLike, *, level: float = 0.95, extra: float = 0.0
) -> Interval:
    """Interval for a share of pairs (an accuracy) when pairs share people: Wilson's, with the effective n.

    The effective n is p(1-p) / Var with the variance of `dyadic_covariance`, corrected for leverage. It is never taken
    above n: a variance below that of independent pairs is taken for noise. Where every pair agrees (p is 0 or 1) the
    residuals say nothing about dependence, and the effective n is the number of people, or n if that is smaller.

    The quantile is Student's with people - 1 degrees of freedom, which matters with few people: a normal one holds 90 % of
    the time with 10 of them where 95 % were asked for.

    Args:
      correct: [n] bool, or 0/1.
      person_a, person_b: [n] person ids, equal in a genuine pair.
      level: coverage in (0, 1).
      extra: variance from elsewhere that is added, such as that of the head over other training people.

    Returns:
      `Interval`; without `extra` conditional on the fitted head: only the test pairs are regarded as drawn at random.

    Raises:
      ValueError: as `dyadic_variance` and `metrics.wilson`.

    >>> interval = dyadic_interval([1, 1, 1, 0], ["ann", "ann", "cid", "dan"], ["ann", "bob", "eve", "fay"])
    >>> round(interval.low, 3), round(interval.high, 3), round(interval.n_effective, 2)
    (0.115, 0.986, 1.67)
    """
    y = np.asarray(correct)
    if y.ndim != 1 or not np.isin(y, (0, 1)).all():
        raise ValueError(f"correct {y.shape} must be one-dimensional and hold only 0 and 1.")
    y = y.astype(np.float64)
    dyadic_variance(y, person_a, person_b)  # refuses what cannot be
    variance = float(dyadic_covariance((y - y.mean())[None], person_a, person_b, leverage=True)[0, 0])
    p, n = float(y.mean()), len(y)
    if p in (0.0, 1.0):
        effective = float(min(n, _people(person_a, person_b, n)[2]))
        low, high = _widened(p, *metrics.wilson(p, effective, level=level), extra, level)
    else:
        effective = p * (1 - p) / (max(variance, p * (1 - p) / n) + extra)
        low, high = metrics.wilson(p, effective, level=_level_of_t(level, person_a, person_b, n))
    return Interval(
        low=low,
        high=high,
        level=level,
        n=n,
        n_effective=effective,
        assumes="pairs without a person in common are independent"
        + ("; training people are as those at hand" if extra else "; the head is given"),
    )


def rate_interval(
    estimate: float,
    influence: ArrayLike,
    person_a: ArrayLike | None,
    person_b: ArrayLike | None,
    *,
    level: float = 0.95,
    extra: float = 0.0,
) -> tuple[float, float]:
    """Interval for a figure in [0, 1] that has influence values (AUC, TAR at a matched FAR): Wilson's, effective n.

    The quantile is Student's, as in `dyadic_interval`.

    Args:
      estimate: the figure.
      influence: [n] influence values, of mean 0.
      person_a, person_b: [n] person ids, or None for both: pairs then count as independent.
      level: coverage in (0, 1).
      extra: variance that is added.

    Returns:
      (low, high) within [0, 1]. A figure of 0 or 1 has no variance to estimate: the effective n is then the number of
      people, or of pairs where people are unknown.

    Raises:
      ValueError: as `dyadic_variance` and `metrics.wilson`.

    >>> scores, same = [3, 2, 1, 0], [True, False, True, False]
    >>> low, high = rate_interval(0.75, auc_influence(scores, same), None, None)
    >>> round(float(low), 3), round(float(high), 3)
    (0.256, 0.963)
    """
    r = np.asarray(influence, np.float64)
    variance = _variances(r[None], person_a, person_b)[0] + extra
    if variance > 0 and 0 < estimate < 1:
        # It may exceed the number of pairs: an AUC compares each genuine pair with each impostor pair.
        effective = float(estimate * (1 - estimate) / variance)
        return metrics.wilson(estimate, effective, level=_level_of_t(level, person_a, person_b, len(r)))
    p = min(1.0, max(0.0, estimate))
    return _widened(p, *metrics.wilson(p, _units(len(r), person_a, person_b), level=level), extra, level)


def _widened(estimate: float, low: float, high: float, extra: float, level: float) -> tuple[float, float]:
    """Limits with a variance added in squares: for an estimate at the edge, where an effective n cannot hold it."""
    half = NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(extra)
    return max(0.0, estimate - math.hypot(estimate - low, half)), min(1.0, estimate + math.hypot(high - estimate, half))


def _units(n: int, person_a: ArrayLike | None, person_b: ArrayLike | None) -> int:
    if person_a is None or person_b is None:
        return n
    return min(n, _people(person_a, person_b, n)[2])


def _degrees(person_a: ArrayLike | None, person_b: ArrayLike | None, n: int) -> float:
    """Of freedom of a variance: people - 1 as for other clusters; infinitely many where pairs count as independent."""
    if person_a is None or person_b is None:
        return np.inf
    return max(1, _people(person_a, person_b, n)[2] - 1)


def _level_of_t(level: float, person_a: ArrayLike | None, person_b: ArrayLike | None, n: int) -> float:
    """The level at which a normal quantile is as large as Student's at this one."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a coverage between 0 and 1, such as 0.95.")
    quantile = float(t.ppf((1 + level) / 2, _degrees(person_a, person_b, n)))
    # At one degree of freedom the level may round to 1, which has no quantile.
    return min(2 * NormalDist().cdf(quantile) - 1, 1 - 1e-12)


def _variances(r: Floats, person_a: ArrayLike | None, person_b: ArrayLike | None) -> Floats:
    """[k] variances, none below that of independent pairs."""
    least = np.square(r).sum(axis=1) / r.shape[1] ** 2
    if person_a is None or person_b is None:
        return least
    return np.maximum(np.diag(dyadic_covariance(r, person_a, person_b, leverage=True)), least)


def wilson_interval(correct: ArrayLike, *, level: float = 0.95) -> Interval:
    """Wilson's interval for a share of pairs of which the people are unknown: too narrow when pairs share people.

    Args:
      correct: [n] bool, or 0/1.
      level: coverage in (0, 1).

    Returns:
      `Interval`, whose `assumes` says that independence is taken for granted.

    Raises:
      ValueError: as `metrics.wilson`.
    """
    y = np.asarray(correct, np.float64)
    if y.ndim != 1 or not len(y):
        raise ValueError(f"correct has shape {y.shape}: give one entry a pair, and at least one pair.")
    low, high = metrics.wilson(float(y.mean()), len(y), level=level)
    return Interval(
        low=low,
        high=high,
        level=level,
        n=len(y),
        n_effective=float(len(y)),
        assumes="ALL pairs are independent (people not given): too narrow if pairs share people",
    )


# ---- figures by influence ----------------------------------------------------------------------------------------------


def auc_influence(scores: ArrayLike, same: ArrayLike) -> Floats:
    """What each pair moves the AUC by, times n: DeLong's placements.

    A genuine pair's is (share of impostor pairs below it - AUC)·n/genuine, an impostor pair's (share of genuine pairs above
    it - AUC)·n/impostor, ties counting one half. For independent pairs, their mean square over n is DeLong's variance with
    m and n in the place of m - 1 and n - 1.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.

    Returns:
      [n] float64 of mean 0.

    References:
      DeLong, DeLong & Clarke-Pearson, "Comparing the areas under two or more correlated ROC curves" (1988).

    >>> auc_influence([3, 2, 1, 0], [True, False, True, False]).tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    area = metrics.auc(scores, same)
    s, y = np.asarray(scores, np.float64), np.asarray(same, bool)
    n, genuine = len(y), int(y.sum())
    everyone = rankdata(s)
    result = np.empty(n)
    # A rank among all less the rank among one's own kind counts those of the other kind below, ties for one half.
    result[y] = ((everyone[y] - rankdata(s[y])) / (n - genuine) - area) * n / genuine
    result[~y] = (1 - (everyone[~y] - rankdata(s[~y])) / genuine - area) * n / (n - genuine)
    return result


def matched_tar_influence(scores: ArrayLike, same: ArrayLike, far: float) -> Floats:
    """What each pair moves the TAR by, times n, where the threshold is set for a FAR on these same pairs.

    Delta method: a genuine pair's is (accepted - TAR)·n/genuine; an accepted impostor pair raises the threshold, which
    costs the ROC's slope there: -slope·(accepted - FAR)·n/impostor. The slope is that of the chord of the ROC between FARs
    a quarter below and above the target, or one and a half standard errors of the FAR, whichever is wider.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.
      far: target in (0, 1).

    Returns:
      [n] float64 of mean 0.

    Raises:
      ValueError: as `metrics.threshold_at_far`.
    """
    y = np.asarray(same, bool)
    accepted = np.asarray(scores, np.float64) >= metrics.threshold_at_far(scores, same, far)
    n, genuine = len(y), int(y.sum())
    impostor = n - genuine
    width = max(far / 4, 1.5 * (far * (1 - far) / impostor) ** 0.5)
    low, high = max(0.0, far - width), min(1.0, far + width)
    curve = metrics.roc(scores, same)
    # The hull of ties: TAR as a function of FAR, straight between the ROC's points.
    tar = np.interp([low, high], curve.far, curve.tar)
    slope = float(tar[1] - tar[0]) / (high - low)
    result = np.empty(n)
    result[y] = (accepted[y] - accepted[y].mean()) * n / genuine
    result[~y] = -slope * (accepted[~y] - accepted[~y].mean()) * n / impostor
    return result


# ---- differences -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A head's figure less the reference's, on the same pairs.

    Attributes:
      estimate: the difference, as a fraction of 1.
      standard_error: of `estimate`.
      low, high: the interval of this difference alone.
      simultaneous_low, simultaneous_high: intervals that hold for all heads of the family at once.
      level: coverage aimed at.
      n: pairs.
      detectable: the true difference that a test at this level would find with 80 % power on such data.
      assumes: in words, what must hold.
    """

    estimate: float
    standard_error: float
    low: float
    high: float
    simultaneous_low: float
    simultaneous_high: float
    level: float
    n: int
    detectable: float
    assumes: str


def detectable(standard_error: float, level: float) -> float:
    """The true difference that a two-sided test at 1 - level finds with 80 % power.

    >>> round(detectable(1.0, 0.95), 3)
    2.802
    """
    normal = NormalDist()
    return (normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(POWER)) * standard_error


def differences(
    influence: ArrayLike,
    estimates: ArrayLike,
    person_a: ArrayLike | None,
    person_b: ArrayLike | None,
    *,
    extra: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 20_000,
    seed: int = 0,
) -> list[Difference]:
    """Intervals for several heads' differences to one reference, each alone and all at once (max-|t|).

    The covariance of the differences is that of `dyadic_covariance`, corrected for leverage, a variance being never taken
    below that of independent pairs. Quantiles are Student's with people - 1 degrees of freedom; the simultaneous critical
    value is that of the largest of k |t| of multivariate t draws with the differences' correlation. Where a head decides
    every pair as the reference does, nothing varies: the interval is ±3/people (three over pairs where people are unknown),
    as for a rate of which no event was seen.

    Args:
      influence: [k, n] influence values of each head's figure less those of the reference's.
      estimates: [k] the differences.
      person_a, person_b: [n] person ids, or None for both: pairs then count as independent.
      extra: [k, k] covariance that is added, such as that over other training people.
      level: coverage in (0, 1).
      draws, seed: of the multivariate t draws.

    Returns:
      k `Difference`.

    Raises:
      ValueError: shapes differ, a value is not finite, or `level` is outside (0, 1).

    References:
      Aronow, Samii & Assenova (2015), eq. 6; Hothorn, Bretz & Westfall, "Simultaneous inference in general parametric
      models" (2008) for max-|t|.

    >>> [d] = differences([[1.0, -1.0, 1.0, -1.0]], [0.1], None, None)
    >>> round(d.standard_error, 3), round(d.low, 3), round(d.simultaneous_high, 3), round(d.detectable, 3)
    (0.5, -0.88, 1.08, 1.401)
    """
    r, estimate = np.asarray(influence, np.float64), np.asarray(estimates, np.float64)
    if r.ndim != 2 or estimate.shape != r.shape[:1]:
        raise ValueError(f"influence {r.shape} and estimates {estimate.shape}: give [k, n] and [k].")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a coverage between 0 and 1, such as 0.95.")
    k, n = r.shape
    variance = _variances(r, person_a, person_b)
    if person_a is None or person_b is None:
        covariance = r @ r.T / n**2
        assumes = "ALL pairs are independent (people not given): too narrow if pairs share people"
    else:
        covariance = dyadic_covariance(r, person_a, person_b, leverage=True)
        assumes = "pairs without a person in common are independent"
    raised = np.sqrt(variance / np.where(np.diag(covariance) > 0, np.diag(covariance), 1))
    covariance = covariance * np.outer(raised, raised)
    np.fill_diagonal(covariance, variance)
    if extra is not None:
        covariance = covariance + np.asarray(extra, np.float64)
        assumes += "; training people are as those at hand"
    else:
        assumes += "; the heads are given"
    error = np.sqrt(np.diag(covariance))
    degrees = _degrees(person_a, person_b, n)
    alone = float(t.ppf((1 + level) / 2, degrees))
    critical = _largest_t(covariance, degrees, level, draws, seed) if k > 1 else alone
    nothing = 3 / _units(n, person_a, person_b)
    found = []
    for value, e in zip(estimate.tolist(), error.tolist(), strict=True):
        half, wide = (alone * e, critical * e) if e > 0 else (nothing, nothing)
        found.append(
            Difference(
                estimate=value,
                standard_error=e,
                low=value - half,
                high=value + half,
                simultaneous_low=value - wide,
                simultaneous_high=value + wide,
                level=level,
                n=n,
                detectable=detectable(e, level) if e > 0 else nothing,
                assumes=assumes,
            )
        )
    return found


def _largest_t(covariance: Floats, degrees: float, level: float, draws: int, seed: int) -> float:
    """The quantile of the largest |t| of multivariate t draws with this covariance; of those that vary at all."""
    moving = np.diag(covariance) > 0
    if not moving.any():
        return 0.0
    c = covariance[np.ix_(moving, moving)]
    error = np.sqrt(np.diag(c))
    value, vector = np.linalg.eigh(c / np.outer(error, error))
    # The sandwich need not be positive semi-definite: what is negative is noise.
    root = vector * np.sqrt(np.maximum(value, 0))
    root /= np.linalg.norm(root, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    largest = np.abs(rng.standard_normal((draws, len(c))) @ root.T).max(axis=1)
    if np.isfinite(degrees):
        largest /= np.sqrt(rng.chisquare(degrees, draws) / degrees)
    return float(np.quantile(largest, level))


@dataclasses.dataclass(frozen=True, kw_only=True)
class McNemar:
    """Exact McNemar test of two heads' decisions. It assumes INDEPENDENT pairs, which pairs that share people are not.

    Attributes:
      only_first, only_second: pairs that only one of them decides correctly.
      p: two-sided, under the hypothesis that both are as often right.
    """

    only_first: int
    only_second: int
    p: float


def mcnemar(correct_first: ArrayLike, correct_second: ArrayLike) -> McNemar:
    """Exact two-sided McNemar test: of the pairs that one alone gets right, a fair coin says which.

    Args:
      correct_first, correct_second: [n] bool.

    Returns:
      `McNemar`.

    Raises:
      ValueError: the shapes differ.

    References:
      McNemar, "Note on the sampling error of the difference between correlated proportions or percentages" (1947).

    >>> mcnemar([1, 1, 1, 1, 0], [0, 0, 0, 1, 0])
    McNemar(only_first=3, only_second=0, p=0.25)
    """
    first, second = np.asarray(correct_first, bool), np.asarray(correct_second, bool)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"decisions {first.shape} and {second.shape}: give one a pair from each head.")
    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    p = float(binomtest(one, one + other).pvalue) if one + other else 1.0
    return McNemar(only_first=one, only_second=other, p=p)


# ---- weights of people ---------------------------------------------------------------------------------------------------


def vertex_weights(
    n_people: int, draws: int, seed: int, kind: Literal["poisson", "double"] = "poisson"
) -> NDArray[np.uint8]:
    """Random weights of people: draws of a bootstrap in which a person comes with all their photos, or does not.

    Args:
      n_people: m.
      draws: rows.
      seed: of the draws.
      kind: "poisson", each weight Poisson(1), for intervals; "double", 0 or 2 with equal chances, for bands.

    Returns:
      [draws, m] uint8.

    References:
      Snijders & Borgatti, "Non-parametric standard errors and tests for network statistics" (1999), for drawing vertices;
      Owen & Eckles, "Bootstrapping data arrays of arbitrary order" (2012), for double or nothing.

    >>> vertex_weights(3, 2, 0, "double").max()
    np.uint8(2)
    """
    rng = np.random.default_rng(seed)
    if kind == "double":
        return 2 * rng.integers(0, 2, (draws, n_people), dtype=np.uint8)
    if kind != "poisson":
        raise ValueError(f"kind is {kind!r}: use 'poisson' or 'double'.")
    return rng.poisson(1.0, (draws, n_people)).astype(np.uint8)


def pair_weights(weights: NDArray[np.uint8], index_a: ArrayLike, index_b: ArrayLike) -> Floats:
    """Weights of pairs: a genuine pair has its person's, an impostor pair the product of both people's.

    Args:
      weights: [draws, m] of people.
      index_a, index_b: [n] int, equal in a genuine pair.

    Returns:
      [draws, n] float64.

    >>> pair_weights(np.array([[2, 0, 3]], np.uint8), [0, 0, 0], [0, 1, 2]).tolist()
    [[2.0, 0.0, 6.0]]
    """
    a, b = np.asarray(index_a), np.asarray(index_b)
    return weights[:, a].astype(np.float64) * np.where(a == b, 1, weights[:, b])


def effective_number(counts: ArrayLike) -> float:
    """How many equal contributors would weigh as these do: (Σc)² / Σc² (Kish).

    >>> effective_number([1, 1, 1, 1]), effective_number([3, 1, 0, 0])
    (4.0, 1.6)
    """
    c = np.asarray(counts, np.float64)
    return float(c.sum() ** 2 / np.square(c).sum())


def roc_band(
    scores: ArrayLike,
    same: ArrayLike,
    person_a: ArrayLike,
    person_b: ArrayLike,
    fars: Sequence[float] | Floats,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Floats, Floats]:
    """Pointwise band around a ROC: TAR at each FAR when people are weighted by double or nothing.

    In each draw the threshold is set anew: the lowest whose weighted FAR is at most the target, tied scores being accepted
    or refused together.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.
      person_a, person_b: [n] person ids, equal in a genuine pair.
      fars: [k] targets in (0, 1).
      draws, seed: of people's weights.
      level: between which percentiles.

    Returns:
      (low, high): [k] each.

    Raises:
      ValueError: as `metrics.roc`, or fewer than two draws leave both kinds of pair.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(same, bool)
    metrics.roc(s, y)  # refuses what cannot be
    a, b, m = _people(person_a, person_b, len(s))
    order = np.argsort(-s, kind="stable")
    a, b, y = a[order], b[order], y[order]
    last = np.append(np.flatnonzero(np.diff(s[order])), len(s) - 1)
    targets = np.asarray(fars, np.float64)
    tars = []
    for block in np.array_split(vertex_weights(m, draws, seed, "double"), max(1, draws * len(s) // 2_000_000)):
        w = pair_weights(block, a, b)
        true, false = (np.cumsum(np.where(kind, w, 0), axis=1)[:, last] for kind in (y, ~y))
        for accepted, f in zip(true, false, strict=True):
            if accepted[-1] and f[-1]:
                at = np.searchsorted(f, targets * f[-1] * (1 + 1e-12), side="right")
                tars.append(np.concatenate([[0.0], accepted / accepted[-1]])[at])
    if len(tars) < 2:
        raise ValueError(f"of {draws} draws {len(tars)} left genuine and impostor pairs: there are too few people.")
    low, high = np.quantile(tars, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high

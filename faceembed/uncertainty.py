"""Intervals for figures over pairs that share people: such pairs are not independent trials.

Two comparisons of one person's photos tend to fail together. Treating 1,000 pairs as 1,000 coin tosses then gives an
interval that is too narrow. The estimate here adds the covariance of every two pairs that share a person.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faceembed import metrics

__all__ = ["Interval", "dyadic_interval", "dyadic_variance", "wilson_interval"]


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
    if not np.isfinite(r).all():
        raise ValueError(f"residuals are not finite, first at rows {np.flatnonzero(~np.isfinite(r))[:5].tolist()}.")
    a, b, m = _people(person_a, person_b, len(r))
    different = a != b
    by_person = np.bincount(a, r, m) + np.bincount(b[different], r[different], m)
    couple = np.minimum(a, b)[different] * m + np.maximum(a, b)[different]
    _, which = np.unique(couple, return_inverse=True)
    by_couple = np.bincount(which, r[different])
    return float((by_person @ by_person - by_couple @ by_couple) / len(r) ** 2)


def dyadic_interval(correct: ArrayLike, person_a: ArrayLike, person_b: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval for a share of pairs (an accuracy) when pairs share people: Wilson's, with the effective n.

    The effective n is p(1-p) / Var with the variance of `dyadic_variance`. It is never taken above n: a variance below
    that of independent pairs is taken for noise. Where every pair agrees (p is 0 or 1) the residuals say nothing about
    dependence, and the effective n is the number of people, or n if that is smaller.

    Args:
      correct: [n] bool, or 0/1.
      person_a, person_b: [n] person ids, equal in a genuine pair.
      level: coverage in (0, 1).

    Returns:
      `Interval`, conditional on the fitted head: only the test pairs are regarded as drawn at random.

    Raises:
      ValueError: as `dyadic_variance` and `metrics.wilson`.

    >>> interval = dyadic_interval([1, 1, 1, 0], ["ann", "ann", "cid", "dan"], ["ann", "bob", "eve", "fay"])
    >>> round(interval.low, 3), round(interval.high, 3), round(interval.n_effective, 2)
    (0.277, 0.959, 3.43)
    """
    y = np.asarray(correct)
    if y.ndim != 1 or not np.isin(y, (0, 1)).all():
        raise ValueError(f"correct {y.shape} must be one-dimensional and hold only 0 and 1.")
    y = y.astype(np.float64)
    variance = dyadic_variance(y - y.mean() if len(y) else y, person_a, person_b)
    p, n = float(y.mean()), len(y)
    if p in (0.0, 1.0):
        effective = float(min(n, _people(person_a, person_b, n)[2]))
    else:
        effective = p * (1 - p) / max(variance, p * (1 - p) / n)
    low, high = metrics.wilson(p, effective, level=level)
    return Interval(
        low=low,
        high=high,
        level=level,
        n=n,
        n_effective=effective,
        assumes="pairs without a person in common are independent; the head is given",
    )


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

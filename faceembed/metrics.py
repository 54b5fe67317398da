"""Exact verification metrics, in NumPy alone: nothing is binned, interpolated on a grid, or smoothed.

Every function takes `scores` where HIGHER means more likely the same person (a distance enters with its sign changed)
and `same`, True for a genuine pair and False for an impostor pair. One decision rule holds everywhere: a pair is
accepted when `score >= threshold`, so pairs with equal scores are accepted or refused together.

FAR is the share of impostor pairs accepted (FMR), TAR the share of genuine pairs accepted (1 - FNMR).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Det",
    "OperatingPoint",
    "Reliability",
    "Resolution",
    "Roc",
    "accuracy",
    "accuracy_threshold",
    "auc",
    "brier",
    "cllr",
    "det",
    "ece",
    "eer",
    "matched_tar",
    "min_cllr",
    "pav_llr",
    "rates_at",
    "reliability",
    "resolvable",
    "roc",
    "tar_at_far",
    "threshold_at_far",
    "wilson",
    "zero_error_bound",
]

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

PRINTED, FLAGGED = 30, 10
"""Comparisons times rate from which a rate is printed, and from which it is printed with a flag."""


def _checked(scores: ArrayLike, same: ArrayLike, *, classes: str = "both") -> tuple[Floats, Bools]:
    s, y = np.asarray(scores), np.asarray(same)
    if s.ndim != 1 or y.ndim != 1:
        raise ValueError(f"scores {s.shape} and same {y.shape} must be one-dimensional: one entry a pair.")
    if len(s) != len(y):
        raise ValueError(f"{len(s)} scores for {len(y)} labels: give one `same` for each score.")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"same holds {np.unique(y)[:5].tolist()}: give booleans, True for the same person.")
    s, y = s.astype(np.float64), y.astype(bool)
    bad = np.flatnonzero(~np.isfinite(s))
    if len(bad):
        raise ValueError(
            f"{len(bad)} scores are not finite, first at rows {bad[:5].tolist()}: fix or drop these pairs."
        )
    if classes == "both" and (y.all() or not y.any()):
        found = "no pairs" if not len(y) else f"{len(y)} pairs, all {'genuine' if y[0] else 'impostor'}"
        raise ValueError(f"{found}: this metric needs at least one genuine and one impostor pair.")
    if classes == "impostor" and (not len(y) or y.all()):
        raise ValueError("no impostor pairs: a FAR needs at least one.")
    return s, y


@dataclasses.dataclass(frozen=True)
class Roc:
    """One point for each distinct score, from the strictest threshold to the most lenient.

    Attributes:
      far: [k] share of impostor pairs accepted, from 0 to 1, never falling.
      tar: [k] share of genuine pairs accepted, from 0 to 1, never falling.
      threshold: [k] accept when score >= threshold; the first is +inf (nothing is accepted).
      false_accepts: [k] int64 count behind `far`.
      true_accepts: [k] int64 count behind `tar`.
    """

    far: Floats
    tar: Floats
    threshold: Floats
    false_accepts: NDArray[np.int64]
    true_accepts: NDArray[np.int64]


def roc(scores: ArrayLike, same: ArrayLike) -> Roc:
    """The receiver operating characteristic, with one point for each distinct score.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool, True for genuine pairs; both kinds must be present.

    Returns:
      `Roc`. Tied scores make one point, so a tie between genuine and impostor pairs is a sloping step.

    Raises:
      ValueError: shapes differ, a score is not finite, or only one kind of pair is present.

    See Also:
      `sklearn.metrics.roc_curve(drop_intermediate=False)`: the same points.

    >>> curve = roc([0.9, 0.8, 0.8, 0.1], [True, True, False, False])
    >>> curve.far.tolist(), curve.tar.tolist()
    ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    s, y = _checked(scores, same)
    return _roc(s, y)


def _roc(s: Floats, y: Bools) -> Roc:
    order = np.argsort(-s, kind="stable")
    s, y = s[order], y[order]
    last = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)
    true = np.concatenate([[0], np.cumsum(y)[last]]).astype(np.int64)
    false = np.concatenate([[0], np.cumsum(~y)[last]]).astype(np.int64)
    return Roc(
        far=false / max(1, int(false[-1])),
        tar=true / max(1, int(true[-1])),
        threshold=np.concatenate([[np.inf], s[last]]),
        false_accepts=false,
        true_accepts=true,
    )


@dataclasses.dataclass(frozen=True)
class Det:
    """Detection error trade-off: both error rates, and their normal deviates, which are the axes of its plot.

    Attributes:
      fmr: [k] share of impostor pairs accepted, from 0 to 1, never falling.
      fnmr: [k] share of genuine pairs refused, from 1 to 0, never rising.
      threshold: [k] accept when score >= threshold; the first is +inf.
      x, y: [k] normal deviates (probit) of `fmr` and `fnmr`; -inf at a rate of 0 and +inf at 1.
    """

    fmr: Floats
    fnmr: Floats
    threshold: Floats
    x: Floats
    y: Floats


def det(scores: ArrayLike, same: ArrayLike) -> Det:
    """The DET curve, with one point for each distinct score, as `roc`.

    Scores that are normal within each kind of pair give a straight line on the deviates.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.

    Returns:
      `Det`.

    Raises:
      ValueError: as `roc`.

    References:
      Martin et al., "The DET curve in assessment of detection task performance" (1997).

    See Also:
      `sklearn.metrics.det_curve(drop_intermediate=False)`: the same points, in its own order and without the ends.

    >>> curve = det([0.9, 0.8, 0.8, 0.1], [True, True, False, False])
    >>> curve.fnmr.tolist(), curve.x.tolist()
    ([1.0, 0.5, 0.0, 0.0], [-inf, -inf, 0.0, inf])
    """
    curve = roc(scores, same)
    fnmr = 1 - curve.tar
    x, y = (probit(rate) for rate in (curve.far, fnmr))
    return Det(fmr=curve.far, fnmr=fnmr, threshold=curve.threshold, x=x, y=y)


def probit(rate: ArrayLike) -> Floats:
    """Normal deviates of rates in [0, 1]: the z below which a standard normal number lies with that probability.

    >>> probit([0.0, 0.5, 1.0]).tolist()
    [-inf, 0.0, inf]
    """
    inverse = NormalDist().inv_cdf
    flat = np.ravel(np.asarray(rate, np.float64))
    found = [inverse(r) if 0 < r < 1 else math.inf * (2 * r - 1) for r in flat.tolist()]
    return np.array(found).reshape(np.shape(rate))


def auc(scores: ArrayLike, same: ArrayLike) -> float:
    """Area under the ROC: the chance that a genuine pair outscores an impostor pair, a tie counting one half.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.

    Returns:
      A number in [0, 1]: the Mann-Whitney statistic over (genuine pairs × impostor pairs), counted in integers.

    Raises:
      ValueError: as `roc`.

    >>> auc([0.9, 0.8, 0.8, 0.1], [True, True, False, False])
    0.875
    """
    curve = roc(scores, same)
    # int64 suffices: twice the pairs of pairs stays below 2^63 up to 4e9 scores.
    twice = int(np.diff(curve.false_accepts) @ (curve.true_accepts[1:] + curve.true_accepts[:-1]))
    return twice / (2 * int(curve.true_accepts[-1]) * int(curve.false_accepts[-1]))


def eer(scores: ArrayLike, same: ArrayLike) -> float:
    """Equal error rate: where the ROC's convex hull meets FAR = 1 - TAR.

    The raw ROC of a finite list need not pass through equality; its convex hull always does, and is what the scores
    can reach by choosing at random between two thresholds. It is also the largest, over all priors, of the least
    attainable error rate.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.

    Returns:
      A rate in [0, 0.5].

    Raises:
      ValueError: as `roc`.

    References:
      Brümmer & de Villiers, The BOSARIS Toolkit (2011), "ROCCH-EER"; Provost & Fawcett (2001) for the hull.

    >>> eer([4.0, 3.0, 2.0, 1.0], [True, False, True, False])
    0.25
    """
    curve = roc(scores, same)
    return eer_of_counts(curve.false_accepts, curve.true_accepts)


def eer_of_counts(false: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """`eer` from the counts of a ROC: pairs accepted at each threshold, from none to all.

    Args:
      false: [k] impostor pairs accepted, never falling, from 0 to all.
      true: [k] genuine pairs accepted, likewise.

    >>> eer_of_counts(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 2, 2]))
    0.25
    """
    # Only an end of a vertical run can be a corner of the upper hull; the filter keeps the loop below short.
    corner = np.ones(len(false), bool)
    corner[1:-1] = (np.diff(true)[:-1] > 0) & (np.diff(false)[1:] > 0)
    hull: list[tuple[int, int]] = []
    for f, t in zip(false[corner].tolist(), true[corner].tolist(), strict=True):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (f - hull[-2][0]) <= (t - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((f, t))
    genuine, impostor = int(true[-1]), int(false[-1])
    for (f0, t0), (f1, t1) in itertools.pairwise(hull):
        # FAR - FNMR in units of 1 / (genuine × impostor): exact integers, rising from negative to positive.
        before = f0 * genuine - (genuine - t0) * impostor
        after = f1 * genuine - (genuine - t1) * impostor
        if after >= 0:
            return (f0 * (after - before) - before * (f1 - f0)) / ((after - before) * impostor)
    raise AssertionError("the hull ends at (1, 1), where FAR exceeds FNMR")


def accuracy_threshold(scores: ArrayLike, same: ArrayLike) -> tuple[float, float]:
    """The threshold that gives most correct decisions on these pairs: for TRAINING pairs, never for tested ones.

    Of several equally good thresholds the highest is taken (the fewest false accepts). It lies midway between the two
    neighbouring scores that it separates; to accept everything it is the lowest score, and to accept nothing it is the
    next number above the highest score.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; one kind alone is allowed.

    Returns:
      (threshold, accuracy): both finite; accuracy is the share of these same pairs that it decides correctly.

    Raises:
      ValueError: shapes differ, a score is not finite, or there are no pairs.

    >>> accuracy_threshold([0.9, 0.7, 0.6, 0.1], [True, True, False, False])
    (0.6499999999999999, 1.0)
    """
    s, y = _checked(scores, same, classes="any")
    if not len(s):
        raise ValueError("no pairs: a threshold needs at least one.")
    curve = _roc(s, y)
    right = curve.true_accepts + (curve.false_accepts[-1] - curve.false_accepts)
    best = int(np.argmax(right))
    return _between(curve.threshold, best), int(right[best]) / len(s)


def _between(distinct: Floats, i: int) -> float:
    if i == 0:
        return float(np.nextafter(distinct[1], np.inf))
    if i == len(distinct) - 1:
        return float(distinct[i])
    accepted, refused = float(distinct[i]), float(distinct[i + 1])
    middle = refused + (accepted - refused) / 2
    return middle if middle > refused else accepted


def rates_at(scores: ArrayLike, same: ArrayLike, threshold: ArrayLike) -> tuple[float, float]:
    """TAR and FAR of given pairs at a given threshold.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.
      threshold: a float, or [n] floats where each pair has its own (the threshold of its fold).

    Returns:
      (tar, far).

    Raises:
      ValueError: as `roc`, or a threshold is NaN.

    >>> rates_at([0.9, 0.7, 0.6, 0.1], [True, True, False, False], 0.6)
    (1.0, 0.5)
    """
    s, y = _checked(scores, same)
    accept = s >= _threshold(threshold, len(s))
    return float(accept[y].mean()), float(accept[~y].mean())


def accuracy(scores: ArrayLike, same: ArrayLike, threshold: ArrayLike) -> float:
    """Share of pairs decided correctly at a threshold that was chosen elsewhere.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; one kind alone is allowed.
      threshold: a float, or [n] floats where each pair has its own.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: shapes differ, a score is not finite, a threshold is NaN, or there are no pairs.

    >>> accuracy([0.9, 0.7, 0.6, 0.1], [True, True, False, False], 0.6)
    0.75
    """
    s, y = _checked(scores, same, classes="any")
    if not len(s):
        raise ValueError("no pairs: an accuracy needs at least one.")
    return float(((s >= _threshold(threshold, len(s))) == y).mean())


def _threshold(threshold: ArrayLike, n: int) -> Floats:
    t = np.asarray(threshold, np.float64)
    if t.shape not in ((), (n,)):
        raise ValueError(f"thresholds {t.shape} for {n} scores: give one number, or one for each score.")
    if np.isnan(t).any():
        raise ValueError("a threshold is NaN: nothing can be compared with it.")
    return t


def threshold_at_far(scores: ArrayLike, same: ArrayLike, far: float) -> float:
    """The lowest threshold whose FAR on these pairs is at most `far`: an order statistic of the impostor scores.

    With n impostor pairs, k of them may be accepted, k the largest integer with k/n <= far. The threshold is the next
    float64 above the (k+1)-th highest impostor score, so impostors tied with that one are all refused, and the
    realised FAR may be lower than asked for but never higher.

    Args:
      scores: [n] float, higher = same person; TRAINING pairs.
      same: [n] bool; at least one impostor pair.
      far: target in (0, 1).

    Returns:
      The threshold, finite.

    Raises:
      ValueError: `far` is outside (0, 1), there is no impostor pair, or as `roc`.

    >>> t = threshold_at_far([0.9, 0.7, 0.6, 0.2, 0.1], [True, False, False, False, False], far=0.25)
    >>> 0.6 < t < 0.6000001
    True
    """
    if not 0 < far < 1:
        raise ValueError(f"far is {far}: give a rate between 0 and 1, such as 0.001.")
    s, y = _checked(scores, same, classes="impostor")
    impostor = s[~y]
    n = len(impostor)
    k = math.floor(far * n)
    k += (k + 1) / n <= far  # 0.29 * 100 is 28.999999999999996
    if k / n > far:
        k -= 1
    refused = np.partition(impostor, n - 1 - k)[n - 1 - k]
    return float(np.nextafter(refused, np.inf))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """TAR at a target FAR, with what was realised on the tested pairs.

    Attributes:
      target: the FAR asked for.
      threshold: set on the training pairs; one number, or one for each fold.
      tar: share of tested genuine pairs accepted.
      far: share of tested impostor pairs accepted; compare with `target`.
      n_genuine, n_impostor: tested pairs.
      n_impostor_train: impostor pairs that set the threshold (the fewest of any fold).
    """

    target: float
    threshold: float | tuple[float, ...]
    tar: float
    far: float
    n_genuine: int
    n_impostor: int
    n_impostor_train: int

    @property
    def resolution(self) -> Resolution:
        """Whether the data supports this FAR: both the pairs that set the threshold and the pairs that test it."""
        return resolvable(self.target, min(self.n_impostor, self.n_impostor_train))


def tar_at_far(
    train_scores: ArrayLike, train_same: ArrayLike, scores: ArrayLike, same: ArrayLike, *, far: float
) -> OperatingPoint:
    """TAR on tested pairs at the threshold that keeps FAR <= `far` on training pairs.

    Args:
      train_scores: [m] float, higher = same person.
      train_same: [m] bool.
      scores: [n] float, the tested pairs.
      same: [n] bool; both kinds must be present.
      far: target in (0, 1).

    Returns:
      `OperatingPoint`, with the FAR that the tested pairs realised beside the target.

    Raises:
      ValueError: as `threshold_at_far` and `rates_at`.

    >>> tar_at_far([0.9, 0.5, 0.1], [True, False, False], [0.8, 0.4, 0.7, 0.2], [True, True, False, False], far=0.1).tar
    0.5
    """
    threshold = threshold_at_far(train_scores, train_same, far)
    tar, realised = rates_at(scores, same, threshold)
    y = np.asarray(same, bool)
    return OperatingPoint(
        target=far,
        threshold=threshold,
        tar=tar,
        far=realised,
        n_genuine=int(y.sum()),
        n_impostor=int((~y).sum()),
        n_impostor_train=int((~np.asarray(train_same, bool)).sum()),
    )


def matched_tar(scores: ArrayLike, same: ArrayLike, far: float) -> OperatingPoint:
    """TAR where the FAR of these SAME pairs is at most the target: to compare heads at one point of their ROCs.

    A product cannot choose its threshold by the people it will meet: quote `tar_at_far`, whose threshold was transferred,
    and never this one.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.
      far: target in (0, 1).

    Returns:
      `OperatingPoint`, its threshold by `threshold_at_far` on these pairs.

    Raises:
      ValueError: as `tar_at_far`.

    >>> matched_tar([0.9, 0.7, 0.6, 0.1], [True, False, True, False], far=0.5).tar
    1.0
    """
    return tar_at_far(scores, same, scores, same, far=far)


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What a number of comparisons can say about a rate.

    Attributes:
      status: "printed", "flagged" (rests on 10 to 30 expected events), or "unresolvable".
      needs: comparisons from which the rate is printed without a flag, 30 / rate.
    """

    status: Literal["printed", "flagged", "unresolvable"]
    needs: int

    def __bool__(self) -> bool:
        return self.status != "unresolvable"


def resolvable(rate: float, n: int) -> Resolution:
    """Can `n` comparisons support a statement at this rate?

    Args:
      rate: an error rate in (0, 1], usually a target FAR.
      n: comparisons of the kind that the rate counts (impostor pairs for a FAR).

    Returns:
      `Resolution`: "printed" where n >= 30/rate, "flagged" where n >= 10/rate, else "unresolvable". It is false only
      when unresolvable.

    Raises:
      ValueError: the rate is outside (0, 1] or n is negative.

    >>> resolvable(0.001, 30_000).status, resolvable(0.001, 12_000).status, resolvable(0.001, 3_000)
    ('printed', 'flagged', Resolution(status='unresolvable', needs=30000))
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}: give a rate in (0, 1], such as 0.001.")
    if n < 0:
        raise ValueError(f"n is {n}: a number of comparisons cannot be negative.")
    # 30/0.001 and 30/0.1 round to either side of the integer: compare after rounding away the last bits.
    needs, least = (math.ceil(round(k / rate, 6)) for k in (PRINTED, FLAGGED))
    return Resolution("printed" if n >= needs else "flagged" if n >= least else "unresolvable", needs)


def zero_error_bound(n: int) -> float:
    """Upper 95 % bound on an error rate of which `n` independent comparisons showed none: 3/n, at most 1.

    Args:
      n: comparisons, at least 1.

    Returns:
      A rate in (0, 1].

    Raises:
      ValueError: n is below 1.

    References:
      Hanley & Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 249 (1983).

    >>> zero_error_bound(3000)
    0.001
    """
    if n < 1:
        raise ValueError(f"n is {n}: no comparisons say nothing about a rate.")
    return min(1.0, 3 / n)


def wilson(rate: float, n: float, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval for a proportion.

    It assumes `n` independent trials; for pairs that share people give an effective n
    (`faceembed.uncertainty.dyadic_interval` does).

    Args:
      rate: observed proportion in [0, 1].
      n: trials, > 0; need not be an integer.
      level: coverage in (0, 1).

    Returns:
      (low, high), within [0, 1].

    Raises:
      ValueError: an argument is out of range.

    References:
      Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    >>> low, high = wilson(0.8, 10)
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}: a proportion lies in [0, 1].")
    if not n > 0:
        raise ValueError(f"n is {n}: an interval needs a positive number of trials.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a coverage between 0 and 1, such as 0.95.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At 0 and 1 the limit is exact in algebra and one rounding off in floating point.
    return (0.0 if rate == 0 else max(0.0, centre - half)), (1.0 if rate == 1 else min(1.0, centre + half))


def cllr(llr: ArrayLike, same: ArrayLike) -> float:
    """Cost of log-likelihood ratios, in bits: 0 is perfect, 1 is what saying nothing (every ratio 1) costs.

    It measures discrimination and calibration together and does not depend on the share of genuine pairs.

    Args:
      llr: [n] natural-log likelihood ratios, higher = same person; not a distance.
      same: [n] bool; both kinds must be present.

    Returns:
      A number >= 0; above 1 the ratios mislead.

    Raises:
      ValueError: as `roc`.

    References:
      Brümmer & du Preez, "Application-independent evaluation of speaker detection" (2006), eq. 15.

    >>> cllr([0.0, 0.0], [True, False])
    1.0
    """
    s, y = _checked(llr, same)
    return float((np.logaddexp(0, -s[y]).mean() + np.logaddexp(0, s[~y]).mean()) / (2 * math.log(2)))


def pav_llr(scores: ArrayLike, same: ArrayLike) -> Floats:
    """The log-likelihood ratios that fit these pairs best among all that never fall as the score rises.

    Pool-adjacent-violators: tied scores are pooled, then neighbouring blocks until the share of genuine pairs rises from
    block to block; a block's ratio is its odds of being genuine over the odds of all pairs.

    Args:
      scores: [n] float, higher = same person.
      same: [n] bool; both kinds must be present.

    Returns:
      [n] float64 in the order given; -inf in a block without genuine pairs, +inf in one without impostor pairs.

    Raises:
      ValueError: as `roc`.

    References:
      Brümmer & du Preez (2006), section 6; Ayer et al., "An empirical distribution function for sampling with incomplete
      information" (1955).

    >>> pav_llr([3.0, 2.0, 1.0, 0.0], [True, False, True, False]).round(9).tolist()
    [inf, 0.0, 0.0, -inf]
    """
    s, y = _checked(scores, same)
    _, group = np.unique(s, return_inverse=True)
    genuine, every = np.bincount(group, y), np.bincount(group)
    blocks: list[list[int]] = []  # genuine pairs, pairs, groups: from the lowest score up
    for g, n in zip(genuine.astype(np.int64).tolist(), every.tolist(), strict=True):
        block = [g, n, 1]
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            block = [old + new for old, new in zip(blocks.pop(), block, strict=True)]
        blocks.append(block)
    prior = math.log(y.sum() / (len(y) - y.sum()))
    llr = [-math.inf if g == 0 else math.inf if g == n else math.log(g / (n - g)) - prior for g, n, _ in blocks]
    return np.repeat(llr, [count for _, _, count in blocks])[group]


def min_cllr(scores: ArrayLike, same: ArrayLike) -> float:
    """Cllr after the best monotone calibration on these same pairs: what discrimination alone costs, in bits.

    `cllr` less this is what calibration costs. It depends on the order of the scores only.

    Args:
      scores: [n] float, higher = same person; a distance's negative will do.
      same: [n] bool; both kinds must be present.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: as `roc`.

    References:
      Brümmer & du Preez (2006), section 6.

    >>> min_cllr([3.0, 2.0, 1.0, 0.0], [True, False, True, False])
    0.5
    """
    llr = pav_llr(scores, same)
    y = np.asarray(same, bool)
    # An infinite ratio is always on the right side: a block without impostor pairs has only genuine ones.
    return float((np.logaddexp(0, -llr[y]).mean() + np.logaddexp(0, llr[~y]).mean()) / (2 * math.log(2)))


def _posterior(llr: ArrayLike, same: ArrayLike, prior: float) -> tuple[Floats, Bools]:
    if not 0 < prior < 1:
        raise ValueError(f"prior is {prior}: give the share of genuine pairs to reckon with, between 0 and 1.")
    s, y = _checked(llr, same)
    logit = s + math.log(prior / (1 - prior))
    return np.exp(-np.logaddexp(0, -logit)), y


def brier(llr: ArrayLike, same: ArrayLike, *, prior: float) -> float:
    """Brier score at a named prior: mean squared error of the posterior, genuine and impostor pairs weighted to the prior.

    Args:
      llr: [n] natural-log likelihood ratios.
      same: [n] bool; both kinds must be present.
      prior: share of genuine pairs in (0, 1) that the posteriors and weights are for.

    Returns:
      A number in [0, 1]; saying nothing costs prior·(1 - prior).

    Raises:
      ValueError: as `roc`, or the prior is outside (0, 1).

    References:
      Brier, "Verification of forecasts expressed in terms of probability" (1950).

    >>> brier([0.0, 0.0, 0.0], [True, False, False], prior=0.5)
    0.25
    """
    p, y = _posterior(llr, same, prior)
    return float(prior * np.square(1 - p[y]).mean() + (1 - prior) * np.square(p[~y]).mean())


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Stated probabilities against what happened, in bins of about equally many pairs.

    Attributes:
      prior: share of genuine pairs that everything is weighted to.
      predicted: [k] mean posterior of the pairs in a bin, rising.
      observed: [k] share of genuine pairs in it.
      weight: [k] share of all pairs in it, summing to 1.
      n_genuine, n_impostor: [k] pairs behind it.
    """

    prior: float
    predicted: Floats
    observed: Floats
    weight: Floats
    n_genuine: NDArray[np.int64]
    n_impostor: NDArray[np.int64]


def reliability(llr: ArrayLike, same: ArrayLike, *, prior: float, bins: int = 10) -> Reliability:
    """Bins of the posterior at a named prior, for a reliability diagram.

    Bins are cut at quantiles of the ratios; equal ratios are never parted, so there may be fewer bins than asked for.
    Within a bin genuine and impostor pairs are weighted to the prior.

    Args:
      llr: [n] natural-log likelihood ratios.
      same: [n] bool; both kinds must be present.
      prior: share of genuine pairs in (0, 1).
      bins: at most.

    Returns:
      `Reliability`.

    Raises:
      ValueError: as `brier`, or `bins` is below 1.

    References:
      Murphy & Winkler, "Reliability of subjective probability forecasts" (1977).

    >>> found = reliability([-9.0, -9.0, 0.0, 0.0], [False, False, True, True], prior=0.5, bins=2)
    >>> found.observed.tolist(), found.predicted.round(4).tolist(), found.weight.tolist()
    ([0.0, 1.0], [0.0001, 0.5], [0.5, 0.5])
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}: give at least one.")
    p, y = _posterior(llr, same, prior)
    s = np.asarray(llr, np.float64)
    _, group, count = np.unique(s, return_inverse=True, return_counts=True)
    # The bin of a value is decided by the middle of its pairs in the order of all.
    middle = np.cumsum(count) - count / 2
    _, which = np.unique(np.floor(middle * bins / len(s)).astype(np.int64), return_inverse=True)
    at = which[group]
    weight = np.where(y, prior / y.sum(), (1 - prior) / (~y).sum())
    total = np.bincount(at, weight).astype(np.float64)
    return Reliability(
        prior=prior,
        predicted=np.bincount(at, weight * p) / total,
        observed=np.bincount(at, weight * y) / total,
        weight=total,
        n_genuine=np.bincount(at, y).astype(np.int64),
        n_impostor=np.bincount(at, ~y).astype(np.int64),
    )


def ece(llr: ArrayLike, same: ArrayLike, *, prior: float, bins: int = 10) -> float:
    """Expected calibration error at a named prior: Σ weight·|observed - predicted| over the bins of `reliability`.

    It is biased upwards: a perfectly calibrated head has an error of about √(1/pairs in a bin), too.

    Args:
      llr: [n] natural-log likelihood ratios.
      same: [n] bool; both kinds must be present.
      prior: share of genuine pairs in (0, 1).
      bins: at most.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: as `reliability`.

    References:
      Guo et al., "On calibration of modern neural networks" (2017), eq. 3, with bins of equal mass.

    >>> round(ece([-9.0, -9.0, 0.0, 0.0], [False, False, True, True], prior=0.5, bins=2), 4)
    0.2501
    """
    found = reliability(llr, same, prior=prior, bins=bins)
    return float(found.weight @ np.abs(found.observed - found.predicted))

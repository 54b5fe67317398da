"""How high strangers' best scores reach beyond what was seen: peaks over a threshold, a generalised Pareto tail.

A thousand strangers show a FPIR of 1 % by ten of them, and say nothing of 0.01 % but through a model. For most
distributions the excess over a high threshold tends to a generalised Pareto one (Pickands 1975; Balkema & de Haan
1974),
P(X - u > y | X > u) = (1 + ξ·y/σ)^(-1/ξ). X is the best score of one search in a gallery of K: one maximum a stranger
and
gallery, and for all galleries of K at once their mixture, whose weights `openset.Ranked.weights` gives. So there is one
maximum for each stranger in expectation, and strangers, not comparisons, are resampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

from faceembed.identification.openset import Ranked

__all__ = [
    "Backtest",
    "Stability",
    "Tail",
    "backtest",
    "cautious_threshold",
    "fit",
    "fit_excess",
    "resampled",
    "stability",
]

Floats = NDArray[np.float64]

SHARE = 0.1
"""Share of searches whose best score lies above the threshold u of the tail. A fixed rule, not chosen by what comes out:
`stability` shows what other shares would give."""

CAUTION = 0.9
"""Share of resampled tails that must find a threshold strict enough."""

LEAST_SHAPE = -0.5
"""ξ is not let below: there the likelihood has no proper maximum (Smith 1985), and it grows without bound towards -1."""

MOST_SHAPE = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tail:
    """A generalised Pareto tail of the best score of a search by a stranger in a gallery of `k`.

    Attributes:
      k: people enrolled.
      at: the threshold u.
      share: FPIR at u.
      shape: ξ; below 0 the scores have an upper end.
      scale: σ > 0, in units of the score.
      searches: strangers behind the excesses, in expectation: share × strangers.
    """

    k: int
    at: float
    share: float
    shape: float
    scale: float
    searches: float

    def fpir(self, threshold: ArrayLike) -> Floats:
        """FPIR in galleries of k, at thresholds at or above u."""
        y = np.asarray(threshold, np.float64) - self.at
        if (y < 0).any():
            raise ValueError(f"the tail begins at {self.at:g}: below it count, rather than extrapolate.")
        return self.share * _survival(y, self.shape, self.scale)

    def threshold(self, target: float) -> float:
        """The threshold whose FPIR is `target`, at most `share`."""
        if not 0 < target <= self.share:
            raise ValueError(
                f"the target FPIR is {target:g} and the tail begins at {self.share:g}: give one below that."
            )
        ratio = self.share / target
        if abs(self.shape) < 1e-9:
            return self.at + self.scale * float(np.log(ratio))
        return self.at + self.scale / self.shape * float(np.expm1(self.shape * np.log(ratio)))


def _survival(y: Floats, shape: float, scale: float) -> Floats:
    if abs(shape) < 1e-9:
        return np.exp(-y / scale)
    inside = np.maximum(1 + shape * y / scale, 0.0)
    with np.errstate(divide="ignore"):
        return np.where(inside > 0, inside ** (-1 / shape), 0.0)


def fit_excess(excess: ArrayLike, weight: ArrayLike) -> tuple[float, float]:
    """Weighted maximum likelihood of a generalised Pareto distribution.

    With τ = ξ/σ the likelihood is greatest at ξ(τ) = Σ w·log(1 + τ·y) / Σ w (Davison & Smith 1990), which leaves one
    number
    to be searched for.

    Args:
      excess: [n] > 0, at least two different ones.
      weight: [n] >= 0, not all 0.

    Returns:
      (shape ξ, scale σ), -0.5 <= ξ <= 2.

    Raises:
      ValueError: there are too few excesses, or one is not positive.

    References:
      Davison & Smith, "Models for exceedances over high thresholds", JRSS B 52 (1990), section 2.
    """
    y, w = np.asarray(excess, np.float64), np.asarray(weight, np.float64)
    y, w = y[w > 0], w[w > 0]
    if len(y) < 2 or not (y > 0).all() or y.min() == y.max():
        raise ValueError(f"{len(y)} excesses over the threshold: a tail needs two different positive ones or more.")
    w = w / w.sum()
    mean = float(w @ y)
    top = float(y.max())

    def shape_at(tau: float) -> float:
        return float(w @ np.log1p(tau * y))

    def loss(tau: float) -> float:
        """The mean negative log-likelihood, less 1."""
        if abs(tau) * top < 1e-7:
            return float(np.log(mean))
        shape = shape_at(tau)
        return float(np.log(shape / tau)) + shape

    # ξ rises with τ: from below -1/max(y), where it is -∞, through 0.
    low = _where(shape_at, LEAST_SHAPE, -(1 - 1e-12) / top, 0.0)
    high = _where(shape_at, MOST_SHAPE, 0.0, 1e6 / mean)
    # More than one hump is rare, and possible: the best of a grid, then its neighbourhood.
    grid = np.concatenate([np.linspace(low, 0, 40), np.geomspace(1e-4, 1, 40) * high])
    best = int(np.argmin([loss(tau) for tau in grid]))
    around = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = minimize_scalar(loss, bounds=around, method="bounded", options={"xatol": 1e-10 * (around[1] - around[0])})
    tau, least = (float(found.x), float(found.fun)) if found.fun <= loss(grid[best]) else (grid[best], loss(grid[best]))

    def edge(scale: float) -> float:
        return float(np.log(scale)) + (1 + 1 / LEAST_SHAPE) * float(w @ np.log1p(LEAST_SHAPE * y / scale)) - 1

    # On the edge of what is allowed the best scale is not the one that ξ(τ) goes with.
    least_scale = -LEAST_SHAPE * top * (1 + 1e-9)
    there = minimize_scalar(edge, bounds=(least_scale, 4 * least_scale), method="bounded")
    if there.fun < least:
        return LEAST_SHAPE, float(there.x)
    if abs(tau) * top < 1e-7:
        return 0.0, mean
    shape = shape_at(tau)
    return shape, shape / tau


def _where(rising: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where a rising function takes a value, by halving; an end, where it does not: SciPy's finders would raise."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def fit(best: Ranked, k: int, *, share: float = SHARE, weights: Floats | None = None) -> Tail:
    """The tail of the best score in galleries of k, above the score that the share of the searches reaches.

    Args:
      best: non-mated searches, which must cover `share`.
      k: people enrolled, at most the pool.
      share: FPIR at u.
      weights: [n] `best.weights(k)` times what each search counts, for resampling; None counts each once.

    Raises:
      ValueError: as `fit_excess`.
    """
    w = best.weights(k) if weights is None else weights
    fpir = np.cumsum(w)
    above = int(np.searchsorted(fpir, share * (1 + 1e-9), side="right"))
    if above == 0:
        raise ValueError(f"one search weighs more than {share:g}: a tail above that share needs more strangers.")
    at = float(best.score[min(above, len(best.score) - 1)])
    kept = best.score > at  # without those that tie with u
    shape, scale = fit_excess(*_grouped(best.score[kept] - at, w[kept]))
    reached = float(w[kept].sum())
    return Tail(
        k=k, at=at, share=reached, shape=shape, scale=scale, searches=reached * len(np.unique(best.who)),
    )  # fmt: skip


def _grouped(excess: Floats, weight: Floats, *, most: int = 4000) -> tuple[Floats, Floats]:
    """Descending excesses, those below the highest in groups of neighbours: of small galleries there are millions."""
    top, groups = most // 4, most - most // 4
    if len(excess) <= most:
        return excess, weight
    group = np.concatenate([np.arange(top), top + np.arange(len(excess) - top) * groups // (len(excess) - top)])
    total = np.bincount(group, weight).astype(np.float64)
    sums = np.bincount(group, weight * excess)
    return np.divide(sums, total, out=np.zeros_like(sums), where=total > 0), total


def resampled(best: Ranked, k: int, *, share: float = SHARE, draws: int = 40, seed: int = 0) -> list[Tail]:
    """Tails of `draws` samples of as many strangers, drawn with replacement; for intervals over people."""
    names, index = np.unique(best.who, return_inverse=True)
    rng = np.random.default_rng(seed)
    usual = best.weights(k)
    tails = []
    for _ in range(draws):
        count = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        try:
            tails.append(fit(best, k, share=share, weights=usual * count[index][best.search]))
        except ValueError:
            continue  # a sample without two different excesses has no tail
    return tails


def cautious_threshold(drawn: Sequence[Tail], target: float) -> float:
    """The threshold for an FPIR that nine in ten resampled tails find strict enough.

    At the threshold of the one fitted tail more strangers come than asked for in the mean, and the rarer the rate, the
    more: a tail that was taken too light costs more than one too heavy gives. This quantile allows for most of that,
    down to
    a few expected strangers (`python -m experiments.extrapolated_thresholds`).

    Args:
      drawn: of `resampled`.
      target: FPIR.
    """
    return float(np.quantile([tail.threshold(min(target, tail.share)) for tail in drawn], CAUTION))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stability:
    """What tails above other thresholds u would say: nearly the same, where the model holds.

    Attributes:
      share: [r] FPIR at u, falling.
      shape, shape_low, shape_high: [r] ξ, and its 95 % interval over strangers.
      threshold, low, high: [r] threshold at the FPIR `target`, and its interval.
      target: an FPIR.
      k: people enrolled.
    """

    share: Floats
    shape: Floats
    shape_low: Floats
    shape_high: Floats
    threshold: Floats
    low: Floats
    high: Floats
    target: float
    k: int


def stability(
    best: Ranked, k: int, target: float, *, shares: Sequence[float] | None = None, draws: int = 100, seed: int = 0
) -> Stability:
    """Tails over a range of thresholds u: the plot by which a reader judges the model.

    Args:
      best: non-mated searches.
      k: people enrolled.
      target: FPIR, below all of `shares`.
      shares: FPIRs at u; None takes ten from `best.share` down to where 20 strangers are left.
      draws, seed: of strangers.
    """
    if shares is None:
        least = min(best.share / 2, max(20 / len(np.unique(best.who)), 1.5 * target))
        shares = np.geomspace(best.share * (1 - 1e-9), least, 10).tolist()
    rows = []
    for share in shares:
        tail = fit(best, k, share=share)
        drawn = resampled(best, k, share=share, draws=draws, seed=seed)
        shape = np.quantile([t.shape for t in drawn], [0.025, 0.975])
        at = np.quantile([t.threshold(min(target, t.share)) for t in drawn], [0.025, 0.975])
        rows.append((tail.share, tail.shape, *shape, tail.threshold(min(target, tail.share)), *at))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Stability(
        share=columns[0], shape=columns[1], shape_low=columns[2], shape_high=columns[3], threshold=columns[4],
        low=columns[5], high=columns[6], target=target, k=k,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backtest:
    """The model where its answer is known: tails fitted on few strangers, judged by all the others.

    Attributes:
      k: people enrolled.
      fitted_on: strangers that tails were fitted on.
      expected: of them at the target: 3 is as far as a policy goes.
      target: FPIR asked of the tails.
      realised: mean FPIR of the other strangers at their thresholds.
      low, high: between which 95 % of the draws' realised FPIRs lie.
      draws: how often strangers were drawn.
      others: strangers who judged.
    """

    k: int
    fitted_on: int
    expected: float
    target: float
    realised: float
    low: float
    high: float
    draws: int
    others: int


def backtest(
    best: Ranked, k: int, target: float, *, shown: int, share: float = SHARE, draws: int = 40, seed: int = 0
) -> Backtest:
    """Hides most strangers, extrapolates from the rest as a policy does, and looks at what the hidden ones do there.

    Args:
      best: searches by strangers who are not in the pool: else a hidden one's scores would be among those shown.
      k: people enrolled.
      target: FPIR that all strangers together resolve, and those that are shown do not.
      shown: how many are shown.
      share: FPIR at u.
      draws, seed: of strangers.

    Raises:
      ValueError: nobody is left to judge, or no draw has a tail.
    """
    names, index = np.unique(best.who, return_inverse=True)
    if not 2 <= shown < len(names):
        raise ValueError(f"{shown} of {len(names)} strangers are shown: some must be, and some must judge.")
    usual = best.weights(k)
    rng = np.random.default_rng(seed)
    realised = []
    for _ in range(draws):
        there = rng.permutation(len(names))[:shown]
        seen = np.isin(index, there)[best.search]
        drawn = []
        for _ in range(20):
            count = np.bincount(rng.choice(there, shown), minlength=len(names))
            weights = usual * count[index][best.search] * len(names) / shown
            try:
                drawn.append(fit(best, k, share=share, weights=weights))
            except ValueError:
                continue  # a sample without two different excesses has no tail
        if drawn:
            cut = cautious_threshold(drawn, target)
            judged = usual[~seen & (best.score >= cut)].sum() * len(names) / (len(names) - shown)
            realised.append(float(judged))
    if not realised:
        raise ValueError(f"{shown} strangers have no tail above {share:g}: show more of them.")
    low, high = np.quantile(realised, [0.025, 0.975])
    return Backtest(
        k=k, fitted_on=shown, expected=shown * target, target=target, realised=float(np.mean(realised)), low=float(low),
        high=float(high), draws=len(realised), others=len(names) - shown,
    )  # fmt: skip

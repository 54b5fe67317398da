"""Heads: from two embeddings to one score, fitted on training pairs only.

A new head is one function `EmbeddedPairs → Head` and one entry in `HEADS`. Each is a linear function of a symmetric
feature, so a fitted head is a handful of numbers that JSON holds, and score(a, b) equals score(b, a) bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from faceembed import metrics
from faceembed.verification import protocols
from faceembed.verification.features import FEATURES, EmbeddedPairs

__all__ = ["HEADS", "Head", "fit", "logistic_abs", "logistic_distance", "threshold"]

Floats = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A fitted head: score = feature(a, b) @ weight + intercept.

    Attributes:
      name: the entry of `HEADS` that fitted it.
      feature: the entry of `FEATURES` that it reads.
      weight: [k] coefficients on the feature as it is; standardisation is already folded in.
      intercept: of a logistic head, the fitted one less the training log prior odds.
      threshold: a pair is accepted when score >= threshold; from training pairs.
      calibrated: whether the score is a natural-log likelihood ratio; else it is comparable within the head only.
      dim: d, the length of the embeddings it was fitted on.
      regularisation: scikit-learn's C, or None where nothing is penalised.
      note: how the regularisation was chosen.
    """

    name: str
    feature: str
    weight: tuple[float, ...]
    intercept: float
    threshold: float
    calibrated: bool
    dim: int
    regularisation: float | None = None
    note: str = ""

    def score(self, a: ArrayLike, b: ArrayLike) -> Floats:
        """Scores pairs; symmetric in a and b.

        Args:
          a, b: [n, d] embeddings from the encoder that the head was fitted for.

        Returns:
          [n] float64, higher = same person.

        Raises:
          ValueError: the shapes do not fit each other or the head, or a row is not finite or all zero.
        """
        a = np.asarray(a)
        pairs = EmbeddedPairs(a, np.asarray(b), np.zeros(len(a) if a.ndim else 0, bool))
        return self._score(pairs)

    def _score(self, pairs: EmbeddedPairs) -> Floats:
        if pairs.a.shape[1] != self.dim:
            raise ValueError(
                f"embeddings have {pairs.a.shape[1]} numbers and this {self.name} head was fitted on {self.dim}: "
                "use the encoder that it was fitted for, or fit it again."
            )
        return FEATURES[self.feature](pairs.a, pairs.b) @ np.asarray(self.weight) + self.intercept

    def to_dict(self) -> dict[str, Any]:
        """Every field in JSON's types; `from_dict` restores an equal head, to the last bit."""
        return dataclasses.asdict(self) | {"weight": list(self.weight)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Head:
        """The head that `to_dict` described.

        Raises:
          ValueError: a field is missing, unknown, not finite, or does not fit the others.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise ValueError(
                f"a head has the fields {sorted(known)}; missing: {sorted(known - set(fields))}, "
                f"unknown: {sorted(set(fields) - known)}. Was it written by another version?"
            )
        if fields["feature"] not in FEATURES:
            raise ValueError(f"a head reads {fields['feature']!r}, which is not one of {sorted(FEATURES)}.")
        numbers = {name: float(fields[name]) for name in ("intercept", "threshold")}
        head = cls(**{**fields, **numbers, "weight": tuple(float(w) for w in fields["weight"])})
        if not np.isfinite([*head.weight, head.intercept, head.threshold]).all():
            raise ValueError(f"the {head.name} head holds a number that is not finite: it is damaged, fit it again.")
        expected = FEATURES[head.feature](np.ones((1, head.dim)), np.zeros((1, head.dim))).shape[1]
        if len(head.weight) != expected:
            raise ValueError(
                f"the {head.name} head has {len(head.weight)} weights where {expected} belong: it is damaged, "
                "fit it again."
            )
        return head


def threshold(pairs: EmbeddedPairs) -> Head:
    """Same person iff ||f(a) - f(b)||² <= τ: the score is minus the distance, and needs no calibration.

    τ makes most training pairs right (`metrics.accuracy_threshold`, with its tie rule).
    """
    pairs.require_both_classes("training pairs")
    scores = -FEATURES["squared_distance"](pairs.a, pairs.b)[:, 0]
    return Head(
        name="threshold",
        feature="squared_distance",
        weight=(-1.0,),
        intercept=0.0,
        threshold=metrics.accuracy_threshold(scores, pairs.same)[0],
        calibrated=False,
        dim=pairs.a.shape[1],
    )


def logistic_distance(pairs: EmbeddedPairs) -> Head:
    """One-dimensional logistic regression on ||f(a) - f(b)||²: the distance, calibrated.

    Its ROC is the distance's own; it turns a distance into a log-likelihood ratio and finds the threshold by likelihood
    rather than by the best cut. The penalty (C = 10,000) only keeps the slope finite when training pairs are separable.
    """
    pairs.require_both_classes("training pairs")
    return _logistic("logistic_distance", "squared_distance", pairs, 1e4, "fixed")


GRID = tuple(10.0**k for k in range(-5, 2))
"""Candidates for the C of `logistic_abs`, on standardised features."""

FOLDS = 5


def logistic_abs(pairs: EmbeddedPairs) -> Head:
    """Logistic regression on |f(a) - f(b)| with an L2 penalty, C chosen inside the training pairs.

    Each C of `GRID` is fitted on the pairs of four folds that share no person with the fifth (`protocols.deal_folds`
    and `splits`), and scored by the Cllr of the held-out log-likelihood ratios, pooled over the folds; Cllr because
    folds by person differ in their share of genuine pairs. The smallest C (the strongest penalty) wins a tie. The head
    is then fitted on all training pairs. Without people, folds are of pairs; with too few of either, C is 0.01. `note`
    says which it was.

    References:
      Taigman et al., "DeepFace" (2014), section 4.2, for a learned metric in this place; the logistic unit on the
      absolute difference of two encodings is the Siamese network's binary form.
    """
    pairs.require_both_classes("training pairs")
    c, note = _choose_c(pairs)
    return _logistic("logistic_abs", "abs_difference", pairs, c, note)


HEADS: dict[str, Callable[[EmbeddedPairs], Head]] = {
    "threshold": threshold,
    "logistic_distance": logistic_distance,
    "logistic_abs": logistic_abs,
}
"""Heads by name. Each takes training pairs, and raises ValueError unless both kinds of pair are among them."""


def fit(
    name: str,
    a: ArrayLike,
    b: ArrayLike,
    same: ArrayLike,
    people_a: ArrayLike | None = None,
    people_b: ArrayLike | None = None,
) -> Head:
    """Fits a head on training pairs.

    Args:
      name: an entry of `HEADS`.
      a, b: [n, d] embeddings.
      same: [n] bool; both kinds must be present.
      people_a, people_b: [n] person ids, for folds by person where a head chooses its penalty.

    Returns:
      `Head`.

    Raises:
      ValueError: an unknown name, or pairs that `EmbeddedPairs` refuses.
    """
    return named(name)(EmbeddedPairs(a, b, same, people_a, people_b))  # type: ignore[arg-type]  # it converts


def named(name: str) -> Callable[[EmbeddedPairs], Head]:
    """The entry of `HEADS`, or a ValueError that lists them."""
    if name not in HEADS:
        raise ValueError(f"there is no head {name!r}: use one of {', '.join(HEADS)}.")
    return HEADS[name]


def _standardised(x: Floats) -> tuple[Floats, Floats, Floats]:
    mean, spread = x.mean(axis=0), x.std(axis=0)
    # A component that never varies carries nothing; dividing it by its rounding noise would make it carry something.
    spread = np.where(spread > 1e-9 * np.maximum(np.abs(mean), 1e-300), spread, np.inf)
    return (x - mean) / spread, mean, spread


def _log_prior_odds(same: NDArray[np.bool_]) -> float:
    genuine = int(same.sum())
    return math.log(genuine / (len(same) - genuine))


def _solve(x: Floats, same: NDArray[np.bool_], grid: tuple[float, ...]) -> list[tuple[Floats, float]]:
    solver = LogisticRegression(solver="lbfgs", max_iter=5000, tol=1e-5, warm_start=True)
    found = []
    # Matrices this small are slower on many BLAS threads (3.0 s against 0.2 s on two busy cores), and on one thread the
    # same pairs give the same bits on any number of cores.
    with threadpool_limits(1):
        for c in grid:
            solver.set_params(C=c).fit(x, same)
            found.append((solver.coef_[0].copy(), float(solver.intercept_[0])))
    return found


def _logistic(name: str, feature: str, pairs: EmbeddedPairs, c: float, note: str) -> Head:
    x, mean, spread = _standardised(FEATURES[feature](pairs.a, pairs.b))
    [(weight, bias)] = _solve(x, pairs.same, (c,))
    weight = weight / spread
    prior = _log_prior_odds(pairs.same)
    return Head(
        name=name,
        feature=feature,
        weight=tuple(weight.tolist()),
        intercept=float(bias - mean @ weight - prior),
        # A posterior of one half at the training pairs' own prior: what "most correct" means for a likelihood.
        threshold=0.0 - prior,
        calibrated=True,
        dim=pairs.a.shape[1],
        regularisation=c,
        note=note,
    )


def _choose_c(pairs: EmbeddedPairs) -> tuple[float, str]:
    if len(pairs) < FOLDS:
        return 0.01, "default: too few training pairs to choose"
    features = FEATURES["abs_difference"](pairs.a, pairs.b)
    fold = protocols.deal_folds(pairs, FOLDS)
    held_out: list[Floats] = []
    same: list[NDArray[np.bool_]] = []
    for train, test in protocols.splits(pairs, fold, disjoint=True):
        if not len(test) or not len(train) or pairs.same[train].all() or not pairs.same[train].any():
            continue
        x, mean, spread = _standardised(features[train])
        prior = _log_prior_odds(pairs.same[train])
        standard = (features[test] - mean) / spread
        held_out.append(
            np.stack([standard @ w + bias - prior for w, bias in _solve(x, pairs.same[train], GRID)], axis=1)
        )
        same.append(pairs.same[test])
    labels = np.concatenate(same) if same else np.zeros(0, bool)
    if not labels.any() or labels.all():
        return 0.01, "default: too few training people to choose"
    llr = np.concatenate(held_out)
    cost = [metrics.cllr(llr[:, i], labels) for i in range(len(GRID))]
    what = "pairs (people not given)" if pairs.people_a is None else "people"
    return GRID[int(np.argmin(cost))], f"chosen by Cllr over {len(same)} folds of {what}"

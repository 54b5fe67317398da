"""Heads: from two embeddings to one score, fitted on training pairs only.

A new head is one function and one entry in `HEADS`. Each is a linear function of a symmetric feature (of the embeddings,
or of a linear map of them), so a fitted head is a handful of numbers that JSON holds, and score(a, b) equals score(b, a)
bit for bit. Fitted heads but the two thresholds give natural-log likelihood ratios: the logit less the training log prior
odds, so that another share of genuine pairs needs another threshold and no other head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from faceembed import metrics
from faceembed.verification import protocols
from faceembed.verification.features import FEATURES, EmbeddedPairs

__all__ = ["HEADS", "USUAL_HEADS", "Head", "fit"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A fitted head: score = feature(a, b) @ weight + intercept.

    Attributes:
      name: the entry of `HEADS` that fitted it, with "@LAYER" where it reads a layer.
      feature: the entry of `FEATURES` that it reads.
      weight: [k] coefficients on the feature as it is; standardisation is already folded in.
      intercept: of a logistic head, the fitted one less the training log prior odds.
      threshold: a pair is accepted when score >= threshold; from training pairs.
      calibrated: whether the score is a natural-log likelihood ratio; else it is comparable within the head only.
      dim: d, the length of the embeddings it was fitted on.
      projection: [d][m] by which embeddings are multiplied before the feature is taken, or None.
      layer: whose features stand in the place of the embeddings, or None for the embeddings themselves.
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
    projection: tuple[tuple[float, ...], ...] | None = None
    layer: str | None = None
    regularisation: float | None = None
    note: str = ""

    def score(self, a: ArrayLike, b: ArrayLike) -> Floats:
        """Scores pairs; symmetric in a and b.

        Args:
          a, b: [n, d] embeddings from the encoder that the head was fitted for (its layer's features, where it has one).

        Returns:
          [n] float64, higher = same person.

        Raises:
          ValueError: the shapes do not fit each other or the head, or a row is not finite or all zero.
        """
        a = np.asarray(a)
        pairs = EmbeddedPairs(a, np.asarray(b), np.zeros(len(a) if a.ndim else 0, bool))
        return self._score(pairs)

    def of(self, pairs: EmbeddedPairs) -> Floats:
        """Scores [n] of pairs, read from the head's layer where it has one.

        Raises:
          ValueError: as `score`, or the pairs have no such layer.
        """
        return self._score(pairs.at(self.layer))

    def _score(self, pairs: EmbeddedPairs) -> Floats:
        self._require(pairs.a.shape[1])
        a, b = (self._project(side) for side in (pairs.a, pairs.b))
        return FEATURES[self.feature](a, b) @ np.asarray(self.weight) + self.intercept

    def _require(self, d: int) -> None:
        if d != self.dim:
            raise ValueError(
                f"embeddings have {d} numbers and this {self.name} head was fitted on {self.dim}: "
                "use the encoder that it was fitted for, or fit it again."
            )

    def _project(self, emb: Any) -> Any:
        return emb if self.projection is None else emb.astype(np.float64) @ np.asarray(self.projection)

    def cross_scores(self, a: ArrayLike, b: ArrayLike) -> Floats:
        """Scores of every row of a with every row of b; up to rounding what `score` gives pair by pair.

        Features that are sums of products are taken as matrix products, in float64; the others row by row.

        Args:
          a: [p, d] embeddings.
          b: [q, d] embeddings.

        Returns:
          [p, q] float64.

        Raises:
          ValueError: the shapes do not fit each other or the head.
        """
        one, other = np.asarray(a), np.asarray(b)
        if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
            raise ValueError(f"a has shape {one.shape} and b {other.shape}: give [p, d] and [q, d] of one encoder.")
        self._require(one.shape[1])
        one, other = (np.asarray(self._project(side), np.float64) for side in (one, other))
        w = np.asarray(self.weight)
        if self.feature in ("squared_distance", "squared_difference"):
            w = np.broadcast_to(w, one.shape[1:])
            lengths = (np.square(one) @ w)[:, None] + (np.square(other) @ w)[None]
            return (-2 * w * one) @ other.T + lengths + self.intercept
        if self.feature == "product":
            return (w * one) @ other.T + self.intercept
        if self.feature == "cosine":
            one, other = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (one, other))
            return w[0] * (one @ other.T) + self.intercept
        feature = FEATURES[self.feature]
        return np.stack([feature(np.broadcast_to(row, other.shape), other) @ w for row in one]) + self.intercept

    def to_dict(self) -> dict[str, Any]:
        """Every field in JSON's types; `from_dict` restores an equal head, to the last bit."""
        fields = dataclasses.asdict(self) | {"weight": list(self.weight)}
        return fields | {"projection": None if self.projection is None else [list(row) for row in self.projection]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Head:
        """The head that `to_dict` described; one written before `projection` and `layer` were fields has neither.

        Raises:
          ValueError: a field is missing, unknown, not finite, or does not fit the others.
        """
        fields = {"projection": None, "layer": None, **fields}
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise ValueError(
                f"a head has the fields {sorted(known)}; missing: {sorted(known - set(fields))}, "
                f"unknown: {sorted(set(fields) - known)}. Was it written by another version?"
            )
        if fields["feature"] not in FEATURES:
            raise ValueError(f"a head reads {fields['feature']!r}, which is not one of {sorted(FEATURES)}.")
        numbers = {name: float(fields[name]) for name in ("intercept", "threshold")}
        projection = fields["projection"]
        if projection is not None:
            projection = tuple(tuple(float(x) for x in row) for row in projection)
        weight = tuple(float(w) for w in fields["weight"])
        head = cls(**{**fields, **numbers, "weight": weight, "projection": projection})
        rows = projection or ()
        if not np.isfinite([*head.weight, head.intercept, head.threshold, *(x for row in rows for x in row)]).all():
            raise ValueError(f"the {head.name} head holds a number that is not finite: it is damaged, fit it again.")
        if projection is not None and (len(rows) != head.dim or len({len(row) for row in rows}) != 1):
            raise ValueError(f"the {head.name} head's projection does not take {head.dim} numbers: fit it again.")
        width = len(rows[0]) if rows else head.dim
        expected = FEATURES[head.feature](np.ones((1, width)), np.full((1, width), 0.5)).shape[1]
        if len(head.weight) != expected:
            raise ValueError(
                f"the {head.name} head has {len(head.weight)} weights where {expected} belong: it is damaged, "
                "fit it again."
            )
        return head


# ---- heads ---------------------------------------------------------------------------------------------------------------

GRID = tuple(10.0**k for k in range(-5, 2))
"""Candidates for C, on standardised features."""

FOLDS = 5


def threshold(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """Same person iff ||f(a) - f(b)||² <= τ: the score is minus the distance, and needs no calibration.

    τ makes most training pairs right (`metrics.accuracy_threshold`, with its tie rule).
    """
    return _cut("threshold", "squared_distance", -1.0, pairs)


def threshold_cosine(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """Same person iff cos(f(a), f(b)) >= τ; on unit vectors the decisions of `threshold`."""
    return _cut("threshold_cosine", "cosine", 1.0, pairs)


def logistic_distance(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """One-dimensional logistic regression on ||f(a) - f(b)||²: the distance, calibrated.

    Its ROC is the distance's own; it turns a distance into a log-likelihood ratio and finds the threshold by likelihood
    rather than by the best cut. The penalty (C = 10,000) only keeps the slope finite when training pairs are separable.
    It is the null model of every learned head: what a head gains over `threshold` and not over this one is the noise of
    the best cut.
    """
    return _linear("logistic_distance", "squared_distance", pairs, _l2, 1e4)


def logistic_abs(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
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
    return _linear("logistic_abs", "abs_difference", pairs, _l2, regularisation)


def logistic_abs_l1(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """`logistic_abs` with an L1 penalty: components that do not tell get the weight 0."""
    return _linear("logistic_abs_l1", "abs_difference", pairs, _l1, regularisation)


def logistic_abs_nonpositive(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """`logistic_abs` with no weight above 0: a larger difference in a component never speaks for the same person."""
    return _linear("logistic_abs_nonpositive", "abs_difference", pairs, _nonpositive, regularisation)


def logistic_square(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """Logistic regression on (f(a) - f(b))² by component, C as in `logistic_abs`: a weighted Euclidean distance."""
    return _linear("logistic_square", "squared_difference", pairs, _l2, regularisation)


def logistic_chi2(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """Logistic regression on (a - b)² / (a + b) by component, C as in `logistic_abs`.

    Non-negative features (an encoder's layer after its activation: "logistic_chi2@LAYER") are taken as they are. Signed
    embeddings break the quotient (`features.chi_square` says how); their positive and negative parts are then taken
    separately (`features.chi_square_halves`).

    References:
      Taigman et al., "DeepFace" (2014), section 4.1.
    """
    return _linear("logistic_chi2", _chi_square_of(pairs), pairs, _l2, regularisation)


def logistic_product(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """Logistic regression on f(a) f(b) by component, C as in `logistic_abs`: a weighted inner product."""
    return _linear("logistic_product", "product", pairs, _l2, regularisation)


def logistic_abs_dot(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """Logistic regression on |f(a) - f(b)| joined with f(a)·f(b), C as in `logistic_abs`: it can fall back on cosine."""
    return _linear("logistic_abs_dot", "abs_difference_and_dot", pairs, _l2, regularisation)


def chi2_svm(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """DeepFace's weighted chi-square distance: Σ w_i (a_i - b_i)² / (a_i + b_i), w by a linear SVM.

    Features as in `logistic_chi2`; C by held-out Cllr. A margin is no likelihood: decision values of held-out folds are
    calibrated by a one-dimensional logistic regression, which is folded into the weights.

    References:
      Taigman et al., "DeepFace" (2014), section 4.1; Platt (1999) for the calibration.
    """
    return _linear("chi2_svm", _chi_square_of(pairs), pairs, _svm, regularisation)


def whitened_distance(pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """Distance after whitening by the within-class covariance, calibrated as in `logistic_distance`.

    Half the covariance of f(a) - f(b) over genuine training pairs is the covariance of one person's photos; in directions
    in which photos of one person differ, a difference counts less. It is shrunk towards a multiple of the identity.

    References:
      Hatch, Kajarekar & Stolcke (2006) for within-class covariance normalisation; Ledoit & Wolf (2004) for the shrinkage.
    """
    pairs.require_both_classes("training pairs")
    difference = np.subtract(pairs.a[pairs.same], pairs.b[pairs.same], dtype=np.float64)
    with threadpool_limits(1):
        covariance, shrinkage = ledoit_wolf(difference / math.sqrt(2), assume_centered=True)
        scale = float(np.trace(covariance)) / len(covariance)
        if scale <= 0:
            raise ValueError(
                "the two photos of every genuine training pair have one embedding: there is nothing to whiten."
            )
        value, vector = np.linalg.eigh(covariance / scale)
        # A direction in which no two photos of a person ever differed must not decide everything.
        projection = vector / np.sqrt(np.maximum(value, 1e-6))
        a, b = (side.astype(np.float64) @ projection for side in (pairs.a, pairs.b))
    projected = EmbeddedPairs(a, b, pairs.same, pairs.people_a, pairs.people_b)
    head = _linear("whitened_distance", "squared_distance", projected, _l2, 1e4)
    return dataclasses.replace(
        head,
        projection=tuple(tuple(row) for row in projection.tolist()),
        dim=pairs.a.shape[1],
        regularisation=None,
        note=f"covariance of {len(difference):,} genuine pairs, shrunk by {shrinkage:.2f}",
    )


HEADS: dict[str, Callable[..., Head]] = {
    "threshold": threshold,
    "threshold_cosine": threshold_cosine,
    "logistic_distance": logistic_distance,
    "whitened_distance": whitened_distance,
    "logistic_abs": logistic_abs,
    "logistic_abs_l1": logistic_abs_l1,
    "logistic_abs_nonpositive": logistic_abs_nonpositive,
    "logistic_abs_dot": logistic_abs_dot,
    "logistic_square": logistic_square,
    "logistic_product": logistic_product,
    "logistic_chi2": logistic_chi2,
    "chi2_svm": chi2_svm,
}
"""Heads by name. Each takes training pairs, and optionally a regularisation instead of choosing one, and raises
ValueError unless both kinds of pair are among them."""


USUAL_HEADS = ("threshold", "logistic_distance", "logistic_abs")
"""What is compared unless told: the rule everybody uses, its calibration, and the Siamese network's own head."""


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
    return fit_pairs(name, EmbeddedPairs(a, b, same, people_a, people_b))  # type: ignore[arg-type]  # it converts


def fit_pairs(name: str, pairs: EmbeddedPairs, regularisation: float | None = None) -> Head:
    """Fits "HEAD" or "HEAD@LAYER" on training pairs; with a regularisation, that one instead of a choice.

    Raises:
      ValueError: an unknown head or layer, or pairs of one kind only.
    """
    function, layer = named(name)
    chosen = pairs.at(layer)
    chosen.require_both_classes("training pairs")
    return dataclasses.replace(function(chosen, regularisation), name=name, layer=layer)


def named(name: str) -> tuple[Callable[..., Head], str | None]:
    """The entry of `HEADS` and the layer that "HEAD@LAYER" stands for, or a ValueError that lists the heads."""
    head, at, layer = name.partition("@")
    if head not in HEADS or (at and not layer):
        raise ValueError(f"there is no head {name!r}: use one of {', '.join(HEADS)}, or HEAD@LAYER.")
    return HEADS[head], layer or None


# ---- fitting -------------------------------------------------------------------------------------------------------------

Solver = Callable[[Floats, Bools, tuple[float, ...]], list[tuple[Floats, float]]]
"""(standardised features [n, k], same [n], several C from small to large) → weights [k] and intercept for each."""


def _l2(x: Floats, same: Bools, grid: tuple[float, ...]) -> list[tuple[Floats, float]]:
    return _swept(LogisticRegression(solver="lbfgs", max_iter=5000, tol=1e-5, warm_start=True), x, same, grid)


def _l1(x: Floats, same: Bools, grid: tuple[float, ...]) -> list[tuple[Floats, float]]:
    # liblinear penalises the intercept like a weight; scaled by 100 it hardly feels it.
    solver = LogisticRegression(
        solver="liblinear", l1_ratio=1, intercept_scaling=100, max_iter=5000, tol=1e-4, random_state=0
    )
    return _swept(solver, x, same, grid)


def _svm(x: Floats, same: Bools, grid: tuple[float, ...]) -> list[tuple[Floats, float]]:
    solver = LinearSVC(dual=False, intercept_scaling=100, max_iter=5000, tol=1e-4, random_state=0)
    return _swept(solver, x, same, grid)


def _swept(solver: Any, x: Floats, same: Bools, grid: tuple[float, ...]) -> list[tuple[Floats, float]]:
    found = []
    for c in grid:
        solver.set_params(C=c).fit(x, same)
        found.append((solver.coef_[0].copy(), float(np.ravel(solver.intercept_)[0])))
    return found


def _nonpositive(x: Floats, same: Bools, grid: tuple[float, ...]) -> list[tuple[Floats, float]]:
    """scikit-learn's L2-penalised logistic regression has no bounds: the same objective, by SciPy's L-BFGS-B."""
    sign = np.where(same, 1.0, -1.0)
    at = np.zeros(x.shape[1] + 1)
    bounds = [(None, 0.0)] * x.shape[1] + [(None, None)]
    found = []
    for c in grid:

        def objective(w: Floats, c: float = c) -> tuple[float, Floats]:
            margin = sign * (x @ w[:-1] + w[-1])
            pull = -c * sign * expit(-margin)
            gradient = np.append(x.T @ pull + w[:-1], pull.sum())
            return c * float(np.logaddexp(0, -margin).sum()) + 0.5 * float(w[:-1] @ w[:-1]), gradient

        # Divided by C·n, the tolerances mean the same for every C and n.
        size = c * len(x)
        done = minimize(
            lambda w, objective=objective, size=size: tuple(part / size for part in objective(w)),
            at, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 5000, "ftol": 1e-12, "gtol": 1e-7},
        )  # fmt: skip
        at = done.x
        found.append((at[:-1].copy(), float(at[-1])))
    return found


def _chi_square_of(pairs: EmbeddedPairs) -> str:
    return "chi_square" if (pairs.a >= 0).all() and (pairs.b >= 0).all() else "chi_square_halves"


def _cut(name: str, feature: str, weight: float, pairs: EmbeddedPairs) -> Head:
    pairs.require_both_classes("training pairs")
    scores = weight * FEATURES[feature](pairs.a, pairs.b)[:, 0]
    return Head(
        name=name,
        feature=feature,
        weight=(weight,),
        intercept=0.0,
        threshold=metrics.accuracy_threshold(scores, pairs.same)[0],
        calibrated=False,
        dim=pairs.a.shape[1],
    )


def _standardised(x: Floats) -> tuple[Floats, Floats, Floats]:
    mean, spread = x.mean(axis=0), x.std(axis=0)
    # A component that never varies carries nothing; dividing it by its rounding noise would make it carry something.
    spread = np.where(spread > 1e-9 * np.maximum(np.abs(mean), 1e-300), spread, np.inf)
    return (x - mean) / spread, mean, spread


def _log_prior_odds(same: Bools) -> float:
    genuine = int(same.sum())
    return math.log(genuine / (len(same) - genuine))


def _linear(name: str, feature: str, pairs: EmbeddedPairs, solver: Solver, c: float | None) -> Head:
    """Fits weights on a standardised feature, C by held-out Cllr unless it is given, and makes them a likelihood ratio."""
    pairs.require_both_classes("training pairs")
    # Matrices this small are slower on many BLAS threads (3.0 s against 0.2 s on two busy cores), and on one thread the
    # same pairs give the same bits on any number of cores.
    with threadpool_limits(1):
        features = FEATURES[feature](pairs.a, pairs.b)
        held_out = None
        note = "fixed"
        if c is None:
            c, note, held_out = _choose_c(features, pairs, solver)
        elif solver is _svm:
            held_out = _held_out(features, pairs, solver, (c,))
        x, mean, spread = _standardised(features)
        [(weight, bias)] = solver(x, pairs.same, (c,))
        weight = weight / spread
        intercept = float(bias - mean @ weight)
        if solver is _svm:
            # In-sample margins are too wide; they are what is left where there is nothing held out.
            scores, same = held_out or ((features @ weight + intercept)[:, None], pairs.same)
            slope, offset = _calibrated(scores[:, 0], same)
            weight, intercept = slope * weight, slope * intercept + offset
        else:
            intercept -= _log_prior_odds(pairs.same)
    return Head(
        name=name,
        feature=feature,
        weight=tuple(weight.tolist()),
        intercept=intercept,
        # A posterior of one half at the training pairs' own prior: what "most correct" means for a likelihood.
        threshold=0.0 - _log_prior_odds(pairs.same),
        calibrated=True,
        dim=pairs.a.shape[1],
        regularisation=c,
        note=note,
    )


def _calibrated(scores: Floats, same: Bools) -> tuple[float, float]:
    """Slope and offset that make scores log-likelihood ratios."""
    x, mean, spread = _standardised(scores[:, None])
    [(weight, bias)] = _l2(x, same, (1e4,))
    slope = float(weight[0] / spread[0])
    return slope, float(bias - mean[0] * slope) - _log_prior_odds(same)


def _held_out(
    features: Floats, pairs: EmbeddedPairs, solver: Solver, grid: tuple[float, ...]
) -> tuple[Floats, Bools] | None:
    """Scores [m, len(grid)] of folds that were not fitted on, and their labels; None where there are too few people."""
    if len(pairs) < FOLDS:
        return None
    scores: list[Floats] = []
    same: list[Bools] = []
    for train, test in protocols.splits(pairs, protocols.deal_folds(pairs, FOLDS), disjoint=True):
        if not len(test) or not len(train) or pairs.same[train].all() or not pairs.same[train].any():
            continue
        x, mean, spread = _standardised(features[train])
        # A margin has no prior to take off: its calibration does that.
        prior = 0.0 if solver is _svm else _log_prior_odds(pairs.same[train])
        standard = (features[test] - mean) / spread
        scores.append(np.stack([standard @ w + b - prior for w, b in solver(x, pairs.same[train], grid)], axis=1))
        same.append(pairs.same[test])
    labels = np.concatenate(same) if same else np.zeros(0, bool)
    if not labels.any() or labels.all():
        return None
    return np.concatenate(scores), labels


def _choose_c(features: Floats, pairs: EmbeddedPairs, solver: Solver) -> tuple[float, str, tuple[Floats, Bools] | None]:
    """C, how it was chosen, and the held-out scores [m, 1] at that C."""
    found = _held_out(features, pairs, solver, GRID)
    if found is None:
        few = "pairs" if len(pairs) < FOLDS else "people"
        return 0.01, f"default: too few training {few} to choose", None
    scores, same = found

    def llr(column: Floats) -> Floats:
        if solver is not _svm:
            return column
        slope, offset = _calibrated(column, same)
        return slope * column + offset

    best = int(np.argmin([metrics.cllr(llr(column), same) for column in scores.T]))
    folds = f"{FOLDS} folds of {'pairs (people not given)' if pairs.people_a is None else 'people'}"
    return GRID[best], f"chosen by Cllr over {folds}", (scores[:, [best]], same)


def layers_of(names: Iterable[str]) -> tuple[str, ...]:
    """The layers that heads named "HEAD@LAYER" read, each once, in order."""
    return tuple(dict.fromkeys(layer for _, layer in map(named, names) if layer))

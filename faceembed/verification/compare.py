"""Heads side by side on the same pairs: fitted on some, tested on others, never both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from faceembed import metrics, report, uncertainty
from faceembed.uncertainty import Interval
from faceembed.verification import heads as heads_
from faceembed.verification import protocols
from faceembed.verification.features import EmbeddedPairs
from faceembed.verification.heads import Head

__all__ = ["HeadResult", "Results", "compare"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEALT = 10
"""Folds that are dealt when the caller gives neither training pairs nor folds; LFW View 2 has as many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadResult:
    """What one head did on the tested pairs.

    Attributes:
      name: the entry of `HEADS`.
      accuracy: share decided correctly at `threshold`; the mean of the folds' shares where folds were given.
      standard_error: of `accuracy`: s/√folds (ddof = 1) where folds were given, else √(p(1-p)/effective n).
      interval: `Interval` around `accuracy`, with what it assumes.
      threshold: set on training pairs: a number, or one for each fold.
      auc, eer: of all tested pairs together; with folds, of the scores of the several fitted heads pooled.
      cllr: bits, for heads whose scores are log-likelihood ratios; None for others.
      tar: target FAR → `OperatingPoint`; look at its `.resolution` before quoting it.
      fold_accuracy: [folds], or one number.
      fitted: the fitted heads, one for each fold, or one.
      scores: [n] float64 of the tested pairs in the order given, higher = same person.
      cuts: [n] float64, the threshold that decided each of them.
    """

    name: str
    accuracy: float
    standard_error: float
    interval: Interval
    threshold: float | tuple[float, ...]
    auc: float
    eer: float
    cllr: float | None
    tar: dict[float, metrics.OperatingPoint]
    fold_accuracy: tuple[float, ...]
    fitted: tuple[Head, ...]
    scores: Floats = dataclasses.field(repr=False)
    cuts: Floats = dataclasses.field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types; everything but scores and cuts. Each operating point carries its resolution."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("scores", "cuts")}
        fields["tar"] = [
            dataclasses.asdict(point) | {"resolution": point.resolution.status, "needs": point.resolution.needs}
            for point in self.tar.values()
        ]
        return report.jsonable(fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Heads by name: `results["threshold"].accuracy`; `print(results)` gives the table.

    Attributes:
      heads: name → `HeadResult`, in the order asked for.
      protocol: in words, what fitted and what was tested.
      n_genuine, n_impostor: tested pairs.
      n_people: people among the tested pairs, or None where they were not given.
      warnings: what a reader must know before quoting a figure: people on both sides, people not given.
    """

    heads: dict[str, HeadResult]
    protocol: str
    n_genuine: int
    n_impostor: int
    n_people: int | None
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> HeadResult:
        if name not in self.heads:
            raise KeyError(f"no head {name!r} was compared; these were: {', '.join(self.heads)}")
        return self.heads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types, for `report.write_json`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return report.jsonable(fields)

    def __str__(self) -> str:
        rows = []
        for result in self.heads.values():
            row: dict[str, Any] = {
                "head": result.name,
                "accuracy": report.format_percent(result.accuracy),
                "± s.e.": f"{100 * result.standard_error:.2f}",
                f"{100 * result.interval.level:g} % interval": report.format_interval(
                    result.interval.low, result.interval.high
                ),
                "AUC": f"{result.auc:.4f}",
                "EER": report.format_percent(result.eer),
            }
            for far, point in result.tar.items():
                row[f"TAR @ FAR {100 * far:g} %"] = report.format_operating_point(point)
            row["Cllr"] = "-" if result.cllr is None else f"{result.cllr:.3f}"
            rows.append(row)
        people = "" if self.n_people is None else f" of {self.n_people:,} people"
        name, first = next((result.name, result.interval) for result in self.heads.values())
        lines = [
            f"{self.n_genuine:,} genuine and {self.n_impostor:,} impostor pairs{people}; {self.protocol}",
            "",
            report.table(rows),
            "",
            f"interval: {first.assumes} (n = {first.n:,}, effective n = {first.n_effective:,.0f} for {name})",
        ]
        if any(point.resolution.status == "flagged" for result in self.heads.values() for point in result.tar.values()):
            lines.append("~ rests on fewer than 30 expected false accepts")
        return "\n".join([*lines, *(f"WARNING: {warning}" for warning in self.warnings)])


@dataclasses.dataclass(frozen=True)
class _Trial:
    """One fit and one test."""

    fit: EmbeddedPairs
    test: EmbeddedPairs
    where: Ints


def compare(
    a: ArrayLike,
    b: ArrayLike,
    same: ArrayLike,
    people_a: ArrayLike | None = None,
    people_b: ArrayLike | None = None,
    *,
    train: EmbeddedPairs | Sequence[Any] | None = None,
    folds: ArrayLike | int | None = None,
    heads: Sequence[str] = ("threshold", "logistic_distance", "logistic_abs"),
    fars: Sequence[float] = (0.1, 0.01, 0.001),
    level: float = 0.95,
) -> Results:
    """Fits heads on training pairs and tests them on other pairs; nothing is chosen on what is reported.

    What fits is one of three:
      train=...: those pairs fit, and (a, b, same) is the test (LFW View 1; one set's head on another set).
      folds=[n] ints: each fold in turn is the test and all others fit (LFW View 2); the accuracy is the mean of the
        folds', its standard error s/√folds with ddof = 1, and its interval Student's t over folds.
      neither, or folds=int: folds are dealt by person (`protocols.deal_folds`), and each is tested by heads fitted on
        the pairs that share nobody with it.

    Args:
      a, b: [n, d] embeddings of the two sides, from one encoder; neither NaN nor all zero. Distances are taken as they
        are: normalise first if the encoder does not.
      same: [n] bool, True for genuine pairs; both kinds must be present.
      people_a, people_b: [n] person ids. With them, intervals allow for pairs that share people, and people who are
        among the training people too are reported.
      train: training pairs: `EmbeddedPairs`, or (a, b, same) or (a, b, same, people_a, people_b).
      folds: [n] ints, or how many to deal; by default 10 are dealt unless `train` is given.
      heads: entries of `HEADS`.
      fars: target FARs in (0, 1); the threshold is set on training pairs, the realised FAR stands beside it.
      level: coverage of the intervals, in (0, 1).

    Returns:
      `Results`. Intervals are conditional on the fitted heads.

    Raises:
      ValueError: unusable embeddings (the rows are named), one kind of pair only, shapes that do not fit, both train
        and folds, or an unknown head.

    >>> rng = np.random.default_rng(0)
    >>> people = rng.normal(size=(60, 8))
    >>> who_a = np.arange(400) % 60
    >>> who_b = np.where(np.arange(400) < 200, who_a, (who_a + 1 + np.arange(400) % 7) % 60)
    >>> a, b = (people[who] + 0.3 * rng.normal(size=(400, 8)) for who in (who_a, who_b))
    >>> results = compare(a[::2], b[::2], (who_a == who_b)[::2], train=(a[1::2], b[1::2], (who_a == who_b)[1::2]))
    >>> results["threshold"].accuracy > 0.95
    True
    """
    test = EmbeddedPairs(a, b, same, people_a, people_b)  # type: ignore[arg-type]  # it converts
    test.require_both_classes("tested pairs")
    if not heads:
        raise ValueError(f"no heads to compare: name some of {', '.join(heads_.HEADS)}.")
    for name in heads:
        heads_.named(name)
    if len(set(heads)) < len(heads):
        raise ValueError(f"heads {list(heads)} name one twice: each can be compared once.")
    if train is not None and folds is not None:
        raise ValueError("both train and folds are given: fit on other pairs, or on the other folds, not both.")

    warnings: list[str] = []
    given = folds is not None and np.ndim(folds) > 0
    if train is not None:
        trials, protocol = _trained(train, test, warnings)
    else:
        trials, protocol = _folded(folds, test, warnings)
    if test.people_a is None:
        warnings.append("people were not given: nobody could check that training and tested people differ.")

    return Results(
        heads={name: _result(name, trials, test, fars=fars, level=level, over_folds=given) for name in heads},
        protocol=protocol,
        n_genuine=int(test.same.sum()),
        n_impostor=int((~test.same).sum()),
        n_people=None
        if test.people_a is None or test.people_b is None
        else len(np.unique(np.concatenate([test.people_a, test.people_b]))),
        warnings=tuple(warnings),
    )


def _trained(train: Any, test: EmbeddedPairs, warnings: list[str]) -> tuple[list[_Trial], str]:
    if not isinstance(train, EmbeddedPairs):
        if len(train) not in (3, 5):
            raise ValueError(
                f"train has {len(train)} parts: give (a, b, same) or (a, b, same, people_a, people_b), as for the test."
            )
        try:
            train = EmbeddedPairs(*train)
        except ValueError as error:
            raise ValueError(f"training pairs: {error}") from error
    train.require_both_classes("training pairs")
    if train.a.shape[1] != test.a.shape[1]:
        raise ValueError(
            f"training embeddings have {train.a.shape[1]} numbers and tested ones {test.a.shape[1]}: "
            "both must come from one encoder."
        )
    if test.people_a is not None and train.people_a is None:
        warnings.append("training people were not given: nobody could check that training and tested people differ.")
    both = protocols.shared_people(train, test)
    if both:
        warnings.append(
            f"{len(both)} tested people are among the training people ({_some(both)}): the figures flatter the heads."
        )
    return [_Trial(train, test, np.arange(len(test)))], f"heads fitted on {len(train):,} other pairs"


def _folded(folds: Any, test: EmbeddedPairs, warnings: list[str]) -> tuple[list[_Trial], str]:
    if folds is not None and np.ndim(folds) > 0:
        fold, disjoint = protocols.given_folds(test, folds), False
        protocol = f"{fold.max() + 1} given folds, each tested by heads fitted on the others"
    else:
        fold, disjoint = protocols.deal_folds(test, DEALT if folds is None else int(folds)), True
        by = "pair" if test.people_a is None else "person"
        protocol = f"folds dealt by {by}, each tested by heads fitted on pairs that share nobody with it"
        if test.people_a is None:
            protocol = "folds dealt by pair, each tested by heads fitted on the others"
    trials = []
    for f, (fit, tested) in enumerate(protocols.splits(test, fold, disjoint=disjoint)):
        if not len(tested):
            continue
        train = test.take(fit)
        train.require_both_classes(f"pairs that are left to fit on while fold {f} is tested")
        trials.append(_Trial(train, test.take(tested), tested))
    # Dealt folds share nobody by construction; prescribed ones only if their author saw to it.
    both = sorted({name for trial in trials for name in protocols.shared_people(trial.fit, trial.test)})
    if both:
        warnings.append(f"{len(both)} people are in more than one fold ({_some(both)}): they are fitted on and tested.")
    return trials, protocol


def _some(people: list[Any]) -> str:
    return ", ".join(str(person) for person in people[:3]) + (", …" if len(people) > 3 else "")


def _result(
    name: str, trials: list[_Trial], test: EmbeddedPairs, *, fars: Sequence[float], level: float, over_folds: bool
) -> HeadResult:
    fitted = [heads_.HEADS[name](trial.fit) for trial in trials]
    scores, cut = np.empty(len(test)), np.empty(len(test))
    for head, trial in zip(fitted, trials, strict=True):
        scores[trial.where] = head._score(trial.test)
        cut[trial.where] = head.threshold
    correct = (scores >= cut) == test.same
    by_fold = tuple(float(correct[trial.where].mean()) for trial in trials)

    if over_folds:
        accuracy, standard_error, interval = _over_folds(by_fold, len(test), level)
    else:
        accuracy = float(correct.mean())
        if test.people_a is None or test.people_b is None:
            interval = uncertainty.wilson_interval(correct, level=level)
        else:
            interval = uncertainty.dyadic_interval(correct, test.people_a, test.people_b, level=level)
        standard_error = math.sqrt(accuracy * (1 - accuracy) / interval.n_effective)

    return HeadResult(
        name=name,
        accuracy=accuracy,
        standard_error=standard_error,
        interval=interval,
        threshold=_one_or_all([head.threshold for head in fitted]),
        auc=metrics.auc(scores, test.same),
        eer=metrics.eer(scores, test.same),
        cllr=metrics.cllr(scores, test.same) if fitted[0].calibrated else None,
        tar={far: _operating_point(far, fitted, trials, scores, test.same) for far in fars},
        fold_accuracy=by_fold,
        fitted=tuple(fitted),
        scores=scores,
        cuts=cut,
    )


def _one_or_all(values: list[float]) -> float | tuple[float, ...]:
    return values[0] if len(values) == 1 else tuple(values)


def _over_folds(by_fold: tuple[float, ...], n: int, level: float) -> tuple[float, float, Interval]:
    k = len(by_fold)
    mean, spread = float(np.mean(by_fold)), float(np.std(by_fold, ddof=1))
    standard_error = spread / math.sqrt(k)
    half = float(student.ppf((1 + level) / 2, k - 1)) * standard_error
    interval = Interval(
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        level=level,
        n=n,
        n_effective=min(float(n), mean * (1 - mean) / standard_error**2) if standard_error else float(n),
        assumes=f"the accuracies of the {k} folds are independent and alike (Student's t), though their heads share "
        "training pairs",
    )
    return mean, standard_error, interval


def _operating_point(
    far: float, fitted: list[Head], trials: list[_Trial], scores: Floats, same: NDArray[np.bool_]
) -> metrics.OperatingPoint:
    cut = np.empty(len(scores))
    thresholds = []
    for head, trial in zip(fitted, trials, strict=True):
        thresholds.append(metrics.threshold_at_far(head._score(trial.fit), trial.fit.same, far))
        cut[trial.where] = thresholds[-1]
    tar, realised = metrics.rates_at(scores, same, cut)
    return metrics.OperatingPoint(
        target=far,
        threshold=_one_or_all(thresholds),
        tar=tar,
        far=realised,
        n_genuine=int(same.sum()),
        n_impostor=int((~same).sum()),
        n_impostor_train=min(int((~trial.fit.same).sum()) for trial in trials),
    )

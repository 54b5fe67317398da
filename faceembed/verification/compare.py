"""Heads side by side on the same pairs: fitted on some, tested on others, never both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from faceembed import metrics, report, uncertainty
from faceembed.uncertainty import Difference, Interval, McNemar
from faceembed.verification import heads as heads_
from faceembed.verification import protocols
from faceembed.verification.features import EmbeddedPairs
from faceembed.verification.heads import USUAL_HEADS, Head

__all__ = ["HeadResult", "Matched", "Results", "compare"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEALT = 10
"""Folds that are dealt when the caller gives neither training pairs nor folds; LFW View 2 has as many."""

PRIOR = 0.5
"""Share of genuine pairs at which Brier score and calibration error are given."""

PRIMARY = "accuracy"
"""What heads are compared by, unless the caller declares another quantity before looking."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matched:
    """TAR of a head where its FAR on the TESTED pairs is the target: for comparing heads at one point, not for quoting.

    Attributes:
      target: FAR.
      tar: share of tested genuine pairs accepted.
      low, high: interval around `tar`, with the noise of the threshold in it.
      resolution: "printed", "flagged" or "unresolvable"; `needs` impostor pairs for "printed".
    """

    target: float
    tar: float
    low: float
    high: float
    resolution: str
    needs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadResult:
    """What one head did on the tested pairs.

    Attributes:
      name: the entry of `HEADS`, with "@LAYER" where it reads a layer.
      accuracy: share decided correctly at `threshold`; the mean of the folds' shares where folds were given.
      standard_error: of `accuracy`: s/√folds (ddof = 1) where folds were given, else √(p(1-p)/effective n).
      interval: `Interval` around `accuracy`, with what it assumes.
      threshold: set on training pairs: a number, or one for each fold.
      auc, eer: of all tested pairs together; with folds, of the scores of the several fitted heads pooled.
      auc_low, auc_high: interval around `auc`.
      cllr: bits, for heads whose scores are log-likelihood ratios; None for others.
      min_cllr: bits, what the best monotone calibration of these scores would cost.
      brier, ece: at equal priors, for heads whose scores are log-likelihood ratios; None for others.
      reliability: what stands behind `ece`, or None.
      tar: target FAR → `OperatingPoint` at a TRANSFERRED threshold, set on training pairs; look at its `.resolution`.
      matched: target FAR → `Matched`, at the threshold of the tested pairs.
      band: FARs, and the lower and upper limit of TAR at each, for a ROC; None where people were not given.
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
    auc_low: float
    auc_high: float
    eer: float
    cllr: float | None
    min_cllr: float
    brier: float | None
    ece: float | None
    reliability: metrics.Reliability | None
    tar: dict[float, metrics.OperatingPoint]
    matched: dict[float, Matched]
    band: tuple[Floats, Floats, Floats] | None
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
        fields["matched"] = list(self.matched.values())
        return report.jsonable(fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Heads by name: `results["threshold"].accuracy`; `print(results)` gives the table.

    Attributes:
      heads: name → `HeadResult`, in the order asked for.
      protocol: in words, what fitted and what was tested.
      n_genuine, n_impostor: tested pairs.
      n_people: people among the tested pairs, or None where they were not given.
      primary: the quantity that was declared to compare heads by: "accuracy", "auc", or "tar@FAR" at matched FAR.
      reference: the head that the others are held against.
      differences: quantity → head → `Difference` to the reference, one family of simultaneous intervals a quantity.
      mcnemar: head → `McNemar` of its decisions and the reference's, which assumes independent pairs.
      refits: how many times training people were drawn anew; 0: the intervals are conditional on the fitted heads.
      warnings: what a reader must know before quoting a figure: people on both sides, people not given.
    """

    heads: dict[str, HeadResult]
    protocol: str
    n_genuine: int
    n_impostor: int
    n_people: int | None
    primary: str
    reference: str
    differences: dict[str, dict[str, Difference]]
    mcnemar: dict[str, McNemar]
    refits: int
    warnings: tuple[str, ...]

    def __getitem__(self, name: str) -> HeadResult:
        if name not in self.heads:
            raise KeyError(f"no head {name!r} was compared; these were: {', '.join(self.heads)}")
        return self.heads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    @property
    def conclusions(self) -> tuple[str, ...]:
        """A sentence a head on the primary quantity: the difference, its simultaneous interval, and what that excludes."""
        what = quantity_in_words(self.primary)
        found = []
        for name, difference in self.differences[self.primary].items():
            verdict = report.verdict(difference.simultaneous_low, difference.simultaneous_high)
            found.append(
                f"{name} minus {self.reference}: {100 * difference.estimate:+.2f} points of {what}, "
                f"{100 * difference.level:g} % interval [{100 * difference.simultaneous_low:+.2f}, "
                f"{100 * difference.simultaneous_high:+.2f}]: {verdict}"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types, for `report.write_json`; docs/results.md says what each field means."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return report.jsonable(fields | {"conclusions": self.conclusions})

    def __str__(self) -> str:
        rows, calibration = [], []
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
            more: dict[str, Any] = {
                "head": result.name,
                "AUC interval": f"[{result.auc_low:.4f}, {result.auc_high:.4f}]",
            }
            for far, matched in result.matched.items():
                if matched.resolution == "unresolvable":
                    continue
                text = f"{report.format_percent(matched.tar)} {report.format_interval(matched.low, matched.high)}"
                more[f"TAR at matched FAR {100 * far:g} %"] = report.resolved(text, matched.resolution, matched.needs)
            more["min Cllr"] = f"{result.min_cllr:.3f}"
            more["Brier"] = "-" if result.brier is None else f"{result.brier:.4f}"
            more["ECE"] = "-" if result.ece is None else report.format_percent(result.ece)
            calibration.append(more)
        people = "" if self.n_people is None else f" of {self.n_people:,} people"
        name, first = next((result.name, result.interval) for result in self.heads.values())
        lines = [
            f"{self.n_genuine:,} genuine and {self.n_impostor:,} impostor pairs{people}; {self.protocol}",
            "",
            "Decided by thresholds set on the training pairs:",
            report.table(rows),
            "",
            f"At one FAR of the tested pairs, and as likelihood ratios (Brier, ECE at {100 * PRIOR:g} % genuine pairs):",
            report.table(calibration),
            "",
        ]
        if self.differences[self.primary]:
            lines += [*self.conclusions, ""]
            lines += [_family(self)]
        lines.append(f"interval: {first.assumes} (n = {first.n:,}, effective n = {first.n_effective:,.0f} for {name})")
        if self.refits:
            lines.append(f"intervals include the training people's share: {self.refits} refits on people drawn anew")
        if any(point.resolution.status == "flagged" for result in self.heads.values() for point in result.tar.values()):
            lines.append("~ rests on fewer than 30 expected false accepts")
        return "\n".join([*lines, *(f"WARNING: {warning}" for warning in self.warnings)])


def _family(results: Results) -> str:
    found = results.differences[results.primary]
    least = ", ".join(f"{100 * d.detectable:.2f} ({name})" for name, d in found.items())
    p = ", ".join(f"{_p(results.mcnemar[name].p)} ({name})" for name in found)
    heads = "the head" if len(found) == 1 else f"all {len(found)} heads at once (max-|t|)"
    return (
        f"differences: {quantity_in_words(results.primary)} was declared in advance; intervals hold for {heads};\n"
        f"  detectable with 80 % power, points: {least}\n"
        f"  exact McNemar of the decisions, assumes independent pairs, p: {p}"
    )


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def quantity_in_words(quantity: str) -> str:
    """ "tar@0.1" → "TAR at matched FAR 10 %"."""
    if quantity.startswith("tar@"):
        return f"TAR at matched FAR {100 * float(quantity[4:]):g} %"
    return {"accuracy": "accuracy", "auc": "AUC"}[quantity]


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
    heads: Sequence[str] = USUAL_HEADS,
    layers: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    fars: Sequence[float] = (0.1, 0.01, 0.001),
    primary: str = PRIMARY,
    reference: str | None = None,
    draws: int = 1000,
    refit: int = 0,
    allow_shared: bool = False,
    seed: int = 0,
    level: float = 0.95,
) -> Results:
    """Fits heads on training pairs and tests them on other pairs; nothing is chosen on what is reported.

    What fits is one of three:
      train=...: those pairs fit, and (a, b, same) is the test (LFW View 1; one set's head on another set).
      folds=[n] ints: each fold in turn is the test and all others fit (LFW View 2); the accuracy is the mean of the
        folds', its standard error s/√folds with ddof = 1, and its interval Student's t over folds.
      neither, or folds=int: folds are dealt by person (`protocols.deal_folds`), and each is tested by heads fitted on
        the pairs that share nobody with it.

    Each head is then held against `reference` on accuracy, AUC, and TAR at each matched FAR that the pairs resolve, with
    intervals that allow for pairs that share people (`uncertainty.differences`). Declare `primary` before looking.

    Args:
      a, b: [n, d] embeddings of the two sides, from one encoder; neither NaN nor all zero. Distances are taken as they
        are: normalise first if the encoder does not.
      same: [n] bool, True for genuine pairs; both kinds must be present.
      people_a, people_b: [n] person ids. With them, intervals allow for pairs that share people, and people who are
        among the training people too are refused.
      train: training pairs: `EmbeddedPairs`, or (a, b, same) or (a, b, same, people_a, people_b).
      folds: [n] ints, or how many to deal; by default 10 are dealt unless `train` is given.
      heads: entries of `HEADS`, or "HEAD@LAYER".
      layers: layer → (a, b), [n, k] each, of the tested pairs; `train` then has them too, as `EmbeddedPairs`.
      fars: target FARs in (0, 1); the threshold is set on training pairs, the realised FAR stands beside it.
      primary: "accuracy", "auc", or "tar@FAR" for one of `fars`.
      reference: the head that others are held against; "threshold" where it is among them, else the first.
      draws: of people's weights, for the bands around ROCs.
      refit: how many times training people are drawn anew (with replacement) and heads fitted to them, with the
        regularisation they had. The variance of a figure over these refits is added to that over tested people. 0 leaves
        the intervals conditional on the fitted heads. Needs people.
      allow_shared: go on, with a warning, where tested people are among the training people, or folds share people.
      seed: of the draws.
      level: coverage of the intervals, in (0, 1).

    Returns:
      `Results`.

    Raises:
      ValueError: unusable embeddings (the rows are named), one kind of pair only, shapes that do not fit, both train
        and folds, an unknown head, layer or quantity, refits without people, or people on both sides (the rows are
        named) unless that is allowed.

    >>> rng = np.random.default_rng(0)
    >>> people = rng.normal(size=(60, 8))
    >>> who_a = np.arange(400) % 60
    >>> who_b = np.where(np.arange(400) < 200, who_a, (who_a + 1 + np.arange(400) % 7) % 60)
    >>> a, b = (people[who] + 0.3 * rng.normal(size=(400, 8)) for who in (who_a, who_b))
    >>> results = compare(a[::2], b[::2], (who_a == who_b)[::2], train=(a[1::2], b[1::2], (who_a == who_b)[1::2]))
    >>> results["threshold"].accuracy > 0.95
    True
    """
    test = EmbeddedPairs(a, b, same, people_a, people_b, layers or {})  # type: ignore[arg-type]  # it converts
    test.require_both_classes("tested pairs")
    if not heads:
        raise ValueError(f"no heads to compare: name some of {', '.join(heads_.HEADS)}.")
    for name in heads:
        test.at(heads_.named(name)[1])
    if len(set(heads)) < len(heads):
        raise ValueError(f"heads {list(heads)} name one twice: each can be compared once.")
    if train is not None and folds is not None:
        raise ValueError("both train and folds are given: fit on other pairs, or on the other folds, not both.")
    if reference is None:
        reference = "threshold" if "threshold" in heads else heads[0]
    if reference not in heads:
        raise ValueError(f"the reference {reference!r} is not among the heads compared: {', '.join(heads)}.")
    quantities = ["accuracy", "auc", *(f"tar@{far:g}" for far in fars)]
    if primary not in quantities:
        raise ValueError(f"primary is {primary!r}: declare one of {', '.join(quantities)}.")
    if draws < 2 or refit < 0 or refit == 1:
        raise ValueError(
            f"draws is {draws} and refit {refit}: a spread needs two at least; 1000 and 0 (or 100) are usual."
        )
    if refit and test.people_a is None:
        raise ValueError("refit draws training people anew, and people were not given: give people_a and people_b.")

    warnings: list[str] = []
    given = folds is not None and np.ndim(folds) > 0
    if train is not None:
        trials, protocol = _trained(train, test, warnings, allow_shared)
    else:
        trials, protocol = _folded(folds, test, warnings, allow_shared)
    if test.people_a is None:
        warnings.append("people were not given: nobody could check that training and tested people differ.")

    fitted = {name: [heads_.fit_pairs(name, trial.fit) for trial in trials] for name in heads}
    redrawn = _refitted(fitted, trials, test, fars=fars, refits=refit, seed=seed) if refit else {}
    results = {
        name: _result(
            name, fitted[name], trials, test, fars=fars, level=level, over_folds=given, draws=draws, seed=seed,
            extra={quantity: float(np.var(values[name], ddof=1)) for quantity, values in redrawn.items()},
        )
        for name in heads
    }  # fmt: skip
    measured = [q for q in quantities if q == primary or not q.startswith("tar@") or _resolved(float(q[4:]), test)]
    return Results(
        heads=results,
        protocol=protocol,
        n_genuine=int(test.same.sum()),
        n_impostor=int((~test.same).sum()),
        n_people=None
        if test.people_a is None or test.people_b is None
        else len(np.unique(np.concatenate([test.people_a, test.people_b]))),
        primary=primary,
        reference=reference,
        differences={q: _differences(q, results, reference, test, redrawn.get(q), level, seed) for q in measured},
        mcnemar={
            name: uncertainty.mcnemar(_correct(result, test.same), _correct(results[reference], test.same))
            for name, result in results.items()
            if name != reference
        },
        refits=refit,
        warnings=tuple(warnings),
    )


def _shared(people: list[Any], test: EmbeddedPairs, where: str, allowed: bool) -> str:
    """What to warn of; or a ValueError that names the tested rows."""
    if not allowed:
        sides = [np.isin(np.asarray(side), people) for side in (test.people_a, test.people_b)]
        rows = np.flatnonzero(sides[0] | sides[1])
        raise ValueError(
            f"{len(people)} people are {where} ({_some(people)}), in {len(rows)} tested pairs, first at rows "
            f"{rows[:5].tolist()}: heads would be tested on people they were fitted on. Leave these pairs out, let "
            "folds be dealt by person (folds=10), or go on with a warning: allow_shared=True, --allow-shared."
        )
    return f"{len(people)} people are {where} ({_some(people)}): the figures flatter the heads."


def _trained(train: Any, test: EmbeddedPairs, warnings: list[str], allow_shared: bool) -> tuple[list[_Trial], str]:
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
        warnings.append(_shared(both, test, "among the tested and the training people", allow_shared))
    return [_Trial(train, test, np.arange(len(test)))], f"heads fitted on {len(train):,} other pairs"


def _folded(folds: Any, test: EmbeddedPairs, warnings: list[str], allow_shared: bool) -> tuple[list[_Trial], str]:
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
        warnings.append(_shared(both, test, "in more than one fold", allow_shared))
    return trials, protocol


def _some(people: list[Any]) -> str:
    return ", ".join(str(person) for person in people[:3]) + (", …" if len(people) > 3 else "")


def _resolved(far: float, test: EmbeddedPairs) -> bool:
    return bool(metrics.resolvable(far, int((~test.same).sum())))


def _correct(result: HeadResult, same: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return (result.scores >= result.cuts) == same


def _figure(quantity: str, scores: Floats, cuts: Floats, same: NDArray[np.bool_]) -> float:
    if quantity == "accuracy":
        return float(((scores >= cuts) == same).mean())
    if quantity == "auc":
        return metrics.auc(scores, same)
    return metrics.matched_tar(scores, same, float(quantity[4:])).tar


def _influence(quantity: str, scores: Floats, cuts: Floats, same: NDArray[np.bool_]) -> Floats:
    """[n] what each pair moves the figure by, times n; its mean is 0."""
    if quantity == "accuracy":
        correct = ((scores >= cuts) == same).astype(np.float64)
        return correct - correct.mean()
    if quantity == "auc":
        return uncertainty.auc_influence(scores, same)
    return uncertainty.matched_tar_influence(scores, same, float(quantity[4:]))


def _differences(
    quantity: str,
    results: Mapping[str, HeadResult],
    reference: str,
    test: EmbeddedPairs,
    redrawn: Mapping[str, Floats] | None,
    level: float,
    seed: int,
) -> dict[str, Difference]:
    others = [name for name in results if name != reference]
    if not others:
        return {}
    figure, influence = (
        {name: of(quantity, result.scores, result.cuts, test.same) for name, result in results.items()}
        for of in (_figure, _influence)
    )
    extra = None
    if redrawn is not None:
        extra = np.atleast_2d(np.cov(np.stack([redrawn[name] - redrawn[reference] for name in others]), ddof=1))
    found = uncertainty.differences(
        np.stack([influence[name] - influence[reference] for name in others]),
        np.array([figure[name] - figure[reference] for name in others]),
        test.people_a,
        test.people_b,
        extra=extra,
        level=level,
        seed=seed,
    )
    return dict(zip(others, found, strict=True))


def _refitted(
    fitted: Mapping[str, Sequence[Head]],
    trials: list[_Trial],
    test: EmbeddedPairs,
    *,
    fars: Sequence[float],
    refits: int,
    seed: int,
) -> dict[str, dict[str, Floats]]:
    """Quantity → head → [refits] its figure when training people are drawn anew and heads fitted to their pairs."""
    if any(trial.fit.people_a is None for trial in trials):
        raise ValueError("refit draws training people anew, and theirs were not given: give train with people.")
    names = np.unique(np.concatenate([side for t in trials for side in (t.fit.people_a, t.fit.people_b)]))
    quantities = ["accuracy", "auc", *(f"tar@{far:g}" for far in fars)]
    found = {quantity: {name: np.empty(refits) for name in fitted} for quantity in quantities}
    rng = np.random.default_rng(seed)
    for draw in range(refits):
        samples: list[EmbeddedPairs] = []
        while len(samples) < len(trials):
            times = rng.poisson(1.0, len(names))
            samples = [_redrawn(trial.fit, names, times) for trial in trials]
            if any(sample.same.all() or not sample.same.any() for sample in samples):
                samples = []  # a few people can leave no genuine pair
        for name, heads in fitted.items():
            scores, cuts = np.empty(len(test)), np.empty(len(test))
            for head, sample, trial in zip(heads, samples, trials, strict=True):
                again = heads_.fit_pairs(name, sample, head.regularisation)
                scores[trial.where], cuts[trial.where] = again.of(trial.test), again.threshold
            for quantity in quantities:
                found[quantity][name][draw] = _figure(quantity, scores, cuts, test.same)
    return found


def _redrawn(pairs: EmbeddedPairs, names: NDArray[Any], times: Ints) -> EmbeddedPairs:
    """A genuine pair as often as its person was drawn, an impostor pair as often as both were, multiplied."""
    assert pairs.people_a is not None and pairs.people_b is not None  # noqa: PT018  (`_refitted` has seen to it)
    a, b = (times[np.searchsorted(names, side)] for side in (pairs.people_a, pairs.people_b))
    return pairs.take(np.repeat(np.arange(len(pairs)), np.where(pairs.same, a, a * b)))


def _result(
    name: str,
    fitted: list[Head],
    trials: list[_Trial],
    test: EmbeddedPairs,
    *,
    fars: Sequence[float],
    level: float,
    over_folds: bool,
    draws: int,
    seed: int,
    extra: Mapping[str, float],
) -> HeadResult:
    scores, cut = np.empty(len(test)), np.empty(len(test))
    for head, trial in zip(fitted, trials, strict=True):
        scores[trial.where] = head.of(trial.test)
        cut[trial.where] = head.threshold
    same = test.same
    correct = (scores >= cut) == same
    by_fold = tuple(float(correct[trial.where].mean()) for trial in trials)

    if over_folds:
        accuracy, standard_error, interval = _over_folds(by_fold, correct, test, level, extra.get("accuracy", 0.0))
    else:
        accuracy = float(correct.mean())
        interval = _over_pairs(correct, test, level, extra.get("accuracy", 0.0))
        standard_error = math.sqrt(accuracy * (1 - accuracy) / interval.n_effective)

    def around(quantity: str, estimate: float) -> tuple[float, float]:
        influence = _influence(quantity, scores, cut, same)
        low, high = uncertainty.rate_interval(
            estimate, influence, test.people_a, test.people_b, level=level, extra=extra.get(quantity, 0.0)
        )
        return low, high

    area = metrics.auc(scores, same)
    auc_low, auc_high = around("auc", area)
    matched = {}
    for far in fars:
        tar = metrics.matched_tar(scores, same, far).tar
        resolution = metrics.resolvable(far, int((~same).sum()))
        # Where the FAR is not resolved, nothing is known of the ROC's slope there either.
        low, high = around(f"tar@{far:g}", tar) if resolution else (0.0, 1.0)
        matched[far] = Matched(
            target=far, tar=tar, low=low, high=high, resolution=resolution.status, needs=resolution.needs
        )
    calibrated = fitted[0].calibrated
    band = None
    if test.people_a is not None and test.people_b is not None:
        least = max(1e-6, metrics.FLAGGED / int((~same).sum()))
        at = np.geomspace(least, 1, 40)[:-1] if least < 1 else np.zeros(0)
        if len(at):
            lower, upper = uncertainty.roc_band(
                scores, same, test.people_a, test.people_b, at, draws=draws, seed=seed, level=level
            )
            band = at, lower, upper
    return HeadResult(
        name=name,
        accuracy=accuracy,
        standard_error=standard_error,
        interval=interval,
        threshold=_one_or_all([head.threshold for head in fitted]),
        auc=area,
        auc_low=auc_low,
        auc_high=auc_high,
        eer=metrics.eer(scores, same),
        cllr=metrics.cllr(scores, same) if calibrated else None,
        min_cllr=metrics.min_cllr(scores, same),
        brier=metrics.brier(scores, same, prior=PRIOR) if calibrated else None,
        ece=metrics.ece(scores, same, prior=PRIOR) if calibrated else None,
        reliability=metrics.reliability(scores, same, prior=PRIOR) if calibrated else None,
        tar={far: _operating_point(far, fitted, trials, scores, same) for far in fars},
        matched=matched,
        band=band,
        fold_accuracy=by_fold,
        fitted=tuple(fitted),
        scores=scores,
        cuts=cut,
    )


def _one_or_all(values: list[float]) -> float | tuple[float, ...]:
    return values[0] if len(values) == 1 else tuple(values)


def _over_folds(
    by_fold: tuple[float, ...], correct: NDArray[np.bool_], test: EmbeddedPairs, level: float, extra: float
) -> tuple[float, float, Interval]:
    k, n = len(by_fold), len(test)
    mean, standard_error = float(np.mean(by_fold)), float(np.std(by_fold, ddof=1)) / math.sqrt(k)
    if not standard_error:
        # Folds that agree to the last pair show no spread, which does not mean that others would agree, too.
        return mean, standard_error, _over_pairs(correct, test, level, extra)
    variance = standard_error**2 + extra
    half = float(student.ppf((1 + level) / 2, k - 1)) * math.sqrt(variance)
    interval = Interval(
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        level=level,
        n=n,
        n_effective=min(float(n), mean * (1 - mean) / variance),
        assumes=f"the accuracies of the {k} folds are independent and alike (Student's t), though their heads share "
        "training pairs" + ("; training people are as those at hand" if extra else ""),
    )
    return mean, standard_error, interval


def _over_pairs(correct: NDArray[np.bool_], test: EmbeddedPairs, level: float, extra: float) -> Interval:
    if test.people_a is None or test.people_b is None:
        return uncertainty.wilson_interval(correct, level=level)
    return uncertainty.dyadic_interval(correct, test.people_a, test.people_b, level=level, extra=extra)


def _operating_point(
    far: float, fitted: list[Head], trials: list[_Trial], scores: Floats, same: NDArray[np.bool_]
) -> metrics.OperatingPoint:
    cut = np.empty(len(scores))
    thresholds = []
    for head, trial in zip(fitted, trials, strict=True):
        thresholds.append(metrics.threshold_at_far(head.of(trial.fit), trial.fit.same, far))
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

"""All pairs: every image against every other, in tiles, counted exactly, for any fitted head.

A list of 6,000 pairs cannot speak about false matches at one in a thousand; the same photos compared all with all can.
The protocol is in the spirit of BLUFR (Liao et al. 2014). Impostor scores are never all kept: a pass over tiles counts
exactly how many lie above each genuine score, and keeps the highest ones, which hold every threshold that is asked for.

Genuine pairs grow with the square of a person's photos, so that one much-photographed person can be most of them. The
figure to quote therefore weights each person equally; that of all pairs stands beside it. Intervals draw people, not
pairs: a weight w_i a person, genuine pairs weighted w_i and impostor pairs w_i·w_j, with the threshold found anew in
each draw (the vertex bootstrap, Snijders & Borgatti 1999).

Scores are computed in float64 by the head and then rounded to float32, and to 2^-40 of the largest genuine score, so
that the rounding noise of a matrix product does not order pairs that are equally alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from faceembed import metrics, report, uncertainty
from faceembed.uncertainty import Interval
from faceembed.verification.features import require_embeddings

__all__ = [
    "Band",
    "Concentration",
    "Curve",
    "DensePoint",
    "DenseResult",
    "DenseResults",
    "Difference",
    "PersonErrors",
    "ScoredPair",
    "Scorer",
    "TransferredPoint",
    "compare_all",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Weights = NDArray[np.unsignedinteger]

MAX_GENUINE = 20_000_000
"""Genuine pairs that are kept, 12 bytes each."""
MAX_TAIL = 30_000_000
"""Impostor pairs that are kept, 12 bytes each and as many again while they are sorted."""
SLACK = 1.5
"""How many times as many impostor pairs are kept as the largest target FMR accepts: draws need more, or fewer."""
BLOCK = 512
"""Impostor pairs whose weights are summed at once, for all draws: 2 × 512 × 1,000 bytes stay in the cache."""
TOGETHER = 1 << 20
"""Weights of impostor pairs that are counted up at once: 8 MB."""
BAND_POINTS = 30
CURVE_POINTS = 250
"""Points of a curve along each axis: as many spread over log FMR as over TAR."""
WORST = 10
"""People in each list of the worst."""
PAIRS = 100
"""Pairs in each list of the worst: many may be of one person."""
LOWEST = np.finfo(np.float32).min


class Scorer(Protocol):
    """What is needed of a head: `faceembed.verification.Head` has it."""

    def cross_scores(self, a: Any, b: Any, /) -> Floats:
        """Scores [p, q] of every row of a [p, d] with every row of b [q, d], symmetric, higher = same person."""
        ...


class ScoredPair(NamedTuple):
    """Rows i < j of the embeddings, and their score."""

    i: int
    j: int
    score: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensePoint:
    """What a head accepts at a target FMR, the threshold being set on these same impostor pairs: matched FMR.

    Attributes:
      fmr: the target.
      threshold: the lowest at which FMR <= target, by the rule of `metrics.threshold_at_far`.
      threshold_low, threshold_high: percentile interval of what other people would have set it to.
      realised: share of impostor pairs accepted, at most `fmr`.
      false_matches: how many.
      tar: mean over the people with two photos or more of the share of their genuine pairs accepted; FNMR is 1 - tar.
      interval: around `tar`.
      tar_pairs: share of all genuine pairs accepted.
      interval_pairs: around `tar_pairs`.
      resolution: whether there are impostor pairs enough to speak of this FMR.
    """

    fmr: float
    threshold: float
    threshold_low: float
    threshold_high: float
    realised: float
    false_matches: int
    tar: float
    interval: Interval
    tar_pairs: float
    interval_pairs: Interval
    resolution: metrics.Resolution


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferredPoint:
    """What became of a threshold that was set elsewhere.

    Attributes:
      target: the FMR that it was set for.
      threshold: as given.
      fmr: share of impostor pairs that it accepts here.
      fmr_interval: around `fmr`.
      fnmr: mean over people of the share of their genuine pairs refused.
      fnmr_interval: around `fnmr`.
      fnmr_pairs: share of all genuine pairs refused.
      fnmr_pairs_interval: around `fnmr_pairs`.
    """

    target: float
    threshold: float
    fmr: float
    fmr_interval: Interval
    fnmr: float
    fnmr_interval: Interval
    fnmr_pairs: float
    fnmr_pairs_interval: Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of the exact ROC at thresholds that are genuine scores, thinned for drawing; from (0, 0) to (1, 1).

    Attributes:
      fmr, tar, tar_pairs: [k] shares accepted, never falling; `tar` weights people equally.
      threshold: [k] accept when score >= threshold; the first is +inf, the last -inf.
    """

    fmr: Floats
    tar: Floats
    tar_pairs: Floats
    threshold: Floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band:
    """Pointwise intervals of the person-weighted TAR along the ROC, by double-or-nothing weights.

    Attributes:
      fmr: [k] target FMRs, evenly spaced in their logarithm, from what 10 impostor pairs resolve to the largest target.
      tar: [k] at the threshold for that FMR.
      low, high: [k] limits at the level of the results.
    """

    fmr: Floats
    tar: Floats
    low: Floats
    high: Floats


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersonErrors:
    """One person's errors.

    Attributes:
      person: the id given.
      photos: of that person.
      errors: comparisons decided wrongly: false matches with others, or own pairs refused.
      comparisons: how many there were of that kind.
      rate: errors / comparisons.
    """

    person: Any
    photos: int
    errors: int
    comparisons: int
    rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concentration:
    """Over how many people the errors at one FMR are spread.

    Comparisons here have no direction, so those whom others are taken for (lambs) and those who are taken for others
    (wolves) are the same people: a false match counts for both sides.

    Attributes:
      fmr: the target FMR: the strictest one that is resolvable.
      top_1, top_10: share of false matches (counted on both sides) held by the 1 % and 10 % of people with most of them.
      exposure_1, exposure_10: share of impostor comparisons in which those same people take part, by which the former is
        to be judged: whoever has many photos is compared often.
      lambs_and_wolves: people with most false matches, most first.
      goats: people with the highest FNMR, highest first; of equals, first who has more pairs.

    References:
      Doddington et al., "Sheep, goats, lambs and wolves" (1998); Yager & Dunstone, "The biometric menagerie", IEEE
      TPAMI 32 (2010).
    """

    fmr: float
    top_1: float
    top_10: float
    exposure_1: float
    exposure_10: float
    lambs_and_wolves: tuple[PersonErrors, ...]
    goats: tuple[PersonErrors, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseResult:
    """What one head did on all pairs.

    Attributes:
      name: as given.
      auc, eer: exact, over all pairs (pairs weighted equally), with the rules of `metrics.auc` and `metrics.eer`.
      tar: target FMR → `DensePoint`; look at its `.resolution` before quoting it.
      transferred: target FMR → `TransferredPoint`, for thresholds that the caller gave.
      curve, band: for plots.
      concentration: of errors over people; None where no target FMR is resolvable.
      false_matches: impostor pairs with the highest scores, highest first.
      false_non_matches: genuine pairs with the lowest scores, lowest first.
    """

    name: str
    auc: float
    eer: float
    tar: dict[float, DensePoint]
    transferred: dict[float, TransferredPoint]
    curve: Curve = dataclasses.field(repr=False)
    band: Band = dataclasses.field(repr=False)
    concentration: Concentration | None
    false_matches: tuple[ScoredPair, ...]
    false_non_matches: tuple[ScoredPair, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON's types."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["tar"] = list(self.tar.values())
        fields["transferred"] = list(self.transferred.values())
        for name in ("false_matches", "false_non_matches"):
            fields[name] = [pair._asdict() for pair in fields[name]]
        return report.jsonable(fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Person-weighted TAR of a head less that of the reference head, at matched FMR, on shared draws.

    Attributes:
      head, reference: names.
      fmr: the target FMR of both.
      difference: TAR - TAR of the reference, in [-1, 1].
      low, high: percentile interval of the difference.
      simultaneous_low, simultaneous_high: limits that hold for all heads at this FMR together, by max-|t| over the draws.
      standard_error: standard deviation over the draws.
      detectable: the difference that a test at this level would find with a chance of 80 %.
      level: coverage of both intervals.
      resolution: of the FMR.
    """

    head: str
    reference: str
    fmr: float
    difference: float
    low: float
    high: float
    simultaneous_low: float
    simultaneous_high: float
    standard_error: float
    detectable: float
    level: float
    resolution: metrics.Resolution

    def __str__(self) -> str:
        low, high = self.simultaneous_low, self.simultaneous_high
        return (
            f"{self.head} minus {self.reference}: {100 * self.difference:+.2f} points of TAR at FMR {100 * self.fmr:g} %, "
            f"{100 * self.level:g} % interval [{100 * low:+.2f}, {100 * high:+.2f}]: {report.verdict(low, high)}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseResults:
    """Heads by name: `results["threshold"].tar[1e-3].tar`; `print(results)` gives the table.

    Attributes:
      heads: name → `DenseResult`, in the order given.
      reference: the head that others are compared with.
      differences: one for each other head and FMR.
      n_images, n_people, n_genuine, n_impostor: what was compared.
      n_genuine_people: people with two photos or more.
      effective_people: (Σ pairs_i)² / Σ pairs_i²: how many people with equally many genuine pairs would say as much as
        the pair-weighted figures do.
      draws: bootstrap draws behind the intervals; those that left no genuine or no impostor pair are not among them.
      level: of all intervals.
    """

    heads: dict[str, DenseResult]
    reference: str
    differences: tuple[Difference, ...]
    n_images: int
    n_people: int
    n_genuine: int
    n_impostor: int
    n_genuine_people: int
    effective_people: float
    draws: int
    level: float

    def __getitem__(self, name: str) -> DenseResult:
        if name not in self.heads:
            raise KeyError(f"no head {name!r} was compared; these were: {', '.join(self.heads)}")
        return self.heads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def to_dict(self) -> dict[str, Any]:
        """JSON's types, for `report.write_json`."""
        return report.jsonable({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @property
    def summary(self) -> str:
        """What was compared, and the first table: TAR with each person weighted equally."""
        return "\n".join(self._counted())

    def _counted(self) -> list[str]:
        return [
            f"{self.n_genuine:,} genuine and {self.n_impostor:,} impostor pairs: every pair of {self.n_images:,} images "
            f"of {self.n_people:,} people",
            f"{self.n_genuine_people:,} people have genuine pairs; weighted by pairs they count for "
            f"{self.effective_people:,.1f} (effective number of people)",
            "",
            "TAR at matched FMR, each person weighted equally",
            self._table(by_pair=False),
        ]

    def __str__(self) -> str:
        every = [point for result in self.heads.values() for point in result.tar.values()]
        lines = [
            *self._counted(),
            "",
            "the same, each genuine pair weighted equally",
            self._table(by_pair=True),
            "",
            f"[ ]: {100 * self.level:g} % intervals over {self.draws:,} draws of people (vertex bootstrap); "
            "the heads are given",
        ]
        if any(point.resolution.status == "flagged" for point in every):
            lines.append("~ rests on fewer than 30 false matches")
        if said := [str(d) for d in self.differences if d.resolution]:
            lines += ["", *said]
        if moved := self._transferred():
            lines += ["", "thresholds set elsewhere", report.table(moved)]
        if spread := [_spread(result) for result in self.heads.values() if result.concentration]:
            lines += ["", *spread]
        return "\n".join(lines)

    def _table(self, *, by_pair: bool) -> str:
        rows = []
        for result in self.heads.values():
            row: dict[str, Any] = {"head": result.name}
            if not by_pair:
                row |= {"AUC": f"{result.auc:.4f}", "EER": report.format_percent(result.eer)}
            for point in result.tar.values():
                tar, interval = (
                    (point.tar_pairs, point.interval_pairs) if by_pair else (point.tar, point.interval)
                )  # fmt: skip
                text = f"{report.format_percent(tar)} {report.format_interval(interval.low, interval.high)}"
                if point.resolution.status == "unresolvable":
                    text = f"not resolvable (needs {point.resolution.needs:,})"
                elif point.resolution.status == "flagged":
                    text = f"~{text}"
                row[f"FMR {100 * point.fmr:g} %"] = text
            rows.append(row)
        return report.table(rows)

    def _transferred(self) -> list[dict[str, Any]]:
        def text(rate: float, interval: Interval) -> str:
            around = report.format_interval(interval.low, interval.high, digits=3)
            return f"{report.format_percent(rate, digits=3)} {around}"

        return [
            {
                "head": result.name,
                "set for FMR": f"{100 * point.target:g} %",
                "FMR here": text(point.fmr, point.fmr_interval),
                "FNMR by person": text(point.fnmr, point.fnmr_interval),
                "FNMR by pair": text(point.fnmr_pairs, point.fnmr_pairs_interval),
            }
            for result in self.heads.values()
            for point in result.transferred.values()
        ]


def _spread(result: DenseResult) -> str:
    c = result.concentration
    assert c is not None
    return (
        f"{result.name} at FMR {100 * c.fmr:g} %: 1 % of people hold {100 * c.top_1:.0f} % of the false matches, 10 % hold "
        f"{100 * c.top_10:.0f} % (they take part in {100 * c.exposure_1:.0f} % and {100 * c.exposure_10:.0f} % of the "
        "impostor comparisons)"
    )


def compare_all(
    emb: ArrayLike,
    people: ArrayLike,
    heads: Mapping[str, Scorer],
    *,
    fmrs: Sequence[float] = (1e-2, 1e-3, 1e-4),
    thresholds: Mapping[str, Mapping[float, float]] | None = None,
    reference: str | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    tile: int = 1024,
    layers: Mapping[str, ArrayLike] | None = None,
) -> DenseResults:
    """Compares every image with every other one, for each fitted head, and says how sure the figures are.

    Args:
      emb: [n, d] embeddings, one row an image; neither NaN nor all zero.
      people: [n] person ids of one comparable type; two people at least, one of them with two images at least.
      heads: name → fitted head; nothing is fitted here.
      fmrs: target FMRs in (0, 1). The threshold for each is set on all impostor pairs, anew in each draw, so that heads
        are compared at matched FMR.
      thresholds: head → {FMR it was set for: threshold}, set on other data; reported apart.
      reference: the head whose TAR is subtracted from each other's; by default "threshold" if it is there, else the first.
      draws: bootstrap draws of people, shared by all heads; as many again for the band around the ROC.
      seed: of the draws.
      level: coverage of the intervals, in (0, 1).
      tile: images a side of the square of scores that is held at once; it changes memory and time, no figure.
      layers: name → [n, k] other features of the same images, for heads whose `layer` is that name.

    Returns:
      `DenseResults`. Intervals take the heads as given and people as independent.

    Raises:
      ValueError: unusable embeddings (the rows are named), one person only, no genuine pair, lengths that differ, rates
        outside (0, 1), a head without its layer, scores that are not finite, or more pairs to keep than memory is meant
        for (20 million genuine pairs, 30 million impostor pairs accepted).

    References:
      Liao, Lei, Yi & Li, "A benchmark study of large-scale unconstrained face recognition" (2014); Snijders & Borgatti,
      "Non-parametric standard errors and tests for network statistics", Connections 22 (1999); Owen & Eckles,
      "Bootstrapping data arrays of arbitrary order", Annals of Applied Statistics 6 (2012), for double-or-nothing.

    >>> class Nearness:
    ...     def cross_scores(self, a, b):
    ...         return -np.square(a[:, None] - b[None]).sum(axis=2)
    >>> rng = np.random.default_rng(0)
    >>> people = np.arange(120) % 40
    >>> emb = rng.normal(size=(40, 8))[people] + 0.2 * rng.normal(size=(120, 8))
    >>> results = compare_all(emb, people, {"threshold": Nearness()}, fmrs=[0.01], draws=100)
    >>> results.n_genuine, results.n_impostor, results["threshold"].tar[0.01].tar > 0.95
    (120, 7020, True)
    """
    images = _Images.of(emb, people, layers)
    targets = _targets(fmrs)
    _require(images, heads, thresholds, reference, draws, level, tile)
    reference = reference or ("threshold" if "threshold" in heads else next(iter(heads)))

    poisson = _draws(images, draws, seed, "poisson")
    halves = _draws(images, draws, seed, "double")
    slack = SLACK
    results: dict[str, DenseResult] = {}
    drawn: dict[str, Floats] = {}
    for name, head in heads.items():
        given = dict((thresholds or {}).get(name, {}))
        scores = images.scores(name, head)
        genuine = _genuine(images, scores, tile)
        while True:
            impostor = _impostor(images, scores, genuine, tile, targets, list(given.values()), slack)
            cut = _cuts(impostor, poisson, targets)
            grid = _band_fmrs(images, targets)
            band_cut = _cuts(impostor, halves, grid)
            if cut is not None and band_cut is not None:
                break
            slack *= 2
        drawn[name], by_pair = _tars(genuine, poisson, cut)
        band, _ = _tars(genuine, halves, band_cut)
        results[name] = _result(
            name, images, genuine, impostor, poisson, targets, given, level, cut, drawn[name], by_pair, grid, band
        )
    return DenseResults(
        heads=results,
        reference=reference,
        differences=_differences(results, drawn, reference, int((images.pairs > 0).sum()), level),
        n_images=len(images.person),
        n_people=len(images.names),
        n_genuine=images.n_genuine,
        n_impostor=images.n_impostor,
        n_genuine_people=int((images.pairs > 0).sum()),
        effective_people=uncertainty.effective_number(images.pairs),
        draws=len(poisson.by_draw),
        level=level,
    )


# ---- what is compared ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Images:
    """Images sorted by person, so that genuine pairs lie near the diagonal.

    Attributes:
      row: [n] the row of each image in the arrays given.
      person: [n] its person, an index into `names`, never falling.
      names: [m] person ids, sorted.
      photos: [m] images of each person.
      pairs: [m] genuine pairs of each person.
      emb: [n, d] in the new order.
      layers: the same for each layer.
    """

    row: Ints
    person: NDArray[np.int32]
    names: NDArray[Any]
    photos: Ints
    pairs: Ints
    emb: NDArray[np.floating]
    layers: dict[str, NDArray[np.floating]]

    @classmethod
    def of(cls, emb: ArrayLike, people: ArrayLike, layers: Mapping[str, ArrayLike] | None) -> _Images:
        who = np.asarray(people)
        if who.ndim != 1:
            raise ValueError(f"people has shape {who.shape}: give one id an image, [n].")
        values = {"emb": emb, **{f"layer {name}": value for name, value in (layers or {}).items()}}
        checked = {}
        for what, value in values.items():
            rows = np.shape(value)[:1]
            if rows and rows[0] != len(who):
                raise ValueError(f"{what} has {rows[0]} rows for {len(who)} people: give one row and one id an image.")
            checked[what] = require_embeddings(what, value, len(who))
        names, person, photos = np.unique(who, return_inverse=True, return_counts=True)
        if len(names) < 2:
            raise ValueError(f"{len(who)} images of {len(names)} person: impostor pairs need two people at least.")
        if photos.max() < 2:
            raise ValueError(
                f"{len(who)} images of {len(names)} people, each with one: there is no genuine pair. "
                "Give two images of somebody, under one id."
            )
        row = np.argsort(person, kind="stable")
        return cls(
            row=row,
            person=person[row].astype(np.int32),
            names=names,
            photos=photos.astype(np.int64),
            pairs=photos.astype(np.int64) * (photos - 1) // 2,
            emb=checked["emb"][row],
            layers={name: checked[f"layer {name}"][row] for name in layers or {}},
        )

    @property
    def n_genuine(self) -> int:
        return int(self.pairs.sum())

    @property
    def n_impostor(self) -> int:
        n = len(self.person)
        return n * (n - 1) // 2 - self.n_genuine

    def scores(self, name: str, head: Scorer) -> _Scores:
        """The head's scores of blocks of these images."""
        layer = getattr(head, "layer", None)
        if layer is not None and layer not in self.layers:
            raise ValueError(
                f"head {name} reads layer {layer!r}, and the layers given are: {', '.join(self.layers) or 'none'}. "
                "Embed with that layer too."
            )
        return _Scores(name, head, self.emb if layer is None else self.layers[layer], self.row)


def _targets(fmrs: Sequence[float]) -> list[float]:
    targets = [float(fmr) for fmr in fmrs]
    if not targets or not all(0 < fmr < 1 for fmr in targets):
        raise ValueError(f"fmrs are {targets}: give one rate or more between 0 and 1, such as 0.001.")
    return list(dict.fromkeys(targets))


def _require(
    images: _Images,
    heads: Mapping[str, Scorer],
    thresholds: Mapping[str, Mapping[float, float]] | None,
    reference: str | None,
    draws: int,
    level: float,
    tile: int,
) -> None:
    if not heads:
        raise ValueError("no heads to compare: give a mapping from names to fitted heads.")
    for what, name in [("reference", reference), *(("thresholds", name) for name in thresholds or {})]:
        if name is not None and name not in heads:
            raise ValueError(f"{what} names the head {name!r}, and the heads given are {', '.join(heads)}.")
    for name, cuts in (thresholds or {}).items():
        for fmr, cut in cuts.items():
            if not math.isfinite(cut):
                raise ValueError(f"the threshold of {name} for FMR {fmr} is {cut}: give a finite number.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: give a coverage between 0 and 1, such as 0.95.")
    if draws < 2 / (1 - level):
        raise ValueError(
            f"{draws} draws leave none outside the limits of an interval at level {level}: "
            f"give {math.ceil(2 / (1 - level))} or more, better 1000."
        )
    if tile < 1:
        raise ValueError(f"tile is {tile}: give the images a side of a square of scores, such as 1024.")
    if images.n_genuine > MAX_GENUINE:
        most = int(images.photos.argmax())
        raise ValueError(
            f"{images.n_genuine:,} genuine pairs are more than the {MAX_GENUINE:,} that are kept in memory; "
            f"{images.names[most]} alone has {images.photos[most]:,} images. Take fewer images of a person."
        )


@dataclasses.dataclass
class _Scores:
    """Scores of blocks, rounded so that noise of the last bits makes no difference between equal pairs."""

    name: str
    head: Scorer
    emb: NDArray[np.floating]
    row: Ints
    magic: float = 0.0

    def __call__(self, rows: slice, columns: slice) -> NDArray[np.float32]:
        found = self.exactly(rows, columns)
        if self.magic:
            # Adding and taking off 1.5·2^52 units rounds to a multiple of the unit.
            found = (found + self.magic) - self.magic
        return found.astype(np.float32)

    def exactly(self, rows: slice, columns: slice) -> Floats:
        a, b = self.emb[rows], self.emb[columns]
        found = np.asarray(self.head.cross_scores(a, b), np.float64)
        if found.shape != (len(a), len(b)):
            raise ValueError(
                f"head {self.name} gives scores {found.shape} for {len(a)} and {len(b)} images: "
                f"cross_scores must give one for every pair, ({len(a)}, {len(b)})."
            )
        # A sum is not finite if a term is not; a float64 sum of float32 numbers cannot overflow.
        if not np.isfinite(found.sum()) or np.abs(found).max() > np.finfo(np.float32).max:
            i, j = np.argwhere(~(np.abs(found) <= np.finfo(np.float32).max))[0]
            pair = sorted((int(self.row[rows][i]), int(self.row[columns][j])))
            raise ValueError(
                f"head {self.name} gives the score {found[i, j]} to the images in rows {pair[0]} and {pair[1]}."
            )
        return found


# ---- genuine and impostor scores -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Genuine:
    """Genuine pairs, lowest score first.

    Attributes:
      score: [g] float32.
      i, j: [g] places in the order of `_Images`, i < j.
      person: [g] place among the people that have genuine pairs.
      people: [p] their places in `_Images.names`.
      pairs: [p] how many pairs each of them has.
    """

    score: NDArray[np.float32]
    i: NDArray[np.int32]
    j: NDArray[np.int32]
    person: NDArray[np.int32]
    people: Ints
    pairs: Ints


def _genuine(images: _Images, scores: _Scores, tile: int) -> _Genuine:
    people = np.flatnonzero(images.pairs)
    starts = np.concatenate([[0], np.cumsum(images.photos)])
    values: list[Floats] = []
    places: list[tuple[Any, Any]] = []
    for person in people:
        for r, c in _tiles(int(starts[person]), int(starts[person + 1]), tile):
            found = scores.exactly(r, c)
            i, j = np.triu_indices(len(found), 1) if r == c else np.divmod(np.arange(found.size), found.shape[1])
            values.append(found[i, j])
            places.append(((i + r.start).astype(np.int32), (j + c.start).astype(np.int32)))
    value = np.concatenate(values)
    # One image against all others joins in, for the case that all genuine pairs are copies of one photo.
    every = scores.exactly(slice(0, 1), slice(0, len(images.person)))
    largest = float(max(np.abs(value).max(), np.abs(every).max()))
    if largest > 0:
        scores.magic = 1.5 * 2.0 ** (52 - 40 + math.frexp(largest)[1])
        value = (value + scores.magic) - scores.magic
    score = value.astype(np.float32)
    i, j = (np.concatenate(side).astype(np.int32) for side in zip(*places, strict=True))
    order = np.lexsort((j, i, score))
    position = np.zeros(len(images.names), np.int32)
    position[people] = np.arange(len(people))
    return _Genuine(
        score=score[order],
        i=i[order],
        j=j[order],
        person=position[images.person[i[order]]],
        people=people,
        pairs=images.pairs[people],
    )


def _tiles(start: int, stop: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """Squares on and above the diagonal."""
    blocks = [slice(k, min(k + tile, stop)) for k in range(start, stop, tile)]
    return itertools.combinations_with_replacement(blocks, 2)


@dataclasses.dataclass(frozen=True)
class _Impostor:
    """Every impostor pair with a score of at least `bound`, highest first, and counts of all impostor pairs.

    Attributes:
      score: [t] float32, falling.
      i, j: [t] places in the order of `_Images`.
      a, b: [t] their people.
      bound: all impostor pairs down to it are here.
      n: how many impostor pairs there are.
      distinct: [u] distinct genuine scores, rising.
      above, ties: [u] how many impostor scores are above each of them, and equal to it.
    """

    score: NDArray[np.float32]
    i: NDArray[np.int32]
    j: NDArray[np.int32]
    a: NDArray[np.int32]
    b: NDArray[np.int32]
    bound: float
    n: int
    distinct: NDArray[np.float32]
    above: Ints
    ties: Ints


def _impostor(
    images: _Images,
    scores: _Scores,
    genuine: _Genuine,
    tile: int,
    targets: list[float],
    given: list[float],
    slack: float,
) -> _Impostor:
    n = images.n_impostor
    keep = min(n, max(PAIRS, math.ceil(slack * max(targets) * n) + 1))
    if keep > MAX_TAIL:
        raise ValueError(
            f"an FMR of {max(targets)} of {n:,} impostor pairs means keeping {keep:,} of them, more than the "
            f"{MAX_TAIL:,} that memory is meant for: ask for lower fmrs, or take fewer images."
        )
    # Below a threshold that was given nothing need be kept; above it, everything.
    floor = min(given, default=math.inf)
    distinct = np.unique(genuine.score)
    above = np.zeros(len(distinct), np.int64)
    at_least = np.zeros(len(distinct), np.int64)
    bound = float(LOWEST)
    parts: list[tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]] = []
    held = 0
    for r, c in _tiles(0, len(images.person), tile):
        found = scores(r, c)
        if images.person[r.stop - 1] >= images.person[c.start]:
            found[images.person[r][:, None] == images.person[c][None]] = -np.inf
        if r == c:
            found[np.tril_indices(len(found))] = -np.inf
        flat = found.ravel()
        ranked = np.sort(flat)
        above += len(flat) - np.searchsorted(ranked, distinct, side="right")
        at_least += len(flat) - np.searchsorted(ranked, distinct, side="left")
        if len(ranked) >= keep:
            bound = max(bound, min(float(ranked[-keep]), floor))
        hits = np.flatnonzero(flat >= np.float64(max(bound, float(LOWEST))))
        i, j = np.divmod(hits, found.shape[1])
        parts.append((flat[hits], (i + r.start).astype(np.int32), (j + c.start).astype(np.int32)))
        held += len(hits)
        if held > 2 * keep + tile * tile:
            parts, bound = _highest(parts, keep, bound, floor)
            held = len(parts[0][0])
            if held > MAX_TAIL:
                why = (
                    f"the threshold {floor:g}, given for it, accepts" if bound == floor else f"the score {bound:g} ties"
                )
                raise ValueError(
                    f"head {scores.name}: {why} more than {MAX_TAIL:,} impostor pairs, which is what memory is meant for. "
                    "Take fewer images, or leave this head's threshold out."
                )
    [(score, i, j)], bound = _highest(parts, keep, bound, floor)
    order = np.argsort(-score, kind="stable")
    i, j = i[order], j[order]
    return _Impostor(
        score=score[order],
        i=i,
        j=j,
        a=images.person[i],
        b=images.person[j],
        bound=bound,
        n=n,
        distinct=distinct,
        above=above,
        ties=at_least - above,
    )


def _highest(parts: list[tuple[Any, Any, Any]], keep: int, bound: float, floor: float) -> tuple[list[Any], float]:
    """The `keep` highest scores, all that tie with the last of them, and all from `floor` up."""
    score, i, j = (np.concatenate(side) for side in zip(*parts, strict=True))
    if len(score) > keep:
        bound = max(bound, min(float(np.partition(score, len(score) - keep)[len(score) - keep]), floor))
    stays = score >= bound
    return [(score[stays], i[stays], j[stays])], bound


# ---- draws of people -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Draws:
    """Weights of people, and what the pairs weigh in each draw.

    Attributes:
      by_person: [m, draws].
      by_draw: [draws, m].
      impostor: [draws] weight of all impostor pairs.
      sum_people: [draws] weight of the people that have genuine pairs.
      sum_pairs: [draws] weight of all genuine pairs.
    """

    by_person: Weights
    by_draw: Weights
    impostor: Ints
    sum_people: Ints
    sum_pairs: Ints


def _draws(images: _Images, draws: int, seed: int, kind: Literal["poisson", "double"]) -> _Draws:
    return _weighed(images, uncertainty.vertex_weights(len(images.names), draws, seed, kind))


def _weighed(images: _Images, weights: NDArray[Any]) -> _Draws:
    impostor, people, pairs = [], [], []
    for w in weights:
        many = w.astype(np.int64)
        photos = many * images.photos
        impostor.append((int(photos.sum()) ** 2 - int(photos @ photos)) // 2)
        people.append(int(many[images.pairs > 0].sum()))
        pairs.append(int(many @ images.pairs))
    # A draw of people none of whom has two photos, or of one person only, has no FNMR or no FMR.
    usable = (np.array(impostor) > 0) & (np.array(people) > 0)
    if not usable.any():
        raise ValueError(f"no draw of {len(images.names)} people has both genuine and impostor pairs: too few people.")
    kept = weights[usable]
    return _Draws(
        by_person=np.ascontiguousarray(kept.T),
        by_draw=kept,
        impostor=np.array(impostor)[usable],
        sum_people=np.array(people)[usable],
        sum_pairs=np.array(pairs)[usable],
    )


def _allowed(rate: float, n: Ints) -> Ints:
    """The largest integers k with k/n <= rate: how many impostor pairs a threshold may accept."""
    k = np.floor(rate * n).astype(np.int64)
    k += (k + 1) / n <= rate  # 0.29 * 100 is 28.999999999999996
    return k - (k / n > rate)


def _cuts(impostor: _Impostor, draws: _Draws, fmrs: Sequence[float] | Floats) -> NDArray[np.float32] | None:
    """[fmrs, draws]: the highest score that must be refused so that the weighted FMR is at most each target.

    None where a draw needs impostor pairs below those that were kept.
    """
    block = BLOCK * max(1, math.ceil(len(impostor.score) / (4096 * BLOCK)))
    total = _cumulative(impostor, draws, block)
    cuts = np.empty((len(fmrs), len(draws.by_draw)), np.float32)
    for f, fmr in enumerate(fmrs):
        allowed = _allowed(float(fmr), draws.impostor)
        full = (total[1:] <= allowed).sum(axis=0)  # blocks that may be accepted whole
        if (full == len(total) - 1).any():
            return None
        # Draws that end in the same block are counted up together, but never so many that they take much memory.
        for at in np.unique(full):
            part = slice(at * block, (at + 1) * block)
            ending = np.flatnonzero(full == at)
            for which in np.array_split(ending, math.ceil(len(ending) * block / TOGETHER)):
                a, b = (draws.by_draw[np.ix_(which, side[part])] for side in (impostor.a, impostor.b))
                running = np.cumsum(np.multiply(a, b, dtype=np.int64), axis=1)
                over = (running <= (allowed[which] - total[at, which])[:, None]).sum(axis=1)
                cuts[f, which] = impostor.score[part.start + over]
    return cuts


def _cumulative(impostor: _Impostor, draws: _Draws, block: int) -> Ints:
    """[blocks + 1, draws]: weight of the impostor pairs before each block, highest scores first."""
    n = len(impostor.score)
    # Products of two weights fit into the type of the weights, or they are taken in a wider one.
    weights = draws.by_person
    if int(weights.max()) ** 2 > np.iinfo(weights.dtype).max:
        weights = weights.astype(np.uint32)
    total = np.zeros((math.ceil(n / block) + 1, weights.shape[1]), np.int64)
    a = np.empty((BLOCK, weights.shape[1]), weights.dtype)
    b = np.empty_like(a)
    for start in range(0, n, BLOCK):
        part = slice(start, min(start + BLOCK, n))
        size = part.stop - start
        np.take(weights, impostor.a[part], axis=0, out=a[:size], mode="clip")
        np.take(weights, impostor.b[part], axis=0, out=b[:size], mode="clip")
        np.multiply(a[:size], b[:size], out=a[:size])
        total[start // block + 1] += a[:size].sum(axis=0, dtype=np.uint32)
    return np.cumsum(total, axis=0, out=total)


def _tars(genuine: _Genuine, draws: _Draws, cuts: NDArray[np.float32] | None) -> tuple[Floats, Floats]:
    """TAR by person and by pair [fmrs, draws], where scores above `cuts` [fmrs, draws] are accepted."""
    assert cuts is not None
    accepted = len(genuine.score) - np.searchsorted(genuine.score, cuts.ravel(), side="right")
    weights = draws.by_draw[:, genuine.people]
    by_person, by_pair = np.empty(cuts.size), np.empty(cuts.size)
    counts = np.zeros(len(genuine.people), np.int64)
    order = np.argsort(accepted, kind="stable")
    before = 0
    # From strict to lenient, each person's accepted pairs are counted up: linear in the pairs, however many draws.
    for k, group in itertools.groupby(order.tolist(), key=accepted.tolist().__getitem__):
        here = genuine.person[len(genuine.score) - k : len(genuine.score) - before]
        counts += np.bincount(here, minlength=len(counts))
        before = k
        which = np.fromiter(group, np.int64)
        d = which % cuts.shape[1]
        w = weights[d].astype(np.float64)
        by_person[which] = w @ (counts / genuine.pairs) / draws.sum_people[d]
        by_pair[which] = w @ counts / draws.sum_pairs[d]
    return by_person.reshape(cuts.shape), by_pair.reshape(cuts.shape)


def _fmrs_of(impostor: _Impostor, draws: _Draws, threshold: float) -> Floats:
    """[draws] weighted FMR at a given threshold; all pairs from it up must have been kept."""
    n = _count(impostor, threshold)
    cut = dataclasses.replace(impostor, score=impostor.score[:n], a=impostor.a[:n], b=impostor.b[:n])
    return _cumulative(cut, draws, max(n, BLOCK))[-1] / draws.impostor


def _count(impostor: _Impostor, threshold: float) -> int:
    """Impostor pairs accepted at a threshold, among those kept."""
    return int(np.searchsorted(-impostor.score.astype(np.float64), -threshold, side="right"))


# ---- figures -------------------------------------------------------------------------------------------------------------


def _result(
    name: str,
    images: _Images,
    genuine: _Genuine,
    impostor: _Impostor,
    draws: _Draws,
    targets: list[float],
    given: dict[float, float],
    level: float,
    cuts: NDArray[np.float32],
    drawn: Floats,
    drawn_pairs: Floats,
    grid: Floats,
    band: Floats,
) -> DenseResult:
    people = len(genuine.people)
    points: dict[float, DensePoint] = {}
    for f, fmr in enumerate(targets):
        threshold = _threshold(impostor, fmr)
        threshold_low, threshold_high = np.quantile(cuts[f], [(1 - level) / 2, (1 + level) / 2]).tolist()
        false = _count(impostor, threshold)
        tar, tar_pairs = _tar_at(genuine, threshold)
        points[fmr] = DensePoint(
            fmr=fmr,
            threshold=threshold,
            threshold_low=threshold_low,
            threshold_high=threshold_high,
            realised=false / impostor.n,
            false_matches=false,
            tar=tar,
            interval=_interval(tar, drawn[f], level, len(genuine.score), people),
            tar_pairs=tar_pairs,
            interval_pairs=_interval(tar_pairs, drawn_pairs[f], level, len(genuine.score), people),
            resolution=metrics.resolvable(fmr, impostor.n),
        )
    transferred: dict[float, TransferredPoint] = {}
    for target, threshold in given.items():
        refused = np.nextafter(np.float32(threshold), np.float32(-np.inf))
        if float(np.float32(threshold)) < threshold:  # rounded down: the float32 itself is below the threshold
            refused = np.float32(threshold)
        rates = _tars(genuine, draws, np.full((1, len(draws.by_draw)), refused))
        tar, tar_pairs = _tar_at(genuine, threshold)
        fmr = _count(impostor, threshold) / impostor.n
        transferred[target] = TransferredPoint(
            target=target,
            threshold=threshold,
            fmr=fmr,
            fmr_interval=_interval(fmr, _fmrs_of(impostor, draws, threshold), level, impostor.n, len(images.names)),
            fnmr=1 - tar,
            fnmr_interval=_interval(1 - tar, 1 - rates[0][0], level, len(genuine.score), people),
            fnmr_pairs=1 - tar_pairs,
            fnmr_pairs_interval=_interval(1 - tar_pairs, 1 - rates[1][0], level, len(genuine.score), people),
        )
    low, high = np.quantile(band, [(1 - level) / 2, (1 + level) / 2], axis=1)
    strict = [point for point in points.values() if point.resolution]
    return DenseResult(
        name=name,
        auc=_auc(genuine, impostor),
        eer=metrics.eer_of_counts(*_counts(genuine, impostor)),
        tar=points,
        transferred=transferred,
        curve=_curve(genuine, impostor),
        band=Band(
            fmr=grid,
            tar=np.array([_tar_at(genuine, _threshold(impostor, float(fmr)))[0] for fmr in grid]),
            low=low,
            high=high,
        ),
        concentration=_concentration(images, genuine, impostor, min(strict, key=lambda p: p.fmr)) if strict else None,
        false_matches=_worst(images, -impostor.score, impostor.i, impostor.j, sign=-1),
        false_non_matches=_worst(images, genuine.score, genuine.i, genuine.j, sign=1),
    )


def _threshold(impostor: _Impostor, fmr: float) -> float:
    """The lowest threshold at which at most `fmr` of the impostor pairs are accepted: above an order statistic."""
    k = int(_allowed(fmr, np.array([impostor.n]))[0])
    return float(np.nextafter(np.float64(impostor.score[k]), np.inf))


def _tar_at(genuine: _Genuine, threshold: float) -> tuple[float, float]:
    """TAR by person and by pair."""
    first = int(np.searchsorted(genuine.score.astype(np.float64), threshold, side="left"))
    counts = np.bincount(genuine.person[first:], minlength=len(genuine.people))
    return float((counts / genuine.pairs).mean()), float(counts.sum() / len(genuine.score))


def _interval(rate: float, drawn: Floats, level: float, n: int, people: int) -> Interval:
    assumes = "people are independent; the head is given (vertex bootstrap, percentiles)"
    variance = float(drawn.var(ddof=1))
    if variance == 0 and rate in (0.0, 1.0):
        # No draw of error-free people has an error: people, not pairs, say how much that means.
        low, high = metrics.wilson(rate, people, level=level)
        return Interval(
            low=low, high=high, level=level, n=n, n_effective=float(people),
            assumes="no errors, or nothing else, in as many independent trials as there are people (Wilson)",
        )  # fmt: skip
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    effective = min(float(n), rate * (1 - rate) / variance) if variance else float(n)
    return Interval(low=low, high=high, level=level, n=n, n_effective=effective, assumes=assumes)


def _counts(genuine: _Genuine, impostor: _Impostor) -> tuple[Ints, Ints]:
    """False and true accepts at +inf, at each distinct genuine score from the highest on, and at -inf."""
    size = len(genuine.score)
    true = size - np.searchsorted(genuine.score, impostor.distinct[::-1], side="left")
    false = (impostor.above + impostor.ties)[::-1]
    return np.concatenate([[0], false, [impostor.n]]), np.concatenate([[0], true, [size]]).astype(np.int64)


def _auc(genuine: _Genuine, impostor: _Impostor) -> float:
    at = np.searchsorted(impostor.distinct, genuine.score)
    # Twice the impostor pairs that outscore a genuine one, a tie counting one half; Python's integers do not overflow.
    lost = int((2 * impostor.above + impostor.ties)[at].sum(dtype=object if impostor.n > 10**11 else np.int64))
    pairs = 2 * len(genuine.score) * impostor.n
    return (pairs - lost) / pairs


def _curve(genuine: _Genuine, impostor: _Impostor) -> Curve:
    false, true = _counts(genuine, impostor)
    share = np.cumsum((1 / genuine.pairs)[genuine.person[::-1]]) / len(genuine.people)
    by_person = np.concatenate([[0.0], np.minimum(share, 1.0)])[true]
    by_person[true == true[-1]] = 1.0
    fmr, tar = false / impostor.n, true / true[-1]
    threshold = np.concatenate([[np.inf], impostor.distinct[::-1].astype(np.float64), [-np.inf]])
    spread = np.concatenate(
        [
            np.searchsorted(fmr, np.geomspace(1 / impostor.n, 1, CURVE_POINTS)),
            np.searchsorted(by_person, np.linspace(0, 1, CURVE_POINTS)),
        ]
    )
    at = np.unique(np.concatenate([[0, len(fmr) - 1], np.minimum(spread, len(fmr) - 1)]))
    return Curve(fmr=fmr[at], tar=by_person[at], tar_pairs=tar[at], threshold=threshold[at])


def _band_fmrs(images: _Images, targets: list[float]) -> Floats:
    highest = max(targets)
    return np.geomspace(min(metrics.FLAGGED / images.n_impostor, highest), highest, BAND_POINTS)


def _concentration(images: _Images, genuine: _Genuine, impostor: _Impostor, point: DensePoint) -> Concentration:
    k = point.false_matches
    people = len(images.names)
    false = np.bincount(impostor.a[:k], minlength=people) + np.bincount(impostor.b[:k], minlength=people)
    compared = images.photos * (len(images.person) - images.photos)
    order = np.lexsort((np.arange(people), -compared, -false))
    shares = []
    for part in (0.01, 0.1):
        top = order[: math.ceil(part * people)]
        shares.append((float(false[top].sum() / max(1, 2 * k)), float(compared[top].sum() / compared.sum())))
    first = int(np.searchsorted(genuine.score.astype(np.float64), point.threshold, side="left"))
    refused = np.bincount(genuine.person[:first], minlength=len(genuine.people))
    goats = np.lexsort((genuine.people, -genuine.pairs, -refused / genuine.pairs))
    return Concentration(
        fmr=point.fmr,
        top_1=shares[0][0],
        top_10=shares[1][0],
        exposure_1=shares[0][1],
        exposure_10=shares[1][1],
        lambs_and_wolves=tuple(
            _person(images, int(p), int(false[p]), int(compared[p])) for p in order[:WORST] if false[p]
        ),
        goats=tuple(
            _person(images, int(genuine.people[p]), int(refused[p]), int(genuine.pairs[p]))
            for p in goats[:WORST]
            if refused[p]
        ),
    )


def _person(images: _Images, person: int, errors: int, comparisons: int) -> PersonErrors:
    name = images.names[person]
    return PersonErrors(
        person=name.item() if isinstance(name, np.generic) else name,
        photos=int(images.photos[person]),
        errors=errors,
        comparisons=comparisons,
        rate=errors / comparisons,
    )


def _worst(
    images: _Images, rising: NDArray[np.float32], i: NDArray[np.int32], j: NDArray[np.int32], *, sign: int
) -> tuple[ScoredPair, ...]:
    """The first pairs of a rising order; of equals, those first that come first in the arrays given."""
    tied = int(np.searchsorted(rising, rising[min(PAIRS, len(rising)) - 1], side="right"))
    one, other = images.row[i[:tied]], images.row[j[:tied]]
    low, high = np.minimum(one, other), np.maximum(one, other)
    order = np.lexsort((high, low, rising[:tied]))[:PAIRS]
    return tuple(ScoredPair(int(low[k]), int(high[k]), sign * float(rising[k])) for k in order)


def _differences(
    results: dict[str, DenseResult], drawn: dict[str, Floats], reference: str, people: int, level: float
) -> tuple[Difference, ...]:
    others = [name for name in results if name != reference]
    nothing = 3 / people  # as `uncertainty.differences`: the limit for a rate of which no event was seen
    found = []
    for f, (fmr, base) in enumerate(results[reference].tar.items()):
        draws = {name: drawn[name][f] - drawn[reference][f] for name in others}
        points = {name: results[name].tar[fmr].tar - base.tar for name in others}
        errors = {name: float(draws[name].std(ddof=1)) for name in others}
        # Heads that never differ from the reference stray from it in no draw either: see `nothing`.
        t = [np.abs(draws[name] - points[name]) / errors[name] for name in others if errors[name] > 0]
        critical = float(np.quantile(np.max(t, axis=0), level)) if t else 0.0
        for name in others:
            low, high = np.quantile(draws[name], [(1 - level) / 2, (1 + level) / 2]).tolist()
            wide, found_with = critical * errors[name], uncertainty.detectable(errors[name], level)
            if not errors[name]:
                low, high = points[name] - nothing, points[name] + nothing
                wide = found_with = nothing
            found.append(
                Difference(
                    head=name,
                    reference=reference,
                    fmr=fmr,
                    difference=points[name],
                    low=low,
                    high=high,
                    simultaneous_low=points[name] - wide,
                    simultaneous_high=points[name] + wide,
                    standard_error=errors[name],
                    detectable=found_with,
                    level=level,
                    resolution=base.resolution,
                )
            )
    return tuple(found)

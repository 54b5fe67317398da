"""Where a head errs: its decisions on parts of the tested pairs, by what the user knows of the photos or by likeness."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from faceembed import metrics, report, uncertainty
from faceembed.uncertainty import Interval
from faceembed.verification.compare import HeadResult
from faceembed.verification.features import EmbeddedPairs

__all__ = ["Slice", "by_cluster", "slice_report"]

Bools = NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """A head's decisions on some of the tested pairs, at the thresholds that decided all of them.

    Attributes:
      name: of the slice, such as "camera=door".
      n_genuine, n_impostor: pairs in it; a rate without pairs is None.
      n_people: people in them, or None where people were not given.
      fnmr: share of genuine pairs refused; fmr: share of impostor pairs accepted.
      fnmr_interval, fmr_interval: around them.
      auc: of these pairs alone, or None where one kind is missing.
    """

    name: str
    n_genuine: int
    n_impostor: int
    n_people: int | None
    fnmr: float | None
    fnmr_interval: Interval | None
    fmr: float | None
    fmr_interval: Interval | None
    auc: float | None

    def row(self) -> dict[str, Any]:
        """Cells for `report.table`."""

        def rate(value: float | None, interval: Interval | None) -> str:
            if value is None or interval is None:
                return "-"
            return f"{report.format_percent(value)} {report.format_interval(interval.low, interval.high)}"

        return {
            "slice": self.name,
            "genuine": self.n_genuine,
            "impostor": self.n_impostor,
            "people": self.n_people,
            "FNMR": rate(self.fnmr, self.fnmr_interval),
            "FMR": rate(self.fmr, self.fmr_interval),
            "AUC": "-" if self.auc is None else f"{self.auc:.4f}",
        }


def slice_report(
    result: HeadResult,
    same: ArrayLike,
    masks: Mapping[str, ArrayLike],
    people_a: ArrayLike | None = None,
    people_b: ArrayLike | None = None,
    *,
    level: float = 0.95,
) -> list[Slice]:
    """A head's error rates on each slice of the tested pairs, all pairs first.

    The thresholds stay those that decided all pairs: a slice is to show whom they suit less well.

    Args:
      result: of the tested pairs.
      same: [n] bool of those pairs.
      masks: name → [n] bool, which pairs are in the slice; slices may overlap.
      people_a, people_b: [n] person ids, for intervals that allow for pairs that share people.
      level: coverage of the intervals.

    Returns:
      A `Slice` for all pairs and for each mask.

    Raises:
      ValueError: a mask of another length, or a slice without any pair.
    """
    y = np.asarray(same, bool)
    who = None if people_a is None or people_b is None else (np.asarray(people_a), np.asarray(people_b))
    accepted = result.scores >= result.cuts
    found = []
    for name, mask in {"all": np.ones(len(y), bool), **masks}.items():
        chosen = np.asarray(mask)
        if chosen.shape != y.shape or chosen.dtype != bool:
            raise ValueError(f"slice {name} is {chosen.dtype} {chosen.shape} for {len(y)} pairs: give booleans, [n].")
        if not chosen.any():
            raise ValueError(f"slice {name} has no pair: leave it out.")
        genuine, impostor = chosen & y, chosen & ~y
        fnmr, fnmr_interval = _rate(~accepted, genuine, who, level)
        fmr, fmr_interval = _rate(accepted, impostor, who, level)
        found.append(
            Slice(
                name=name,
                n_genuine=int(genuine.sum()),
                n_impostor=int(impostor.sum()),
                n_people=None if who is None else len(np.unique(np.concatenate([side[chosen] for side in who]))),
                fnmr=fnmr,
                fnmr_interval=fnmr_interval,
                fmr=fmr,
                fmr_interval=fmr_interval,
                auc=metrics.auc(result.scores[chosen], y[chosen]) if genuine.any() and impostor.any() else None,
            )
        )
    return found


def _rate(
    errors: Bools, chosen: Bools, who: tuple[NDArray[Any], NDArray[Any]] | None, level: float
) -> tuple[float | None, Interval | None]:
    if not chosen.any():
        return None, None
    wrong = errors[chosen]
    if who is None:
        return float(wrong.mean()), uncertainty.wilson_interval(wrong, level=level)
    return float(wrong.mean()), uncertainty.dyadic_interval(wrong, *(side[chosen] for side in who), level=level)


def by_cluster(pairs: EmbeddedPairs, clusters: int = 4, *, seed: int = 0) -> dict[str, Bools]:
    """Slices by likeness: photos are clustered by their embeddings, and a pair is in a cluster when both its photos are.

    Most impostor pairs fall between clusters and into no slice: what is compared within one are people who look alike to
    the encoder, among whom false matches are more frequent than among people drawn at random. Slices are for finding what
    to look at; they are made from the same embeddings that are judged.

    Args:
      pairs: the tested pairs.
      clusters: how many, at least 2.
      seed: of k-means.

    Returns:
      "cluster 1 (n photos)" → [n] bool, largest first; clusters without a pair are left out.

    Raises:
      ValueError: fewer than two clusters, or fewer photos than clusters.
    """
    photos, place = np.unique(np.concatenate([pairs.a, pairs.b]), axis=0, return_inverse=True)
    if not 2 <= clusters <= len(photos):
        raise ValueError(f"clusters is {clusters}: give 2 at least and no more than the {len(photos)} photos.")
    with threadpool_limits(1):
        label = KMeans(clusters, n_init=4, random_state=seed).fit(photos.astype(np.float64)).labels_
    a, b = label[place[: len(pairs)]], label[place[len(pairs) :]]
    size = np.bincount(label, minlength=clusters)
    masks = {}
    for rank, c in enumerate(np.argsort(-size, kind="stable").tolist(), 1):
        inside = (a == c) & (b == c)
        if inside.any():
            masks[f"cluster {rank} ({size[c]:,} photos)"] = inside
    return masks

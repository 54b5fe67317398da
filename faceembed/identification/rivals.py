"""Other ways to name a face from the same embeddings, and what one more person costs each of them.

A similarity needs a template of a new person and nothing else. A classifier over the people enrolled has to be trained
for
each that joins: alone (a logistic one against the others) or with everybody (a softmax over K).
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from faceembed import report
from faceembed.identification import openset
from faceembed.identification.openset import Mated, NonMated
from faceembed.identification.policy import squared_distances
from faceembed.identification.pooling import pooled
from faceembed.identification.protocol import draw, roles
from faceembed.metrics import resolvable

__all__ = ["RIVALS", "Rival", "compare", "table"]

Floats = NDArray[np.float64]

C = 100.0
"""scikit-learn's inverse strength of the penalty, of both classifiers: fixed, and not tuned on anybody."""

NEIGHBOURS = 3

MOST = 500
"""People enrolled at most: a softmax is trained anew for each that joins."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """A way to decide.

    Attributes:
      words: what it does.
      fit: [k, n, d] templates → scores of probes [q, d] against everybody enrolled, [q, k], higher = more alike.
      one_more: [k, n, d] templates → a call that makes searches know the last of them, given the others are known.
    """

    words: str
    fit: Callable[[Floats], Callable[[Floats], Floats]]
    one_more: Callable[[Floats], Callable[[], object]]


def _mean(templates: Floats) -> Callable[[Floats], Floats]:
    gallery = pooled(templates)
    return lambda probes: -squared_distances(probes, gallery)


def _nearest(templates: Floats) -> Callable[[Floats], Floats]:
    k, n, d = templates.shape
    flat = templates.reshape(k * n, d)
    return lambda probes: -squared_distances(probes, flat).reshape(len(probes), k, n).min(axis=2)


def _neighbours(templates: Floats) -> Callable[[Floats], Floats]:
    """Votes of the nearest templates; of equally many votes the nearer person counts."""
    k, n, d = templates.shape
    flat = templates.reshape(k * n, d)

    def score(probes: Floats) -> Floats:
        distance = squared_distances(probes, flat)
        voters = np.argpartition(distance, min(NEIGHBOURS, k * n) - 1, axis=1)[:, :NEIGHBOURS]
        votes = np.zeros((len(probes), k))
        np.add.at(votes, (np.arange(len(probes))[:, None], voters // n), 1.0)
        nearest = distance.reshape(len(probes), k, n).min(axis=2)
        return votes - nearest / (1 + nearest)  # between 0 and 1: never outweighs a vote

    return score


def _classifier(x: Floats, y: NDArray) -> LogisticRegression:
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater")  # a photo a person, as it is meant
        return LogisticRegression(C=C, max_iter=200).fit(x, y)


def _against_the_others(templates: Floats, person: int) -> tuple[Floats, float]:
    k, n, d = templates.shape
    y = np.repeat(np.arange(k) == person, n)
    found = _classifier(templates.reshape(k * n, d), y)
    return found.coef_[0], float(found.intercept_[0])


def _logistic(templates: Floats) -> Callable[[Floats], Floats]:
    parts = [_against_the_others(templates, person) for person in range(len(templates))]
    weight, intercept = np.array([part[0] for part in parts]), np.array([part[1] for part in parts])
    return lambda probes: probes @ weight.T + intercept


def _softmax(templates: Floats) -> Callable[[Floats], Floats]:
    k, n, d = templates.shape
    found = _classifier(templates.reshape(k * n, d), np.repeat(np.arange(k), n))
    weight, intercept = found.coef_, found.intercept_
    if k == 2:  # scikit-learn keeps one row of two
        weight, intercept = np.concatenate([-weight, weight]) / 2, np.concatenate([-intercept, intercept]) / 2

    def score(probes: Floats) -> Floats:
        logit = probes @ weight.T + intercept
        return logit - np.logaddexp.reduce(logit, axis=1, keepdims=True)  # log-probability

    return score


def _place(templates: Floats) -> Callable[[], object]:
    """The mean, into a row of a matrix that has room for it."""
    matrix = np.empty((len(templates), templates.shape[2]))
    return lambda: matrix.__setitem__(-1, pooled(templates[-1]))


def _place_all(templates: Floats) -> Callable[[], object]:
    """Each photo into a row."""
    matrix = np.empty(templates.shape)
    return lambda: matrix.__setitem__(-1, templates[-1])


RIVALS: dict[str, Rival] = {
    "mean template": Rival(words="distance to the mean of a person's photos", fit=_mean, one_more=_place),
    "nearest template": Rival(words="distance to the nearest of a person's photos", fit=_nearest, one_more=_place_all),
    "k-NN": Rival(words=f"votes of the {NEIGHBOURS} nearest photos", fit=_neighbours, one_more=_place_all),
    "logistic": Rival(
        words="one classifier a person, against the others enrolled",
        fit=_logistic,
        one_more=lambda templates: lambda: _against_the_others(templates, len(templates) - 1),
    ),
    "softmax": Rival(
        words="one classifier over everybody, trained anew for each who joins",
        fit=_softmax,
        one_more=lambda templates: lambda: _softmax(templates),
    ),
}


def compare(
    emb: ArrayLike, identity: ArrayLike, names: Sequence[str] | NDArray, calibrate: tuple[ArrayLike, ArrayLike, NDArray],
    *, fpir: float, photos: Sequence[int] = (1, 5), most: int = MOST, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Each rival on the same galleries, at thresholds that the calibrate people set with galleries of the same size.

    Args:
      emb: [n, d] embeddings of the tested people.
      identity: [n] int, 0 to m - 1.
      names: [m].
      calibrate: (embeddings, identity, names) of the others; they are divided into enrolled and strangers likewise.
      fpir: target.
      photos: of each person enrolled.
      most: people enrolled at most.
      seed: of draws.

    Returns:
      A row a rival and number of photos: "method", "words", "k", "photos", "target", "tpir", "fpir", "rank1" (each a
      Rate, of one draw of photos in this gallery), "seconds" to enrol one more. Numbers of photos that too few have, and
      rates that strangers do not resolve, have none.
    """
    rows = []
    for number in photos:
        sides = []
        for x, who, called in ((emb, identity, names), calibrate):
            try:
                enrolled, stranger = roles(called, np.bincount(np.asarray(who), minlength=len(called)))
                drawn = draw(x, who, enrolled, stranger, photos=number, draws=1, seed=seed)
            except ValueError:
                break  # too few people have so many photos
            sides.append((np.asarray(x, np.float64), drawn))
        # Strangers must resolve the rate where it is set and where it is judged.
        if len(sides) < 2 or not all(resolvable(fpir, drawn.searches.non_mated.strangers) for _, drawn in sides):
            continue
        k = min(most, *(len(drawn.templates[0]) for _, drawn in sides))
        if k < 5:
            continue
        for name, rival in RIVALS.items():
            (tested, here), (others, there) = sides
            score = rival.fit(others[there.templates[0][:k]])
            visits = NonMated(scores=score(others[there.visitors]), who=there.visitors, pool=np.arange(k))
            cut = openset.threshold_at_fpir(openset.ranked(visits, share=fpir), k, fpir)
            gallery = tested[here.templates[0][:k]]
            score = rival.fit(gallery)
            mated = Mated(scores=score(tested[here.probes[:k]]), mate=np.arange(k), pool=np.arange(k))
            non_mated = NonMated(scores=score(tested[here.visitors]), who=here.visitors + k, pool=np.arange(k))
            rows.append({
                "method": name, "words": rival.words, "k": k, "photos": number, "target": fpir,
                "tpir": openset.tpir(mated, k, cut), "fpir": openset.fpir(non_mated, k, cut),
                "rank1": openset.tpir(mated, k), "seconds": _seconds(rival.one_more(gallery)),
            })  # fmt: skip
    return rows


def _seconds(call: Callable[[], object], *, repeats: int = 3) -> float:
    """The least of a few, the first of which warms up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For the terminal."""

    def shown(rate: openset.Rate) -> str:
        return f"{report.format_percent(rate.value, digits=1)} {report.format_interval(rate.low, rate.high, digits=1)}"

    return f"other ways to decide, at a FPIR of {100 * rows[0]['target']:g} %\n" + report.table([
        {
            "method": row["method"], "K": row["k"], "photos": row["photos"], "TPIR": shown(row["tpir"]),
            "FPIR here": shown(row["fpir"]), "rank 1": shown(row["rank1"]), "one more, ms": 1e3 * row["seconds"],
        }
        for row in rows
    ])  # fmt: skip

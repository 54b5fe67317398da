"""What the field's own scripts print for the same embeddings, to hold our figures beside published ones.

facenet's `lfw.evaluate` and InsightFace's `eval/verification.py` share one procedure, followed here step by step. It
differs from ours, and not always in one direction:

- the accuracy's "±" is the population standard deviation of the ten folds (ddof = 0), not the standard error of their mean:
  about three times as large, and no interval either;
- thresholds are 0.00, 0.01, … 3.99, the first of several equally good ones, instead of all that the scores can tell apart;
  squared distances of flip-concatenated features reach 8, and of features that are not of unit length anything;
- folds are consecutive pairs, whoever is in them;
- VAL@FAR takes its threshold by interpolating thresholds over FARs, of which many are equal on a grid. SciPy refuses that
  today (`interp1d`, "Expect x to not have duplicates") and the scripts end there; forks of them keep the first threshold of
  each FAR, which is done here. Interpolated, the FAR of the training folds can exceed the target;
- EER and AUC are those of the mean ROC over the folds on the grid.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.model_selection import KFold

from faceembed import report
from faceembed.verification.features import EmbeddedPairs, squared_distance

__all__ = ["Parity", "parity"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FAR_TARGET = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity:
    """The scripts' figures.

    Attributes:
      accuracy, accuracy_std: mean and POPULATION standard deviation over folds.
      val, val_std, far: VAL@FAR=1e-3, its population standard deviation, and the mean FAR realised; None where a fold has
        pairs of one kind only.
      auc, eer: of the mean ROC over folds; the EER is None where the scripts' root finding fails, which `notes` tells.
      folds: how many.
      notes: what a reader must know.
    """

    accuracy: float
    accuracy_std: float
    val: float | None
    val_std: float | None
    far: float | None
    auc: float | None
    eer: float | None
    folds: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON's types."""
        return report.jsonable(dataclasses.asdict(self))

    def __str__(self) -> str:
        def figure(value: float | None, digits: int = 5) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        lines = [
            "as facenet's and InsightFace's scripts would print it (population standard deviation, thresholds on a grid):",
            f"  Accuracy: {figure(self.accuracy)}+-{figure(self.accuracy_std)}",
            f"  Validation rate: {figure(self.val)}+-{figure(self.val_std)} @ FAR={figure(self.far)}",
            f"  Area Under Curve (AUC): {figure(self.auc, 3)}",
            f"  Equal Error Rate (EER): {figure(self.eer, 3)}",
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def parity(a: ArrayLike, b: ArrayLike, same: ArrayLike, *, folds: int = 10) -> Parity:
    """The scripts' procedure on embedded pairs, in the order given.

    Args:
      a, b: [n, d] embeddings.
      same: [n] bool.
      folds: of consecutive pairs.

    Returns:
      `Parity`.

    Raises:
      ValueError: as `EmbeddedPairs`, or there are fewer pairs than folds.

    References:
      davidsandberg/facenet, src/facenet.py (calculate_roc, calculate_val) and src/lfw.py; deepinsight/insightface,
      recognition/arcface_torch/eval/verification.py, which copies them.

    >>> emb, same = np.eye(4)[np.arange(40) % 4], np.arange(40) % 3 == 0
    >>> found = parity(emb, np.where(same[:, None], emb, np.roll(emb, 1, axis=1)), same)
    >>> found.accuracy, found.val, found.eer
    (1.0, 1.0, 0.0)
    """
    pairs = EmbeddedPairs(a, b, same)  # type: ignore[arg-type]  # it converts
    pairs.require_both_classes("pairs")
    if len(pairs) < folds or folds < 2:
        raise ValueError(f"{len(pairs)} pairs cannot make {folds} folds: give more pairs, or at least two folds.")
    distance = squared_distance(pairs.a, pairs.b)[:, 0]
    split = list(KFold(n_splits=folds, shuffle=False).split(distance))
    notes: list[str] = []
    if not all(0 < pairs.same[test].sum() < len(test) for _, test in split):
        # Lists such as View 1's have all genuine pairs first; the scripts were written for lists that alternate.
        order = np.argsort(_share_before(pairs.same), kind="stable")
        pairs, distance = pairs.take(order), distance[order]
        notes.append("genuine and impostor pairs were interleaved, or a fold would hold one kind only.")
    if distance.max() > 4:
        notes.append(
            f"squared distances reach {distance.max():.2f} and the grid ends at 4: the scripts assume features of unit "
            "length."
        )

    grid = np.arange(0, 4, 0.01)
    tpr, fpr, right = _rates(grid, distance, pairs.same, split)
    accuracy = []
    for (_, test), (at_train, _) in zip(split, right, strict=True):
        best = grid[int(np.argmax(at_train))]
        accuracy.append(float(((distance[test] < best) == pairs.same[test]).mean()))
    mean_tpr, mean_fpr = tpr.mean(axis=0), fpr.mean(axis=0)
    eer = None
    auc = float(np.trapezoid(mean_tpr, mean_fpr))
    try:
        eer = float(brentq(lambda x: 1.0 - x - interp1d(mean_fpr, mean_tpr)(x), 0.0, 1.0))
    except ValueError as error:
        notes.append(f"EER: the scripts end with an error here ({error}).")

    val = val_std = far = None
    if all(0 < pairs.same[test].sum() < len(test) for _, test in split):
        vals, fars = _validation(distance, pairs.same, split)
        val, val_std, far = float(np.mean(vals)), float(np.std(vals)), float(np.mean(fars))
        notes.append(
            "VAL@FAR keeps the first threshold of equal FARs; with today's SciPy the scripts end there instead."
        )
    else:
        notes.append("VAL@FAR: a fold has pairs of one kind only, where the scripts divide by zero.")
    return Parity(
        accuracy=float(np.mean(accuracy)),
        accuracy_std=float(np.std(accuracy)),
        val=val,
        val_std=val_std,
        far=far,
        auc=auc,
        eer=eer,
        folds=folds,
        notes=tuple(notes),
    )


def _share_before(same: Bools) -> Floats:
    """[n] which share of its own kind stands before each pair: sorting by it interleaves the kinds evenly."""
    place = np.where(same, np.cumsum(same) - 0.5, np.cumsum(~same) - 0.5)
    return place / np.where(same, same.sum(), (~same).sum())


def _rates(
    grid: Floats, distance: Floats, same: Bools, split: list[tuple[Any, Any]]
) -> tuple[Floats, Floats, list[tuple[Floats, Floats]]]:
    """TPR and FPR [folds, grid] of the test folds, and the accuracies [grid] of each fold's two sides."""
    accepted = distance[:, None] < grid
    tpr, fpr, right = [], [], []
    for train, test in split:
        genuine, impostor = test[same[test]], test[~same[test]]
        # Where a fold lacks a kind the scripts say 0.
        tpr.append(accepted[genuine].mean(axis=0) if len(genuine) else np.zeros(len(grid)))
        fpr.append(accepted[impostor].mean(axis=0) if len(impostor) else np.zeros(len(grid)))
        right.append(tuple((accepted[side] == same[side, None]).mean(axis=0) for side in (train, test)))
    return np.stack(tpr), np.stack(fpr), right


def _validation(distance: Floats, same: Bools, split: list[tuple[Any, Any]]) -> tuple[list[float], list[float]]:
    grid = np.arange(0, 4, 0.001)
    vals, fars = [], []
    for train, test in split:
        impostor = np.sort(distance[train][~same[train]])
        far_train = np.searchsorted(impostor, grid, side="left") / max(1, len(impostor))
        threshold = 0.0
        if far_train.max() >= FAR_TARGET:
            values, first = np.unique(far_train, return_index=True)
            threshold = float(np.interp(FAR_TARGET, values, grid[first]))
        genuine, others = test[same[test]], test[~same[test]]
        vals.append(float((distance[genuine] < threshold).mean()))
        fars.append(float((distance[others] < threshold).mean()))
    return vals, fars
